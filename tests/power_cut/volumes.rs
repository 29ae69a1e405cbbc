//! The life of a volume, cut everywhere.

use super::expect::Content;
use super::explore::{Scope, explore, one_of, time_by_chance};
use super::script::{Script, traced};
use super::trace::Trace;
use serde_json::{Value, json};

/// A volume's sectors: enough for several pages, few enough to be read often.
pub const SECTORS: usize = 256;

/// Fails if any state is wrong.
#[track_caller]
pub fn survives(trace: &Trace) {
    let scope = Scope { from: 0, one_of: one_of(), by_chance: time_by_chance() };
    let tried = explore(trace, &scope).unwrap_or_else(|failure| panic!("{failure:?}"));
    println!("{tried}");
}

/// A volume is made, with these arguments, in an empty store.
pub fn create(script: &mut Script, arguments: &[&str]) {
    script.start();
    script.create(Content::zeros(SECTORS), arguments);
}

/// Of two volumes, one is deleted.
pub fn delete(script: &mut Script) {
    let ids = [(); 2].map(|()| script.create(Content::zeros(SECTORS), &["--unencrypted"]));
    script.start();
    script.delete(&ids[0]);
}

/// A volume is attached for the first time, written to in every way, and detached.
pub fn first_attach(script: &mut Script, arguments: &[&str]) {
    let id = script.create(Content::zeros(SECTORS), arguments);
    script.start();
    let mut guest = script.attach(&id);
    guest.write(0, 8);
    guest.write(13, 30);
    guest.flush();
    guest.write(4, 24);
    guest.write_zeroes(20, 9, false);
    guest.flush();
    guest.write(5, 2);
    guest.discard(8, 16);
    guest.write(100, 3);
    guest.flush();
    guest.write_zeroes(0, 8, true);
    guest.write(2, 4);
    guest.write(250, 6);
    guest.detach(script);
}

/// As [`first_attach`], with sectors of 4096 bytes.
pub fn large_sectors(script: &mut Script) {
    let id = script.create(Content::zeros(SECTORS), &["--unencrypted", "--sector-size", "4096"]);
    script.start();
    let mut guest = script.attach(&id);
    guest.write(0, 24);
    guest.flush();
    guest.write(8, 8);
    guest.discard(0, 16);
    guest.write(16, 8);
    guest.flush();
    guest.detach(script);
}

/// A volume's data key is wrapped by another KMS key, while it is attached and while it is not.
pub fn rewrapped(script: &mut Script) {
    let keys = [(); 2].map(|()| script.create_key(&[]));
    let id = script.create(Content::zeros(SECTORS), &["--key", &keys[0]]);
    let mut guest = script.attach(&id);
    guest.write(0, 8);
    script.start();
    script.rewrap(&id, &keys[0], &keys[1]);
    guest.write(4, 8);
    guest.detach(script);
    script.rewrap(&id, &keys[1], &keys[0]);
}

/// A volume gets another name, and other limits are kept with it, while it is attached and while it is not.
pub fn renamed_and_modified(script: &mut Script) {
    let id = script.create(Content::zeros(SECTORS), &["--name", "a"]);
    let rename = |script: &Script, from: &str, to: &str| {
        let change = (json!(from), json!(to));
        script.change(&id, &["volume", "rename", &id, to], "/name", change);
    };
    let modify = |script: &Script, from: Value, to: u64| {
        let iops = to.to_string();
        let change = (from, json!(to));
        script.change(&id, &["volume", "modify", &id, "--iops", &iops], "/attach/iops", change);
    };
    script.start();
    rename(script, "a", "b");
    modify(script, Value::Null, 1000);
    let mut guest = script.attach(&id);
    guest.write(0, 8);
    rename(script, "b", "c");
    modify(script, json!(1000), 2000);
    guest.write(4, 8);
    guest.detach(script);
}

#[test]
fn a_volume_gets_another_name_and_other_limits() {
    survives(&traced(renamed_and_modified));
}

/// An image is imported, with these arguments besides, and the volume written to.
pub fn imported(script: &mut Script, arguments: &[&str]) {
    script.start();
    let id = script.import(SECTORS, &[0..20, 64..80, 250..256], arguments);
    let mut guest = script.attach(&id);
    guest.write(8, 64);
    guest.flush();
    guest.detach(script);
}

/// A raw image becomes a volume where it lies, and is written to.
pub fn taken_in_place(script: &mut Script) {
    let source = script.create(Content::zeros(SECTORS), &[]);
    let mut guest = script.attach(&source);
    guest.write(0, 20);
    guest.write(250, 6);
    guest.detach(script);
    script.export_to_image(&source);
    script.start();
    let id = script.take_image(&source);
    let mut guest = script.attach(&id);
    guest.write(8, 64);
    guest.flush();
    guest.detach(script);
}

#[test]
fn an_image_is_taken_in_place() {
    survives(&traced(taken_in_place));
}

#[test]
fn an_image_is_imported() {
    survives(&traced(|script| imported(script, &[])));
}

#[test]
fn an_image_is_imported_without_a_key_and_with_large_sectors() {
    let arguments = ["--unencrypted", "--sector-size", "4096", "--preallocate"];
    survives(&traced(|script| imported(script, &arguments)));
}

/// A volume is made larger, detached and attached, and its new sectors are written to.
pub fn grown(script: &mut Script, arguments: &[&str]) {
    let id = script.create(Content::zeros(SECTORS), arguments);
    let mut guest = script.attach(&id);
    guest.write(SECTORS - 8, 8);
    guest.detach(script);
    script.start();
    script.resize(&id, SECTORS + 64);
    let mut guest = script.attach(&id);
    guest.write(SECTORS, 64);
    guest.flush();
    script.resize(&id, SECTORS + 128);
    guest.write(SECTORS + 56, 16);
    guest.flush();
    guest.write(SECTORS + 120, 8);
    guest.detach(script);
}

#[test]
fn an_encrypted_volume_is_made() {
    survives(&traced(|script| create(script, &[])));
}

#[test]
fn a_preallocated_unencrypted_volume_is_made() {
    survives(&traced(|script| create(script, &["--unencrypted", "--preallocate", "--name", "a"])));
}

#[test]
fn a_volume_is_deleted() {
    survives(&traced(delete));
}

#[test]
fn a_volume_is_sealed_and_written_to() {
    survives(&traced(|script| first_attach(script, &[])));
}

#[test]
fn an_unencrypted_volume_with_large_sectors_is_written_to() {
    survives(&traced(large_sectors));
}

#[test]
fn a_volume_is_rewrapped() {
    survives(&traced(rewrapped));
}

#[test]
fn a_volume_is_made_larger() {
    survives(&traced(|script| grown(script, &[])));
}
