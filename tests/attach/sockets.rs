//! Where VMMs connect: a path, or a socket that somebody else made.

use crate::common::attach::{Place, is_left, listens, open, read, write};
use crate::common::disk::pattern;
use crate::common::frontend::raw::VERSION;
use crate::common::frontend::{Options, RawSocket, Session};
use crate::common::process::{INHERITED, inherit, repository};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use std::fs::{self, File};
use std::net::TcpListener;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

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
    assert!(place.socket().exists(), "the name is its maker's to remove");
    is_left(&place.socket());
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
    place.store.ok(&["key", "disable", "--yes", "alias/aws/ebs"]);
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
        assert!(socket.exists());
        is_left(&socket);
    }
    let host = place.attach(&["-v"]);
    host.end();
    assert!(!place.socket().exists());
}

/// The group `daemon` and the user nobody are on every Debian.
const DAEMON: u32 = 1;

/// Whether a user of this group can connect.
fn connects(path: &Path, group: u32) -> bool {
    let mut python = Command::new("python3");
    python.args(["-c", "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"]).arg(path);
    python.uid(65534).gid(group).stderr(Stdio::null()).status().expect("start python").success()
}

#[test]
fn the_vmms_group_may_connect() {
    let place = Place::new(&[]);
    fs::set_permissions(place.folder(), fs::Permissions::from_mode(0o711)).unwrap();
    let socket = place.socket();
    let cases: [(&[&str], u32, u32, [bool; 2]); 4] = [
        (&["--socket-group", "daemon"], DAEMON, 0o660, [true, false]),
        (&["--socket-group", "daemon", "--socket-mode", "0600"], DAEMON, 0o600, [false, false]),
        (&["--socket-mode", "0666"], 0, 0o666, [true, true]),
        (&["--socket-group", "daemon", "--socket-mode", "777"], DAEMON, 0o777, [true, true]),
    ];
    for (arguments, group, mode, connect) in cases {
        let host = place.attach(arguments);
        let found = fs::metadata(&socket).unwrap();
        assert_eq!((found.uid(), found.gid(), found.mode() & 0o7777), (0, group, mode), "{arguments:?}");
        assert_eq!([connects(&socket, DAEMON), connects(&socket, 65534)], connect, "{arguments:?}");
        host.end();
        assert!(!socket.exists(), "{arguments:?}");
    }
    for (arguments, words) in [
        (&["--socket-group", "no-such-group"][..], "there is no group no-such-group"),
        (&["--socket-mode", "rw"], "permissions in octal"),
        (&["--socket-mode", "1777"], "permissions in octal"),
    ] {
        let said = place.refuse(2, arguments);
        assert!(said.contains(words), "{arguments:?}: {said}");
    }
    let (command, keep) = attach_fd(
        &place,
        UnixListener::bind(place.folder().join("x")).unwrap(),
        &["--socket-group", "daemon"],
    );
    assert_eq!(place.run(command, keep).code, 2, "who made the socket decides that");
}

#[test]
fn the_group_is_the_vmms_where_the_process_is_another_users() {
    let place = Place::new(&[]);
    place.store.let_belong_to("nobody");
    give(&place.store.root(), 65534);
    fs::set_permissions(place.folder(), fs::Permissions::from_mode(0o711)).unwrap();
    let host = place.attach(&["--user", "nobody", "--socket-group", "daemon"]);
    let found = fs::metadata(place.socket()).unwrap();
    assert_eq!((found.uid(), found.gid(), found.mode() & 0o777), (65534, DAEMON, 0o660));
    host.end();
}

/// Makes `path` and all below it the user's.
fn give(path: &Path, user: u32) {
    chown(path, Some(user), Some(user)).unwrap();
    if path.is_dir() {
        fs::read_dir(path).unwrap().for_each(|entry| give(&entry.unwrap().path(), user));
    }
}

/// The value of a setting in a shipped unit, where `%i` is `t`, and what is installed lies in this test.
fn of_unit(place: &Place, unit: &str, setting: &str) -> String {
    let text = fs::read_to_string(repository().join("resources").join(unit)).unwrap();
    let value = text.lines().find_map(|line| line.strip_prefix(setting)?.strip_prefix('='));
    let run = place.socket().parent().unwrap().display().to_string();
    let value = value.unwrap_or_else(|| panic!("{unit} has no {setting}")).replace("%i", "t");
    value.replace("/run/sealblk/t/vhost.sock", &format!("{run}/t.sock"))
}

