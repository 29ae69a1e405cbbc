//! What is refused to those who have no right to it, in the audit log: the first few requests of each
//! principal one by one, the rest as a count.
//!
//! A count is written when its time is over, whenever it has grown tenfold, and when the server is told to
//! end. A server that is killed loses at most what came since; that so much was refused has been said before.
//! Like every record of the KMS's it is chained and has a MAC.

use crate::base::sync::Locked;
use crate::base::{Context, Result};
use crate::kms::embedded::Embedded;
use crate::kms::embedded::audit::Refused;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// For so long what one principal is refused is counted together.
const PERIOD: Duration = Duration::from_secs(300);
/// How many refusals have a record of their own in that time.
const ONE_BY_ONE: u64 = 10;

/// What each principal was refused lately.
#[derive(Default)]
pub(super) struct Refusals(Mutex<BTreeMap<String, Period>>);

struct Period {
    since: Instant,
    recorded: u64,
    /// By operation and code: how many have no record of their own, since the last count was written.
    counted: BTreeMap<(String, &'static str), u64>,
    /// All that were counted in this period.
    total: u64,
}

impl Refusals {
    /// Whether what `principal` was refused now gets a record of its own. It is counted otherwise.
    pub(super) fn is_worth_a_record(
        &self,
        kms: &Embedded,
        principal: &str,
        operation: &str,
        code: &'static str,
    ) -> bool {
        let mut all = self.all();
        if all.get(principal).is_some_and(|period| period.since.elapsed() >= PERIOD) {
            end(kms, &mut all, principal);
        }
        let begin = || Period { since: Instant::now(), recorded: 0, counted: BTreeMap::new(), total: 0 };
        let period = all.entry(principal.to_owned()).or_insert_with(begin);
        if period.recorded < ONE_BY_ONE {
            period.recorded += 1;
            return true;
        }
        *period.counted.entry((operation.to_owned(), code)).or_default() += 1;
        period.total += 1;
        if is_power_of_ten(period.total) {
            tell(kms, principal, period);
        }
        false
    }

    /// Writes the counts whose time is over, or all.
    fn tell_counts(&self, kms: &Embedded, all_of_them: bool) {
        let mut all = self.all();
        let over = all.iter().filter(|(_, period)| all_of_them || period.since.elapsed() >= PERIOD);
        let over: Vec<String> = over.map(|(principal, _)| principal.clone()).collect();
        over.iter().for_each(|principal| end(kms, &mut all, principal));
    }

    fn all(&self) -> MutexGuard<'_, BTreeMap<String, Period>> {
        // Counts are whole whenever the lock is let go of.
        self.0.locked()
    }
}

/// Writes what was counted, and begins anew if that could be done.
fn end(kms: &Embedded, all: &mut BTreeMap<String, Period>, principal: &str) {
    if all.get_mut(principal).is_some_and(|period| tell(kms, principal, period)) {
        all.remove(principal);
    }
}

/// Writes what was counted since the last time; what could not be written is kept for the next.
fn tell(kms: &Embedded, principal: &str, period: &mut Period) -> bool {
    if period.counted.is_empty() {
        return true;
    }
    let seconds = period.since.elapsed().as_secs();
    match kms.record_refusals(&Refused { principal, seconds, counted: &period.counted }) {
        Ok(()) => period.counted.clear(),
        Err(e) => log::error!("how often {principal} was refused could not be recorded: {e}"),
    }
    period.counted.is_empty()
}

fn is_power_of_ten(n: u64) -> bool {
    n > 1 && 10u64.checked_pow(n.ilog10()).is_some_and(|power| power == n)
}

/// Has counts written when their time is over, and before the process ends at SIGTERM or SIGINT.
///
/// # Errors
/// The system's, which gives no thread or no signals.
pub(super) fn tell_in_time(kms: &Arc<Embedded>, refusals: &Arc<Refusals>) -> Result<()> {
    let attempt = || "write down what was refused";
    let (of_time, time) = (kms.clone(), refusals.clone());
    let in_time = move || {
        loop {
            std::thread::sleep(PERIOD);
            time.tell_counts(&of_time, false);
        }
    };
    std::thread::Builder::new().name("refusals".into()).spawn(in_time).context(attempt)?;
    let mut signals = Signals::new([SIGINT, SIGTERM]).context(attempt)?;
    let (kms, refusals) = (kms.clone(), refusals.clone());
    let at_end = move || {
        for signal in &mut signals {
            refusals.tell_counts(&kms, true);
            // The one thing that a handler of ours has kept it from.
            let _ = signal_hook::low_level::emulate_default_handler(signal);
        }
    };
    std::thread::Builder::new().name("signals".into()).spawn(at_end).context(attempt)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn powers_of_ten_are_told() {
        let told: Vec<u64> = (0..=100_000).filter(|n| is_power_of_ten(*n)).collect();
        assert_eq!(told, [10, 100, 1000, 10_000, 100_000]);
        assert!(!is_power_of_ten(u64::MAX));
    }
}
