//! A snapshot is brought to a place outside: its blocks, its pages, and its manifest last.
//!
//! What the place has already does not travel, and is not read either: of an earlier snapshot that is in the
//! place and still at home, the layers tell what has changed since ([`source::difference`]). docs/format.md
//! argues the order, and what a cut at each step leaves.

use super::leases::Held;
use super::source::{self, Source};
use super::{For, Session, Target};
use crate::backup::block::BLOCK;
use crate::backup::lease::Lease;
use crate::backup::manifest::{self, Manifest, PageEntry, Plane, Planes};
use crate::backup::marks::Mark;
use crate::backup::page::{Page, RUN};
use crate::backup::{self as place, BLOCKS, ContentName, PAGES};
use crate::base::{Error, Kind, Result, Timestamp};
use crate::catalog::layout::LayerRecord;
use crate::catalog::snapshot::Snapshot;
use crate::catalog::{LayerId, SnapshotId};
use crate::crypt::BackupKeys;
use crate::disk::transfer::Watch;
use crate::events::Event;
use crate::helper::carry::UnderWay;
use crate::helper::unwrap;
use crate::kms::Failure;
use crate::ops::Store;
use crate::place::{PlaceUrl, Put};
use crate::sandbox;
use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;

/// Objects on their way at a time.
const WINDOW: usize = 12;

/// What a push has done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pushed {
    /// The snapshot.
    pub snapshot: SnapshotId,
    /// Its URL: what "snapshot pull" takes.
    pub url: String,
    /// How many blocks of 512 KiB it has in the place.
    pub blocks: u64,
    /// How many of them were brought there now.
    pub put_blocks: u64,
    /// How many bytes were brought there now.
    pub put_bytes: u64,
    /// The snapshot that the place had, from which what has changed was found.
    pub base: Option<SnapshotId>,
    /// Whether it was there already, whole and as it is now.
    pub was_there: bool,
}

/// Brings a snapshot to a place, and reports a `pushSnapshot` event. `watch` is told how far it has
/// come; an error of it ends the push, which the next one goes on with. This process, and what it
/// starts, has no network afterwards.
///
/// # Errors
/// `NotFound` if the snapshot was deleted meanwhile; `Unsupported` for one that is not encrypted whole;
/// `Busy` if it is being pushed there already, or if somebody removes snapshots there; `Corrupt` for a
/// snapshot that was edited, and for a place that is not what it was; those of the KMS and of the place.
pub fn push(store: &Store, id: SnapshotId, target: &Target, watch: Watch<'_>) -> Result<Pushed> {
    let started = Timestamp::now();
    let attempt = || format!("push {id} to {}", target.url);
    let snapshot = store.catalog().load_snapshot(id)?;
    let done = begin(store, &snapshot, target, watch);
    let result = done.as_ref().map(|it| it.base.is_some()).map_err(|failure| failure.cause.clone());
    store.events().record(&Event::push_snapshot(id, snapshot.volume(), result, started));
    done.map_err(|failure| failure.error.context(attempt()))
}

fn begin(store: &Store, snapshot: &Snapshot, target: &Target, watch: Watch<'_>) -> Result<Pushed, Failure> {
    let Some(planes) = Planes::of(snapshot.layout()) else { return Err(not_encrypted(snapshot).into()) };
    store.catalog().check_snapshot(snapshot)?;
    let mut session = Session::open(store, target, For::Pushing)?;
    let held = session.marks.lock(snapshot.id())?;
    let (owner, volume) = (snapshot.key_owner(), snapshot.volume());
    let keys = planes.keys.iter().map(|&n| {
        let key = &snapshot.keys()[n];
        unwrap::backup_keys(store.hardened(), store.root(), owner, key, volume)
    });
    let keys = keys.collect::<Result<Vec<_>, _>>()?;
    sandbox::give_up_network()?;
    let done = Push { store, snapshot, planes, keys }.run(&mut session, watch)?;
    session.marks.unlock(snapshot.id(), held);
    Ok(done)
}

