//! Snapshots and the volumes made of them, cut everywhere.

use super::expect::Content;
use super::script::{Script, traced};
use super::volumes::{SECTORS, survives};

/// A volume that was written to.
fn with_data(script: &mut Script, arguments: &[&str]) -> String {
    let id = script.create(Content::zeros(SECTORS), arguments);
    let mut guest = script.attach(&id);
    guest.write(0, 16);
    guest.write(96, 24);
    guest.detach(script);
    id
}

/// A snapshot is made of a volume that nobody has attached.
pub fn of_detached(script: &mut Script, arguments: &[&str]) {
    let id = with_data(script, arguments);
    script.start();
    script.snapshot(&id);
}

/// Snapshots are made of a volume while its guest writes, and not all of it is flushed.
pub fn of_attached(script: &mut Script, arguments: &[&str]) {
    let id = with_data(script, arguments);
    script.start();
    let mut guest = script.attach(&id);
    guest.write(8, 16);
    script.snapshot(&id);
    guest.write(0, 16);
    guest.flush();
    guest.write_zeroes(96, 8, true);
    guest.write(200, 8);
    script.snapshot(&id);
    guest.write(96, 16);
    guest.detach(script);
}

/// Snapshots of two volumes, one of which is attached, are made at one moment, twice.
pub fn of_several(script: &mut Script) {
    let (one, other) =
        (with_data(script, &["--tag", "set=a"]), with_data(script, &["--unencrypted", "--tag", "set=a"]));
    script.start();
    let mut guest = script.attach(&one);
    guest.write(8, 16);
    script.snapshot_all_of("a", &[&one, &other]);
    guest.write(0, 16);
    guest.flush();
    guest.write(200, 8);
    script.snapshot_all_of("a", &[&one, &other]);
    guest.write(96, 16);
    guest.detach(script);
}

/// Of two snapshots of a volume the older one is deleted, then the volume, then the other snapshot.
pub fn deleted(script: &mut Script) {
    let id = with_data(script, &["--unencrypted"]);
    let older = script.snapshot(&id);
    let mut guest = script.attach(&id);
    guest.write(8, 16);
    guest.detach(script);
    let newer = script.snapshot(&id);
    script.start();
    script.delete_snapshot(&older);
    script.delete(&id);
    script.delete_snapshot(&newer);
}

/// A volume is made of a snapshot and written to.
pub fn cloned(script: &mut Script, arguments: &[&str]) {
    let id = with_data(script, arguments);
    let snapshot = script.snapshot(&id);
    script.start();
    let clone = script.clone_of(&snapshot, &[]);
    let mut guest = script.attach(&clone);
    guest.write(4, 8);
    guest.write_zeroes(12, 8, true);
    guest.flush();
    guest.write(6, 100);
    guest.detach(script);
}

#[test]
fn a_snapshot_of_a_detached_volume_is_made() {
    survives(&traced(|script| of_detached(script, &[])));
}

#[test]
fn a_snapshot_of_a_detached_unencrypted_volume_is_made() {
    survives(&traced(|script| of_detached(script, &["--unencrypted", "--sector-size", "4096"])));
}

#[test]
fn snapshots_of_an_attached_volume_are_made() {
    survives(&traced(|script| of_attached(script, &[])));
}

#[test]
fn snapshots_of_several_volumes_are_made_at_one_moment() {
    survives(&traced(of_several));
}

#[test]
fn snapshots_and_their_volume_are_deleted() {
    survives(&traced(deleted));
}

#[test]
fn a_volume_is_made_of_a_snapshot_and_written_to() {
    survives(&traced(|script| cloned(script, &[])));
}
