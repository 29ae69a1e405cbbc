//! The host process is confined: what its threads are, seen from outside; what becomes of a process that is
//! confined in the same way and tries something else; and that all of it holds for an ordinary user, too.
//!
//! A program of its own: its tests fork, and a lock that another thread holds at that moment stays locked in
//! the child. So no other tests run beside these.

mod common;

use crate::common::attach::{Host, Place, flush, is_left, open, read, write};
use crate::common::disk::pattern;
use nix::libc::ESRCH;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};
use sealblk::reactor::ring;
use sealblk::sandbox::{self, Access, Identity, Mode, Rule, violation};
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

const NOBODY: u32 = 65534;

/// What each thread says of itself under `name`.
fn of_every_thread(host: &Host, name: &str) -> Vec<String> {
    let threads = fs::read_dir(host.proc("task")).expect("list the threads");
    let value = |status: String| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("there is such a line");
        line.trim_start_matches(':').trim().to_owned()
    };
    let status = |thread: fs::DirEntry| match fs::read_to_string(thread.path().join("status")) {
        Ok(status) => Some(status),
        // One of the kernel's own, for an io_uring, may be gone by now.
        Err(e) if e.kind() == ErrorKind::NotFound || e.raw_os_error() == Some(ESRCH) => None,
        Err(e) => panic!("read what a thread says of itself: {e}"),
    };
    threads.filter_map(|t| status(t.expect("list"))).map(value).collect()
}

/// Every thread of `host`, at least `count`, is confined.
#[track_caller]
fn assert_confined(host: &Host, count: usize) {
    for (name, expected) in [("Seccomp", "2"), ("NoNewPrivs", "1"), ("CapEff", "0000000000000000")] {
        let all = of_every_thread(host, name);
        assert!(all.len() >= count && all.iter().all(|value| value == expected), "{name}: {all:?}");
    }
    for name in ["CapPrm", "CapInh", "CapAmb"] {
        assert!(of_every_thread(host, name).iter().all(|value| value == "0000000000000000"), "{name}");
    }
}

fn use_disk(socket: &Path) {
    let mut session = open(socket);
    let data = pattern(1, 65536);
    write(&mut session.rings[0], 8, &data);
    flush(&mut session.rings[0]);
    assert!(read(&mut session.rings[0], 8, 65536) == data);
}

#[test]
fn every_thread_of_the_host_process_is_confined() {
    let place = Place::new(&[]);
    let host = place.attach(&["--queues", "3"]);
    // Main, control, signals, three queues.
    assert_confined(&host, 6);
    let session = open(&place.socket());
    // And that of the VMM's session.
    assert_confined(&host, 7);
    drop(session);
    use_disk(&place.socket());
    host.end();
}

#[test]
fn a_queue_finds_its_ring_again_however_often_it_starts() {
    let place = Place::new(&[]);
    let host = place.attach(&["--queues", "1"]);
    let mut session = open(&place.socket());
    for round in 0..50 {
        let data = pattern(round, 4096);
        write(&mut session.rings[0], 8 * round, &data);
        assert!(read(&mut session.rings[0], 8 * round, 4096) == data);
        session.stop().unwrap();
        session.rings[0].reset(0);
        session.start().unwrap();
    }
    drop(session);
    for _ in 0..20 {
        use_disk(&place.socket());
    }
    assert_eq!(host.output().matches("ERROR").count(), 0, "{}", host.output());
    host.end();
}

#[test]
fn off_and_log_are_said_to_be_what_they_are() {
    let place = Place::new(&[]);
    for (mode, seccomp, words) in [("off", "0", "no system call filter"), ("log", "2", "are logged")] {
        let host = place.attach(&["-v", "--sandbox", mode]);
        assert!(of_every_thread(&host, "Seccomp").iter().all(|value| value == seccomp));
        assert!(host.output().contains(words), "{}", host.output());
        use_disk(&place.socket());
        host.end();
    }
    assert!(place.refuse(2, &["--sandbox", "maybe"]).contains("none of on, log, off"));
}

/// What a confined child came to.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Exit(i32),
    Signal(i32),
}

/// Runs `act` in a child of this process that is confined as a host process is, with these files; returns how
/// it ended, and what it said on standard error. `act` returns the exit code.
fn confined(files: &[Rule], act: impl FnOnce() -> i32) -> (End, String) {
    confined_after(|| (), files, |()| act())
}

