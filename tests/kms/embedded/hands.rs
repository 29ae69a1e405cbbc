//! A clock whose hands a test moves.

use sealblk::kms::embedded::clock::{Clock, Moment};
use std::sync::{Arc, Mutex};
use uuid::Uuid;

/// Milliseconds.
pub const DAY: i64 = 24 * 3_600_000;

/// A clock that a test sets.
#[derive(Clone)]
pub struct Hands(Arc<Mutex<Moment>>);

impl Hands {
    pub fn new() -> Self {
        Hands(Arc::new(Mutex::new(Moment { wall: 20_000 * DAY, boot: Some(Uuid::from_u128(1)), up: DAY })))
    }

    pub fn pass(&self, ms: i64) {
        let mut now = self.0.lock().unwrap();
        now.wall += ms;
        now.up += ms;
    }

    pub fn jump(&self, ms: i64) {
        self.0.lock().unwrap().wall += ms;
    }

    pub fn reboot(&self) {
        let mut now = self.0.lock().unwrap();
        now.boot = Some(Uuid::new_v4());
        now.up = 0;
    }
}

impl Clock for Hands {
    fn now(&self) -> Moment {
        self.0.lock().unwrap().clone()
    }
}
