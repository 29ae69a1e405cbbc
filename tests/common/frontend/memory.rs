//! The guest's RAM: memfd-backed regions, mapped in this process and shared with the back-end.
//!
//! Guest-physical and front-end ("user") addresses are chosen numbers, unrelated to where this process maps
//! the memory: a back-end that confuses the three finds nothing there.

use super::Fault;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Mutex;
use std::sync::atomic::Ordering;
use vhost::VhostUserMemoryRegionInfo;
use vm_memory::{AtomicAccess, Bytes, FileOffset, MmapRegion, VolatileMemory};

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;

/// One region of the memory table.
#[derive(Clone, Copy, Debug)]
pub struct RegionSpec {
    /// Guest-physical address of the first byte; a multiple of the page size.
    pub guest: u64,
    /// Address of the first byte in the front-end's made-up address space, used for the rings.
    pub user: u64,
    /// Bytes; a multiple of the page size.
    pub size: u64,
    /// Where the region begins in its memfd, bytes; a multiple of the page size.
    pub offset: u64,
}

impl RegionSpec {
    /// A region of `size` bytes at `guest`, at the start of its own file.
    pub fn at(guest: u64, size: u64) -> Self {
        RegionSpec { guest, user: 0x7e00_0000_0000 + guest, size, offset: 0 }
    }
}

/// How the guest's RAM is laid out.
#[derive(Clone, Debug)]
pub struct Layout {
    /// The regions. Rings go into the first, request buffers into the last.
    pub regions: Vec<RegionSpec>,
    /// Whether all regions are parts of one memfd (as of QEMU's one RAM back-end) or have one each.
    pub one_file: bool,
    /// Whether the files can be shrunk.
    pub seals: Seals,
    /// Whether the kernel is asked for huge pages, of 2 MiB.
    pub huge: bool,
}

/// What may still be done to the size of a memory file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seals {
    /// It can shrink until somebody seals it.
    Sealable,
    /// It cannot shrink.
    Sealed,
    /// It can shrink, and nobody can prevent that.
    Unsealable,
}

impl Layout {
    /// One region at guest address 0.
    pub fn flat(size: u64) -> Self {
        Layout {
            regions: vec![RegionSpec::at(0, size)],
            one_file: false,
            seals: Seals::Sealable,
            huge: false,
        }
    }

    /// As a PC's: 640 KiB, then from 768 KiB, then above 4 GiB, all in one file. `size` is the last one's.
    pub fn pc(size: u64) -> Self {
        let low = RegionSpec::at(0, 0xa_0000);
        let mid = RegionSpec { offset: 0xc_0000, ..RegionSpec::at(0xc_0000, 2 * MIB) };
        let high = RegionSpec { offset: 4 * MIB, ..RegionSpec::at(1 << 32, size) };
        Layout { regions: vec![low, mid, high], one_file: true, seals: Seals::Sealable, huge: false }
    }

    /// Two files: the rings' and the request buffers'. The second can be shrunk without harming this process.
    pub fn rings_apart(size: u64) -> Self {
        let regions = vec![RegionSpec::at(0, MIB), RegionSpec::at(1 << 30, size)];
        Layout { regions, one_file: false, seals: Seals::Sealable, huge: false }
    }
}

struct Region {
    spec: RegionSpec,
    file: File,
    map: MmapRegion,
}

/// Space handed out in one region. Buffers come and go with requests; when none is left
/// the space starts over.
#[derive(Default)]
struct Arena {
    floor: u64,
    next: u64,
    live: usize,
}

/// The guest's RAM.
pub struct GuestMem {
    regions: Vec<Region>,
    arenas: Mutex<Vec<Arena>>,
}

/// Asks for huge pages, and has all of the memory there.
fn ask_for_huge_pages(map: &MmapRegion) -> Result<(), Fault> {
    for advice in [libc::MADV_HUGEPAGE, libc::MADV_POPULATE_WRITE] {
        // SAFETY: the range is the mapping, and neither advice changes what is in it.
        if unsafe { libc::madvise(map.as_ptr().cast(), map.size(), advice) } != 0 {
            return Err(io::Error::last_os_error().into());
        }
    }
    Ok(())
}

impl GuestMem {
    /// RAM laid out as said.
    pub fn new(layout: &Layout) -> Result<Self, Fault> {
        let whole = layout.regions.iter().map(|r| r.offset + r.size).max().unwrap_or(0);
        let shared = if layout.one_file { Some(memfd(whole, layout.seals)?) } else { None };
        let mut regions = Vec::new();
        for spec in &layout.regions {
            let file = match &shared {
                Some(file) => file.try_clone()?,
                None => memfd(spec.offset + spec.size, layout.seals)?,
            };
            let place = FileOffset::new(file.try_clone()?, spec.offset);
            let map = MmapRegion::from_file(place, spec.size as usize)
                .map_err(|e| Fault::Protocol(format!("map {spec:x?}: {e}")))?;
            if layout.huge {
                ask_for_huge_pages(&map)?;
            }
            regions.push(Region { spec: *spec, file, map });
        }
        // The first page of every region stays unused, so that address 0 is never a buffer's.
        let arenas = regions.iter().map(|_| Arena { floor: PAGE, next: PAGE, live: 0 }).collect();
        Ok(GuestMem { regions, arenas: Mutex::new(arenas) })
    }

