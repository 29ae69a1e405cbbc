//! A store on a disk, and a guest that writes where blocks are shared.

use crate::common::attach::{Host, Place, flush, read};
use crate::common::content::Reader;
use crate::common::disk::pattern;
use crate::common::frontend::block::{OK, Pending, complete};
use crate::common::frontend::load::Random;
use crate::common::frontend::{Options, Request, Segment, Session};
use crate::common::loop_disk::{Kind, LoopDisk};
use crate::common::store::Store;
use serde_json::Value;
use std::path::{Path, PathBuf};

const SECTOR: usize = 512;

/// A store with the volume `t` of 8 MiB, on a disk of its own. The disk goes first.
pub struct Rig {
    _disk: LoopDisk,
    pub place: Place,
    pub kind: Kind,
    pub sector: usize,
}

impl Rig {
    /// On such a disk, where that can be had, with a volume with sectors of so many bytes.
    pub fn new(kind: Kind, sector: usize) -> Option<Self> {
        let store = Store::new();
        let disk = LoopDisk::mount(kind, store.root().parent().unwrap())?;
        let place = Place::of(store, &["--sector-size", &sector.to_string()]);
        Some(Rig { _disk: disk, place, kind, sector })
    }

    /// Attaches a volume and connects to it, with two rings.
    #[track_caller]
    pub fn attach(&self, volume: &str) -> (Host, Session) {
        let socket = self.place.folder().join(format!("{volume}.socket"));
        let mut command = self.place.store.command();
        command.args(["attach", volume, "--queues", "2", "--socket-path"]).arg(&socket);
        let host = self.place.start(command, vec![]);
        (host, connect(&socket))
    }

    /// How the volume is reached, as far as its blocks go.
    #[track_caller]
    pub fn assert_access(&self, volume: &str, expected: Access) {
        let shown = self.place.store.ok(&["volume", "show", volume, "--json"]);
        let shown: Value = serde_json::from_str(&shown).unwrap();
        let access = shown["attachment"]["access"].as_str().unwrap_or_else(|| panic!("{shown}"));
        let kind = self.kind;
        match expected {
            Access::Best if self.has_parts() => {
                let words = format!("io_uring, O_DIRECT in the disk's blocks of {} bytes", kind.unit());
                assert!(access.starts_with(&words), "{kind}: {access}");
            }
            Access::Best => assert!(access.starts_with("io_uring, O_DIRECT;"), "{kind}: {access}"),
            Access::PageCache => assert!(access.starts_with("io_uring, buffered"), "{kind}: {access}"),
        }
    }

    /// Whether a sector of the volume is a part of a block.
    pub fn has_parts(&self) -> bool {
        self.kind.unit() as usize > self.sector
    }

    pub fn reader(&self) -> Reader {
        Reader::new(&self.place.store.root(), self.place.store.config())
    }

    /// Runs a command that succeeds, and returns what it prints.
    #[track_caller]
    pub fn id(&self, arguments: &[&str]) -> String {
        self.place.store.ok(arguments).trim().to_owned()
    }

    /// A file beside the store.
    pub fn path(&self, name: &str) -> PathBuf {
        self.place.folder().join(name)
    }
}

/// What is expected of how a volume is reached.
#[derive(Clone, Copy)]
pub enum Access {
    /// Past the page cache.
    Best,
    PageCache,
}

impl Kind {
    /// What O_DIRECT wants there.
    pub fn unit(&self) -> u32 {
        if self.file_system == "btrfs" { 4096 } else { self.block }
    }
}

fn connect(socket: &Path) -> Session {
    Session::open(socket, &Options { queues: 2, ..Options::default() }).expect("it serves a front-end")
}

/// A guest that knows what its disk holds.
pub struct Writer {
    pub session: Session,
    pub data: Vec<u8>,
    pub random: Random,
    pub sector: usize,
}

