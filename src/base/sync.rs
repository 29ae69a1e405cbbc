//! Locks between the threads of a process that do not care whether a holder panicked.
//!
//! A thread that panics while it holds a lock leaves the lock poisoned. What this program keeps behind its
//! locks is whole between any two statements: single values that are replaced, lists that are pushed to,
//! states that are set in one step. So a panic, which ends its own thread and is reported there, is no reason
//! for every other thread to end with it.

use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Locking, whoever panicked before. What is behind the lock must be whole between any two statements.
pub(crate) trait Locked<T> {
    /// Waits for the lock, and takes it.
    fn locked(&self) -> MutexGuard<'_, T>;
}

impl<T> Locked<T> for Mutex<T> {
    fn locked(&self) -> MutexGuard<'_, T> {
        self.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// As [`Locked`], for locks that several threads may read at a time.
pub(crate) trait ReadWriteLocked<T> {
    /// Waits until nobody writes, and takes the lock for reading.
    fn read_locked(&self) -> RwLockReadGuard<'_, T>;

    /// Waits until nobody else has the lock, and takes it for writing.
    fn write_locked(&self) -> RwLockWriteGuard<'_, T>;
}

impl<T> ReadWriteLocked<T> for RwLock<T> {
    fn read_locked(&self) -> RwLockReadGuard<'_, T> {
        self.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_locked(&self) -> RwLockWriteGuard<'_, T> {
        self.write().unwrap_or_else(PoisonError::into_inner)
    }
}
