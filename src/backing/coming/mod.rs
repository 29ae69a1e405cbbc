//! Layers of which not everything is there yet: what has come, and who waits for the rest.
//!
//! A snapshot that was pulled lazily is there before its data. Another process, the fetcher, brings blocks
//! into the layer's file, each proved before it is written, and says which are there. Only then are they
//! read: a [`Queue`](super::Queue) over such a layer holds reads of other blocks back until then
//! ([`queue`]), and asks for them. What was not said to be there is never read, whatever the file holds.
//!
//! A process has one [`Coming`] for each such layer, whichever way and however often it is opened. Without a
//! fetcher, every read of it is an error.
#![forbid(unsafe_code)]

mod queue;

pub(super) use queue::ComingQueue;

use crate::base::sync::Locked;
use nix::sys::eventfd::EventFd;
use std::collections::{HashMap, HashSet};
use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::Duration;

/// What comes at a time, in bytes of the layer; the last one may be shorter.
pub const BLOCK: u64 = 512 << 10;

/// How long a read waits for what does not come, if nobody says.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The layers of this process that are still coming, by their ids.
static ALL: Mutex<Vec<([u8; 16], Arc<Coming>)>> = Mutex::new(Vec::new());
/// In milliseconds.
static PATIENCE_MS: AtomicU64 = AtomicU64::new(PATIENCE.as_millis() as u64);
/// Reads that have failed since they waited too long, or since what came was not right.
static FAILED: AtomicU64 = AtomicU64::new(0);
/// Why nothing comes at the moment, if nothing does.
static AWAY: Mutex<Option<String>> = Mutex::new(None);

/// Says how long reads wait from now on for what does not come.
pub fn set_patience(patience: Duration) {
    PATIENCE_MS.store(patience.as_millis() as u64, Relaxed);
}

fn patience() -> Duration {
    Duration::from_millis(PATIENCE_MS.load(Relaxed))
}

/// Says why nothing comes at the moment; none: it does.
pub fn set_away(why: Option<String>) {
    *AWAY.locked() = why;
}

/// Whether nothing comes at the moment.
pub fn is_away() -> bool {
    AWAY.locked().is_some()
}

/// How far the layers of this process have come that were still coming when it began.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Blocks that have come, and proved right.
    pub come: u64,
    /// Blocks that were to come.
    pub all: u64,
    /// Why nothing comes at the moment, if nothing does.
    pub away: Option<String>,
    /// Reads that wait at the moment.
    pub waiting: u64,
    /// Reads that have failed.
    pub failed: u64,
}

/// How far they have come; none if nothing was to come.
pub fn summary() -> Option<Summary> {
    let all = ALL.locked();
    let begun: Vec<_> = all.iter().filter(|(_, it)| it.data.get().is_some()).collect();
    if begun.is_empty() {
        return None;
    }
    let mut sum =
        Summary { come: 0, all: 0, away: AWAY.locked().clone(), waiting: 0, failed: FAILED.load(Relaxed) };
    for (_, coming) in begun {
        let data = coming.data.get().map_or(&[][..], |data| data);
        for (wanted, here) in data.iter().zip(&coming.here) {
            sum.all += u64::from(wanted.count_ones());
            sum.come += u64::from((wanted & here.load(Relaxed)).count_ones());
        }
        sum.waiting += coming
            .wakers
            .locked()
            .iter()
            .filter_map(Weak::upgrade)
            .map(|it| it.waiting() as u64)
            .sum::<u64>();
    }
    Some(sum)
}

/// The layer of this id, of `size` bytes, which is still coming.
pub fn of(id: &[u8; 16], size: u64) -> Arc<Coming> {
    let mut all = ALL.locked();
    match all.iter().find(|(known, coming)| known == id && coming.size == size) {
        Some((_, coming)) => coming.clone(),
        None => {
            let coming = Arc::new(Coming::new(size));
            all.push((*id, coming.clone()));
            coming
        }
    }
}

/// What asks for a block by its number; without one, it is told that somebody waits, and is to see to it that
/// [`Coming::tick`] is called now and then until nobody does.
pub type Ask = Box<dyn Fn(Option<u64>) + Send + Sync>;

/// A layer that is still coming.
pub struct Coming {
    size: u64,
    /// One bit for each block of which nothing more is to come.
    here: Box<[AtomicU64]>,
    /// Whether all of it is here.
    is_whole: AtomicBool,
    /// One bit for each block that was still to come when the fetcher began. Nothing is in the others.
    data: OnceLock<Box<[u64]>>,
    ask: OnceLock<Ask>,
    /// Why nobody brings anything any more.
    ended: Mutex<Option<String>>,
    /// Blocks that were asked for and have not come.
    asked: Mutex<HashSet<u64>>,
    /// Blocks that cannot be had as they should be, and why: until they are asked for again.
    refused: Mutex<HashMap<u64, String>>,
    wakers: Mutex<Vec<Weak<Waker>>>,
}

