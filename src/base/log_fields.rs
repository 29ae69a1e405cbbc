//! What a line of the log is about, beside its words: the volume that this process has attached, and which
//! connection of a VMM it serves. And in which form the log is written, for processes that this one starts.
#![forbid(unsafe_code)]

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

static VOLUME: OnceLock<String> = OnceLock::new();
static FORMAT: OnceLock<&'static str> = OnceLock::new();
/// How many VMMs have connected.
static CONNECTIONS: AtomicU64 = AtomicU64::new(0);
/// The one that is served now, by its number; 0: none.
static CONNECTION: AtomicU64 = AtomicU64::new(0);

/// From now on, this process has this volume attached.
pub(crate) fn is_of_volume(id: impl ToString) {
    let _ = VOLUME.set(id.to_string());
}

/// The volume that this process has attached.
pub(crate) fn volume() -> Option<&'static str> {
    VOLUME.get().map(String::as_str)
}

/// A VMM has connected, and is served.
pub(crate) fn vmm_came() {
    let number = CONNECTIONS.fetch_add(1, Ordering::Relaxed) + 1;
    CONNECTION.store(number, Ordering::Relaxed);
}

/// The VMM that had connected is served no more.
pub(crate) fn vmm_left() {
    CONNECTION.store(0, Ordering::Relaxed);
}

/// The connection that is served now: the first VMM's is 1.
pub(crate) fn connection() -> Option<u64> {
    Some(CONNECTION.load(Ordering::Relaxed)).filter(|number| *number > 0)
}

/// The queue that this thread serves: its thread is named so.
pub(crate) fn queue() -> Option<u16> {
    std::thread::current().name()?.strip_prefix("queue-")?.parse().ok()
}

/// Has processes that this one starts write their log in the form of this name.
pub(crate) fn use_format(name: &'static str) {
    let _ = FORMAT.set(name);
}

/// The name of the form that was asked for.
pub(crate) fn format() -> Option<&'static str> {
    FORMAT.get().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_s_thread_says_which_it_is() {
        let named = |name: &str| std::thread::Builder::new().name(name.into()).spawn(queue).unwrap();
        assert_eq!(named("queue-7").join().unwrap(), Some(7));
        assert_eq!(named("control").join().unwrap(), None);
    }
}
