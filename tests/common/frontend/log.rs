//! The bitmap of dirty pages that a VMM shares with the back-end in a migration, and its
//! copy of the guest's memory.

use super::hostile::{Answer, ask, state, words};
use super::memory::memfd;
use super::session::F_LOG_ALL;
use super::{GuestMem, Result, Seals, Session};
use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use vhost::vhost_user::message::FrontendReq as Req;

/// Bytes for which there is a bit.
pub const PAGE: u64 = 4096;

/// The bitmap.
pub struct Log {
    /// Its file.
    pub file: File,
    len: u64,
}

impl Log {
    /// One that covers the memory and not a page more than its bytes' worth.
    pub fn new(mem: &GuestMem) -> Result<Log> {
        let end = (0..mem.regions()).map(|i| mem.spec(i).guest + mem.spec(i).size).max().unwrap_or(0);
        Self::covering(end)
    }

    /// One for guest addresses up to `end`.
    pub fn covering(end: u64) -> Result<Log> {
        let len = end.div_ceil(8 * PAGE);
        Ok(Log { file: memfd(len, Seals::Sealed)?, len })
    }

    /// The body of SET_LOG_BASE.
    pub fn body(&self) -> Vec<u8> {
        words(&[self.len, 0])
    }

    /// Gives it to the back-end.
    pub fn give(&self, session: &Session) -> Answer {
        ask(session.raw(), Req::SET_LOG_BASE, &self.body(), &[self.file.as_raw_fd()])
    }

    /// The marked pages, by guest address; the bitmap is empty afterwards.
    pub fn take(&self) -> BTreeSet<u64> {
        let mut bytes = vec![0; self.len as usize];
        self.file.read_exact_at(&mut bytes, 0).expect("read the log");
        self.file.write_all_at(&vec![0; bytes.len()], 0).expect("clear the log");
        let marked = |page: &u64| bytes[(page / 8) as usize] & 1 << (page % 8) != 0;
        (0..8 * self.len).filter(marked).map(|page| page * PAGE).collect()
    }
}

/// Switches logging of everything on or off.
pub fn set_logging(session: &Session, on: bool) -> Answer {
    let features = session.features | if on { F_LOG_ALL } else { 0 };
    ask(session.raw(), Req::SET_FEATURES, &words(&[features]), &[])
}

/// Gives a ring its addresses again, with the used ring logged at guest address `log` or not.
pub fn set_used_log(session: &Session, index: usize, log: Option<u64>) -> Answer {
    let ring = &session.rings[index];
    let [desc, used, avail] = [ring.desc, ring.used, ring.avail].map(|addr| session.mem.user(addr));
    let mut body = state(index as u32, log.is_some().into());
    body.extend(words(&[desc, used, avail, log.unwrap_or(0)]));
    ask(session.raw(), Req::SET_VRING_ADDR, &body, &[])
}

/// All that the guest's memory holds.
pub struct Copy(Vec<(u64, Vec<u8>)>);

impl Copy {
    /// Of all memory, now.
    pub fn of(mem: &GuestMem) -> Copy {
        let region = |i| (mem.spec(i).guest, mem.read(mem.spec(i).guest, mem.spec(i).size as usize));
        Copy((0..mem.regions()).map(region).collect())
    }

    /// Copies these pages anew.
    pub fn update(&mut self, mem: &GuestMem, pages: &BTreeSet<u64>) {
        for (start, bytes) in &mut self.0 {
            let end = *start + bytes.len() as u64;
            for page in pages.range(*start..end) {
                let at = (page - *start) as usize;
                bytes[at..at + PAGE as usize].copy_from_slice(&mem.read(*page, PAGE as usize));
            }
        }
    }

    /// The pages in which the two differ.
    pub fn differs(&self, other: &Copy) -> BTreeSet<u64> {
        let mut pages = BTreeSet::new();
        for ((start, one), (_, two)) in self.0.iter().zip(&other.0) {
            let chunks = one.chunks(PAGE as usize).zip(two.chunks(PAGE as usize));
            pages.extend(
                (*start..).step_by(PAGE as usize).zip(chunks).filter(|(_, (a, b))| a != b).map(|(p, _)| p),
            );
        }
        pages
    }
}
