//! The guest driver's side of a split virtqueue (virtio 1.3, section 2.7), in guest memory, with no
//! protection at all: any descriptor, head or index can be written.

use super::super::patience::{Deadline, limit};
use super::{Fault, GuestMem};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// The descriptor continues with `next`.
pub const NEXT: u16 = 1;
/// The device writes this descriptor.
pub const WRITE: u16 = 2;
/// The descriptor holds a table of descriptors.
pub const INDIRECT: u16 = 4;

const NO_NOTIFY: u16 = 1;
const NO_INTERRUPT: u16 = 1;

/// One descriptor as the device sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Desc {
    /// Guest-physical address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// NEXT, WRITE, INDIRECT or nonsense.
    pub flags: u16,
    /// Index of the next descriptor, if NEXT is set.
    pub next: u16,
}

impl Desc {
    /// What the device reads.
    pub fn readable(addr: u64, len: u32) -> Self {
        Desc { addr, len, flags: 0, next: 0 }
    }

    /// What the device writes.
    pub fn writable(addr: u64, len: u32) -> Self {
        Desc { addr, len, flags: WRITE, next: 0 }
    }

    /// A table of descriptors.
    pub fn table(addr: u64, len: u32) -> Self {
        Desc { addr, len, flags: INDIRECT, next: 0 }
    }

    /// This descriptor, continued at `next`.
    pub fn then(self, next: u16) -> Self {
        Desc { flags: self.flags | NEXT, next, ..self }
    }

    fn bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// One element of the used ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// The head of the chain that is done, as the device wrote it.
    pub id: u32,
    /// How many bytes the device says it has written.
    pub len: u32,
}

/// A split virtqueue, seen from the driver.
pub struct SplitRing {
    /// The memory it lies in.
    pub mem: Arc<GuestMem>,
    /// Entries.
    pub size: u16,
    /// Guest address of the descriptor table.
    pub desc: u64,
    /// Guest address of the available ring.
    pub avail: u64,
    /// Guest address of the used ring.
    pub used: u64,
    /// Whether VIRTIO_RING_F_EVENT_IDX was agreed.
    pub event_idx: bool,
    /// Signalled by the driver: there is work.
    pub kick_fd: EventFd,
    /// Signalled by the device: work is done.
    pub call_fd: EventFd,
    /// Signalled by the device: the ring is broken, it serves no more until it is set up again.
    pub err_fd: EventFd,
    next_avail: u16,
    kicked_at: u16,
    last_used: u16,
    free: Vec<u16>,
}

impl SplitRing {
    /// A ring of `size` entries in region `region` of `mem`, nothing in it.
    pub fn new(mem: &Arc<GuestMem>, region: usize, size: u16) -> Result<Self, Fault> {
        let n = u64::from(size);
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let ring = SplitRing {
            mem: mem.clone(),
            size,
            desc: mem.reserve(region, 16 * n, 4096),
            avail: mem.reserve(region, 6 + 2 * n, 2),
            used: mem.reserve(region, 6 + 8 * n, 4096),
            event_idx: false,
            kick_fd: event()?,
            call_fd: event()?,
            err_fd: event()?,
            next_avail: 0,
            kicked_at: 0,
            last_used: 0,
            free: (0..size).rev().collect(),
        };
        Ok(ring)
    }

    /// Back to an empty ring with both indices at `base`, as after a device reset (`base` 0).
    pub fn reset(&mut self, base: u16) {
        let n = usize::from(self.size);
        self.mem.write(self.desc, &vec![0; 16 * n]);
        self.mem.write(self.avail, &vec![0; 6 + 2 * n]);
        self.mem.write(self.used, &vec![0; 6 + 8 * n]);
        self.set_avail_idx(base);
        self.mem.store(self.used + 2, base, Ordering::Release);
        (self.next_avail, self.kicked_at, self.last_used) = (base, base, base);
        self.free = (0..self.size).rev().collect();
        // What the old life signalled is not the new one's.
        let _ = self.call_fd.read();
        let _ = self.kick_fd.read();
        let _ = self.err_fd.read();
    }

