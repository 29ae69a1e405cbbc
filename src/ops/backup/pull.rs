//! A snapshot comes from a place outside: it is another snapshot here, with an id of its own and layers of
//! its own, under the same data keys, which the KMS has wrapped for it.
//!
//! Nothing is made before the manifest is proved, and nothing is written that is not. The steps are those of
//! a copy ([`full`]): a record that names the layers, the layers, and the rename **which is the moment**.
//! What was interrupted is gone on with by the same command, and cleared away by "sealblk gc".

use super::into::{Into, There};
use super::{For, Session, Target, check_name, choose, keys_of, mark_of, missing};
use crate::backup::block::{self, BLOCK};
use crate::backup::manifest::{self, Claim, Manifest, PageEntry};
use crate::backup::page::{Page, RUN};
use crate::backup::to_come::ToCome;
use crate::backup::{BLOCKS, ContentName, PAGES};
use crate::base::root::files;
use crate::base::{Context, Error, Kind, Result, Timestamp};
use crate::catalog::coming::Head;
use crate::catalog::layout::{KeyRecord, LayerRecord};
use crate::catalog::slots::KeySlot;
use crate::catalog::snapshot::{Label, Snapshot};
use crate::catalog::store_locks::RecordsLock;
use crate::catalog::{Catalog, SnapshotId};
use crate::crypt::BackupKeys;
use crate::disk::transfer::Watch;
use crate::events::Event;
use crate::helper::carry::UnderWay;
use crate::helper::rewrap;
use crate::kms::Failure;
use crate::kms::key_ref::{KeyRef, is_same_key};
use crate::ops::Store;
use crate::ops::brake::Brake;
use crate::ops::clone::{Which, rewrap_slots};
use crate::ops::copy::full;
use crate::ops::need::{self, Budget, Gate};
use crate::place::PlaceUrl;
use crate::sandbox;
use nix::fcntl::{Flock, OFlag};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::File;

/// Blocks on their way at a time.
const WINDOW: usize = 12;

/// How a snapshot is to come.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wanted {
    /// The KMS key that is to wrap its data keys; without one, those that wrap them in the place.
    pub key: Option<String>,
    /// Its tag `Name`; without one, that of the snapshot in the place.
    pub name: Option<String>,
    /// Further tags, in place of those with the same keys.
    pub tags: Vec<(String, String)>,
    /// What may be used of the file system.
    pub budget: Budget,
    /// Whether it is of a volume that is still used where it comes from.
    pub ahead: Ahead,
    /// Whether it is there at once, and what it holds comes when it is read, and behind that.
    #[serde(default)]
    pub lazy: bool,
}

/// A volume that is sent has two snapshots in the place: the first one is pulled while the volume is used,
/// and becomes the last one with what has changed in between.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ahead {
    /// It has nothing to do with that.
    #[default]
    No,
    /// It is the first one: it stays in the making when all of it has come.
    Is,
    /// It is the last one. Of the first one, by its id in the place, all has come before: by that of the
    /// snapshot in the making here.
    Was(SnapshotId, SnapshotId),
}

