//! Used entries in the order in which chains were taken.

use std::collections::VecDeque;

/// Answers that wait for older ones.
pub(super) struct InOrder {
    /// Heads in the order in which they were taken.
    taken: VecDeque<u16>,
    /// By head: how many bytes are ours, once it is done.
    done: Vec<Option<u32>>,
}

impl InOrder {
    pub(super) fn new(size: u16) -> Self {
        InOrder { taken: VecDeque::with_capacity(size.into()), done: vec![None; size.into()] }
    }

    pub(super) fn taken(&mut self, head: u16) {
        self.taken.push_back(head);
    }

    pub(super) fn done(&mut self, head: u16, written: u32) {
        self.done[usize::from(head)] = Some(written);
    }

    /// The oldest chain, if it is done.
    pub(super) fn next(&mut self) -> Option<(u16, u32)> {
        let &head = self.taken.front()?;
        let written = self.done[usize::from(head)].take()?;
        self.taken.pop_front();
        Some((head, written))
    }
}