fn not_encrypted(snapshot: &Snapshot) -> Error {
    let id = snapshot.id();
    let message = match snapshot.is_encrypted() {
        false => format!(
            "{id} is not encrypted, and nothing leaves in the clear: copy it under a KMS key first \
             (\"sealblk snapshot copy {id} --key …\"), and push the copy"
        ),
        true => format!(
            "a part of {id} is in the clear, from before its volume was encrypted, and nothing leaves so: \
             push a snapshot that is made when everything is encrypted (\"sealblk volume show {}\" says how \
             far that is), or a copy under another KMS key",
            snapshot.volume()
        ),
    };
    Error::new(Kind::Unsupported, message)
}

/// A snapshot that is pushed, with its keys: one set for each plane.
struct Push<'a> {
    store: &'a Store,
    snapshot: &'a Snapshot,
    planes: Planes,
    keys: Vec<BackupKeys>,
}

/// What the place has of an earlier snapshot.
struct Base {
    /// The snapshot, if it is at home as well, so that its layers have told what has changed.
    id: Option<SnapshotId>,
    /// For each of our planes, its pages there.
    pages: Vec<Plane>,
    /// The blocks that may be others.
    changed: Vec<Range<u64>>,
}

impl Push<'_> {
    fn run(&self, session: &mut Session, watch: Watch<'_>) -> Result<Pushed> {
        manifest::check_seal(self.snapshot, &self.keys[0])?;
        let id = self.snapshot.id();
        let lease = Lease::Push(id, session.marks.host()?);
        let mut lease = Held::push(session, lease)?;
        let record = manifest::record(self.snapshot, &self.planes, &self.keys[0]);
        let before = self.before(session)?;
        if let Some(before) = before.as_ref().filter(|it| is_as(&it.snapshot, &record)) {
            lease.give_back(session)?;
            let (url, blocks) = (url_of(&session.url, id), before.blocks());
            let (put_blocks, put_bytes) = (0, 0);
            return Ok(Pushed {
                snapshot: id,
                url,
                blocks,
                put_blocks,
                put_bytes,
                base: None,
                was_there: true,
            });
        }
        let number = before.as_ref().map_or(0, |it| it.number);
        let known = session.marks.known(id)?.map_or(0, |mark| mark.number);
        let number = number.max(known).checked_add(1);
        let number = number.ok_or_else(|| Error::new(Kind::Corrupt, "the manifest's number has no next"))?;
        let base = match before {
            // Its blocks are there; how its data keys are wrapped, or what is said of it, has changed.
            Some(before) => self.same(&before),
            None => self.base(session)?,
        };
        let base_id = base.as_ref().and_then(|base| base.id).filter(|base| *base != id);
        let mut way = Way::new(self, base, lease.was_there && matches!(session.url, PlaceUrl::Bucket { .. }));
        let planes = way.bring_all(session, &mut lease, watch)?;
        let chain = self.snapshot.layers().iter().map(|layer| layer.id).collect();
        let manifest = Manifest { place: session.id, number, snapshot: record, chain, planes };
        self.commit(session, &manifest, &lease)?;
        lease.give_back(session)?;
        Ok(Pushed {
            snapshot: id,
            url: url_of(&session.url, id),
            blocks: manifest.blocks(),
            put_blocks: way.put_blocks,
            put_bytes: way.put_bytes,
            base: base_id,
            was_there: false,
        })
    }

    /// The manifest of this very snapshot that the place has.
    fn before(&self, session: &mut Session) -> Result<Option<Manifest>> {
        let id = self.snapshot.id();
        let known = session.marks.known(id)?;
        let Some(claim) = session.claim(id)? else {
            if known.is_some() {
                log::warn!("{id} was in {}, and is not any more: it is pushed anew", session.url);
            }
            return Ok(None);
        };
        session.check_claim(id, &claim, known)?;
        let mark = super::mark_of(&claim);
        let manifest = claim.prove(&self.keys[0]).map_err(|e| e.context(id))?;
        session.marks.note(id, mark)?;
        Ok(Some(manifest))
    }

    /// The same snapshot as its own base: nothing has changed.
    fn same(&self, before: &Manifest) -> Option<Base> {
        Some(Base { id: Some(before.snapshot.id()), pages: self.pages_of(before), changed: Vec::new() })
    }

    /// The pages of another manifest, for each of our planes: of the one under the same data key.
    fn pages_of(&self, base: &Manifest) -> Vec<Plane> {
        let of_plane = |&n: &usize| {
            let check = self.snapshot.keys()[n].check();
            let same =
                base.snapshot.keys().iter().position(|key| key.check().is_some() && key.check() == check);
            same.and_then(|n| base.planes.get(n).cloned()).unwrap_or_default()
        };
        self.planes.keys.iter().map(of_plane).collect()
    }

    /// The snapshot in the place, of those that are at home as well, with which ours has
    /// most layers in common.
    fn base(&self, session: &mut Session) -> Result<Option<Base>> {
        let catalog = self.store.catalog();
        let ours: Vec<LayerId> = self.snapshot.layers().iter().map(|layer| layer.id).collect();
        let mut best: Option<(usize, Timestamp, Snapshot)> = None;
        for id in session.snapshots()? {
            let Ok(other) = catalog.load_snapshot(id) else { continue };
            let common = other.layers().iter().filter(|layer| ours.contains(&layer.id)).count();
            let rank = (common, other.created());
            if common > 0 && best.as_ref().is_none_or(|(common, created, _)| (*common, *created) < rank) {
                best = Some((common, other.created(), other));
            }
        }
        if let Some((_, _, other)) = best {
            match self.of_base(session, &other) {
                Ok(Some(base)) => return Ok(Some(base)),
                Ok(None) => {}
                Err(e) => {
                    let id = other.id();
                    log::warn!("{id}, which {} has, does not tell what has changed: {e}", session.url);
                }
            }
        }
        self.known(session)
    }

    /// The newest snapshot of the same volume in the place, which is not at home: everything is read, and
    /// what has the same name at the same position does not travel.
    fn known(&self, session: &mut Session) -> Result<Option<Base>> {
        let mut newest: Option<Manifest> = None;
        for id in session.snapshots()? {
            let Ok(Some(claim)) = session.claim(id) else { continue };
            let theirs = &claim.claimed().snapshot;
            let is_newer = newest.as_ref().is_none_or(|it| it.snapshot.created() < theirs.created());
            if theirs.volume() != self.snapshot.volume() || !is_newer {
                continue;
            }
            if let Some(keys) = self.keys_of(theirs)
                && session.check_claim(id, &claim, session.marks.known(id)?).is_ok()
                && let Ok(proved) = claim.prove(keys)
            {
                newest = Some(proved);
            }
        }
        let Some(manifest) = newest else { return Ok(None) };
        let (mut changed, _) = source::blocks_with_data(&self.store.catalog(), self.snapshot.layers())?;
        let pages = self.pages_of(&manifest);
        // What it has and ours has not goes.
        let numbers = pages.iter().flat_map(|plane| plane.pages.keys()).map(|&number| u64::from(number));
        changed.extend(numbers.map(|number| number * RUN..(number + 1) * RUN));
        Ok(Some(Base { id: None, pages, changed: source::joined(changed) }))
    }

    /// The keys by which a manifest's snapshot is proved: those of the data key of its top
    /// layer, if that is one of ours.
    fn keys_of(&self, theirs: &Snapshot) -> Option<&BackupKeys> {
        let check = theirs.keys().first()?.check()?;
        let plane = self.planes.keys.iter().position(|&n| self.snapshot.keys()[n].check() == Some(check))?;
        self.keys.get(plane)
    }

    fn of_base(&self, session: &mut Session, other: &Snapshot) -> Result<Option<Base>> {
        let (catalog, id) = (self.store.catalog(), other.id());
        let Some(claim) = session.claim(id)? else { return Ok(None) };
        session.check_claim(id, &claim, session.marks.known(id)?)?;
        let Some(keys) = self.keys_of(&claim.claimed().snapshot) else { return Ok(None) };
        if other.volume() != self.snapshot.volume() {
            // Its seal key is another volume's, and not among ours.
            return Ok(None);
        }
        let manifest = claim.prove(keys)?;
        let theirs: Vec<LayerId> = other.layers().iter().map(|layer| layer.id).collect();
        let ours: Vec<LayerId> = self.snapshot.layers().iter().map(|layer| layer.id).collect();
        if manifest.chain != theirs
            || manifest.snapshot.geometry().sector_size() != self.snapshot.geometry().sector_size()
        {
            return Ok(None);
        }
        let Some(only) = source::difference(&ours, &theirs) else { return Ok(None) };
        let all = self.snapshot.layers().iter().chain(other.layers());
        let mut differing: Vec<LayerRecord> = all.filter(|layer| only.contains(&layer.id)).copied().collect();
        differing.dedup_by_key(|layer| layer.id);
        let (mut changed, locked) = source::blocks_with_data(&catalog, &differing)?;
        // As long as it is there, nothing of what it shows is given back, and what was looked at is true.
        catalog.load_snapshot(id)?;
        drop(locked);
        // Where one is longer, or the last block of one is cut off by its end.
        let sizes = [manifest.snapshot.geometry().size(), self.snapshot.geometry().size()];
        if sizes[0] != sizes[1] {
            let from = sizes[0].min(sizes[1]) / BLOCK as u64;
            changed.push(from..manifest::blocks_of(sizes[0].max(sizes[1])));
        }
        Ok(Some(Base { id: Some(id), pages: self.pages_of(&manifest), changed: source::joined(changed) }))
    }

    /// Puts the manifest, **which is the moment**: everything that it names is there, durably.
    fn commit(&self, session: &mut Session, manifest: &Manifest, lease: &Held) -> Result<()> {
        let id = self.snapshot.id();
        // Its record has been there all the time, and so has everything that it shows.
        self.store.catalog().load_snapshot(id)?;
        session.carrier.sync()?;
        lease.check(session)?;
        let bytes = manifest.to_bytes(&self.keys[0]);
        let name = place::manifest_of(id);
        let put = if manifest.number == 1 { Put::IfNew } else { Put::Replace };
        // A put whose answer was lost is tried again, and then finds what it has put itself.
        let is_ours = session.carrier.put(&name, &bytes, put)?
            || session.carrier.get(&name, manifest::MAX)?.is_some_and(|there| there == bytes);
        if !is_ours {
            let message = format!("another host has pushed {id} there just now");
            return Err(Error::new(Kind::Busy, message));
        }
        session.carrier.sync()?;
        if let Err(e) = lease.check(session) {
            // What it names may have been swept meanwhile.
            session.carrier.remove(&name)?;
            return Err(e);
        }
        session.marks.note(id, Mark { number: manifest.number, digest: manifest::digest(&bytes) })
    }
}

