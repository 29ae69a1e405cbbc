//! The engines for x86-64: one block an instruction (AES-NI), two (VAES), or four (VAES with AVX-512).
//!
//! Data goes from source to destination in one pass. Round keys and tweaks are never written to the stack:
//! the keys lie four times over, as wide as the widest register, in secret memory and are loaded from there
//! round by round; tweaks are in registers, or in secret memory of the thread's. `ci/check-spills` checks
//! the machine code for it.

#[macro_use]
mod kernels;
mod kernel128;
mod kernel256;
mod kernel512;
mod keys;
mod narrow;

use crate::base::Result;
use crate::crypt::secret_mem::{Secret, SecretMem, wipe_stack};
use crate::crypt::xts::{Direction, Engine, SectorCipher, TweakInput, check_request};
use crate::crypt::{Dek, SectorSize};
use keys::Keys;
use narrow::Scratch;
use std::cell::Cell;
use vm_memory::VolatileSlice;
use zeroize::Zeroize;

/// Bytes of stack below which no kernel reaches in a development build.
const DEVELOPMENT_FRAMES: usize = 16 << 10;

/// How many bytes before it is read a kernel asks for memory: so long does that take, beside the work on
/// those bytes. The CPU does so by itself in a page, but not from one page to the next.
const AHEAD: usize = 2048;

/// What a kernel does.
#[derive(Clone, Copy)]
enum Task {
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

/// A kernel: keys, memory for tweaks, from, to, number of data units, tweak input of the first. It returns
/// how many data units it has done from the first on, which are all of them but for [`Task::DecryptWritten`].
///
/// Safe to call where the CPU has what its [`Width`] needs, the memory for tweaks is nobody else's, the
/// source is readable and the destination writable for all data units, and the two are the same or do not
/// overlap. Each byte of the source is read once, except for the first eight of a sector that
/// [`Task::DecryptWritten`] looks at.
type Kernel = unsafe fn(&Keys, *mut Scratch, *const u8, *mut u8, usize, TweakInput) -> usize;

/// Whether a sector at `at` begins with eight zero bytes.
///
/// # Safety
/// There are eight readable bytes, which may change meanwhile.
#[inline(always)]
unsafe fn begins_with_zeros(at: *const u8) -> bool {
    #[repr(C, packed)]
    struct Unaligned(u64);
    // SAFETY: the caller vouches for the bytes; Unaligned has alignment 1.
    unsafe { at.cast::<Unaligned>().read_volatile().0 == 0 }
}

/// How wide the registers are that the kernels use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Width {
    /// 128 bits: AES-NI with AVX.
    Bits128,
    /// 256 bits: VAES with AVX2.
    Bits256,
    /// 512 bits: VAES with AVX-512 F and BW.
    Bits512,
}

impl Width {
    /// Whether this CPU and its operating system have what the kernels need.
    pub(super) fn is_available(self) -> bool {
        let has = is_x86_feature_detected!("aes") && is_x86_feature_detected!("avx");
        let vaes = || is_x86_feature_detected!("vaes") && is_x86_feature_detected!("avx2");
        let avx512 = || is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw");
        match self {
            Width::Bits128 => has,
            Width::Bits256 => has && vaes(),
            Width::Bits512 => has && vaes() && avx512() && is_x86_feature_detected!("vpclmulqdq"),
        }
    }

    /// What they need, in words.
    pub(super) fn needs(self) -> &'static str {
        match self {
            Width::Bits128 => "AES-NI and AVX",
            Width::Bits256 => "VAES and AVX2",
            Width::Bits512 => "VAES, VPCLMULQDQ and AVX-512 F and BW",
        }
    }

    /// The engine that is made of them.
    pub(super) fn engine(self) -> Engine {
        match self {
            Width::Bits128 => Engine::AesNi,
            Width::Bits256 => Engine::Vaes256,
            Width::Bits512 => Engine::Vaes512,
        }
    }

    fn kernel(self, task: Task, unit: SectorSize) -> Kernel {
        match self {
            Width::Bits128 => kernel128::kernel(task, unit),
            Width::Bits256 => kernel256::kernel(task, unit),
            Width::Bits512 => kernel512::kernel(task, unit),
        }
    }
}

/// An engine. That one exists proves that the CPU can run it.
pub(super) struct X86 {
    keys: Secret<Keys>,
    unit: SectorSize,
    width: Width,
}

impl X86 {
    /// The engine under `dek`, or `None` on a CPU that lacks the instructions.
    pub(super) fn new(width: Width, dek: &Dek, unit: SectorSize) -> Result<Option<Self>> {
        if !width.is_available() {
            return Ok(None);
        }
        let (data, tweak) = dek.halves();
        // SAFETY: `is_available` has just found every feature that key expansion uses.
        let keys = Secret::new(|| unsafe { Keys::expand(data, tweak) })?;
        Ok(Some(X86 { keys, unit, width }))
    }

    /// `len` bytes from `src` to `dst`, which may be the same. Returns how many of them are done.
    ///
    /// # Safety
    /// `src` is readable and `dst` writable for `len` bytes, a multiple of the data unit, and they are
    /// equal or do not overlap. Others may change the memory meanwhile; nobody else holds a Rust
    /// reference to what is written.
    unsafe fn run(&self, task: Task, src: *const u8, dst: *mut u8, len: usize, first: TweakInput) -> usize {
        let (run, unit) = (self.width.kernel(task, self.unit), self.unit.bytes() as usize);
        let with = |scratch: *mut Scratch| {
            // SAFETY: the constructor checked the CPU's features; the memory is as the caller promises, and
            // `scratch` is lent to this call alone.
            unsafe { run(&self.keys, scratch, src, dst, len / unit, first) }
        };
        let done = match self.width {
            Width::Bits512 => with(std::ptr::null_mut()),
            Width::Bits128 | Width::Bits256 => with_scratch(with),
        };
        // A development build does not inline all parts of a kernel (how many depends on the rest of the
        // program), and what is passed between them goes by the stack. `ci/check-spills` sees to it that a
        // release has no need of this.
        if cfg!(debug_assertions) {
            wipe_stack::<DEVELOPMENT_FRAMES>();
        }
        done * unit
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

impl SectorCipher for X86 {
    fn engine(&self) -> &'static str {
        self.width.engine().name()
    }

    fn sector_size(&self) -> SectorSize {
        self.unit
    }

    fn write_key(&self, out: &mut [u8]) {
        let (data, tweak) = out.split_at_mut(Dek::LEN / 2);
        self.keys.encrypt.write_key(data);
        self.keys.tweak.write_key(tweak);
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
