//! Attaching where the machine withholds something.

use crate::common::attach::{Host, Place, flush, open, read, write};
use crate::common::disk::pattern;
use crate::common::frontend::block::{IOERR, OK};
use crate::common::frontend::hostile::{Answer, agreed, ask, memory_region};
use crate::common::frontend::memory::{Seals, memfd};
use crate::common::frontend::{Fault, Options, RawSocket, Request, Segment, Session};
use crate::common::loop_disk::{Kind, LoopDisk, MemoryDisk};
use crate::common::patience::{limit as patience, wait_for};
use crate::common::process::{forbid_io_uring, limit_resource, refuse_call, set_soft_limit};
use crate::common::store::{Store, said};
use nix::libc;
use nix::sys::resource::Resource;
use nix::sys::statvfs::statvfs;
use serde_json::Value;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use vhost::vhost_user::message::FrontendReq as Req;

#[test]
fn a_machine_that_cannot_serve_refuses_to_attach() {
    let place = Place::new(&[]);
    let mut command = place.attach_command(&[]);
    forbid_io_uring(&mut command);
    let said = place.run(command, vec![]);
    assert_eq!(said.code, 8, "{said:?}");
    assert!(said.err.contains("io_uring"), "{said:?}");
    assert!(!place.socket().exists() && !place.volume_folder().join("control.sock").exists());
    place.attach(&[]).end();
}

#[test]
fn a_vmm_is_served_wherever_temporary_files_go() {
    let place = Place::new(&[]);
    let long = place.folder().join("x".repeat(120));
    fs::create_dir(&long).unwrap();
    for temporary in [long, place.folder().join("nowhere"), "relative".into()] {
        let mut command = place.attach_command(&[]);
        command.env("TMPDIR", &temporary);
        let host = place.start(command, vec![]);
        for n in 0..3 {
            let mut session = open(&place.socket());
            write(&mut session.rings[0], 8 * n, &pattern(n, 4096));
            assert!(read(&mut session.rings[0], 8 * n, 4096) == pattern(n, 4096));
        }
        host.end();
    }
}

fn open_files(host: &Host) -> u64 {
    fs::read_dir(host.proc("fd")).unwrap().count() as u64
}

fn with_queues(place: &Place, queues: usize) -> Result<Session, Fault> {
    Session::open(&place.socket(), &Options { queues, ..Options::default() })
}

/// There is no room for a descriptor at one point or the other of a VMM's session: it ends, and nothing waits
/// for ever.
#[test]
fn a_process_at_its_limit_of_open_files_ends_the_session_and_lives() {
    let place = Place::new(&[]);
    let host = place.attach(&["--queues", "2"]);
    let limit = |files| set_soft_limit(host.pid(), Resource::RLIMIT_NOFILE, files);
    let idle = open_files(&host);
    // What is open has the lowest numbers, or nearly: with less, not even a connection is taken.
    let served = (1..200).find_map(|room| {
        limit(idle + room);
        let session = with_queues(&place, 2);
        let refused = session.as_ref().err().is_none_or(|fault| fault.is_refusal());
        assert!(refused, "with room for {room}: {}: {}", session.err().unwrap(), host.output());
        session.ok().map(|session| (room, session))
    });
    let (room, mut session) = served.expect("it is served where there is room");
    assert!(room > 8, "the limit was never met: {room}");
    assert!(host.output().contains("no room for more descriptors: its limit is"), "{}", host.output());
    // One more region of memory than there is room for.
    let memory = memfd(1 << 20, Seals::Sealable).unwrap();
    let regions = (1..100).find(|n| {
        let region = memory_region([n << 32, 1 << 20, n << 32, 0]);
        ask(session.raw(), Req::ADD_MEM_REG, &region, &[memory.as_raw_fd()]).is_refused()
    });
    assert!(regions.is_some(), "the limit was never met");
    drop(session);
    // Nobody can connect, and the next one waits until somebody can.
    limit(idle - 2);
    let waiting = RawSocket::connect(&place.socket()).unwrap();
    host.says("a VMM cannot be served yet");
    // Nor can a client of the control socket, which waits as well.
    let mut status = place.store.command();
    let status = std::thread::spawn(move || status.args(["volume", "show", "t"]).output().unwrap());
    host.says("a client of the control socket cannot be heard yet");
    limit(u64::MAX);
    let shown = status.join().unwrap();
    assert!(said(&shown).contains("attached"), "{}", said(&shown));
    drop(waiting);
    session = with_queues(&place, 2).unwrap();
    write(&mut session.rings[1], 0, &pattern(1, 4096));
    place.store.ok(&["detach", "t"]);
    host.ends_well();
}

