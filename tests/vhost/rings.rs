//! Rings whose indices, sizes, addresses or descriptors make no sense, on the real process.

use crate::common::disk::{Disk, FREE, each, pattern};
use crate::common::frontend::block::{IN, OK, OUT, Parts, parts};
use crate::common::frontend::hostile::{Answer, OddFiles, agreed, ask, ring_addresses, state, words};
use crate::common::frontend::raw::VERSION;
use crate::common::frontend::{Desc, Layout, Options, Place, Request, SplitRing};
use crate::common::patience::{limit, wait_for};
use std::os::fd::AsRawFd;
use vhost::vhost_user::message::FrontendReq as Req;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

fn read(ring: &SplitRing) -> Parts {
    parts(ring, IN, FREE.start)
}

#[test]
fn rings_with_indices_that_make_no_sense() {
    each(&[
        ("a head just beyond the ring", |ring| ring.publish(ring.size)),
        ("a head far beyond the ring", |ring| ring.publish(u16::MAX)),
        ("more available than the ring has", |ring| {
            ring.set_avail_idx(ring.avail_idx().wrapping_add(ring.size + 1))
        }),
        ("half the index space available", |ring| ring.set_avail_idx(ring.avail_idx().wrapping_add(0x8000))),
        ("an index that goes back", |ring| ring.set_avail_idx(ring.avail_idx().wrapping_sub(2))),
        ("a ring full of the same head", |ring| {
            let p = read(ring);
            let head = ring.post_chain(&[p.header, p.data, p.status]);
            for _ in 1..ring.size - 1 {
                ring.publish(head);
            }
        }),
        ("a request twice in flight", |ring| {
            let p = parts(ring, OUT, FREE.start);
            let head = ring.post_chain(&[p.header, p.data, p.status]);
            ring.kick();
            ring.publish(head);
        }),
    ]);
}

#[test]
fn rings_that_are_written_over() {
    let mut disk = Disk::attach(&[]);
    let mut session = disk.open();
    let noise = Request::write(FREE.start, &pattern(11, 4096));
    assert_eq!(noise.run(&mut session.rings[0]).unwrap().status, OK);
    drop(session);
    let targets: [fn(&SplitRing) -> u64; 4] = [|r| r.desc, |r| r.avail, |r| r.used, |r| r.used + 4];
    // First a used ring that the driver has rewritten.
    let mut session = disk.open();
    let ring = &mut session.rings[0];
    ring.mem.write(ring.used, &[0xff; 64]);
    let p = read(ring);
    ring.post_chain(&[p.header, p.data, p.status]);
    ring.kick();
    drop(session);
    for target in targets {
        let mut session = disk.open();
        let ring = &mut session.rings[0];
        for _ in 0..8 {
            let p = read(ring);
            ring.post_chain(&[p.header, Desc { addr: target(ring), len: 512, ..p.data }, p.status]);
        }
        let p = read(ring);
        ring.post_chain(&[p.header, p.data, Desc { addr: target(ring), ..p.status }]);
        ring.kick();
        // What the ring says now means nothing; only the process counts.
        drop(session);
        disk.assert_whole();
    }
}

#[test]
fn a_ring_of_two_entries_works() {
    let disk = Disk::attach(&[]);
    let mut session = disk.open_with(&Options { queue_size: 2, ..Options::default() });
    let ring = &mut session.rings[0];
    for n in 0..10 {
        let data = pattern(n, 4096);
        let write = Request::write(FREE.start, &data).placed(Place::Indirect).run(ring).unwrap();
        assert_eq!(write.status, OK);
        let read = Request::read(FREE.start, 4096).placed(Place::Indirect).run(ring).unwrap();
        assert!(read.data == data);
    }
}

#[test]
fn ring_sizes_and_numbers_that_cannot_be() {
    let mut disk = Disk::attach(&["--queues", "1"]);
    for size in [0, 3, 65, 2048, 32768, 65535, 65536, 65537, u32::MAX] {
        let mut session = disk.open();
        session.stop().unwrap();
        let answer = ask(session.raw(), Req::SET_VRING_NUM, &state(0, size), &[]);
        assert!(answer.is_refused(), "a ring of {size}");
        session.rings[0].kick();
        drop(session);
    }
    for queue in [1, 2, 127, 255, 256, 65535, 1 << 16, u32::MAX] {
        for request in [Req::SET_VRING_NUM, Req::SET_VRING_BASE, Req::SET_VRING_ENABLE] {
            let raw = agreed(disk.socket()).unwrap();
            assert!(ask(&raw, request, &state(queue, 1), &[]).is_refused(), "{request:?} of queue {queue}");
        }
        // This one has no way to say no but to close the connection.
        let raw = agreed(disk.socket()).unwrap();
        raw.message(Req::GET_VRING_BASE as u32, VERSION, &state(queue, 0), &[]).unwrap();
        assert!(raw.closes(limit()).unwrap(), "GET_VRING_BASE of queue {queue}");
        let raw = agreed(disk.socket()).unwrap();
        let addresses = ring_addresses(queue, 0, 0, 0);
        assert!(ask(&raw, Req::SET_VRING_ADDR, &addresses, &[]).is_refused(), "addresses of queue {queue}");
    }
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    for word in [1, 2, 0xff, 0x200, 1 << 32, u64::MAX] {
        for request in [Req::SET_VRING_KICK, Req::SET_VRING_CALL, Req::SET_VRING_ERR] {
            let raw = agreed(disk.socket()).unwrap();
            assert!(
                ask(&raw, request, &words(&[word]), &[event.as_raw_fd()]).is_refused(),
                "{request:?} {word:#x}"
            );
        }
    }
    disk.assert_whole();
}

