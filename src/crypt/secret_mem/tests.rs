use super::*;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// The kinds that this machine has; the two fall-backs are everywhere.
fn kinds() -> Vec<SecretKind> {
    let mut kinds = vec![SecretKind::Locked, SecretKind::LockedMemfd];
    match SecretMem::with_kind(SecretKind::MemfdSecret, 1) {
        Ok(_) => kinds.push(SecretKind::MemfdSecret),
        Err(e) => assert!(e.to_string().contains("memfd_secret"), "{e}"),
    }
    kinds
}

fn shareable_kinds() -> impl Iterator<Item = SecretKind> {
    kinds().into_iter().filter(|k| *k != SecretKind::Locked)
}

fn second_map(fd: &SecretFd) -> SecretMem {
    SecretFd::from_fd(fd.as_fd().try_clone_to_owned().unwrap()).unwrap().map().unwrap()
}

#[test]
fn memory_is_zero_writable_and_as_long_as_asked_for() {
    for kind in kinds() {
        for len in [1, 64, 4096, 4097, MAX_LEN] {
            let mut mem = SecretMem::with_kind(kind, len).unwrap();
            assert_eq!((mem.kind(), mem.len(), mem.as_slice().len()), (kind, len, len));
            assert!(mem.as_slice().iter().all(|b| *b == 0));
            mem.as_mut_slice().fill(0xa5);
            assert!(mem.as_slice().iter().all(|b| *b == 0xa5));
        }
    }
}

#[test]
fn the_best_kind_that_there_is_gets_used() {
    let best =
        if kinds().contains(&SecretKind::MemfdSecret) { SecretKind::MemfdSecret } else { SecretKind::Locked };
    assert_eq!(SecretMem::new(64).unwrap().kind(), best);
}

#[test]
fn impossible_lengths_are_refused() {
    for len in [0, MAX_LEN + 1, usize::MAX] {
        assert_eq!(SecretMem::new(len).unwrap_err().kind(), Kind::Usage);
        assert_eq!(SecretFd::create(len).err().unwrap().kind(), Kind::Usage);
    }
}

#[test]
fn printing_shows_kind_and_length_only() {
    let mut mem = SecretMem::with_kind(SecretKind::Locked, 4).unwrap();
    mem.as_mut_slice().copy_from_slice(b"key!");
    assert_eq!(format!("{mem:?}"), "SecretMem(4 bytes of locked memory)");
}

#[test]
fn dropping_one_mapping_wipes_what_the_other_sees() {
    for kind in shareable_kinds() {
        let fd = SecretFd::with_kind(kind, 64).unwrap();
        let seen = second_map(&fd);
        let mut mem = fd.map().unwrap();
        mem.as_mut_slice().fill(0x77);
        assert!(seen.as_slice().iter().all(|b| *b == 0x77), "{kind}: both see the same bytes");
        drop(mem);
        assert!(seen.as_slice().iter().all(|b| *b == 0), "{kind}: wiped");
    }
}

#[test]
fn handing_over_keeps_the_bytes_for_the_other_side() {
    for kind in shareable_kinds() {
        let fd = SecretFd::with_kind(kind, 64).unwrap();
        let mut writer = second_map(&fd);
        writer.as_mut_slice().fill(0x33);
        writer.hand_over();
        assert!(fd.map().unwrap().as_slice().iter().all(|b| *b == 0x33), "{kind}");
    }
}

#[test]
fn a_descriptor_that_is_given_away_keeps_the_bytes_for_the_other_side_alone() {
    for kind in shareable_kinds() {
        let fd = SecretFd::with_kind(kind, 64).unwrap();
        let mut helper = second_map(&fd);
        helper.as_mut_slice().fill(0x55);
        helper.hand_over();
        let taken = second_map(&fd);
        fd.give_away();
        assert!(taken.as_slice().iter().all(|b| *b == 0x55), "{kind}: it is there for who has it now");
        let fd = SecretFd::with_kind(kind, 64).unwrap();
        let mut taken = second_map(&fd);
        taken.as_mut_slice().fill(0x66);
        drop(taken);
        assert!(fd.map().unwrap().as_slice().iter().all(|b| *b == 0), "{kind}: who has it wipes it");
    }
}

