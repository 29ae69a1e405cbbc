//! Turns at the blocks of a disk whose blocks are larger than the volume's sectors.
//!
//! Sectors that share a block with others can be written only by reading the block and writing it back.
//! Between the two nobody else may write to that block: it would be undone. So whoever writes or makes holes
//! takes a turn for the bytes first. It waits for those that took theirs before and whose bytes meet a block
//! that the one or the other reads and writes back (an *edge*). Those who write whole blocks alone do not
//! wait for one another: what becomes of requests for the same sectors is the guest's affair, as on any disk.
//!
//! Turns come in the order in which they were taken, so nobody waits for ever: who is before all others never
//! waits, and has all that it needs. The bytes are kept in lists, one for each mebibyte that shares a lock; a
//! turn that reaches over several is put into all of them before another such turn begins to be. Hence two of
//! them come in the same order everywhere, and one that is in a single list is between others in that list
//! alone: no circle of waiting can come about.
#![forbid(unsafe_code)]

use crate::base::sync::Locked;
use nix::sys::eventfd::EventFd;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

const LISTS: u64 = 64;
/// Bytes that have a list in common: more than one transfer has, so that most are in one.
const REGION: u64 = 1 << 20;

/// The turns at one layer, for all of its queues.
pub(super) struct Turns {
    lists: Box<[Mutex<Vec<Listed>>]>,
    next: AtomicU64,
    /// Held by whoever is being put into several lists.
    several: Mutex<()>,
}

struct Listed {
    number: u64,
    bytes: Range<u64>,
    edges: Edges,
    /// Whom to wake when one has gone that it waits for in this list.
    waits: Option<Arc<EventFd>>,
}

/// The offsets of the blocks that are read and written back: the first and the last, where they are.
pub(super) type Edges = [Option<u64>; 2];

/// What whoever has taken a turn holds. It must be given back.
#[derive(Debug)]
pub(super) struct Ticket {
    number: u64,
    bytes: Range<u64>,
}

impl Turns {
    pub(super) fn new() -> Self {
        Turns {
            lists: (0..LISTS).map(|_| Mutex::default()).collect(),
            next: AtomicU64::new(0),
            several: Mutex::default(),
        }
    }

    /// Takes a turn for whole blocks. Returns whether it has come; if not, `wake` is
    /// signalled when it may have.
    pub(super) fn take(&self, bytes: Range<u64>, edges: Edges, wake: &Arc<EventFd>) -> (Ticket, bool) {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let lists = lists_of(&bytes);
        let _alone = (lists.end - lists.start > 1).then(|| self.several.locked());
        let mut has_come = true;
        for list in lists {
            let mut list = self.list(list);
            let mut entry = Listed { number, bytes: bytes.clone(), edges, waits: None };
            if list.iter().any(|earlier| earlier.meets(&entry)) {
                has_come = false;
                entry.waits = Some(wake.clone());
            }
            list.push(entry);
        }
        (Ticket { number, bytes }, has_come)
    }

    /// Whether a turn has come that had not when it was taken.
    pub(super) fn has_come(&self, turn: &Ticket) -> bool {
        lists_of(&turn.bytes).all(|list| {
            let mut list = self.list(list);
            // It is there until it is given back.
            let Some(place) = list.iter().position(|entry| entry.number == turn.number) else { return true };
            let (earlier, from_it) = list.split_at_mut(place);
            let entry = &mut from_it[0];
            if entry.waits.is_some() && !earlier.iter().any(|earlier| earlier.meets(entry)) {
                entry.waits = None;
            }
            entry.waits.is_none()
        })
    }

    /// Gives a turn back, whether it had come or not.
    pub(super) fn give_back(&self, turn: Ticket) {
        for list in lists_of(&turn.bytes) {
            let mut list = self.list(list);
            let Some(place) = list.iter().position(|entry| entry.number == turn.number) else { continue };
            let gone = list.remove(place);
            for entry in list[place..].iter().filter(|entry| entry.meets(&gone)) {
                if let Some(wake) = &entry.waits
                    && let Err(e) = wake.write(1)
                {
                    log::error!("waking a queue that waits for its turn: {e}");
                }
            }
        }
    }

    fn list(&self, number: u64) -> MutexGuard<'_, Vec<Listed>> {
        self.lists[(number % LISTS) as usize].locked()
    }
}

impl Listed {
    /// Whether one of the two must wait for the other.
    fn meets(&self, other: &Listed) -> bool {
        self.has_edge_in(&other.bytes) || other.has_edge_in(&self.bytes)
    }

