//! Flushes of one ring that share one of the disk's.
//!
//! A flush covers the writes that had completed when it was asked for. So one that is asked for while
//! the disk is at one waits for the next, never for the running one, which may have begun before those
//! writes were complete; and all that wait share that next one. It is begun at the end of a turn, when
//! everybody of that turn is in.
//!
//! Rings do not share: each has the layer open by itself and is told of failed write-back by itself, and to
//! wake another ring's thread costs more than a flush that finds nothing left to do.

/// Who waits for a flush, by slot.
#[derive(Default)]
pub(super) struct Flushes {
    /// For the one that the disk has.
    running: Vec<u16>,
    /// For the next.
    waiting: Vec<u16>,
}

impl Flushes {
    /// The request in `slot` wants a flush that begins after this.
    pub(super) fn ask(&mut self, slot: u16) {
        self.waiting.push(slot);
    }

    /// Whether a flush is to be begun now. Then everybody who waits is for this one.
    pub(super) fn begin(&mut self) -> bool {
        if !self.running.is_empty() || self.waiting.is_empty() {
            return false;
        }
        std::mem::swap(&mut self.running, &mut self.waiting);
        true
    }

    /// The flush that was begun is over: whom it was for, until there is none left.
    pub(super) fn take_done(&mut self) -> Option<u16> {
        self.running.pop()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn done(flushes: &mut Flushes) -> Vec<u16> {
        let mut slots: Vec<_> = std::iter::from_fn(|| flushes.take_done()).collect();
        slots.sort_unstable();
        slots
    }

    #[test]
    fn those_who_wait_share_the_next_and_never_the_running_one() {
        let mut flushes = Flushes::default();
        assert!(!flushes.begin(), "nobody asked");
        flushes.ask(1);
        flushes.ask(2);
        assert!(flushes.begin());
        flushes.ask(3);
        flushes.ask(4);
        assert!(!flushes.begin(), "one runs");
        assert_eq!(done(&mut flushes), [1, 2]);
        assert!(flushes.begin());
        assert_eq!(done(&mut flushes), [3, 4]);
        assert!(!flushes.begin());
    }
}
