//! A front-end that means harm, or a VMM that is broken, against the real process. Whatever it sends: its own
//! connection may fail, the process lives, nothing of it stays behind, and the next front-end finds all data.

use crate::common::disk::Disk;
use crate::common::frontend::RawSocket;
use crate::common::frontend::hostile::{
    Answer, agreed, ask, config, memory_region, memory_table, ring_addresses, state, words,
};
use crate::common::frontend::memory::{Seals, memfd};
use crate::common::frontend::raw::{NEED_REPLY, REPLY, VERSION, message};
use crate::common::patience::limit;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use vhost::vhost_user::message::FrontendReq as Req;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const MEM: u64 = 1 << 20;

/// Every request number of the protocol, and some that are none.
fn requests() -> impl Iterator<Item = u32> {
    (0..50).chain([0x100, 0x7fff_ffff, u32::MAX])
}

/// Messages of a right shape, to be spoilt: name, bytes, whether a memory file goes with them.
fn proper_messages() -> Vec<(Req, Vec<u8>, bool)> {
    vec![
        (Req::GET_FEATURES, vec![], false),
        (Req::SET_FEATURES, words(&[1 << 30]), false),
        (Req::SET_MEM_TABLE, memory_table(1, &[[0, MEM, 0, 0]]), true),
        (Req::ADD_MEM_REG, memory_region([MEM, MEM, MEM, 0]), true),
        (Req::SET_VRING_NUM, state(0, 64), false),
        (Req::SET_VRING_ADDR, ring_addresses(0, 0, 0x4000, 0x2000), false),
        (Req::GET_VRING_BASE, state(0, 0), false),
        (Req::SET_VRING_ENABLE, state(0, 1), false),
        (Req::GET_CONFIG, config(0, 60, &[0; 60]), false),
        (Req::SET_CONFIG, config(32, 1, &[1]), false),
    ]
}

#[test]
fn messages_cut_off_at_every_byte() {
    let mut disk = Disk::attach(&[]);
    let before = disk.idle();
    let memory = memfd(MEM, Seals::Sealable).unwrap();
    for (request, body, with_memory) in proper_messages() {
        let bytes = message(request as u32, VERSION, &body);
        let fds: &[RawFd] = if with_memory { &[memory.as_raw_fd()] } else { &[] };
        for len in 1..bytes.len() {
            let raw = RawSocket::connect(disk.socket()).unwrap();
            raw.send(&bytes[..len], fds).unwrap();
            raw.socket().unwrap().shutdown(Shutdown::Write).unwrap();
            assert!(raw.closes(limit()).unwrap(), "{request:?} cut off after {len} bytes");
        }
    }
    disk.assert_nothing_stays(&before);
}

#[test]
fn messages_that_come_in_pieces_are_put_together() {
    let disk = Disk::attach(&[]);
    let memory = memfd(MEM, Seals::Sealable).unwrap();
    for step in [1, 5, 12, 19] {
        let raw = agreed(disk.socket()).unwrap();
        for (request, body, with_memory) in proper_messages() {
            let bytes = message(request as u32, VERSION | NEED_REPLY, &body);
            for (n, piece) in bytes.chunks(step).enumerate() {
                let fds: &[RawFd] = if with_memory && n == 0 { &[memory.as_raw_fd()] } else { &[] };
                raw.send(piece, fds).unwrap();
            }
            let reply = raw.reply().unwrap_or_else(|e| panic!("{request:?} in pieces of {step}: {e}"));
            assert_eq!((reply.request, reply.flags & REPLY), (request as u32, REPLY));
        }
    }
}

#[test]
fn messages_with_an_impossible_header() {
    let mut disk = Disk::attach(&[]);
    let before = disk.idle();
    let header = |words: [u32; 3]| words.map(u32::to_le_bytes).concat();
    let mut wrong = Vec::new();
    for size in [1, 4096, 4097, 1 << 16, 1 << 20, 1 << 31, u32::MAX] {
        wrong.push(header([Req::GET_FEATURES as u32, VERSION, size]));
        wrong.push(header([Req::SET_MEM_TABLE as u32, VERSION, size]));
    }
    for flags in [0, 2, 3, VERSION | REPLY, VERSION | 0x10, VERSION | 0xffff_fff0, u32::MAX] {
        wrong.push(header([Req::GET_FEATURES as u32, flags, 0]));
    }
    wrong.extend(requests().filter(|r| !(1..=44).contains(r)).map(|r| header([r, VERSION, 0])));
    for bytes in wrong {
        let raw = RawSocket::connect(disk.socket()).unwrap();
        raw.send(&bytes, &[]).unwrap();
        // More than any message has, for those that wait for a body. The back-end may be gone by now.
        let _ = raw.send(&[0; 8192], &[]);
        let _ = raw.socket().unwrap().shutdown(Shutdown::Write);
        assert!(raw.closes(limit()).unwrap(), "{bytes:x?}");
    }
    disk.assert_nothing_stays(&before);
}

