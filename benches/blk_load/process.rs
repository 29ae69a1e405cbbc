//! What the back-end's process uses, seen from outside.

use super::frontend::Result;
use nix::unistd::Pid;
use std::collections::HashMap;
use std::{fs, io};

/// CPU time that process `pid` has used in all its threads, those that have ended among them, nanoseconds.
pub fn cpu_ns(pid: Pid) -> Result<u64> {
    let mut clock: libc::clockid_t = 0;
    // SAFETY: the call writes one clockid_t to where the pointer leads.
    let error = unsafe { libc::clock_getcpuclockid(pid.as_raw(), &mut clock) };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error).into());
    }
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes one timespec to where the pointer leads.
    if unsafe { libc::clock_gettime(clock, &mut time) } != 0 {
        return Err(io::Error::last_os_error().into());
    }
    Ok(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
}

/// How often each thread of a process has gone to sleep, by thread id.
pub struct Sleeps(HashMap<String, u64>);

impl Sleeps {
    /// As of now.
    pub fn of(pid: Pid) -> Result<Sleeps> {
        let mut sleeps = HashMap::new();
        for task in fs::read_dir(format!("/proc/{pid}/task"))? {
            let task = task?;
            // A thread may end between the two looks.
            let Ok(status) = fs::read_to_string(task.path().join("status")) else { continue };
            let line = status.lines().find_map(|l| l.strip_prefix("voluntary_ctxt_switches:"));
            let count = line.and_then(|n| n.trim().parse().ok()).unwrap_or(0);
            sleeps.insert(task.file_name().to_string_lossy().into_owned(), count);
        }
        Ok(Sleeps(sleeps))
    }

    /// How many more than `before`. Threads that have ended since do not count.
    pub fn since(&self, before: &Sleeps) -> u64 {
        let more = |(thread, count): (&String, &u64)| count - before.0.get(thread).unwrap_or(&0);
        self.0.iter().map(more).sum()
    }
}

/// How many bytes of all memory files of this machine lie in huge pages.
pub fn memory_files_in_huge_pages() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix("ShmemHugePages:")?.trim().strip_suffix(" kB")?.parse().ok());
    Ok(kib.unwrap_or(0_u64) << 10)
}