#[test]
fn the_limit_on_open_files_is_raised_or_refused_in_words() {
    let place = Place::new(&[]);
    let limited = |soft, hard| {
        let mut command = place.attach_command(&["--queues", "16"]);
        limit_resource(&mut command, Resource::RLIMIT_NOFILE, soft, hard);
        command
    };
    let said = place.run(limited(82, 82), vec![]);
    assert_eq!(said.code, 8, "{said:?}");
    for word in ["16 queues", "82", "--queues", "LimitNOFILE="] {
        assert!(said.err.contains(word), "{word}: {said:?}");
    }
    assert!(
        place.events().iter().all(|event| event["detail"]["event"] != "attachVolume"),
        "no key was asked for"
    );
    let host = place.start(limited(82, 4096), vec![]);
    let mut session = with_queues(&place, 16).unwrap();
    for ring in &mut session.rings {
        write(ring, 0, &pattern(1, 4096));
    }
    drop(session);
    host.end();
}

/// All the memory that a VMM is promised to be able to share fits.
#[test]
fn a_vmm_is_promised_as_many_memory_regions_as_there_is_room_for() {
    let place = Place::new(&[]);
    let mut command = place.attach_command(&["--queues", "2"]);
    limit_resource(&mut command, Resource::RLIMIT_NOFILE, 512, 512);
    let host = place.start(command, vec![]);
    assert!(host.output().contains("regions of memory"), "{}", host.output());
    let memory = memfd(1 << 20, Seals::Sealable).unwrap();
    let raw = agreed(&place.socket()).unwrap();
    let slots = match ask(&raw, Req::GET_MAX_MEM_SLOTS, &[], &[]) {
        Answer::Taken(reply) => reply.value().unwrap(),
        Answer::Refused => panic!("GET_MAX_MEM_SLOTS was refused"),
    };
    assert!((32..509).contains(&slots), "{slots}");
    drop(raw);
    // Beside all that a session has.
    let mut session = with_queues(&place, 2).unwrap();
    for n in 1..slots {
        let region = memory_region([n << 32, 1 << 20, n << 32, 0]);
        let answer = ask(session.raw(), Req::ADD_MEM_REG, &region, &[memory.as_raw_fd()]);
        assert!(!answer.is_refused(), "{n} of {slots}: {}", host.output());
    }
    for ring in &mut session.rings {
        write(ring, 0, &pattern(1, 4096));
    }
    place.store.ok(&["detach", "t"]);
    host.ends_well();
}

/// "ulimit -f" is an error of the requests that it meets, which do not fill the log either.
#[test]
fn requests_that_fail_by_the_thousand_are_counted_in_the_log() {
    let place = Place::new(&[]);
    let host = place.attach(&[]);
    let mut session = open(&place.socket());
    write(&mut session.rings[0], 0, &pattern(1, 4096));
    set_soft_limit(host.pid(), Resource::RLIMIT_FSIZE, 8192);
    let data = pattern(2, 4096);
    for n in 0..2000 {
        let failed = Request::write(1024 + 8 * n, &data).run(&mut session.rings[0]).unwrap();
        assert_eq!(failed.status, IOERR);
    }
    let sound = Request::write(8, &data).run(&mut session.rings[0]).unwrap();
    assert_eq!(sound.status, OK);
    set_soft_limit(host.pid(), Resource::RLIMIT_FSIZE, u64::MAX);
    // So do VMMs that talk nonsense.
    drop(session);
    for _ in 0..200 {
        let raw = RawSocket::connect(&place.socket()).unwrap();
        raw.send(&[0xff; 64], &[]).unwrap();
        assert!(raw.closes(patience()).unwrap());
    }
    let log = place.folder().join("1.log");
    place.store.ok(&["detach", "t"]);
    host.ends_well();
    let said = fs::read_to_string(log).unwrap();
    let lines = |of: &str| said.lines().filter(|line| line.contains(of)).count();
    for of in ["File too large", "the VMM was disconnected"] {
        assert!((2..=22).contains(&lines(of)), "{} lines of \"{of}\": {said}", lines(of));
    }
    assert!(said.contains("more like it were not written"), "{said}");
}

