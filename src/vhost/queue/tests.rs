//! How many flushes the disk gets, counted there.

use super::*;
use crate::vhost::queue::fake::{Control, Driver, disk};
use crate::vhost::queue::ring::Position;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Instant;

const BEGIN: Position = Position { next_avail: 0, next_used: 0 };

struct Rig {
    control: Arc<Control>,
    driver: Driver,
    worker: Worker,
}

impl Rig {
    fn new() -> Self {
        let control = Arc::new(Control::default());
        let driver = Driver::new(&control);
        let worker = Worker::spawn(0, disk(&control), Tuning::default(), |e| panic!("{e}")).unwrap();
        worker.start(*driver.setup(BEGIN)).unwrap();
        let rig = Rig { control, driver, worker };
        rig.taken(0);
        rig
    }

    /// Puts flushes on the ring; returns when the device has taken them.
    fn put(&mut self, count: u16, in_all: u16) {
        self.driver.put(count);
        self.taken(in_all);
    }

    fn taken(&self, in_all: u16) {
        // It says so when it has nothing more to do.
        until(|| self.driver.avail_event() == in_all);
    }

    fn let_end(&self, in_all: u32) {
        self.control.may_end.store(in_all, SeqCst);
    }

    #[track_caller]
    fn answered(&self, statuses: &[u8]) {
        until(|| usize::from(self.driver.used()) == statuses.len());
        let expected: Vec<_> = statuses.iter().copied().map(Some).collect();
        assert_eq!(self.driver.statuses(statuses.len() as u16), expected);
    }

    fn begun(&self) -> u32 {
        self.control.begun.load(SeqCst)
    }
}

fn until(good: impl Fn() -> bool) {
    let limit = Instant::now() + Duration::from_secs(600);
    while !good() {
        assert!(Instant::now() < limit, "it does not come");
        std::thread::yield_now();
    }
}

#[test]
fn flushes_of_one_turn_are_one() {
    let mut rig = Rig::new();
    rig.let_end(u32::MAX);
    rig.put(4, 4);
    rig.answered(&[0; 4]);
    assert_eq!(rig.begun(), 1);
    rig.put(1, 5);
    rig.answered(&[0; 5]);
    assert_eq!(rig.begun(), 2);
}

#[test]
fn a_queue_whose_disk_hangs_is_seen_from_outside() {
    let mut rig = Rig::new();
    rig.put(3, 3);
    let counted = || rig.worker.counters().read();
    until(|| counted().depth == 3);
    let first = counted().oldest_in_flight_ns.expect("a request is in flight");
    let later = counted().oldest_in_flight_ns.expect("it still is");
    assert!(first > 0 && later > first);
    assert_eq!((counted().flush.requests, counted().ring_runs), (0, true));
    rig.let_end(u32::MAX);
    rig.answered(&[0; 3]);
    until(|| rig.worker.counters().latencies().flush.count() == 3);
    let counted = rig.worker.counters().read();
    assert_eq!((counted.flush.requests, counted.depth_max, counted.oldest_in_flight_ns), (3, 3, None));
    assert!(rig.worker.counters().latencies().flush.max_ns >= later);
}

#[test]
fn flushes_that_come_while_one_runs_share_the_next() {
    let mut rig = Rig::new();
    rig.put(1, 1);
    rig.put(2, 3);
    rig.put(3, 6);
    assert_eq!((rig.begun(), rig.driver.used()), (1, 0));
    rig.let_end(1);
    // The first is answered, and nobody else by the same flush.
    until(|| rig.begun() == 2);
    rig.answered(&[0]);
    rig.let_end(2);
    rig.answered(&[0; 6]);
    assert_eq!(rig.begun(), 2);
}

#[test]
fn a_flush_that_failed_is_everybodys_and_no_later_one_is_begun() {
    let mut rig = Rig::new();
    rig.put(1, 1);
    rig.put(2, 3);
    rig.control.failing.store(true, SeqCst);
    rig.let_end(1);
    // Those who waited for the next hear of it, too: it would be a lie to say that all is well.
    rig.answered(&[1; 3]);
    rig.control.failing.store(false, SeqCst);
    rig.let_end(u32::MAX);
    rig.put(2, 5);
    rig.answered(&[1; 5]);
    assert_eq!(rig.begun(), 1);
}
