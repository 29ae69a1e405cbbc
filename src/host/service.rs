//! An attached volume while it is served: the threads, what they share, and what clients of the
//! control socket can ask for.

use crate::backing::coming;
use crate::base::Result;
use crate::base::sync::Locked;
use crate::catalog::Catalog;
use crate::catalog::lock::{Announcements, LockFile, VolumeLock};
use crate::disk::Disk;
use crate::helper::grants::Keeper;
use crate::host::Options;
use crate::host::changes::hydrate::{self, Hydrator};
use crate::host::control::{AtOnce, InTurns, Name, Orders};
use crate::host::handover::{Handover, Parts};
use crate::host::keys_held::KeysHeld;
use crate::host::notify::Notifier;
use crate::host::start::{Place, Taken};
use crate::host::state::Record;
use crate::host::stats::Stats;
use crate::host::status::{Refusals, Status};
use crate::host::upgrade::Predecessor;
use crate::vhost::boundary::Boundary;
use crate::vhost::device::Device;
use crate::vhost::gate::Channel;
use crate::vhost::listener::Stop;
use crate::vhost::queue::Tuning;
use crate::vhost::queue::qos::{Limits, Qos};
use crate::vhost::session::Inlet;
use crate::virtio::{SECTOR_SIZE, SharedShape};
use crate::volume::layers::PassedLocks;
use nix::unistd::Uid;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// Most data segments in a request: what a ring of 128 entries, the smallest default of any VMM, can carry.
const SEG_MAX: u32 = 126;

/// The volume, being served, or to be once another process has let go of it.
pub(super) struct Service {
    /// Ends it.
    pub(super) stop: Arc<Stop>,
    record: Arc<Record>,
    handover: Arc<Handover>,
    qos: Arc<Qos>,
    shape: Arc<SharedShape>,
    channel: Arc<Channel>,
    writeback: Arc<AtomicBool>,
    lock_file: LockFile,
    keeper: Arc<Keeper>,
    held: Arc<Mutex<Option<KeysHeld>>>,
    boundary: Arc<Boundary>,
    /// The lock of the process that serves the volume until now, until it is taken.
    passed: Mutex<Option<VolumeLock>>,
    /// Whether that process has the volume still.
    is_others: Arc<AtomicBool>,
    begun: Instant,
}

/// What belongs to a successor beside what the service has.
pub(super) struct Leaves<'a> {
    /// The socket that VMMs connect to.
    pub(super) listener: Option<Arc<UnixListener>>,
    /// Its path.
    pub(super) path: Option<&'a Path>,
    /// Whether its name is removed when the volume is detached.
    pub(super) is_name_ours: bool,
    /// How many regions of memory a VMM may share.
    pub(super) memory_regions: u16,
    /// Whose process this was.
    pub(super) started_by: Uid,
    pub(super) manager: Arc<Notifier>,
    pub(super) boundary: Arc<Boundary>,
}

impl Service {
    /// Starts the queues' threads.
    pub(super) fn start(
        catalog: &Catalog,
        options: &Options,
        taken: Taken,
        announcements: Announcements,
        control: Arc<Name>,
    ) -> Result<Self> {
        let Taken { place, lock_file, holder, opened, opener, metadata: _, events, keeper, held, coming: _ } =
            taken;
        let (stop, qos) = (Stop::new()?, Arc::new(Qos::new(options.limits)));
        let (keeper, held) = (Arc::new(keeper), Arc::new(Mutex::new(held)));
        let keys = hydrate::Keys { ring: opener.keys.clone(), held: held.clone(), grants: keeper.clone() };
        let hydrator = Hydrator::new(keys, events.clone(), options.hydrate_rate, options.space_reserve);
        let record = Record::new(catalog.clone(), hydrator);
        let (writeback, channel) = (Arc::new(AtomicBool::new(true)), Arc::<Channel>::default());
        let shape = opener.shape.clone();
        let parts = Parts {
            opener,
            lock_file: lock_file.clone(),
            holder,
            record: record.clone(),
            channel: channel.clone(),
            stop: stop.clone(),
            events,
            writeback: writeback.clone(),
            taken: Box::new(move || control.become_holders()),
        };
        let tuning = Tuning { poll: options.poll, in_order: options.in_order, cpu: None, qos: qos.clone() };
        let handover = Handover::new(parts, options.queues, &options.cpus, &tuning)?;
        let mut passed = None;
        match (place, opened) {
            (Place::Holder(lock), Some(opened)) => handover.begin(opened, lock)?,
            (Place::Next(turn), _) => handover.wait(turn)?,
            (Place::Successor(lock), _) => passed = Some(lock),
            (Place::Holder(_), None) => unreachable!("who has the volume has opened it"),
        }
        handover.heed(announcements)?;
        let is_others = Arc::new(AtomicBool::new(passed.is_some()));
        let (passed, boundary) = (Mutex::new(passed), Boundary::new()?);
        Ok(Service {
            stop,
            record,
            handover,
            qos,
            shape,
            channel,
            writeback,
            lock_file,
            keeper,
            held,
            boundary,
            passed,
            is_others,
            begun: Instant::now(),
        })
    }