/// A pipe can hold a page by reference (vmsplice): what it yields after the drop is what the page holds then.
#[test]
fn private_memory_is_wiped_at_drop() {
    for hand_over in [false, true] {
        let mut mem = SecretMem::with_kind(SecretKind::Locked, 4096).unwrap();
        mem.as_mut_slice().fill(0xee);
        let (reader, writer) = nix::unistd::pipe().unwrap();
        let part = libc::iovec { iov_base: mem.as_mut_slice().as_mut_ptr().cast(), iov_len: 4096 };
        // SAFETY: the iovec names memory of `mem`, of which vmsplice only takes page references.
        let spliced = unsafe { libc::vmsplice(writer.as_raw_fd(), &part, 1, 0) };
        assert_eq!(spliced, 4096, "{}", std::io::Error::last_os_error());
        if hand_over {
            mem.hand_over()
        } else {
            drop(mem)
        }
        let mut after = vec![0xff; 4096];
        File::from(reader).read_exact(&mut after).unwrap();
        assert!(after.iter().all(|b| *b == 0), "contents survived the drop");
    }
}

#[test]
fn memfd_secret_is_unreadable_from_outside_and_locked_memory_is_not_dumped() {
    for kind in kinds() {
        let mut mem = SecretMem::with_kind(kind, 64).unwrap();
        mem.as_mut_slice().fill(0xcd);
        let address = mem.as_slice().as_ptr() as u64;
        let flags = vm_flags(address);
        // What memfd_secret makes is locked by what it is; not every kernel (6.1) says so here.
        let is_locked = flags.contains(&"lo".to_string()) || kind == SecretKind::MemfdSecret;
        assert!(is_locked, "{kind}: locked: {flags:?}");
        assert!(flags.contains(&"dd".to_string()), "{kind}: left out of core dumps: {flags:?}");
        let mut memory = File::open("/proc/self/mem").unwrap();
        memory.seek(SeekFrom::Start(address)).unwrap();
        let outside = memory.read(&mut [0; 64]);
        assert_eq!(outside.is_err(), kind == SecretKind::MemfdSecret, "{kind}: {outside:?}");
    }
}

/// The VmFlags of the mapping that holds `address`, as /proc/self/smaps words them.
fn vm_flags(address: u64) -> Vec<String> {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut inside = false;
    for line in smaps.lines() {
        let range = line.split(' ').next().and_then(|range| range.split_once('-'));
        let bounds = range.and_then(|(from, to)| {
            Some((u64::from_str_radix(from, 16).ok()?, u64::from_str_radix(to, 16).ok()?))
        });
        if let Some((from, to)) = bounds {
            inside = (from..to).contains(&address);
        } else if let (true, Some(flags)) = (inside, line.strip_prefix("VmFlags:")) {
            return flags.split_whitespace().map(String::from).collect();
        }
    }
    panic!("no mapping at {address:#x}");
}

#[derive(Debug, PartialEq)]
enum ChildFinds {
    Zero,
    Secret,
    NoPage,
}

/// What a forked child finds `offset` bytes from the start of the memory.
fn in_child(mem: &SecretMem, offset: isize) -> ChildFinds {
    let byte = mem.as_slice().as_ptr().wrapping_offset(offset);
    // SAFETY: the child only makes system calls and reads one byte, then ends without running destructors.
    match unsafe { fork() }.unwrap() {
        // SAFETY: as above; that the byte may not be mapped is what the caller asks about.
        ForkResult::Child => unsafe {
            let no_core = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            libc::setrlimit(libc::RLIMIT_CORE, &no_core);
            libc::signal(libc::SIGSEGV, libc::SIG_DFL);
            libc::_exit(i32::from(byte.read_volatile() != 0));
        },
        ForkResult::Parent { child } => match waitpid(child, None).unwrap() {
            WaitStatus::Exited(_, 0) => ChildFinds::Zero,
            WaitStatus::Exited(_, _) => ChildFinds::Secret,
            WaitStatus::Signaled(_, nix::sys::signal::Signal::SIGSEGV, _) => ChildFinds::NoPage,
            other => panic!("{other:?}"),
        },
    }
}

