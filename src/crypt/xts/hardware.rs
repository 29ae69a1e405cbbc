//! The engines that are made of the CPU's own AES instructions.
//!
//! Data goes from source to destination in one pass. Round keys and tweaks are never written to the stack:
//! the keys lie in secret memory, as wide as the registers, and are loaded from there round by round; tweaks
//! are in registers, or in secret memory of the thread's. `ci/check-spills` checks the machine code for it.

#[cfg(target_arch = "aarch64")]
use crate::crypt::xts::arm::{Kernels, Keys, keys};
#[cfg(target_arch = "x86_64")]
use crate::crypt::xts::x86::{Kernels, Keys, keys};

use crate::base::Result;
use crate::crypt::secret_mem::{Secret, wipe_stack};
use crate::crypt::xts::kernels::Task;
use crate::crypt::xts::{Direction, Engine, SectorCipher, TweakInput, check_request};
use crate::crypt::{Dek, SectorSize};
use vm_memory::VolatileSlice;

/// Bytes of stack below which no kernel reaches in a development build.
const DEVELOPMENT_FRAMES: usize = 16 << 10;

/// An engine. That one exists proves that the CPU can run it.
pub(super) struct Hardware {
    keys: Secret<Keys>,
    unit: SectorSize,
    engine: Engine,
    kernels: Kernels,
}

impl Hardware {
    /// Whether `engine` is such a one, and this CPU and its operating system have what its kernels need.
    pub(super) fn is_available(engine: Engine) -> bool {
        Kernels::of(engine).is_some_and(Kernels::are_available)
    }

    /// The engine under `dek`, or `None` on a CPU that lacks the instructions.
    pub(super) fn new(engine: Engine, dek: &Dek, unit: SectorSize) -> Result<Option<Self>> {
        let Some(kernels) = Kernels::of(engine).filter(|kernels| kernels.are_available()) else {
            return Ok(None);
        };
        let (data, tweak) = dek.halves();
        // SAFETY: `are_available` has just found every feature that key expansion uses.
        let keys = Secret::new(|| unsafe { keys(data, tweak) })?;
        Ok(Some(Hardware { keys, unit, engine, kernels }))
    }

    /// `len` bytes from `src` to `dst`, which may be the same. Returns how many of them are done.
    ///
    /// # Safety
    /// `src` is readable and `dst` writable for `len` bytes, a multiple of the data unit, and they are
    /// equal or do not overlap. Others may change the memory meanwhile; nobody else holds a Rust
    /// reference to what is written.
    unsafe fn run(&self, task: Task, src: *const u8, dst: *mut u8, len: usize, first: TweakInput) -> usize {
        let (unit, kernels) = (self.unit.bytes() as usize, self.kernels);
        // SAFETY: the constructor checked the CPU's features; the memory is as the caller promises.
        let done = unsafe { kernels.run(task, self.unit, &self.keys, src, dst, len / unit, first) };
        // A development build does not inline all parts of a kernel (how many depends on the rest of the
        // program), and what is passed between them goes by the stack. `ci/check-spills` sees to it that a
        // release has no need of this.
        if cfg!(debug_assertions) {
            wipe_stack::<DEVELOPMENT_FRAMES>();
        }
        done * unit
    }
}

impl SectorCipher for Hardware {
    fn engine(&self) -> &'static str {
        self.engine.name()
    }

    fn sector_size(&self) -> SectorSize {
        self.unit
    }

    fn write_key(&self, out: &mut [u8]) {
        self.keys.write_key(out);
    }

    fn encrypt(&self, src: VolatileSlice<'_>, dst: &mut [u8], first_sector: u64) {
        check_request(self.unit, src.len(), dst.len(), first_sector);
        let (guest, first) = (src.ptr_guard(), TweakInput::sector(first_sector));
        // SAFETY: the guard keeps `src` mapped for its length, which is that of `dst`; a `&mut [u8]`
        // cannot overlap guest memory.
        unsafe { self.run(Task::Encrypt, guest.as_ptr(), dst.as_mut_ptr(), dst.len(), first) };
    }

    fn decrypt_written(&self, src: VolatileSlice<'_>, dst: VolatileSlice<'_>, first_sector: u64) -> usize {
        check_request(self.unit, src.len(), dst.len(), first_sector);
        let (from, guest, first) = (src.ptr_guard(), dst.ptr_guard_mut(), TweakInput::sector(first_sector));
        // SAFETY: the guards keep both mapped for their length, which is the same; neither is a buffer of the
        // other's, and what either holds is nobody's Rust reference.
        unsafe { self.run(Task::DecryptWritten, from.as_ptr(), guest.as_ptr(), src.len(), first) }
    }

    fn in_place(&self, way: Direction, data: &mut [u8], first: TweakInput) {
        let at = data.as_mut_ptr();
        // SAFETY: `data` is exclusively ours. Only the trait's own methods can make a tweak input, and they
        // have checked that it is whole data units.
        unsafe { self.run(way.into(), at, at, data.len(), first) };
    }
}
