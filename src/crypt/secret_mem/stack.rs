//! Leaving nothing of a key on the stack, nor in the vector registers.
//!
//! Key expansion and derivation run in other people's code, which keeps round keys and hash states in its
//! frames and in registers. They are dead when it returns, but still there: the frames are overwritten from here.
//! The registers are zeroed, because the next signal frame, or the next function that glibc binds lazily
//! (`_dl_runtime_resolve_xsavec`), would carry them into memory.

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

/// Zeroes every vector register of the CPU. On processors that are not known here it does nothing.
#[inline(never)]
fn clear_vector_registers() {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: the CPU has these instructions; they write registers that are declared as clobbered, no memory.
        unsafe { x86_64::clear_zmm() }
    } else if is_x86_feature_detected!("avx") {
        // SAFETY: as above.
        unsafe { x86_64::clear_ymm() }
    } else {
        x86_64::clear_xmm();
    }
}

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use std::arch::asm;

    #[target_feature(enable = "avx512f")]
    pub(super) fn clear_zmm() {
        clear_ymm();
        // SAFETY: writes registers that are declared as clobbered; no memory.
        unsafe {
            asm!(
                "vpxord zmm16, zmm16, zmm16", "vpxord zmm17, zmm17, zmm17", "vpxord zmm18, zmm18, zmm18",
                "vpxord zmm19, zmm19, zmm19", "vpxord zmm20, zmm20, zmm20", "vpxord zmm21, zmm21, zmm21",
                "vpxord zmm22, zmm22, zmm22", "vpxord zmm23, zmm23, zmm23", "vpxord zmm24, zmm24, zmm24",
                "vpxord zmm25, zmm25, zmm25", "vpxord zmm26, zmm26, zmm26", "vpxord zmm27, zmm27, zmm27",
                "vpxord zmm28, zmm28, zmm28", "vpxord zmm29, zmm29, zmm29", "vpxord zmm30, zmm30, zmm30",
                "vpxord zmm31, zmm31, zmm31",
                out("zmm16") _, out("zmm17") _, out("zmm18") _, out("zmm19") _, out("zmm20") _, out("zmm21") _,
                out("zmm22") _, out("zmm23") _, out("zmm24") _, out("zmm25") _, out("zmm26") _, out("zmm27") _,
                out("zmm28") _, out("zmm29") _, out("zmm30") _, out("zmm31") _,
                options(nomem, nostack, preserves_flags),
            );
        }
    }

    #[target_feature(enable = "avx")]
    pub(super) fn clear_ymm() {
        // SAFETY: writes registers that are declared as clobbered; no memory.
        unsafe {
            asm!(
                "vzeroall",
                out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _, out("ymm4") _, out("ymm5") _,
                out("ymm6") _, out("ymm7") _, out("ymm8") _, out("ymm9") _, out("ymm10") _, out("ymm11") _,
                out("ymm12") _, out("ymm13") _, out("ymm14") _, out("ymm15") _,
                options(nomem, nostack, preserves_flags),
            );
        }
    }

    pub(super) fn clear_xmm() {
        // SAFETY: writes registers that are declared as clobbered; no memory.
        unsafe {
            asm!(
                "xorps xmm0, xmm0", "xorps xmm1, xmm1", "xorps xmm2, xmm2", "xorps xmm3, xmm3",
                "xorps xmm4, xmm4", "xorps xmm5, xmm5", "xorps xmm6, xmm6", "xorps xmm7, xmm7",
                "xorps xmm8, xmm8", "xorps xmm9, xmm9", "xorps xmm10, xmm10", "xorps xmm11, xmm11",
                "xorps xmm12, xmm12", "xorps xmm13, xmm13", "xorps xmm14, xmm14", "xorps xmm15, xmm15",
                out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _,
                out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
                options(nomem, nostack, preserves_flags),
            );
        }
    }
}

#[inline(never)]
fn in_own_frame<R>(f: impl FnOnce() -> R) -> R {
    f()
}
