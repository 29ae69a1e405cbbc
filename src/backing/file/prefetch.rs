//! Memory that is going to be read, asked for before it is needed: the wait for it goes on beside other work.

use vm_memory::VolatileSlice;

/// The most bytes that are asked for, from the first. By then the CPU sees by itself where the reading
/// goes, and the fast engines ask for what they will need; what is asked for too early takes the place
/// of what is needed first.
const MOST: usize = 2048;
/// Bytes that the CPU fetches at a time.
const LINE: usize = 64;

/// Asks for the first of `bytes`. It changes nothing but how soon they are there.
pub(super) fn prefetch(bytes: &VolatileSlice<'_>) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        let begin = bytes.ptr_guard();
        for at in (0..bytes.len().min(MOST)).step_by(LINE) {
            // SAFETY: a hint to the CPU, which reads nothing that the program could see and never faults.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(begin.as_ptr().wrapping_add(at).cast()) };
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (bytes, MOST, LINE);
}
