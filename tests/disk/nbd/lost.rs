//! Connections that are lost, servers that lose what they had in memory, and servers that fail.

use super::fake::{FLUSH, Fake, Request as Asked, simple};
use super::server::{Exported, Server, attach, content, rig};
use crate::common::attach::{flush, read, write};
use crate::common::disk::pattern;
use crate::common::frontend::Request;
use crate::common::frontend::block::{IOERR, OK};
use crate::common::patience::wait_for;
use crate::devices::rig::MIB;
use std::os::unix::fs::MetadataExt;

const SIZE: usize = 8 << 20;

#[test]
fn a_server_that_is_killed_under_load_and_comes_back_is_only_a_pause() {
    let exported = Exported::zeros(10 * MIB);
    let mut server = Some(exported.by_nbdkit(&[], &[]));
    let rig = rig(&exported.address(), &[]);
    let (host, mut guest) = rig.attach("t", 512, vec![0; SIZE]);
    let mut killed = 0;
    std::thread::scope(|scope| {
        let works = scope.spawn(|| guest.work());
        let written = || exported.file().metadata().map(|it| (it.ctime(), it.ctime_nsec())).unwrap();
        while !works.is_finished() {
            let before = written();
            wait_for("the guest writes, or is done", || match works.is_finished() || written() != before {
                true => Ok(()),
                false => Err("neither"),
            });
            server.take().into_iter().for_each(Server::crash);
            server = Some(exported.by_nbdkit(&[], &[]));
            killed += 1;
        }
    });
    assert!(killed > 3, "{killed} times");
    let data = guest.leave();
    host.end();
    assert!(content(&rig, "volume", "t") == data);
}

#[test]
fn what_was_not_durable_is_written_again_in_its_order() {
    let fake = Fake::zeros(10 << 20, true);
    let rig = rig(&fake.address(), &[]);
    let (host, mut guest) = rig.attach("t", 512, vec![0; SIZE]);
    guest.work();
    for n in 0..3 {
        // Of these, the server has nothing but what it has in memory.
        for seed in 1..=3 {
            let bytes = pattern(10 * n + seed, 8192);
            write(&mut guest.session.rings[0], 64, &bytes);
            guest.data[64 * 512..64 * 512 + 8192].copy_from_slice(&bytes);
        }
        let before = fake.durable();
        fake.crash();
        assert!(fake.durable() == before);
        fake.start();
        guest.look();
        guest.work();
    }
    // Now everything is durable, and nobody was told of a loss.
    flush(&mut guest.session.rings[0]);
    let durable = fake.durable();
    fake.crash();
    assert!(fake.durable() == durable);
    fake.start();
    guest.look();
    let data = guest.leave();
    host.end();
    fake.crash();
    fake.start();
    assert!(content(&rig, "volume", "t") == data);
}

#[test]
fn what_is_not_flushed_for_long_is_flushed_before_too_much_is_kept() {
    let fake = Fake::zeros(10 << 20, false);
    let rig = rig(&fake.address(), &[]);
    let (host, mut guest) = rig.attach("t", 512, vec![0; SIZE]);
    let before = fake.durable();
    // 96 MiB, of which no more than 64 can be kept.
    for n in 0..96 {
        let bytes = pattern(n + 1, 1 << 20);
        write(&mut guest.session.rings[0], n % 8 * 2048, &bytes);
        guest.data[(n % 8) as usize * MIB as usize..][..1 << 20].copy_from_slice(&bytes);
    }
    assert!(fake.durable() != before, "the guest has not flushed");
    fake.crash();
    fake.start();
    guest.look();
    guest.leave();
    host.end();
}

#[test]
fn writes_that_wait_for_a_server_are_done_when_it_is_there() {
    let exported = Exported::zeros(10 * MIB);
    let server = exported.by_nbdkit(&[], &[]);
    let rig = rig(&exported.address(), &[]);
    let (host, mut guest) = rig.attach("t", 512, vec![0; SIZE]);
    guest.work();
    server.crash();
    let mut _server = None;
    guest.writes_survive(1, || _server = Some(exported.by_nbdkit(&[], &[])));
    let data = guest.leave();
    host.end();
    assert!(content(&rig, "volume", "t") == data);
}

