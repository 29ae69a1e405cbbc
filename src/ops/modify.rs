//! Changing what is kept with a volume for its attaches: limits, serial, queues.
//!
//! Limits of an attached volume take force at once as well; a serial and a number of queues with its next
//! attach, since a guest sees them when it starts.
#![forbid(unsafe_code)]

use super::Store;
use crate::base::{Context, Error, Kind, Result};
use crate::catalog::VolumeId;
use crate::catalog::attach_settings::AttachSettings;
use crate::events::Event;
use crate::host::control;
use crate::vhost::queue::qos::Limits;
use std::time::Duration;

/// What an attach saves up of its limits where nothing is said.
pub const DEFAULT_BURST: Duration = Duration::from_secs(1);

/// What was changed.
pub struct Modified {
    /// What is kept with the volume now.
    pub settings: AttachSettings,
    /// Whether other limits are in force now, of a volume that is attached.
    pub in_force: bool,
    /// Whether something waits for the next attach of a volume that is attached.
    pub at_next_attach: bool,
}

/// Changes what is kept with a volume, and puts other limits in force if it is attached. Other limits are
/// reported by `modifyVolume` events.
///
/// # Errors
/// That of `change`; `Usage` for what no attach could take; `Corrupt` for what commands of this host have not
/// set. Nothing is changed then. An error from an attached volume's process says that the rest is done.
pub fn modify(
    store: &Store,
    id: VolumeId,
    change: impl FnOnce(&mut AttachSettings) -> Result<()>,
) -> Result<Modified> {
    let attempt = || format!("modify {id}");
    let (catalog, events) = (store.catalog(), store.events());
    let mut before = AttachSettings::default();
    let settings = catalog.change_attach_settings(id, |settings| {
        before = settings.clone();
        change(settings)
    });
    let settings = settings.context(attempt)?;
    let has_other_limits = limits(&before) != limits(&settings);
    let is_of_next = before.serial != settings.serial || before.queues != settings.queues;
    let mut modified = Modified { settings, in_force: false, at_next_attach: false };
    if has_other_limits {
        let throttled = control::throttle(&catalog, id, limits(&modified.settings));
        modified.in_force = match throttled {
            Ok(()) => true,
            Err(e) if e.kind() == Kind::NotFound => false,
            Err(e) => return Err(kept_all_the_same(e).context(attempt())),
        };
        for step in ["modifying", "optimizing", "completed"] {
            events.record(&Event::modify_volume(id, step));
        }
    }
    modified.at_next_attach = is_of_next && super::reach::is_attached(&catalog, id)?;
    Ok(modified)
}

fn kept_all_the_same(e: Error) -> Error {
    let message = format!("it is kept for the next attach, but not in force now: {e}");
    e.reworded(message)
}

/// The limits that an attach has where its arguments say nothing.
pub fn limits(settings: &AttachSettings) -> Limits {
    Limits {
        iops: settings.iops.unwrap_or(0),
        throughput: settings.throughput.unwrap_or(0),
        burst: settings.burst_ms.map_or(DEFAULT_BURST, Duration::from_millis),
    }
}
