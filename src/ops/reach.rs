//! Who can change a volume at this moment: this process, which takes it, or the process that has it attached.
//!
//! The volume's lock decides: either it was taken, or whoever has it is to be asked.

use crate::base::{Kind, Result};
use crate::catalog::lock::{Held, Holder, Purpose, VolumeLock};
use crate::catalog::{Catalog, VolumeId};
use std::time::{Duration, Instant};

/// How long another command is waited for that has a volume for a moment only.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often to look whether it has let go: nothing tells.
const LOOK: Duration = Duration::from_millis(20);

/// Who can change a volume.
pub enum Reach {
    /// This process: nobody has the volume attached, and nobody else can take it while the lock lives.
    Mine(VolumeLock),
    /// The process that has the volume attached: it listens on its control socket.
    Host,
}

impl Reach {
    /// Takes the volume for `purpose`, unless it is attached. A command that has it for a
    /// moment is waited for.
    ///
    /// # Errors
    /// `Busy`, naming the holder, if another command has the volume for longer; `NotFound`.
    pub fn of(catalog: &Catalog, volume: VolumeId, purpose: Purpose) -> Result<Self> {
        let until = Instant::now() + PATIENCE;
        loop {
            let holder = Holder::this_process(purpose, None)?;
            let busy = match VolumeLock::acquire(&catalog.folder(volume), volume, &holder) {
                Ok(lock) => return Ok(Reach::Mine(lock)),
                Err(e) if e.kind() == Kind::Busy => e,
                Err(e) => return Err(e),
            };
            match catalog.held(volume)? {
                Held::By(Holder { purpose: Purpose::Attach, .. }) => return Ok(Reach::Host),
                Held::By(holder) if !is_brief(holder.purpose) => return Err(busy),
                _ if Instant::now() >= until => return Err(busy),
                _ => std::thread::sleep(LOOK),
            }
        }
    }
}

/// Whether a command has a volume no longer than it takes to write a record and to ask a KMS.
fn is_brief(purpose: Purpose) -> bool {
    match purpose {
        Purpose::Create | Purpose::Snapshot | Purpose::Resize | Purpose::Recover | Purpose::Rewrap => true,
        Purpose::Attach | Purpose::Delete | Purpose::Export | Purpose::Hydrate => false,
    }
}

/// Whether a process has the volume attached now; a moment later that may be otherwise.
pub fn is_attached(catalog: &Catalog, volume: VolumeId) -> Result<bool> {
    Ok(matches!(catalog.held(volume)?, Held::By(Holder { purpose: Purpose::Attach, .. })))
}