/// A user may have few instances of inotify, and a volume needs none.
#[test]
fn a_volume_is_attached_where_no_more_inotify_can_be_had() {
    let place = Place::new(&[]);
    let mut command = place.attach_command(&["-v"]);
    refuse_call(&mut command, libc::SYS_inotify_init1, libc::EMFILE);
    let host = place.start(command, vec![]);
    host.says("fs.inotify.max_user_instances");
    write(&mut open(&place.socket()).rings[0], 0, &pattern(1, 4096));
    let vmm = RawSocket::connect(&place.socket()).unwrap();
    // Who waits for the volume is found out all the same.
    let destination = place.folder().join("next.sock");
    let mut command = place.store.command();
    command.args(["attach", "t", "--incoming", "--socket-path"]).arg(&destination);
    let next = place.start(command, vec![]);
    host.says("letting go of it");
    drop(vmm);
    host.ends_well();
    next.end();
}

/// Whoever needs one is told the same, and why.
#[test]
fn what_keeps_a_process_from_having_an_io_uring_is_said_by_all_that_need_one() {
    let place = Place::new(&[]);
    let image = place.folder().join("image");
    fs::write(&image, [1; 8192]).unwrap();
    for (errno, why) in [
        (libc::EPERM, "a filter of system calls forbids it"),
        (libc::ENOSYS, "this kernel has none"),
        (libc::ENOMEM, "there is no memory"),
        (libc::EMFILE, "LimitNOFILE="),
        (libc::ENFILE, "fs.file-max"),
    ] {
        let run = |mut command: Command| {
            refuse_call(&mut command, libc::SYS_io_uring_setup, errno);
            let output = command.output().unwrap();
            let words = said(&output);
            assert_eq!(output.status.code(), Some(8), "{command:?}: {words}");
            assert!(words.contains("io_uring") && words.contains(why), "{command:?}: {words}");
        };
        run(place.attach_command(&[]));
        let with = |arguments: &[&str], file: &str| {
            let mut command = place.store.command();
            command.args(arguments).arg(place.folder().join(file));
            command
        };
        run(with(&["volume", "import", "--name", "i"], "image"));
        run(with(&["volume", "export", "t"], "exported"));
        let mut doctor = place.store.command();
        doctor.arg("doctor");
        run(doctor);
    }
    assert!(!place.folder().join("exported").exists());
}

/// A store on a memory file system of its own, with the volume `t`; `None` where the machine does not let us.
fn on_a_small_disk() -> Option<(MemoryDisk, Place)> {
    let store = Store::new();
    fs::create_dir(store.root()).unwrap();
    let disk = MemoryDisk::mount(32 << 20, &store.root())?;
    fs::set_permissions(store.root(), fs::Permissions::from_mode(0o700)).unwrap();
    Some((disk, Place::of(store, &[])))
}

#[test]
fn a_store_that_cannot_be_written_to_is_said_to_be_one() {
    let Some((disk, place)) = on_a_small_disk() else { return };
    disk.make_read_only();
    for arguments in [&["--read-only"][..], &[]] {
        let words = place.refuse(8, arguments);
        assert!(words.contains("mounted read-only") && words.contains("remount"), "{words}");
    }
    drop(place);
    drop(disk);
}

/// Takes all of the space that there is.
fn fill(file: &mut File) {
    for len in [64 << 10, 4096, 1] {
        while file.write(&vec![1; len]).is_ok_and(|n| n > 0) {}
    }
    // What is not durable yet may come to need more.
    file.sync_all().unwrap();
    while file.write(&[1; 4096]).is_ok_and(|n| n > 0) {}
}

