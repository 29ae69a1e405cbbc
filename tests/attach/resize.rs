//! A volume is made larger while it is attached: the VMM is told, the configuration shows it, the new sectors
//! are there, and whatever comes in between, nothing of what was written is lost.

use crate::common::attach::{Host, Place, flush, open, read, write};
use crate::common::disk::assert_carries;
use crate::common::frontend::block::{IOERR, OK};
use crate::common::frontend::load::{Load, settle};
use crate::common::frontend::ring::readable;
use crate::common::frontend::{Options, Request, Session};
use crate::common::patience::limit;
use crate::common::store::{Store, said};
use serde_json::Value;
use std::io::{Read, Write};
use std::path::Path;
use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;

/// The volume's size at first, and then.
const SMALL: u64 = 8 << 20;
const LARGE: u64 = 24 << 20;
/// The volumes that there are: on a disk's file system and on one of memory, encrypted and not,
/// of both kinds of sectors.
const VOLUMES: [&[&str]; 3] = [&[], &["--sector-size", "4096"], &["--unencrypted"]];

/// Makes the volume larger, and returns what the command said.
fn grow(store: &Store, size: u64) -> Value {
    let said = store.ok(&["volume", "resize", "t", &size.to_string(), "--json"]);
    serde_json::from_str(&said).unwrap()
}

fn on_memory() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

/// A volume whose layers lie in memory as long as the folder is there.
fn place_on_memory(folder: &Path, arguments: &[&str]) -> Place {
    Place::with_root(|root| std::os::unix::fs::symlink(folder, root), arguments)
}

fn session(place: &Place, more: Protocol, less: Protocol) -> Session {
    let usual = Options::default();
    let protocol = (usual.protocol | more) & !less;
    Session::open(&place.socket(), &Options { protocol, ..usual }).unwrap()
}

fn status(session: &mut Session, sector: u64) -> u8 {
    Request::read(sector, 4096).run(&mut session.rings[0]).unwrap().status
}

#[test]
fn the_vmm_is_told_and_the_new_sectors_are_there() {
    for (acks, without) in [(true, Protocol::empty()), (false, Protocol::REPLY_ACK)] {
        let place = Place::new(&[]);
        let host = place.attach(&[]);
        let mut session = session(&place, Protocol::BACKEND_REQ, without);
        assert_eq!(
            (status(&mut session, SMALL / 512), session.config().unwrap().capacity),
            (IOERR, SMALL / 512)
        );
        let said = std::thread::scope(|scope| {
            let growing = scope.spawn(|| grow(&place.store, LARGE));
            let mut channel = session.backend_channel().unwrap();
            assert!(readable(channel, limit()).unwrap());
            let mut message = [0; 12];
            channel.read_exact(&mut message).unwrap();
            assert_eq!(message, *[2, if acks { 9 } else { 1 }, 0].map(u32::to_le_bytes).as_flattened());
            // It looks before it answers, as QEMU does.
            assert_eq!(session.config().unwrap().capacity, LARGE / 512);
            if acks {
                let ack = [[2, 5, 8].map(u32::to_le_bytes).as_flattened(), &[0; 8]].concat();
                channel.write_all(&ack).unwrap();
            }
            growing.join().unwrap()
        });
        assert_eq!(
            (&said["vmm"], &said["size"]),
            (&(if acks { "confirmed" } else { "sent" }).into(), &LARGE.into())
        );
        assert_carries(&mut session.rings[0], SMALL / 512, 65536);
        assert_carries(&mut session.rings[0], LARGE / 512 - 8, 4096);
        assert_eq!(status(&mut session, LARGE / 512), IOERR);
        drop(session);
        host.end();
    }
}

#[test]
fn a_vmm_without_a_channel_sees_it_when_it_looks() {
    let place = Place::new(&[]);
    let host = place.attach(&[]);
    assert_eq!(grow(&place.store, SMALL + 4096)["vmm"], "nobody");
    let mut without = session(&place, Protocol::empty(), Protocol::empty());
    assert_eq!(without.config().unwrap().capacity, SMALL / 512 + 8);
    assert_eq!(grow(&place.store, LARGE)["vmm"], "nobody");
    assert_eq!(without.config().unwrap().capacity, LARGE / 512);
    assert_carries(&mut without.rings[0], SMALL / 512, 4096);
    drop(without);
    let with = session(&place, Protocol::BACKEND_REQ, Protocol::empty());
    assert_eq!(with.config().unwrap().capacity, LARGE / 512);
    // The channel goes with its VMM.
    drop(with);
    let next = session(&place, Protocol::empty(), Protocol::empty());
    assert_eq!(grow(&place.store, LARGE + 4096)["vmm"], "nobody");
    drop(next);
    host.end();
}

