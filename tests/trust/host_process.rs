//! What a command believes of what a host process answers: nothing that it did not know before.

use crate::common::attach::Place;
use crate::impostor::{Impostor, Talk};
use crate::{names, refused, run};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

/// A place whose volume was attached once, so that it has a seal; and a golden volume with a snapshot.
struct Scene {
    place: Place,
    golden: String,
    layers: BTreeSet<String>,
    snapshots: BTreeSet<String>,
    record: Vec<u8>,
}

impl Scene {
    fn new() -> Self {
        let place = Place::new(&[]);
        place.attach(&[]).end();
        place.store.ok(&["volume", "create", "--size", "8MiB", "--name", "golden"]);
        let golden = place.store.ok(&["snapshot", "create", "golden", "--name", "image"]).trim().to_owned();
        let root = place.store.root();
        let (layers, snapshots) = (names(&root.join("layers")), names(&root.join("snapshots")));
        let record = fs::read(root.join(format!("snapshots/{golden}.json"))).unwrap();
        Scene { place, golden, layers, snapshots, record }
    }

    fn root(&self) -> PathBuf {
        self.place.store.root()
    }

    /// The record of the golden snapshot.
    fn golden(&self) -> Value {
        serde_json::from_slice(&self.record).unwrap()
    }

    /// The file of the golden snapshot's layer.
    fn golden_layer(&self) -> PathBuf {
        self.root().join(format!("layers/{}.img", self.golden()["layers"][0]["id"].as_str().unwrap()))
    }

    /// Has a snapshot made of the volume, by an impostor that talks so.
    fn snapshot(&self, talk: impl FnOnce(&mut Talk) + Send) -> (i32, String) {
        Impostor::new(&self.place).answers(talk, || run(&self.place, &["snapshot", "create", "t"]))
    }

    #[track_caller]
    fn nothing_has_changed(&self) {
        assert_eq!(names(&self.root().join("snapshots")), self.snapshots);
        assert_eq!(names(&self.root().join("layers")), self.layers);
        let record = self.root().join(format!("snapshots/{}.json", self.golden));
        assert!(fs::read(record).unwrap() == self.record, "the golden snapshot is another one");
        self.place.store.ok(&["snapshot", "show", "image"]);
    }
}

#[test]
fn the_layers_that_a_failed_snapshot_removes_are_its_own() {
    let scene = Scene::new();
    let (golden, id) = (scene.golden_layer(), scene.golden()["layers"][0]["id"].clone());
    // It says that the new layer is another volume's, as the protocol once let it.
    let (code, said) = scene.snapshot(|talk| talk.say(&json!({"new-layer": {"id": id}})));
    assert_eq!(code, 8, "{said}");
    scene.nothing_has_changed();
    // Under the name that the client has chosen lies what is not a new layer.
    type Lay = fn(&PathBuf, &PathBuf);
    let lies: [(&str, Lay); 5] = [
        ("a hard link", |golden, new| fs::hard_link(golden, new).unwrap()),
        ("a symbolic link", |golden, new| symlink(golden, new).unwrap()),
        ("a pipe", |_, new| nix::unistd::mkfifo(new, nix::sys::stat::Mode::S_IRWXU).unwrap()),
        ("a file of another length", |_, new| fs::write(new, "short").unwrap()),
        ("nothing", |_, _| ()),
    ];
    for (what, lay) in lies {
        let (code, said) = scene.snapshot(|talk| {
            lay(&golden, &talk.layer());
            talk.say(&json!("layer-made"));
            assert_eq!(talk.hear(), None, "{what}: the client goes on");
            let _ = fs::remove_file(talk.layer());
        });
        assert!([1, 3, 7].contains(&code) && said.contains("link "), "{what}: {code}: {said}");
        scene.nothing_has_changed();
    }
    // What the client has linked is removed again when it is told of a failure.
    let (code, said) = scene.snapshot(|talk| {
        talk.make_layer();
        talk.hear().expect("the client goes on");
        talk.say(&json!({"failed": {"kind": "other", "message": "no"}}));
        let _ = fs::remove_file(talk.layer());
    });
    assert_eq!(code, 1, "{said}");
    // That was said after the moment in which the layer may have become the volume's: gc looks at the rest.
    run(&scene.place, &["gc"]);
    scene.nothing_has_changed();
}

