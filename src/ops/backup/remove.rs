//! Snapshots are removed from a place: their manifests first, **which is the moment**, and then what no
//! manifest needs any more (mark and sweep).
//!
//! It takes no key. Whoever removes reads which pages and blocks the manifests that stay name, whoever wrote
//! them: somebody who could forge them could as well remove the objects. What cannot be read may name
//! anything, and then nothing is swept. Nothing is swept either while somebody pushes
//! ([`crate::backup::lease`]).

use super::leases::Held;
use super::{For, Session, Target, missing};
use crate::backup::lease::Lease;
use crate::backup::moved;
use crate::backup::page::{self, Page};
use crate::backup::saved::SavedVolume;
use crate::backup::{self as place, BLOCKS, ContentName, PAGES};
use crate::base::{Error, Kind, Result, Timestamp};
use crate::catalog::snapshot::Snapshot;
use crate::catalog::{SnapshotId, VolumeId};
use crate::helper::carry::UnderWay;
use crate::ops::Store;
use crate::place::ObjectName;
use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use uuid::Uuid;

/// Removals on their way at a time.
const WINDOW: usize = 12;

/// Which snapshots of each volume stay: of each of the last so many days, weeks, months and years that have
/// one, the newest; and the last so many.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Keep {
    /// The newest ones.
    pub last: usize,
    /// Of days.
    pub daily: usize,
    /// Of weeks, which begin on Mondays.
    pub weekly: usize,
    /// Of months.
    pub monthly: usize,
    /// Of years.
    pub yearly: usize,
}

/// What is to be removed.
#[derive(Clone, Debug, Default)]
pub struct What {
    /// These snapshots.
    pub named: Vec<SnapshotId>,
    /// Those that do not stay by this.
    pub keep: Option<Keep>,
    /// Of this volume alone.
    pub volume: Option<VolumeId>,
    /// Of those alone that backups of this store have made, by the id that the place knows it by.
    pub store: Option<Uuid>,
    /// Whether only to tell what would be removed.
    pub dry_run: bool,
}

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// The snapshots that were removed, or would be, sorted.
    pub removed: Vec<SnapshotId>,
    /// Those that were named, and not there.
    pub gone: Vec<SnapshotId>,
    /// Those that stay, sorted.
    pub kept: Vec<SnapshotId>,
    /// How many objects were swept; none if nothing was swept, since somebody pushes.
    pub swept: Option<u64>,
}

/// Removes snapshots from a place, and what no snapshot needs any more.
///
/// # Errors
/// `Usage` if the manifests do not say what stays; `Busy` if something here is still coming from a snapshot
/// that was named, which stays by its age until then; `Corrupt` if one of those that stay cannot be read:
/// then nothing is swept; those of the place.
pub fn remove(store: &Store, target: &Target, what: &What) -> Result<Removed> {
    let mut session = Session::open(store, target, For::Removing)?;
    let listed = session.snapshots()?;
    let mut removed: BTreeSet<SnapshotId> =
        what.named.iter().copied().filter(|id| listed.contains(id)).collect();
    let catalog = store.catalog();
    let needed = catalog.coming_from(session.id.0)?;
    if let Some((id, layer)) = removed.iter().find_map(|id| needed.get_key_value(id)) {
        return Err(catalog.has_not_come(*layer).context(format!("remove {id}")));
    }
    let gone = what.named.iter().copied().filter(|id| !listed.contains(id)).collect();
    if let Some(keep) = &what.keep {
        let goes = by_age(&mut session, &listed, keep, what)?.into_iter();
        removed.extend(goes.filter(|id| !needed.contains_key(id)));
    }
    let kept = listed.iter().copied().filter(|id| !removed.contains(id)).collect();
    let mut done = Removed { removed: removed.into_iter().collect(), gone, kept, swept: None };
    if what.dry_run {
        return Ok(done);
    }
    for &id in &done.removed {
        session.carrier.remove(&place::manifest_of(id))?;
        session.carrier.remove(&moved::moved_of(id))?;
    }
    // A manifest that came back after a cut would name what is not there.
    session.carrier.sync()?;
    for id in done.removed.iter().chain(&done.gone) {
        session.marks.forget(*id)?;
    }
    if let Some(lease) = Held::sweep(&mut session, Lease::Sweep(Uuid::new_v4()))? {
        let swept = Sweep { session: &mut session, lease, under_way: VecDeque::new(), count: 0 }.run();
        done.swept = Some(swept.map_err(|e| match done.removed.is_empty() {
            true => e,
            false => e.context("the snapshots are removed, but not what they alone needed"),
        })?);
    }
    Ok(done)
}

