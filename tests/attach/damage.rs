//! Stores that are damaged or were tampered with: refused in plain words, and left exactly as they are.

use crate::common::attach::{Place, flush, open, read, write};
use crate::common::disk::pattern;
use crate::common::tree::Tree;
use serde_json::{Value, json};
use std::fs::{self, OpenOptions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// What was done to a store, and how an attach takes it.
struct Case<'a> {
    what: &'a str,
    code: i32,
    /// What the error says.
    words: &'a str,
    /// What is recorded about it.
    events: usize,
}

/// A volume that was attached once and has data.
fn used() -> (Place, Vec<u8>) {
    let place = Place::new(&[]);
    let data = pattern(1, 1 << 16);
    let host = place.attach(&[]);
    let mut session = open(&place.socket());
    write(&mut session.rings[0], 128, &data);
    flush(&mut session.rings[0]);
    host.end();
    (place, data)
}

/// The volume is attached by `id`, since its name may not be readable any more.
#[track_caller]
fn refused(place: &Place, id: &str, case: &Case<'_>) {
    for more in [&[][..], &["--read-only"]] {
        let tree = Tree::of(place);
        let mut command = place.store.command();
        command.args(["attach", id, "--socket-path"]).arg(place.socket()).args(more);
        let said = place.run(command, vec![]);
        assert_eq!((said.code, said.out.as_str()), (case.code, ""), "{}: {}", case.what, said.err);
        assert!(said.err.contains(case.words), "{}: {}", case.what, said.err);
        let last = said.err.lines().last().unwrap_or_default();
        assert!(last.starts_with("sealblk: "), "{}: {}", case.what, said.err);
        assert!(!place.socket().exists(), "{}: it has left a socket", case.what);
        tree.assert_unchanged(place, case.what, case.events);
    }
}

/// What was damaged is whole again: the volume attaches, and the data is there.
#[track_caller]
fn assert_whole(place: &Place, data: &[u8]) {
    let host = place.attach(&[]);
    assert!(read(&mut open(&place.socket()).rings[0], 128, data.len()) == data);
    host.end();
}

fn edited(bytes: &[u8], edit: impl FnOnce(&mut Value)) -> Vec<u8> {
    let mut value = serde_json::from_slice(bytes).expect("volume.json is JSON");
    edit(&mut value);
    serde_json::to_vec_pretty(&value).expect("JSON")
}

fn resize(v: &mut Value, size: u64) {
    v["size"] = json!(size);
    v["layers"][0]["size"] = json!(size);
}

#[test]
fn a_damaged_or_foreign_volume_json_is_refused() {
    let (place, data) = used();
    let (id, path) = (place.id(), place.volume_json());
    let whole = fs::read(&path).unwrap();
    let edit = |edit: fn(&mut Value)| edited(&whole, edit);
    let cases: Vec<(&str, &str, Vec<u8>)> = vec![
        ("nothing in it", "cut short", vec![]),
        ("the first half", "cut short", whole[..whole.len() / 2].to_vec()),
        ("all but its last brace", "cut short", whole[..whole.len() - 2].to_vec()),
        ("zeros, as a bad file system leaves them", "not what sealblk writes", vec![0; whole.len()]),
        ("something behind its end", "not what sealblk writes", [&whole[..], b"{}"].concat()),
        ("much too long", "longer than 16777216 bytes", vec![b' '; (16 << 20) + 1]),
        (
            "a future version",
            "format version 4, and this sealblk knows only versions 1 to 3",
            edit(|v| v["format"] = json!(4)),
        ),
        ("the version of several slots, with one", "version 2 says all", edit(|v| v["format"] = json!(3))),
        ("an unknown field", "unknown field `colour`", edit(|v| v["colour"] = json!("red"))),
        ("an unknown field of a key", "unknown field `colour`", edit(|v| v["keys"][0]["colour"] = json!(1))),
        (
            "a missing field",
            "missing field `sector_size`",
            edit(|v| drop(v.as_object_mut().unwrap().remove("sector_size"))),
        ),
        ("half a sector", "not whole sectors", edit(|v| resize(v, (8 << 20) + 256))),
        ("a layer that is too short", "its top layer has", edit(|v| v["layers"][0]["size"] = json!(4 << 20))),
        (
            "another volume's id",
            "it describes vol-0123456789abcdef0",
            edit(|v| {
                v["id"] = json!("vol-0123456789abcdef0");
                v["keys"][0]["context"]["aws:ebs:id"] = json!("vol-0123456789abcdef0");
            }),
        ),
        (
            "another context",
            "is not that of",
            edit(|v| v["keys"][0]["context"]["aws:ebs:id"] = json!("vol-1")),
        ),
        (
            "a layer without a key",
            "top layer has no key",
            edit(|v| {
                v["layers"][0]["key"] = Value::Null;
                v["keys"] = json!([]);
                v["mac"] = Value::Null;
            }),
        ),
        ("a key without a check value", "not all there", edit(|v| v["keys"][0]["check"] = Value::Null)),
        ("no MAC", "not all there", edit(|v| v["mac"] = Value::Null)),
    ];
    for (what, words, bytes) in cases {
        fs::write(&path, bytes).unwrap();
        place.store.accept();
        refused(&place, &id, &Case { what, code: 7, words, events: 0 });
        fs::write(&path, &whole).unwrap();
        place.store.accept();
    }
    fs::remove_file(&path).unwrap();
    refused(&place, &id, &Case { what: "no volume.json", code: 3, words: "there is no volume", events: 0 });
    fs::write(&path, &whole).unwrap();
    place.store.accept();
    assert_whole(&place, &data);
}

