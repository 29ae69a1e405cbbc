//! What a process that sees a data key gives up for good once everything that it needs is open ([`confine`]).
//! Before, it has hardened itself, as every command does ([`crate::base::hardened`]).
//!
//! A confined process does what serving a volume takes and nothing else. It makes the system calls of
//! [`calls`], and ends at any other one, which it names ([`violation`]). It reaches the files of [`files`]
//! and no other, by Landlock. It belongs to the user that the operator named, and has no capabilities
//! ([`identity`]). None of this can be undone. docs/threat-model.md says what that is worth; here stands how
//! it is done. Nothing here knows volumes or keys.
//!
//! Whoever needs more in the confined process: a system call is one word in `calls.rs`, a file or folder one
//! rule in `host/files.rs`, an io_uring operation one line in `reactor/ring.rs`.

mod calls;
mod files;
mod identity;
pub(crate) mod stranger;
pub mod violation;

pub use calls::check_seccomp;
pub use files::{Access, Rule, landlock_version};
pub use identity::{Identity, group_called};

use crate::base::hardened::{harden, harden_children};
use crate::base::{Context, Error, Kind, Result};
use std::fmt;
use std::str::FromStr;

/// The working folder of a confined process: relative to it, a socket that is held as a descriptor has a name
/// so short that no other socket can have it. The filter lets `connect` have no longer one.
pub const WORKING_FOLDER: &str = "/proc/self/fd";

/// How strictly the host process is confined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// A forbidden system call ends it.
    On,
    /// A forbidden system call is reported by the kernel (audit, or its log) and done;
    /// every file can be reached.
    Log,
    /// Neither filter nor rules.
    Off,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Mode::On => "on",
            Mode::Log => "log",
            Mode::Off => "off",
        })
    }
}

impl FromStr for Mode {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "on" => Ok(Mode::On),
            "log" => Ok(Mode::Log),
            "off" => Ok(Mode::Off),
            _ => Err(Error::new(Kind::Usage, format!("\"{text}\" is none of on, log, off"))),
        }
    }
}

/// What came of it, for the log.
#[derive(Debug)]
pub struct Confinement(Vec<String>);

impl fmt::Display for Confinement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join(", "))
    }
}

/// Gives up what the process does not need any more. It must have one thread; those that it starts later are
/// confined like it. Its working folder is [`WORKING_FOLDER`] afterwards.
///
/// # Errors
/// `Unsupported` where the kernel, or the container that this runs in, refuses the filter; `Usage`,
/// naming the file, if the user of `identity` could not reach one of `files`. A kernel without Landlock
/// is no error, but logged.
pub fn confine(mode: Mode, identity: Option<&Identity>, files: &[Rule]) -> Result<Confinement> {
    check_one_thread()?;
    let mut done = Vec::new();
    std::env::set_current_dir(WORKING_FOLDER).context(|| format!("enter {WORKING_FOLDER}"))?;
    if let Some(identity) = identity {
        identity.become_it(files)?;
        done.push(format!("user {identity}"));
    }
    identity::drop_capabilities(files)?;
    // A change of the user makes a process dumpable again, as far as the system's settings go.
    harden()?;
    harden_children()?;
    match mode {
        Mode::Off => done.push("no system call filter".into()),
        Mode::Log => {
            calls::filter(Mode::Log)?;
            done.push("forbidden system calls are logged, not refused".into());
        }
        Mode::On => {
            done.push(files::restrict(files, false)?);
            violation::report()?;
            calls::filter(Mode::On)?;
            done.push("seccomp".into());
        }
    }
    Ok(Confinement(done))
}

/// Gives up what a carrier does not need, which brings ciphertext to another place and has no key: it reaches
/// `files` and no other, makes the calls that this takes, starts no program, and has no `network` unless that
/// is said. Otherwise as [`confine`].
///
/// # Errors
/// As for [`confine`].
pub(crate) fn confine_carrier(files: &[Rule], network: bool) -> Result<Confinement> {
    check_one_thread()?;
    std::env::set_current_dir(WORKING_FOLDER).context(|| format!("enter {WORKING_FOLDER}"))?;
    identity::drop_capabilities(files)?;
    harden()?;
    harden_children()?;
    let landlock = files::restrict(files, network)?;
    violation::report()?;
    calls::filter_carrier(network)?;
    Ok(Confinement(vec![landlock, "seccomp".into()]))
}

