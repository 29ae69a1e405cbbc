//! How long a KMS that does not answer is asked again, and what is said meanwhile.
//!
//! Only what a later try may put right is tried again: Unavailable, Throttled, Transport. The process's
//! signals keep their default meaning while it waits, so that SIGINT and SIGTERM end it at once.

use crate::kms::KmsError;
use std::time::{Duration, Instant};
use time::OffsetDateTime;
use time::macros::format_description;

/// The longest that one try may take.
const TRY_MAX: Duration = Duration::from_secs(15);
/// What one try has at least, also when patience ends.
const TRY_MIN: Duration = Duration::from_secs(3);
/// The first pause between two tries, and the longest; each is up to twice the one before.
const PAUSE_FIRST: Duration = Duration::from_millis(200);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// For how long a call is tried again after it began. With none at all it is tried once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience(pub Duration);

impl Patience {
    /// The longest that a call can take: the last try begins before patience ends.
    pub fn longest_call(self) -> Duration {
        self.0 + TRY_MAX
    }

    /// Calls `attempt`, with the time that it has, until it succeeds, fails for good, or patience ends;
    /// returns the last try's outcome.
    pub fn call<T>(self, mut attempt: impl FnMut(Duration) -> Result<T, KmsError>) -> Result<T, KmsError> {
        let until = Instant::now() + self.0;
        let mut pauses = Pauses { next: PAUSE_FIRST };
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let time = if self.0.is_zero() { TRY_MAX } else { left.clamp(TRY_MIN, TRY_MAX) };
            let problem = match attempt(time) {
                Err(e @ (KmsError::Unavailable(_) | KmsError::Throttled(_) | KmsError::Transport(_))) => e,
                outcome => return outcome,
            };
            let (pause, left) = (pauses.next(), until.saturating_duration_since(Instant::now()));
            if pause >= left {
                return Err(problem);
            }
            log::warn!("{}; will retry until {}", told(&problem), clock(left));
            std::thread::sleep(pause);
        }
    }
}

/// What the reader is told meanwhile. Why a KMS was not reached is our own sentence; the
/// rest are the KMS's words.
fn told(problem: &KmsError) -> String {
    match problem {
        KmsError::Transport(sentence) => sentence.clone(),
        other => format!("the KMS answered {}: {other}", other.type_name()),
    }
}

/// Pauses that grow, each of a random length between half of what it could be and all of it, so that many
/// hosts do not come back at the same moment.
struct Pauses {
    next: Duration,
}

impl Pauses {
    fn next(&mut self) -> Duration {
        let pause = self.next;
        self.next = (pause * 2).min(PAUSE_MAX);
        // Without randomness it is the longest, which is as good for one host.
        let share = getrandom::u32().map_or(1.0, |n| 0.5 + f64::from(n) / f64::from(u32::MAX) / 2.0);
        pause.mul_f64(share)
    }
}

/// The time of day after `left`, in UTC.
fn clock(left: Duration) -> String {
    let then = OffsetDateTime::now_utc() + left;
    then.format(format_description!("[hour]:[minute]:[second]Z"))
        .unwrap_or_else(|_| format!("{left:?} from now"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Patience = Patience(Duration::from_secs(600));

    fn fails_with(error: KmsError, patience: Patience, times: usize) -> (Result<usize, KmsError>, usize) {
        let mut tries = 0;
        let outcome = patience.call(|_| {
            tries += 1;
            if tries <= times { Err(error.clone()) } else { Ok(tries) }
        });
        (outcome, tries)
    }

    #[test]
    fn what_may_pass_is_tried_again() {
        for error in [KmsError::Unavailable, KmsError::Throttled, KmsError::Transport] {
            assert_eq!(fails_with(error("later".into()), LONG, 1), (Ok(2), 2));
        }
    }

    #[test]
    fn what_will_not_pass_is_not() {
        for error in [
            KmsError::Disabled("x".into()),
            KmsError::AccessDenied("x".into()),
            KmsError::InvalidCiphertext,
            KmsError::Internal("x".into()),
            KmsError::NotFound("x".into()),
        ] {
            assert_eq!(fails_with(error.clone(), LONG, 9), (Err(error), 1));
        }
    }

    #[test]
    fn the_last_word_is_the_kmss_own() {
        let error = KmsError::Throttled("Rate exceeded".into());
        assert_eq!(fails_with(error.clone(), Patience(Duration::ZERO), 9), (Err(error.clone()), 1));
        // Long enough for another try, on any machine.
        for patience in (9..).map(|power| Patience(Duration::from_millis(1 << power))) {
            let (outcome, tries) = fails_with(error.clone(), patience, usize::MAX);
            assert_eq!(outcome, Err(error.clone()));
            if tries > 1 {
                break;
            }
            assert!(patience.0 < LONG.0, "it is never tried again");
        }
    }

    #[test]
    fn pauses_grow_to_a_bound_and_differ() {
        let lengths = |mut pauses: Pauses| (0..20).map(|_| pauses.next()).collect::<Vec<_>>();
        let (one, other) = (lengths(Pauses { next: PAUSE_FIRST }), lengths(Pauses { next: PAUSE_FIRST }));
        assert_ne!(one, other);
        assert!(one.iter().all(|p| (PAUSE_FIRST / 2..=PAUSE_MAX).contains(p)));
        assert!(one[10..].iter().all(|p| *p >= PAUSE_MAX / 2), "{one:?}");
    }
}
