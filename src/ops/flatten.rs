//! Making a volume's layers one: hydrating it from everything below its top, attached or not.
//!
//! What is to be hydrated is noted in `volume.json` first. While the volume is attached, its host process
//! does it in the background; of a volume that nobody has attached, [`follow`] does it. However it is
//! interrupted, the next attach, or the next [`follow`], goes on with it.

use super::Store;
use super::need::Budget;
use super::reach::{Reach, is_attached};
use super::space;
use crate::base::space::{Reserve, Shortage};
use crate::base::{Context, Error, Kind, Result};
use crate::catalog::lock::{Holder, Purpose, VolumeLock};
use crate::catalog::{LayerId, Metadata, VolumeId, leaving, rekey};
use crate::disk::Disk;
use crate::disk::hydrate::{End, Hydration};
use crate::events::{Event, EventLog};
use crate::host::changes::hydrate::kms_key;
use crate::host::control;
use crate::host::status::Progress;
use crate::volume::layers;
use crate::volume::open::{Opened, Taken, shape};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::Duration;

/// How often a caller is told how far this process has come.
const TELL: Duration = Duration::from_millis(250);
/// How much is copied, in bytes, before what it left below is given back.
const STEP: u64 = 1 << 30;
/// How often a host process is asked how far it has come.
const ASK: Duration = Duration::from_millis(500);

/// How fast a command copies, and what it leaves free.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pace {
    /// Bytes a second; 0: no limit.
    pub rate: u64,
    /// What it leaves free of the file system.
    pub reserve: Reserve,
}

/// Marks everything below the top of a volume to be hydrated, and reports a `hydrateVolume` event. Returns
/// whether there is anything to do.
///
/// # Errors
/// `NoSpace` if the file system has too little; `Busy`, naming the command that has the volume; those of its
/// host process and of the file system.
pub fn flatten(store: &Store, id: VolumeId, budget: Budget) -> Result<bool> {
    let catalog = store.catalog();
    let check = |metadata: &Metadata| {
        let layers = metadata.layers();
        match metadata.layout().leaving() == layers.len() - 1 {
            // It is marked already.
            true => Ok(()),
            false => budget.check_layers(&catalog, id, &layers[1..], layers.first()),
        }
    };
    let mark = || match Reach::of(&catalog, id, Purpose::Mark)? {
        // The host process reports the event.
        Reach::Host => {
            check(&catalog.load(id)?)?;
            control::flatten(&catalog, id)
        }
        Reach::Mine(lock) => {
            let mut metadata = catalog.load(id)?;
            catalog.recover(&lock, &metadata)?;
            check(&metadata)?;
            // An attached volume has a fetcher, which brings them.
            catalog.check_has_come(metadata.layers())?;
            let before = metadata.layout().hydrate();
            let is_any = rekey::mark_to_flatten(&catalog, &lock, &mut metadata)?;
            if is_any && metadata.layout().hydrate() != before {
                report(&store.events(), &metadata, "hydrating");
            }
            Ok(is_any)
        }
    };
    mark().context(|| format!("flatten {id}"))
}

/// Takes the mark away by which lower layers are to be hydrated from: they stay in the volume's chain, and
/// what was copied up stays in its top. Reports a `hydrateVolume` event. Returns whether there was a mark.
///
/// # Errors
/// `Usage` for layers under another data key than the top, or under none, which cannot stay; `Busy`, naming
/// the command that has the volume; those of its host process and of the file system.
pub fn cancel(store: &Store, id: VolumeId) -> Result<bool> {
    let catalog = store.catalog();
    let unmark = || match Reach::of(&catalog, id, Purpose::Hydrate)? {
        // The host process reports the event.
        Reach::Host => {
            rekey::check_may_stay(&catalog.load(id)?)?;
            control::cancel_flatten(&catalog, id)
        }
        Reach::Mine(lock) => {
            let mut metadata = catalog.load(id)?;
            catalog.recover(&lock, &metadata)?;
            let was_any = rekey::unmark(&catalog, &lock, &mut metadata)?;
            if was_any {
                report(&store.events(), &metadata, "cancelled");
            }
            Ok(was_any)
        }
    };
    unmark().context(|| format!("stop the copy from the lower layers of {id}"))
}

/// Returns when nothing of the volume is to be hydrated any more, with what is known of it then. Of a volume
/// that nobody has attached this process does it, at this `pace`, and reports `hydrateVolume` events. `tell`
/// is told now and then how far it has come.
///
/// # Errors
/// `Busy`, naming the command that has the volume; `Corrupt` for a volume that an attach would refuse; those
/// of the KMS and of the file system.
pub fn follow(store: &Store, id: VolumeId, pace: Pace, tell: &mut dyn FnMut(&Progress)) -> Result<Metadata> {
    let catalog = store.catalog();
    let mut behind = Behind::default();
    loop {
        let metadata = catalog.load(id)?;
        if metadata.layout().leaving() == 0 {
            catalog.clear_left(id)?;
            return Ok(metadata);
        }
        if is_attached(&catalog, id)? {
            // It may be let go of at any moment.
            let status = control::status(&catalog, id);
            if let Some(progress) = status.iter().find_map(|status| status.hydration.as_ref()) {
                behind.follow(store, &metadata, progress);
                tell(progress);
            }
            std::thread::sleep(ASK);
            continue;
        }
        match complete(store, id, pace, tell) {
            Err(e) if e.kind() == Kind::Busy && is_attached(&catalog, id)? => {}
            done => {
                let volume = done.context(|| format!("copy up the lower layers of {id}"))?;
                report(&store.events(), &volume, "completed");
                return Ok(volume);
            }
        }
    }
}

