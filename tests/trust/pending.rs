//! What is undone because a volume's folder says that it was pending: nothing that a record names.

use crate::common::attach::Place;
use crate::{edit, names, run};
use serde_json::{Value, json};
use std::fs;
use std::path::PathBuf;

fn pending(place: &Place, change: &Value) -> PathBuf {
    let path = place.volume_folder().join("pending.json");
    fs::write(&path, json!({"format": 1, "change": change}).to_string()).unwrap();
    path
}

fn top_of(place: &Place, volume: &str) -> String {
    let shown: Value = serde_json::from_str(&place.store.ok(&["volume", "show", volume, "--json"])).unwrap();
    shown["layers"][0]["id"].as_str().expect("a layer").to_owned()
}

#[test]
fn a_layer_that_any_record_names_is_not_removed_as_one_in_the_making() {
    let place = Place::new(&[]);
    place.store.ok(&["volume", "create", "--size", "8MiB", "--name", "golden"]);
    let frozen = top_of(&place, "golden");
    place.store.ok(&["snapshot", "create", "golden"]);
    let top = top_of(&place, "golden");
    // Named by a volume that is just being made, of whose making nobody knows whether it goes on.
    let making = place.store.ok(&["volume", "create", "--size", "8MiB"]).trim().to_owned();
    let made = top_of(&place, &making);
    let folder = place.store.root().join("volumes").join(&making);
    fs::rename(folder.join("volume.json"), folder.join("creating.json")).unwrap();
    let _holder = sealblk::catalog::lock::VolumeLock::acquire(
        &folder,
        making.parse().unwrap(),
        &sealblk::catalog::lock::Holder::this_process(sealblk::catalog::lock::Purpose::Create, None).unwrap(),
    );
    let layers = names(&place.store.root().join("layers"));
    for layer in [&frozen, &top, &made] {
        for commands in ["attach", "gc", "snapshot"] {
            let note = pending(&place, &json!({"new-top": layer}));
            match commands {
                "attach" => place.attach(&[]).end(),
                "gc" => drop(place.store.ok(&["gc"])),
                _ => drop(place.store.ok(&["volume", "resize", "t", &place.metadata().size().to_string()])),
            }
            if commands != "snapshot" {
                assert!(!note.exists(), "{commands}: it is settled");
            }
            assert_eq!(names(&place.store.root().join("layers")), layers, "{commands} of {layer}");
        }
    }
    // A layer that nothing names is cleared away.
    let nobodys = uuid::Uuid::new_v4();
    let file = place.store.root().join(format!("layers/{nobodys}.img"));
    fs::write(&file, "x").unwrap();
    pending(&place, &json!({"new-top": nobodys}));
    place.attach(&[]).end();
    assert!(!file.exists());
}

#[test]
fn a_pending_resize_shortens_no_layer_but_the_volumes_own() {
    let place = Place::new(&["--unencrypted"]);
    place.store.ok(&["volume", "create", "--size", "16MiB", "--name", "golden", "--unencrypted"]);
    let golden = top_of(&place, "golden");
    let file = place.store.root().join(format!("layers/{golden}.img"));
    edit(&place.volume_json(), |volume| volume["layers"][0]["id"] = json!(golden));
    // Said to be right by an operator who did not look: the ledger has no objection.
    place.store.accept();
    pending(&place, &json!({"resize": 16 << 20}));
    let id = place.volume_folder().file_name().unwrap().to_str().unwrap().to_owned();
    for command in [&["attach", &id, "--socket-path", "/nonexistent/t.sock"][..], &["gc"]] {
        run(&place, command);
        assert_eq!(fs::metadata(&file).unwrap().len(), 16 << 20, "{command:?}");
    }
}