#[test]
fn a_record_is_written_only_if_it_is_the_one_that_was_asked_for() {
    let scene = Scene::new();
    let golden = scene.golden();
    type Lie = Box<dyn Fn(&mut Value) + Send + Sync>;
    let take = |fields: &'static [&'static str]| -> Lie {
        let golden = golden.clone();
        Box::new(move |record| fields.iter().for_each(|field| record[*field] = golden[*field].clone()))
    };
    let lies: Vec<(&str, Lie)> = vec![
        ("id", take(&["id", "sealed_as"])),
        ("", take(&["id"])),
        ("", take(&["sealed_as", "mac"])),
        ("volume", take(&["volume", "keys", "layers"])),
        (
            "origin",
            Box::new(|record| {
                record["copy_of"] = json!("snap-0123456789abcdef0");
                record["keys"][0]["context"] = json!({"aws:ebs:id": record["id"]});
            }),
        ),
        ("id", take(&["id", "volume", "keys", "layers", "mac", "sealed_as", "tags", "description"])),
        ("keys or layers", take(&["layers"])),
        ("keys or layers", Box::new(|record| record["keys"][0]["check"] = json!("00".repeat(16)))),
        (
            "size",
            Box::new(|record| {
                record["size"] = json!(4 << 20);
                record["layers"][0]["size"] = json!(4 << 20);
            }),
        ),
        ("label", Box::new(|record| record["description"] = json!("of an operator"))),
        ("label", Box::new(|record| record["tags"] = json!({"Name": "image"}))),
        (
            "keys or layers",
            Box::new(|record| {
                record["encrypted"] = json!(false);
                record["keys"] = json!([]);
                record["layers"][0]["key"] = Value::Null;
                record["mac"] = Value::Null;
            }),
        ),
    ];
    for (number, (what, lie)) in lies.iter().enumerate() {
        let (code, said) = scene.snapshot(|talk| talk.propose(lie));
        assert_eq!(code, 7, "{number}: {said}");
        // What cannot be a record at all is refused before it is compared.
        let words =
            if what.is_empty() { "it is no copy".into() } else { format!("of which the {what} is not") };
        assert!(said.contains(&words), "{number}: {said}");
        let layer: Vec<String> =
            names(&scene.place.volume_folder()).into_iter().filter(|n| n.ends_with(".img")).collect();
        assert_eq!(layer.len(), 1);
        fs::remove_file(scene.place.volume_folder().join(&layer[0])).unwrap();
        // The client cannot know whether the volume has that layer now.
        run(&scene.place, &["gc"]);
        scene.nothing_has_changed();
    }
    // A record that is as it was asked for is taken, whatever time it says.
    let (code, said) = scene.snapshot(|talk| talk.propose(|_| ()));
    assert_eq!(code, 0, "{said}");
    let id = said.lines().find(|line| line.starts_with("snap-")).unwrap();
    let shown: Value =
        serde_json::from_str(&scene.place.store.ok(&["snapshot", "show", id, "--json"])).unwrap();
    assert_ne!(shown["created"], "2026-01-31T23:59:59Z");
}

#[test]
fn a_copy_of_another_volumes_identity_is_refused() {
    let scene = Scene::new();
    let (code, said) = scene.snapshot(|talk| talk.propose(|record| record["copy_of"] = record["id"].clone()));
    // Its keys would have to be another's, for which they are not wrapped.
    assert_eq!(code, 7, "{said}");
    assert_eq!(names(&scene.root().join("snapshots")), scene.snapshots);
    // A host process can say of its volume what it likes, and not which one it is.
    let golden = scene.place.store.ok(&["volume", "show", "golden", "--json"]);
    let golden: Value = serde_json::from_str(&golden).unwrap();
    let id = scene.place.id();
    crate::edit(&scene.place.volume_json(), |volume| volume["id"] = golden["id"].clone());
    refused(
        &scene.place,
        &["attach", &id, "--socket-path", "/nonexistent/t.sock"],
        7,
        "which is not that of",
    );
}

/// Of a volume that nobody has sealed yet, nothing could prove a clone.
#[test]
fn a_snapshot_without_a_seal_is_none_of_an_encrypted_volume() {
    let place = Place::new(&[]);
    let (code, said) = Impostor::new(&place)
        .answers(|talk| talk.propose(|_| ()), || run(&place, &["snapshot", "create", "t"]));
    assert!(code == 7 && said.contains("has no MAC"), "{code}: {said}");
}
