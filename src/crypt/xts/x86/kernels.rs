//! What is alike in the kernels of every width: which there are, and how they end.

/// Makes the six kernels out of a module's `run`, for CPUs with these features, and the function that
/// chooses one. `$clear` zeroes the vector registers that they use.
macro_rules! kernels {
    ($features:literal, $clear:path) => {
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

        kernels! { $features, $clear, encrypt_512, Encrypt, SectorSize::B512 }
        kernels! { $features, $clear, decrypt_512, Decrypt, SectorSize::B512 }
        kernels! { $features, $clear, decrypt_written_512, DecryptWritten, SectorSize::B512 }
        kernels! { $features, $clear, encrypt_4096, Encrypt, SectorSize::B4096 }
        kernels! { $features, $clear, decrypt_4096, Decrypt, SectorSize::B4096 }
        kernels! { $features, $clear, decrypt_written_4096, DecryptWritten, SectorSize::B4096 }
    };
    ($features:literal, $clear:path, $name:ident, $task:ident, $unit:expr) => {
        // Never inlined, so that nothing but this loop competes for its registers and
        // `ci/check-spills` finds it by its name.
        #[inline(never)]
        #[target_feature(enable = $features)]
        unsafe fn $name(
            keys: &Keys,
            scratch: *mut Scratch,
            src: *const u8,
            dst: *mut u8,
            units: usize,
            first: TweakInput,
        ) -> usize {
            const DECRYPT: bool = !matches!(Task::$task, Task::Encrypt);
            const WRITTEN: bool = matches!(Task::$task, Task::DecryptWritten);
            const SECTORS: usize = ($unit.bytes() / SectorSize::B512.bytes()) as usize;
            // SAFETY: the caller's promise (see `Kernel`) is what `run` asks for.
            let done = unsafe { run::<DECRYPT, WRITTEN, SECTORS>(keys, scratch, src, dst, units, first) };
            $clear();
            clear_general();
            done
        }
    };
}