/// Makes a snapshot of what a place has: of the snapshot that is `named`, or of its only one.
/// Reports a `pullSnapshot` event, unless it stays in the making. `watch` is told how far it has
/// come; an error of it ends the pull, which the next one goes on with. This process, and what it
/// starts, has no network afterwards.
///
/// # Errors
/// `NotFound` if there is no such snapshot; `Corrupt` for a manifest, page or block that is not what somebody
/// wrote who had the data keys, that is missing, or that is older than what this host has seen: nothing is
/// left then; `NoSpace`; those of the KMS, which name the key, and of the place.
pub fn pull(
    store: &Store,
    named: Option<SnapshotId>,
    target: &Target,
    wanted: &Wanted,
    watch: Watch<'_>,
) -> Result<Snapshot> {
    let started = Timestamp::now();
    let attempt = || format!("pull from {}", target.url);
    let is_passing = matches!(target.url, PlaceUrl::Connection { .. }) || wanted.ahead != Ahead::No;
    if wanted.lazy && is_passing {
        let message = "what comes by a connection, or for a volume that is sent, comes at once";
        return Err(Error::new(Kind::Usage, message).context(attempt()));
    }
    let mut session = Session::open(store, target, For::Reading).context(attempt)?;
    if wanted.lazy {
        // The rate is that of what comes later.
        session.brake = Brake::new(0);
    }
    let id = choose(&mut session, named)?;
    let attempt = || format!("pull {id} from {}", target.url);
    let claim = session.claim_of_known(id).context(attempt)?;
    let volume = claim.claimed().snapshot.volume();
    let done = begin(store, &mut session, claim, target, wanted, watch);
    if wanted.ahead != Ahead::Is {
        let result = done.as_ref().map(Snapshot::id).map_err(|failure| failure.cause.clone());
        store.events().record(&Event::pull_snapshot(id, volume, result, started));
    }
    done.map_err(|failure| failure.error.context(attempt()))
}

fn begin(
    store: &Store,
    session: &mut Session,
    claim: Claim,
    target: &Target,
    wanted: &Wanted,
    watch: Watch<'_>,
) -> Result<Snapshot, Failure> {
    let catalog = store.catalog();
    let label = label(claim.claimed(), wanted)?;
    let to = wanted.key.as_deref().map(|key| target_key(store, key)).transpose()?;
    let interrupted = interrupted(&catalog, &claim.claimed().snapshot, &label, to.as_ref(), wanted.ahead)?;
    let (id, owned) = match &interrupted {
        Some((copy, _)) => (copy.id(), copy.clone()),
        None => {
            let id = SnapshotId::random();
            (id, wrapped_for(store, &claim.claimed().snapshot, id, to.as_ref())?)
        }
    };
    let keys = keys_of(store, &owned)?;
    sandbox::give_up_network()?;
    let mark = mark_of(&claim);
    let [top, ..] = &keys[..] else {
        return Err(Error::new(Kind::Corrupt, "the manifest is of something without a data key").into());
    };
    let manifest = claim.prove(top)?;
    session.marks.check_place(session.id, true)?;
    session.marks.note(manifest.snapshot.id(), mark)?;
    let budget = wanted.budget;
    let mut ahead = None;
    let (copy, lock) = match interrupted {
        Some((copy, lock)) if copy.copy_of() == Some(manifest.snapshot.id()) => {
            manifest::check_seal(&copy, top)?;
            log::info!("going on with {id}, which was interrupted");
            (copy, lock)
        }
        Some((first, lock)) => {
            manifest::check_seal(&first, top)?;
            ahead = first_manifest(session, wanted.ahead, top);
            let copy = manifest::pulled_as(&manifest.snapshot, &first, label, top);
            (copy.clone(), full::note_anew(&catalog, &copy, lock)?)
        }
        None => {
            budget.check(&catalog, manifest.blocks().saturating_mul(BLOCK as u64))?;
            let copy = manifest::pulled(&manifest.snapshot, id, owned.keys().to_vec(), label, top);
            let lock = full::note(&catalog, &copy)?;
            (copy, lock)
        }
    };
    let pull = Pull { catalog: &catalog, manifest: &manifest, ahead, copy: &copy, keys: &keys };
    let filled = match wanted.lazy {
        true => pull.note_what_is_to_come(session, target, watch),
        false => pull.fill(session, budget, watch),
    };
    let commit = || if wanted.ahead == Ahead::Is { Ok(()) } else { full::commit(&catalog, &copy) };
    match filled.and_then(|()| commit()) {
        Ok(()) => Ok(copy),
        // What does not prove right is not kept, in no part.
        Err(e) if e.kind() == Kind::Corrupt => {
            pull.abandon(lock);
            Err(e.into())
        }
        Err(e) => Err(e.into()),
    }
}

