//! A volume's record, written by a process that had the volume: whose layers it may name,
//! and whose name it may have.

use crate::common::attach::Place;
use crate::{edit, refused, run};
use sealblk::catalog::Metadata;
use sealblk::crypt::Dek;
use serde_json::{Value, json};
use std::fs;

fn shown(place: &Place, volume: &str) -> Value {
    serde_json::from_str(&place.store.ok(&["volume", "show", volume, "--json"])).unwrap()
}

/// Everything that would write to the volume's top, or read it as its own.
fn all_refuse(place: &Place, words: &str) {
    let id = place.volume_folder().file_name().unwrap().to_str().unwrap().to_owned();
    let out = place.folder().join("out.img");
    for command in [
        &["attach", &id, "--socket-path", "/nonexistent/t.sock"][..],
        &["attach", &id, "--socket-path", "/nonexistent/t.sock", "--incoming"],
        &["attach", &id, "--socket-path", "/nonexistent/t.sock", "--read-only"],
        &["snapshot", "create", &id],
        &["volume", "resize", &id, "16MiB"],
        &["volume", "flatten", &id],
        &["volume", "rekey", &id, "--follow"],
        &["volume", "export", &id, out.to_str().unwrap()],
    ] {
        refused(place, command, 7, words);
    }
}

#[test]
fn a_top_that_others_share_is_opened_by_nobody() {
    let place = Place::new(&[]);
    let snapshot = place.store.ok(&["snapshot", "create", "t"]).trim().to_owned();
    let sibling = ["volume", "create", "--snapshot", &snapshot, "--name", "sibling"];
    let sibling = place.store.ok(&sibling).trim().to_owned();
    let deks = [Dek::from_bytes(&place.dek()).unwrap()];
    // Resealed, as only a process that had the data key could: what is frozen becomes the top.
    let path = place.volume_json();
    let whole = fs::read(&path).unwrap();
    edit(&path, |volume| drop(volume["layers"].as_array_mut().unwrap().remove(0)));
    let mut metadata = Metadata::from_json(&fs::read(&path).unwrap()).unwrap();
    metadata.seal(&deks);
    assert!(metadata.is_sealed());
    fs::write(&path, metadata.to_json()).unwrap();
    place.store.accept();
    all_refuse(&place, "is named by");
    // Each of the records that name it is enough: a snapshot's, of whatever state, a volume's,
    // and one that is damaged.
    let root = place.store.root();
    let of_snapshot = root.join(format!("snapshots/{snapshot}.json"));
    let aside = place.folder().join("aside");
    let id = place.volume_folder().file_name().unwrap().to_str().unwrap().to_owned();
    let attach = ["attach", &id, "--socket-path", "/nonexistent/t.sock"];
    fs::rename(&of_snapshot, &aside).unwrap();
    refused(&place, &attach, 7, &format!("is named by {sibling}"));
    let of_sibling = root.join(format!("volumes/{sibling}/volume.json"));
    let record = fs::read(&of_sibling).unwrap();
    fs::write(&of_sibling, &record[..record.len() - 10]).unwrap();
    refused(&place, &attach, 7, &format!("{sibling}/volume.json as well"));
    fs::remove_file(&of_sibling).unwrap();
    fs::copy(&aside, &of_snapshot).unwrap();
    refused(&place, &attach, 7, &format!("is named by {snapshot}"));
    let whole_snapshot = fs::read(&of_snapshot).unwrap();
    fs::write(&of_snapshot, &whole_snapshot[..whole_snapshot.len() - 10]).unwrap();
    refused(&place, &attach, 7, &format!("is named by {snapshot}"));
    fs::rename(&of_snapshot, of_snapshot.with_extension("copying")).unwrap();
    refused(&place, &attach, 7, &format!("is named by {snapshot}"));
    fs::remove_file(of_snapshot.with_extension("copying")).unwrap();
    fs::rename(&aside, &of_snapshot).unwrap();
    fs::write(&of_sibling, record).unwrap();
    // Also where it is another volume's alone, and not frozen.
    fs::write(&path, &whole).unwrap();
    place.store.ok(&["volume", "create", "--size", "8MiB", "--name", "other"]);
    let other = shown(&place, "other");
    edit(&path, |volume| volume["layers"][0]["id"] = other["layers"][0]["id"].clone());
    let mut metadata = Metadata::from_json(&fs::read(&path).unwrap()).unwrap();
    metadata.seal(&deks);
    fs::write(&path, metadata.to_json()).unwrap();
    place.store.accept();
    all_refuse(&place, other["id"].as_str().unwrap());
    // Its deletion takes nothing along that is not its own.
    let layer = place.store.root().join(format!("layers/{}.img", other["layers"][0]["id"].as_str().unwrap()));
    place.store.ok(&["volume", "delete", place.volume_folder().file_name().unwrap().to_str().unwrap()]);
    assert!(layer.exists());
    place.store.ok(&["volume", "show", "other"]);
}

#[test]
fn a_layer_that_is_another_volumes_top_is_not_read_as_a_lower_one() {
    let place = Place::new(&["--unencrypted"]);
    place.store.ok(&["snapshot", "create", "t"]);
    place.store.ok(&["volume", "create", "--size", "8MiB", "--name", "other", "--unencrypted"]);
    let other = shown(&place, "other");
    edit(&place.volume_json(), |volume| volume["layers"][1]["id"] = other["layers"][0]["id"].clone());
    place.store.accept();
    all_but_encrypted(&place, other["id"].as_str().unwrap());
}

/// As [`all_refuse`], of what can be done with a volume that is not encrypted.
fn all_but_encrypted(place: &Place, words: &str) {
    let id = place.volume_folder().file_name().unwrap().to_str().unwrap().to_owned();
    refused(place, &["attach", &id, "--socket-path", "/nonexistent/t.sock"], 7, words);
    refused(place, &["snapshot", "create", &id], 7, words);
}

#[test]
fn of_two_volumes_of_one_name_neither_is_taken() {
    let place = Place::new(&[]);
    let other = place.store.ok(&["volume", "create", "--size", "8MiB", "--name", "other"]).trim().to_owned();
    edit(&place.store.root().join(format!("volumes/{other}/volume.json")), |volume| {
        volume["name"] = json!("t")
    });
    place.store.accept();
    let own = place.volume_folder_of_either(&other);
    for command in [
        &["attach", "t", "--socket-path", "/nonexistent/t.sock"][..],
        &["volume", "delete", "t"],
        &["detach", "t"],
    ] {
        let said = refused(&place, command, 2, &other);
        assert!(said.contains(&own), "{said}");
    }
    // By their ids they are told apart.
    place.store.ok(&["volume", "show", &own]);
    place.store.ok(&["volume", "show", &other]);
    // Nor can a name stand for the beginning of another volume's id; a short one is like it by chance.
    let digits = own.strip_prefix("vol-").unwrap();
    for (length, code) in [(12, 2), (3, 0)] {
        let path = place.store.root().join(format!("volumes/{other}/volume.json"));
        edit(&path, |volume| volume["name"] = json!(digits[..length]));
        place.store.accept();
        let (found, said) = run(&place, &["volume", "show", &digits[..length]]);
        assert_eq!(found, code, "{length}: {said}");
        assert!(said.contains(&other), "{length}: {said}");
    }
}

impl Place {
    /// The id of the volume that is not `other`.
    fn volume_folder_of_either(&self, other: &str) -> String {
        let mut ids = crate::names(&self.store.root().join("volumes"));
        ids.remove(other);
        ids.into_iter().next().expect("a volume")
    }
}
