//! Snapshots and deletions for a long time on a file system that is nearly full: writes fail for want of
//! space, and succeed again; whatever is deleted gives space back; nothing that was acknowledged is lost.
//!
//! `ci/soak --full` runs it for as long as one likes; among the other tests it runs for some seconds.
//! SEALBLK_SOAK_SECONDS says how long, SEALBLK_TEST_SEED repeats what was done.

use crate::common::attach::{Place, open, read};
use crate::common::content::Reader;
use crate::common::disk::pattern;
use crate::common::frontend::load::Random;
use crate::common::frontend::{Request, Session, block};
use crate::common::loop_disk::MemoryDisk;
use crate::common::rig::Rig;
use crate::common::store::{Store, said};
use nix::sys::statvfs::statvfs;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

const SIZE: usize = 8 << 20;
/// What is written and compared at a time.
const BLOCK: usize = 4096;
/// The file system, of which the store's own reserve and the volume take about the half.
const DISK: u64 = 32 << 20;
/// Snapshots that are there at a time, at most.
const MOST: usize = 6;
const SECTOR: usize = 512;

/// What each block of a disk may hold: after a write that failed, each sector of it is the
/// old one or the new.
#[derive(Clone)]
struct Allowed(Vec<Vec<u64>>);

/// What a block holds that was written with this seed; 0: nothing.
fn content(block: usize, seed: u64) -> Vec<u8> {
    if seed == 0 {
        vec![0; BLOCK]
    } else {
        pattern(seed.wrapping_mul(1 << 20).wrapping_add(block as u64), BLOCK)
    }
}

impl Allowed {
    #[track_caller]
    fn check(&self, bytes: &[u8], what: &str) {
        for (n, (found, seeds)) in bytes.chunks(BLOCK).zip(&self.0).enumerate() {
            let all: Vec<Vec<u8>> = seeds.iter().map(|&seed| content(n, seed)).collect();
            for (at, sector) in found.chunks(SECTOR).enumerate() {
                let is_one = all.iter().any(|one| one[at * SECTOR..][..SECTOR] == *sector);
                assert!(is_one, "{what}: sector {at} of block {n} holds none of {seeds:?}");
            }
        }
    }
}

struct Life {
    rig: Rig,
    reader: Reader,
    disk: MemoryDisk,
    random: Random,
    now: Allowed,
    snapshots: BTreeMap<String, Allowed>,
    seeds: u64,
    /// How often each thing was done, and how often it found no space.
    done: BTreeMap<&'static str, (u64, u64)>,
}

impl Life {
    fn note(&mut self, what: &'static str, is_refused: bool) {
        let (all, refused) = self.done.entry(what).or_default();
        *all += 1;
        *refused += u64::from(is_refused);
    }

    fn free(&self) -> u64 {
        let found = statvfs(self.disk.folder()).expect("look at the file system");
        found.blocks_available() * found.fragment_size()
    }

    fn ballast(&self) -> PathBuf {
        self.disk.folder().join("ballast")
    }

    /// Something else takes all of the file system but so much.
    fn leave(&self, free: u64) {
        let mut ballast = File::create(self.ballast()).expect("make the ballast");
        let block = [7; 16 << 10];
        while self.free() > free + block.len() as u64 {
            if ballast.write_all(&block).is_err() {
                break;
            }
        }
    }

    fn write(&mut self, session: &mut Session) {
        let (first, count) =
            (self.random.below((SIZE / BLOCK - 64) as u64) as usize, self.random.pick(&[1, 4, 64]));
        self.seeds += 1;
        let data: Vec<u8> = (first..first + count).flat_map(|n| content(n, self.seeds)).collect();
        let request = Request::write((first * BLOCK / SECTOR) as u64, &data);
        let status = request.run(&mut session.rings[0]).expect("an answer").status;
        for may in &mut self.now.0[first..first + count] {
            match status {
                block::OK => *may = vec![self.seeds],
                block::IOERR => may.push(self.seeds),
                other => panic!("a write is answered with {other}"),
            }
        }
        self.note("write", status != block::OK);
    }

    fn snapshot(&mut self) {
        let output = self.rig.place.store.run(&["snapshot", "create", "t"]);
        if output.status.success() {
            let id = String::from_utf8(output.stdout).expect("UTF-8").trim().to_owned();
            self.snapshots.insert(id, self.now.clone());
            return self.note("snapshot", false);
        }
        let words = said(&output);
        assert!(
            words.contains("No space left on device") || words.contains("file system is full"),
            "{words}"
        );
        self.note("snapshot", true);
    }