/// The snapshots that do not stay.
fn by_age(session: &mut Session, listed: &[SnapshotId], keep: &Keep, what: &What) -> Result<Vec<SnapshotId>> {
    keep.check()?;
    let is_of_store = |snapshot: &Snapshot| {
        let saved = what.store.is_some().then(|| SavedVolume::of_backup(snapshot.label()));
        saved.is_none_or(|saved| saved.is_some_and(|saved| Some(saved.store) == what.store))
    };
    let mut of_volumes: BTreeMap<VolumeId, Vec<(Timestamp, Uuid, SnapshotId)>> = BTreeMap::new();
    for &id in listed {
        match session.claim(id) {
            Ok(Some(claim)) if is_of_store(&claim.claimed().snapshot) => {
                let snapshot = &claim.claimed().snapshot;
                of_volumes.entry(snapshot.volume()).or_default().push((
                    snapshot.created(),
                    SavedVolume::moment_of(snapshot.label()),
                    id,
                ));
            }
            Ok(_) => {}
            // Nobody knows how old it is: it stays.
            Err(e) if e.kind() == Kind::Corrupt => log::warn!("it stays: {e}"),
            Err(e) => return Err(e),
        }
    }
    let wanted = of_volumes.into_iter().filter(|(id, _)| what.volume.is_none_or(|volume| volume == *id));
    Ok(wanted.flat_map(|(_, snapshots)| keep.goes(snapshots)).collect())
}

impl Keep {
    /// # Errors
    /// `Usage` if nothing would stay.
    pub(super) fn check(&self) -> Result<()> {
        match *self == Keep::default() {
            false => Ok(()),
            true => {
                let message = "nothing would stay: say how many snapshots are kept, more than none";
                Err(Error::new(Kind::Usage, message))
            }
        }
    }

    /// Of snapshots of one volume, those that do not stay.
    fn goes(&self, mut snapshots: Vec<(Timestamp, Uuid, SnapshotId)>) -> Vec<SnapshotId> {
        snapshots.sort_unstable_by(|a, b| b.cmp(a));
        let mut stays: HashSet<SnapshotId> = snapshots.iter().take(self.last).map(|(.., id)| *id).collect();
        type Period = fn(Timestamp) -> (i32, u32);
        let periods: [(usize, Period); 4] = [
            (self.daily, |at| (0, at.day_number())),
            (self.weekly, |at| (0, at.week_number())),
            (self.monthly, |at| at.month()),
            (self.yearly, |at| (at.month().0, 0)),
        ];
        for (count, period) in periods {
            let mut last = None;
            // The newest of each, for so many that have one.
            let firsts = snapshots.iter().filter(|(at, ..)| last.replace(period(*at)) != Some(period(*at)));
            stays.extend(firsts.take(count).map(|(.., id)| *id));
        }
        snapshots.iter().map(|(.., id)| *id).filter(|id| !stays.contains(id)).collect()
    }
}

/// Removes what no manifest names. Nobody pushes, and whoever begins to waits until the lease is gone.
struct Sweep<'a> {
    session: &'a mut Session,
    lease: Held,
    under_way: VecDeque<UnderWay>,
    count: u64,
}

