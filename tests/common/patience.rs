//! How long a test waits before it gives up: the only place where that is decided.
//!
//! A test waits for what it is about, never for a time. A limit is there so that a fault ends a test, instead
//! of holding it up for ever; so it is far longer than what it limits takes, and a slow machine gets more.
//! How slow this one is, is measured once in each test program. `SEALBLK_TEST_PATIENCE` is a factor besides,
//! for a machine that gets slower later: 10 makes every limit ten times as long. A limit that is reached says
//! what was waited for and what was there.

use std::fmt::Display;
use std::hint::black_box;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// For a process, a request, an answer, all of which take milliseconds.
const LIMIT: Duration = Duration::from_secs(120);
/// For a command in an emulated guest, which takes seconds.
const GUEST_LIMIT: Duration = Duration::from_secs(1200);
/// What a slow machine gets more, at most: what is measured may be a moment's hiccup.
const SLOWEST: f64 = 5.0;

/// What every limit is multiplied by.
static FACTOR: LazyLock<f64> = LazyLock::new(|| given() * slowness());

/// The longest wait for a process, a request or an answer.
pub fn limit() -> Duration {
    LIMIT.mul_f64(*FACTOR)
}

/// The longest wait for what an emulated guest does: its boot, or a command.
pub fn guest_limit() -> Duration {
    GUEST_LIMIT.mul_f64(*FACTOR)
}

fn given() -> f64 {
    let Ok(text) = std::env::var("SEALBLK_TEST_PATIENCE") else { return 1.0 };
    let factor = text.parse().ok().filter(|factor| (0.01..=1000.0).contains(factor));
    factor.unwrap_or_else(|| panic!("SEALBLK_TEST_PATIENCE is a factor from 0.01 to 1000, not {text:?}"))
}

/// How many times as long as an idle core of 3 GHz this machine takes now for the same work; at least 1.
fn slowness() -> f64 {
    /// What that core takes, in seconds: a multiplication and an addition take four cycles.
    const USUAL: f64 = 0.02;
    let begun = Instant::now();
    let mut number = 1_u64;
    for _ in 0..15_000_000 {
        number = black_box(number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1));
    }
    (begun.elapsed().as_secs_f64() / USUAL).clamp(1.0, SLOWEST)
}

/// The end of a wait.
#[derive(Clone, Copy)]
pub struct Deadline {
    at: Instant,
    limit: Duration,
}

impl Deadline {
    /// After `limit`, from now on.
    pub fn after(limit: Duration) -> Self {
        Deadline { at: Instant::now() + limit, limit }
    }

    /// What is left of the time; zero when it is over.
    pub fn left(&self) -> Duration {
        self.at.saturating_duration_since(Instant::now())
    }

    /// Fails the test when the time is over. `found` tells what is there instead of `what`.
    #[track_caller]
    pub fn check<F: Display>(&self, what: &str, found: impl FnOnce() -> F) {
        if self.left().is_zero() {
            panic!("waited {:?} for this: {what}; there was: {}", self.limit, found());
        }
    }
}

/// Sets what other threads of a test go on until, at the latest when the test fails: it waits for their end.
pub struct AtEnd<'a>(pub &'a AtomicBool);

impl Drop for AtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Looks until `look` finds what is waited for, which nothing announces; `look` tells what it finds instead.
#[track_caller]
pub fn wait_for<T, F: Display>(what: &str, look: impl FnMut() -> Result<T, F>) -> T {
    wait_for_within(limit(), what, look)
}

/// As [`wait_for`], with a limit of its own.
#[track_caller]
pub fn wait_for_within<T, F: Display>(
    limit: Duration,
    what: &str,
    mut look: impl FnMut() -> Result<T, F>,
) -> T {
    let deadline = Deadline::after(limit);
    let mut pause = Duration::from_micros(500);
    loop {
        match look() {
            Ok(found) => return found,
            Err(found) => deadline.check(what, || found),
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}
