//! Requests of a guest that failed for want of space below.
//!
//! A guest is told "I/O error", and goes on or does not. Whoever can make space is told here: at once
//! when the first request fails, and of those that follow by their number, once in a while. What
//! succeeds costs nothing for it.
#![forbid(unsafe_code)]

use crate::base::Timestamp;
use crate::base::space::is_for_space;
use crate::base::sync::Locked;
use std::io;
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

/// How long after one report there is no other.
const QUIET: Duration = Duration::from_secs(600);

/// Who wants to hear of them: how many there are since the last report.
type Hear = Box<dyn Fn(u64, &io::Error) + Send + Sync>;

/// Of one volume, for all of its queues, and for the disks that take each other's place while it is served.
#[derive(Default)]
pub(super) struct Refusals {
    known: Mutex<Known>,
    hear: OnceLock<Hear>,
}

#[derive(Default)]
struct Known {
    count: u64,
    last: Option<Timestamp>,
    /// When there was a report, and how many there had been by then.
    told: Option<(Instant, u64)>,
}

impl Refusals {
    /// Has `hear` called. Only the first who asks for it is told.
    pub(super) fn hear(&self, hear: Hear) {
        let _ = self.hear.set(hear);
    }

    /// How many there were, and when the last one was.
    pub(super) fn known(&self) -> Option<(u64, Timestamp)> {
        let known = self.known.locked();
        known.last.map(|last| (known.count, last))
    }

    /// A request has failed.
    pub(super) fn note(&self, e: &io::Error) {
        if is_for_space(e) {
            self.note_at(e, Instant::now());
        }
    }

    fn note_at(&self, e: &io::Error, now: Instant) {
        let mut known = self.known.locked();
        known.count += 1;
        known.last = Some(Timestamp::now());
        if known.told.is_some_and(|(at, _)| now.saturating_duration_since(at) < QUIET) {
            return;
        }
        let count = known.count;
        let before = known.told.replace((now, count)).map_or(0, |(_, before)| before);
        let more = count - before;
        drop(known);
        if let Some(hear) = self.hear.get() {
            hear(more, e);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn the_first_is_told_at_once_and_the_others_by_their_number() {
        let (refusals, told) = (Refusals::default(), Arc::new(Mutex::new(Vec::new())));
        let list = told.clone();
        refusals.hear(Box::new(move |more, _| list.locked().push(more)));
        let full = io::Error::from_raw_os_error(libc::ENOSPC);
        refusals.note(&io::Error::from_raw_os_error(libc::EIO));
        assert_eq!(refusals.known(), None, "that is another matter");
        let begun = Instant::now();
        for n in 0..100 {
            refusals.note_at(&full, begun + n * QUIET / 50);
        }
        refusals.note_at(&io::Error::from_raw_os_error(libc::EDQUOT), begun + 5 * QUIET);
        assert_eq!(*told.locked(), [1, 50, 50]);
        assert_eq!(refusals.known().map(|(count, _)| count), Some(101));
    }
}
