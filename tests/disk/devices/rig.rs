//! A store with a volume on a device.

use crate::common::attach::{Host, Place};
use crate::common::content::Reader;
use crate::common::frontend::load::Random;
use crate::common::frontend::{Options, Session};
use crate::common::loop_disk::BareDisk;
use crate::common::store::{Store, said, sockets};
use crate::host_disks::rig::Writer;
use serde_json::Value;
use std::path::PathBuf;

pub const MIB: u64 = 1 << 20;

/// A store with the volume `t`, of 8 MiB, on a device.
pub struct Rig {
    pub place: Place,
}

impl Rig {
    pub fn on(disk: &BareDisk, arguments: &[&str]) -> Self {
        Rig { place: Place::of(Store::new(), &[&["--device", disk.name()], arguments].concat()) }
    }

    pub fn store(&self) -> &Store {
        &self.place.store
    }

    /// As [`attach`], of a volume of this store.
    #[track_caller]
    pub fn attach(&self, volume: &str, sector: usize, data: Vec<u8>) -> (Host, Writer) {
        attach(&self.place, volume, sector, data)
    }

    /// Runs a command that is refused with this exit code; returns what it says.
    #[track_caller]
    pub fn refuse(&self, code: i32, arguments: &[&str]) -> String {
        refuse(self.store(), code, arguments)
    }

    /// An attach of `t` that is refused with this exit code; returns what it says.
    #[track_caller]
    pub fn refuse_attach(&self, code: i32) -> String {
        self.place.refuse(code, &[])
    }

    #[track_caller]
    pub fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.store().ok(&[arguments, &["--json"]].concat())).unwrap()
    }

    #[track_caller]
    pub fn id(&self, arguments: &[&str]) -> String {
        self.store().ok(arguments).trim().to_owned()
    }

    pub fn reader(&self) -> Reader {
        Reader::new(&self.store().root(), self.place.store.config())
    }

    /// What lies in `layers/` with names that end so.
    pub fn layers(&self, ending: &str) -> Vec<PathBuf> {
        let layers = std::fs::read_dir(self.store().root().join("layers")).unwrap();
        let paths = layers.map(|entry| entry.unwrap().path());
        paths.filter(|path| path.extension().is_some_and(|it| it == ending)).collect()
    }
}

/// Attaches a volume and connects to it, with two rings: a guest that finds this data.
#[track_caller]
pub fn attach(place: &Place, volume: &str, sector: usize, data: Vec<u8>) -> (Host, Writer) {
    let socket = sockets(&place.folder()).join(format!("{volume}.socket"));
    let mut command = place.store.command();
    command.args(["attach", volume, "--queues", "2", "--socket-path"]).arg(&socket);
    let host = place.start(command, vec![]);
    let session = Session::open(&socket, &Options { queues: 2, ..Options::default() });
    let random = Random::new(data.len() as u64 + 1);
    (host, Writer { session: session.expect("it serves a front-end"), data, random, sector })
}

/// Runs a command that is refused with this exit code; returns what it says.
#[track_caller]
pub fn refuse(store: &Store, code: i32, arguments: &[&str]) -> String {
    let output = store.run(arguments);
    let said = said(&output);
    assert_eq!(output.status.code(), Some(code), "{}: {said}", arguments.join(" "));
    said
}

/// Whether all of it is zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}