#[test]
fn metadata_that_was_edited_is_refused_by_its_mac() {
    let (place, data) = used();
    let (id, path, layer) = (place.id(), place.volume_json(), place.layer());
    let whole = fs::read(&path).unwrap();
    let flip = |field: &mut Value, digit: usize| {
        let mut text = field.as_str().unwrap().to_owned();
        let new = if &text[digit..=digit] == "0" { "1" } else { "0" };
        text.replace_range(digit..=digit, new);
        *field = json!(text);
    };
    let edited_mac = "the MAC does not fit the rest; volume.json was edited";
    let other_key = "unwraps to another key";
    // The layer is as long as the metadata says, so that nothing but the MAC can tell.
    let cases: Vec<(&str, &str, u64, Vec<u8>)> = vec![
        ("the MAC's first digit", edited_mac, 8 << 20, edited(&whole, |v| flip(&mut v["mac"], 0))),
        ("the MAC's last digit", edited_mac, 8 << 20, edited(&whole, |v| flip(&mut v["mac"], 63))),
        ("the check value", other_key, 8 << 20, edited(&whole, |v| flip(&mut v["keys"][0]["check"], 31))),
        ("a smaller size", edited_mac, 4 << 20, edited(&whole, |v| resize(v, 4 << 20))),
        ("a larger size", edited_mac, 16 << 20, edited(&whole, |v| resize(v, 16 << 20))),
        ("the sector size", edited_mac, 8 << 20, edited(&whole, |v| v["sector_size"] = json!(4096))),
    ];
    let content = fs::read(&layer).unwrap();
    for (what, words, len, bytes) in cases {
        fs::write(&path, bytes).unwrap();
        place.store.accept();
        OpenOptions::new().write(true).open(&layer).unwrap().set_len(len).unwrap();
        refused(&place, &id, &Case { what, code: 7, words, events: 0 });
        fs::write(&path, &whole).unwrap();
        place.store.accept();
        fs::write(&layer, &content).unwrap();
    }
    // Another layer of the same length, under its own name.
    let other = "00000000-0000-4000-8000-000000000000";
    fs::copy(&layer, layer.with_file_name(format!("{other}.img"))).unwrap();
    fs::write(&path, edited(&whole, |v| v["layers"][0]["id"] = json!(other))).unwrap();
    place.store.accept();
    refused(&place, &id, &Case { what: "another layer", code: 7, words: edited_mac, events: 0 });
    fs::write(&path, &whole).unwrap();
    place.store.accept();
    assert_whole(&place, &data);
}

#[test]
fn a_seal_that_was_taken_away_is_missed_where_there_is_data() {
    let place = Place::new(&[]);
    let path = place.volume_json();
    let never_attached = fs::read(&path).unwrap();
    let host = place.attach(&[]);
    let data = pattern(1, 1 << 16);
    let mut session = open(&place.socket());
    write(&mut session.rings[0], 128, &data);
    flush(&mut session.rings[0]);
    host.end();
    let whole = fs::read(&path).unwrap();
    let unseal = |v: &mut Value| {
        v["mac"] = Value::Null;
        v["keys"][0]["check"] = Value::Null;
    };
    let stripped = edited(&whole, unseal);
    let as_new = edited(&stripped, |v| v["attached_before"] = json!(false));
    let words = "there is data in its layer, but no seal";
    for (what, bytes) in [
        ("MAC and check value taken away", &stripped),
        ("the same, as if never attached", &as_new),
        ("volume.json from before the first attach", &never_attached),
        ("the same with another size", &edited(&never_attached, |v| v["sector_size"] = json!(4096))),
    ] {
        fs::write(&path, bytes).unwrap();
        place.store.accept();
        refused(&place, &place.id(), &Case { what, code: 7, words, events: 0 });
    }
    fs::write(&path, &whole).unwrap();
    place.store.accept();
    assert_whole(&place, &data);
}