/// As [`confined`], with what `before` makes in the child before the child is confined.
fn confined_after<T>(
    before: impl FnOnce() -> T,
    files: &[Rule],
    act: impl FnOnce(T) -> i32,
) -> (End, String) {
    let (mut said, stderr) = std::io::pipe().expect("make a pipe");
    // SAFETY: the child has one thread, allocates (the C library keeps its allocator whole across a fork),
    // and leaves by _exit, so that nothing of the test's is run or dropped twice.
    match unsafe { fork() }.expect("fork") {
        ForkResult::Child => {
            let _ = nix::unistd::dup2_stderr(&stderr);
            let made = before();
            let code = match sandbox::confine(Mode::On, None, files) {
                Ok(_) => act(made),
                Err(e) => {
                    // Not eprintln!, which the harness keeps to itself.
                    let _ = std::io::stderr().write_all(e.to_string().as_bytes());
                    99
                }
            };
            // SAFETY: ends the process, and nothing else.
            unsafe { libc::_exit(code) }
        }
        ForkResult::Parent { child } => {
            drop(stderr);
            let mut text = String::new();
            said.read_to_string(&mut text).expect("read what it said");
            let end = match waitpid(child, None).expect("it is a child") {
                WaitStatus::Exited(_, code) => End::Exit(code),
                WaitStatus::Signaled(_, signal, _) => End::Signal(signal as i32),
                other => panic!("{other:?}"),
            };
            (end, text)
        }
    }
}

#[test]
fn a_forbidden_call_ends_the_process_and_is_named() {
    let call = |number: libc::c_long, arguments: [usize; 4]| {
        let [a, b, c, d] = arguments;
        move || {
            // SAFETY: the filter judges the call by its number and these numbers before the kernel
            // looks at memory; where it does not, the kernel finds null pointers and bad
            // descriptors, and answers an error.
            unsafe { libc::syscall(number, a, b, c, d) };
            0
        }
    };
    let inet = [libc::AF_INET as usize, libc::SOCK_STREAM as usize, 0, 0];
    let datagram = [libc::AF_UNIX as usize, libc::SOCK_DGRAM as usize, 0, 0];
    let here = libc::AT_FDCWD as usize;
    let executable = (libc::PROT_READ | libc::PROT_EXEC) as usize;
    for (number, name, arguments) in [
        (libc::SYS_socket, "socket", inet),
        (libc::SYS_socket, "socket", datagram),
        (libc::SYS_execve, "execve", [0; 4]),
        (libc::SYS_ptrace, "ptrace", [0; 4]),
        (libc::SYS_io_uring_setup, "io_uring_setup", [8, 0, 0, 0]),
        (libc::SYS_io_uring_register, "io_uring_register", [0, 9, 0, 0]),
        (libc::SYS_bind, "bind", [0; 4]),
        (libc::SYS_connect, "connect", [0, 0, 110, 0]),
        (libc::SYS_openat, "openat", [here, 0, libc::O_PATH as usize, 0]),
        (libc::SYS_process_vm_readv, "process_vm_readv", [0; 4]),
        (libc::SYS_mprotect, "mprotect", [0, 4096, executable, 0]),
        (libc::SYS_clone, "clone", [libc::SIGCHLD as usize, 0, 0, 0]),
        (libc::SYS_kill, "kill", [1, 0, 0, 0]),
        (libc::SYS_tgkill, "tgkill", [1, 1, 0, 0]),
        (libc::SYS_fcntl, "fcntl", [0, libc::F_SETOWN as usize, 0, 0]),
        (libc::SYS_prctl, "prctl", [libc::PR_SET_DUMPABLE as usize, 1, 0, 0]),
        (libc::SYS_setresuid, "setresuid", [0; 4]),
        (libc::SYS_chdir, "chdir", [0; 4]),
        (libc::SYS_symlinkat, "symlinkat", [0; 4]),
    ] {
        let (end, said) = confined(&[], call(number, arguments));
        assert_eq!(end, End::Exit(violation::EXIT_CODE), "{name} {arguments:?}: {said}");
        assert!(said.contains(&format!("system call {name} ({number})")), "{name}: {said}");
    }
    // So does a call by a number that has no name, and no call that is allowed.
    let (end, said) = confined(&[], call(4000, [0; 4]));
    assert_eq!(end, End::Exit(violation::EXIT_CODE));
    assert!(said.contains("number (4000)"), "{said}");
    assert_eq!(confined(&[], call(libc::SYS_getpid, [0; 4])), (End::Exit(0), String::new()));
}