/// `ExecStart=` of the shipped service, started as systemd starts it: with these sockets.
fn as_systemd(place: &Place, sockets: &[&UnixListener]) -> Command {
    let line = of_unit(place, "sealblk@.service", "ExecStart");
    // Not every machine has the group kvm, and the user sealblk is the package's.
    let line = line.replace("--socket-group kvm", "--socket-group daemon").replace(" --user sealblk", "");
    let arguments = line.strip_prefix("/usr/bin/sealblk ").expect("the program is installed there");
    let store = place.store.command();
    // By a shell, which has the process id that the program is going to have.
    let mut command = Command::new("bash");
    let passed = ["-c", "exec 3<&700; [ $LISTEN_FDS = 1 ] || exec 4<&701; LISTEN_PID=$$ exec \"$@\"", "bash"];
    command.args(passed).arg(store.get_program()).args(store.get_args());
    command.args(arguments.split_whitespace()).env("LISTEN_FDS", sockets.len().to_string());
    command.envs(store.get_envs().filter_map(|(name, value)| Some((name, value?))));
    for (number, socket) in (INHERITED..).zip(sockets) {
        inherit(&mut command, socket.try_clone().unwrap().into(), number);
    }
    command
}

/// The shipped units together: systemd has the socket, and the service comes and goes.
#[test]
fn a_vmm_waits_in_the_socket_of_the_shipped_unit() {
    let place = Place::new(&[]);
    let path = of_unit(&place, "sealblk@.socket", "ListenStream");
    assert_eq!(path, place.socket().display().to_string());
    assert_eq!(of_unit(&place, "sealblk@.service", "RuntimeDirectoryPreserve"), "yes", "or the socket goes");
    assert_eq!(of_unit(&place, "sealblk@.socket", "SocketMode"), "0660");
    assert_eq!(of_unit(&place, "sealblk@.socket", "SocketGroup"), "kvm");
    assert!(of_unit(&place, "sealblk@.service", "ExecStart").contains(" --socket-group kvm "));
    assert_eq!(of_unit(&place, "sealblk@.service", "FileDescriptorStoreMax"), "1");
    let (kept, other) =
        (UnixListener::bind(&path).unwrap(), UnixListener::bind(place.folder().join("other")).unwrap());
    let host = place.start(as_systemd(&place, &[&other, &kept]), vec![]);
    write(&mut open(&place.socket()).rings[0], 0, &pattern(1, 4096));
    host.crash();
    let vmm = UnixStream::connect(&path).expect("nobody is there, and it waits");
    let host = place.start(as_systemd(&place, &[&kept]), vec![]);
    RawSocket::new(vmm).ask(1, VERSION, &[], &[]).expect("it is served, without having connected again");
    assert!(read(&mut open(&place.socket()).rings[0], 0, 4096) == pattern(1, 4096));
    place.store.ok(&["detach", "t"]);
    host.ends_well();
    assert!(place.socket().exists(), "the name is systemd's to remove");
    // None of them, or none for this process.
    let said = place.run(as_systemd(&place, &[&other]), vec![]);
    assert!(said.code == 2 && said.err.contains("ListenStream="), "{}", said.err);
    drop(kept);
    fs::remove_file(&path).unwrap();
    let mut command = place.attach_command(&[]);
    command.env("LISTEN_PID", "1").env("LISTEN_FDS", "1");
    place.start(command, vec![]).end();
}

/// The service alone: the manager keeps the socket that the service has made, and passes it to the process
/// that it starts after a crash.
#[test]
fn a_vmm_waits_in_the_socket_that_the_manager_keeps() {
    let place = Place::new(&[]);
    let host = place.attach(&[]);
    let (kept, name) = host.gives_to_keep();
    host.crash();
    let vmm = UnixStream::connect(place.socket()).expect("nobody is there, and it waits");
    let command = || {
        let mut command = as_systemd(&place, &[&kept]);
        command.env("LISTEN_FDNAMES", &name);
        command
    };
    let host = place.start(command(), vec![]);
    RawSocket::new(vmm).ask(1, VERSION, &[], &[]).expect("it is served, without having connected again");
    // It goes as it would have gone without a crash.
    place.store.ok(&["detach", "t"]);
    host.ends_well();
    assert!(!place.socket().exists(), "the name is this service's to remove");
    // Under that name came what was never made here: it stays.
    let own = UnixListener::bind(place.socket()).unwrap();
    let mut other = as_systemd(&place, &[&own]);
    other.env("LISTEN_FDNAMES", "sealblk@t.socket");
    let host = place.start(other, vec![]);
    host.end();
    assert!(place.socket().exists());
}