    /// Writes descriptor `index` of the ring's own table.
    pub fn write_desc(&self, index: u16, desc: Desc) {
        self.mem.write(self.desc + 16 * u64::from(index), &desc.bytes());
    }

    /// Writes a table of descriptors (an indirect one) at any guest address.
    pub fn write_table(&self, addr: u64, table: &[Desc]) {
        let bytes: Vec<u8> = table.iter().flat_map(|d| d.bytes()).collect();
        self.mem.write(addr, &bytes);
    }

    /// Takes `count` free descriptors, or None if there are not so many.
    pub fn take_descs(&mut self, count: usize) -> Option<Vec<u16>> {
        let rest = self.free.len().checked_sub(count)?;
        Some(self.free.split_off(rest))
    }

    /// How many descriptors are free.
    pub fn free_descs(&self) -> usize {
        self.free.len()
    }

    /// Gives descriptors back.
    pub fn give_descs(&mut self, mut descs: Vec<u16>) {
        self.free.append(&mut descs);
    }

    /// Writes descriptors, linked as `make` says that knows which indices they get, and publishes the first.
    /// They are never given back. Returns the head.
    pub fn post(&mut self, count: usize, make: impl FnOnce(&[u16]) -> Vec<Desc>) -> u16 {
        let own = self.take_descs(count).expect("room on the ring");
        for (index, desc) in own.iter().zip(make(&own)) {
            self.write_desc(*index, desc);
        }
        self.publish(own[0]);
        own[0]
    }

    /// Writes an orderly chain, and publishes it.
    pub fn post_chain(&mut self, chain: &[Desc]) -> u16 {
        self.post(chain.len(), |own| linked(chain, |i| own[i]))
    }

    /// Writes `head` into the next slot of the available ring and moves the index on by one.
    pub fn publish(&mut self, head: u16) {
        self.put_head(self.next_avail, head);
        self.set_avail_idx(self.next_avail.wrapping_add(1));
    }

    /// Writes `head` into the slot of available index `index`, without telling the device.
    pub fn put_head(&self, index: u16, head: u16) {
        let slot = u64::from(index % self.size);
        self.mem.store(self.avail + 4 + 2 * slot, head, Ordering::Relaxed);
    }

    /// Sets the available index to any value.
    pub fn set_avail_idx(&mut self, index: u16) {
        self.next_avail = index;
        self.mem.store(self.avail + 2, index, Ordering::Release);
    }

    /// The available index as last published.
    pub fn avail_idx(&self) -> u16 {
        self.next_avail
    }

    /// Kicks the device whether it wants it or not.
    pub fn kick(&mut self) {
        self.kicked_at = self.next_avail;
        // A full counter is as good as a kick: the device has not yet read the last one.
        let _ = self.kick_fd.write(1);
    }