#[test]
fn ring_addresses_that_cannot_be() {
    let mut disk = Disk::attach(&[]);
    let ram = 16 << 20;
    let base = Layout::flat(ram).regions[0].user;
    let end = base + ram;
    for (desc, used, avail) in [
        (0, 0, 0),
        (u64::MAX, u64::MAX, u64::MAX),
        (u64::MAX - 15, u64::MAX - 3, u64::MAX - 1),
        (end, end, end),
        (end - 16, base + 0x4000, base + 0x2000),
        (base, end - 4, base + 0x2000),
        (base, base + 0x4000, end - 2),
        // The guest's addresses where the front-end's belong.
        (0, 0x4000, 0x2000),
        // Misaligned.
        (base + 1, base + 0x4000, base + 0x2000),
        (base, base + 0x4001, base + 0x2000),
        (base, base + 0x4000, base + 0x2001),
        // One over the other.
        (base, base, base),
        (base, base + 8, base + 8),
    ] {
        let mut session = disk.open();
        session.stop().unwrap();
        let addresses = ring_addresses(0, desc, used, avail);
        if let Answer::Taken(_) = ask(session.raw(), Req::SET_VRING_ADDR, &addresses, &[]) {
            // Taken so far; the ring may turn out useless when it starts.
            let _ = ask(session.raw(), Req::SET_VRING_ENABLE, &state(0, 1), &[]);
            session.rings[0].kick();
        }
        drop(session);
        disk.assert_whole();
    }
}

#[test]
fn kick_call_and_error_descriptors_that_are_no_events() {
    let mut disk = Disk::attach(&[]);
    let before = disk.idle();
    let folder = tempfile::tempdir().unwrap();
    let odd = OddFiles::new(folder.path()).unwrap();
    for (_, fd) in &odd.all {
        for request in [Req::SET_VRING_CALL, Req::SET_VRING_ERR, Req::SET_VRING_KICK] {
            let mut session = disk.open();
            if let Answer::Taken(_) = ask(session.raw(), request, &words(&[0]), &[*fd]) {
                let _ = Request::read(0, 4096).submit(&mut session.rings[0]).unwrap();
                session.rings[0].kick();
            }
            drop(session);
        }
    }
    disk.assert_nothing_stays(&before);
}

#[test]
fn a_full_call_descriptor_does_not_stop_the_queue() {
    let disk = Disk::attach(&[]);
    for flags in [0, EFD_NONBLOCK] {
        let mut session = disk.open();
        let full = EventFd::new(flags).unwrap();
        full.write(u64::MAX - 1).unwrap();
        for request in [Req::SET_VRING_CALL, Req::SET_VRING_ERR] {
            assert!(!ask(session.raw(), request, &words(&[0]), &[full.as_raw_fd()]).is_refused());
        }
        for _ in 0..10 {
            let ring = &mut session.rings[0];
            let pending = Request::read(0, 4096).submit(ring).unwrap();
            ring.kick();
            // Interrupts are wanted, so that the full descriptor is written; completions are looked for.
            ring.want_call(true);
            let used = wait_for("a completion", || {
                ring.pop_used().ok_or_else(|| format!("used index {}", ring.used_idx()))
            });
            assert_eq!(pending.finish(ring, used).unwrap().status, OK);
        }
    }
}

/// The descriptor's flags are the VMM's as much as ours.
#[test]
fn a_call_descriptor_that_is_made_to_block_holds_up_no_stop() {
    let mut disk = Disk::attach(&[]);
    let mut session = disk.open();
    let full = EventFd::new(EFD_NONBLOCK).unwrap();
    full.write(u64::MAX - 1).unwrap();
    assert!(!ask(session.raw(), Req::SET_VRING_CALL, &words(&[0]), &[full.as_raw_fd()]).is_refused());
    // SAFETY: `full` is open; the call changes flags alone.
    let cleared = unsafe { nix::libc::fcntl(full.as_raw_fd(), nix::libc::F_SETFL, nix::libc::O_RDWR) };
    assert_eq!(cleared, 0);
    let ring = &mut session.rings[0];
    ring.want_call(true);
    Request::read(0, 4096).submit(ring).unwrap();
    ring.kick();
    session.enable(false).expect("the drain is answered");
    drop(session);
    disk.assert_whole();
}

#[test]
fn one_event_for_everything_works() {
    let mut disk = Disk::attach(&[]);
    let session = disk.open();
    let kick = [session.rings[0].kick_fd.as_raw_fd()];
    for request in [Req::SET_VRING_CALL, Req::SET_VRING_ERR] {
        let _ = ask(session.raw(), request, &words(&[0]), &kick);
    }
    // The device now kicks itself with every completion. It may, as long as it lives.
    let mut session = session;
    let ring = &mut session.rings[0];
    for _ in 0..10 {
        let pending = Request::read(0, 4096).submit(ring).unwrap();
        ring.kick();
        let used = ring.poll_used().unwrap();
        assert_eq!(pending.finish(ring, used).unwrap().status, OK);
    }
    drop(session);
    disk.assert_whole();
}
