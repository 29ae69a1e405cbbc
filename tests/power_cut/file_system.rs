//! The scenarios of the other files over real file systems: all writes of the block device below are
//! recorded, with its flushes; then the device is put back into states in which a power cut could have left
//! it, the kernel mounts it, which replays its journal, and the store on it is looked at.
//!
//! The device is a loop device over a file that QEMU's storage daemon offers by FUSE, and whose writes it
//! logs. That takes root, FUSE and loop devices, and mkfs; so these tests are run by `ci/power-cut` alone.

use super::block_log::BlockLog;
use super::check::check;
use super::expect::Expect;
use super::explore::{number, seed};
use super::image::Share;
use super::random::Random;
use super::script::Script;
use super::site::{Site, folder};
use super::tape::{Running, Said, Tape};
use super::trace::Mark;
use super::{hydration, kms, snapshots, volumes};
use crate::common::patience::{Deadline, limit, wait_for};
use crate::common::process::{tie_to_test, tool, wait_within};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// A file system as it is made: its name, the device's MiB and the bytes in its blocks, and
/// what mkfs takes besides.
type Made = (&'static str, u64, u32, &'static [&'static str]);
const EXT4: Made = ("ext4", 48, 512, &["-F", "-q", "-b", "4096"]);
/// Where the guests' sectors share blocks, which are read and written back.
const LARGE: Made = ("ext4", 48, 4096, &["-F", "-q", "-b", "4096"]);
const XFS: Made = ("xfs", 320, 512, &["-q"]);

/// Runs a command that must succeed.
#[track_caller]
fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A device with a file system; unmounted with the value.
struct Mounted(PathBuf);

impl Mounted {
    /// What is in the file `disk`, as a device with blocks of so many bytes.
    fn new(disk: &Path, block: u32, at: &Path) -> Result<Self, String> {
        std::fs::create_dir_all(at).map_err(|e| e.to_string())?;
        let attach = ["--find", "--show", "--sector-size", &block.to_string()];
        let attached = Command::new("losetup").args(attach).arg(disk).output().expect("start losetup");
        let device = String::from_utf8(attached.stdout).expect("a path");
        assert!(attached.status.success(), "losetup: {}", String::from_utf8_lossy(&attached.stderr));
        let output = Command::new("mount").args(["-o", "nodiscard", device.trim()]).arg(at).output();
        // It is let go with its last user.
        run(Command::new("losetup").args(["--detach", device.trim()]));
        let output = output.expect("start mount");
        match output.status.success() {
            true => Ok(Mounted(at.into())),
            false => Err(format!("mount: {}", String::from_utf8_lossy(&output.stderr))),
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let deadline = Deadline::after(limit());
        // The kernel ends the requests of a killed process, and closes its files, only
        // after the process itself.
        let is_unmounted = || {
            let status = Command::new("umount").arg(&self.0).stderr(Stdio::null()).status();
            status.is_ok_and(|s| s.success())
        };
        // No panic while another is under way.
        while !is_unmounted() && !deadline.left().is_zero() {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// The storage daemon; killed with the value.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = wait_within(&mut self.0, limit());
    }
}

/// A device whose writes are recorded.
struct Device {
    // In this order: unmounted before the daemon ends.
    mounted: Mounted,
    daemon: Daemon,
    folder: TempDir,
}

impl Device {
    fn new((name, mib, block, arguments): Made) -> Self {
        let folder = folder();
        let path = |name: &str| folder.path().join(name);
        File::create(path("disk")).and_then(|f| f.set_len(mib << 20)).expect("make a disk");
        run(Command::new(format!("mkfs.{name}")).args(arguments).arg(path("disk")));
        run(Command::new("cp").arg("--sparse=always").args([path("disk"), path("base")]));
        ["log", "device"].iter().for_each(|name| drop(File::create(path(name)).expect("make a file")));
        let node = |text: &str, file: &str| format!("{text},filename={}", path(file).display());
        let mut daemon = tool("qemu-storage-daemon");
        daemon.args(["--blockdev", &node("driver=file,node-name=disk", "disk")]);
        daemon.args(["--blockdev", &node("driver=file,node-name=log", "log")]);
        daemon
            .args(["--blockdev", "driver=blklogwrites,node-name=both,file=disk,log=log,log-sector-size=512"]);
        let device = path("device").display().to_string();
        daemon.args(["--export", &format!("type=fuse,id=e,node-name=both,writable=on,mountpoint={device}")]);
        daemon.stdin(Stdio::null());
        tie_to_test(&mut daemon, vec![]);
        let mut daemon = Daemon(daemon.spawn().expect("start qemu-storage-daemon"));
        wait_for("the storage daemon offers the device", || {
            let ended = daemon.0.try_wait().expect("ask for the daemon");
            assert!(ended.is_none(), "the storage daemon has ended: {ended:?}");
            let offered = std::fs::metadata(path("device")).is_ok_and(|m| m.len() > 0);
            offered.then_some(()).ok_or("an empty file")
        });
        let mounted =
            Mounted::new(&path("device"), block, &path("mounted")).unwrap_or_else(|e| panic!("{e}"));
        Device { mounted, daemon, folder }
    }

    fn log_len(&self) -> u64 {
        std::fs::metadata(self.folder.path().join("log")).expect("the log is there").len()
    }
}

/// Where the log ended at each mark.
#[derive(Default)]
struct Marks {
    marks: Vec<(u64, Mark)>,
    start: u64,
}

struct BlockTape {
    device: Device,
    marks: Mutex<Marks>,
}

impl Tape for BlockTape {
    fn start(&self) {
        self.marks.lock().unwrap().start = self.device.log_len();
    }

    fn mark(&self, mark: Mark) {
        let now = self.device.log_len();
        self.marks.lock().unwrap().marks.push((now, mark));
    }

    fn mark_where_it_spoke(&self, mark: Mark) {
        self.mark(mark);
    }

    fn run(&self, mut command: Command) -> Said {
        tie_to_test(&mut command, vec![]);
        let output = command.output().expect("start sealblk");
        let text = |bytes| String::from_utf8(bytes).expect("output in UTF-8");
        Said { status: output.status, out: text(output.stdout), err: text(output.stderr) }
    }

    fn begin(&self, mut command: Command) -> Box<dyn Running> {
        tie_to_test(&mut command, vec![]);
        Box::new(Host(command.spawn().expect("start sealblk")))
    }
}

struct Host(Child);

impl Running for Host {
    fn has_ended(&mut self) -> bool {
        self.0.try_wait().expect("ask for the child").is_some()
    }

    fn wait(mut self: Box<Self>) -> ExitStatus {
        wait_within(&mut self.0, limit()).expect("it ends")
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What was recorded, and the disk before it.
struct Recorded {
    log: BlockLog,
    marks: Vec<(usize, Mark)>,
    start: usize,
    folder: TempDir,
    block: u32,
}

fn record(made: Made, scenario: &dyn Fn(&mut Script)) -> Recorded {
    let device = Device::new(made);
    let top = device.mounted.0.join("t");
    std::fs::create_dir(&top).expect("make a folder");
    run(Command::new("sync").arg("--file-system").arg(&top));
    let tape = Arc::new(BlockTape { device, marks: Mutex::default() });
    scenario(&mut Script::new(Site::at(top), tape.clone()));
    let tape = Arc::into_inner(tape).expect("the scenario is over");
    let Device { mounted, daemon, folder } = tape.device;
    drop(mounted);
    end(daemon);
    let log = BlockLog::read(&folder.path().join("log")).expect("read the log");
    let marks = tape.marks.into_inner().expect("nobody panicked");
    let start = log.entries_in(marks.start);
    let marks = marks.marks.into_iter().map(|(len, mark)| (log.entries_in(len), mark)).collect();
    Recorded { log, marks, start, folder, block: made.2 }
}

/// Ends the daemon so that it finishes its log.
fn end(mut daemon: Daemon) {
    let pid = nix::unistd::Pid::from_raw(daemon.0.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("it runs");
    assert!(wait_within(&mut daemon.0, limit()).expect("it ends").success());
}

impl Recorded {
    /// One state: whether it holds what had been promised.
    fn attempt(&self, done: usize, share: Share, seed: u64) -> Result<(), String> {
        let state = folder();
        let image = state.path().join("disk");
        run(Command::new("cp").arg("--sparse=always").args([&self.folder.path().join("base"), &image]));
        let file = File::options().write(true).open(&image).expect("open the copy");
        self.log.replay(done, share, &mut Random::new(seed), &file).expect("put the state into the copy");
        drop(file);
        let mounted = Mounted::new(&image, self.block, &state.path().join("mounted"))?;
        let mut expect = Expect::default();
        self.marks.iter().filter(|(at, _)| *at <= done).for_each(|(_, mark)| (mark.apply)(&mut expect));
        check(&Site::at(mounted.0.join("t")), &expect, done.is_multiple_of(2))
    }

    /// The extremes at every flush, then states by chance until the time is over. Returns what was
    /// tried, or what was wrong.
    fn explore(&self) -> Result<String, String> {
        let cuts = self.log.before_flushes(self.start);
        for &done in &cuts {
            self.judge(done, Share::None, 0)?;
            self.judge(done, Share::All, 0)?;
        }
        let end = Instant::now() + Duration::from_secs(number("POWER_CUT_SECONDS").unwrap_or(20));
        let (mut random, mut chosen) = (Random::new(seed()), 0);
        while Instant::now() < end {
            let done = self.start + random.below(self.log.len() + 1 - self.start);
            self.judge(done, Share::Chance, random.next())?;
            chosen += 1;
        }
        let (writes, flushes) = (self.log.len(), cuts.len() - 1);
        Ok(format!("{writes} writes, {flushes} flushes, {chosen} states by chance (seed {})", seed()))
    }

    /// One state, with the circumstances if it is wrong.
    fn judge(&self, done: usize, share: Share, seed: u64) -> Result<(), String> {
        self.attempt(done, share, seed).map_err(|problem| {
            let told = self.marks.iter().filter(|(at, _)| *at <= done).map(|(_, mark)| mark.label.as_str());
            let writes = self.log.len();
            format!(
                "a power cut after write {done} of {writes}, {share:?} of what was not flushed, seed \
                 {seed:#x}: {problem}\nUntil then:\n  {}",
                told.collect::<Vec<_>>().join("\n  ")
            )
        })
    }
}

fn all(made: Made) {
    type Scenario<'a> = (&'a str, &'a dyn Fn(&mut Script));
    let scenarios: [Scenario<'_>; 14] = [
        ("create", &|script| volumes::create(script, &[])),
        ("delete", &volumes::delete),
        ("first attach", &|script| volumes::first_attach(script, &[])),
        ("keys", &kms::key_states),
        ("snapshot and clone", &|script| snapshots::cloned(script, &[])),
        ("snapshot while attached", &|script| snapshots::of_attached(script, &[])),
        ("snapshots deleted", &snapshots::deleted),
        ("rewrap", &volumes::rewrapped),
        ("rename and modify", &volumes::renamed_and_modified),
        ("rekey while attached", &|script| hydration::rekeyed_attached(script, &[])),
        ("flatten", &hydration::flattened),
        ("copy under another key", &hydration::copied),
        ("pull from a place outside", &hydration::pulled),
        ("restore from a place outside", &hydration::restored),
    ];
    for (name, scenario) in scenarios {
        let tried =
            record(made, scenario).explore().unwrap_or_else(|wrong| panic!("{}, {name}: {wrong}", made.0));
        println!("{}, {name}: {tried}", made.0);
    }
}

#[test]
#[ignore = "takes root, FUSE and loop devices; run by ci/power-cut"]
fn every_scenario_survives_on_ext4() {
    all(EXT4);
}

#[test]
#[ignore = "takes root, FUSE and loop devices; run by ci/power-cut"]
fn every_scenario_survives_on_a_disk_with_large_blocks() {
    all(LARGE);
}

#[test]
#[ignore = "takes root, FUSE and loop devices; run by ci/power-cut"]
fn every_scenario_survives_on_xfs() {
    all(XFS);
}

#[test]
#[ignore = "takes root, FUSE and loop devices; run by ci/power-cut"]
fn a_disk_that_does_not_flush_is_found_out() {
    let mut recorded = record(EXT4, &|script| volumes::first_attach(script, &[]));
    recorded.log.forget_flushes();
    recorded.explore().expect_err("nothing was found wrong");
}
