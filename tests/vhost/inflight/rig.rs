//! A guest under load whose disk's host process comes and goes.

use crate::common::disk::FREE;
use crate::common::frontend::load::{Load, Random};
use crate::common::frontend::session::{F_EVENT_IDX, F_LOG_ALL};
use crate::common::frontend::{Fault, Layout, Options, Order, Session};
use crate::common::patience::{Deadline, limit};
use crate::common::store::{Attached, Store};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};
use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;

/// How a VMM takes it that its back-end is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// As QEMU: the next available index is the used one.
    Qemu,
    /// As cloud-hypervisor: it is the available one, and protocol features are not asked for again.
    CloudHypervisor,
    /// As QEMU, by a back-end that notes nothing but answers in order.
    InOrder,
}

/// What the rings of a guest are like.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Rings.
    pub queues: usize,
    /// VIRTIO_RING_F_EVENT_IDX.
    pub event_idx: bool,
    /// Whether requests use indirect descriptors.
    pub indirect: bool,
}

/// The seed of this run: another each time, or what SEALBLK_TEST_SEED says.
pub fn seed() -> u64 {
    let given = std::env::var("SEALBLK_TEST_SEED").ok();
    let seed = given.map_or_else(|| u64::from(std::process::id()), |s| s.parse().expect("a number"));
    println!("SEALBLK_TEST_SEED={seed}");
    seed
}

/// A store with a volume `t` of 64 MiB.
pub fn store() -> Store {
    let store = Store::new();
    store.ok(&["volume", "create", "--size", "64MiB", "--name", "t"]);
    store
}

/// A guest, its VMM's connection, and the host process.
pub struct Rig<'a> {
    store: &'a Store,
    attached: Option<Attached<'a>>,
    /// The connection.
    pub session: Session,
    /// What each ring is doing.
    pub loads: Vec<Load>,
    options: Options,
    way: Way,
    random: Random,
}

impl<'a> Rig<'a> {
    /// Attaches and starts a guest on a part of the disk of its own, the `part`th of 8.
    pub fn start(store: &'a Store, way: Way, shape: Shape, part: u64, seed: u64) -> Self {
        let attached = attach(store, way);
        let mut protocol = Protocol::MQ | Protocol::CONFIG | Protocol::REPLY_ACK | Protocol::RESET_DEVICE;
        if way != Way::InOrder {
            protocol |= Protocol::INFLIGHT_SHMFD;
        }
        let options = Options {
            features: !(F_LOG_ALL | if shape.event_idx { 0 } else { F_EVENT_IDX }),
            protocol,
            queues: shape.queues,
            queue_size: 256,
            layout: Layout::flat(64 << 20),
            order: if way == Way::CloudHypervisor { Order::CloudHypervisor } else { Order::Qemu7 },
            ..Options::default()
        };
        let session = Session::open(attached.socket(), &options).expect("the back-end serves a front-end");
        assert_eq!(session.inflight.is_some(), way != Way::InOrder);
        // Small, so that the same sectors are written over and over.
        let load = |queue: u64| {
            let first = FREE.start + 8192 * part + 4096 * queue;
            let load = Load::new(seed ^ queue << 32 ^ part << 40, first..first + 1024, shape.indirect);
            if way == Way::InOrder { load.in_order() } else { load }
        };
        let loads = (0..shape.queues as u64).map(load).collect();
        let random = Random::new(seed ^ part << 48);
        Rig { store, attached: Some(attached), session, loads, options, way, random }
    }