/// Whether a manifest's record says what `ours` says, except for the ids of its layers,
/// which each push makes anew.
fn is_as(theirs: &Snapshot, ours: &Snapshot) -> bool {
    let said =
        |it: &Snapshot| (it.keys().to_vec(), it.label().clone(), it.geometry(), it.volume(), it.copy_of());
    said(theirs) == said(ours)
}

fn url_of(place: &PlaceUrl, id: SnapshotId) -> String {
    format!("{place}/{id}")
}

/// How the blocks and pages get there.
struct Way<'a> {
    push: &'a Push<'a>,
    base: Option<Base>,
    /// Whether an earlier push of the same snapshot was cut off: what is there is not brought again.
    looks_first: bool,
    under_way: VecDeque<UnderWay>,
    put_blocks: u64,
    put_bytes: u64,
}

impl<'a> Way<'a> {
    fn new(push: &'a Push<'a>, base: Option<Base>, looks_first: bool) -> Self {
        Way { push, base, looks_first, under_way: VecDeque::new(), put_blocks: 0, put_bytes: 0 }
    }

    /// Brings everything that the place has not; returns the pages of each plane.
    fn bring_all(&mut self, session: &mut Session, lease: &mut Held, watch: Watch<'_>) -> Result<Vec<Plane>> {
        let Push { store, snapshot, planes, .. } = self.push;
        let catalog = store.catalog();
        let size = snapshot.geometry().size();
        let changed = match &self.base {
            Some(base) => base.changed.clone(),
            None => source::blocks_with_data(&catalog, snapshot.layers())?.0,
        };
        let mut source = Source::open(&catalog, snapshot.layers(), planes, size)?;
        let end = manifest::blocks_of(size);
        let blocks = changed.iter().map(|run| run.end.min(end).saturating_sub(run.start)).sum::<u64>();
        let total = blocks * BLOCK as u64;
        let mut progress = Progress { done: 0, total, watch };
        let mut pages = vec![Plane::default(); planes.keys.len()];
        for number in self.page_numbers(&changed) {
            let run = u64::from(number) * RUN..(u64::from(number) + 1) * RUN;
            let changed = within(&changed, &run);
            let made = self.page(session, lease, &mut source, number, &changed, &mut progress)?;
            for (plane, entry) in pages.iter_mut().zip(made) {
                plane.pages.extend(entry.map(|entry| (number, entry)));
            }
        }
        while let Some(next) = self.under_way.pop_front() {
            session.carrier.done(next)?;
        }
        progress.tell()?;
        Ok(pages)
    }

