//! What a process that sees a data key gives up before it does.

use crate::error::{Context, Result};
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};

/// Leaves no core file and lets nobody attach a debugger or read the memory (but root), and gains no privileges
/// by what it executes. For the host process and the unwrap helper, before either has a key.
pub fn harden() -> Result<()> {
    prctl::set_dumpable(false).context(|| "switch core dumps off")?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0).context(|| "limit core files to nothing")?;
    prctl::set_no_new_privs().context(|| "give up new privileges")
}
