//! Volumes that are re-keyed, flattened and encrypted, cut everywhere.

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

/// A volume that nobody has attached gets another data key.
pub fn rekeyed_detached(script: &mut Script) {
    let id = with_data(script, &[]);
    script.start();
    script.run(&["volume", "rekey", &id, "--follow"]);
}

/// A volume gets another data key while its guest writes, and when the layers below have left, makes holes.
pub fn rekeyed_attached(script: &mut Script, arguments: &[&str]) {
    let id = with_data(script, arguments);
    script.start();
    let mut guest = script.attach(&id);
    guest.write(8, 16);
    script.run(&["volume", "rekey", &id]);
    guest.write(4, 8);
    guest.flush();
    guest.write(110, 40);
    script.run(&["volume", "flatten", &id, "--follow"]);
    guest.write_zeroes(96, 8, true);
    guest.discard(0, 8);
    guest.flush();
    guest.write(200, 8);
    guest.detach(script);
}

/// A volume with a snapshot below is made one layer, and the snapshot deleted.
pub fn flattened(script: &mut Script) {
    let id = with_data(script, &["--unencrypted"]);
    let snapshot = script.snapshot(&id);
    let mut guest = script.attach(&id);
    guest.write(8, 16);
    guest.detach(script);
    script.start();
    script.run(&["volume", "flatten", &id, "--follow"]);
    script.delete_snapshot(&snapshot);
}

/// A snapshot is made of a volume that is being re-keyed.
pub fn snapshot_between(script: &mut Script) {
    let id = with_data(script, &[]);
    script.run(&["volume", "rekey", &id]);
    script.start();
    let mut guest = script.attach(&id);
    guest.write(8, 16);
    script.snapshot(&id);
    guest.write(0, 4);
    script.run(&["volume", "flatten", &id, "--follow"]);
    guest.flush();
    guest.write_zeroes(96, 8, true);
    guest.detach(script);
}

/// An encrypted volume is made of an unencrypted snapshot.
pub fn encrypted(script: &mut Script) {
    let id = with_data(script, &["--unencrypted"]);
    let snapshot = script.snapshot(&id);
    script.mark("the default key may be made", |expect| expect.default_key = true);
    script.start();
    let clone = script.clone_of(&snapshot, &["--key", "alias/aws/ebs"]);
    let mut guest = script.attach(&clone);
    guest.write(4, 8);
    guest.flush();
    script.run(&["volume", "flatten", &clone, "--follow"]);
    guest.write_zeroes(96, 8, true);
    guest.flush();
    guest.detach(script);
}

/// A snapshot is copied under another data key, and the original deleted.
pub fn copied(script: &mut Script) {
    let id = with_data(script, &["--unencrypted"]);
    let snapshot = script.snapshot(&id);
    script.mark("the default key may be made", |expect| expect.default_key = true);
    script.start();
    script.copy_of(&snapshot, &["--key", "alias/aws/ebs"]);
    script.delete_snapshot(&snapshot);
}

/// A snapshot comes from a place outside, which the cut does not hit, and the original is deleted.
pub fn pulled(script: &mut Script) {
    let outside = tempfile::tempdir().expect("make a temporary folder");
    let url = format!("file://{}", outside.path().display());
    let id = with_data(script, &[]);
    let snapshot = script.snapshot(&id);
    script.run(&["snapshot", "push", &snapshot, &url]);
    script.start();
    script.pull(&url, &snapshot, &[]);
    script.delete_snapshot(&snapshot);
}

/// A snapshot is there before its data, which come from the place at `url`, that the cut does not hit; then
/// they come.
fn pulled_lazily(script: &mut Script, url: &str) {
    let id = with_data(script, &[]);
    let snapshot = script.snapshot(&id);
    script.run(&["snapshot", "push", &snapshot, url]);
    script.start();
    let pulled = script.pull(url, &snapshot, &["--lazy"]);
    script.run(&["snapshot", "complete", &pulled]);
    script.delete_snapshot(&snapshot);
}

/// A volume that was backed up and deleted comes back from a place outside, which the cut does not hit.
pub fn restored(script: &mut Script) {
    let outside = tempfile::tempdir().expect("make a temporary folder");
    let url = format!("file://{}", outside.path().display());
    let id = with_data(script, &[]);
    let snapshot = script.backup(&url, &id);
    script.delete(&id);
    script.start();
    script.restore(&url, &snapshot);
}

/// A volume comes from another host, which has it no more then, by a place that the cut does not hit.
fn received(script: &mut Script) {
    let outside = tempfile::tempdir().expect("make a temporary folder");
    let url = format!("file://{}", outside.path().display());
    let id = with_data(script, &[]);
    let other = script.another_host();
    script.delete(&id);
    script.start();
    script.receive(&other, &url, &id);
}

#[test]
fn a_volume_is_received_from_another_host() {
    survives(&traced(received));
}

#[test]
fn a_volume_is_restored_from_a_place_outside() {
    survives(&traced(restored));
}

#[test]
fn a_snapshot_is_pulled_from_a_place_outside() {
    survives(&traced(pulled));
}

#[test]
fn a_snapshot_is_there_before_its_data() {
    // Whoever looks at what a cut has left needs the place still.
    let outside = tempfile::tempdir().expect("make a temporary folder");
    let url = format!("file://{}", outside.path().display());
    survives(&traced(|script| pulled_lazily(script, &url)));
}

#[test]
fn a_snapshot_is_copied_under_another_data_key() {
    survives(&traced(copied));
}

#[test]
fn a_detached_volume_gets_another_data_key() {
    survives(&traced(rekeyed_detached));
}

#[test]
fn an_attached_volume_gets_another_data_key() {
    survives(&traced(|script| rekeyed_attached(script, &[])));
}

#[test]
fn a_volume_is_made_one_layer() {
    survives(&traced(flattened));
}

#[test]
fn a_snapshot_is_made_of_a_volume_that_is_being_rekeyed() {
    survives(&traced(snapshot_between));
}

#[test]
fn an_encrypted_volume_is_made_of_an_unencrypted_snapshot() {
    survives(&traced(encrypted));
}