/// Its flags lie in memory, where no filter can judge them: the caller goes on as on a kernel that lacks it.
#[test]
fn a_call_that_cannot_be_judged_does_not_exist() {
    let attempt = || {
        let here = libc::AT_FDCWD as usize;
        // SAFETY: the filter answers before the kernel looks at memory; where it does not, the
        // kernel finds null pointers.
        let answer = unsafe { libc::syscall(libc::SYS_openat2, here, 0, 0, 0) };
        i32::from(answer != -1 || std::io::Error::last_os_error().raw_os_error() != Some(libc::ENOSYS))
    };
    assert_eq!(confined(&[], attempt), (End::Exit(0), String::new()));
}

#[test]
fn a_thread_that_blocks_signals_gets_no_further() {
    let attempt = || {
        nix::sys::signal::SigSet::all().thread_block().expect("block signals");
        // SAFETY: the call fails, for want of a name, if it is made at all.
        unsafe { libc::syscall(libc::SYS_execve, 0usize, 0usize, 0usize) };
        0
    };
    assert_eq!(confined(&[], attempt).0, End::Signal(libc::SIGSYS));
}

#[test]
fn threads_that_come_later_are_confined_too() {
    let attempt = || {
        // SAFETY: the call fails, for want of a name, if it is made at all.
        let thread =
            std::thread::spawn(|| unsafe { libc::syscall(libc::SYS_execve, 0usize, 0usize, 0usize) });
        let _ = thread.join();
        0
    };
    let (end, said) = confined(&[], attempt);
    assert_eq!(end, End::Exit(violation::EXIT_CODE), "{said}");
    assert!(said.contains("system call execve"), "{said}");
}

#[test]
fn a_process_with_several_threads_is_not_confined_by_half() {
    // This one has: the test's and the harness's.
    let refused = sandbox::confine(Mode::On, None, &[]).unwrap_err().to_string();
    assert!(refused.contains("several threads"), "{refused}");
}

/// What goes wrong in a queue's thread must be told, with its backtrace if that is wanted.
#[test]
fn a_panic_and_its_backtrace_need_nothing_that_is_forbidden() {
    let act = || {
        let caught = std::thread::spawn(|| std::panic::catch_unwind(|| panic!("on purpose")).is_err()).join();
        let trace = std::backtrace::Backtrace::force_capture().to_string();
        i32::from(!caught.is_ok_and(|caught| caught) || trace.is_empty())
    };
    let (end, said) = confined(&[], act);
    assert_eq!(end, End::Exit(0), "{said}");
}

/// The exit code for what an attempt came to: 0, or the error's number.
fn code<T>(attempt: std::io::Result<T>) -> i32 {
    attempt.err().map_or(0, |e| e.raw_os_error().unwrap_or(98))
}

#[test]
fn files_that_no_rule_names_cannot_be_opened() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    for folder in ["own", "other", "sockets"] {
        fs::create_dir(at(folder)).unwrap();
    }
    for file in ["layer", "frozen", "own/file", "other/file", "sockets/name", "beside"] {
        fs::write(at(file), "x").unwrap();
    }
    let rules = [
        Rule::new(at("own"), Access::Own),
        Rule::new(at("layer"), Access::Write),
        Rule::new(at("frozen"), Access::Read),
        Rule::new(at("sockets"), Access::Remove),
    ];
    let write = |path: PathBuf| File::options().read(true).write(true).open(path);
    let make = |path: PathBuf| File::options().write(true).create_new(true).open(path);
    type Attempt<'a> = Box<dyn Fn() -> i32 + 'a>;
    let attempts: [(&str, bool, Attempt<'_>); 18] = [
        ("read the system's files", false, Box::new(|| code(File::open("/etc/passwd")))),
        ("read a file beside", false, Box::new(|| code(File::open(at("beside"))))),
        ("read in another folder", false, Box::new(|| code(File::open(at("other/file"))))),
        ("make a file beside", false, Box::new(|| code(make(at("new"))))),
        ("remove a file beside", false, Box::new(|| code(fs::remove_file(at("beside"))))),
        ("move a file out", false, Box::new(|| code(fs::rename(at("own/file"), at("other/new"))))),
        ("move a file in", false, Box::new(|| code(fs::rename(at("other/file"), at("own/new"))))),
        ("list another folder", false, Box::new(|| code(fs::read_dir(at("other"))))),
        ("read a name that may be removed", false, Box::new(|| code(File::open(at("sockets/name"))))),
        ("write what may be read", false, Box::new(|| code(write(at("frozen"))))),
        ("read what may be read", true, Box::new(|| code(File::open(at("frozen"))))),
        ("write a layer", true, Box::new(|| code(write(at("layer"))))),
        ("make a file", true, Box::new(|| code(make(at("own/new"))))),
        ("replace a file", true, Box::new(|| code(sealblk_replace(&at("own/file"))))),
        ("sync the folder", true, Box::new(|| code(File::open(at("own")).and_then(|d| d.sync_all())))),
        ("remove a file", true, Box::new(|| code(fs::remove_file(at("own/file"))))),
        ("remove a socket's name", true, Box::new(|| code(fs::remove_file(at("sockets/name"))))),
        (
            "open a layer again",
            true,
            Box::new(|| {
                let open = || {
                    let file = write(at("layer"))?;
                    write(format!("/proc/self/fd/{}", file.as_raw_fd()).into())
                };
                code(open())
            }),
        ),
    ];
    for (what, allowed, attempt) in attempts {
        let (end, said) = confined(&rules, attempt);
        let End::Exit(code) = end else { panic!("{what}: {end:?} {said}") };
        match allowed {
            true => assert_eq!(code, 0, "{what}: {said}"),
            // Landlock's answers: not permitted, or (to and from another folder) no way there.
            false => assert!([libc::EACCES, libc::EXDEV].contains(&code), "{what}: {code} {said}"),
        }
    }
}

