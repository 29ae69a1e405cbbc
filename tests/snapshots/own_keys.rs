//! Volumes made from a snapshot that write under a data key of their own; and who else has a data key.

use crate::common::attach::{flush, open, read, write};
use crate::common::disk::pattern;
use crate::common::rig::Rig;
use sealblk::catalog::{Metadata, Seal};
use sealblk::crypt::Dek;
use serde_json::{Value, json};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

const LEN: usize = 4096;

fn deks(rig: &Rig, volume: &Metadata) -> Vec<Vec<u8>> {
    rig.reader().deks(volume.layout(), &volume.encryption_context())
}

/// Makes a volume called `name` of the snapshot, with these arguments besides.
fn clone(rig: &Rig, snapshot: &str, name: &str, arguments: &[&str]) -> Metadata {
    rig.place.store.ok(&[&["volume", "create", "--snapshot", snapshot, "--name", name], arguments].concat());
    rig.reader().volume(name)
}

/// Writes something at a sector, as the guest of that volume.
fn write_as_guest(rig: &Rig, volume: &str, sector: u64, bytes: &[u8]) {
    let (host, socket) = rig.attach(volume);
    let mut session = open(&socket);
    write(&mut session.rings[0], sector, bytes);
    flush(&mut session.rings[0]);
    drop(session);
    host.end();
}

fn read_as_guest(rig: &Rig, volume: &str, sector: u64, len: usize) -> Vec<u8> {
    let (host, socket) = rig.attach(volume);
    let mut session = open(&socket);
    let found = read(&mut session.rings[0], sector, len);
    drop(session);
    host.end();
    found
}

fn top_layer(rig: &Rig, volume: &str) -> PathBuf {
    let reader = rig.reader();
    reader.catalog().layer_path(reader.volume(volume).top().id)
}

/// Puts ciphertext of one volume where another one has its own.
fn transplant(rig: &Rig, from: &str, to: &str, sector: u64) {
    let mut bytes = vec![0; LEN];
    File::open(top_layer(rig, from)).unwrap().read_exact_at(&mut bytes, sector * 512).unwrap();
    assert!(bytes.iter().any(|b| *b != 0), "there is something to be put");
    let target = File::options().write(true).open(top_layer(rig, to)).unwrap();
    target.write_all_at(&bytes, sector * 512).unwrap();
}

/// Whom `volume show` names for each of the volume's data keys: snapshots, and volumes.
fn shared(rig: &Rig, volume: &str) -> Vec<(Vec<String>, Vec<String>)> {
    let shown = rig.json(&["volume", "show", volume]);
    let ids = |list: &Value| -> Vec<String> {
        list.as_array().unwrap().iter().map(|id| id.as_str().unwrap().to_owned()).collect()
    };
    let keys = shown["keys"].as_array().unwrap().iter();
    keys.map(|key| (ids(&key["shared_with"]["snapshots"]), ids(&key["shared_with"]["volumes"]))).collect()
}

#[test]
fn a_sector_of_a_sibling_is_readable_under_one_data_key_and_noise_under_own_ones() {
    let rig = Rig::new(&[]);
    let golden = rig.id(&["snapshot", "create", "t"]);
    let secret = pattern(77, LEN);
    for (own, arguments) in [(false, &[][..]), (true, &["--own-data-key"])] {
        let names = [format!("a-{own}"), format!("b-{own}")];
        let [a, b] = names.each_ref().map(|name| clone(&rig, &golden, name, arguments));
        assert_eq!(deks(&rig, &a).last() == deks(&rig, &b).last(), !own);
        write_as_guest(&rig, &names[0], 64, &secret);
        write_as_guest(&rig, &names[1], 64, &pattern(78, LEN));
        transplant(&rig, &names[0], &names[1], 64);
        let found = read_as_guest(&rig, &names[1], 64, LEN);
        assert_eq!(found == secret, !own, "own data keys: {own}");
        assert!(found != pattern(78, LEN));
        // What both have of the golden snapshot they read as before.
        assert!(read_as_guest(&rig, &names[1], 0, 64 << 10)[..32 << 10] == rig.data[..32 << 10]);
    }
}