/// The manifest of the snapshot whose blocks the layers have already; none if the place does not show it as
/// it was: then what the layers have is looked at.
fn first_manifest(session: &mut Session, ahead: Ahead, keys: &BackupKeys) -> Option<Manifest> {
    let Ahead::Was(first, _) = ahead else { return None };
    let manifest = session.claim_of_known(first).and_then(|claim| claim.prove(keys));
    manifest.inspect_err(|e| log::warn!("{e}; all that came ahead is looked at")).ok()
}

fn label(manifest: &Manifest, wanted: &Wanted) -> Result<Label> {
    let mut label = manifest.snapshot.label().clone();
    if let Some(name) = &wanted.name {
        label.tags.set("Name", name)?;
    }
    for (key, value) in &wanted.tags {
        label.tags.set(key, value)?;
    }
    Ok(label)
}

/// The KMS key that is to wrap the data keys: as its KMS names it, and its own id.
struct TargetKey {
    reference: KeyRef,
    key_id: String,
}

fn target_key(store: &Store, text: &str) -> Result<TargetKey, Failure> {
    let reference = KeyRef::of_operator(text, &store.settings().locality)?;
    let named = store.key_of(reference.clone())?;
    let described = named.describe().map_err(|e| Failure::kms(e, named.provider_name(), text))?;
    Ok(TargetKey { reference, key_id: described.key_id })
}

/// What is going to have the id `id`, as far as its keys go: the snapshot of the manifest, whose data keys
/// the KMS has wrapped for it.
fn wrapped_for(
    store: &Store,
    from: &Snapshot,
    id: SnapshotId,
    to: Option<&TargetKey>,
) -> Result<Snapshot, Failure> {
    let by = |slot: &KeySlot| format!("{} of the KMS \"{}\"", slot.wrapped.key_id, slot.provider);
    let mut copy = from.clone();
    (copy.id, copy.copy_of) = (id, Some(from.id()));
    for (new, old) in copy.layout.keys.iter_mut().zip(from.keys()) {
        *new = wrap(store, from, id, old, to).map_err(|failure| {
            failure.context(format!(
                "its data key is wrapped by {}, which has to unwrap it here",
                old.slots().iter().map(by).collect::<Vec<_>>().join(", or by ")
            ))
        })?;
    }
    Ok(copy)
}

fn wrap(
    store: &Store,
    from: &Snapshot,
    id: SnapshotId,
    old: &KeyRecord,
    to: Option<&TargetKey>,
) -> Result<KeyRecord, Failure> {
    let mut new = match to {
        // The data key is in a helper's memory for the moment, if at all.
        Some(to) => {
            let (root, settings, owner) = (store.root(), store.settings(), from.key_owner());
            let slot = rewrap::for_another_by_helper(root, settings, owner, id, old, &to.reference)?;
            KeyRecord::new(slot)
        }
        None => rewrap_slots(from, old, id.into(), &Which::All, &|name| store.provider(name))?,
    };
    new.check = old.check();
    Ok(new)
}

/// A pull of the same snapshot in the same way that was begun, and that nobody is at; or what came ahead and
/// can become that.
fn interrupted(
    catalog: &Catalog,
    from: &Snapshot,
    label: &Label,
    to: Option<&TargetKey>,
    ahead: Ahead,
) -> Result<Option<(Snapshot, Flock<File>)>> {
    let _records = RecordsLock::acquire(catalog)?;
    let is_under = |new: &KeyRecord, old: &KeyRecord| {
        let is_by = |slot: &KeySlot, provider: &str, key: &str| {
            slot.provider == provider && is_same_key(provider, &slot.wrapped.key_id, key)
        };
        let is_wanted = |slot: &KeySlot| match to {
            Some(to) => is_by(slot, to.reference.provider.as_str(), &to.key_id),
            None => old.slots().iter().any(|old| is_by(slot, &old.provider, &old.wrapped.key_id)),
        };
        new.check() == old.check() && new.slots().iter().all(is_wanted)
    };
    for (id, path) in catalog.copies_in_the_making()? {
        let read = catalog.load_copying(id);
        let Ok(copy) = read.inspect_err(|e| log::warn!("left as it is: {e}")) else { continue };
        let is_laid_out_so = copy.layers().len() == from.layers().len()
            && copy.keys().len() == from.keys().len()
            && copy.keys().iter().zip(from.keys()).all(|(new, old)| is_under(new, old));
        let is_same = copy.copy_of() == Some(from.id()) && copy.label() == label;
        let came_ahead =
            matches!(ahead, Ahead::Was(first, was) if copy.copy_of() == Some(first) && id == was);
        if (is_same || came_ahead)
            && copy.volume() == from.volume()
            && is_laid_out_so
            && copy.geometry() == from.geometry()
            && let Some(lock) = full::lock(&path)?
        {
            return Ok(Some((copy, lock)));
        }
    }
    Ok(None)
}

