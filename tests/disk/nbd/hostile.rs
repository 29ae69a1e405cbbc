//! Servers that do not keep to the protocol, or are none.

use super::fake::{Fake, READ, Request as Asked, WRITE, chunk, data, simple};
use super::server::{attach, rig};
use crate::common::attach::read;
use crate::common::frontend::Request;
use crate::common::frontend::block::{IOERR, OK};
use crate::common::patience::wait_for;
use crate::common::store::Store;
use crate::devices::rig::{MIB, refuse};
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

const SIZE: usize = 8 << 20;

type Lie = fn(&Asked) -> Vec<u8>;

/// Lies in answer to a read.
const OF_READS: &[(&str, Lie)] = &[
    ("noise", |_| vec![0x5a; 64]),
    ("another request's", |asked| data(asked.cookie ^ (1 << 40), asked.offset, &[7; 4096])),
    ("bytes before what was asked for", |asked| data(asked.cookie, asked.offset - 512, &[7; 4096])),
    ("more bytes", |asked| data(asked.cookie, asked.offset, &vec![7; asked.len as usize + 1])),
    ("fewer bytes", |asked| data(asked.cookie, asked.offset, &[7; 512])),
    ("a length of 4 GiB", |asked| {
        let mut bytes = data(asked.cookie, asked.offset, &[7; 512]);
        bytes[16..20].copy_from_slice(&u32::MAX.to_be_bytes());
        bytes
    }),
    ("pieces that do not touch", |asked| {
        let piece =
            |at: u64| chunk(0, 1, asked.cookie, &[&(asked.offset + at).to_be_bytes()[..], &[7]].concat());
        (0..1000).flat_map(|n| piece(2 * n)).collect()
    }),
    ("a map", |asked| chunk(1, 5, asked.cookie, &[0; 12])),
    ("the same bytes twice", |asked| {
        let whole = [&asked.offset.to_be_bytes()[..], &vec![7; asked.len as usize]].concat();
        [chunk(0, 1, asked.cookie, &whole), chunk(1, 1, asked.cookie, &whole)].concat()
    }),
];

/// Lies in answer to a write.
const OF_WRITES: &[(&str, Lie)] = &[
    ("an answer twice", |asked| [simple(0, asked.cookie), simple(0, asked.cookie)].concat()),
    ("bytes", |asked| data(asked.cookie, asked.offset, &[7; 512])),
];

#[test]
fn a_server_that_lies_fails_the_requests_that_it_lied_about_and_no_more() {
    let fake = Fake::zeros(10 << 20, true);
    let rig = rig(&fake.address(), &[]);
    let (host, mut guest) = rig.attach("t", 512, vec![0; SIZE]);
    guest.work();
    for (kind, lies) in [(READ, OF_READS), (WRITE, OF_WRITES)] {
        for (what, lie) in lies {
            let (lie, mut is_first) = (*lie, true);
            fake.lies(move |asked| (asked.kind == kind && std::mem::take(&mut is_first)).then(|| lie(asked)));
            let ring = &mut guest.session.rings[0];
            let request = match kind {
                READ => Request::read(64, 8192),
                _ => Request::write(64, &[3; 8192]),
            };
            let status = request.run(ring).unwrap().status;
            // The first of two answers may have come alone.
            assert!(status == IOERR || (kind == WRITE && status == OK), "{what}: {status}");
            fake.is_honest();
            wait_for("the server is used again", || match Request::read(0, 4096).run(ring).unwrap().status {
                OK => Ok(()),
                status => Err(status),
            });
            // What failed may be there or not.
            let found = read(ring, 64, 8192);
            guest.data[64 * 512..64 * 512 + 8192].copy_from_slice(&found);
            guest.look();
        }
    }
    host.says("does not keep to the protocol");
    guest.work();
    guest.leave();
    host.end();
}