#[test]
fn requests_fail_when_the_server_stays_away_and_go_on_when_it_is_back() {
    let exported = Exported::zeros(10 * MIB);
    let server = exported.by_nbdkit(&[], &[]);
    let rig = rig(&exported.address(), &[]);
    let (host, mut guest) = attach(&rig, 512, vec![0; SIZE], &["--nbd-reconnect", "1"]);
    guest.work();
    server.crash();
    let ring = &mut guest.session.rings[0];
    assert_eq!(Request::read(0, 4096).run(ring).unwrap().status, IOERR);
    assert_eq!(Request::write(0, &[1; 4096]).run(ring).unwrap().status, IOERR);
    host.says("requests fail until the server is back");
    let _server = exported.by_nbdkit(&[], &[]);
    wait_for("the server is used again", || match Request::read(0, 4096).run(ring).unwrap().status {
        OK => Ok(()),
        status => Err(status),
    });
    // What failed may be there or not.
    let found = read(ring, 0, 4096);
    guest.data[..4096].copy_from_slice(&found);
    guest.look();
    guest.work();
    let data = guest.leave();
    host.end();
    assert!(content(&rig, "volume", "t") == data);
}

#[test]
fn another_export_that_comes_back_is_not_used() {
    let (exported, other) = (Exported::zeros(10 * MIB), Exported::zeros(10 * MIB));
    let server = exported.by_nbdkit(&[], &[]);
    let rig = rig(&exported.address(), &[]);
    let (host, mut guest) = attach(&rig, 512, vec![0; SIZE], &["--nbd-reconnect", "1"]);
    guest.work();
    flush(&mut guest.session.rings[0]);
    let right = exported.content();
    server.crash();
    // Another disk has got the name.
    std::fs::rename(exported.path(), other.path()).unwrap();
    exported.file().set_len(10 * MIB).unwrap();
    let server = exported.by_nbdkit(&[], &[]);
    let ring = &mut guest.session.rings[0];
    assert_eq!(Request::read(0, 4096).run(ring).unwrap().status, IOERR);
    assert_eq!(Request::write(0, &[1; 4096]).run(ring).unwrap().status, IOERR);
    host.says("has no header of sealblk's");
    assert!(exported.content() == vec![0; 10 << 20], "nothing is written there");
    server.crash();
    // A shorter one.
    std::fs::rename(other.path(), exported.path()).unwrap();
    exported.file().set_len(9 * MIB).unwrap();
    let server = exported.by_nbdkit(&[], &[]);
    assert_eq!(Request::read(0, 4096).run(ring).unwrap().status, IOERR);
    server.crash();
    exported.file().set_len(10 * MIB).unwrap();
    exported.overwrite(9 * MIB, &right[9 << 20..]);
    let _server = exported.by_nbdkit(&[], &[]);
    wait_for("the server is used again", || match Request::read(0, 4096).run(ring).unwrap().status {
        OK => Ok(()),
        status => Err(status),
    });
    guest.look();
    guest.leave();
    host.end();
}

#[test]
fn a_full_server_fails_writes_until_it_has_space() {
    let exported = Exported::zeros(10 * MIB);
    let full = exported.path().with_file_name("full");
    let file = format!("error-pwrite-file={}", full.display());
    let arguments = ["error-pwrite=ENOSPC", "error-pwrite-rate=100%", &file];
    let _server = exported.by_nbdkit(&["error"], &arguments);
    let rig = rig(&exported.address(), &[]);
    let (host, mut guest) = rig.attach("t", 512, vec![0; SIZE]);
    guest.work();
    std::fs::write(&full, "").unwrap();
    let ring = &mut guest.session.rings[0];
    assert_eq!(Request::write(0, &[1; 4096]).run(ring).unwrap().status, IOERR);
    host.says("error 28");
    guest.look();
    std::fs::remove_file(&full).unwrap();
    guest.work();
    let data = guest.leave();
    host.end();
    assert!(content(&rig, "volume", "t") == data);
}

#[test]
fn after_a_flush_that_failed_none_succeeds_until_the_volume_is_attached_again() {
    let fake = Fake::zeros(10 << 20, true);
    let rig = rig(&fake.address(), &[]);
    let (host, mut guest) = rig.attach("t", 512, vec![0; SIZE]);
    guest.work();
    // EIO, once.
    let mut is_first = true;
    fake.lies(move |asked: &Asked| {
        let fails = asked.kind == FLUSH && std::mem::take(&mut is_first);
        fails.then(|| simple(5, asked.cookie))
    });
    for _ in 0..2 {
        assert_eq!(Request::flush().run(&mut guest.session.rings[0]).unwrap().status, IOERR);
    }
    guest.look();
    let data = std::mem::take(&mut guest.data);
    drop(guest);
    host.crash();
    let (host, mut guest) = rig.attach("t", 512, data);
    guest.look();
    guest.leave();
    host.end();
}
