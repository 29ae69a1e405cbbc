//! What lies on the disk is what the format says, by the word of an implementation that is not ours: every
//! sector of a layer, decrypted by `xts-mode` under the volume's data key, is what the guest wrote.

use crate::common::attach::{Place, flush, open, read, write};
use crate::common::disk::pattern;
use crate::common::frontend::block::{self, complete};
use crate::common::frontend::{Framing, Options, Request, Segment, Session, SplitRing};
use aes::Aes256;
use aes::cipher::KeyInit;
use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::symlink;
use xts_mode::{Xts128, get_tweak_default};

const SECTOR: usize = 512;
const SIZE: usize = 8 << 20;

/// What a sector must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nobody wrote it, or it was given back: zeros on the disk and to the guest.
    Absent,
    /// It was written: ciphertext on the disk.
    Written,
}

/// A guest that remembers all that it did to the disk.
struct Guest {
    session: Session,
    /// What the guest must read.
    data: Vec<u8>,
    /// Of each sector.
    states: Vec<State>,
    /// Sectors in a data unit.
    unit: u64,
}

impl Guest {
    fn new(session: Session, sector_size: usize) -> Self {
        let unit = (sector_size / SECTOR) as u64;
        Guest { session, data: vec![0; SIZE], states: vec![State::Absent; SIZE / SECTOR], unit }
    }

    fn ring(&mut self) -> &mut SplitRing {
        &mut self.session.rings[0]
    }

    /// Data of its own for each place and time.
    fn write(&mut self, seed: u64, sector: u64, units: u64) {
        let data = pattern(seed << 32 | sector, (units * self.unit) as usize * SECTOR);
        write(self.ring(), sector, &data);
        self.note(sector, &data, State::Written);
    }

    fn note(&mut self, sector: u64, data: &[u8], state: State) {
        let first = sector as usize;
        self.data[first * SECTOR..][..data.len()].copy_from_slice(data);
        self.states[first..][..data.len() / SECTOR].fill(state);
    }

    /// DISCARD, or WRITE_ZEROES with or without leave to give the space back.
    fn zero(&mut self, kind: u32, unmap: bool, sector: u64, units: u64) {
        let count = units * self.unit;
        let range = [Segment { sector, count: count as u32, flags: u32::from(unmap) }];
        let request = match kind {
            block::DISCARD => Request::discard(&range),
            _ => Request::write_zeroes(&range),
        };
        assert_eq!(request.run(self.ring()).expect("it completes").status, block::OK);
        self.note(sector, &vec![0; count as usize * SECTOR], State::Absent);
    }

    /// Writes of all sizes and kinds all over the disk.
    fn use_disk(&mut self) {
        let (unit, all) = (self.unit, (SIZE / SECTOR) as u64);
        // One unit at both ends, and around the places where numbers get another byte.
        for sector in [0, unit, 256 - unit, 256, 4096 - unit, 4096, all - unit] {
            self.write(1, sector, 1);
        }
        // Runs of every length up to what a request can carry, not aligned to anything.
        let mut sector = 513 / unit * unit + unit;
        for units in [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 127, 129] {
            let units = units.min(1024 / unit);
            self.write(2, sector, units);
            sector += (units + 1) * unit;
        }
        // Over what is there already, in part: the last writer's data counts.
        self.write(3, 512 / unit * unit, 40);
        self.write(4, 520 / unit * unit, 1);
        // Zeros are data, too.
        let zeros = vec![0; 16 * unit as usize * SECTOR];
        let place = 8192;
        write(self.ring(), place, &zeros);
        self.note(place, &zeros, State::Written);
        // One text at different places.
        for place in [9000 / unit * unit, 9600 / unit * unit] {
            let text = vec![b'A'; 8 * unit as usize * SECTOR];
            write(self.ring(), place, &text);
            self.note(place, &text, State::Written);
        }
        self.use_odd_framing();
        self.use_many_at_once();
        self.give_back();
    }

