//! Small objects in guest memory: descriptors, ring entries, headers, status bytes.
//!
//! Each of them lies in one region, if the guest does not do something odd. vm-memory's `read_obj`
//! and `write_obj` are made for any number of regions, which costs several times as much; a request
//! makes a dozen such accesses.
#![forbid(unsafe_code)]

use vm_memory::guest_memory::Result;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemory, Permissions, VolatileMemory};

/// Reads what is at `addr`, which need not be aligned. An error: not all of it is guest memory.
pub fn read<T: ByteValued>(mem: &impl GuestMemory, addr: GuestAddress) -> Result<T> {
    if let Some(first) = mem.get_slices(addr, size_of::<T>(), Permissions::Read)?.next()
        && let Ok(whole) = first?.get_ref::<T>(0)
    {
        return Ok(whole.load());
    }
    mem.read_obj(addr)
}

/// Writes `value` at `addr`, which need not be aligned. An error: not all of it is guest memory.
pub fn write<T: ByteValued>(mem: &impl GuestMemory, addr: GuestAddress, value: T) -> Result<()> {
    if let Some(first) = mem.get_slices(addr, size_of::<T>(), Permissions::Write)?.next()
        && let Ok(whole) = first?.get_ref::<T>(0)
    {
        whole.store(value);
        return Ok(());
    }
    mem.write_obj(value, addr)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestMemoryMmap;

    #[test]
    fn objects_are_found_wherever_they_lie() {
        let ranges = [(GuestAddress(0), 4096), (GuestAddress(4096), 4096)];
        let mem = GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap();
        for at in [0, 1, 100, 4089, 4092, 4095, 4096, 8184] {
            let (addr, value) = (GuestAddress(at), 0x0123_4567_89ab_cdef_u64.rotate_left(at as u32));
            write(&mem, addr, value).unwrap();
            assert_eq!(mem.read_obj::<u64>(addr).unwrap(), value, "{at}");
            assert_eq!(read::<u64>(&mem, addr).unwrap(), value, "{at}");
        }
    }

    #[test]
    fn what_is_not_all_in_memory_is_an_error() {
        let mem = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(4096), 4096)]).unwrap();
        for at in [0, 4092, 8188, 8192, u64::MAX - 7, u64::MAX] {
            assert!(read::<u64>(&mem, GuestAddress(at)).is_err(), "{at}");
            assert!(write(&mem, GuestAddress(at), 1u64).is_err(), "{at}");
        }
    }
}
