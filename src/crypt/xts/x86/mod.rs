//! The kernels for x86-64: one block an instruction (AES-NI), two (VAES), or four (VAES with AVX-512).

mod kernel128;
mod kernel256;
mod kernel512;
mod keys;
mod narrow;

pub(super) use keys::{Keys, keys};

use crate::crypt::SectorSize;
use crate::crypt::secret_mem::SecretMem;
use crate::crypt::xts::kernels::Task;
use crate::crypt::xts::{Engine, TweakInput};
use narrow::Scratch;
use std::cell::Cell;
use zeroize::Zeroize;

/// A kernel: keys, memory for tweaks, from, to, number of data units, tweak input of the first. It returns
/// how many data units it has done from the first on, which are all of them but for [`Task::DecryptWritten`].
///
/// Safe to call where the CPU has what its [`Kernels`] need, the memory for tweaks is nobody else's, the
/// source is readable and the destination writable for all data units, and the two are the same or do not
/// overlap. Each byte of the source is read once, except for the first eight of a sector that
/// [`Task::DecryptWritten`] looks at.
type Kernel = unsafe fn(&Keys, *mut Scratch, *const u8, *mut u8, usize, TweakInput) -> usize;

/// Kernels, by how wide the registers are that they use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kernels {
    /// 128 bits: AES-NI with AVX.
    Bits128,
    /// 256 bits: VAES with AVX2.
    Bits256,
    /// 512 bits: VAES with AVX-512 F and BW.
    Bits512,
}

impl Kernels {
    /// Those that an engine is made of.
    pub(super) fn of(engine: Engine) -> Option<Self> {
        match engine {
            Engine::AesNi => Some(Kernels::Bits128),
            Engine::Vaes256 => Some(Kernels::Bits256),
            Engine::Vaes512 => Some(Kernels::Bits512),
            Engine::Auto | Engine::Portable | Engine::Armv8 => None,
        }
    }

    /// Whether this CPU and its operating system have what they need.
    pub(super) fn are_available(self) -> bool {
        let has = is_x86_feature_detected!("aes") && is_x86_feature_detected!("avx");
        let vaes = || is_x86_feature_detected!("vaes") && is_x86_feature_detected!("avx2");
        let avx512 = || is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw");
        match self {
            Kernels::Bits128 => has,
            Kernels::Bits256 => has && vaes(),
            Kernels::Bits512 => has && vaes() && avx512() && is_x86_feature_detected!("vpclmulqdq"),
        }
    }

    /// Has the kernel for `task` do what [`Kernel`] says.
    ///
    /// # Safety
    /// As for a [`Kernel`], but for the memory for tweaks.
    #[allow(clippy::too_many_arguments, reason = "a kernel's, and which one it is")]
    pub(super) unsafe fn run(
        self,
        task: Task,
        unit: SectorSize,
        keys: &Keys,
        src: *const u8,
        dst: *mut u8,
        units: usize,
        first: TweakInput,
    ) -> usize {
        let run = match self {
            Kernels::Bits128 => kernel128::kernel(task, unit),
            Kernels::Bits256 => kernel256::kernel(task, unit),
            Kernels::Bits512 => kernel512::kernel(task, unit),
        };
        // SAFETY: the caller's promise; `scratch` is lent to this call alone.
        let with = |scratch: *mut Scratch| unsafe { run(keys, scratch, src, dst, units, first) };
        match self {
            Kernels::Bits512 => with(std::ptr::null_mut()),
            Kernels::Bits128 | Kernels::Bits256 => with_scratch(with),
        }
    }
}

thread_local! {
    /// Where this thread's kernels write tweaks; made when first needed, wiped when the thread ends.
    static SCRATCH: Cell<Option<SecretMem>> = const { Cell::new(None) };
}

/// Lends memory for tweaks to `work`.
fn with_scratch<T>(work: impl FnOnce(*mut Scratch) -> T) -> T {
    const { assert!(align_of::<Scratch>() <= 4096, "a page cannot hold it") };
    let Some(mut memory) = SCRATCH.take().or_else(|| SecretMem::new(size_of::<Scratch>()).ok()) else {
        return with_scratch_on_stack(work);
    };
    // Any bytes are a scratch.
    let done = work(memory.as_mut_slice().as_mut_ptr().cast());
    SCRATCH.set(Some(memory));
    done
}

/// For a thread that can lock no more memory.
#[cold]
#[inline(never)]
fn with_scratch_on_stack<T>(work: impl FnOnce(*mut Scratch) -> T) -> T {
    let mut scratch = Scratch::EMPTY;
    let done = work(&raw mut scratch);
    scratch.zeroize();
    done
}
