//! Whether what was written can still be made durable.
//!
//! The kernel tells of a write-back that failed once, and forgets the data. So a flush that failed may have
//! lost writes for good that had completed, and a later one that succeeds says nothing about them: after the
//! first that failed none is reported as a success, for as long as the volume is attached.
#![forbid(unsafe_code)]

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// Who wants to hear of the first failure.
type Hear = Box<dyn Fn(&io::Error) + Send + Sync>;

/// Of one volume, for all of its queues, and for the disks that take each other's place while it is served.
#[derive(Default)]
pub(super) struct Durability {
    has_failed: AtomicBool,
    hear: OnceLock<Hear>,
}

impl Durability {
    /// Has `hear` called when a flush fails first. Only the first who asks for it is told.
    pub(super) fn hear(&self, hear: Hear) {
        let _ = self.hear.set(hear);
    }

    /// Whether a flush has failed.
    pub(super) fn has_failed(&self) -> bool {
        self.has_failed.load(Ordering::Acquire)
    }

    /// A flush has failed.
    pub(super) fn fail(&self, e: &io::Error) {
        if self.has_failed.swap(true, Ordering::AcqRel) {
            return;
        }
        log::error!("a flush failed: {e}; what was written before may be lost, and {WAY_OUT}");
        if let Some(hear) = self.hear.get() {
            hear(e);
        }
    }

    /// The error of a flush after one that failed.
    pub(super) fn refusal() -> io::Error {
        io::Error::other(format!("an earlier flush failed, and {WAY_OUT}"))
    }
}

const WAY_OUT: &str = "no flush succeeds until the volume is detached and attached again; check the disk \
                       that it lies on and, in the guest, its file systems";

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[test]
    fn the_first_failure_is_told_once_and_never_forgotten() {
        let (durability, told) = (Durability::default(), Arc::new(Mutex::new(Vec::new())));
        let list = told.clone();
        durability.hear(Box::new(move |e| list.lock().unwrap().push(e.to_string())));
        assert!(!durability.has_failed());
        for what in ["first", "second"] {
            durability.fail(&io::Error::other(what));
            assert!(durability.has_failed());
        }
        assert_eq!(*told.lock().unwrap(), ["first"]);
        assert!(Durability::refusal().to_string().contains("attached again"));
    }
}
