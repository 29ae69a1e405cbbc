//! A store with a volume that has data, and what the tests ask of it.

use super::attach::{Host, Place, Said, flush, open, write};
use super::content::Reader;
use super::disk::pattern;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Output;

/// A store with the volume `t` of 8 MiB, of which something is written.
pub struct Rig {
    pub place: Place,
    /// What the volume holds.
    pub data: Vec<u8>,
}

impl Rig {
    /// With these arguments of `volume create` besides.
    pub fn new(arguments: &[&str]) -> Self {
        Self::of(Place::new(arguments))
    }

    /// In a store that is there, whose volume is empty.
    pub fn of(place: Place) -> Self {
        let mut data = vec![0; 8 << 20];
        let host = place.attach(&[]);
        let mut session = open(&place.socket());
        for (n, at) in [(1, 0), (2, 1 << 20), (3, (8 << 20) - (64 << 10))] {
            let bytes = pattern(n, 64 << 10);
            write(&mut session.rings[0], at as u64 / 512, &bytes);
            data[at..at + bytes.len()].copy_from_slice(&bytes);
        }
        flush(&mut session.rings[0]);
        drop(session);
        host.end();
        Rig { place, data }
    }

    pub fn reader(&self) -> Reader {
        Reader::new(&self.place.store.root(), self.place.store.config())
    }

    /// Attaches a volume on a socket of its own, and returns where that is.
    #[track_caller]
    pub fn attach(&self, volume: &str) -> (Host, PathBuf) {
        let socket = self.place.folder().join(format!("{volume}.socket"));
        let mut command = self.place.store.command();
        command.args(["attach", volume, "--queues", "2", "--socket-path"]).arg(&socket);
        (self.place.start(command, vec![]), socket)
    }

    /// Runs a command that succeeds and says so in JSON.
    #[track_caller]
    pub fn json(&self, arguments: &[&str]) -> Value {
        let text = self.place.store.ok(&[arguments, &["--json"]].concat());
        serde_json::from_str(&text).expect("JSON")
    }

    /// Runs a command that succeeds, and returns the id that it prints.
    #[track_caller]
    pub fn id(&self, arguments: &[&str]) -> String {
        self.place.store.ok(arguments).trim().to_owned()
    }

    /// Runs a command that must fail with this exit code.
    #[track_caller]
    pub fn refuse(&self, code: i32, arguments: &[&str]) -> String {
        let Output { status, stdout, stderr } = self.place.store.run(arguments);
        let said = Said {
            code: status.code().expect("no signal"),
            out: String::from_utf8(stdout).expect("UTF-8"),
            err: String::from_utf8(stderr).expect("UTF-8"),
        };
        assert_eq!((said.code, said.out.as_str()), (code, ""), "{arguments:?}: {}", said.err);
        said.err
    }

    /// The last event.
    pub fn last_event(&self) -> Value {
        self.place.events().pop().expect("there are events")
    }

    /// The files in a folder of the store, sorted.
    pub fn files(&self, folder: &str) -> Vec<PathBuf> {
        files(&self.place.store.root().join(folder))
    }

    /// Every file in `layers/` is named by a volume or snapshot, and every one that is named is there.
    #[track_caller]
    pub fn assert_layers_are_named(&self) {
        let reader = self.reader();
        let catalog = reader.catalog();
        let volumes =
            catalog.list().expect("list").into_iter().flat_map(|e| {
                e.metadata.expect("it is whole").layers().iter().map(|l| l.id).collect::<Vec<_>>()
            });
        let snapshots =
            catalog.snapshots().expect("list").into_iter().flat_map(|e| {
                e.snapshot.expect("it is whole").layers().iter().map(|l| l.id).collect::<Vec<_>>()
            });
        let mut named: Vec<PathBuf> = volumes.chain(snapshots).map(|id| catalog.layer_path(id)).collect();
        named.sort();
        named.dedup();
        assert_eq!(self.files("layers"), named);
    }
}

/// The files in a folder, sorted; none if it is not there.
pub fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten();
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.expect("list").path()).collect();
    files.sort();
    files
}
