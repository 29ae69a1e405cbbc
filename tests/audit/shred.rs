//! `volume delete --shred`: no file of the store's keeps a wrapped copy, and the receipt says what was done.

use crate::common::store::{Store, said};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};

struct Volume {
    store: Store,
    id: String,
    folder: PathBuf,
    wrapped: String,
}

impl Volume {
    /// A volume, attached once, of whose metadata an interrupted write has left a copy.
    fn new() -> Self {
        let store = Store::new();
        let id = store.ok(&["volume", "create", "--size", "1MiB", "--name", "v"]).trim().to_owned();
        store.attach("v", &[]).detach();
        let folder = store.root().join("volumes").join(&id);
        let metadata = fs::read(folder.join("volume.json")).unwrap();
        let parsed: Value = serde_json::from_slice(&metadata).unwrap();
        let wrapped = parsed["keys"][0]["wrapped"].as_str().unwrap().to_owned();
        fs::write(folder.join("volume.json.0123.tmp"), metadata).unwrap();
        Volume { store, id, folder, wrapped }
    }

    /// Other names for the files that hold the wrapped key, to see afterwards what became of their bytes.
    fn witnesses(&self) -> Vec<PathBuf> {
        let names = ["volume.json", "volume.json.0123.tmp"];
        let witness = |name: &&str| {
            let path = self.store.root().join(format!("witness-{name}"));
            fs::hard_link(self.folder.join(name), &path).unwrap();
            path
        };
        names.iter().map(witness).collect()
    }

    #[track_caller]
    fn assert_overwritten(&self, witnesses: &[PathBuf]) {
        for path in witnesses {
            let bytes = fs::read(path).unwrap();
            assert!(!bytes.is_empty() && bytes.iter().all(|&b| b == 0), "{}", path.display());
            fs::remove_file(path).unwrap();
        }
        assert!(!self.folder.exists());
        assert!(!holds(&self.store.root(), &self.wrapped), "a copy is left");
        assert_eq!(fs::read_dir(self.store.root().join("layers")).unwrap().count(), 0);
    }
}

/// Whether any file below `folder` has `text` in it.
fn holds(folder: &Path, text: &str) -> bool {
    fs::read_dir(folder).unwrap().any(|entry| {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => holds(&path, text),
            false => fs::read(&path).unwrap().windows(text.len()).any(|part| part == text.as_bytes()),
        }
    })
}

#[test]
fn shredding_overwrites_every_copy_and_tells_what_it_reached() {
    let volume = Volume::new();
    let witnesses = volume.witnesses();
    assert!(holds(&volume.store.root(), &volume.wrapped));
    let receipt: Value =
        serde_json::from_str(&volume.store.ok(&["volume", "delete", "v", "--shred", "--json"])).unwrap();
    volume.assert_overwritten(&witnesses);
    assert_eq!((&receipt["volume"], &receipt["state"]), (&volume.id.as_str().into(), &"deleted".into()));
    let destroyed: Vec<&str> =
        receipt["destroyed"].as_array().unwrap().iter().map(|copy| copy["path"].as_str().unwrap()).collect();
    assert_eq!(destroyed.len(), 2, "{destroyed:?}");
    let key = &receipt["wrapped_by"][0];
    assert_eq!((&key["provider"], &key["used_by"]), (&"embedded".into(), &serde_json::json!([])));
    let outside = receipt["outside"].to_string();
    assert!(outside.contains("backups") && outside.contains(key["key_id"].as_str().unwrap()), "{outside}");

    let events = volume.store.ok(&["events"]);
    assert!(events.contains(&format!("deleteVolume  deleted  {}", volume.id)), "{events}");
    let audit = volume.store.ok(&["audit", "show", "--volume", &volume.id]);
    assert!(audit.lines().last().unwrap().contains("DestroyDek  ok"), "{audit}");
    volume.store.ok(&["audit", "verify"]);
}

#[test]
fn the_receipt_names_what_else_needs_the_key() {
    let volume = Volume::new();
    let other = volume.store.ok(&["volume", "create", "--size", "1MiB"]).trim().to_owned();
    let receipt = volume.store.ok(&["volume", "delete", "v", "--shred"]);
    assert!(receipt.contains("bytes overwritten, synced, removed"), "{receipt}");
    assert!(receipt.contains(&format!("is needed by {other}")), "{receipt}");
}

#[test]
fn an_attached_volume_is_not_shredded() {
    let volume = Volume::new();
    let attached = volume.store.attach("v", &[]);
    let refused = volume.store.run(&["volume", "delete", "v", "--shred"]);
    assert_eq!(refused.status.code(), Some(4), "{}", said(&refused));
    attached.detach();
    volume.store.attach("v", &[]).detach();
}

#[test]
fn a_shredding_that_was_interrupted_is_finished_by_the_next_command() {
    let volume = Volume::new();
    let witnesses = volume.witnesses();
    // As it is after the rename that decides.
    let text = fs::read_to_string(volume.folder.join("volume.json")).unwrap();
    fs::write(volume.folder.join("deleting.json"), text.replace(&volume.wrapped, "AA==")).unwrap();
    fs::rename(volume.folder.join("volume.json"), volume.folder.join("shredding.json")).unwrap();
    let listed = volume.store.ok(&["volume", "list"]);
    assert!(!listed.contains(&volume.id), "{listed}");
    let other = volume.store.ok(&["volume", "create", "--size", "1MiB"]).trim().to_owned();
    volume.store.ok(&["volume", "delete", &other]);
    volume.assert_overwritten(&witnesses);
}
