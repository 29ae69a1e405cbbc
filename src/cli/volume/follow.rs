//! Waiting until a volume's lower layers have left its chain: watching its host process do it, or doing it.

use crate::base::hardened::Hardened;
use crate::base::{Context, Error, Kind, Result};
use crate::catalog::lock::{Held, Holder, Purpose};
use crate::catalog::{Catalog, Metadata, VolumeId};
use crate::cli::meter::Meter;
use crate::host::control;
use crate::ops::flatten;
use std::time::Duration;

/// How often a host process is asked how far it has come.
const ASK: Duration = Duration::from_millis(500);

/// How it came to its end.
pub struct Followed {
    /// What is known of the volume then.
    pub volume: Metadata,
    /// Whether this process did the last part.
    pub done_here: bool,
}

/// Returns when nothing is to be copied up any more. Of a volume that nobody has
/// attached this process does it, at `rate` bytes a second (0: no limit). Says on a terminal how far it has come.
///
/// # Errors
/// As for [`flatten::complete`].
pub fn follow(catalog: &Catalog, volume: VolumeId, rate: u64, hardened: Hardened) -> Result<Followed> {
    let mut meter = Meter::new();
    let is_attached =
        || Ok::<_, Error>(matches!(catalog.held(volume)?, Held::By(Holder { purpose: Purpose::Attach, .. })));
    loop {
        let metadata = catalog.load(volume)?;
        if metadata.layout().leaving() == 0 {
            meter.clear();
            catalog.clear_left(volume)?;
            return Ok(Followed { volume: metadata, done_here: false });
        }
        if is_attached()? {
            // It may be let go of at any moment.
            if let Ok(status) = control::status(catalog, volume) {
                status.hydration.iter().for_each(|progress| meter.show(progress));
            }
            std::thread::sleep(ASK);
            continue;
        }
        match flatten::complete(catalog, volume, rate, hardened, &mut |progress| meter.show(progress)) {
            Err(e) if e.kind() == Kind::Busy && is_attached()? => {}
            done => {
                meter.clear();
                let volume = done.context(|| format!("copy up the lower layers of {volume}"))?;
                return Ok(Followed { volume, done_here: true });
            }
        }
    }
}