    /// The pages that the snapshot may have.
    fn page_numbers(&self, changed: &[Range<u64>]) -> BTreeSet<u32> {
        let of_run = |run: &Range<u64>| run.start / RUN..run.end.div_ceil(RUN);
        let mut numbers: BTreeSet<u32> =
            changed.iter().flat_map(of_run).filter_map(|n| u32::try_from(n).ok()).collect();
        numbers.extend(self.base.iter().flat_map(|base| &base.pages).flat_map(|plane| plane.pages.keys()));
        // A snapshot that is shorter than its base has not all of them.
        let size = self.push.snapshot.geometry().size();
        numbers.retain(|&n| u64::from(n) * RUN < manifest::blocks_of(size));
        numbers
    }

    /// Brings what has changed in one run of blocks; returns the page of each plane.
    fn page(
        &mut self,
        session: &mut Session,
        lease: &mut Held,
        source: &mut Source,
        number: u32,
        changed: &[Range<u64>],
        progress: &mut Progress<'_>,
    ) -> Result<Vec<Option<PageEntry>>> {
        let base = self.base_pages(number);
        if changed.is_empty() {
            return Ok(base);
        }
        let (first, size) = (u64::from(number) * RUN, self.push.snapshot.geometry().size());
        let end = manifest::blocks_of(size).min(first + RUN);
        let whole = first..end;
        let (mut pages, all) = match self.fetch(session, &base)? {
            Some(mut known) => {
                // What lies beyond the end of a snapshot that is shorter.
                known.iter_mut().for_each(|page| page.0.retain(|&n, _| first + u64::from(n) < end));
                (known, changed)
            }
            None if self.base.is_none() => (self.no_pages(), changed),
            None => (self.no_pages(), std::slice::from_ref(&whole)),
        };
        for block in all.iter().cloned().flatten().filter(|block| *block < end) {
            lease.renew(session)?;
            let objects = source.block(block)?;
            let at = (block - first) as u16;
            for ((page, keys), object) in pages.iter_mut().zip(&self.push.keys).zip(objects) {
                let Some(object) = object else {
                    page.0.remove(&at);
                    continue;
                };
                let name = ContentName::of(keys.name(&object));
                if page.0.insert(at, name) != Some(name) {
                    self.put_blocks += u64::from(self.put(session, name, BLOCKS, &object)?);
                }
            }
            progress.done += BLOCK as u64;
            progress.tell()?;
        }
        let mut entries = Vec::new();
        for ((page, keys), known) in pages.iter().zip(&self.push.keys).zip(base) {
            let Some(bytes) = page.encode() else {
                entries.push(None);
                continue;
            };
            let name = ContentName::of(keys.name(&bytes));
            if known.is_none_or(|known| known.name != name) {
                self.put(session, name, PAGES, &bytes)?;
            }
            entries.push(Some(PageEntry { name, blocks: page.0.len() as u32 }));
        }
        Ok(entries)
    }

