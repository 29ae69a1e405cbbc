//! The queue's thread, its mailbox and a driver, in every order in which they can take turns (up to a number
//! of preemptions), by loom. What is checked is the code that runs: the mailbox, the thread's life,
//! [`Server`] and [`Ring`](crate::vhost::queue::ring::Ring). The disk and the guest's driver are stand-ins.
//!
//! loom knows what goes through the mailbox. Steps on the ring and in the kernel are made known to it by the
//! stand-ins: each of the driver's, and on the thread's side whenever it asks the disk for something. Not
//! modelled: the order in which CPUs see each other's writes to the rings (virtio-queue's fences), and a
//! driver that acts between two accesses of one look at the ring.
//!
//! A wake-up that is lost is a thread that waits for ever: loom gives up then, which fails the test.

use super::*;
use crate::vhost::queue::fake::{Control, Driver, disk};
use crate::vhost::queue::ring::Position;
use std::sync::atomic::Ordering::SeqCst;

const BEGIN: Position = Position { next_avail: 0, next_used: 0 };

/// A worker whose thread is loom's.
fn worker(control: &Arc<Control>) -> (Worker, loom::thread::JoinHandle<()>, Arc<AtomicBool>) {
    let mailbox = Mailbox::new().expect("an event descriptor");
    let (inbox, disk, died) = (mailbox.clone(), disk(control), Arc::new(AtomicBool::new(false)));
    let (note, counters) = (died.clone(), Counters::new());
    let counted = counters.clone();
    let thread = loom::thread::spawn(move || {
        live(0, (&inbox, &counted), Some(disk), &Tuning::default(), |_| note.store(true, SeqCst));
    });
    (Worker { mailbox, counters, thread: None }, thread, died)
}

fn explore(check: impl Fn() + Sync + Send + 'static) {
    let mut model = loom::model::Builder::new();
    // Two take seconds and find what there was to find; three take minutes.
    let preemptions = std::env::var("SEALBLK_MODEL_PREEMPTIONS").ok();
    model.preemption_bound = Some(preemptions.map_or(2, |n| n.parse().expect("a number")));
    model.max_branches = 2_000;
    model.check(check);
}

fn disk_that_flushes() -> Arc<Control> {
    let control = Control::default();
    control.may_end.store(u32::MAX, SeqCst);
    Arc::new(control)
}

/// Waits until `count` requests are answered, well.
fn answered(control: &Control, driver: &Driver, count: u16) {
    while driver.used() != count {
        control.give_way();
    }
    assert_eq!(driver.statuses(count), vec![Some(0); count.into()]);
}

#[test]
fn no_kick_is_lost() {
    explore(|| {
        let control = disk_that_flushes();
        let (worker, thread, _) = worker(&control);
        let mut driver = Driver::new(&control);
        worker.start(*driver.setup(BEGIN)).unwrap();
        driver.put(1);
        answered(&control, &driver, 1);
        driver.put(2);
        answered(&control, &driver, 3);
        drop(worker);
        thread.join().unwrap();
    });
}

/// The ring is stopped at any moment of a driver that goes on: what was taken is answered, nothing is touched
/// after the stop, and whoever serves the ring next finds the rest.
#[test]
fn a_drain_leaves_nothing_behind_whenever_the_driver_kicks() {
    explore(|| {
        let control = disk_that_flushes();
        let (worker, thread, _) = worker(&control);
        let driver = Driver::new(&control);
        let mut guest = driver.view();
        let holders = driver.holders();
        worker.start(*driver.setup(BEGIN)).unwrap();
        let puts = loom::thread::spawn(move || {
            guest.put(1);
            guest.put(1);
            // It keeps the memory until it is joined.
            guest
        });
        let position = worker.stop().unwrap().expect("a ring ran");
        assert_eq!(driver.holders(), holders, "the guest's memory is let go of");
        let used = driver.used();
        assert_eq!((used, position.next_avail), (position.next_used, position.next_used));
        assert_eq!(driver.statuses(used), vec![Some(0); used.into()]);
        control.give_way();
        assert_eq!(driver.used(), used, "nothing is served after a stop");
        worker.start(*driver.setup(position)).unwrap();
        drop(puts.join().unwrap());
        answered(&control, &driver, 2);
        assert_eq!(worker.stop().unwrap(), Some(Position { next_avail: 2, next_used: 2 }));
        assert_eq!(worker.stop().unwrap(), None);
        drop(worker);
        thread.join().unwrap();
    });
}

/// A pause, at any moment of a driver that goes on: nothing is in flight in it, and nothing is begun.
/// Afterwards all goes on, a stop that came meanwhile too.
#[test]
fn in_a_pause_nothing_is_in_flight() {
    explore(|| {
        let control = disk_that_flushes();
        let (worker, thread, _) = worker(&control);
        let driver = Driver::new(&control);
        let mut guest = driver.view();
        worker.start(*driver.setup(BEGIN)).unwrap();
        let puts = loom::thread::spawn(move || {
            guest.put(1);
            guest.put(1);
        });
        worker.pause().unwrap().wait().unwrap();
        let still = || {
            let (begun, ended) = (control.begun.load(SeqCst), control.ended.load(SeqCst));
            assert_eq!(begun, ended, "a flush is in flight");
            begun
        };
        let begun = still();
        control.step();
        assert_eq!(still(), begun, "something was begun in a pause");
        worker.resume(false).unwrap().wait().unwrap();
        puts.join().unwrap();
        answered(&control, &driver, 2);
        assert_eq!(worker.stop().unwrap(), Some(Position { next_avail: 2, next_used: 2 }));
        drop(worker);
        thread.join().unwrap();
    });
}

/// Commands of several threads: each is answered, whether a ring runs at that moment or not.
#[test]
fn every_command_is_answered() {
    explore(|| {
        let control = disk_that_flushes();
        let (worker, thread, _) = worker(&control);
        let worker = Arc::new(worker);
        let other = worker.clone();
        let driver = Driver::new(&control);
        let calls = loom::thread::spawn(move || {
            other.set_call(None).unwrap();
            other.set_call(None).unwrap();
        });
        worker.start(*driver.setup(BEGIN)).unwrap();
        assert_eq!(worker.stop().unwrap(), Some(BEGIN));
        calls.join().unwrap();
        drop(worker);
        thread.join().unwrap();
    });
}

/// A thread that ends by an error, while others ask it for something, leaves nobody waiting.
#[test]
fn nobody_waits_for_a_thread_that_is_gone() {
    explore(|| {
        let control = disk_that_flushes();
        let (worker, thread, died) = worker(&control);
        let driver = Driver::new(&control);
        worker.start(*driver.setup(BEGIN)).unwrap();
        let worker = Arc::new(worker);
        let other = worker.clone();
        let asks = loom::thread::spawn(move || drop(other.set_call(None)));
        control.step();
        control.broken.store(true, SeqCst);
        // It may be drained before the thread finds out.
        let stopped = worker.stop();
        asks.join().unwrap();
        if stopped.is_err() {
            assert!(worker.stop().is_err() && worker.set_call(None).is_err());
        }
        drop(worker);
        thread.join().unwrap();
        assert_eq!(died.load(SeqCst), stopped.is_err());
    });
}