#[test]
fn a_store_whose_disk_is_full_is_said_to_be_one() {
    let Some((disk, place)) = on_a_small_disk() else { return };
    // Everything that it writes is there already: what fails is the record of who has the key.
    place.attach(&[]).end();
    // The store has no space of its own any more, either.
    File::options().write(true).open(disk.folder().join("spare")).unwrap().set_len(0).unwrap();
    let filler = disk.folder().join("filler");
    let mut file = File::create(&filler).unwrap();
    fill(&mut file);
    let words = place.refuse(1, &["--read-only"]);
    assert!(
        words.contains("audit log") && words.contains("is full") && words.contains("make room"),
        "{words}"
    );
    drop(file);
    fs::remove_file(filler).unwrap();
    place.attach(&[]).end();
    drop(place);
    drop(disk);
}

/// The guest's requests for more than there is fail, and everything else goes on.
#[test]
fn on_a_full_disk_volumes_are_attached_written_to_trimmed_detached_and_deleted() {
    let Some((disk, place)) = on_a_small_disk() else { return };
    on_a_full_disk(disk.folder(), &place);
    drop(place);
    drop(disk);
    for file_system in ["ext4", "xfs"] {
        let store = Store::new();
        let Some(disk) = LoopDisk::mount(Kind { block: 512, file_system }, &store.root()) else { continue };
        fs::set_permissions(store.root(), fs::Permissions::from_mode(0o700)).unwrap();
        let (root, place) = (store.root(), Place::of(store, &[]));
        on_a_full_disk(&root, &place);
        drop(place);
        drop(disk);
    }
}

fn on_a_full_disk(root: &Path, place: &Place) {
    let spare = || fs::metadata(root.join("spare")).unwrap().len();
    place.store.ok(&["volume", "create", "--size", "4MiB", "--name", "other"]);
    let host = place.attach(&[]);
    let (half, data) = (4 << 20, pattern(3, 256 << 10));
    let mut session = open(&place.socket());
    write(&mut session.rings[0], 0, &data);
    flush(&mut session.rings[0]);
    drop(session);
    host.end();
    let before = spare();
    assert!(before > 0);
    let filler = root.join("filler");
    let mut file = File::create(&filler).unwrap();
    fill(&mut file);
    let host = place.attach(&[]);
    let mut session = open(&place.socket());
    let ring = &mut session.rings[0];
    assert!(read(ring, 0, data.len()) == data);
    // What is there can be written over.
    write(ring, 0, &pattern(4, 256 << 10));
    flush(ring);
    for n in 0..12 {
        let write = Request::write(half / 512 + n * 512, &data);
        assert_eq!(write.run(ring).unwrap().status, IOERR, "it is full");
    }
    let told = || -> Vec<Value> {
        let events = place.events().into_iter().map(|event| event["detail"].clone());
        events.filter(|detail| detail["event"] == "writeVolume").collect()
    };
    wait_for("it is told of", || if told().is_empty() { Err(host.output()) } else { Ok(()) });
    assert_eq!(told().len(), 1, "once");
    assert!(told()[0]["cause"].as_str().unwrap().contains("1 request of the guest's was"), "{:?}", told());
    let shown = place.store.ok(&["volume", "show", "t"]);
    assert!(shown.contains("12 requests of the guest's were refused for want of space"), "{shown}");
    // The guest makes space, and has it.
    let discard = Request::discard(&[Segment { sector: 0, count: 512, flags: 0 }]);
    assert_eq!(discard.run(ring).unwrap().status, OK);
    write(ring, half / 512, &pattern(5, 128 << 10));
    flush(ring);
    drop(session);
    fill(&mut file);
    place.store.ok(&["detach", "t"]);
    host.ends_well();
    fill(&mut file);
    place.store.ok(&["volume", "delete", "other"]);
    assert!(spare() < before, "{before}");
    place.store.ok(&["audit", "verify"]);
    place.store.ok(&["store", "check"]);
    drop(file);
    fs::remove_file(filler).unwrap();
    // XFS gives a removed file's blocks back a moment later.
    wait_for("what the file had is free", || {
        let found = statvfs(root).unwrap();
        let free = found.blocks_available() * found.fragment_size();
        if free > 5 * before { Ok(()) } else { Err(format!("{free} bytes are free")) }
    });
    let host = place.attach(&[]);
    assert_eq!(spare(), before, "it is made again");
    assert!(read(&mut open(&place.socket()).rings[0], half / 512, 128 << 10) == pattern(5, 128 << 10));
    host.end();
}