/// A pull in the making.
struct Pull<'a> {
    catalog: &'a Catalog,
    manifest: &'a Manifest,
    /// That of which the layers have every block, and nothing else. Without it, what they have is looked at.
    ahead: Option<Manifest>,
    copy: &'a Snapshot,
    keys: &'a [BackupKeys],
}

/// A block on its way into its layer.
struct Coming {
    under_way: UnderWay,
    number: u64,
    name: ContentName,
    /// What the layer has in its place.
    there: There,
}

impl Pull<'_> {
    /// Brings everything into the layers, durably.
    fn fill(&self, session: &mut Session, budget: Budget, watch: Watch<'_>) -> Result<()> {
        let total = self.manifest.blocks().saturating_mul(BLOCK as u64);
        let place = need::place(self.catalog.root());
        let mut gate = Gate::new(&place, budget.reserve);
        let mut done = 0;
        let mut step = |blocks: u64| {
            watch(done, total)?;
            done += blocks.saturating_mul(BLOCK as u64);
            gate.wait(&mut || watch(done.min(total), total))
        };
        for (n, layer) in self.copy.layers().iter().enumerate() {
            self.catalog.fill_now(layer.id)?;
            full::make_empty(self.catalog, layer)?;
            self.fill_layer(session, n, layer, &mut step)?;
        }
        watch(total, total)
    }

    /// Writes down, durably, which blocks the layers are going to have, and where from; they have none yet.
    fn note_what_is_to_come(&self, session: &mut Session, target: &Target, watch: Watch<'_>) -> Result<()> {
        let total = self.manifest.blocks().saturating_mul(BLOCK as u64);
        let mut done = 0;
        for (n, layer) in self.copy.layers().iter().enumerate() {
            let (keys, pages) = (&self.keys[n], &self.manifest.planes[n].pages);
            let head = Head {
                layer: layer.id,
                size: layer.size,
                blocks: 0,
                snapshot: self.manifest.snapshot.id(),
                volume: self.manifest.snapshot.volume(),
                place: session.id.0,
                url: target.url.to_string(),
                endpoint: target.access.endpoint.clone(),
                region: target.access.region.clone(),
                rate: target.rate,
            };
            let mut to_come = ToCome { head, blocks: Vec::new() };
            for (number, entry) in pages {
                watch(done, total)?;
                let page = page_of(session, entry, keys)?;
                to_come.add(u64::from(*number) * RUN, &page);
                done += u64::from(entry.blocks).saturating_mul(BLOCK as u64);
            }
            let bytes = to_come.to_bytes(keys);
            // What is written is what can be read.
            ToCome::prove(&bytes, keys)?;
            self.catalog.make_coming(layer, &bytes)?;
        }
        watch(total, total)
    }

    fn fill_layer(
        &self,
        session: &mut Session,
        n: usize,
        layer: &LayerRecord,
        step: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<()> {
        let path = self.catalog.layer_path(layer.id);
        let attempt = || format!("write {}", path.display());
        let file = files::open_layer(&path, OFlag::O_RDWR).context(attempt)?;
        let mut into = Into::new(file, layer.size);
        let mut coming: VecDeque<Coming> = VecDeque::new();
        let (keys, pages) = (&self.keys[n], &self.manifest.planes[n].pages);
        let before = self.ahead.as_ref().map(|it| &it.planes[n].pages);
        let numbers: BTreeSet<u32> =
            pages.keys().chain(before.into_iter().flat_map(BTreeMap::keys)).copied().collect();
        // The block before which nothing is in the layer that is not to be there.
        let mut clear_to = 0;
        for number in numbers {
            let (entry, first) = (pages.get(&number), u64::from(number) * RUN);
            let known = before.map(|pages| pages.get(&number));
            if known.is_some_and(|known| known.map(|it| it.name) == entry.map(|it| it.name)) {
                step(entry.map_or(0, |it| u64::from(it.blocks)))?;
                continue;
            }
            let page = entry.map_or(Ok(Page::default()), |entry| page_of(session, entry, keys))?;
            let known =
                known.map(|known| known.map_or(Ok(Page::default()), |entry| page_of(session, entry, keys)));
            let known = known.transpose()?;
            if let Some(known) = &known {
                for &at in known.0.keys().filter(|at| !page.0.contains_key(at)) {
                    let number = first + u64::from(at);
                    into.check(number)?;
                    into.clear(number..number + 1).context(attempt)?;
                }
            }
            for (at, name) in page.0 {
                let number = first + u64::from(at);
                into.check(number)?;
                step(1)?;
                match &known {
                    Some(known) if known.0.get(&at) == Some(&name) => continue,
                    Some(_) => {}
                    None => into.clear(clear_to..number).context(attempt)?,
                }
                clear_to = number + 1;
                let there = into.look(number, name, keys).context(attempt)?;
                if there == There::This {
                    continue;
                }
                while coming.len() >= WINDOW {
                    self.arrive(session, &mut coming, &mut into, keys)?;
                }
                let under_way = session.carrier.begin_get(&name.object(BLOCKS), block::MAX)?;
                coming.push_back(Coming { under_way, number, name, there });
            }
        }
        if before.is_none() {
            into.clear(clear_to..manifest::blocks_of(layer.size)).context(attempt)?;
        }
        while !coming.is_empty() {
            self.arrive(session, &mut coming, &mut into, keys)?;
        }
        into.file.sync_data().context(attempt)
    }

    /// Waits for the first block, proves it, and writes it.
    fn arrive(
        &self,
        session: &mut Session,
        coming: &mut VecDeque<Coming>,
        into: &mut Into,
        keys: &BackupKeys,
    ) -> Result<()> {
        let Some(Coming { under_way, number, name, there }) = coming.pop_front() else { return Ok(()) };
        let object = session.carrier.got(under_way)?.ok_or_else(|| missing(name, BLOCKS))?;
        session.brake.wait(object.len() as u64);
        check_name(name, &object, keys, BLOCKS)?;
        let attempt = || format!("write a block of {}", self.copy.id());
        if there == There::Another {
            into.clear(number..number + 1).context(attempt)?;
        }
        into.write(number, &object).context(attempt)
    }

    /// Takes back what was begun.
    fn abandon(&self, lock: Flock<File>) {
        let clear = || -> Result<()> {
            let records = RecordsLock::acquire(self.catalog)?;
            self.catalog.abandon_copy(self.copy.id(), &records)
        };
        if let Err(e) = clear() {
            log::warn!("{e}; \"sealblk gc\" tries again");
        }
        drop(lock);
    }
}

/// A page of a manifest, proved.
fn page_of(session: &mut Session, entry: &PageEntry, keys: &BackupKeys) -> Result<Page> {
    let page = session.page(entry.name, keys)?.ok_or_else(|| missing(entry.name, PAGES))?;
    match page.0.len() == entry.blocks as usize {
        true => Ok(page),
        false => {
            let problem = format!("{} has another number of blocks", entry.name.object(PAGES));
            Err(Error::new(Kind::Corrupt, problem))
        }
    }
}