#[test]
fn a_forked_child_does_not_see_the_secret() {
    for kind in kinds() {
        let mut mem = SecretMem::with_kind(kind, 64).unwrap();
        mem.as_mut_slice().fill(0x99);
        let expected = if kind == SecretKind::Locked { ChildFinds::Zero } else { ChildFinds::NoPage };
        assert_eq!(in_child(&mem, 0), expected, "{kind}");
        assert!(mem.as_slice().iter().all(|b| *b == 0x99), "{kind}: untouched in the parent");
    }
}

#[test]
fn guard_pages_stand_on_both_sides() {
    for len in [64, 4096, 8192] {
        let mem = SecretMem::with_kind(SecretKind::Locked, len).unwrap();
        let end = len.next_multiple_of(pages::page_size()) as isize;
        assert_eq!(in_child(&mem, -1), ChildFinds::NoPage);
        assert_eq!(in_child(&mem, end - 1), ChildFinds::Zero);
        assert_eq!(in_child(&mem, end), ChildFinds::NoPage);
    }
}

#[test]
fn shareable_memory_cannot_be_resized_and_closes_on_exec() {
    for kind in shareable_kinds() {
        let fd = SecretFd::with_kind(kind, 64).unwrap();
        for len in [0, 1, 8192] {
            assert!(nix::unistd::ftruncate(&fd, len).is_err(), "{kind}: resized to {len}");
        }
        let flags = nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_GETFD).unwrap();
        assert_ne!(flags & libc::FD_CLOEXEC, 0);
    }
}

/// A helper that has filled the pages and is gone does not leave them unlocked, nor does one that never came.
#[test]
fn pages_that_are_handed_round_are_locked_from_the_beginning() {
    let fd = SecretFd::with_kind(SecretKind::LockedMemfd, 64).unwrap();
    let stat = nix::sys::stat::fstat(&fd).unwrap();
    // The number of the inode alone may be another file's, or how large a mapping is.
    let (major, minor) = (nix::sys::stat::major(stat.st_dev), nix::sys::stat::minor(stat.st_dev));
    let file = format!(" {major:02x}:{minor:02x} {} ", stat.st_ino);
    let locked = || {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut of_file = smaps.lines().skip_while(|line| !line.contains(&file));
        of_file.find_map(|line| line.strip_prefix("VmFlags:")).is_some_and(|flags| flags.contains(" lo"))
    };
    assert!(locked());
    let mut helper = second_map(&fd);
    helper.as_mut_slice().fill(0x44);
    helper.hand_over();
    assert!(locked());
    assert_eq!(fd.map().unwrap().as_slice(), [0x44; 64]);
}

#[test]
fn other_files_are_refused_as_secret_descriptors() {
    let ordinary = tempfile::tempfile().unwrap();
    ordinary.set_len(64).unwrap();
    let unsealed = nix::sys::memfd::memfd_create("x", nix::sys::memfd::MFdFlags::MFD_ALLOW_SEALING).unwrap();
    nix::unistd::ftruncate(&unsealed, 64).unwrap();
    let (pipe, _) = nix::unistd::pipe().unwrap();
    for fd in [OwnedFd::from(ordinary), unsealed, pipe] {
        assert_eq!(SecretFd::from_fd(fd).err().unwrap().kind(), Kind::Usage);
    }
}

struct Traced<'a>(u64, &'a std::cell::Cell<u32>);

impl Drop for Traced<'_> {
    fn drop(&mut self) {
        self.1.set(self.1.get() + 1);
    }
}

#[test]
fn a_value_in_secret_memory_is_used_in_place_and_dropped_once() {
    let drops = std::cell::Cell::new(0);
    let value = Secret::new(|| Traced(0x1234_5678, &drops)).unwrap();
    assert_eq!(value.0, 0x1234_5678);
    assert_eq!(drops.get(), 0);
    drop(value);
    assert_eq!(drops.get(), 1);
}