    fn no_pages(&self) -> Vec<Page> {
        vec![Page::default(); self.push.keys.len()]
    }

    fn base_pages(&self, number: u32) -> Vec<Option<PageEntry>> {
        match &self.base {
            Some(base) => base.pages.iter().map(|plane| plane.pages.get(&number).copied()).collect(),
            None => vec![None; self.push.keys.len()],
        }
    }

    /// The pages that the base has, proved; none if there is no base, or if one of them is not what it is
    /// named for: then all of the run is read and brought.
    fn fetch(&self, session: &mut Session, base: &[Option<PageEntry>]) -> Result<Option<Vec<Page>>> {
        if self.base.is_none() {
            return Ok(None);
        }
        let mut pages = Vec::new();
        for (entry, keys) in base.iter().zip(&self.push.keys) {
            let Some(entry) = entry else {
                pages.push(Page::default());
                continue;
            };
            match session.page(entry.name, keys) {
                Ok(Some(page)) => pages.push(page),
                Ok(None) => {
                    log::warn!("{} is missing: what it was about is brought anew", entry.name.object(PAGES));
                    return Ok(None);
                }
                Err(e) if e.kind() == Kind::Corrupt => {
                    log::warn!("{e}: what it was about is brought anew");
                    return Ok(None);
                }
                Err(e) => return Err(e),
            }
        }
        Ok(Some(pages))
    }