    /// How many regions there are.
    pub fn regions(&self) -> usize {
        self.regions.len()
    }

    /// What region `index` was made from.
    pub fn spec(&self, index: usize) -> RegionSpec {
        self.regions[index].spec
    }

    /// The region that request buffers come from: the last.
    pub fn data_region(&self) -> usize {
        self.regions.len() - 1
    }

    /// The memory table as vhost-user wants it.
    pub fn table(&self) -> Vec<VhostUserMemoryRegionInfo> {
        let entry = |r: &Region| VhostUserMemoryRegionInfo {
            guest_phys_addr: r.spec.guest,
            memory_size: r.spec.size,
            userspace_addr: r.spec.user,
            mmap_offset: r.spec.offset,
            mmap_handle: r.file.as_raw_fd(),
        };
        self.regions.iter().map(entry).collect()
    }

    /// The file behind region `index`.
    pub fn fd(&self, index: usize) -> RawFd {
        self.regions[index].file.as_raw_fd()
    }

    /// Cuts (or grows) the file of region `index` to `len` bytes. What lay beyond must not
    /// be touched here again.
    pub fn resize_file(&self, index: usize, len: u64) -> Result<(), Fault> {
        Ok(self.regions[index].file.set_len(len)?)
    }

    /// The user address of a guest address.
    pub fn user(&self, guest: u64) -> u64 {
        let (region, offset) = self.find(guest, 1);
        region.spec.user + offset as u64
    }

    /// Takes `len` bytes for good, for rings and tables.
    pub fn reserve(&self, region: usize, len: u64, align: u64) -> u64 {
        let mut arenas = self.arenas.lock().expect("no panic while locked");
        let arena = &mut arenas[region];
        assert_eq!(arena.live, 0, "reserve before any buffer is taken");
        let start = arena.next.next_multiple_of(align);
        assert!(start + len <= self.regions[region].spec.size, "guest memory is used up");
        arena.next = start + len;
        arena.floor = arena.next;
        self.regions[region].spec.guest + start
    }

    /// Takes a buffer of `len` bytes in the data region until `release`.
    pub fn take(&self, len: usize, align: u64) -> u64 {
        let region = self.data_region();
        let mut arenas = self.arenas.lock().expect("no panic while locked");
        let arena = &mut arenas[region];
        let start = arena.next.next_multiple_of(align);
        assert!(start + len as u64 <= self.regions[region].spec.size, "guest memory is used up");
        arena.next = start + len as u64;
        arena.live += 1;
        self.regions[region].spec.guest + start
    }

    /// How many bytes can be taken before all buffers have been released.
    pub fn room(&self) -> u64 {
        let region = self.data_region();
        let arenas = self.arenas.lock().expect("no panic while locked");
        self.regions[region].spec.size - arenas[region].next
    }

    /// Gives back `count` buffers.
    pub fn release(&self, count: usize) {
        let mut arenas = self.arenas.lock().expect("no panic while locked");
        let arena = &mut arenas[self.data_region()];
        arena.live -= count;
        if arena.live == 0 {
            arena.next = arena.floor;
        }
    }

    /// Writes bytes at a guest address.
    pub fn write(&self, guest: u64, bytes: &[u8]) {
        let (region, offset) = self.find(guest, bytes.len());
        region.map.as_volatile_slice().write_slice(bytes, offset).expect("checked by find");
    }

    /// Reads bytes at a guest address.
    pub fn read(&self, guest: u64, len: usize) -> Vec<u8> {
        let (region, offset) = self.find(guest, len);
        let mut bytes = vec![0; len];
        region.map.as_volatile_slice().read_slice(&mut bytes, offset).expect("checked by find");
        bytes
    }

    /// Writes one number with the given ordering.
    pub fn store<T: AtomicAccess>(&self, guest: u64, value: T, order: Ordering) {
        let (region, offset) = self.find(guest, size_of::<T>());
        region.map.as_volatile_slice().store(value, offset, order).expect("checked by find");
    }

    /// Reads one number with the given ordering.
    pub fn load<T: AtomicAccess>(&self, guest: u64, order: Ordering) -> T {
        let (region, offset) = self.find(guest, size_of::<T>());
        region.map.as_volatile_slice().load(offset, order).expect("checked by find")
    }

    fn find(&self, guest: u64, len: usize) -> (&Region, usize) {
        for region in &self.regions {
            let spec = &region.spec;
            if guest >= spec.guest && guest - spec.guest + len as u64 <= spec.size {
                return (region, (guest - spec.guest) as usize);
            }
        }
        panic!("the test touches {len} bytes at guest address {guest:#x}, where there is no memory");
    }
}

/// A shared memory file of `size` bytes.
pub fn memfd(size: u64, seals: Seals) -> Result<File, Fault> {
    let sealing = if seals == Seals::Unsealable { MFdFlags::empty() } else { MFdFlags::MFD_ALLOW_SEALING };
    let file =
        File::from(memfd_create("guest-ram", MFdFlags::MFD_CLOEXEC | sealing).map_err(io::Error::from)?);
    file.set_len(size)?;
    if seals == Seals::Sealed {
        fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).map_err(io::Error::from)?;
    }
    Ok(file)
}
