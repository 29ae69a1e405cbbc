//! When the waiting window of a key that is to be deleted has really passed.
//!
//! Pure. Deleting too late costs nothing, since the key cannot be used while it waits; deleting too
//! early costs everything that it wraps. So a wall clock that says the window is over is believed
//! only with a second witness:
//!
//! - in the boot in which the deletion was asked for: the time since boot, which nobody can set, must have
//!   advanced by the window too;
//! - after a reboot: the wall clock must still say so a day after it was first seen to say so; a day of
//!   running time if there was no reboot meanwhile.

use crate::kms::embedded::clock::Moment;
use crate::kms::embedded::records::Deletion;

const HOUR: i64 = 3_600_000;
const DAY: i64 = 24 * HOUR;

/// What is to be done about a key that waits for deletion.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing yet.
    Wait,
    /// Write down that the window was seen to be over.
    Saw,
    /// Take that back: the clock had been wrong.
    Unsaw,
    /// Delete it.
    Delete,
}

impl Deletion {
    /// A deletion asked for at `moment` of a store whose last record has `time`, after `days`.
    ///
    /// The window begins at the later of both: if the clock has fallen back, it must not end too early.
    pub fn ask(days: u32, moment: &Moment, time: i64) -> Self {
        Deletion {
            days,
            at: time.max(moment.wall) + i64::from(days) * DAY,
            asked: moment.clone(),
            seen: None,
        }
    }

    /// Judges at `now`.
    pub fn judge(&self, now: &Moment) -> Verdict {
        if now.wall < self.at {
            return if self.seen.is_some() { Verdict::Unsaw } else { Verdict::Wait };
        }
        if let Some(elapsed) = now.since_in_one_boot(&self.asked) {
            // An hour: what a wall clock that is disciplined by NTP may drift from the kernel's in 30 days.
            let over = elapsed >= i64::from(self.days) * DAY - HOUR;
            return if over { Verdict::Delete } else { Verdict::Wait };
        }
        let Some(seen) = &self.seen else {
            return Verdict::Saw;
        };
        let since = now.since_in_one_boot(seen).unwrap_or(now.wall - seen.wall);
        if since >= DAY { Verdict::Delete } else { Verdict::Wait }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    fn moment(boot: u128, wall_days: i64, up_hours: i64) -> Moment {
        Moment { wall: wall_days * DAY, boot: Some(Uuid::from_u128(boot)), up: up_hours * HOUR }
    }

    fn asked() -> Deletion {
        Deletion::ask(7, &moment(1, 100, 10), 0)
    }

    #[test]
    fn in_one_boot_both_clocks_must_agree() {
        let deletion = asked();
        assert_eq!(deletion.at, 107 * DAY);
        assert_eq!(deletion.judge(&moment(1, 106, 10 + 6 * 24)), Verdict::Wait);
        assert_eq!(deletion.judge(&moment(1, 107, 10 + 7 * 24)), Verdict::Delete);
        assert_eq!(deletion.judge(&moment(1, 5000, 11)), Verdict::Wait, "the clock was set ahead");
        assert_eq!(deletion.judge(&moment(1, 106, 10 + 900 * 24)), Verdict::Wait, "the clock was set back");
    }

    #[test]
    fn after_a_reboot_the_clock_must_say_so_for_a_day() {
        let mut deletion = asked();
        assert_eq!(deletion.judge(&moment(2, 106, 1)), Verdict::Wait);
        assert_eq!(deletion.judge(&moment(2, 107, 1)), Verdict::Saw);
        deletion.seen = Some(moment(2, 107, 1));
        assert_eq!(deletion.judge(&moment(2, 5000, 24)), Verdict::Wait, "23 hours of running");
        assert_eq!(deletion.judge(&moment(2, 108, 25)), Verdict::Delete);
        assert_eq!(deletion.judge(&moment(3, 107, 90)), Verdict::Wait, "another boot on the same day");
        assert_eq!(deletion.judge(&moment(3, 108, 1)), Verdict::Delete);
        assert_eq!(deletion.judge(&moment(2, 50, 90)), Verdict::Unsaw, "the clock was set right");
    }

    #[test]
    fn without_a_boot_id_only_the_wall_clock_witnesses() {
        let blind = |wall| Moment { wall, boot: None, up: 0 };
        let mut deletion = Deletion::ask(30, &blind(DAY), 0);
        assert_eq!(deletion.judge(&blind(31 * DAY)), Verdict::Saw);
        deletion.seen = Some(blind(31 * DAY));
        assert_eq!(deletion.judge(&blind(32 * DAY - 1)), Verdict::Wait);
        assert_eq!(deletion.judge(&blind(32 * DAY)), Verdict::Delete);
    }

    #[test]
    fn a_clock_that_fell_back_does_not_shorten_the_window() {
        let deletion = Deletion::ask(7, &moment(1, 0, 1), 100 * DAY);
        assert_eq!(deletion.at, 107 * DAY);
        assert_eq!(deletion.judge(&moment(2, 100, 1)), Verdict::Wait);
    }
}
