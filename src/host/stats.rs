//! What a host process has counted of its volume.
#![forbid(unsafe_code)]

use crate::host::status::Status;
use crate::vhost::queue::counters::{Counters, Latencies, QueueStats};
use crate::vhost::queue::qos::Limits;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// What a host process has counted since the attach. It is a claim, as everything that comes from there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// How long ago the counters were at zero: the attach.
    pub since_ns: u64,
    /// The limits that are in force.
    pub limits: LimitsInForce,
    /// What the process says of itself; none while all queues stand still.
    pub status: Option<Status>,
    /// Each queue.
    pub queues: Vec<QueueStats>,
    /// How long requests took, of all queues together.
    pub latencies: Latencies,
}

/// The limits of a volume that are in force. Zero means no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LimitsInForce {
    /// Requests a second.
    pub iops: u64,
    /// Bytes a second.
    pub throughput: u64,
    /// How many milliseconds' worth of them an idle volume saves up.
    pub burst_ms: u64,
}

impl Stats {
    /// What these queues have counted.
    pub(super) fn of<'a>(
        counters: impl Iterator<Item = &'a Counters>,
        since: Duration,
        limits: Limits,
        status: Option<Status>,
    ) -> Self {
        let limits = LimitsInForce {
            iops: limits.iops,
            throughput: limits.throughput,
            burst_ms: limits.burst.as_millis() as u64,
        };
        let (mut queues, mut latencies) = (Vec::new(), Latencies::default());
        for counters in counters {
            queues.push(counters.read());
            latencies.add(&counters.latencies());
        }
        let since_ns = since.as_nanos() as u64;
        Stats { since_ns, limits, status, queues, latencies }
    }

    /// All queues together. The oldest request is that of all, and so is the longest pause; a queue that is
    /// paused pauses all.
    pub fn total(&self) -> QueueStats {
        let mut total = QueueStats::default();
        for queue in &self.queues {
            total.add(queue);
        }
        total
    }
}