impl Sweep<'_> {
    fn run(mut self) -> Result<u64> {
        let swept = self.named().and_then(|named| self.sweep(&named));
        let Sweep { session, lease, count, .. } = self;
        lease.give_back(session)?;
        swept.map(|()| count)
    }

    /// The pages and blocks that the manifests name.
    fn named(&mut self) -> Result<HashSet<ContentName>> {
        let mut named = HashSet::new();
        for id in self.session.snapshots()? {
            // One that was removed by somebody else meanwhile names nothing.
            let Some(claim) = self.session.claim(id)? else { continue };
            for entry in claim.claimed().planes.iter().flat_map(|plane| plane.pages.values()) {
                if !named.insert(entry.name) {
                    continue;
                }
                self.lease.renew(self.session)?;
                let bytes = self.session.carrier.get(&entry.name.object(PAGES), page::MAX)?;
                let bytes = bytes.ok_or_else(|| missing(entry.name, PAGES)).map_err(|e| unknown(id, e))?;
                let page = Page::decode(&bytes).map_err(|e| unknown(id, e))?;
                named.extend(page.0.into_values());
            }
        }
        Ok(named)
    }

    fn sweep(&mut self, named: &HashSet<ContentName>) -> Result<()> {
        for folder in [PAGES, BLOCKS] {
            for first in 0..=u8::MAX {
                self.lease.renew(self.session)?;
                let below = ObjectName::new(format!("{folder}/{first:02x}"))?;
                for object in self.session.carrier.list(&below)? {
                    // What an interrupted put has left has another name, and goes as well.
                    let is_named =
                        ContentName::in_object(&object.name).is_some_and(|name| named.contains(&name));
                    if !is_named {
                        self.remove(&object.name)?;
                    }
                }
            }
        }
        while let Some(next) = self.under_way.pop_front() {
            self.session.carrier.done(next)?;
        }
        Ok(())
    }

    fn remove(&mut self, object: &ObjectName) -> Result<()> {
        if self.under_way.len() >= WINDOW
            && let Some(first) = self.under_way.pop_front()
        {
            self.session.carrier.done(first)?;
        }
        self.under_way.push_back(self.session.carrier.begin_remove(object)?);
        self.count += 1;
        Ok(())
    }
}

fn unknown(id: SnapshotId, e: Error) -> Error {
    e.context(format!("nothing is swept, since it is not known what {id} needs"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Timestamp {
        text.to_owned().try_into().unwrap()
    }

    /// What stays of snapshots that were made at these times, by their numbers.
    fn stays(keep: Keep, times: &[&str]) -> Vec<usize> {
        let all: Vec<_> = times.iter().map(|time| (at(time), Uuid::nil(), SnapshotId::random())).collect();
        let goes = keep.goes(all.clone());
        (0..all.len()).filter(|&n| !goes.contains(&all[n].2)).collect()
    }

    #[test]
    fn the_newest_of_each_period_stays() {
        let times = [
            "2025-12-31T23:00:00Z", // Wednesday
            "2026-01-01T01:00:00Z", // the same week
            "2026-01-01T09:00:00Z",
            "2026-01-05T00:00:00Z", // Monday
            "2026-02-01T12:00:00Z", // Sunday
            "2026-02-02T12:00:00Z", // Monday
            "2026-02-02T13:00:00Z",
        ];
        let none = Keep::default();
        assert_eq!(stays(Keep { last: 2, ..none }, &times), [5, 6]);
        assert_eq!(stays(Keep { daily: 3, ..none }, &times), [3, 4, 6]);
        assert_eq!(stays(Keep { weekly: 4, ..none }, &times), [2, 3, 4, 6]);
        assert_eq!(stays(Keep { monthly: 2, ..none }, &times), [3, 6]);
        assert_eq!(stays(Keep { yearly: 9, ..none }, &times), [0, 6]);
        assert_eq!(stays(Keep { last: 1, daily: 1, monthly: 3, ..none }, &times), [0, 3, 6]);
        assert_eq!(stays(Keep { last: 9, ..none }, &times).len(), times.len());
        assert!(stays(Keep { daily: 1, ..none }, &[]).is_empty());
    }

    #[test]
    fn of_two_that_were_made_in_one_second_the_later_one_stays() {
        let now = at("2026-01-01T00:00:00Z");
        for _ in 0..20 {
            let [earlier, later] = [(); 2].map(|()| (now, Uuid::now_v7(), SnapshotId::random()));
            assert_eq!(Keep { last: 1, ..Keep::default() }.goes(vec![later, earlier]), [earlier.2]);
        }
    }
}
