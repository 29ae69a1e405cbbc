//! Years of snapshots: what deleting them gives back, how long chains become, and that nothing that is needed
//! goes, while volumes are attached and while they are not.

use crate::common::attach::{flush, open, read, write};
use crate::common::disk::pattern;
use crate::common::frontend::load::Random;
use crate::common::frontend::{Request, Segment, Session, block};
use crate::common::process::refuse_call;
use crate::common::rig::Rig;
use crate::common::store::said;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::process::Stdio;

const SIZE: usize = 8 << 20;

/// What all layers take on disk, in bytes.
fn on_disk(rig: &Rig) -> u64 {
    rig.files("layers").iter().map(|path| fs::metadata(path).expect("look at a layer").blocks() * 512).sum()
}

fn chain(rig: &Rig, volume: &str) -> usize {
    rig.reader().volume(volume).layers().len()
}

/// What a volume holds, as a guest sees it.
fn guest_sees(session: &mut Session) -> Vec<u8> {
    let ring = &mut session.rings[0];
    (0..SIZE).step_by(1 << 20).flat_map(|at| read(ring, at as u64 / 512, 1 << 20)).collect()
}

fn put(session: &mut Session, data: &mut [u8], at: usize, bytes: &[u8]) {
    write(&mut session.rings[0], at as u64 / 512, bytes);
    data[at..at + bytes.len()].copy_from_slice(bytes);
}

#[test]
fn nightly_snapshots_of_an_attached_volume_take_no_more_than_what_they_need() {
    for arguments in [&[][..], &["--unencrypted"], &["--sector-size", "4096"]] {
        let mut rig = Rig::new(arguments);
        let (host, socket) = rig.attach("t");
        let mut session = open(&socket);
        let mut data = rig.data.clone();
        let mut last: Option<String> = None;
        let nights = if arguments.is_empty() { 70 } else { 12 };
        for n in 0..nights {
            // Always the same, something at another place, and a part of a block where there can be one.
            put(&mut session, &mut data, 1 << 20, &pattern(n as u64, 1 << 20));
            put(&mut session, &mut data, (2 << 20) + (n * 7 % 80) * 65536, &pattern(n as u64 + 99, 65536));
            let (within, len) = if arguments.contains(&"4096") { (0, 4096) } else { (1024, 1024) };
            put(&mut session, &mut data, (n * 13 % 1000) * 4096 + within, &pattern(n as u64 + 2000, len));
            flush(&mut session.rings[0]);
            let id = rig.id(&["snapshot", "create", "t"]);
            if let Some(last) = last.replace(id.clone()) {
                let said = rig.json(&["snapshot", "delete", &last]);
                assert_eq!(said["space"]["left_for_later"], 0, "{said}");
            }
            if n % 10 == 9 {
                assert!(guest_sees(&mut session) == data, "{arguments:?}, night {n}");
                assert!(rig.reader().snapshot_content(&rig.reader().snapshot(&id)) == data, "night {n}");
            }
        }
        // The volume's top, the snapshot's, and what lies below both.
        assert!(chain(&rig, "t") <= 4, "{} layers", chain(&rig, "t"));
        // All that was ever written lies in less than the volume, and in the snapshot's own changes.
        assert!(on_disk(&rig) <= (SIZE as u64) + (3 << 20), "{} bytes", on_disk(&rig));
        rig.json(&["snapshot", "delete", &last.unwrap()]);
        assert!(on_disk(&rig) <= (SIZE as u64) + (1 << 20), "{} bytes", on_disk(&rig));
        assert!(guest_sees(&mut session) == data, "{arguments:?}");
        drop(session);
        host.end();
        let (host, socket) = rig.attach("t");
        assert!(guest_sees(&mut open(&socket)) == data, "{arguments:?}");
        host.end();
        rig.data = data;
        assert!(rig.reader().volume_content(&rig.reader().volume("t")) == rig.data);
        rig.assert_layers_are_named();
    }
}

