//! What is alike in the kernels of either width: which there are, and how they end.

/// Makes the four kernels out of a module's `run`, for CPUs with these features, and the function that
/// chooses one. `$clear` zeroes the registers that they use.
macro_rules! kernels {
    ($features:literal, $clear:path) => {
        /// The kernel for a direction and a data unit.
        pub(super) fn kernel(direction: Direction, unit: SectorSize) -> Kernel {
            match (direction, unit) {
                (Direction::Encrypt, SectorSize::B512) => encrypt_512,
                (Direction::Encrypt, SectorSize::B4096) => encrypt_4096,
                (Direction::Decrypt, SectorSize::B512) => decrypt_512,
                (Direction::Decrypt, SectorSize::B4096) => decrypt_4096,
            }
        }

        kernels! { $features, $clear, encrypt_512, false, SectorSize::B512 }
        kernels! { $features, $clear, decrypt_512, true, SectorSize::B512 }
        kernels! { $features, $clear, encrypt_4096, false, SectorSize::B4096 }
        kernels! { $features, $clear, decrypt_4096, true, SectorSize::B4096 }
    };
    ($features:literal, $clear:path, $name:ident, $decrypt:literal, $unit:expr) => {
        // Never inlined, so that nothing but this loop competes for its registers and
        // `ci/check-spills` finds it by its name.
        #[inline(never)]
        #[target_feature(enable = $features)]
        unsafe fn $name(keys: &Keys, src: *const u8, dst: *mut u8, units: usize, first: TweakInput) {
            // SAFETY: the caller's promise (see `Kernel`) is what `run` asks for.
            unsafe { run::<$decrypt, { $unit.bytes() as usize / GROUP }>(keys, src, dst, units, first) };
            $clear();
        }
    };
}