    /// Begins to put an object, unless it is there; returns whether it is put.
    fn put(&mut self, session: &mut Session, name: ContentName, folder: &str, bytes: &[u8]) -> Result<bool> {
        let object = name.object(folder);
        if self.looks_first && session.carrier.exists(&object)? {
            return Ok(false);
        }
        if self.under_way.len() >= WINDOW
            && let Some(first) = self.under_way.pop_front()
        {
            session.carrier.done(first)?;
        }
        session.brake.wait(bytes.len() as u64);
        // One that has the name has the same bytes, or is damaged.
        self.under_way.push_back(session.carrier.begin_put(&object, bytes, Put::Replace)?);
        self.put_bytes += bytes.len() as u64;
        Ok(true)
    }
}

/// How far it has come, in bytes that were looked at.
struct Progress<'a> {
    done: u64,
    total: u64,
    watch: Watch<'a>,
}

impl Progress<'_> {
    fn tell(&mut self) -> Result<()> {
        (self.watch)(self.done, self.total.max(self.done))
    }
}

/// What of these runs lies in one, as runs.
fn within(runs: &[Range<u64>], one: &Range<u64>) -> Vec<Range<u64>> {
    let first = runs.partition_point(|run| run.end <= one.start);
    let there = runs[first..].iter().take_while(|run| run.start < one.end);
    there.map(|run| run.start.max(one.start)..run.end.min(one.end)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_cut_where_a_page_ends() {
        let runs = [0..3, 10..20, 30..31];
        assert_eq!(within(&runs, &(0..8)), vec![0..3]);
        assert_eq!(within(&runs, &(2..12)), [2..3, 10..12]);
        assert_eq!(within(&runs, &(12..16)), vec![12..16]);
        assert_eq!(within(&runs, &(20..30)), []);
    }
}