    /// How the volume is reached, and by which cipher engine, for people.
    pub(super) fn describe(&self) -> String {
        self.handover.describe(self.handover.disk().as_deref())
    }

    /// What takes the volume from the process that serves it until now.
    pub(super) fn succession(&self) -> Succession {
        let (handover, keeper, stop) = (self.handover.clone(), self.keeper.clone(), self.stop.clone());
        let (is_others, lock) = (self.is_others.clone(), self.passed.locked().take());
        Succession { handover, keeper, stop, is_others, lock }
    }

    /// Whether another process has the volume still, which this one was to take over from.
    pub(super) fn is_anothers(&self) -> bool {
        self.is_others.load(Ordering::Relaxed)
    }

    /// What hands the volume over to another process.
    pub(super) fn predecessor(&self, options: &Options, leaves: Leaves<'_>) -> Result<Arc<Predecessor>> {
        let Leaves { listener, path, is_name_ours, memory_regions, started_by, manager, boundary } = leaves;
        Ok(Arc::new(Predecessor {
            options: options.clone(),
            volume: self.handover.volume(),
            memory_regions,
            started_by,
            listener,
            path: path.map(Path::to_owned),
            is_name_ours,
            manager,
            lock: self.lock_file.descriptor().try_clone_to_owned()?,
            handover: Arc::downgrade(&self.handover),
            record: self.record.clone(),
            keys: self.handover.keys(),
            keeper: self.keeper.clone(),
            qos: self.qos.clone(),
            stop: self.stop.clone(),
            boundary,
        }))
    }

    /// What clients can ask for.
    pub(super) fn orders(&self, options: &Options, predecessor: Arc<Predecessor>) -> Orders {
        let (read_only, engine) = (options.read_only, options.engine);
        // Not kept: it has the data keys.
        let handover = Arc::downgrade(&self.handover);
        let record = || self.record.clone();
        let (stop, qos, shape, vmm) =
            (self.stop.clone(), self.qos.clone(), self.shape.clone(), self.channel.clone());
        let (rate, rewrap, resize) = (record(), record(), record());
        let (reserve, cancel) = (record(), record());
        let (snapshot, rekey, flatten) = (record(), record(), record());
        let (noted, moved, empty) = (record(), record(), record());
        let (rename, slots) = (record(), record());
        let (of_status, of_stats, limits, begun) = (record(), record(), self.qos.clone(), self.begun);
        let asked = handover.clone();
        let status = move || {
            let handover = asked.upgrade();
            let disk = handover.as_ref().and_then(|handover| handover.disk());
            status_of(&of_status, handover.as_deref(), disk.as_deref(), read_only, limits.limits())
        };
        let limits = self.qos.clone();
        let stats = move || {
            let (Some(handover), limits) = (handover.upgrade(), limits.limits()) else {
                return Stats::default();
            };
            let status = handover
                .disk_at_once()
                .map(|disk| status_of(&of_stats, Some(&handover), disk.as_deref(), read_only, limits));
            Stats::of(handover.counters(), begun.elapsed(), limits, status)
        };
        let at_once = AtOnce {
            lock: self.lock_file.clone(),
            detach: Box::new(move || stop.stop()),
            stats: Box::new(stats),
        };
        let in_turns = InTurns {
            status: Box::new(status),
            throttle: Box::new(move |limits| qos.set(limits)),
            hydrate_rate: Box::new(move |bytes| rate.set_hydrate_rate(bytes)),
            space_reserve: Box::new(move |bytes| reserve.set_space_reserve(bytes)),
            rewrap: Box::new(move |new| rewrap.rewrap(new)),
            change_slot: Box::new(move |change| slots.change_slot(change)),
            resize: Box::new(move |size| {
                resize.resize(size)?;
                shape.grow(size / SECTOR_SIZE);
                Ok(vmm.config_changed())
            }),
            snapshot: Box::new(move |wanted, client| snapshot.snapshot(engine, wanted, client)),
            rekey: Box::new(move |key, layer, dek, client| rekey.rekey(engine, (key, layer), dek, client)),
            flatten: Box::new(move || flatten.flatten()),
            noted: Box::new(move |snapshot| noted.noted(snapshot)),
            move_down: Box::new(move |wanted, client| moved.move_down(wanted, client)),
            let_go: Box::new(move |layers| empty.let_go_of_empty(layers)),
            cancel_flatten: Box::new(move || cancel.cancel_flatten()),
            upgrade: Box::new(move |protocol, secret, client| predecessor.leave(protocol, secret, client)),
            rename: Box::new(move |name| rename.rename(name)),
        };
        Orders { at_once, in_turns }
    }

