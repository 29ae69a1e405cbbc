//! What a host process says of itself and of its volume.

use crate::backing::coming;
use crate::base::Timestamp;
use crate::kms::KmsKey;
use crate::vhost::queue::qos::Limits;
use serde::{Deserialize, Serialize};

/// What a host process says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// How the layer is reached, and by which cipher engine.
    pub access: String,
    /// Whether it refuses writes.
    pub read_only: bool,
    /// Which KMS keys its data keys were unwrapped by, in the order of the volume's keys.
    pub unwrapped_by: Vec<KmsKey>,
    /// How far it has come with copying up what lower layers hold, if it does.
    #[serde(default)]
    pub hydration: Option<Progress>,
    /// A flush has failed: writes may be lost, and no flush succeeds any more.
    #[serde(default)]
    pub flush_failed: bool,
    /// Requests that failed for want of space, if any did.
    #[serde(default)]
    pub no_space: Option<Refusals>,
    /// The limits in force.
    #[serde(default)]
    pub limits: Option<InForce>,
    /// How far its layers have come of which not everything was there when this process
    /// began, if there are any.
    #[serde(default)]
    pub coming: Option<Coming>,
}

/// How far layers have come from the place of a snapshot that was pulled lazily.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Coming {
    /// Bytes that have come, in blocks of 512 KiB, and proved right.
    pub come: u64,
    /// Bytes that come in all.
    pub all: u64,
    /// Why nothing comes at the moment, if nothing does.
    pub away: Option<String>,
    /// Reads that wait at the moment for what has not come.
    pub waiting: u64,
    /// Reads that have failed, since what they needed did not come, or was not right.
    pub failed: u64,
}

impl From<coming::Summary> for Coming {
    fn from(coming::Summary { come, all, away, waiting, failed }: coming::Summary) -> Self {
        let bytes = |blocks: u64| blocks.saturating_mul(coming::BLOCK);
        Coming { come: bytes(come), all: bytes(all), away, waiting, failed }
    }
}

/// Limits on a volume's requests that are in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InForce {
    /// Requests a second; 0: no limit.
    pub iops: u64,
    /// Bytes a second; 0: no limit.
    pub throughput: u64,
    /// For how many milliseconds' worth of them an idle volume saves up.
    pub burst_ms: u64,
}

impl From<Limits> for InForce {
    fn from(Limits { iops, throughput, burst }: Limits) -> Self {
        InForce { iops, throughput, burst_ms: u64::try_from(burst.as_millis()).unwrap_or(u64::MAX) }
    }
}

/// Requests of the guest's that failed for want of space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Refusals {
    /// How many, since the volume is attached.
    pub requests: u64,
    /// When the last one did.
    pub last: Timestamp,
}

/// How far a hydration has come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress {
    /// How many bytes of the volume may still be in leaving layers alone; `None` until that is known.
    pub left: Option<u64>,
    /// At most so many bytes a second are copied; 0: no limit.
    pub rate: u64,
    /// What went wrong last, if it did not go on since.
    pub problem: Option<String>,
    /// Whether that is only that it waits for space.
    #[serde(default)]
    pub waits_for_space: bool,
    /// What it leaves free of the file system, in bytes, where somebody has said so.
    #[serde(default)]
    pub reserve: Option<u64>,
}