fn sealblk_replace(path: &Path) -> std::io::Result<()> {
    sealblk::base::root::replace_file(path, b"new").map_err(|e| std::io::Error::other(e.to_string()))
}

#[test]
fn names_can_be_changed_where_files_are_out_of_reach() {
    let folder = tempfile::tempdir().expect("make a temporary folder");
    let (file, other) = (folder.path().join("a"), folder.path().join("b"));
    fs::write(&file, b"x").expect("make a file");
    let rules = [Rule::new(folder.path(), Access::Names)];
    let denied = |attempt: std::io::Result<File>| {
        attempt.err().is_some_and(|e| e.kind() == ErrorKind::PermissionDenied)
    };
    let act = || {
        let all = [
            denied(File::open(&file)),
            denied(File::options().write(true).open(&file)),
            fs::rename(&file, &other).is_ok(),
            File::open(folder.path()).is_ok_and(|folder| folder.sync_all().is_ok()),
            denied(File::open(&other)),
            fs::remove_file(&other).is_ok(),
        ];
        all.iter().enumerate().map(|(n, ok)| i32::from(!ok) << n).sum()
    };
    let (end, said) = confined(&rules, act);
    assert_eq!(end, End::Exit(0), "{said}");
}

#[test]
fn only_a_socket_that_is_held_can_be_connected_to() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let _listener = UnixListener::bind(&path).unwrap();
    let (end, said) = confined(&[], || code(UnixStream::connect(&path)));
    assert_eq!(end, End::Exit(violation::EXIT_CODE), "{said}");
    assert!(said.contains("system call connect"), "{said}");
    let flags = nix::fcntl::OFlag::O_PATH | nix::fcntl::OFlag::O_CLOEXEC;
    let held: OwnedFd = nix::fcntl::open(&path, flags, nix::sys::stat::Mode::empty()).unwrap();
    let (end, said) = confined(&[], || code(UnixStream::connect(held.as_raw_fd().to_string())));
    assert_eq!(end, End::Exit(0), "{said}");
}

#[test]
fn rings_are_made_beforehand_and_each_queues_thread_keeps_its_own() {
    let use_one = || -> std::io::Result<u32> {
        let mut ring = ring::Ring::take(1024)?;
        let serial = ring.next_serial();
        ring.submitter().register_files_update(0, &[2])?;
        ring.submitter().register_files_update(0, &[-1])?;
        ring.forget(false);
        Ok(serial)
    };
    let act = |()| {
        // Others share one, each in its turn, from whatever thread.
        for _ in 0..3 {
            if !std::thread::spawn(move || use_one().is_ok()).join().unwrap_or(false) {
                return 1;
            }
        }
        let held = ring::Ring::take(8);
        let none = ring::Ring::take(8).err().map(|e| e.to_string());
        if held.is_err() || none.as_deref() != Some("every io_uring of this process is in use") {
            return 2;
        }
        // A queue's thread has its own, whoever else has the shared one, and the same one again.
        let own = std::thread::spawn(move || {
            ring::claim();
            let own = ring::Ring::take(8);
            own.is_ok() && ring::Ring::take(8).is_err()
        });
        let again = std::thread::spawn(move || {
            ring::claim();
            matches!((use_one(), use_one()), (Ok(first), Ok(second)) if first + 1 == second)
        });
        if own.join().unwrap_or(false) && again.join().unwrap_or(false) { 0 } else { 3 }
    };
    let prepare = || ring::prepare(2, 1).expect("make rings");
    assert_eq!(confined_after(prepare, &[], act), (End::Exit(0), String::new()));
}

