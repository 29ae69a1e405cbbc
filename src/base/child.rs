//! A process that this program starts as itself: once more the same program, with a socket as its standard
//! input and a hidden command. What the two say to each other is theirs to know.

use crate::base::hardened::harden_children;
use crate::base::root::Root;
use crate::base::{Context, Error, Kind, Result, log_fields};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::ForkResult;
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// Starts `sealblk COMMAND` for the store at `root`; returns our end of its socket.
pub(crate) fn spawn(root: &Root, command: &str) -> Result<(UnixStream, Child)> {
    spawn_with(root, None, command, |_| {})
}

/// As [`spawn`], with another configuration folder than this process's, if one is named, and once `change`
/// has had its say on how the program is started.
pub(crate) fn spawn_with(
    root: &Root,
    config: Option<&Path>,
    command: &str,
    change: impl FnOnce(&mut Command),
) -> Result<(UnixStream, Child)> {
    let attempt = || format!("start the {command} helper");
    let (ours, theirs) = UnixStream::pair().context(attempt)?;
    let mut program = Command::new("/proc/self/exe");
    pass_general_with(&mut program, config);
    change(&mut program);
    let child = program
        .arg("--root")
        .arg(root.path())
        .arg(command)
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .spawn()
        .context(attempt)?;
    Ok((ours, child))
}

/// As [`spawn`], once `change` has had its say, of a process that is needed until this one has ended: what
/// ends this one from a terminal (Ctrl-C goes to a whole process group) is not for the other, which ends when
/// its socket does.
pub(crate) fn spawn_lasting(
    root: &Root,
    command: &str,
    change: impl FnOnce(&mut Command),
) -> Result<(UnixStream, Child)> {
    spawn_with(root, None, command, |program| {
        change(program.process_group(0));
    })
}

/// Starts a program as a child of nobody's: of the one who takes in orphans, which is the service manager
/// where there is one. What that has for the main process of a service is to be a child of its own: of
/// another's it is not told when it ends, and may not wait for that.
pub(crate) fn spawn_orphan(program: &mut Command) -> io::Result<Child> {
    let leave_parent = || {
        // SAFETY: there is one thread here, between the fork of `spawn` and its exec; the
        // child goes on to that.
        match unsafe { nix::unistd::fork() }? {
            ForkResult::Child => Ok(()),
            // SAFETY: it ends the process that nothing else is to be done by, and runs
            // nothing of this program's.
            ForkResult::Parent { .. } => unsafe { libc::_exit(0) },
        }
    };
    // SAFETY: fork and _exit are async-signal-safe (signal-safety(7)), and nothing is allocated.
    unsafe { program.pre_exec(leave_parent) };
    let mut child = program.spawn()?;
    child.wait()?;
    Ok(child)
}

/// Lets a program that is another's inherit nothing of this process but its standard streams.
pub(crate) fn keep_descriptors_back(program: &mut Command) {
    const FIRST: libc::c_uint = libc::STDERR_FILENO as libc::c_uint + 1;
    let mark = || {
        // SAFETY: close_range takes numbers alone, and with this flag closes nothing before the exec.
        let done = unsafe {
            libc::syscall(libc::SYS_close_range, FIRST, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC)
        };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    // SAFETY: between fork and exec the closure makes one system call, and allocates nothing.
    unsafe { program.pre_exec(mark) };
}

/// Has this program, which is started once more, use the same configuration folder and the same form of the
/// log.
pub(crate) fn pass_general(program: &mut Command) {
    pass_general_with(program, None);
}

fn pass_general_with(program: &mut Command, config: Option<&Path>) {
    if let Some(config) = config.or(Root::used_config_dir()) {
        program.arg("--config-dir").arg(config);
    }
    if let Some(format) = log_fields::format() {
        program.arg("--log-format").arg(format);
    }
}

/// The helper's side of the beginning: gives up what it does not need, and takes its socket. It dies with the
/// process that started it, until [`outlive_parent`].
///
/// # Errors
/// `Usage` where that process is gone already.
pub(crate) fn begin() -> Result<UnixStream> {
    harden_children()?;
    prctl::set_pdeathsig(Signal::SIGKILL).context(|| "tie this process to the one that started it")?;
    // SAFETY: whoever started us made standard input for us, and nobody else in this process uses it.
    let socket = unsafe { UnixStream::from_raw_fd(libc::STDIN_FILENO) };
    // It may have died before the line above that ties us to it; then its end of the socket is closed.
    let mut fds = [PollFd::new(socket.as_fd(), PollFlags::empty())];
    poll(&mut fds, PollTimeout::ZERO).context(|| "look at the socket")?;
    if fds[0].revents().is_some_and(|found| found.contains(PollFlags::POLLHUP)) {
        return Err(Error::new(Kind::Usage, "whoever started this process is gone"));
    }
    Ok(socket)
}

/// Lets this process go on when the one that started it has ended.
pub(crate) fn outlive_parent() -> Result<()> {
    prctl::set_pdeathsig(None).context(|| "untie this process from the one that started it")
}
