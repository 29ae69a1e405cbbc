//! Snapshots and the volumes made of them, cut everywhere.

use super::expect::Content;
use super::script::Script;
use super::trace::Trace;
use super::volumes::{SECTORS, survives};

/// A store with a volume that was written to.
fn with_data(arguments: &[&str]) -> (Script, String) {
    let mut script = Script::new();
    let id = script.create(Content::zeros(SECTORS), arguments);
    let mut guest = script.attach(&id);
    guest.write(0, 16);
    guest.write(96, 24);
    guest.detach(&script);
    (script, id)
}

/// A snapshot is made of a volume that nobody has attached.
pub fn of_detached(arguments: &[&str]) -> Trace {
    let (script, id) = with_data(arguments);
    script.start();
    script.snapshot(&id);
    script.finish()
}

/// Of two snapshots of a volume the older one is deleted, then the volume, then the other snapshot.
pub fn deleted() -> Trace {
    let (mut script, id) = with_data(&["--unencrypted"]);
    let older = script.snapshot(&id);
    let mut guest = script.attach(&id);
    guest.write(8, 16);
    guest.detach(&script);
    let newer = script.snapshot(&id);
    script.start();
    script.delete_snapshot(&older);
    script.delete(&id);
    script.delete_snapshot(&newer);
    script.finish()
}

/// A volume is made of a snapshot and written to.
pub fn cloned(arguments: &[&str]) -> Trace {
    let (mut script, id) = with_data(arguments);
    let snapshot = script.snapshot(&id);
    script.start();
    let clone = script.clone_of(&snapshot, &[]);
    let mut guest = script.attach(&clone);
    guest.write(4, 8);
    guest.write_zeroes(12, 8, true);
    guest.flush();
    guest.write(6, 100);
    guest.detach(&script);
    script.finish()
}

#[test]
fn a_snapshot_of_a_detached_volume_is_made() {
    survives(&of_detached(&[]));
}

#[test]
fn a_snapshot_of_a_detached_unencrypted_volume_is_made() {
    survives(&of_detached(&["--unencrypted", "--sector-size", "4096"]));
}

#[test]
fn snapshots_and_their_volume_are_deleted() {
    survives(&deleted());
}

#[test]
fn a_volume_is_made_of_a_snapshot_and_written_to() {
    survives(&cloned(&[]));
}
