//! Who can change a volume at this moment: this process, which takes it, or the process that has it attached.
//!
//! The volume's lock decides: either it was taken, or whoever has it is to be asked.

use crate::base::{Error, Kind, Result};
use crate::catalog::lock::{Held, Holder, Purpose, VolumeLock};
use crate::catalog::{Catalog, VolumeId};

/// How many times a volume is taken again that was attached, and is not any more.
const TRIES: u32 = 10;

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
        let take = || {
            let holder = Holder::this_process(purpose, None)?;
            VolumeLock::acquire_in_turn(&catalog.folder(volume), volume, &holder)
        };
        for _ in 0..TRIES {
            match take() {
                Ok(lock) => return Ok(Reach::Mine(lock)),
                Err(e) if e.kind() != Kind::Busy => return Err(e),
                Err(busy) => match catalog.held(volume)? {
                    Held::By(Holder { purpose: Purpose::Attach, .. }) => return Ok(Reach::Host),
                    Held::Free => {}
                    Held::By(_) | Held::Elsewhere(_) | Held::Unknown => return Err(busy),
                },
            }
        }
        take().map(Reach::Mine)
    }
}

/// # Errors
/// `Unsupported` for an attached volume of a store in a pool, whose host process cannot make an image.
pub(super) fn check_can_have_new_image(catalog: &Catalog, volume: VolumeId) -> Result<()> {
    let Some(pooled) = catalog.root().pool() else { return Ok(()) };
    let message = format!(
        "{volume} is attached, and the process that serves it can make no image in {}: that is not there \
         yet; detach it, do this, and attach it again",
        pooled.shown
    );
    Err(Error::new(Kind::Unsupported, message))
}

/// Whether a process has the volume attached now; a moment later that may be otherwise.
pub fn is_attached(catalog: &Catalog, volume: VolumeId) -> Result<bool> {
    Ok(catalog.held(volume)?.attached().is_some())
}