/// What wakes a queue.
struct Waker {
    fd: EventFd,
    waiting: AtomicUsize,
}

impl Waker {
    fn waiting(&self) -> usize {
        self.waiting.load(SeqCst)
    }
}

impl Coming {
    fn new(size: u64) -> Self {
        let words = size.div_ceil(BLOCK).div_ceil(64);
        Coming {
            size,
            here: (0..words).map(|_| AtomicU64::new(0)).collect(),
            is_whole: false.into(),
            data: OnceLock::new(),
            ask: OnceLock::new(),
            ended: Mutex::default(),
            asked: Mutex::default(),
            refused: Mutex::default(),
            wakers: Mutex::default(),
        }
    }

    /// What asks for blocks, from now on. Blocks that are not here yet are all that the layer has.
    pub fn begin(&self, ask: Ask) {
        let words = self.here.iter().enumerate().map(|(n, word)| {
            let blocks = self.blocks().saturating_sub(n as u64 * 64).min(64);
            let there_are = if blocks == 64 { u64::MAX } else { (1 << blocks) - 1 };
            !word.load(SeqCst) & there_are
        });
        let _ = self.data.set(words.collect());
        let _ = self.ask.set(ask);
    }

    fn blocks(&self) -> u64 {
        self.size.div_ceil(BLOCK)
    }

    /// Nothing more is to come of these blocks, of those that there are: they are in the file, and right.
    pub fn note_here(&self, blocks: Range<u64>) {
        let mut at = blocks.start.min(self.blocks());
        let end = blocks.end.min(self.blocks());
        while at < end {
            let next = (at / 64 * 64 + 64).min(end);
            let bits = if next - at == 64 { u64::MAX } else { ((1 << (next - at)) - 1) << (at % 64) };
            self.here[(at / 64) as usize].fetch_or(bits, SeqCst);
            at = next;
        }
        {
            let mut asked = self.asked.locked();
            if !asked.is_empty() {
                asked.retain(|block| !blocks.contains(block));
            }
        }
        self.wake();
    }

    /// Everything is here.
    pub fn note_whole(&self) {
        self.note_here(0..self.blocks());
        self.is_whole.store(true, SeqCst);
    }

    /// Whether everything was said to be here.
    pub fn is_all_here(&self) -> bool {
        self.is_whole.load(SeqCst)
    }

    /// Whether nothing is to come any more: everything is here, or nobody brings the rest.
    pub fn is_over(&self) -> bool {
        self.is_all_here() || self.ended.locked().is_some()
    }

    /// Asks once more for what was asked for and has not come.
    pub fn ask_again(&self) {
        let asked: Vec<u64> = self.asked.locked().iter().copied().collect();
        if let Some(ask) = self.ask.get() {
            asked.into_iter().for_each(|block| ask(Some(block)));
        }
    }

    /// A block cannot be had as it should be. Who waits for it hears of it; who comes later asks again.
    pub fn refuse(&self, block: u64, why: String) {
        self.refused.locked().insert(block, why);
        self.asked.locked().remove(&block);
        self.wake();
    }

    /// Nobody brings anything any more.
    pub fn end(&self, why: &str) {
        *self.ended.locked() = Some(why.to_owned());
        self.wake();
    }

    /// Whether everything of these bytes is here.
    pub fn has(&self, bytes: &Range<u64>) -> bool {
        self.is_whole.load(Relaxed) || self.missing(bytes).next().is_none()
    }

