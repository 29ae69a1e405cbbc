//! What threads wait for each other with. Under the feature `model` these are loom's, which tries the ways in
//! which the threads can take turns; the code that uses them is the same.

#[cfg(not(all(test, feature = "model")))]
pub(super) use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
#[cfg(not(all(test, feature = "model")))]
pub(super) use std::sync::{Condvar, Mutex, MutexGuard};

#[cfg(all(test, feature = "model"))]
pub(super) use loom::sync::{Condvar, Mutex, MutexGuard};
#[cfg(all(test, feature = "model"))]
pub(super) use one_answer::{Receiver, SyncSender, sync_channel};

/// `std::sync::mpsc` for the one message that is sent here, since loom's does not know that a sender can go.
#[cfg(all(test, feature = "model"))]
mod one_answer {
    use super::{Condvar, Mutex};
    use std::sync::Arc;
    use std::sync::mpsc::{RecvError, RecvTimeoutError, SendError};
    use std::time::Duration;

    enum Place<T> {
        Empty,
        Filled(T),
        Gone,
    }

    struct Shared<T> {
        place: Mutex<Place<T>>,
        news: Condvar,
    }

    pub(crate) struct SyncSender<T>(Arc<Shared<T>>);

    pub(crate) struct Receiver<T>(Arc<Shared<T>>);

    pub(crate) fn sync_channel<T>(_bound: usize) -> (SyncSender<T>, Receiver<T>) {
        let shared = Arc::new(Shared { place: Mutex::new(Place::Empty), news: Condvar::new() });
        (SyncSender(shared.clone()), Receiver(shared))
    }

    impl<T> SyncSender<T> {
        pub(crate) fn send(&self, message: T) -> Result<(), SendError<T>> {
            *self.0.place.lock().unwrap() = Place::Filled(message);
            self.0.news.notify_one();
            Ok(())
        }
    }

    impl<T> Drop for SyncSender<T> {
        fn drop(&mut self) {
            let mut place = self.0.place.lock().unwrap();
            if matches!(*place, Place::Empty) {
                *place = Place::Gone;
                self.0.news.notify_one();
            }
        }
    }

    impl<T> Receiver<T> {
        pub(crate) fn recv(&self) -> Result<T, RecvError> {
            let mut place = self.0.place.lock().unwrap();
            loop {
                match std::mem::replace(&mut *place, Place::Gone) {
                    Place::Filled(message) => return Ok(message),
                    Place::Gone => return Err(RecvError),
                    Place::Empty => {
                        *place = Place::Empty;
                        place = self.0.news.wait(place).unwrap();
                    }
                }
            }
        }

        /// Waits as long as it takes: there is no time in the model.
        pub(crate) fn recv_timeout(&self, _limit: Duration) -> Result<T, RecvTimeoutError> {
            self.recv().map_err(|_| RecvTimeoutError::Disconnected)
        }
    }
}
