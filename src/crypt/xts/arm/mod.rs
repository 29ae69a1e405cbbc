//! The kernels for 64-bit ARM: ARMv8's AES instructions, a block each.

mod kernel;
mod keys;

pub(super) use keys::{Keys, keys};

use crate::crypt::SectorSize;
use crate::crypt::xts::kernels::Task;
use crate::crypt::xts::{Engine, TweakInput};

/// A kernel: keys, from, to, number of data units, tweak input of the first. It returns how many data units
/// it has done from the first on, which are all of them but for [`Task::DecryptWritten`].
///
/// Safe to call where the CPU has what its [`Kernels`] need, the source is readable and the destination
/// writable for all data units, and the two are the same or do not overlap. Each byte of the source is read
/// once, except for the first eight of a sector that [`Task::DecryptWritten`] looks at.
type Kernel = unsafe fn(&Keys, *const u8, *mut u8, usize, TweakInput) -> usize;

/// The kernels; there is but one sort.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kernels;

impl Kernels {
    /// Those that an engine is made of.
    pub(super) fn of(engine: Engine) -> Option<Self> {
        (engine == Engine::Armv8).then_some(Kernels)
    }

    /// Whether this CPU has what they need, and runs in the order of bytes that they are made for.
    pub(super) fn are_available(self) -> bool {
        cfg!(target_endian = "little") && std::arch::is_aarch64_feature_detected!("aes")
    }

    /// Has the kernel for `task` do what [`Kernel`] says.
    ///
    /// # Safety
    /// As for a [`Kernel`].
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
        let run = kernel::kernel(task, unit);
        // SAFETY: the caller's promise.
        unsafe { run(keys, src, dst, units, first) }
    }
}
