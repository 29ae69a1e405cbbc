//! Where VMMs connect: a path, or a socket that somebody else made.

use crate::common::attach::{Place, listens, open, read, write};
use crate::common::disk::pattern;
use crate::common::frontend::raw::VERSION;
use crate::common::frontend::{Options, RawSocket, Session};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use std::fs::{self, File};
use std::net::TcpListener;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::symlink;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::process::Command;

/// `sealblk attach t --fd N` for this descriptor, and what the process must inherit for it.
fn attach_fd(place: &Place, fd: impl Into<OwnedFd>, arguments: &[&str]) -> (Command, Vec<OwnedFd>) {
    let fd = fd.into();
    let mut command = place.store.command();
    command.args(["attach", "t", "--fd", &fd.as_raw_fd().to_string()]).args(arguments);
    (command, vec![fd])
}

#[test]
fn ready_is_told_when_a_vmm_can_connect() {
    let place = Place::new(&[]);
    for _ in 0..10 {
        // `attach` returns with the message; nothing is tried twice here.
        let host = place.attach(&[]);
        assert!(listens(&place.socket()));
        assert!(listens(&place.volume_folder().join("control.sock")));
        host.end();
    }
}

#[test]
fn a_listening_descriptor_serves_one_vmm_after_the_other() {
    let place = Place::new(&[]);
    let (command, keep) = attach_fd(&place, UnixListener::bind(place.socket()).unwrap(), &[]);
    let host = place.start(command, keep);
    write(&mut open(&place.socket()).rings[0], 0, &pattern(1, 4096));
    assert!(read(&mut open(&place.socket()).rings[0], 0, 4096) == pattern(1, 4096));
    place.store.ok(&["detach", "t"]);
    host.ends_well();
    assert!(place.socket().exists() && !listens(&place.socket()), "the name is its maker's to remove");
}

/// A second VMM waits, as docs/migration.md and the protocol have it; who looks for the reason finds it.
#[test]
fn a_vmm_that_has_to_wait_is_told_of_with_who_is_connected() {
    let place = Place::new(&[]);
    let host = place.attach(&[]);
    let mut first = open(&place.socket());
    write(&mut first.rings[0], 0, &pattern(1, 4096));
    assert!(!host.output().contains("waits"), "{}", host.output());
    let path = place.socket();
    let second = std::thread::spawn(move || Session::open(&path, &Options::default()));
    host.says("a VMM has connected, and waits");
    let connected = format!("process {} of user {} is connected", std::process::id(), nix::unistd::geteuid());
    assert!(host.output().contains(&connected), "{}", host.output());
    drop(first);
    let mut second = second.join().unwrap().expect("it is served now");
    assert!(read(&mut second.rings[0], 0, 4096) == pattern(1, 4096));
    place.store.ok(&["detach", "t"]);
    host.ends_well();
}

/// Where a KMS is away for longer than a VMM looks for its back-end, the socket must outlive that.
#[test]
fn a_vmm_waits_in_a_socket_that_somebody_keeps_until_the_volume_is_attached_again() {
    let place = Place::new(&[]);
    let kept = UnixListener::bind(place.socket()).unwrap();
    let (command, keep) = attach_fd(&place, kept.try_clone().unwrap(), &[]);
    let host = place.start(command, keep);
    write(&mut open(&place.socket()).rings[0], 0, &pattern(1, 4096));
    host.crash();
    let vmm = UnixStream::connect(place.socket()).expect("nobody is there, and it waits");
    place.store.ok(&["key", "disable", "alias/aws/ebs"]);
    let (command, keep) = attach_fd(&place, kept.try_clone().unwrap(), &[]);
    assert_eq!(place.run(command, keep).code, 5, "it is not attached without its key");
    place.store.ok(&["key", "enable", "alias/aws/ebs"]);
    let (command, keep) = attach_fd(&place, kept, &[]);
    let host = place.start(command, keep);
    RawSocket::new(vmm).ask(1, VERSION, &[], &[]).expect("it is served, without having connected again");
    place.store.ok(&["detach", "t"]);
    host.ends_well();
}

#[test]
fn a_connected_descriptor_serves_its_vmm_and_ends_with_it() {
    let place = Place::new(&[]);
    let listener = UnixListener::bind(place.socket()).unwrap();
    let path = place.socket();
    let vmm = std::thread::spawn(move || Session::open(&path, &Options::default()));
    let (command, keep) = attach_fd(&place, listener.accept().unwrap().0, &[]);
    drop(listener);
    let host = place.start(command, keep);
    let mut session = vmm.join().expect("no panic").expect("the back-end serves a front-end");
    write(&mut session.rings[0], 0, &pattern(1, 4096));
    drop(session);
    host.ends_well();
    let host = place.attach(&[]);
    assert!(read(&mut open(&place.socket()).rings[0], 0, 4096) == pattern(1, 4096));
    host.end();
}

#[test]
fn a_connected_descriptor_whose_vmm_never_speaks_is_detached_all_the_same() {
    let place = Place::new(&[]);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (command, keep) = attach_fd(&place, theirs, &[]);
    let host = place.start(command, keep);
    place.store.ok(&["detach", "t"]);
    host.ends_well();
    drop(ours);
}

