//! A pause is nothing but slowness, whatever the guest and its VMM do meanwhile, and however it ends.

use crate::common::forward::forward;
use crate::common::frontend::block::{OK, Pending};
use crate::common::frontend::{Options, Request, Session, SplitRing};
use crate::common::patience::{limit, wait_for};
use crate::layers::rig::{Keys, Places, QUEUES, Served};
use sealblk::backing::{Backing, Done, InMemory, Queue};
use sealblk::disk::{Disk, Layers};
use sealblk::image::lock::Access;
use sealblk::reactor::Reactor;
use sealblk::vhost::queue::Tuning;
use sealblk::vhost::queue::qos::{Limits, Qos};
use sealblk::virtio::Shape;
use sealblk::volume::layers::chain;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

const SECTORS: u64 = 4096;
const SHAPE: Shape = Shape { sectors: SECTORS, block_size: 512, read_only: false };

struct Rig {
    served: Served,
    places: Places,
    keys: Keys,
}

impl Rig {
    fn new(tuning: &Tuning) -> Self {
        Self::over(tuning, |layers| layers)
    }

    /// A device of one layer, whose backing `wrap` may wrap.
    fn over(tuning: &Tuning, wrap: impl FnOnce(Layers) -> Layers) -> Self {
        let (mut places, keys) = (Places::new(), Keys::new(512));
        let file = places.file(0, Some(0), SECTORS);
        let layers = keys.open_all(&[file], Access::ReadWrite, 512);
        let disk = Disk::layered(SHAPE, "rig", wrap(chain(&layers))).unwrap();
        let served = Served::new(places.folder(), Arc::new(disk), layers, tuning);
        Rig { served, places, keys }
    }

    fn freeze(&mut self) {
        let top = self.places.file(0, Some(1), SECTORS);
        self.served.freeze(self.keys.open(&top, Access::ReadWrite, 512), 0);
    }
}

fn submit(ring: &mut SplitRing, request: &Request) -> Pending {
    let pending = request.submit(ring).unwrap();
    ring.kick();
    pending
}

fn finish(ring: &mut SplitRing, pending: Pending) -> u8 {
    let used = ring.wait_used().unwrap();
    pending.finish(ring, used).unwrap().status
}

fn run(session: &mut Session, ring: usize, request: &Request) -> u8 {
    request.run(&mut session.rings[ring]).unwrap().status
}

fn read(session: &mut Session, ring: usize, sector: u64) -> Vec<u8> {
    let outcome = Request::read(sector, 4096).run(&mut session.rings[ring]).unwrap();
    assert_eq!(outcome.status, OK);
    outcome.data
}

#[test]
fn what_comes_during_a_pause_waits_for_its_end() {
    let mut rig = Rig::new(&Tuning::default());
    let (device, session) = (rig.served.device.clone(), &mut rig.served.session);
    let paused = device.pause(limit()).unwrap();
    let pending = [0, 1].map(|n| submit(&mut session.rings[n], &Request::write(8 * n as u64, &[1; 4096])));
    for ring in &session.rings {
        assert_eq!(ring.used_idx(), ring.last_used(), "nothing is served in a pause");
    }
    paused.resume();
    for (ring, pending) in session.rings.iter_mut().zip(pending) {
        assert_eq!(finish(ring, pending), OK);
    }
}

#[test]
fn a_vmm_that_stops_its_rings_or_leaves_during_a_pause_is_served_after_it() {
    let rig = Rig::new(&Tuning::default());
    let (device, path) = (rig.served.device.clone(), rig.places.folder().join("s"));
    let open = || Session::open(&path, &Options { queues: QUEUES, ..Options::default() }).unwrap();
    let _server = rig.served.without_session();
    std::thread::scope(|scope| {
        let session = open();
        let paused = device.pause(limit()).unwrap();
        let stops = scope.spawn(move || session.stop().unwrap());
        paused.resume();
        assert_eq!(stops.join().unwrap(), [0; QUEUES]);

        let mut session = open();
        let paused = device.pause(limit()).unwrap();
        let pending = submit(&mut session.rings[0], &Request::write(0, &[1; 4096]));
        drop((session, pending));
        paused.resume();

        let paused = device.pause(limit()).unwrap();
        let starts = scope.spawn(open);
        paused.resume();
        let mut session = starts.join().unwrap();
        assert_eq!(run(&mut session, 1, &Request::write(0, &[2; 4096])), OK);
        assert_eq!(read(&mut session, 0, 0), [2; 4096]);
    });
}

#[test]
fn requests_that_the_limits_hold_back_neither_delay_a_pause_nor_are_lost() {
    // More than an hour for each.
    let limits = Limits { iops: 0, throughput: 1, burst: Duration::ZERO };
    let qos = Arc::new(Qos::new(limits));
    let mut rig = Rig::new(&Tuning { qos: qos.clone(), in_order: true, ..Tuning::default() });
    let ring = &mut rig.served.session.rings[0];
    let pending: Vec<_> =
        (0..40u64).map(|n| submit(ring, &Request::write(8 * n, &[n as u8 + 1; 4096]))).collect();
    rig.freeze();
    let ring = &mut rig.served.session.rings[0];
    assert!(ring.used_idx().wrapping_sub(ring.last_used()) < 40, "nothing was held back");
    qos.set(Limits::default());
    for pending in pending {
        assert_eq!(finish(ring, pending), OK);
    }
    for n in 0..40 {
        assert_eq!(read(&mut rig.served.session, 1, 8 * n), [n as u8 + 1; 4096]);
    }
}