#[test]
fn what_is_covered_is_given_back_and_nothing_else() {
    let rig = Rig::new(&[]);
    let mut data = rig.data.clone();
    let first = rig.id(&["snapshot", "create", "t"]);
    let (host, socket) = rig.attach("t");
    let mut session = open(&socket);
    put(&mut session, &mut data, 0, &pattern(50, 1 << 20));
    // Of this block, half.
    put(&mut session, &mut data, 1 << 20, &pattern(51, 2048));
    flush(&mut session.rings[0]);
    let before = on_disk(&rig);
    let shown = rig.json(&["volume", "show", "t"]);
    assert_eq!(shown["layers"][0]["shared_with"], serde_json::json!([]));
    assert_eq!(shown["layers"][1]["shared_with"], serde_json::json!([first]));
    assert_eq!(shown["layers"][1]["on_disk"], 192 << 10);
    let shown = rig.place.store.ok(&["snapshot", "show", &first]);
    let t = rig.place.id();
    assert!(shown.contains(&format!("192.0 KiB on disk, shared with {t}")), "{shown}");
    // The snapshot needs all of it.
    assert_eq!(rig.json(&["gc"])["space"]["given_back"], 0);
    let (clone, second) =
        (rig.id(&["volume", "create", "--snapshot", &first]), rig.id(&["snapshot", "create", "t"]));
    assert_eq!(rig.json(&["snapshot", "delete", &first])["space"]["given_back"], 0, "the clone sees it all");
    assert!(rig.json(&["gc", "--dry-run"])["space"]["given_back"] == 0);
    let said = rig.json(&["volume", "delete", &clone]);
    // The 64 KiB at the volume's beginning are needed no more; the half of a block is still seen.
    assert_eq!(said["space"]["given_back"], 64 << 10, "{said}");
    assert!(on_disk(&rig) < before + (64 << 10));
    assert!(guest_sees(&mut session) == data);
    assert!(rig.reader().snapshot_content(&rig.reader().snapshot(&second)) == data);
    drop(session);
    host.end();
}

#[test]
fn a_deletion_says_what_it_gave_back_and_later_leaves_it_to_gc() {
    let rig = Rig::new(&["--unencrypted"]);
    let mut data = rig.data.clone();
    let first = rig.id(&["snapshot", "create", "t"]);
    let host = rig.place.attach(&[]);
    let mut session = open(&rig.place.socket());
    put(&mut session, &mut data, 0, &pattern(50, 1 << 20));
    flush(&mut session.rings[0]);
    let said = rig.place.store.ok(&["snapshot", "delete", &first, "--later"]);
    assert_eq!(said, format!("{first} deleted\n"));
    let dry = rig.place.store.ok(&["gc", "--dry-run"]);
    assert!(dry.ends_with("layers: 64.0 KiB could be given back\n"), "{dry}");
    let said = rig.place.store.ok(&["gc"]);
    assert!(said.ends_with("layers: 64.0 KiB given back\n"), "{said}");
    assert!(guest_sees(&mut session) == data);
    drop(session);
    host.end();
}

#[test]
fn a_volume_that_nobody_has_attached_is_merged_the_cheaper_way() {
    let rig = Rig::new(&[]);
    let mut data = rig.data.clone();
    let small = rig.id(&["snapshot", "create", "t"]);
    let host = rig.place.attach(&[]);
    let mut session = open(&rig.place.socket());
    put(&mut session, &mut data, 2 << 20, &pattern(50, 4 << 20));
    flush(&mut session.rings[0]);
    drop(session);
    host.end();
    let large = rig.id(&["snapshot", "create", "t"]);
    let said = rig.json(&["snapshot", "delete", &small]);
    // The 192 KiB of the lower one went up, not the 4 MiB of the upper one down.
    assert_eq!(
        (&said["space"]["merged_layers"], &said["space"]["moved"]),
        (&1.into(), &(192 << 10).into()),
        "{said}"
    );
    assert!(rig.reader().volume_content(&rig.reader().volume("t")) == data);
    assert!(rig.reader().snapshot_content(&rig.reader().snapshot(&large)) == data);
    // The layer that holds nothing leaves the chain when the record is next sealed.
    rig.id(&["snapshot", "create", "t"]);
    assert_eq!(chain(&rig, "t"), 3);
    rig.assert_layers_are_named();
    let host = rig.place.attach(&[]);
    assert!(guest_sees(&mut open(&rig.place.socket())) == data);
    host.end();
}