#[test]
fn descriptors_that_are_no_such_socket_are_refused() {
    let place = Place::new(&[]);
    let stream = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
    let (pipe, _writer) = std::io::pipe().unwrap();
    let cases: Vec<(&str, OwnedFd)> = vec![
        ("a file", File::open("/dev/null").unwrap().into()),
        ("a pipe", pipe.into()),
        ("a datagram socket", UnixDatagram::unbound().unwrap().into()),
        ("a TCP listener", TcpListener::bind("127.0.0.1:0").unwrap().into()),
        ("a socket that neither listens nor is connected", stream),
    ];
    for (what, fd) in cases {
        let number = fd.as_raw_fd();
        let (command, keep) = attach_fd(&place, fd, &[]);
        let said = place.run(command, keep);
        assert_eq!((said.code, said.out.as_str()), (2, ""), "{what}: {}", said.err);
        assert!(
            said.err.contains(&format!("descriptor {number} as the vhost-user socket")),
            "{what}: {}",
            said.err
        );
    }
    for number in ["0", "1", "2", "-1", "999"] {
        let mut command = place.store.command();
        command.args(["attach", "t", "--fd", number]);
        let said = place.run(command, vec![]);
        assert_eq!((said.code, said.out.as_str()), (2, ""), "{number}: {}", said.err);
    }
}

#[test]
fn what_lies_at_the_path_and_is_no_socket_is_left_alone() {
    let place = Place::new(&[]);
    let (socket, file) = (place.socket(), place.folder().join("precious"));
    fs::write(&file, "precious").unwrap();
    type Make = fn(&Place) -> std::io::Result<()>;
    let cases: [(&str, Make); 4] = [
        ("a file", |p| fs::write(p.socket(), "precious")),
        ("an empty file", |p| fs::write(p.socket(), "")),
        ("a symbolic link to a file", |p| symlink(p.folder().join("precious"), p.socket())),
        ("a folder", |p| fs::create_dir(p.socket())),
    ];
    for (what, make) in cases {
        make(&place).unwrap();
        let before = fs::symlink_metadata(&socket).unwrap();
        let said = place.run(place.attach_command(&[]), vec![]);
        assert_eq!((said.code, said.out.as_str()), (4, ""), "{what}: {}", said.err);
        let words =
            format!("listen on {}: there is a file of that name, and it is not a socket", socket.display());
        assert!(said.err.contains(&words), "{what}: {}", said.err);
        let after = fs::symlink_metadata(&socket).unwrap();
        assert_eq!((before.file_type(), before.len()), (after.file_type(), after.len()), "{what}");
        assert_eq!(before.modified().unwrap(), after.modified().unwrap(), "{what}");
        match after.is_dir() {
            true => fs::remove_dir(&socket).unwrap(),
            false => fs::remove_file(&socket).unwrap(),
        }
    }
    assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
    place.attach(&[]).end();
}

#[test]
fn a_socket_that_somebody_listens_on_is_left_alone() {
    let place = Place::new(&[]);
    let listener = UnixListener::bind(place.socket()).unwrap();
    let said = place.run(place.attach_command(&[]), vec![]);
    assert_eq!((said.code, said.out.as_str()), (4, ""), "{}", said.err);
    assert!(said.err.contains("somebody listens there already"), "{}", said.err);
    assert!(listens(&place.socket()));
    drop(listener);
    fs::remove_file(place.socket()).unwrap();
    let datagrams = UnixDatagram::bind(place.socket()).unwrap();
    let said = place.run(place.attach_command(&[]), vec![]);
    assert_eq!((said.code, said.out.as_str()), (4, ""), "{}", said.err);
    datagrams.set_nonblocking(true).unwrap();
    UnixDatagram::unbound().unwrap().send_to(b"x", place.socket()).expect("it is still there");
    // Nobody has it any more: that is what a dead process leaves.
    drop(datagrams);
    place.attach(&[]).end();
}

#[test]
fn a_path_where_no_socket_can_be_is_refused() {
    let place = Place::new(&[]);
    let long = place.folder().join("x".repeat(108));
    for (code, path, words) in [
        (3, place.folder().join("none/t.sock"), "No such file"),
        (2, long.clone(), "at most 107 bytes"),
        (2, "".into(), "a value is required"),
    ] {
        let mut command = place.store.command();
        command.args(["attach", "t", "--socket-path"]).arg(&path);
        let said = place.run(command, vec![]);
        assert_eq!((said.code, said.out.as_str()), (code, ""), "{path:?}: {}", said.err);
        assert!(said.err.contains(words), "{path:?}: {}", said.err);
    }
    // A path to it that is short enough will do.
    let mut command = place.store.command();
    command.args(["attach", "t", "--socket-path", "t.sock"]).current_dir(place.folder());
    place.start(command, vec![]).end();
}

#[test]
fn a_name_that_somebody_else_has_taken_meanwhile_is_not_removed() {
    let place = Place::new(&[]);
    let host = place.attach(&[]);
    fs::remove_file(place.socket()).unwrap();
    fs::write(place.socket(), "precious").unwrap();
    host.end();
    assert_eq!(fs::read_to_string(place.socket()).unwrap(), "precious");
}

/// Whoever may remove one name in a folder may remove everything below it, as far as a confined
/// process can be held to it.
#[test]
fn in_a_folder_that_holds_the_store_the_name_is_left() {
    let place = Place::new(&[]);
    let socket = place.folder().join("t.sock");
    // The second finds the first one's.
    for _ in 0..2 {
        let mut command = place.store.command();
        command.args(["attach", "t", "-v", "--socket-path"]).arg(&socket);
        let host = place.start(command, vec![]);
        host.says("t.sock stays when the volume is detached");
        assert!(listens(&socket));
        host.end();
        assert!(socket.exists() && !listens(&socket));
    }
    let host = place.attach(&["-v"]);
    host.end();
    assert!(!place.socket().exists());
}