#[test]
fn a_pause_that_is_given_up_leaves_everything_as_it_was() {
    let mut rig = Rig::new(&Tuning::default());
    assert_eq!(run(&mut rig.served.session, 0, &Request::write(0, &[1; 4096])), OK);
    let before = rig.served.device.disk();
    drop(rig.served.device.pause(limit()).unwrap());
    // A queue that cannot open the other layers keeps all of them on these.
    let mut paused = rig.served.device.pause(limit()).unwrap();
    let layers = chain(&rig.served.layers);
    let broken = Gated { backing: layers.backing.clone(), hold: Arc::default(), broken: true };
    let broken = Disk::layered(SHAPE, "rig", Layers { backing: Arc::new(broken), ..layers }).unwrap();
    let fine = Disk::layered(SHAPE, "rig", chain(&rig.served.layers)).unwrap();
    paused.prepare(Arc::new(fine)).unwrap();
    assert!(paused.prepare(Arc::new(broken)).is_err());
    paused.resume();
    assert!(Arc::ptr_eq(&before, &rig.served.device.disk()));
    assert_eq!(read(&mut rig.served.session, 0, 0), [1; 4096]);
    rig.freeze();
    assert_eq!(read(&mut rig.served.session, 1, 0), [1; 4096]);
}

#[test]
fn a_disk_that_does_not_answer_makes_a_pause_fail_and_nothing_else() {
    let hold: Arc<Hold> = Arc::default();
    let mut rig = Rig::over(&Tuning::default(), |layers| {
        let backing = Gated { backing: layers.backing.clone(), hold: hold.clone(), broken: false };
        Layers { backing: Arc::new(backing), ..layers }
    });
    hold.on.store(true, Ordering::SeqCst);
    let pending = submit(&mut rig.served.session.rings[0], &Request::write(0, &[1; 4096]));
    // Before the thread has taken it, a pause would find nothing to wait for.
    wait_for("the write is held", || match hold.held.load(Ordering::SeqCst) {
        1 => Ok(()),
        other => Err(other),
    });
    let refused = rig.served.device.pause(Duration::from_millis(50)).err().map(|e| e.kind());
    assert_eq!(refused, Some(io::ErrorKind::TimedOut));
    assert_eq!(run(&mut rig.served.session, 1, &Request::get_id(20)), OK, "the other queue goes on");
    hold.on.store(false, Ordering::SeqCst);
    assert_eq!(finish(&mut rig.served.session.rings[0], pending), OK);
    rig.freeze();
    assert_eq!(read(&mut rig.served.session, 0, 0), [1; 4096]);
}

/// Whether operations are held at their end, and how many are.
#[derive(Default)]
struct Hold {
    on: AtomicBool,
    held: AtomicUsize,
}

/// A backing whose operations do not end while they are held, or which cannot be opened.
struct Gated {
    backing: Arc<dyn Backing>,
    hold: Arc<Hold>,
    broken: bool,
}

struct GatedQueue {
    queue: Box<dyn Queue>,
    hold: Arc<Hold>,
    held: Vec<Done>,
}

impl Backing for Gated {
    forward!(caps has_data);

    fn open_queue(&self, reactor: &Rc<dyn Reactor>, depth: u16) -> io::Result<Box<dyn Queue>> {
        if self.broken {
            return Err(io::Error::other("broken"));
        }
        let queue = self.backing.open_queue(reactor, depth)?;
        Ok(Box::new(GatedQueue { queue, hold: self.hold.clone(), held: Vec::new() }))
    }
}

impl Queue for GatedQueue {
    forward!(alloc free places max_buffer bytes has_room submit collect woken);

    fn in_memory(&self, _layer: usize, _offset: u64, _len: usize) -> Option<InMemory<'_>> {
        None
    }

    fn in_flight(&self) -> usize {
        self.queue.in_flight() + self.held.len()
    }

    fn has_done(&self) -> bool {
        if self.held.is_empty() {
            return self.queue.has_done();
        }
        // Nobody wakes the thread when they are let go.
        std::thread::sleep(Duration::from_millis(1));
        true
    }

    fn next_done(&mut self) -> Option<Done> {
        if !self.hold.on.load(Ordering::SeqCst)
            && let Some(done) = self.held.pop()
        {
            return Some(done);
        }
        loop {
            let done = self.queue.next_done()?;
            if !self.hold.on.load(Ordering::SeqCst) {
                return Some(done);
            }
            self.held.push(done);
            self.hold.held.fetch_add(1, Ordering::SeqCst);
        }
    }
}