    /// Kicks the device if it asked for it, as a driver does. Whether it was kicked.
    pub fn kick_if_wanted(&mut self) -> bool {
        // The index must be visible before the device's wish is read (virtio 1.3, section 2.7.13.4.1).
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event = self.mem.load::<u16>(self.used + 4 + 8 * u64::from(self.size), Ordering::Acquire);
            let (new, old) = (self.next_avail, self.kicked_at);
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.mem.load::<u16>(self.used, Ordering::Acquire) & NO_NOTIFY == 0
        };
        if wanted {
            self.kick();
        }
        wanted
    }

    /// The device's used index.
    pub fn used_idx(&self) -> u16 {
        self.mem.load(self.used + 2, Ordering::Acquire)
    }

    /// How many completions were taken so far (modulo 2^16).
    pub fn last_used(&self) -> u16 {
        self.last_used
    }

    /// Takes the next completion if there is one.
    pub fn pop_used(&mut self) -> Option<Used> {
        if self.used_idx() == self.last_used {
            return None;
        }
        let at = self.used + 4 + 8 * u64::from(self.last_used % self.size);
        self.last_used = self.last_used.wrapping_add(1);
        let id = self.mem.load(at, Ordering::Relaxed);
        Some(Used { id, len: self.mem.load(at + 4, Ordering::Relaxed) })
    }

    /// Asks the device for an interrupt at the next completion, or for none at all.
    pub fn want_call(&self, wanted: bool) {
        if self.event_idx {
            // Half the index space behind is as far from "next" as one can ask for.
            let event = if wanted { self.last_used } else { self.last_used.wrapping_sub(0x8000) };
            self.mem.store(self.avail + 4 + 2 * u64::from(self.size), event, Ordering::Relaxed);
        } else {
            let flags = if wanted { 0 } else { NO_INTERRUPT };
            self.mem.store(self.avail, flags, Ordering::Relaxed);
        }
        // The wish must be visible before the used index is looked at again.
        fence(Ordering::SeqCst);
    }

    /// Waits for the next completion by interrupt: a device that completes without calling is found out.
    pub fn wait_used(&mut self) -> Result<Used, Fault> {
        let deadline = Deadline::after(limit());
        loop {
            self.want_call(true);
            if let Some(used) = self.pop_used() {
                return Ok(used);
            }
            if !self.wait_call(deadline.left())? {
                let late = self.pop_used().is_some();
                let how = if late { "; one was completed without it" } else { "" };
                return Err(Fault::TimedOut(format!("an interrupt for one of {}{how}", self.in_flight())));
            }
        }
    }

    /// Waits for the next completion by looking, with interrupts off.
    pub fn poll_used(&mut self) -> Result<Used, Fault> {
        let deadline = Deadline::after(limit());
        self.want_call(false);
        loop {
            if let Some(used) = self.pop_used() {
                return Ok(used);
            }
            if deadline.left().is_zero() {
                return Err(Fault::TimedOut(format!("the completion of one of {}", self.in_flight())));
            }
            std::hint::spin_loop();
        }
    }

    /// How many requests are not answered, and where the indices stand, for the failure message.
    fn in_flight(&self) -> String {
        let (avail, used) = (self.next_avail, self.used_idx());
        format!("{} requests (available index {avail}, used index {used})", avail.wrapping_sub(used))
    }

    /// Waits until the device calls and takes the signal; false when the time is over.
    pub fn wait_call(&self, limit: Duration) -> Result<bool, Fault> {
        if readable(&self.call_fd, limit)? {
            let _ = self.call_fd.read();
            return Ok(true);
        }
        Ok(false)
    }
}

/// Sets NEXT and `next` on all but the last; `name` says under which index entry i is found.
pub fn linked(chain: &[Desc], name: impl Fn(usize) -> u16) -> Vec<Desc> {
    let last = chain.len() - 1;
    let link = |(i, d): (usize, &Desc)| match i {
        i if i == last => *d,
        i => Desc { flags: d.flags | NEXT, next: name(i + 1), ..*d },
    };
    chain.iter().enumerate().map(link).collect()
}

/// Waits until a descriptor is readable (or hung up); false when the time is over.
pub fn readable(fd: &impl AsRawFd, limit: Duration) -> Result<bool, Fault> {
    // SAFETY: `fd` is borrowed for the whole call, so the descriptor stays open.
    let fd = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) };
    let deadline = Deadline::after(limit);
    loop {
        let left = deadline.left();
        // Rounded up, so that the last fraction of a millisecond does not spin.
        let timeout = PollTimeout::try_from(left.as_millis() as i64 + 1).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout) {
            Ok(0) if !deadline.left().is_zero() => continue,
            Ok(n) => return Ok(n > 0),
            Err(nix::errno::Errno::EINTR) => continue,
            Err(e) => return Err(Fault::Io(e.into())),
        }
    }
}
