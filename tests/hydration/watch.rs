//! What the tests here do again and again: a volume with a lot of data, a guest that works, and waiting.

use crate::common::attach::{Host, flush, open, read, write};
use crate::common::disk::pattern;
use crate::common::frontend::Session;
use crate::common::patience;
use crate::common::rig::Rig;
use serde_json::Value;
use std::path::PathBuf;

/// So slow that a copy does not come to its end while a test looks on.
pub const SLOW: &[&str] = &["--hydrate-rate", "1"];

/// A rig whose volume is written almost everywhere.
pub fn full(arguments: &[&str]) -> Rig {
    filled(Rig::new(arguments))
}

/// Writes almost everywhere into the volume of a rig.
pub fn filled(mut rig: Rig) -> Rig {
    let (host, socket) = rig.attach("t");
    let mut session = open(&socket);
    for at in (1..7).map(|n| n << 20) {
        let bytes = pattern(40 + at as u64, 1 << 20);
        write(&mut session.rings[0], at as u64 / 512, &bytes);
        rig.data[at..at + bytes.len()].copy_from_slice(&bytes);
    }
    flush(&mut session.rings[0]);
    drop(session);
    host.end();
    rig
}

/// Attaches a volume with these arguments besides.
#[track_caller]
pub fn attach(rig: &Rig, volume: &str, arguments: &[&str]) -> (Host, PathBuf) {
    let socket = rig.place.folder().join(format!("{volume}.socket"));
    let mut command = rig.place.store.command();
    command.args(["attach", volume, "--queues", "2", "--socket-path"]).arg(&socket).args(arguments);
    (rig.place.start(command, vec![]), socket)
}

/// What a guest finds on the disk.
pub fn sees(session: &mut Session, len: usize) -> Vec<u8> {
    let ring = &mut session.rings[0];
    (0..len).step_by(1 << 20).flat_map(|at| read(ring, at as u64 / 512, 1 << 20)).collect()
}

/// A guest that writes here and there, and looks whether it finds what it wrote.
pub struct Guest {
    pub session: Session,
    seed: u64,
}

impl Guest {
    pub fn on(socket: &std::path::Path, seed: u64) -> Self {
        Guest { session: open(socket), seed }
    }

    /// Writes in so many places, and reads in as many.
    pub fn work(&mut self, data: &mut [u8], times: usize) {
        for _ in 0..times {
            let sectors = data.len() as u64 / 512;
            let first = self.chance(sectors / 8) * 8;
            let count = ((1 + self.chance(16)) * 8).min(sectors - first);
            let (from, len) = (first as usize * 512, count as usize * 512);
            let bytes = pattern(self.chance(u64::MAX), len);
            write(&mut self.session.rings[0], first, &bytes);
            data[from..from + len].copy_from_slice(&bytes);
            let at = self.chance(sectors / 64) as usize * 64 * 512;
            let found = read(&mut self.session.rings[0], at as u64 / 512, 32 << 10);
            assert!(found == data[at..at + (32 << 10)], "what is at {at} is not what was written");
        }
    }

    fn chance(&mut self, below: u64) -> u64 {
        // Xorshift (Marsaglia 2003).
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        self.seed % below
    }
}

/// What `volume show` says.
#[track_caller]
pub fn show(rig: &Rig, volume: &str) -> Value {
    rig.json(&["volume", "show", volume])
}

/// Waits until `volume show` says something of which `is_so`.
#[track_caller]
pub fn wait_for(rig: &Rig, volume: &str, what: &str, is_so: impl Fn(&Value) -> bool) -> Value {
    patience::wait_for(what, || match show(rig, volume) {
        shown if is_so(&shown) => Ok(shown),
        shown => Err(shown),
    })
}

/// Waits until a [`SLOW`] copy has begun; it does a part, and not all.
#[track_caller]
pub fn wait_for_a_part(rig: &Rig, volume: &str) {
    let begun = |shown: &Value| shown["attachment"]["hydration"]["left"].is_u64();
    let first = wait_for(rig, volume, "something is left", begun);
    assert!(first["attachment"]["hydration"]["left"].as_u64().unwrap() > 0, "{first}");
}

/// The data keys of a volume, in the clear.
pub fn deks(rig: &Rig, volume: &str) -> Vec<Vec<u8>> {
    let (reader, volume) = (rig.reader(), rig.reader().volume(volume));
    reader.deks(volume.layout(), &volume.encryption_context())
}

/// Waits until nothing is to be copied up, and the host process has closed what has left.
#[track_caller]
pub fn wait_until_done(rig: &Rig, volume: &str) {
    let is_done = |shown: &Value| shown["hydration"].is_null() && shown["attachment"]["hydration"].is_null();
    wait_for(rig, volume, "it is done", is_done);
}
