//! The installed binary takes an attached volume over from the process that serves it
//! ([`crate::host::upgrade`]): guest and VMM notice a short pause at most, and no KMS is asked.

use crate::base::child;
use crate::base::{Context, Error, Kind, Result, printable};
use crate::catalog::VolumeId;
use crate::host::control;
use crate::host::upgrade::{COMMAND, Outcome};
use crate::ops::Store;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::time::Duration;

/// How long the process that serves the volume may take to show that it has it.
const PATIENCE: Duration = Duration::from_secs(60);
/// The longest line in bytes that says how it went.
const MAX_LINE: u64 = 64 << 10;

/// A volume that another process serves now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Upgraded {
    /// The volume.
    pub volume: VolumeId,
    /// The process that serves it now.
    pub pid: u32,
    /// The version of the process that has served it before.
    pub from: String,
    /// How long the guest's requests stood still; `None` where no VMM is connected.
    pub pause: Option<Duration>,
}

/// Has this program, in a process of its own, take `volume` over from the process that serves it.
///
/// # Errors
/// `NotFound` if the volume is not attached; `Unsupported` if the two versions cannot hand over to each
/// other; whatever else is in the way. The process serves the volume then that did before.
pub fn upgrade(store: &Store, volume: VolumeId) -> Result<Upgraded> {
    let attempt = || format!("upgrade {volume}");
    let client = control::connect(&store.catalog(), volume, PATIENCE).context(attempt)?;
    let mut program = Command::new("/proc/self/exe");
    child::pass_general(&mut program);
    program
        .arg("--root")
        .arg(store.root().path())
        // How much it says is decided by the process that it takes over from.
        .arg("-vvv")
        .arg(COMMAND)
        .arg(volume.to_string())
        .stdin(Stdio::from(OwnedFd::from(client)))
        .stdout(Stdio::piped());
    let started = child::spawn_orphan(&mut program);
    let started = started.context(|| "start the process that is to serve the volume")?;
    let mut said = String::new();
    if let Some(out) = started.stdout {
        out.take(MAX_LINE).read_to_string(&mut said).context(attempt)?;
    }
    match serde_json::from_str(&said) {
        Ok(Outcome::Taken { pid, from, pause_us }) => {
            let (from, pause) = (printable::line(&from).into_owned(), pause_us.map(Duration::from_micros));
            Ok(Upgraded { volume, pid, from, pause })
        }
        Ok(Outcome::Failed { kind, message }) => {
            Err(Error::new(Kind::from_name(&kind), printable::line(&message)))
        }
        Err(_) => {
            let message = "the process that was to serve it ended without a word";
            Err(Error::new(Kind::Other, message).context(attempt()))
        }
    }
}

/// The volumes that are attached on this host, by id.
///
/// # Errors
/// Those of the file system.
pub fn attached(store: &Store) -> Result<Vec<VolumeId>> {
    let catalog = store.catalog();
    let mut attached = Vec::new();
    for volume in catalog.ids()? {
        if catalog.held(volume)?.attached().is_some_and(|holder| holder.is_on_this_host()) {
            attached.push(volume);
        }
    }
    Ok(attached)
}
