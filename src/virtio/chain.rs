//! Walking a descriptor chain of a split ring (virtio 1.3, 2.7.5).
//!
//! The guest wrote every number here. A walk reads a bounded number of descriptors and ends early at whatever
//! breaks the rules: then the last descriptor that it gave says that another follows, which tells the reader.

use crate::virtio::memory;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, GuestAddress, GuestMemory};

/// Bytes in a descriptor.
const DESCRIPTOR: u64 = 16;
/// Most descriptors in a chain. A driver may use as many as the queue has entries (virtio 1.3, 2.7.5.3.1);
/// this is the largest queue that we offer, with header and status.
pub(super) const MAX_DESCRIPTORS: u32 = 1024 + 2;

/// The descriptors of one chain, those of an indirect table among them.
pub struct Chain<'m, M> {
    mem: &'m M,
    table: GuestAddress,
    /// Entries in the table.
    size: u32,
    next: Option<u16>,
    /// Entries that may still be read before the chain must be a loop.
    left: u32,
    indirect: bool,
}

impl<'m, M: GuestMemory> Chain<'m, M> {
    /// The chain that begins with entry `head` of the table of `size` entries at `table`.
    pub fn new(mem: &'m M, table: GuestAddress, size: u16, head: u16) -> Self {
        Chain { mem, table, size: size.into(), next: Some(head), left: size.into(), indirect: false }
    }

    /// Goes on in the table that `desc` refers to, if that is allowed here.
    fn enter(&mut self, desc: &Descriptor) -> bool {
        // A table within a table, and a descriptor behind a table, are both forbidden (2.7.5.3.1).
        if self.indirect || desc.has_next() || !u64::from(desc.len()).is_multiple_of(DESCRIPTOR) {
            return false;
        }
        // A table that no chain can use up is no driver's, however short the chain in it.
        let size = desc.len() / DESCRIPTOR as u32;
        if size > MAX_DESCRIPTORS {
            return false;
        }
        self.indirect = true;
        self.table = desc.addr();
        self.size = size;
        self.left = self.size;
        self.next = Some(0);
        true
    }
}

impl<M: GuestMemory> Iterator for Chain<'_, M> {
    type Item = Descriptor;

    fn next(&mut self) -> Option<Descriptor> {
        loop {
            let index = self.next.take()?;
            if u32::from(index) >= self.size || self.left == 0 {
                return None;
            }
            self.left -= 1;
            let addr = self.table.checked_add(u64::from(index) * DESCRIPTOR)?;
            let desc: Descriptor = memory::read(self.mem, addr).ok()?;
            if !desc.refers_to_indirect_table() {
                self.next = desc.has_next().then(|| desc.next());
                return Some(desc);
            }
            if !self.enter(&desc) {
                return None;
            }
        }
    }
}