#[test]
fn layers_that_somebody_reads_are_not_moved_under_him() {
    let rig = Rig::new(&[]);
    let mut data = rig.data.clone();
    let first = rig.id(&["snapshot", "create", "t"]);
    let host = rig.place.attach(&[]);
    let mut session = open(&rig.place.socket());
    put(&mut session, &mut data, 2 << 20, &pattern(50, 1 << 20));
    flush(&mut session.rings[0]);
    drop(session);
    host.end();
    let second = rig.id(&["snapshot", "create", "t"]);
    let upper = rig.reader().snapshot(&second).layers()[0].id;
    let path = rig.place.catalog().layer_path(upper);
    let reader = sealblk::image::lock::ImageLock::acquire(&path, sealblk::image::lock::Access::Read).unwrap();
    let said = rig.json(&["snapshot", "delete", &first]);
    assert_eq!(
        (&said["space"]["merged_layers"], &said["space"]["left_for_later"]),
        (&0.into(), &1.into()),
        "{said}"
    );
    assert!(rig.reader().snapshot_content(&rig.reader().snapshot(&second)) == data);
    drop(reader);
    assert_eq!(rig.json(&["gc"])["space"]["merged_layers"], 1);
    assert!(rig.reader().snapshot_content(&rig.reader().snapshot(&second)) == data);
    assert!(rig.reader().volume_content(&rig.reader().volume("t")) == data);
}

#[test]
fn where_a_file_system_makes_no_holes_nothing_is_moved_and_that_is_said() {
    let rig = Rig::new(&[]);
    let mut data = rig.data.clone();
    let first = rig.id(&["snapshot", "create", "t"]);
    let host = rig.place.attach(&[]);
    let mut session = open(&rig.place.socket());
    put(&mut session, &mut data, 2 << 20, &pattern(50, 1 << 20));
    flush(&mut session.rings[0]);
    drop(session);
    host.end();
    let second = rig.id(&["snapshot", "create", "t"]);
    let before = on_disk(&rig);
    let without_holes = |arguments: &[&str]| {
        let mut command = rig.place.store.command();
        command.args(arguments);
        refuse_call(&mut command, libc::SYS_fallocate, libc::EOPNOTSUPP);
        let output = command.output().expect("start sealblk");
        assert!(output.status.success(), "{}", said(&output));
        String::from_utf8(output.stdout).expect("UTF-8")
    };
    let told = without_holes(&["snapshot", "delete", &first]);
    assert!(told.contains("deleted; its file system makes no holes"), "{told}");
    assert!(without_holes(&["gc"]).contains("layers: its file system makes no holes"));
    let space: Value = serde_json::from_str(&without_holes(&["gc", "--json"])).expect("JSON");
    assert_eq!((&space["space"]["has_no_holes"], &space["space"]["moved"]), (&true.into(), &0.into()));
    assert_eq!(on_disk(&rig), before, "nothing was copied to and fro");
    assert!(rig.reader().snapshot_content(&rig.reader().snapshot(&second)) == data);
    let given = rig.json(&["gc"])["space"].clone();
    assert_eq!((&given["has_no_holes"], &given["merged_layers"]), (&false.into(), &1.into()), "{given}");
    assert!(rig.reader().snapshot_content(&rig.reader().snapshot(&second)) == data);
}

/// What should be in the store, beside it.
struct Model {
    rig: Rig,
    volumes: BTreeMap<String, Vec<u8>>,
    snapshots: BTreeMap<String, Vec<u8>>,
    random: Random,
}

impl Model {
    fn some_volume(&mut self) -> String {
        let all: Vec<String> = self.volumes.keys().cloned().collect();
        self.random.pick(&all)
    }

    fn some_snapshot(&mut self) -> Option<String> {
        let all: Vec<String> = self.snapshots.keys().cloned().collect();
        (!all.is_empty()).then(|| self.random.pick(&all))
    }

    /// Some writes of every kind into an attached volume.
    fn scribble(&mut self, session: &mut Session, volume: &str) {
        for _ in 0..1 + self.random.below(6) {
            let sectors = self.random.pick(&[1, 3, 8, 64, 1000]);
            let sector = self.random.below((SIZE / 512) as u64 - sectors);
            let (at, len) = (sector as usize * 512, sectors as usize * 512);
            let data = self.volumes.get_mut(volume).expect("it is there");
            match self.random.below(6) {
                0 => {
                    let zeros = Request::write_zeroes(&[Segment { sector, count: sectors as u32, flags: 1 }]);
                    assert_eq!(zeros.run(&mut session.rings[0]).unwrap().status, block::OK);
                    data[at..at + len].fill(0);
                }
                1 => {
                    write(&mut session.rings[0], sector, &vec![0; len]);
                    data[at..at + len].fill(0);
                }
                _ => put(session, data, at, &pattern(self.random.below(u64::MAX), len)),
            }
        }
        flush(&mut session.rings[0]);
    }

