//! Leaving nothing of a key on the stack, nor in the vector registers.
//!
//! Key expansion and derivation run in other people's code, which keeps round keys and hash states in its
//! frames and in registers. They are dead when it returns, but still there: the frames are overwritten from
//! here. The registers are zeroed, because the next signal frame, or the next function that glibc binds
//! lazily (`_dl_runtime_resolve_xsavec`), would carry them into memory.

use crate::crypt::secret_mem::registers::clear_vector_registers;

/// How deep the frames of key expansion and derivation may reach, bytes. Optimised they stay below 8 KiB;
/// unoptimised builds copy each schedule several times.
const DEPTH: usize = 48 * 1024;

/// Runs `f` and then overwrites the stack that it used. What `f` returns must not be key material.
pub fn on_scrubbed_stack<R>(f: impl FnOnce() -> R) -> R {
    let result = in_own_frame(f);
    wipe_stack::<DEPTH>();
    result
}

/// Overwrites the `N` bytes of stack below the caller's own frame, where the functions it called before
/// have had theirs. Those must not have been inlined into the caller.
#[inline(always)]
pub fn wipe_stack<const N: usize>() {
    zeroize::zeroize_stack::<N>();
    clear_vector_registers();
}

#[inline(never)]
fn in_own_frame<R>(f: impl FnOnce() -> R) -> R {
    f()
}