    /// Blocks of these bytes that are not here.
    fn missing(&self, bytes: &Range<u64>) -> impl Iterator<Item = u64> + '_ {
        let blocks = bytes.start / BLOCK..bytes.end.div_ceil(BLOCK).min(self.blocks());
        blocks.filter(|block| self.here[(block / 64) as usize].load(SeqCst) >> (block % 64) & 1 == 0)
    }

    /// Asks for what is not here of these bytes.
    ///
    /// # Errors
    /// That nobody could bring it.
    fn ask_for(&self, bytes: &Range<u64>) -> io::Result<()> {
        if let Some(why) = self.ended.locked().as_ref() {
            return Err(io::Error::other(why.clone()));
        }
        let Some(ask) = self.ask.get() else {
            let message = "a layer is still coming from a place, and this process brings nothing: \"sealblk \
                           snapshot complete\" does";
            return Err(io::Error::other(message));
        };
        for block in self.missing(bytes) {
            self.refused.locked().remove(&block);
            if self.asked.locked().insert(block) {
                ask(Some(block));
            }
        }
        ask(None);
        Ok(())
    }

    /// Why what is missing of these bytes is not to be waited for any longer, if it is not.
    fn problem(&self, bytes: &Range<u64>) -> Option<String> {
        if let Some(why) = self.ended.locked().as_ref() {
            return Some(why.clone());
        }
        let refused = self.refused.locked();
        if refused.is_empty() {
            return None;
        }
        self.missing(bytes).find_map(|block| refused.get(&block).cloned())
    }

    /// Has those who wait look whether they have waited too long. Returns whether anybody waits.
    pub fn tick(&self) -> bool {
        self.wake()
    }

    /// Returns whether anybody waits.
    fn wake(&self) -> bool {
        let mut any = false;
        self.wakers.locked().retain(|waker| {
            let Some(waker) = waker.upgrade() else { return false };
            if waker.waiting() > 0 {
                // It can only fail when there is a wake-up already.
                let _ = waker.fd.write(1);
                any = true;
            }
            true
        });
        any
    }

    fn wakes(&self, waker: &Arc<Waker>) {
        self.wakers.locked().push(Arc::downgrade(waker));
    }

    /// The next run of bytes at or after `from` in which the layer has something, or will have.
    pub fn next_data(&self, from: u64) -> Option<Range<u64>> {
        let Some(data) = self.data.get() else { return (from < self.size).then_some(from..self.size) };
        let is_in = |block: u64| data[(block / 64) as usize] >> (block % 64) & 1 == 1;
        let first = (from / BLOCK..self.blocks()).find(|&block| is_in(block))?;
        let end = (first..self.blocks()).find(|&block| !is_in(block)).unwrap_or(self.blocks());
        Some(from.max(first * BLOCK)..(end * BLOCK).min(self.size))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_here_is_known_block_by_block() {
        let coming = Coming::new(200 * BLOCK - 5);
        assert!(!coming.has(&(0..1)) && coming.next_data(7) == Some(7..200 * BLOCK - 5));
        coming.note_here(0..3);
        coming.note_here(63..66);
        coming.note_here(199..400);
        let asked: Arc<Mutex<Vec<u64>>> = Arc::default();
        assert!(coming.ask_for(&(0..10 * BLOCK)).is_err(), "nobody brings it");
        let told = asked.clone();
        coming.begin(Box::new(move |block| told.locked().extend(block)));
        assert!(coming.has(&(0..3 * BLOCK)) && !coming.has(&(0..3 * BLOCK + 1)));
        assert!(coming.has(&(63 * BLOCK..66 * BLOCK)) && !coming.has(&(62 * BLOCK..66 * BLOCK)));
        assert!(coming.has(&(199 * BLOCK..200 * BLOCK)));
        assert_eq!(coming.next_data(0), Some(3 * BLOCK..63 * BLOCK));
        assert_eq!(coming.next_data(63 * BLOCK), Some(66 * BLOCK..199 * BLOCK));
        assert_eq!(coming.next_data(199 * BLOCK), None);
        coming.ask_for(&(2 * BLOCK..5 * BLOCK)).unwrap();
        coming.ask_for(&(2 * BLOCK..5 * BLOCK)).unwrap();
        assert_eq!(*asked.locked(), [3, 4]);
        coming.note_here(3..4);
        assert_eq!(coming.next_data(0), Some(3 * BLOCK..63 * BLOCK), "it may hold something still");
        coming.note_whole();
        assert!(coming.has(&(0..200 * BLOCK)));
    }

    #[test]
    fn a_block_that_is_refused_is_asked_for_again() {
        let coming = Coming::new(10 * BLOCK);
        let asked: Arc<Mutex<Vec<u64>>> = Arc::default();
        let told = asked.clone();
        coming.begin(Box::new(move |block| told.locked().extend(block)));
        let bytes = BLOCK..2 * BLOCK;
        coming.ask_for(&bytes).unwrap();
        assert_eq!(coming.problem(&bytes), None);
        coming.refuse(1, "it is wrong".into());
        assert_eq!(coming.problem(&(0..BLOCK)), None);
        assert_eq!(coming.problem(&bytes).unwrap(), "it is wrong");
        coming.ask_for(&bytes).unwrap();
        assert_eq!(coming.problem(&bytes), None);
        assert_eq!(*asked.locked(), [1, 1]);
        coming.end("it is gone");
        assert!(coming.ask_for(&bytes).is_err() && coming.problem(&bytes).is_some());
    }
}