    /// The device that VMMs see, which reaches the crate by way of `inlet`. They may share so many memory
    /// regions.
    pub(super) fn device(&self, options: &Options, inlet: Inlet, memory_regions: u16) -> Device {
        Device {
            tenure: self.handover.clone(),
            shape: self.shape.clone(),
            inlet: inlet.seen_from_descriptors(),
            channel: self.channel.clone(),
            queues: options.queues,
            seg_max: SEG_MAX.min(u32::from(options.queue_size) - 2),
            queue_size: options.queue_size,
            memory_regions,
            boundary: self.boundary.clone(),
            writeback: self.writeback.clone(),
        }
    }

    /// Threads end, rings are drained; then what they wrote is made durable, and with the rest go the keys.
    /// The volume is still this process's.
    pub(super) fn end(self, device: Arc<Device>, served: Result<()>) -> (Result<()>, GivenUp) {
        let Service { record, handover, keeper, held, .. } = self;
        record.stop_serving();
        drop(device);
        let result = handover.end().and(served);
        drop(handover);
        let held = held.locked().take();
        if let Some(mut held) = held {
            held.ended(&result);
        }
        (result, GivenUp { record, keeper })
    }
}

/// What this process says of itself, which serves this disk, if it has any. Nothing here is waited for.
fn status_of(
    record: &Record,
    handover: Option<&Handover>,
    disk: Option<&Disk>,
    read_only: bool,
    limits: Limits,
) -> Status {
    Status {
        access: handover.map_or_else(String::new, |handover| handover.describe(disk)),
        read_only,
        unwrapped_by: record.hydrator.unwrapped_by().clone(),
        hydration: record.hydration(),
        flush_failed: disk.is_some_and(Disk::has_failed_flush),
        no_space: disk.and_then(refusals),
        limits: Some(limits.into()),
        coming: coming::summary().map(Into::into),
    }
}

/// How many requests have failed for want of space since this process has the volume.
fn refusals(disk: &Disk) -> Option<Refusals> {
    let (requests, last) = disk.refusals()?;
    Some(Refusals { requests, last })
}

/// Takes a volume that another process serves until now.
pub(super) struct Succession {
    handover: Arc<Handover>,
    keeper: Arc<Keeper>,
    stop: Arc<Stop>,
    is_others: Arc<AtomicBool>,
    lock: Option<VolumeLock>,
}

impl Succession {
    /// Opens the volume with the locks that were `passed`, and takes it, if `commit` succeeds.
    ///
    /// # Errors
    /// Why it is the other process's still.
    pub(super) fn take(&mut self, passed: &PassedLocks, commit: impl FnOnce() -> Result<()>) -> Result<()> {
        let Some(lock) = self.lock.take() else { unreachable!("a volume is taken over once") };
        self.handover.succeed(lock, passed, commit)?;
        self.keeper.keep();
        self.is_others.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// Has the VMM's connection end with the attachment.
    pub(super) fn end_with(&self, vmm: UnixStream) {
        self.stop.serving(Some(vmm));
    }

    /// Sees to what can wait until rings run.
    pub(super) fn settle(&self) {
        self.handover.settle();
    }
}

/// A volume that is not served any more.
pub(super) struct GivenUp {
    record: Arc<Record>,
    keeper: Arc<Keeper>,
}

impl GivenUp {
    /// Whether this process has the volume, and did not hand it over.
    pub(super) fn has_volume(&self) -> bool {
        self.record.has_volume()
    }

    /// Lets the next have the volume, and ends the grants. Returns whether this process had it.
    pub(super) fn release(self) -> bool {
        let had_it = self.record.release();
        self.keeper.retire();
        had_it
    }
}