#[test]
fn a_server_that_accepts_and_closes_does_not_keep_requests_waiting_for_ever() {
    let fake = Fake::zeros(10 << 20, true);
    let rig = rig(&fake.address(), &[]);
    let (host, mut guest) = attach(&rig, 512, vec![0; SIZE], &["--nbd-reconnect", "1"]);
    guest.work();
    // The header can be read, each time.
    fake.lies(|asked| (asked.kind == READ && asked.offset >= MIB).then(Vec::new));
    let ring = &mut guest.session.rings[0];
    assert_eq!(Request::read(0, 4096).run(ring).unwrap().status, IOERR);
    host.says("requests fail until the server is back");
    fake.is_honest();
    wait_for("the server is used again", || match Request::read(0, 4096).run(ring).unwrap().status {
        OK => Ok(()),
        status => Err(status),
    });
    guest.look();
    guest.leave();
    host.end();
}

/// What a process, or a thread, says of itself.
fn says(folder: &Path, name: &str) -> Option<String> {
    let status = std::fs::read_to_string(folder.join("status")).ok()?;
    Some(status.lines().find_map(|line| line.strip_prefix(name))?.trim_start_matches(':').trim().to_owned())
}

#[test]
fn who_speaks_to_the_server_is_confined_before_and_after_it_was_gone() {
    let fake = Fake::zeros(10 << 20, true);
    let rig = rig(&fake.address(), &[]);
    let (host, mut guest) = rig.attach("t", 512, vec![0; SIZE]);
    for _ in 0..2 {
        guest.work();
        let children = std::fs::read_to_string(host.proc(&format!("task/{}/children", host.pid()))).unwrap();
        let children = children.split_whitespace().map(|pid| Path::new("/proc").join(pid));
        let diallers: Vec<_> = children
            .filter(|child| std::fs::read_to_string(child.join("cmdline")).unwrap().contains("dial-nbd"))
            .collect();
        assert_eq!(diallers.len(), 1);
        let threads = std::fs::read_dir(host.proc("task")).unwrap().map(|thread| thread.unwrap().path());
        let threads: Vec<_> = threads.collect();
        let is_nbd = |thread: &PathBuf| std::fs::read_to_string(thread.join("comm")).unwrap() == "nbd\n";
        assert_eq!(threads.iter().filter(|thread| is_nbd(thread)).count(), 1);
        for who in diallers.iter().chain(&threads) {
            for (name, expected) in [("Seccomp", "2"), ("NoNewPrivs", "1"), ("CapEff", "0000000000000000")] {
                assert_eq!(says(who, name).as_deref(), Some(expected), "{name} of {}", who.display());
            }
        }
        fake.crash();
        fake.start();
    }
    guest.look();
    guest.leave();
    host.end();
}

#[test]
fn what_is_no_server_is_refused_in_time() {
    let store = Store::new();
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("nbd.sock");
    let create = ["volume", "create", "--nbd", &format!("unix:{}", socket.display())];
    let long = [&b"NBDMAGICIHAVEOPT\0\x03"[..], &0x0003_e889_0455_65a9u64.to_be_bytes(), &8u32.to_be_bytes()];
    let long = [&long.concat()[..], &1u32.to_be_bytes(), &u32::MAX.to_be_bytes()].concat();
    for (says, words) in [
        (&b"HTTP/1.1 400 Bad Request\r\n\r\n"[..], "it is no NBD server"),
        (b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53\0\0\0\0\0\0\0\0", "the old form of NBD"),
        (b"NBDMAGICIHAVEOPT\0\0", "fixed newstyle"),
        (b"", "closed the connection"),
        (b"NBDMAGIC", "closed the connection"),
        (&long, "a reply is too long"),
    ] {
        let listener = UnixListener::bind(&socket).unwrap();
        let answers = std::thread::spawn({
            let says = says.to_vec();
            move || {
                let (mut client, _) = listener.accept().unwrap();
                let _ = client.write_all(&says);
                let _ = client.shutdown(std::net::Shutdown::Write);
                let _ = client.read_to_end(&mut Vec::new());
            }
        });
        let output = store.run(&create);
        let said = crate::common::store::said(&output);
        assert!(!output.status.success() && said.contains(words), "{words}: {said}");
        answers.join().unwrap();
        std::fs::remove_file(&socket).unwrap();
    }
    // One that listens, and says nothing.
    let _listener = UnixListener::bind(&socket).unwrap();
    let said = refuse(&store, 1, &create);
    assert!(said.contains("does not answer"), "{said}");
}
