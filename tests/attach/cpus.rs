//! `attach --cpus`: which threads run where.

use crate::common::attach::{Host, Place, read, write};
use crate::common::disk::pattern;
use crate::common::frontend::{Options, Session};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// The CPUs that a thread of this machine may be bound to, whatever this process itself is bound to.
fn usable() -> Vec<usize> {
    let may_run = |cpu: &usize| {
        let mut only = CpuSet::new();
        only.set(*cpu).and_then(|()| sched_setaffinity(Pid::from_raw(0), &only)).is_ok()
    };
    // A thread of its own, which takes with it what it was bound to.
    let found = std::thread::spawn(move || (0..CpuSet::count()).filter(may_run).collect());
    found.join().expect("no panic")
}

/// The CPUs that this thread may run on, as the kernel writes them.
fn of_this_thread() -> CpuSet {
    sched_getaffinity(Pid::from_raw(0)).expect("it runs")
}

/// By name, the CPUs that each thread of the host process may run on. Those that the kernel runs for an
/// io_uring are not its own.
fn of_threads(host: &Host) -> BTreeMap<String, CpuSet> {
    let threads = fs::read_dir(host.proc("task")).expect("list the threads");
    let named = |path: &Path| {
        let name = fs::read_to_string(path.join("comm")).ok()?.trim().to_owned();
        let id = path.file_name()?.to_str()?.parse().ok()?;
        Some((name, sched_getaffinity(Pid::from_raw(id)).ok()?))
    };
    let all = threads.filter_map(|thread| named(&thread.expect("list the threads").path()));
    all.filter(|(name, _)| !name.starts_with("iou-")).collect()
}

/// Attaches with these arguments, and has each of three queues serve a request: its thread
/// has bound itself by then.
fn serve(place: &Place, arguments: &[&str]) -> (Host, Session) {
    let host = place.attach(&[&["--queues", "3"], arguments].concat());
    let options = Options { queues: 3, ..Options::default() };
    let mut session = Session::open(&place.socket(), &options).expect("three queues");
    for (n, ring) in session.rings.iter_mut().enumerate() {
        let data = pattern(n as u64, 4096);
        write(ring, 8 * n as u64, &data);
        assert!(read(ring, 8 * n as u64, 4096) == data);
    }
    (host, session)
}

fn only(cpu: usize) -> CpuSet {
    let mut set = CpuSet::new();
    set.set(cpu).expect("a number of a CPU");
    set
}

#[test]
fn queues_are_bound_one_after_the_other_and_nothing_else_is() {
    let place = Place::new(&[]);
    let usable = usable();
    let (first, last) = (usable[0], usable[usable.len() - 1]);
    for (list, expected) in [
        (first.to_string(), [first; 3]),
        (format!("{last},{first}"), [last, first, last]),
        (format!("{first}-{first},{last}"), [first, last, first]),
    ] {
        let (host, session) = serve(&place, &["--cpus", &list]);
        let mut threads = of_threads(&host);
        for (queue, cpu) in expected.into_iter().enumerate() {
            let bound = threads.remove(&format!("queue-{queue}")).expect("each queue has a thread");
            assert_eq!(bound, only(cpu), "queue {queue} with --cpus {list}");
        }
        assert!(threads.len() >= 3, "main, control and the session's: {threads:?}");
        assert!(threads.values().all(|cpus| *cpus == of_this_thread()), "{list}: {threads:?}");
        drop(session);
        host.end();
    }
}

#[test]
fn without_the_option_nothing_is_bound() {
    let place = Place::new(&[]);
    let (host, session) = serve(&place, &[]);
    assert!(of_threads(&host).values().all(|cpus| *cpus == of_this_thread()), "{:?}", of_threads(&host));
    drop(session);
    host.end();
}

/// The machine may have fewer CPUs than the one that its settings were made for.
#[test]
fn a_cpu_that_is_not_there_is_told_and_the_queue_serves_unbound() {
    let place = Place::new(&[]);
    let absent = (0..CpuSet::count()).rev().find(|cpu| !usable().contains(cpu)).expect("not that many CPUs");
    let (host, session) = serve(&place, &["--cpus", &absent.to_string()]);
    for queue in 0..3 {
        host.says(&format!("queue {queue} cannot be bound to CPU {absent}: "));
    }
    assert!(of_threads(&host).values().all(|cpus| *cpus == of_this_thread()), "{:?}", of_threads(&host));
    drop(session);
    host.end();
}

#[test]
fn lists_that_make_no_sense_are_refused() {
    let place = Place::new(&[]);
    for list in ["", ",", "1,", "a", "-1", "2-1", "0-", "0--1", "1024", "0-1024", "0 1", "0x1"] {
        let said = place.refuse(2, &[&format!("--cpus={list}")]);
        assert!(said.contains("CPU numbers below 1024, like 2,3 or 4-7"), "{list}: {said}");
    }
}
