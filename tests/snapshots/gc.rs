//! What is left over is found, said, and removed; what is in use is not.

use crate::common::rig::Rig;
use serde_json::{Value, json};
use std::fs;

const STRAY: &str = "67e55044-10b1-426f-9247-bb680e5fe0c8";
const TMP: &str = "00000000000000000000000000000000.tmp";

fn kinds(listed: &Value) -> Vec<String> {
    let left_overs = listed["left_overs"].as_array().expect("a list");
    let mut kinds: Vec<String> = left_overs.iter().map(|l| l["what"].as_str().unwrap().to_owned()).collect();
    kinds.sort();
    kinds
}

#[test]
fn left_overs_are_found_said_and_removed() {
    let rig = Rig::new(&[]);
    let id = rig.id(&["snapshot", "create", "t"]);
    assert_eq!(rig.json(&["gc"])["left_overs"], json!([]));
    let root = rig.place.store.root();
    fs::write(root.join(format!("layers/{STRAY}.img")), "stray").unwrap();
    fs::write(root.join("layers/mine.img"), "somebody's").unwrap();
    fs::write(root.join(format!("snapshots/{id}.json.{TMP}")), "{").unwrap();
    fs::write(rig.place.volume_folder().join(format!("volume.json.{TMP}")), "{").unwrap();
    fs::create_dir(root.join("volumes/vol-0123456789abcdef0")).unwrap();
    let expected = ["layer", "temporary", "temporary", "volume"];
    let dry = rig.json(&["gc", "--dry-run"]);
    assert_eq!((kinds(&dry), dry["dry_run"].as_bool()), (expected.map(String::from).to_vec(), Some(true)));
    assert_eq!(dry["left_overs"][0]["path"], root.join(format!("layers/{STRAY}.img")).to_str().unwrap());
    assert_eq!(kinds(&rig.json(&["gc"])), expected);
    assert_eq!(rig.json(&["gc"])["left_overs"], json!([]));
    assert!(root.join("layers/mine.img").exists(), "what is not ours stays");
    fs::remove_file(root.join("layers/mine.img")).unwrap();
    rig.assert_layers_are_named();
    assert!(rig.reader().volume_content(&rig.reader().volume("t")) == rig.data);
    assert!(rig.reader().snapshot_content(&rig.reader().snapshot(&id)) == rig.data);
}

#[test]
fn what_somebody_is_at_stays() {
    let rig = Rig::new(&[]);
    let host = rig.place.attach(&[]);
    let folder = rig.place.volume_folder();
    let layer = rig.place.store.root().join(format!("layers/{STRAY}.img"));
    fs::write(&layer, "a new top, just being made").unwrap();
    let pending = format!(r#"{{"format": 1, "change": {{"new-top": "{STRAY}"}}}}"#);
    fs::write(folder.join("pending.json"), pending).unwrap();
    fs::write(folder.join(format!("volume.json.{TMP}")), "{").unwrap();
    assert_eq!(rig.json(&["gc"])["left_overs"], json!([]));
    assert!(layer.exists());
    host.crash();
    assert_eq!(kinds(&rig.json(&["gc"])), ["change", "temporary"]);
    assert!(!layer.exists());
    rig.place.attach(&[]).end();
}

#[test]
fn a_store_is_not_made_by_looking_for_left_overs() {
    let store = crate::common::store::Store::new();
    assert_eq!(store.ok(&["gc"]), "WHAT  BYTES  PATH\n");
    assert!(!store.root().exists());
}