    /// The host process.
    pub fn host(&self) -> &Attached<'a> {
        self.attached.as_ref().expect("it runs")
    }

    /// A number below `end`.
    pub fn random(&mut self, end: u64) -> u64 {
        self.random.below(end)
    }

    /// Requests completed in all.
    pub fn completed(&self) -> u64 {
        self.loads.iter().map(|l| l.completed).sum()
    }

    /// Puts requests on every ring as far as there is room, up to `target` of each in all.
    pub fn submit(&mut self, target: u64) {
        for (load, ring) in self.loads.iter_mut().zip(&mut self.session.rings) {
            while load.submitted < target && load.submit(ring).expect("a request") {}
            ring.kick_if_wanted();
        }
    }

    /// Takes the completions that there are; whether there were any.
    pub fn take(&mut self) -> bool {
        let mut any = false;
        for (queue, (load, ring)) in self.loads.iter_mut().zip(&mut self.session.rings).enumerate() {
            while load.take(ring).unwrap_or_else(|e| panic!("queue {queue}: {e}")) {
                any = true;
            }
        }
        any
    }

    /// Keeps the rings busy until so many requests are completed in all; no ring gets more than `target`.
    pub fn pump(&mut self, until: u64, target: u64) {
        let mut deadline = Deadline::after(limit());
        while self.completed() < until {
            self.submit(target);
            if self.take() {
                deadline = Deadline::after(limit());
                continue;
            }
            self.session.rings.iter().for_each(|r| r.want_call(true));
            if !self.take() && !self.wait_call() {
                let host = self.attached.as_ref().map_or(String::new(), Attached::output);
                panic!(
                    "no interrupt; {} of {until} requests are completed; used {:?}: {host}",
                    self.completed(),
                    self.session.rings.iter().map(|r| r.used_idx()).collect::<Vec<_>>(),
                );
            }
            deadline.check("a completion", || "interrupts without any");
        }
    }

    /// Kills the host process after a moment, and collects what it has completed. The guest goes on.
    pub fn kill(&mut self, target: u64) {
        let moment = Duration::from_micros(self.random.below(400));
        let start = Instant::now();
        while start.elapsed() < moment {
            std::hint::spin_loop();
        }
        self.crash();
        self.take();
        let more = self.random.below(8);
        let most = self.loads.iter().map(|l| l.submitted).max().unwrap_or(0);
        self.submit(target.min(most + more));
    }

    /// Kills the host process, and touches nothing else.
    pub fn crash(&mut self) {
        self.attached.take().expect("it runs").kill();
    }

    /// Requests that the dead host process had taken and not answered, as far as one can tell.
    pub fn left_behind(&self) -> usize {
        match &self.session.inflight {
            Some(region) => (0..self.loads.len() as u16).map(|q| region.marks(q).len()).sum(),
            None => self.loads.iter().map(|l| l.heads().len()).sum(),
        }
    }

    /// Another host process, at the same socket.
    pub fn attach_again(&mut self) {
        self.attached = Some(attach(self.store, self.way));
    }

    /// The VMM connects to it and goes on.
    pub fn reconnect(self) -> Self {
        let Rig { store, attached, mut session, loads, mut options, way, random } = self;
        // What was agreed is not asked again.
        options.protocol = session.protocol;
        options.features = session.features;
        if way == Way::CloudHypervisor {
            options.order = Order::CloudHypervisorReconnect;
        }
        let region = session.inflight.take();
        let (mem, rings) = session.abandon();
        let socket = attached.as_ref().expect("it runs").socket();
        let mut session = Session::resume(socket, &options, mem, rings).expect("the back-end is back");
        session.inflight = region;
        let bases: Vec<u16> = match way {
            Way::CloudHypervisor => session.rings.iter().map(|r| r.avail_idx()).collect(),
            _ => session.rings.iter().map(|r| r.used_idx()).collect(),
        };
        session.start_at(&bases).expect("the device starts");
        Rig { store, attached, session, loads, options, way, random }
    }

    /// Lets what is in flight complete, and puts nothing more on the rings.
    pub fn settle(&mut self) {
        let flying: u64 = self.loads.iter().map(|l| l.heads().len() as u64).sum();
        self.pump(self.completed() + flying, 0);
    }

    /// Stops the device under load, as a VMM that pauses, and starts it again. With `reset`,
    /// as a guest that resets it.
    pub fn stop_and_start(&mut self, reset: bool) {
        if reset {
            self.session.reset_device().expect("the device is reset");
        } else {
            self.session.stop().expect("the device stops");
        }
        // Everything that was taken was answered before the answer to that.
        self.take();
        let bases: Vec<u16> = self.session.rings.iter().map(|r| r.used_idx()).collect();
        self.session.start_at(&bases).expect("the device starts");
    }

    /// The VMM is gone at once, with its guest and all that this had in flight. `meanwhile` is called while
    /// there is none; then another VMM comes with a new guest, on the same disk.
    pub fn vanish(self, meanwhile: impl FnOnce(&Attached<'a>)) -> Self {
        let Rig { store, attached, session, mut loads, options, way, random } = self;
        drop(session);
        loads.iter_mut().for_each(Load::vanish);
        let host = attached.as_ref().expect("it runs");
        meanwhile(host);
        let session = Session::open(host.socket(), &options).expect("the back-end serves the next");
        Rig { store, attached, session, loads, options, way, random }
    }

    /// Detaches the volume, with the VMM connected and requests in flight.
    pub fn detach(&mut self) {
        self.attached.take().expect("it runs").detach();
        self.take();
    }

    /// With everything completed: the disk holds what it should, every request was answered exactly once, and
    /// nothing is noted as in flight. Stops the device.
    pub fn assert_whole(&mut self) {
        for (load, ring) in self.loads.iter_mut().zip(&mut self.session.rings) {
            load.verify(ring).unwrap_or_else(|e| panic!("{e}"));
        }
        let bases = self.session.stop().expect("the device stops");
        for (queue, (load, ring)) in self.loads.iter().zip(&self.session.rings).enumerate() {
            let expected = load.submitted as u16;
            assert_eq!(ring.used_idx(), expected, "used index of queue {queue}");
            assert_eq!(bases[queue], expected, "next available index of queue {queue}");
            if let Some(region) = &self.session.inflight {
                let queue = queue as u16;
                assert_eq!((region.marks(queue), region.used_idx(queue)), (vec![], expected));
            }
        }
    }

    /// Waits until one of the rings is signalled, and takes the signals.
    fn wait_call(&self) -> bool {
        let rings = &self.session.rings;
        // SAFETY: the descriptors are the rings', which are borrowed as long as this.
        let fd =
            |r: &crate::common::frontend::SplitRing| unsafe { BorrowedFd::borrow_raw(r.call_fd.as_raw_fd()) };
        let mut fds: Vec<_> = rings.iter().map(|r| PollFd::new(fd(r), PollFlags::POLLIN)).collect();
        let timeout = PollTimeout::try_from(limit()).unwrap_or(PollTimeout::MAX);
        let called = poll(&mut fds, timeout).map_err(|e| Fault::Io(e.into())).expect("poll") > 0;
        rings.iter().for_each(|r| drop(r.call_fd.read()));
        called
    }
}

fn attach(store: &Store, way: Way) -> Attached<'_> {
    let in_order = ["--in-order"];
    let extra = if way == Way::InOrder { &in_order[..] } else { &[] };
    store.attach("t", &[&["--queues", "2"], extra].concat())
}