/// Makes `path` and all below it the user's.
fn give(path: &Path, user: u32) {
    chown(path, Some(user), Some(user)).expect("root may give files away");
    if path.is_dir() {
        fs::read_dir(path)
            .expect("list a folder")
            .for_each(|e| give(&e.expect("list a folder").path(), user));
    }
}

#[test]
fn an_ordinary_user_serves_what_root_has_opened() {
    let place = Place::new(&[]);
    let config = place.store.config();
    // What holds the volume is his; the root key is not.
    place.store.let_belong_to("nobody");
    give(&place.store.root(), NOBODY);
    fs::set_permissions(place.folder(), std::os::unix::fs::PermissionsExt::from_mode(0o711)).unwrap();
    for _ in 0..2 {
        let host = place.attach(&["-v", "--queues", "2", "--user", "nobody"]);
        assert!(host.output().contains("user nobody:"), "{}", host.output());
        for name in ["Uid", "Gid"] {
            let all = of_every_thread(&host, name);
            assert!(all.iter().all(|ids| ids.split_whitespace().all(|id| id == "65534")), "{name}: {all:?}");
        }
        assert!(
            of_every_thread(&host, "Groups").iter().all(|groups| ["", "65534"].contains(&groups.as_str()))
        );
        assert_confined(&host, 5);
        assert_eq!(fs::metadata(place.socket()).unwrap().uid(), NOBODY);
        use_disk(&place.socket());
        use_disk(&place.socket());
        assert_eq!(fs::metadata(&config).unwrap().uid(), 0);
        host.end();
        // It lies in root's folder, and a later attach replaces it.
        assert!(place.socket().exists());
        is_left(&place.socket());
    }
}

#[test]
fn a_user_who_cannot_reach_the_files_is_told_which() {
    let place = Place::new(&[]);
    let said = place.refuse(2, &["--user", "nobody"]);
    assert!(said.contains("the user nobody cannot use") && said.contains("volumes/vol-"), "{said}");
    fs::set_permissions(place.folder(), std::os::unix::fs::PermissionsExt::from_mode(0o711)).unwrap();
    place.store.let_belong_to("nobody");
    give(&place.store.root(), NOBODY);
    give(&place.layer(), 0);
    let said = place.refuse(2, &["--user", "nobody"]);
    assert!(said.contains("the user nobody cannot use") && said.contains("layers/"), "{said}");
    assert!(place.refuse(2, &["--user", "no-such-user"]).contains("there is no user no-such-user"));
    assert!(place.refuse(2, &["--user", "nobody:no-such"]).contains("there is no group no-such"));
    place.attach(&[]).end();
}

/// Root can serve another user's files: that takes one capability, which is kept for them alone.
#[test]
fn one_capability_is_kept_where_files_are_somebody_elses() {
    let place = Place::new(&[]);
    place.store.let_belong_to("nobody");
    give(&place.store.root(), NOBODY);
    let host = place.attach(&[]);
    let mut session = open(&place.socket());
    write(&mut session.rings[0], 0, &pattern(1, 4096));
    assert!(of_every_thread(&host, "CapEff").iter().all(|value| value == "0000000000000002"));
    assert!(of_every_thread(&host, "CapPrm").iter().all(|value| value == "0000000000000002"));
    drop(session);
    host.end();
}

#[test]
fn only_root_becomes_somebody_else() {
    let act = |()| {
        let nobody = nix::unistd::Uid::from_raw(NOBODY);
        if nix::unistd::setresuid(nobody, nobody, nobody).is_err() {
            return 1;
        }
        i32::from(!Identity::parse("daemon").is_err_and(|e| e.to_string().contains("only root")))
    };
    // Before any confinement, which would not let it try.
    let (end, said) = confined_after(|| act(()), &[], |code| code);
    assert_eq!(end, End::Exit(0), "{said}");
}
