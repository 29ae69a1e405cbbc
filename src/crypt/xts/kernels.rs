//! What is alike in the kernels of every CPU: what they do, which there are, and how they end.

use crate::crypt::xts::Direction;

/// How many bytes before it is read a kernel asks for memory: so long does that take, beside the work on
/// those bytes. The CPU does so by itself in a page, but not from one page to the next.
pub(super) const AHEAD: usize = 2048;

/// What a kernel does.
#[derive(Clone, Copy)]
pub(super) enum Task {
    Encrypt,
    Decrypt,
    /// Decrypt until a sector begins with eight zero bytes.
    DecryptWritten,
}

impl From<Direction> for Task {
    fn from(way: Direction) -> Self {
        match way {
            Direction::Encrypt => Task::Encrypt,
            Direction::Decrypt => Task::Decrypt,
        }
    }
}

/// Whether a sector at `at` begins with eight zero bytes.
///
/// # Safety
/// There are eight readable bytes, which may change meanwhile.
#[inline(always)]
pub(super) unsafe fn begins_with_zeros(at: *const u8) -> bool {
    #[repr(C, packed)]
    struct Unaligned(u64);
    // SAFETY: the caller vouches for the bytes; Unaligned has alignment 1.
    unsafe { at.cast::<Unaligned>().read_volatile().0 == 0 }
}

/// Makes the six kernels out of a module's `run`, for CPUs with these features, and the function that
/// chooses one. `$clear` zeroes the vector registers that they use. What they take of their own stands
/// behind it, and comes after the keys.
macro_rules! kernels {
    ($features:literal, $clear:path $(, $own:ident: $type:ty)?) => {
        /// The kernel for a task and a data unit.
        pub(super) fn kernel(task: Task, unit: SectorSize) -> Kernel {
            match (task, unit) {
                (Task::Encrypt, SectorSize::B512) => encrypt_512,
                (Task::Encrypt, SectorSize::B4096) => encrypt_4096,
                (Task::Decrypt, SectorSize::B512) => decrypt_512,
                (Task::Decrypt, SectorSize::B4096) => decrypt_4096,
                (Task::DecryptWritten, SectorSize::B512) => decrypt_written_512,
                (Task::DecryptWritten, SectorSize::B4096) => decrypt_written_4096,
            }
        }

        kernels! { encrypt_512, Encrypt, SectorSize::B512, $features, $clear $(, $own: $type)? }
        kernels! { decrypt_512, Decrypt, SectorSize::B512, $features, $clear $(, $own: $type)? }
        kernels! { decrypt_written_512, DecryptWritten, SectorSize::B512, $features, $clear $(, $own: $type)? }
        kernels! { encrypt_4096, Encrypt, SectorSize::B4096, $features, $clear $(, $own: $type)? }
        kernels! { decrypt_4096, Decrypt, SectorSize::B4096, $features, $clear $(, $own: $type)? }
        kernels! { decrypt_written_4096, DecryptWritten, SectorSize::B4096, $features, $clear $(, $own: $type)? }
    };
    ($name:ident, $task:ident, $unit:expr, $features:literal, $clear:path $(, $own:ident: $type:ty)?) => {
        // Never inlined, so that nothing but this loop competes for its registers and
        // `ci/check-spills` finds it by its name.
        #[inline(never)]
        #[target_feature(enable = $features)]
        unsafe fn $name(
            keys: &Keys,
            $($own: $type,)?
            src: *const u8,
            dst: *mut u8,
            units: usize,
            first: TweakInput,
        ) -> usize {
            const DECRYPT: bool = !matches!(Task::$task, Task::Encrypt);
            const WRITTEN: bool = matches!(Task::$task, Task::DecryptWritten);
            const SECTORS: usize = ($unit.bytes() / SectorSize::B512.bytes()) as usize;
            // SAFETY: the caller's promise (see `Kernel`) is what `run` asks for.
            let done = unsafe { run::<DECRYPT, WRITTEN, SECTORS>(keys, $($own,)? src, dst, units, first) };
            $clear();
            clear_general();
            done
        }
    };
}
