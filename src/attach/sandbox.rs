//! What a process that sees a data key gives up before it does.

use crate::error::{Context, Kind, Result};
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};

/// Leaves no core file and lets nobody attach a debugger or read the memory (but root), and gains no privileges
/// by what it executes. For the host process and the unwrap helper, before either has a key.
pub fn harden() -> Result<()> {
    prctl::set_dumpable(false).context(|| "switch core dumps off")?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0).context(|| "limit core files to nothing")?;
    prctl::set_no_new_privs().context(|| "give up new privileges")
}

/// Ends the process with a word if memory that it shares is taken away (SIGBUS): the VMM has truncated a file that could
/// not be sealed, or somebody has truncated a layer on a memory file system. Nothing can be saved then; the kernel clears secret memory as it frees it. The key is
/// not wiped here: another thread would encrypt with what is left of it.
pub fn report_lost_memory() -> Result<()> {
    const MESSAGE: &[u8] =
        b"sealblk: a file in shared memory was truncated, the VMM's or a layer on tmpfs (SIGBUS); the volume is detached\n";
    let action = || {
        // Standard error may be closed; the exit code says the same.
        let _ = nix::unistd::write(std::io::stderr(), MESSAGE);
        signal_hook::low_level::exit(Kind::Other.exit_code().into());
    };
    // SAFETY: the action calls write and _exit alone, which are async-signal-safe; it takes no lock and allocates
    // nothing (`stderr()` is a handle without state, and its descriptor a constant).
    unsafe { signal_hook::low_level::register(signal_hook::consts::SIGBUS, action) }
        .context(|| "handle the loss of shared memory")?;
    Ok(())
}