#[test]
fn a_clone_with_its_own_data_key_shares_the_layers_below_and_copies_nothing() {
    let rig = Rig::new(&[]);
    let golden = rig.id(&["snapshot", "create", "t"]);
    let made = clone(&rig, &golden, "c", &["--own-data-key"]);
    let below = rig.reader().snapshot(&golden);
    assert_eq!((made.keys().len(), made.top().key, made.layers()[1].key), (2, Some(1), Some(0)));
    assert_eq!(
        made.keys()[0].first().wrapped.key_id,
        made.keys()[1].first().wrapped.key_id,
        "it is the same KMS key"
    );
    assert_eq!((&made.layers()[1..], made.layout().hydrate()), (below.layers(), None));
    let keys = deks(&rig, &made);
    assert!(keys[0] == deks(&rig, &rig.reader().volume("t"))[0] && keys[0] != keys[1]);
    let proof: Vec<Dek> = keys.iter().map(|key| Dek::from_bytes(key).unwrap()).collect();
    assert_eq!(made.verify(&proof).unwrap(), Seal::Unsealed);
    let (host, socket) = rig.attach("c");
    let mut session = open(&socket);
    assert!(read(&mut session.rings[0], 0, 64 << 10) == rig.data[..64 << 10]);
    write(&mut session.rings[0], 8, &pattern(5, LEN));
    flush(&mut session.rings[0]);
    assert_eq!(rig.json(&["volume", "show", "c"])["attachment"]["hydration"], Value::Null);
    // Of an attached one as well: the host process has the right key for its snapshot.
    let attached = rig.id(&["snapshot", "create", "c"]);
    drop(session);
    host.end();
    let mut data = rig.data.clone();
    data[8 * 512..8 * 512 + LEN].copy_from_slice(&pattern(5, LEN));
    let reader = rig.reader();
    assert!(reader.snapshot_content(&reader.snapshot(&attached)) == data);
    let c = reader.volume("c");
    assert_eq!(c.layers().iter().map(|l| l.key).collect::<Vec<_>>(), [Some(1), Some(1), Some(0)]);
    assert!(reader.volume_content(&c) == data && c.is_sealed());
}

#[test]
fn what_is_made_of_such_a_clone_works_as_of_any_other() {
    let rig = Rig::new(&[]);
    rig.place.store.ok(&["key", "create", "--alias", "alias/other"]);
    let golden = rig.id(&["snapshot", "create", "t"]);
    clone(&rig, &golden, "c", &["--own-data-key", "--size", "12MiB"]);
    write_as_guest(&rig, "c", 8, &pattern(5, LEN));
    let mut data = rig.data.clone();
    data.resize(12 << 20, 0);
    data[8 * 512..8 * 512 + LEN].copy_from_slice(&pattern(5, LEN));
    let holds = |volume: &str| {
        let (host, _) = rig.attach(volume);
        host.end();
        let reader = rig.reader();
        assert!(reader.volume_content(&reader.volume(volume)) == data, "{volume}");
    };
    // Snapshots, clones of them in both ways, copies in both ways.
    let next = rig.id(&["snapshot", "create", "c"]);
    let copy = rig.id(&["snapshot", "copy", &next]);
    let full = rig.id(&["snapshot", "copy", &next, "--key", "alias/other"]);
    for (name, snapshot, arguments, keys) in [
        ("same", &next, &[][..], 2),
        ("own", &next, &["--own-data-key"], 3),
        ("named", &next, &["--own-data-key", "--key", "alias/aws/ebs"], 3),
        ("of-copy", &copy, &["--own-data-key"], 3),
        ("of-full", &full, &["--own-data-key"], 2),
        ("elsewhere", &next, &["--own-data-key", "--key", "alias/other"], 3),
    ] {
        let made = clone(&rig, snapshot, name, arguments);
        assert_eq!(made.keys().len(), keys, "{name}");
        assert_eq!(made.layout().hydrate().is_some(), name == "elsewhere");
        holds(name);
    }
    let out = rig.place.folder().join("out");
    rig.place.store.ok(&["volume", "export", "own", &out.display().to_string()]);
    assert!(std::fs::read(&out).unwrap() == data);
    rig.place.store.ok(&["snapshot", "export", &copy, &out.display().to_string(), "--force"]);
    assert!(std::fs::read(&out).unwrap() == data);
    // Wrapped anew, each of its data keys; another data key; on its own.
    rig.place.store.ok(&["volume", "rewrap", "own", "--key", "alias/other"]);
    let kms_keys: Vec<String> =
        rig.reader().volume("own").keys().iter().map(|key| key.first().wrapped.key_id.clone()).collect();
    assert!(kms_keys.iter().all(|key| *key == kms_keys[0] && *key != rig.place.key()), "{kms_keys:?}");
    holds("own");
    rig.place.store.ok(&["volume", "rekey", "named", "--follow"]);
    rig.place.store.ok(&["volume", "flatten", "own", "--follow"]);
    for name in ["named", "own"] {
        let volume = rig.reader().volume(name);
        assert_eq!((volume.keys().len(), volume.layers().len()), (1, 1), "{name}");
        holds(name);
    }
    rig.place.store.ok(&["volume", "resize", "c", "16MiB"]);
    data.resize(16 << 20, 0);
    assert!(rig.reader().volume_content(&rig.reader().volume("c")) == data);
    rig.assert_layers_are_named();
}

