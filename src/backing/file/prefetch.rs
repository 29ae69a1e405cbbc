//! Memory that is going to be read, asked for before it is needed: the wait for it goes on beside other work.
#![forbid(unsafe_code)]

use vm_memory::VolatileSlice;

/// The most bytes that are asked for, from the first. By then the CPU sees by itself where the reading
/// goes, and the fast engines ask for what they will need; what is asked for too early takes the place
/// of what is needed first.
const MOST: usize = 2048;
/// Bytes that the CPU fetches at a time.
const LINE: usize = 64;

/// Asks for the first of `bytes`. It changes nothing but how soon they are there.
pub(super) fn prefetch(bytes: &VolatileSlice<'_>) {
    let begin = bytes.ptr_guard();
    for at in (0..bytes.len().min(MOST)).step_by(LINE) {
        crate::base::prefetch::prefetch(begin.as_ptr().wrapping_add(at));
    }
}