/// Gives back behind a copy what it has brought up, where nothing else needs it: so it takes not much more
/// space than what it copies has, once.
#[derive(Default)]
struct Behind {
    /// How many bytes were left to be copied when space was given back last.
    left: Option<u64>,
}

impl Behind {
    /// The copy has come so far.
    fn follow(&mut self, store: &Store, volume: &Metadata, progress: &Progress) {
        let Some(left) = progress.left else { return };
        // The first time, it may have waited for long.
        let copied = self.left.map(|before| before.saturating_sub(left));
        let is_due = match copied {
            None => progress.waits_for_space,
            Some(copied) => copied >= STEP || (progress.waits_for_space && copied > 0),
        };
        if copied.is_some() && !is_due {
            return;
        }
        self.left = Some(left);
        if !is_due {
            return;
        }
        let leaving: Vec<LayerId> = volume.layout().leaving_layers().iter().map(|layer| layer.id).collect();
        match space::give_back_covered(store, &leaving) {
            Ok(bytes) => log::debug!("{}: {bytes} bytes were given back behind the copy", volume.id()),
            Err(e) => log::warn!("nothing is given back behind the copy of {}: {e}", volume.id()),
        }
    }
}

/// Hydrates a volume that nobody has attached, and takes the layers out of its chain.
fn complete(store: &Store, id: VolumeId, pace: Pace, tell: &mut dyn FnMut(&Progress)) -> Result<Metadata> {
    let catalog = store.catalog();
    let holder = Holder::this_process(Purpose::Hydrate, None)?;
    let lock = VolumeLock::acquire_in_turn(&catalog.folder(id), id, &holder)?;
    catalog.check_has_come(catalog.load(id)?.layers())?;
    let Taken { lock, opened } = store.open_taken(lock).map_err(|failure| failure.error)?;
    let Opened { mut metadata, seal_key, layers, .. } = opened;
    let leaving = metadata.layout().leaving();
    if leaving == 0 {
        return Ok(metadata);
    }
    let disk = Disk::layered(shape(metadata.geometry(), false), "", layers::chain(&layers));
    let disk = disk.context(|| "open its layers")?.hydrating_lowest(leaving);
    drop(layers);
    let waits = |short: &Shortage| {
        store.events().record(&Event::hydrate_waits(id, kms_key(&metadata), short.to_string()));
    };
    let mut behind = Behind::default();
    let mut tell = |progress: &Progress| {
        behind.follow(store, &metadata, progress);
        tell(progress);
    };
    hydrate(disk, pace, &mut tell, &waits)?;
    leaving::commit(&catalog, &lock, &mut metadata, seal_key.as_ref())?;
    // With this their files go.
    catalog.recover(&lock, &metadata)?;
    Ok(metadata)
}

/// Hydrates a disk by a thread of its own, at this `pace`, until nothing is left. `tell` is told now and then
/// how far it has come, and `waits` once, if it has to wait for space.
///
/// # Errors
/// What the store says, with the place.
pub(super) fn hydrate(
    disk: Disk,
    pace: Pace,
    tell: &mut dyn FnMut(&Progress),
    waits: &(dyn Fn(&Shortage) + Sync),
) -> Result<()> {
    let hydration = &*Hydration::new(Arc::new(disk), pace.rate)?;
    hydration.set_reserve(pace.reserve);
    let is_told = &AtomicBool::new(false);
    let hear = move |short: Option<&Shortage>| {
        if let Some(short) = short.filter(|_| !is_told.swap(true, Ordering::Relaxed)) {
            log::warn!("the copy waits: {short}");
            waits(short);
        }
    };
    let end = std::thread::scope(|threads| {
        let (over, wait) = sync_channel(1);
        threads.spawn(move || over.send(hydration.run_telling(&hear)));
        loop {
            match wait.recv_timeout(TELL) {
                Ok(end) => return end,
                Err(RecvTimeoutError::Timeout) => tell(&progress(hydration)),
                Err(RecvTimeoutError::Disconnected) => return Err(std::io::Error::other("it panicked")),
            }
        }
    })?;
    match end {
        End::Complete => Ok(()),
        End::Stopped => Err(Error::new(Kind::Other, "it was stopped")),
    }
}

fn progress(hydration: &Hydration) -> Progress {
    let short = hydration.shortage();
    Progress {
        left: hydration.left(),
        rate: hydration.rate(),
        problem: short.as_ref().map(ToString::to_string),
        waits_for_space: short.is_some(),
        reserve: hydration.reserve().given(),
    }
}

/// Reports how far a volume has come with being hydrated.
pub(super) fn report(events: &EventLog, volume: &Metadata, step: &'static str) {
    events.record(&Event::hydrate_volume(volume.id(), kms_key(volume), step));
}
