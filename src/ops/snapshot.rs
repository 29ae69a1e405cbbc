//! Making snapshots: of one volume or of several at one point in time, each attached or not.
//!
//! A snapshot is made in two phases. First everything is prepared that can fail: each volume gets its new
//! layer, and the queues of those that are attached are held. Then each top layer is frozen, **which is its
//! moment**; and when all are frozen, the records are written, all or, by what can be known before, none.
//! Until the first freeze, whatever fails undoes everything.

use super::Store;
use super::new_top::NewTop;
use super::reach::{Reach, check_can_have_new_image};
use super::space;
use crate::base::root::create_dir_durable;
use crate::base::{Error, Result, Timestamp};
use crate::catalog::freeze;
use crate::catalog::layout::MAX_LAYERS;
use crate::catalog::lock::Purpose;
use crate::catalog::snapshot::Label;
use crate::catalog::{Catalog, LayerId, Snapshot, SnapshotId, VolumeId};
use crate::events::Event;
use crate::host::control;
use crate::host::control::conversation::Freezing;
use crate::kms::Failure;
use std::time::Duration;

/// From so many layers on, a snapshot sees to it that there is room for more.
const LONG_CHAIN: usize = MAX_LAYERS * 3 / 4;

/// A snapshot that was made.
pub struct Made {
    /// The snapshot.
    pub snapshot: Snapshot,
    /// Of an attached volume: how long its queues stood still.
    pub pause: Option<Duration>,
}

/// Makes a snapshot of each of `volumes`, all of one moment, with what is said of each, and reports a
/// `createSnapshot` event for each.
///
/// # Errors
/// `Busy`, naming the command that has a volume; `Corrupt` for a volume that an attach would refuse; those
/// of the KMS, of host processes and of the file system. There is none of the snapshots then, unless the
/// records could not be written.
pub fn create(store: &Store, volumes: &[(VolumeId, Label)]) -> Result<Vec<Made>> {
    let (events, started) = (store.events(), Timestamp::now());
    let made = make(store, volumes);
    match &made {
        Ok(made) => made.iter().for_each(|m| {
            events.record(&Event::create_snapshot(m.snapshot.volume(), Ok(m.snapshot.id()), started))
        }),
        Err(failed) => volumes.iter().for_each(|(id, _)| {
            events.record(&Event::create_snapshot(*id, Err(failed.cause.clone()), started))
        }),
    }
    made.map_err(|failed| failed.error)
}

/// One that is being made.
enum Making<'a> {
    Attached(Box<Freezing<'a>>),
    Detached(VolumeId, Box<NewTop<'a>>),
}

fn make(store: &Store, volumes: &[(VolumeId, Label)]) -> Result<Vec<Made>, Failure> {
    let catalog = store.catalog();
    create_dir_durable(&catalog.root().snapshots())?;
    volumes.iter().for_each(|(id, _)| shorten_if_long(store, &catalog, *id));
    let mut making = Vec::new();
    for (id, label) in volumes {
        let begun = begin(store, &catalog, *id, label);
        making.push(begun.map_err(|failure| failure.context(format!("make a snapshot of {id}")))?);
    }
    // All stand still before any is frozen.
    if making.len() > 1 {
        each_attached(&mut making, Freezing::hold)?;
    }
    each_attached(&mut making, Freezing::commit)?;
    // Nobody else has a volume before the records are written: he could take layers out of its chain.
    let ends = making.iter_mut().zip(volumes).map(|(one, (_, label))| end(&catalog, one, label));
    let made = ends.collect::<Result<Vec<_>, _>>()?;
    freeze::note(&catalog, &made.iter().map(|m| &m.snapshot).collect::<Vec<_>>())?;
    for one in made.iter().filter(|one| one.pause.is_some()) {
        control::tell_noted(&catalog, one.snapshot.volume(), one.snapshot.id());
    }
    Ok(made)
}

/// Makes a chain shorter that comes near its longest, as far as its layers are not needed by snapshots.
fn shorten_if_long(store: &Store, catalog: &Catalog, id: VolumeId) {
    let Ok(volume) = catalog.load(id) else { return };
    if volume.layers().len() < LONG_CHAIN {
        return;
    }
    let layers: Vec<LayerId> = volume.layers().iter().map(|layer| layer.id).collect();
    let given = space::give_back(store, Some(&layers), 0, &mut |_, _, _| Ok(()));
    let merged = given.as_ref().map_or(0, |given| given.merged);
    log::warn!(
        "{id} has {} layers, and {MAX_LAYERS} are the most: {merged} of them are merged now; every snapshot \
         that is kept needs one",
        layers.len()
    );
    if let Err(e) = given {
        log::warn!("merging layers of {id}: {e}");
    }
}

fn begin<'a>(
    store: &Store,
    catalog: &'a Catalog,
    id: VolumeId,
    label: &Label,
) -> Result<Making<'a>, Failure> {
    match Reach::of(catalog, id, Purpose::Snapshot)? {
        Reach::Host => {
            check_can_have_new_image(catalog, id)?;
            Ok(Making::Attached(Box::new(Freezing::begin(catalog, id, label)?)))
        }
        Reach::Mine(lock) => {
            let taken = store.open_taken(lock)?;
            Ok(Making::Detached(id, Box::new(NewTop::begin(catalog, taken, None)?)))
        }
    }
}

fn each_attached<'a>(
    making: &mut [Making<'a>],
    mut step: impl FnMut(&mut Freezing<'a>) -> Result<()>,
) -> Result<(), Failure> {
    for one in making {
        if let Making::Attached(freezing) = one {
            step(freezing).map_err(|e| of(freezing.volume(), e))?;
        }
    }
    Ok(())
}

/// Freezes the old top. The snapshot is there once it is [noted](freeze::note).
fn end(catalog: &Catalog, one: &mut Making<'_>, label: &Label) -> Result<Made, Failure> {
    match one {
        Making::Attached(freezing) => {
            let (snapshot, pause) = freezing.frozen().map_err(|e| of(freezing.volume(), e))?;
            Ok(Made { snapshot, pause: Some(pause) })
        }
        Making::Detached(id, detached) => {
            let snapshot = detached.commit(|freeze, lock, opened| {
                let (key, id) = (opened.seal_key.as_ref(), SnapshotId::random());
                freeze.commit(catalog, lock, &mut opened.metadata, id, label.clone(), key)
            });
            let snapshot = snapshot.map_err(|e| of(*id, e))?;
            Ok(Made { snapshot, pause: None })
        }
    }
}

fn of(volume: VolumeId, e: Error) -> Failure {
    Failure::from(e).context(format!("make a snapshot of {volume}"))
}
