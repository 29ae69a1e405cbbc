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

/// Snapshots are deleted while their volume is attached: what layers above have is given back, where it is
/// not flushed yet as well, and layers that nothing tells apart become one.
pub fn deleted_while_attached(script: &mut Script) {
    let id = with_data(script, &[]);
    let older = script.snapshot(&id);
    let mut guest = script.attach(&id);
    guest.write(8, 16);
    let newer = script.snapshot(&id);
    guest.write(0, 8);
    script.start();
    script.delete_snapshot(&older);
    guest.write(16, 8);
    script.delete_snapshot(&newer);
    guest.flush();
    guest.write(200, 8);
    guest.detach(script);
}

/// The lower one of two layers, which is the smaller one, goes up, and the next snapshot
/// takes it out of the chain.
pub fn merged_upwards(script: &mut Script, arguments: &[&str]) {
    let id = script.create(Content::zeros(SECTORS), arguments);
    let mut guest = script.attach(&id);
    guest.write(96, 8);
    // A part of a block that the upper one has in part, too.
    guest.write(120, 3);
    guest.detach(script);
    let older = script.snapshot(&id);
    let mut guest = script.attach(&id);
    guest.write(0, 64);
    guest.write(124, 2);
    guest.detach(script);
    script.snapshot(&id);
    script.start();
    script.delete_snapshot(&older);
    script.snapshot(&id);
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
fn snapshots_are_deleted_while_their_volume_is_attached() {
    survives(&traced(deleted_while_attached));
}

#[test]
fn a_layer_is_merged_into_the_one_above() {
    survives(&traced(|script| merged_upwards(script, &[])));
}

#[test]
fn a_layer_that_is_not_encrypted_is_merged_into_the_one_above() {
    survives(&traced(|script| merged_upwards(script, &["--unencrypted"])));
}

#[test]
fn a_volume_is_made_of_a_snapshot_and_written_to() {
    survives(&traced(|script| cloned(script, &[])));
}
