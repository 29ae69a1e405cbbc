//! How long the cipher takes, measured in a few of all transfers, so that it costs next to nothing.
#![forbid(unsafe_code)]

use std::cell::Cell;
use std::time::{Duration, Instant};

/// One transfer of so many is measured. A prime number, so that it is not always the same one of a driver's
/// batch.
pub const EVERY: u32 = 61;

/// What was measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Measured {
    /// Transfers.
    pub samples: u64,
    /// Their bytes.
    pub bytes: u64,
    /// The time that they took between guest memory and ciphertext.
    pub time: Duration,
}

/// One thread's measurements.
#[derive(Default)]
pub(super) struct CipherTime {
    left: Cell<u32>,
    measured: Cell<Measured>,
}

impl CipherTime {
    /// Does `f`, which encrypts or decrypts so many bytes, and measures it if its turn has come.
    #[inline]
    pub(super) fn of<T>(&self, bytes: usize, f: impl FnOnce() -> T) -> T {
        match self.left.get().checked_sub(1) {
            Some(left) => {
                self.left.set(left);
                f()
            }
            None => self.measure(bytes, f),
        }
    }

    fn measure<T>(&self, bytes: usize, f: impl FnOnce() -> T) -> T {
        self.left.set(EVERY - 1);
        let begun = Instant::now();
        let done = f();
        let time = begun.elapsed();
        let Measured { samples, bytes: before, time: sum } = self.measured.get();
        self.measured.set(Measured { samples: samples + 1, bytes: before + bytes as u64, time: sum + time });
        done
    }

    /// What was measured since the last call, if anything was.
    #[inline]
    pub(super) fn take(&self) -> Option<Measured> {
        let any = self.measured.get().samples > 0;
        any.then(|| self.measured.take())
    }
}