    fn delete(&mut self) {
        let all: Vec<String> = self.snapshots.keys().cloned().collect();
        let Some(id) = (!all.is_empty()).then(|| self.random.pick(&all)) else { return };
        let output = self.rig.place.store.run(&["snapshot", "delete", &id]);
        let words = said(&output);
        // Merging layers takes space for a moment, and is made up for.
        let is_deleted = output.status.success() || words.contains(&format!("{id} is deleted, but not all"));
        assert!(is_deleted, "{words}");
        self.snapshots.remove(&id);
        self.note("deletion", !output.status.success());
    }

    fn check(&self, session: &mut Session) {
        let ring = &mut session.rings[0];
        let bytes: Vec<u8> =
            (0..SIZE).step_by(1 << 20).flat_map(|at| read(ring, (at / SECTOR) as u64, 1 << 20)).collect();
        self.now.check(&bytes, "the volume");
        for (id, allowed) in &self.snapshots {
            allowed.check(&self.reader.snapshot_content(&self.reader.snapshot(id)), id);
        }
    }
}

#[test]
fn snapshots_come_and_go_on_a_nearly_full_file_system() {
    let number =
        |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect("a whole number"));
    let (seed, seconds) =
        (number("SEALBLK_TEST_SEED").unwrap_or(1), number("SEALBLK_SOAK_SECONDS").unwrap_or(5));
    println!("seed {seed}");
    let store = Store::new();
    let Some(disk) = MemoryDisk::mount(DISK, store.root().parent().expect("a folder")) else { return };
    let rig = Rig::of(Place::of(store, &[]));
    let now = Allowed(vec![vec![0]; SIZE / BLOCK]);
    let reader = rig.reader();
    // It asks the KMS for the data key, the only one, while there is space for the record of that.
    reader.volume_content(&reader.volume("t"));
    let mut life = Life {
        rig,
        reader,
        disk,
        random: Random::new(seed),
        now,
        snapshots: BTreeMap::new(),
        seeds: 0,
        done: BTreeMap::new(),
    };
    // What the rig has put there is not this test's.
    let host = life.rig.place.attach(&[]);
    let mut session = open(&life.rig.place.socket());
    let discard = crate::common::frontend::Segment { sector: 0, count: (SIZE / SECTOR) as u32, flags: 0 };
    let status = Request::discard(&[discard]).run(&mut session.rings[0]).expect("an answer").status;
    assert_eq!(status, block::OK);
    let (begun, mut told) = (Instant::now(), Instant::now());
    while begun.elapsed() < Duration::from_secs(seconds) {
        match life.random.below(100) {
            0..=59 => life.write(&mut session),
            60..=69 => {
                let status = Request::flush().run(&mut session.rings[0]).expect("an answer").status;
                assert_eq!(status, block::OK, "a flush");
            }
            70..=79 if life.snapshots.len() < MOST => life.snapshot(),
            80..=89 => life.delete(),
            90..=93 => {
                let free = life.random.below(2 << 20);
                life.leave(free);
            }
            94..=95 => drop(fs::remove_file(life.ballast())),
            96 => drop(life.rig.place.store.run(&["gc"])),
            97 => life.check(&mut session),
            _ => {}
        }
        if told.elapsed() > Duration::from_secs(60) {
            told = Instant::now();
            println!("{} s: {:?}, {} snapshots", begun.elapsed().as_secs(), life.done, life.snapshots.len());
        }
    }
    life.check(&mut session);
    // With nothing but what was promised for a full disk, the volume is detached and attached again.
    life.leave(0);
    drop(session);
    host.end();
    let host = life.rig.place.attach(&[]);
    let mut session = open(&life.rig.place.socket());
    life.check(&mut session);
    fs::remove_file(life.ballast()).expect("make room");
    life.write(&mut session);
    while !life.snapshots.is_empty() {
        life.delete();
    }
    life.rig.place.store.ok(&["gc"]);
    life.check(&mut session);
    drop(session);
    host.end();
    life.rig.place.store.ok(&["store", "check"]);
    life.rig.place.store.ok(&["audit", "verify"]);
    life.rig.assert_layers_are_named();
    println!("{:?}", life.done);
    if seconds >= 60 {
        for what in ["write", "snapshot", "deletion"] {
            assert!(life.done.get(what).is_some_and(|(all, _)| *all > 0), "{what}: {:?}", life.done);
        }
        assert!(life.done["write"].1 > 0, "no write found the file system full: {:?}", life.done);
    }
}