    /// Data in pieces that are no whole blocks, at odd addresses.
    fn use_odd_framing(&mut self) {
        for (n, sizes) in [vec![1000, 24, 512], vec![511, 1], vec![4096], vec![137]].into_iter().enumerate() {
            let sector = 10_000 + n as u64 * 16;
            let data = pattern(5 << 32 | sector, 16 * SECTOR);
            let request = Request::write(sector, &data).framed(Framing::Scattered(sizes));
            assert_eq!(request.run(self.ring()).expect("it completes").status, block::OK);
            self.note(sector, &data, State::Written);
        }
    }

    /// Two queues, each with many writes in flight.
    fn use_many_at_once(&mut self) {
        let unit = self.unit;
        let place = |queue: u64, n: u64| 11_000 / unit * unit + queue * 1600 + n * 32;
        let data = |sector: u64| pattern(6 << 32 | sector, 16 * SECTOR);
        let mut pending = Vec::new();
        for (queue, ring) in self.session.rings.iter_mut().enumerate() {
            let submit =
                |n| Request::write(place(queue as u64, n), &data(place(queue as u64, n))).submit(ring);
            let these: Vec<_> = (0..32).map(submit).collect::<Result<_, _>>().expect("room on the ring");
            pending.push(these);
        }
        self.session.rings.iter_mut().for_each(SplitRing::kick);
        for (ring, pending) in self.session.rings.iter_mut().zip(pending) {
            let outcomes = complete(ring, pending).expect("the writes complete");
            assert!(outcomes.iter().all(|o| o.status == block::OK));
        }
        for (queue, n) in (0..2).flat_map(|queue| (0..32).map(move |n| (queue, n))) {
            self.note(place(queue, n), &data(place(queue, n)), State::Written);
        }
    }

    /// Ranges that cease to be there: inside what was written, across its ends, where nothing was, and
    /// one that is written again afterwards. Their ends are whole data units, and mostly no whole
    /// blocks of the file system.
    fn give_back(&mut self) {
        let unit = self.unit;
        let ways = [(block::DISCARD, false), (block::WRITE_ZEROES, false), (block::WRITE_ZEROES, true)];
        for (n, (kind, unmap)) in ways.into_iter().enumerate() {
            let start = 15_000 + n as u64 * 56 * unit;
            self.write(7, start, 40);
            self.zero(kind, unmap, start + 3 * unit, 1);
            self.zero(kind, unmap, start + 9 * unit, 16);
            self.zero(kind, unmap, start + 38 * unit, 4);
            self.write(8, start + 12 * unit, 3);
            self.zero(kind, unmap, 7000 + 80 * n as u64, 8);
        }
    }

    /// Reads the whole disk, in requests that do not match those of the writes.
    #[track_caller]
    fn check_view(&mut self) {
        let step = 320;
        for first in (0..SIZE / SECTOR).step_by(step) {
            let len = step.min(SIZE / SECTOR - first) * SECTOR;
            let expected = self.data[first * SECTOR..][..len].to_vec();
            let found = read(self.ring(), first as u64, len);
            let at = found.chunks(SECTOR).zip(expected.chunks(SECTOR)).position(|(f, e)| f != e);
            assert_eq!(at.map(|at| first + at), None, "the guest reads something else at that sector");
        }
    }