impl Writer {
    /// With a disk of zeros.
    pub fn new(rig: &Rig, session: Session, size: usize) -> Self {
        Writer { session, data: vec![0; size], random: Random::new(size as u64 + 1), sector: rig.sector }
    }

    /// 64 bytes of what the disk holds, hardly any of which is zero.
    pub fn some_written(&self) -> Vec<u8> {
        let piece = self.data.chunks(64).find(|piece| piece.iter().filter(|&&byte| byte == 0).count() < 8);
        piece.expect("something was written").to_vec()
    }

    fn seed(&mut self) -> u64 {
        self.random.below(u64::MAX - 1) + 1
    }

    /// The first thing that is written is one sector that begins no block.
    pub fn write_at_sector_one(&mut self) {
        let bytes = pattern(self.seed(), self.sector);
        self.write(self.sector, &bytes);
    }

    fn write(&mut self, at: usize, bytes: &[u8]) {
        let request = Request::write((at / SECTOR) as u64, bytes);
        let outcome = request.run(&mut self.session.rings[0]).expect("a write completes");
        assert_eq!(outcome.status, OK, "{} bytes at {at}", bytes.len());
        self.data[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Writes of every kind, and reads all of the disk.
    pub fn work(&mut self) {
        for _ in 0..6 {
            self.write_side_by_side();
            self.write_long();
            self.zero();
        }
        self.look();
    }

    /// Both rings write, at a time, sectors that lie in turn side by side, and whole blocks between them.
    fn write_side_by_side(&mut self) {
        let (sector, blocks) = (self.sector, (self.data.len() / 65536) as u64);
        let first = self.random.below(blocks) as usize * 65536;
        let mut started = [Vec::new(), Vec::new()];
        for n in 0..65536 / sector / 2 {
            let (at, ring) = (first + n * sector, n % 2);
            let bytes = pattern(self.seed(), sector);
            self.data[at..at + sector].copy_from_slice(&bytes);
            let write = Request::write((at / SECTOR) as u64, &bytes);
            started[ring].push(write.submit(&mut self.session.rings[ring]).unwrap());
            // As many as a ring has room for.
            if started[ring].len() == 32 {
                self.settle(&mut started);
            }
        }
        for at in (first + 32768..first + 65536).step_by(4096) {
            let bytes = pattern(self.seed(), 4096);
            self.data[at..at + 4096].copy_from_slice(&bytes);
            let ring = at / 4096 % 2;
            let write = Request::write((at / SECTOR) as u64, &bytes);
            started[ring].push(write.submit(&mut self.session.rings[ring]).unwrap());
        }
        self.settle(&mut started);
    }

    /// Both rings have writes in flight, of sectors that lie in turn side by side. Returns them.
    pub fn begin_side_by_side(&mut self) -> Vec<(usize, Vec<u8>)> {
        let first = self.random.below((self.data.len() / 65536) as u64) as usize * 65536;
        let mut begun = Vec::new();
        for n in 0..64 {
            let (at, bytes) = (first + n * self.sector, pattern(self.seed(), self.sector));
            let write = Request::write((at / SECTOR) as u64, &bytes);
            write.submit(&mut self.session.rings[n % 2]).unwrap();
            begun.push((at, bytes));
        }
        for ring in &mut self.session.rings {
            ring.kick_if_wanted();
        }
        begun
    }

    /// Writes that are in flight while `f` does something end well, and are there.
    #[track_caller]
    pub fn writes_survive(&mut self, seed: u64, f: impl FnOnce()) {
        let ring = &mut self.session.rings[0];
        let begun: Vec<_> = (0..32)
            .map(|n| {
                let (sector, bytes) = (64 * n, pattern(seed + n, 8192));
                self.data[sector as usize * SECTOR..][..8192].copy_from_slice(&bytes);
                Request::write(sector, &bytes).submit(ring).unwrap()
            })
            .collect();
        ring.kick_if_wanted();
        f();
        for outcome in complete(ring, begun).unwrap() {
            assert_eq!(outcome.status, OK);
        }
        self.look();
    }

    /// Each of these is there, or what was there before.
    pub fn find(&mut self, begun: Vec<(usize, Vec<u8>)>) {
        for (at, bytes) in begun {
            let found = read(&mut self.session.rings[0], (at / SECTOR) as u64, bytes.len());
            let was = &mut self.data[at..at + bytes.len()];
            assert!(found == was || found == bytes, "what was on its way to byte {at}");
            was.copy_from_slice(&found);
        }
    }

    fn settle(&mut self, started: &mut [Vec<Pending>; 2]) {
        for ring in &mut self.session.rings {
            ring.kick_if_wanted();
        }
        for (ring, started) in self.session.rings.iter_mut().zip(started) {
            for outcome in complete(ring, std::mem::take(started)).unwrap() {
                assert_eq!(outcome.status, OK);
            }
        }
    }

    /// More than one buffer takes, from within a block to within another.
    fn write_long(&mut self) {
        let sectors = self.data.len() / self.sector;
        let count = (600 << 10) / self.sector + 3;
        let at = self.random.below((sectors - count) as u64) as usize * self.sector;
        let bytes = pattern(self.seed(), count * self.sector);
        self.write(at, &bytes);
    }

    /// Zeros and discards that begin and end within blocks.
    fn zero(&mut self) {
        let sectors = self.data.len() / self.sector;
        for kind in ["zeros", "holes", "discard"] {
            let count = 1 + self.random.below(50) as usize;
            let first = self.random.below((sectors - count) as u64) as usize;
            let (at, len) = (first * self.sector, count * self.sector);
            let flags = u32::from(kind == "holes");
            let segment = Segment { sector: (at / SECTOR) as u64, count: (len / SECTOR) as u32, flags };
            let request = match kind {
                "discard" => Request::discard(&[segment]),
                _ => Request::write_zeroes(&[segment]),
            };
            let ring = &mut self.session.rings[1];
            assert_eq!(request.run(ring).unwrap().status, OK, "{kind} of {len} bytes at {at}");
            if kind != "discard" {
                self.data[at..at + len].fill(0);
                continue;
            }
            // Each sector is as it was, or zeros.
            let found = read(ring, (at / SECTOR) as u64, len);
            let was = &mut self.data[at..at + len];
            for (was, found) in was.chunks_mut(self.sector).zip(found.chunks(self.sector)) {
                assert!(found == was || found.iter().all(|&byte| byte == 0), "a discard at {at}");
                was.copy_from_slice(found);
            }
        }
    }

    /// All of the disk is what was written, read in pieces that are no whole blocks.
    #[track_caller]
    pub fn look(&mut self) {
        let piece = 100 * 1024 + self.sector;
        let mut at = 0;
        while at < self.data.len() {
            let len = piece.min(self.data.len() - at);
            let found = read(&mut self.session.rings[0], (at / SECTOR) as u64, len);
            let same = found.iter().zip(&self.data[at..at + len]).position(|(found, was)| found != was);
            assert_eq!(same, None, "what differs is {at} bytes further");
            at += len;
        }
    }

    /// Makes all of the disk zeros, and gives its space back.
    pub fn zero_all(&mut self) {
        let segment = Segment { sector: 0, count: (self.data.len() / SECTOR) as u32, flags: 1 };
        let request = Request::write_zeroes(&[segment]);
        assert_eq!(request.run(&mut self.session.rings[1]).unwrap().status, OK);
        self.data.fill(0);
    }

    /// The disk has become larger.
    pub fn grown(&mut self, size: usize) {
        self.data.resize(size, 0);
    }

    /// Flushes, and leaves.
    pub fn leave(mut self) -> Vec<u8> {
        flush(&mut self.session.rings[0]);
        self.data
    }
}