    fn has_edge_in(&self, bytes: &Range<u64>) -> bool {
        self.edges.iter().flatten().any(|edge| bytes.contains(edge))
    }
}

/// The lists that the bytes belong to, each once: to be taken modulo their number.
fn lists_of(bytes: &Range<u64>) -> Range<u64> {
    let first = bytes.start / REGION;
    first..bytes.end.div_ceil(REGION).min(first + LISTS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::eventfd::EfdFlags;
    use std::sync::atomic::AtomicBool;

    fn wake() -> Arc<EventFd> {
        Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap())
    }

    const NO_EDGE: Edges = [None; 2];

    #[test]
    fn whole_blocks_wait_for_edges_and_not_for_one_another() {
        let (turns, wake) = (Turns::new(), wake());
        let (whole, now) = turns.take(0..8192, NO_EDGE, &wake);
        assert!(now);
        assert!(turns.take(0..4096, NO_EDGE, &wake).1, "the same sectors are the guest's affair");
        let (edge, now) = turns.take(4096..8192, [Some(4096), None], &wake);
        assert!(!now && !turns.has_come(&edge));
        assert!(wake.read().is_err(), "nobody has gone");
        let (beside, now) = turns.take(8192..12288, [Some(8192), None], &wake);
        assert!(now, "another block");
        // One that came later waits for the edge that waits itself.
        let (later, now) = turns.take(4096..8192, NO_EDGE, &wake);
        assert!(!now);
        turns.give_back(beside);
        assert!(wake.read().is_err(), "that was in nobody's way");
        turns.give_back(whole);
        assert_eq!(wake.read().unwrap(), 1);
        assert!(turns.has_come(&edge) && !turns.has_come(&later));
        turns.give_back(edge);
        assert!(turns.has_come(&later));
    }

    #[test]
    fn a_turn_that_is_given_back_unused_lets_the_next_come() {
        let (turns, wake) = (Turns::new(), wake());
        let edge = || turns.take(0..4096, [Some(0), None], &wake);
        let ((first, _), (second, _), (third, now)) = (edge(), edge(), edge());
        assert!(!now);
        turns.give_back(second);
        assert!(!turns.has_come(&third));
        turns.give_back(first);
        assert!(turns.has_come(&third));
    }

    #[test]
    fn every_list_is_asked_once_however_long_the_bytes_are() {
        assert_eq!(lists_of(&(0..4096)), 0..1);
        assert_eq!(lists_of(&(REGION - 4096..REGION + 4096)), 0..2);
        assert_eq!(lists_of(&(3 * REGION..u64::MAX)), 3..3 + LISTS);
        let (turns, wake) = (Turns::new(), wake());
        let (all, now) = turns.take(0..1 << 50, NO_EDGE, &wake);
        assert!(now);
        for at in [0, 77 << 20, (1 << 50) - 4096] {
            let (edge, now) = turns.take(at..at + 4096, [Some(at), None], &wake);
            assert!(!now, "{at}");
            turns.give_back(edge);
        }
        turns.give_back(all);
        assert!(turns.lists.iter().all(|list| list.locked().is_empty()));
    }

    #[test]
    fn nobody_is_at_an_edge_together_and_nobody_waits_for_ever() {
        let turns = Turns::new();
        // What a block holds while somebody is at it.
        let taken: Vec<AtomicBool> = (0..8).map(|_| AtomicBool::new(false)).collect();
        std::thread::scope(|scope| {
            for n in 0..4_u64 {
                let (turns, taken) = (&turns, &taken);
                scope.spawn(move || {
                    let wake = Arc::new(EventFd::new().unwrap());
                    for i in 0..2000_u64 {
                        // Two blocks at the border of two lists, in either order of importance.
                        let first = (i * 7 + n * 3) % 7;
                        let at = REGION - 4 * 4096 + first * 4096;
                        let (turn, mut now) = turns.take(at..at + 8192, [Some(at), Some(at + 4096)], &wake);
                        while !now {
                            wake.read().unwrap();
                            now = turns.has_come(&turn);
                        }
                        let both = [first, first + 1].map(|block| &taken[block as usize]);
                        for block in both {
                            assert!(!block.swap(true, Ordering::AcqRel), "somebody else is there");
                        }
                        for block in both {
                            block.store(false, Ordering::Release);
                        }
                        turns.give_back(turn);
                    }
                });
            }
        });
        assert!(turns.lists.iter().all(|list| list.locked().is_empty()));
    }
}
