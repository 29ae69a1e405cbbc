//! What the place has already of what is pushed: an earlier snapshot, whose layers at home tell what has
//! changed since, or whose pages tell what is the same.

use super::Push;
use crate::backup::block::BLOCK;
use crate::backup::manifest::{self, Manifest, Plane};
use crate::backup::page::RUN;
use crate::base::{Result, Timestamp};
use crate::catalog::layout::LayerRecord;
use crate::catalog::snapshot::Snapshot;
use crate::catalog::{LayerId, SnapshotId};
use crate::crypt::BackupKeys;
use crate::ops::backup::{Session, mark_of, source};
use std::ops::Range;

/// What the place has of an earlier snapshot.
pub(super) struct Base {
    /// The snapshot, if it is at home as well, so that its layers have told what has changed.
    pub(super) id: Option<SnapshotId>,
    /// For each of our planes, its pages there.
    pub(super) pages: Vec<Plane>,
    /// The blocks that may be others.
    pub(super) changed: Vec<Range<u64>>,
}

impl Push<'_> {
    /// The manifest of this very snapshot that the place has.
    pub(super) fn before(&self, session: &mut Session) -> Result<Option<Manifest>> {
        let id = self.snapshot.id();
        let known = session.marks.known(id)?;
        let Some(claim) = session.claim(id)? else {
            if known.is_some() {
                log::warn!("{id} was in {}, and is not any more: it is pushed anew", session.url);
            }
            return Ok(None);
        };
        session.check_claim(id, &claim, known)?;
        let mark = mark_of(&claim);
        let manifest = claim.prove(&self.keys[0]).map_err(|e| e.context(id))?;
        session.marks.note(id, mark)?;
        Ok(Some(manifest))
    }

    /// The same snapshot as its own base: nothing has changed.
    pub(super) fn same(&self, before: &Manifest) -> Option<Base> {
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
    pub(super) fn base(&self, session: &mut Session) -> Result<Option<Base>> {
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
}

/// Whether a manifest's record says what `ours` says, except for the ids of its layers,
/// which each push makes anew.
pub(super) fn is_as(theirs: &Snapshot, ours: &Snapshot) -> bool {
    let said =
        |it: &Snapshot| (it.keys().to_vec(), it.label().clone(), it.geometry(), it.volume(), it.copy_of());
    said(theirs) == said(ours)
}
