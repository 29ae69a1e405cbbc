//! Points in time as they are written everywhere in a store: UTC, whole seconds, `2026-01-31T23:59:59Z`.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::time::Duration;
use time::format_description::BorrowedFormatItem;
use time::macros::{datetime, format_description};
use time::{OffsetDateTime, PrimitiveDateTime};

const FORMAT: &[BorrowedFormatItem<'_>] =
    format_description!(version = 2, "[year]-[month]-[day]T[hour]:[minute]:[second]Z");

/// A point in time, to the second (ISO 8601, always UTC, years 0 to 9999).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Timestamp(PrimitiveDateTime);

impl Timestamp {
    /// The clock's time.
    pub fn now() -> Self {
        let now = OffsetDateTime::now_utc();
        let whole = now.replace_nanosecond(0).expect("0 is a valid nanosecond");
        Timestamp(PrimitiveDateTime::new(whole.date(), whole.time()))
    }

    /// So many seconds after 1970 began, or before; none outside of the years 0 to 9999.
    pub fn of_unix(seconds: i64) -> Option<Self> {
        let moment = OffsetDateTime::from_unix_timestamp(seconds).ok()?;
        (0..=9999)
            .contains(&moment.year())
            .then(|| Timestamp(PrimitiveDateTime::new(moment.date(), moment.time())))
    }

    /// How many seconds after 1970 began that is; negative before.
    pub fn since_epoch(self) -> i64 {
        self.0.assume_utc().unix_timestamp()
    }

    /// The moment that was `duration` ago by the clock; no earlier than the year 0.
    pub fn ago(duration: Duration) -> Self {
        let Timestamp(now) = Timestamp::now();
        let then = time::Duration::try_from(duration).ok().and_then(|duration| now.checked_sub(duration));
        Timestamp(then.unwrap_or(PrimitiveDateTime::MIN).max(datetime!(0000-01-01 0:00)))
    }

    /// Which day it is, counted from one that does not matter.
    pub(crate) fn day_number(self) -> u32 {
        self.0.date().to_julian_day().unsigned_abs()
    }

    /// Which week it is, counted from one that does not matter. Weeks begin on Mondays.
    pub(crate) fn week_number(self) -> u32 {
        // Julian day 0 was a Monday.
        self.day_number() / 7
    }

    /// The year, and the month, 1 to 12.
    pub(crate) fn month(self) -> (i32, u32) {
        (self.0.year(), u32::from(u8::from(self.0.month())))
    }

    /// How long ago that was by the clock; nothing for what is to come.
    pub fn age(self) -> Duration {
        let Timestamp(now) = Timestamp::now();
        Duration::try_from(now - self.0).unwrap_or_default()
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.format(FORMAT).map_err(|_| fmt::Error)?)
    }
}

impl From<Timestamp> for String {
    fn from(t: Timestamp) -> Self {
        t.to_string()
    }
}

impl TryFrom<String> for Timestamp {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        PrimitiveDateTime::parse(&text, FORMAT)
            .map(Timestamp)
            .map_err(|_| format!("{text:?} is not a time like 2026-01-31T23:59:59Z"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_writes_and_nothing_else() {
        let now = Timestamp::now();
        assert_eq!(Timestamp::try_from(now.to_string()), Ok(now));
        for bad in
            ["", "2026-01-31", "2026-01-31T23:59:59", "2026-01-31T23:59:59+01:00", "2026-02-30T00:00:00Z"]
        {
            assert!(Timestamp::try_from(bad.to_string()).is_err(), "{bad}");
        }
    }

    #[test]
    fn long_ago_is_still_a_time() {
        let now = Timestamp::now();
        assert!(Timestamp::ago(Duration::from_secs(60)) < now);
        assert_eq!(Timestamp::of_unix(0).unwrap().to_string(), "1970-01-01T00:00:00Z");
        assert_eq!(Timestamp::of_unix(1_800_000_000).unwrap().since_epoch(), 1_800_000_000);
        assert_eq!((Timestamp::of_unix(i64::MAX), Timestamp::of_unix(-62_167_219_201)), (None, None));
        assert_eq!(Timestamp::ago(Duration::MAX).to_string(), "0000-01-01T00:00:00Z");
    }
}
