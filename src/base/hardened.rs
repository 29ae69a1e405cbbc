//! What every command gives up before it does anything else: it leaves no core file, and nobody but root may
//! read its memory or attach a debugger. Some commands see keys, and a list of those that do would be
//! forgotten for the next one.
//!
//! [`Hardened`] is the proof. Whatever opens the KMS's store, asks a KMS, reads a passphrase or unwraps a
//! data key takes one, so that it cannot be called by a process that has not hardened itself.

use crate::base::{Context, Result};
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Proof that this process has hardened itself. Nobody else makes one.
#[derive(Clone, Copy, Debug)]
pub struct Hardened(());

/// Leaves no core file from now on, and lets nobody attach a debugger or read the memory, except root. Doing
/// it again changes nothing.
///
/// # Errors
/// The kernel's, which refuses neither to anybody.
pub fn harden() -> Result<Hardened> {
    prctl::set_dumpable(false).context(|| "switch core dumps off")?;
    let attempt = || "limit core files to nothing";
    let (_, most) = getrlimit(Resource::RLIMIT_CORE).context(attempt)?;
    setrlimit(Resource::RLIMIT_CORE, 0, most).context(attempt)?;
    Ok(Hardened(()))
}

/// As [`harden`], for good, and for what this process executes as well: no program that it executes leaves a
/// core file, or gains privileges. Not for a process that starts programs of its user's, which may need to.
///
/// # Errors
/// The kernel's.
pub fn harden_children() -> Result<()> {
    setrlimit(Resource::RLIMIT_CORE, 0, 0).context(|| "limit core files to nothing")?;
    prctl::set_no_new_privs().context(|| "give up new privileges")
}
