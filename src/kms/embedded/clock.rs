//! The clocks that the deletion of keys is judged by.

use serde::{Deserialize, Serialize};
use std::time::{SystemTime, UNIX_EPOCH};
use uuid::Uuid;

/// A point in time by two clocks: the wall clock, which anybody may set, and the time
/// since boot, which only runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Moment {
    /// The wall clock: milliseconds since 1970.
    pub wall: i64,
    /// The kernel's id of this boot, if it tells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot: Option<Uuid>,
    /// Milliseconds since that boot, time asleep included.
    pub up: i64,
}

impl Moment {
    /// Milliseconds since `earlier` that no setting of a clock has made, if both lie in one boot.
    pub fn since_in_one_boot(&self, earlier: &Moment) -> Option<i64> {
        (self.boot.is_some() && self.boot == earlier.boot).then_some(self.up - earlier.up)
    }
}

/// Where moments come from: the machine, or a test.
pub trait Clock: Send + Sync {
    /// The moment it is.
    fn now(&self) -> Moment;
}

/// The machine's clocks.
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Moment {
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as i64);
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok();
        let up = std::fs::read_to_string("/proc/uptime").ok().and_then(|text| parse_uptime(&text));
        // A boot without its running time proves nothing, so it is not named.
        let boot = boot.and_then(|text| Uuid::try_parse(text.trim()).ok()).filter(|_| up.is_some());
        Moment { wall, boot, up: up.unwrap_or(0) }
    }
}

/// The first number of /proc/uptime, seconds with a fraction, in milliseconds.
fn parse_uptime(text: &str) -> Option<i64> {
    let seconds: f64 = text.split_whitespace().next()?.parse().ok()?;
    (seconds.is_finite() && seconds >= 0.0).then_some((seconds * 1000.0) as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_has_a_boot_and_its_time_runs() {
        let first = SystemClock.now();
        let second = SystemClock.now();
        assert!(second.since_in_one_boot(&first).is_some_and(|ms| ms >= 0));
        assert!(first.wall > 1_700_000_000_000);
        assert_eq!(parse_uptime("12.34 5.6\n"), Some(12_340));
        assert_eq!(parse_uptime("x"), None);
    }
}
