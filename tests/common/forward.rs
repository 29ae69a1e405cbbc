//! For tests that stand between a disk and its backing: the methods in which they are as
//! what they stand before.

/// Methods of a `Backing`, by name, that do what `self.backing` does, and of a `Queue`,
/// what `self.queue` does.
macro_rules! forward {
    ($($method:ident)*) => { $($crate::common::forward::forward_one!($method);)* };
}

macro_rules! forward_one {
    (caps) => {
        fn caps(&self) -> &sealblk::backing::Caps {
            self.backing.caps()
        }
    };
    (has_data) => {
        fn has_data(&self) -> std::io::Result<bool> {
            self.backing.has_data()
        }
    };
    (below) => {
        fn below(&self) -> &[u64] {
            self.backing.below()
        }
    };
    (next_data) => {
        fn next_data(&self, layer: usize, from: u64) -> std::io::Result<Option<std::ops::Range<u64>>> {
            self.backing.next_data(layer, from)
        }
    };
    (alloc) => {
        fn alloc(&mut self, offset: u64, len: usize) -> Option<sealblk::backing::Buffer> {
            self.queue.alloc(offset, len)
        }
    };
    (free) => {
        fn free(&mut self, buffer: sealblk::backing::Buffer) {
            self.queue.free(buffer)
        }
    };
    (places) => {
        fn places(&self) -> usize {
            self.queue.places()
        }
    };
    (max_buffer) => {
        fn max_buffer(&self) -> usize {
            self.queue.max_buffer()
        }
    };
    (bytes) => {
        fn bytes<'a>(&'a mut self, buffer: &'a mut sealblk::backing::Buffer) -> &'a mut [u8] {
            self.queue.bytes(buffer)
        }
    };
    (in_memory) => {
        fn in_memory(&self, layer: usize, offset: u64, len: usize) -> Option<sealblk::backing::InMemory<'_>> {
            self.queue.in_memory(layer, offset, len)
        }
    };
    (has_room) => {
        fn has_room(&self) -> bool {
            self.queue.has_room()
        }
    };
    (in_flight) => {
        fn in_flight(&self) -> usize {
            self.queue.in_flight()
        }
    };
    (submit) => {
        fn submit(&mut self, tag: u64, op: sealblk::backing::Op) {
            self.queue.submit(tag, op)
        }
    };
    (collect) => {
        fn collect(&mut self) -> std::io::Result<()> {
            self.queue.collect()
        }
    };
    (woken) => {
        fn woken(&mut self, token: sealblk::reactor::Token) -> bool {
            self.queue.woken(token)
        }
    };
    (has_done) => {
        fn has_done(&self) -> bool {
            self.queue.has_done()
        }
    };
}

pub(crate) use {forward, forward_one};