    /// Every sector of the layer, once: absent, or what the guest wrote under the key and the place.
    #[track_caller]
    fn check_layer(&self, layer: &[u8], dek: &[u8]) {
        let cipher = |key| Aes256::new_from_slice(key).expect("32 bytes");
        let oracle = Xts128::new(cipher(&dek[..32]), cipher(&dek[32..]));
        assert_eq!(layer.len(), SIZE);
        let unit = self.unit as usize * SECTOR;
        let mut ciphertexts = HashSet::new();
        let mut counts = [0, 0];
        for (n, on_disk) in layer.chunks(unit).enumerate() {
            let sector = n * self.unit as usize;
            let state = self.states[sector];
            assert!(self.states[sector..][..self.unit as usize].iter().all(|s| *s == state));
            counts[usize::from(state == State::Written)] += 1;
            if state == State::Absent {
                assert!(on_disk.iter().all(|b| *b == 0), "sector {sector} is not absent");
                continue;
            }
            for part in on_disk.chunks(SECTOR) {
                assert!(part.iter().any(|b| *b != 0), "sector {sector} is absent");
                assert!(ciphertexts.insert(part), "sector {sector} has the ciphertext of another one");
            }
            let mut plain = on_disk.to_vec();
            oracle.decrypt_sector(&mut plain, get_tweak_default(sector as u128));
            assert!(plain == self.data[n * unit..][..unit], "sector {sector} is not what was written");
        }
        assert_eq!(counts[0] + counts[1], SIZE / unit);
        assert!(counts[1] > 500 && counts[0] > 500, "absent and written: {counts:?}");
    }
}

/// A volume at `place`, attached with these arguments, used, looked at by the guest and by `xts-mode`. The
/// host process `says` how it does it.
fn check(place: &Place, sector_size: usize, arguments: &[&str], says: &str) {
    let arguments = [&["--queues", "2"], arguments].concat();
    let wishes = Options { queues: 2, ..Options::default() };
    let connect = || Session::open(&place.socket(), &wishes).expect("the back-end serves a front-end");
    let host = place.attach(&arguments);
    assert!(host.output().contains(says), "{says}: {}", host.output());
    let mut guest = Guest::new(connect(), sector_size);
    guest.check_view();
    guest.use_disk();
    guest.check_view();
    flush(guest.ring());
    host.end();
    let layer = fs::read(place.layer()).expect("read the layer");
    guest.check_layer(&layer, &place.dek());

    // A new process, which has nothing in its memory, shows the same.
    let host = place.attach(&arguments);
    guest.session = connect();
    guest.check_view();
    host.end();
    assert!(fs::read(place.layer()).expect("read the layer") == layer, "reading has changed the layer");
}

#[test]
fn sectors_of_512_bytes_are_what_the_guest_wrote() {
    check(&Place::new(&["--sector-size", "512"]), 512, &[], "XTS engine ");
}

#[test]
fn sectors_of_4096_bytes_are_what_the_guest_wrote() {
    check(&Place::new(&["--sector-size", "4096"]), 4096, &[], "XTS engine ");
}

#[test]
fn the_portable_engine_writes_the_same() {
    for sector_size in ["512", "4096"] {
        let place = Place::new(&["--sector-size", sector_size]);
        let bytes = sector_size.parse().expect("a number");
        check(&place, bytes, &["--xts-engine", "portable"], "XTS engine portable");
    }
}

#[test]
fn space_that_was_set_aside_is_as_absent_as_a_hole() {
    check(&Place::new(&["--sector-size", "512", "--preallocate"]), 512, &[], "XTS engine ");
}

#[test]
fn a_layer_on_a_memory_file_system_is_no_other() {
    let memory = tempfile::tempdir_in("/dev/shm").expect("make a folder in /dev/shm");
    for sector_size in ["512", "4096"] {
        let root = memory.path().join(sector_size);
        fs::create_dir(&root).expect("make a folder");
        let place = Place::with_root(|path| symlink(&root, path), &["--sector-size", sector_size]);
        check(&place, sector_size.parse().expect("a number"), &[], "memory file system");
    }
}

#[test]
fn an_unencrypted_volume_is_what_the_guest_wrote_and_nothing_else() {
    let place = Place::new(&["--unencrypted"]);
    let host = place.attach(&[]);
    let mut session = open(&place.socket());
    let data = pattern(1, 64 * SECTOR);
    write(&mut session.rings[0], 100, &data);
    assert!(read(&mut session.rings[0], 100, data.len()) == data);
    host.end();
    let layer = fs::read(place.layer()).expect("read the layer");
    let (before, rest) = layer.split_at(100 * SECTOR);
    let (there, after) = rest.split_at(data.len());
    assert!(there == data && before.iter().chain(after).all(|b| *b == 0));
}