#[test]
fn the_settings_say_which_data_key_a_clone_has_where_the_command_does_not() {
    let rig = Rig::new(&[]);
    let golden = rig.id(&["snapshot", "create", "t"]);
    let keys = |name: &str| clone(&rig, &golden, name, &[]).keys().len();
    assert_eq!(keys("default"), 1);
    rig.place.store.configure("clone-data-key = 'own'\n");
    assert_eq!(rig.json(&["settings", "show"])["clone_data_key"], "own");
    assert_eq!(keys("own"), 2);
    let (host, _) = rig.attach("own");
    host.end();
    rig.place.store.configure("clone-data-key = 'snapshot'\n");
    assert_eq!(keys("snapshot"), 1);
}

#[test]
fn a_data_key_of_its_own_is_of_an_encrypted_clone() {
    let rig = Rig::new(&["--unencrypted"]);
    let plain = rig.id(&["snapshot", "create", "t"]);
    let said = rig.refuse(2, &["volume", "create", "--snapshot", &plain, "--own-data-key"]);
    assert!(said.contains("is not encrypted"), "{said}");
    rig.refuse(2, &["volume", "create", "--size", "1MiB", "--own-data-key"]);
    rig.refuse(2, &["volume", "create", "--snapshot", &plain, "--own-data-key", "--unencrypted"]);
    // It has one in any case.
    assert_eq!(clone(&rig, &plain, "c", &["--own-data-key", "--key", "alias/aws/ebs"]).keys().len(), 1);
    // The setting does not encrypt what was not.
    rig.place.store.configure("clone-data-key = 'own'\n");
    assert!(!clone(&rig, &plain, "d", &[]).is_encrypted());
}

#[test]
fn a_kms_key_that_is_disabled_gives_no_data_key_for_a_clone() {
    let rig = Rig::new(&[]);
    let golden = rig.id(&["snapshot", "create", "t"]);
    rig.place.store.ok(&["key", "disable", "--yes", &rig.place.key()]);
    let layers = rig.files("layers");
    rig.refuse(5, &["volume", "create", "--snapshot", &golden, "--own-data-key"]);
    assert_eq!(rig.files("layers"), layers);
    assert_eq!(rig.last_event()["detail"]["result"], "failed");
}

#[test]
fn show_says_who_else_has_the_data_key() {
    let rig = Rig::new(&[]);
    let t = rig.place.id();
    assert_eq!(shared(&rig, "t"), [(vec![], vec![])]);
    assert!(rig.place.store.ok(&["volume", "show", "t"]).contains("data key of what it writes: its own"));
    let golden = rig.id(&["snapshot", "create", "t"]);
    let [same, own] = [("same", &[][..]), ("own", &["--own-data-key"])]
        .map(|(name, arguments)| clone(&rig, &golden, name, arguments).id().to_string());
    let sorted = |ids: &[&String]| {
        let mut ids: Vec<String> = ids.iter().map(|id| (*id).clone()).collect();
        ids.sort();
        ids
    };
    let snapshots = vec![golden.clone()];
    let all = [
        ("t", vec![(snapshots.clone(), sorted(&[&same, &own]))]),
        ("same", vec![(snapshots.clone(), sorted(&[&t, &own]))]),
        ("own", vec![(snapshots.clone(), sorted(&[&t, &same])), (vec![], vec![])]),
    ];
    for (volume, expected) in all {
        assert_eq!(shared(&rig, volume), expected, "{volume}");
    }
    let text = rig.place.store.ok(&["volume", "show", "own"]);
    assert!(text.contains("data key of what it writes: its own"), "{text}");
    assert!(text.contains(&format!("data key of lower layers: shared with {golden}, vol-")), "{text}");
    // A copy under the same data key, and a clone that has no layer of the others any more, but their key.
    let copy = rig.id(&["snapshot", "copy", &golden]);
    rig.place.store.ok(&["volume", "flatten", "same", "--follow"]);
    assert_eq!(rig.reader().volume("same").layers().len(), 1);
    let snapshots = sorted(&[&golden, &copy]);
    assert_eq!(shared(&rig, "same"), [(snapshots.clone(), sorted(&[&t, &own]))]);
    assert_eq!(shared(&rig, "own")[0], (snapshots, sorted(&[&t, &same])));
    // Many are counted.
    for n in 0..8 {
        clone(&rig, &golden, &format!("c{n}"), &[]);
    }
    let text = rig.place.store.ok(&["volume", "show", "t"]);
    assert!(text.contains(" more"), "{text}");
    rig.place.store.ok(&["volume", "rekey", "t", "--follow"]);
    assert_eq!(shared(&rig, "t"), [(vec![], vec![])], "it has a new one");
    assert_eq!(json!(shared(&rig, "own")[1]), json!([[], []]));
}