/// A power cut can come between the KMS's answer and the seal; and who attaches first may be anyone.
#[test]
fn a_volume_without_data_is_sealed_at_its_first_attach() {
    let place = Place::new(&["--preallocate"]);
    assert!(!place.metadata().is_sealed());
    let host = place.attach(&["--read-only"]);
    assert!(place.metadata().is_sealed(), "sealed before the socket opens");
    host.end();
    let sealed = fs::read(place.volume_json()).unwrap();
    place.attach(&[]).end();
    assert!(fs::read(place.volume_json()).unwrap() == sealed, "and never written again");
}

/// Zeros and holes mean the same: a layer may have been copied by what does not know holes.
#[test]
fn a_volume_whose_holes_were_filled_with_zeros_has_no_data() {
    let place = Place::new(&[]);
    fs::write(place.layer(), vec![0; 8 << 20]).unwrap();
    place.attach(&[]).end();
    assert!(place.metadata().is_sealed());
}

#[test]
fn a_layer_of_another_length_or_none_is_refused() {
    let (place, data) = used();
    let (id, layer) = (place.id(), place.layer());
    let whole = fs::read(&layer).unwrap();
    let size = whole.len() as u64;
    for (what, len) in [("empty", 0), ("shorter", size - 512), ("longer", size + 512), ("double", 2 * size)] {
        OpenOptions::new().write(true).open(&layer).unwrap().set_len(len).unwrap();
        let words = format!("has {len} bytes instead of {size}");
        refused(&place, &id, &Case { what, code: 7, words: &words, events: 0 });
        fs::write(&layer, &whole).unwrap();
    }
    let aside = layer.with_extension("aside");
    fs::rename(&layer, &aside).unwrap();
    refused(&place, &id, &Case { what: "missing", code: 7, words: "is missing; restore it", events: 0 });
    fs::create_dir(&layer).unwrap();
    refused(&place, &id, &Case { what: "a folder", code: 7, words: "is not a file", events: 0 });
    fs::remove_dir(&layer).unwrap();
    fs::rename(&aside, &layer).unwrap();
    assert_whole(&place, &data);
}

/// The only file in `folder` with this extension.
fn file_of(folder: &Path, extension: &str) -> PathBuf {
    let mut files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    files.find(|path| path.extension().is_some_and(|e| e == extension)).expect("it is there")
}

#[test]
fn without_the_kms_and_its_root_key_there_is_no_data_key() {
    let (place, data) = used();
    let id = place.id();
    let root_key = file_of(&place.store.config(), "key");
    let log = place.store.root().join("kms/log");
    let (key_bytes, log_bytes) = (fs::read(&root_key).unwrap(), fs::read(&log).unwrap());

    fs::remove_file(&root_key).unwrap();
    let words = format!("put {} back from a backup", root_key.display());
    refused(&place, &id, &Case { what: "no root key", code: 8, words: &words, events: 1 });
    let mut other = key_bytes.clone();
    other[30] = if other[30] == b'0' { b'1' } else { b'0' };
    let none = "is not a KMS root key; put it back from a backup";
    let not_this = "is not the one this store was made with";
    for (what, words, bytes) in
        [("garbage as root key", none, &b"x"[..]), ("another root key", not_this, &other)]
    {
        fs::write(&root_key, bytes).unwrap();
        fs::set_permissions(&root_key, fs::Permissions::from_mode(0o600)).unwrap();
        refused(&place, &id, &Case { what, code: 7, words, events: 1 });
    }
    fs::write(&root_key, &key_bytes).unwrap();
    fs::set_permissions(&root_key, fs::Permissions::from_mode(0o640)).unwrap();
    refused(
        &place,
        &id,
        &Case { what: "others may read the root key", code: 1, words: "chmod 600", events: 1 },
    );
    fs::set_permissions(&root_key, fs::Permissions::from_mode(0o600)).unwrap();

    let mut damaged = log_bytes.clone();
    damaged[150] ^= 1;
    for (what, bytes) in [("a changed byte", &damaged[..]), ("cut off", &log_bytes[..100]), ("empty", &[])] {
        fs::write(&log, bytes).unwrap();
        refused(&place, &id, &Case { what, code: 7, words: "kms/log", events: 1 });
    }
    fs::remove_file(&log).unwrap();
    refused(&place, &id, &Case { what: "no KMS", code: 3, words: "there is no KMS store in", events: 1 });
    fs::write(&log, &log_bytes).unwrap();
    fs::set_permissions(&log, fs::Permissions::from_mode(0o600)).unwrap();
    assert_whole(&place, &data);
}