#[test]
fn every_request_with_every_wrong_body() {
    let mut disk = Disk::attach(&[]);
    let before = disk.idle();
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    for request in requests() {
        for len in [0, 1, 7, 8, 9, 12, 13, 40, 48, 300, 4084] {
            for fill in [0, 0xff] {
                for fds in [&[][..], &[event.as_raw_fd(); 2]] {
                    let raw = agreed(disk.socket()).unwrap();
                    let _ = raw.message(request, VERSION | NEED_REPLY, &vec![fill; len], fds);
                    let _ = raw.socket().unwrap().shutdown(Shutdown::Write);
                    assert!(raw.closes(limit()).unwrap(), "request {request}, {len} bytes of {fill}");
                }
            }
        }
    }
    disk.assert_nothing_stays(&before);
}

#[test]
fn descriptors_where_none_belong_do_not_leak() {
    let mut disk = Disk::attach(&[]);
    let before = disk.idle();
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    let memory = memfd(MEM, Seals::Sealable).unwrap();
    for count in [1, 2, 3, 8, 31, 32, 33, 64, 253] {
        for (request, body, with_memory) in proper_messages() {
            let fd = if with_memory { memory.as_raw_fd() } else { event.as_raw_fd() };
            if with_memory && count == 1 {
                continue;
            }
            let raw = agreed(disk.socket()).unwrap();
            let answer = ask(&raw, request, &body, &vec![fd; count]);
            assert!(!with_memory || answer.is_refused(), "{request:?} with {count} descriptors");
        }
        for request in [Req::SET_VRING_KICK, Req::SET_VRING_CALL, Req::SET_VRING_ERR] {
            let raw = agreed(disk.socket()).unwrap();
            let answer = ask(&raw, request, &words(&[0]), &vec![event.as_raw_fd(); count]);
            assert_eq!(answer.is_refused(), count > 1, "{request:?} with {count} descriptors");
        }
    }
    disk.assert_nothing_stays(&before);
}

#[test]
fn features_that_were_not_offered() {
    let mut disk = Disk::attach(&[]);
    for request in [Req::SET_FEATURES, Req::SET_PROTOCOL_FEATURES] {
        let raw = agreed(disk.socket()).unwrap();
        assert!(ask(&raw, request, &words(&[u64::MAX]), &[]).is_refused());
    }
    // Packed rings, and what the back-end would have to do nothing for.
    for bit in [34, 40, 60, 63] {
        let raw = agreed(disk.socket()).unwrap();
        assert!(ask(&raw, Req::SET_FEATURES, &words(&[1 << bit]), &[]).is_refused(), "bit {bit}");
    }
    disk.assert_whole();
}

#[test]
fn configuration_beyond_its_end() {
    let mut disk = Disk::attach(&[]);
    for (offset, size, payload) in [
        (0, 0, 0),
        (4096, 1, 1),
        (4090, 60, 60),
        (u32::MAX, 1, 1),
        (u32::MAX - 3, 8, 8),
        (0, 60, 0),
        (0, 8, 60),
    ] {
        let raw = agreed(disk.socket()).unwrap();
        let body = config(offset, size, &vec![0; payload]);
        match ask(&raw, Req::GET_CONFIG, &body, &[]) {
            Answer::Refused => {}
            // The protocol's way to say no is an answer without a payload.
            Answer::Taken(reply) => assert!(reply.body.len() <= 12, "{size} bytes at {offset}: {reply:x?}"),
        }
        let raw = agreed(disk.socket()).unwrap();
        assert!(ask(&raw, Req::SET_CONFIG, &body, &[]).is_refused());
    }
    disk.assert_whole();
}

#[test]
fn messages_in_an_order_that_makes_no_sense() {
    let mut disk = Disk::attach(&[]);
    let before = disk.idle();
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    event.write(1).unwrap();
    let kick = [event.as_raw_fd()];
    type Step<'a> = (Req, Vec<u8>, &'a [RawFd]);
    let enable = || (Req::SET_VRING_ENABLE, state(0, 1), &[][..]);
    let orders: Vec<Vec<Step>> = vec![
        vec![enable()],
        vec![(Req::SET_VRING_KICK, words(&[0]), &kick), enable()],
        vec![(Req::SET_VRING_NUM, state(0, 8), &[]), (Req::SET_VRING_KICK, words(&[0]), &kick), enable()],
        vec![(Req::SET_VRING_ADDR, ring_addresses(0, 0x1000, 0x2000, 0x3000), &[]), enable()],
        vec![(Req::GET_VRING_BASE, state(0, 0), &[]), enable(), (Req::GET_VRING_BASE, state(0, 0), &[])],
        vec![(Req::RESET_DEVICE, vec![], &[]), (Req::RESET_DEVICE, vec![], &[]), enable()],
        vec![(Req::SET_OWNER, vec![], &[]), (Req::SET_OWNER, vec![], &[])],
        vec![(Req::RESET_OWNER, vec![], &[]), enable()],
        vec![(Req::SET_FEATURES, words(&[0]), &[]), (Req::SET_FEATURES, words(&[1 << 30]), &[]), enable()],
        vec![(Req::SET_PROTOCOL_FEATURES, words(&[8]), &[]), (Req::GET_QUEUE_NUM, vec![], &[]), enable()],
    ];
    for steps in &orders {
        let raw = agreed(disk.socket()).unwrap();
        for (request, body, fds) in steps {
            if ask(&raw, *request, body, fds).is_refused() {
                break;
            }
        }
    }
    disk.assert_nothing_stays(&before);
}