#[test]
fn a_vmm_that_never_answers_holds_up_neither_the_disk_nor_the_command() {
    let place = Place::new(&[]);
    let host = place.attach(&[]);
    let mut session = session(&place, Protocol::BACKEND_REQ, Protocol::empty());
    std::thread::scope(|scope| {
        let growing = scope.spawn(|| grow(&place.store, LARGE));
        assert!(readable(session.backend_channel().unwrap(), limit()).unwrap());
        assert_carries(&mut session.rings[0], SMALL / 512, 4096);
        assert_eq!(growing.join().unwrap()["vmm"], "sent");
    });
    drop(session);
    host.end();
}

/// What was written before is there, what is beyond is zeros, and both can be written; also after a crash.
fn grows_whole(place: &Place) {
    let pattern: Vec<u8> = (0..65536u32).map(|i| (i % 251) as u8).collect();
    let mut host = place.attach(&["--queues", "2"]);
    let mut guest = open(&place.socket());
    write(&mut guest.rings[0], 0, &pattern);
    write(&mut guest.rings[0], SMALL / 512 - 8, &pattern[..4096]);
    // Of one layer first, then of two.
    for (n, size) in [16 << 20, LARGE].into_iter().enumerate() {
        assert_eq!(grow(&place.store, size)["size"], size);
        assert_eq!(read(&mut guest.rings[0], 0, 65536), pattern);
        assert_eq!(read(&mut guest.rings[0], SMALL / 512 - 8, 4096), pattern[..4096]);
        let last = size / 512 - 128;
        assert_eq!(read(&mut guest.rings[0], last, 65536), vec![0; 65536]);
        write(&mut guest.rings[0], last, &pattern);
        flush(&mut guest.rings[0]);
        host.crash();
        host = place.attach(&[]);
        guest = open(&place.socket());
        assert_eq!(guest.config().unwrap().capacity, size / 512);
        assert_eq!(read(&mut guest.rings[0], last, 65536), pattern);
        if n == 0 {
            place.store.ok(&["snapshot", "create", "t", "--name", "small"]);
        }
    }
    // The snapshot has the size that the volume had.
    place.store.ok(&["volume", "create", "--snapshot", "small", "--name", "clone"]);
    let shown: Value = serde_json::from_str(&place.store.ok(&["volume", "show", "clone", "--json"])).unwrap();
    assert_eq!(shown["size"], 16 << 20);
    drop(guest);
    host.end();
}

#[test]
fn what_was_there_stays_and_what_is_new_lasts() {
    for arguments in VOLUMES {
        grows_whole(&Place::new(arguments));
        let memory = on_memory();
        grows_whole(&place_on_memory(memory.path(), arguments));
    }
}

#[test]
fn under_load_nothing_goes_wrong() {
    let memory = on_memory();
    for place in [Place::new(&[]), place_on_memory(memory.path(), &[])] {
        let host = place.attach(&["--queues", "2"]);
        let usual = Options::default();
        let mut guest = Session::open(&place.socket(), &Options { queues: 2, ..usual }).unwrap();
        let mut loads = [0, 1].map(|n| Load::new(n, 2048 * n..2048 * (n + 1), true));
        // Some of it lies in a snapshot soon.
        loads.iter_mut().for_each(|load| load.discards_may_keep = true);
        for step in 1..=8 {
            let growing = std::thread::scope(|scope| {
                let growing = scope.spawn(|| grow(&place.store, SMALL + (step << 20)));
                while !growing.is_finished() {
                    for (load, ring) in loads.iter_mut().zip(&mut guest.rings) {
                        while load.submit(ring).unwrap() {}
                        ring.kick_if_wanted();
                        while load.take(ring).unwrap() {}
                    }
                }
                growing.join().unwrap()
            });
            assert_eq!(growing["size"], SMALL + (step << 20));
            if step % 4 == 0 {
                place.store.ok(&["snapshot", "create", "t"]);
            }
        }
        settle(&mut loads, &mut guest.rings).unwrap();
        for (load, ring) in loads.iter_mut().zip(&mut guest.rings) {
            load.verify(ring).unwrap();
        }
        drop(guest);
        host.end();
    }
}

#[test]
fn what_makes_no_sense_is_refused_and_changes_nothing() {
    let place = Place::new(&[]);
    let refused = |code: i32, size: &str, words: &str| {
        let output = place.store.run(&["volume", "resize", "t", size]);
        let found = said(&output);
        assert_eq!(output.status.code(), Some(code), "{found}");
        assert!(found.contains(words), "{found}");
    };
    let host = place.attach(&[]);
    refused(2, "4MiB", "cannot be made smaller");
    refused(2, "8388609B", "512");
    host.end();
    let host: Host = place.attach(&["--read-only"]);
    refused(4, "16MiB", "read-only");
    let mut session = open(&place.socket());
    assert_eq!(session.config().unwrap().capacity, SMALL / 512);
    assert_eq!(Request::read(0, 4096).run(&mut session.rings[0]).unwrap().status, OK);
    drop(session);
    host.end();
    assert_eq!(std::fs::metadata(place.layer()).unwrap().len(), SMALL);
}