    fn check(&self) {
        let reader = self.rig.reader();
        for (id, data) in &self.snapshots {
            assert!(reader.snapshot_content(&reader.snapshot(id)) == *data, "{id}");
        }
        for (id, data) in &self.volumes {
            assert!(reader.volume_content(&reader.volume(id)) == *data, "{id}");
        }
        self.rig.assert_layers_are_named();
    }

    /// One thing that happens in a store's life. `t` is attached, by this session.
    fn step(&mut self, session: &mut Session) {
        match self.random.below(12) {
            0..=3 => self.scribble(session, "t"),
            4..=5 => {
                let volume = self.some_volume();
                let id = self.rig.id(&["snapshot", "create", &volume]);
                self.snapshots.insert(id, self.volumes[&volume].clone());
            }
            6..=8 => {
                if let Some(id) = self.some_snapshot() {
                    self.rig.place.store.ok(&["snapshot", "delete", &id]);
                    self.snapshots.remove(&id);
                }
            }
            9 => {
                if let Some(id) = self.some_snapshot().filter(|_| self.volumes.len() < 4) {
                    let clone = self.rig.id(&["volume", "create", "--snapshot", &id]);
                    self.volumes.insert(clone, self.snapshots[&id].clone());
                }
            }
            10 => {
                let volume = self.some_volume();
                if volume != "t" {
                    if self.random.below(2) == 0 {
                        self.rig.place.store.ok(&["volume", "delete", &volume]);
                        self.volumes.remove(&volume);
                    } else {
                        let (host, socket) = self.rig.attach(&volume);
                        let mut own = open(&socket);
                        self.scribble(&mut own, &volume);
                        assert!(guest_sees(&mut own) == self.volumes[&volume], "{volume}");
                        drop(own);
                        host.end();
                    }
                }
            }
            _ => {
                let said: Value = self.rig.json(&["gc"]);
                let most = self.snapshots.len() + self.volumes.len() + 2;
                if said["space"]["left_for_later"] == 0 {
                    let shown = || self.rig.json(&["volume", "show", "t"])["layers"].to_string();
                    assert!(chain(&self.rig, "t") <= most, "more than {most} layers: {}; {said}", shown());
                }
            }
        }
    }
}

/// A model of a store's life. More of it than here takes `ci/model`.
#[test]
fn whatever_is_made_and_deleted_everything_keeps_what_it_holds() {
    let number = |name: &str, default: u64| {
        std::env::var(name).map_or(default, |text| text.parse().expect("a whole number"))
    };
    let (seed, rounds) = (number("MODEL_SEED", 1), number("MODEL_ROUNDS", 8));
    for arguments in [&[][..], &["--unencrypted"]] {
        let rig = Rig::new(arguments);
        let volumes = BTreeMap::from([("t".to_owned(), rig.data.clone())]);
        let mut model = Model { rig, volumes, snapshots: BTreeMap::new(), random: Random::new(seed) };
        for round in 0..rounds {
            let (host, socket) = model.rig.attach("t");
            let mut session = open(&socket);
            for _ in 0..12 {
                model.step(&mut session);
            }
            assert!(guest_sees(&mut session) == model.volumes["t"], "seed {seed}, round {round}");
            drop(session);
            if round % 3 == 2 {
                host.crash()
            } else {
                host.end()
            };
            model.check();
        }
        while let Some(id) = model.some_snapshot() {
            model.rig.place.store.ok(&["snapshot", "delete", &id]);
            model.snapshots.remove(&id);
        }
        model.check();
    }
}

/// What of it only this snapshot showed may be given back before it is read.
#[test]
fn a_snapshot_that_is_deleted_while_it_is_exported_is_not_taken_for_whole() {
    let rig = Rig::new(&[]);
    let id = rig.id(&["snapshot", "create", "t"]);
    let mut command = rig.place.store.command();
    command.args(["snapshot", "export", &id, "-"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("start sealblk");
    let mut out = child.stdout.take().expect("piped");
    // The pipe takes a part, and the rest waits.
    out.read_exact(&mut [0; 4096]).expect("it has begun");
    rig.place.store.ok(&["snapshot", "delete", &id]);
    std::io::copy(&mut out, &mut std::io::sink()).expect("read to the end");
    let mut said = String::new();
    child.stderr.take().expect("piped").read_to_string(&mut said).expect("UTF-8");
    assert_eq!(child.wait().expect("it ends").code(), Some(3), "{said}");
    assert!(said.contains(&format!("there is no snapshot {id}")), "{said}");
}
