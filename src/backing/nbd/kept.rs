//! What was written and is not durable yet.
//!
//! A server that is killed loses what it had in memory, and it had completed that. So what it has completed
//! is kept until a flush that was sent later has succeeded, and written again, in the same order, when the
//! server comes back. Nobody is told of a loss then, since there is none.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

/// Bytes that are kept at most before the server is asked to make them durable, whoever else asks.
pub(super) const ENOUGH: usize = 32 << 20;
/// Bytes from which on nothing more is written until that is done.
pub(super) const TOO_MUCH: usize = 2 * ENOUGH;
/// What an entry costs beside its bytes.
const OVERHEAD: usize = 128;

/// What a write brings.
#[derive(Clone, Debug)]
pub(super) enum Content {
    Bytes(Arc<Vec<u8>>),
    /// Zeros, in so many bytes, and whether their space stays allocated.
    Zeros {
        len: u32,
        keep_space: bool,
    },
}

/// A write that is complete.
#[derive(Clone, Debug)]
pub(super) struct Write {
    pub(super) offset: u64,
    pub(super) content: Content,
}

impl Write {
    pub(super) fn range(&self) -> Range<u64> {
        let len = match &self.content {
            Content::Bytes(bytes) => bytes.len() as u64,
            Content::Zeros { len, .. } => u64::from(*len),
        };
        self.offset..self.offset + len
    }

    pub(super) fn len(&self) -> u32 {
        // No buffer is longer, nor a part that becomes zeros.
        (self.range().end - self.offset) as u32
    }

    fn cost(&self) -> usize {
        let bytes = if let Content::Bytes(bytes) = &self.content { bytes.len() } else { 0 };
        bytes + OVERHEAD
    }
}

/// How far the writes have come: those before it had completed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Mark(u64);

/// Complete writes that are not durable yet, in the order in which they completed.
#[derive(Default)]
pub(super) struct Kept {
    writes: VecDeque<Write>,
    /// How many have been dropped before the first of them.
    dropped: u64,
    cost: usize,
}

impl Kept {
    /// Keeps a write that has completed.
    pub(super) fn push(&mut self, write: Write) {
        self.cost += write.cost();
        self.writes.push_back(write);
    }

    /// Where the writes are now: what a flush that is sent now makes durable.
    pub(super) fn mark(&self) -> Mark {
        Mark(self.dropped + self.writes.len() as u64)
    }

    /// Everything before `mark` is durable.
    pub(super) fn is_durable(&mut self, mark: Mark) {
        while self.dropped < mark.0 {
            let Some(write) = self.writes.pop_front() else { return };
            self.cost -= write.cost();
            self.dropped += 1;
        }
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        self.is_durable(self.mark());
    }

    /// The `n`-th of them.
    pub(super) fn get(&self, n: usize) -> Option<&Write> {
        self.writes.get(n)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.writes.is_empty()
    }

    /// Bytes of memory.
    pub(super) fn cost(&self) -> usize {
        self.cost
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(offset: u64) -> Write {
        Write { offset, content: Content::Bytes(Arc::new(vec![1; 512])) }
    }

    #[test]
    fn a_flush_makes_durable_what_had_completed_when_it_was_sent() {
        let mut kept = Kept::default();
        kept.push(write(0));
        kept.push(Write { offset: 512, content: Content::Zeros { len: 1 << 20, keep_space: false } });
        assert_eq!(kept.cost(), 512 + 2 * OVERHEAD);
        let mark = kept.mark();
        kept.push(write(1024));
        kept.is_durable(mark);
        assert_eq!(kept.get(0).map(Write::range), Some(1024..1536));
        assert!(kept.get(1).is_none());
        // A flush that was sent sooner and answered later changes nothing.
        kept.is_durable(mark);
        assert_eq!(kept.cost(), 512 + OVERHEAD);
        kept.clear();
        assert!(kept.is_empty() && kept.cost() == 0);
        kept.push(write(0));
        kept.is_durable(mark);
        assert!(!kept.is_empty());
    }
}