/// Gives up what a dialler does not need, which connects to servers on this machine and has neither key nor
/// data: it opens no file, starts no program, and makes no sockets but those of this machine. It stays able
/// to connect to `sockets`, as far as permissions go. Otherwise as [`confine`].
///
/// # Errors
/// As for [`confine`].
pub(crate) fn confine_dialler(sockets: &[Rule]) -> Result<Confinement> {
    check_one_thread()?;
    std::env::set_current_dir("/").context(|| "enter /")?;
    identity::drop_capabilities(sockets)?;
    harden()?;
    harden_children()?;
    let landlock = files::restrict(&[], false)?;
    violation::report()?;
    calls::filter_dialler()?;
    Ok(Confinement(vec![landlock, "seccomp".into()]))
}

/// Gives up what a fetcher does not need, which writes into layers that it has open, and has keys that prove
/// what it writes: it reaches `files` and no other, starts no program, makes no socket, and has no io_uring.
/// Otherwise as [`confine`].
///
/// # Errors
/// As for [`confine`].
pub(crate) fn confine_fetcher(files: &[Rule]) -> Result<Confinement> {
    check_one_thread()?;
    std::env::set_current_dir("/").context(|| "enter /")?;
    identity::drop_capabilities(files)?;
    harden()?;
    harden_children()?;
    let landlock = files::restrict(files, false)?;
    violation::report()?;
    calls::filter_fetcher()?;
    Ok(Confinement(vec![landlock, "seccomp".into()]))
}

/// Gives up what a stranger's library does not need, before it is loaded: the process reaches `files`
/// and no other, and starts no program. Without `network` it has none, and no socket of this machine. A
/// call that it may not make fails; the process does not end by it, since a library may do without.
/// Otherwise as [`confine`].
///
/// # Errors
/// As for [`confine`].
pub(crate) fn confine_module(files: &[Rule], network: bool) -> Result<()> {
    check_one_thread()?;
    std::env::set_current_dir("/").context(|| "enter /")?;
    identity::drop_capabilities(files)?;
    harden()?;
    harden_children()?;
    files::restrict(files, network)?;
    calls::filter_module(network)
}

/// Gives up what a keeper of an RBD image does not need: it reaches `files` and no other, and starts no
/// program. It stays able to have children, which are confined like it, and further by [`confine_module`].
///
/// # Errors
/// As for [`confine`].
pub(crate) fn confine_keeper(files: &[Rule]) -> Result<()> {
    check_one_thread()?;
    std::env::set_current_dir("/").context(|| "enter /")?;
    identity::drop_capabilities(files)?;
    harden()?;
    harden_children()?;
    files::restrict(files, true)?;
    calls::filter_programs()
}

/// Takes the network from this process, and from those that it starts, for good: it has keys from now on, or
/// what follows from them. Sockets that are open stay so.
///
/// # Errors
/// `Unsupported` where the kernel, or the container that this runs in, refuses the filter.
pub(crate) fn give_up_network() -> Result<()> {
    harden_children()?;
    calls::filter_network()
}

/// Landlock's rules are for the thread that asks for them and its children.
fn check_one_thread() -> Result<()> {
    match std::fs::read_dir("/proc/self/task").context(|| "count the threads")?.count() {
        1 => Ok(()),
        _ => Err(Error::new(Kind::Other, "the process has several threads already and cannot be confined")),
    }
}

/// Ends the process with a word if memory that it shares is taken away (SIGBUS): the VMM has truncated a file
/// that could not be sealed, or somebody has truncated a layer on a memory file system. Nothing can be saved
/// then; the kernel clears secret memory as it frees it. The key is not wiped here: another thread would
/// encrypt with what is left of it.
pub fn report_lost_memory() -> Result<()> {
    const MESSAGE: &[u8] =
        b"sealblk: a file in shared memory was truncated, the VMM's or a layer on tmpfs (SIGBUS); the volume \
          is detached\n";
    let action = || {
        // Standard error may be closed; the exit code says the same.
        let _ = nix::unistd::write(std::io::stderr(), MESSAGE);
        signal_hook::low_level::exit(Kind::Other.exit_code().into());
    };
    // SAFETY: the action calls write and _exit alone, which are async-signal-safe; it takes no lock and
    // allocates nothing (`stderr()` is a handle without state, and its descriptor a constant).
    unsafe { signal_hook::low_level::register(signal_hook::consts::SIGBUS, action) }
        .context(|| "handle the loss of shared memory")?;
    Ok(())
}
