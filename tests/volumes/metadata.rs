//! Volumes on disk: what making and deleting leave at every point where they can be cut off, and what becomes
//! of metadata that is damaged, foreign, or written by two.

use sealblk::base::root::Root;
use sealblk::base::{Error, Kind};
use sealblk::catalog::lock::{Held, Holder, Purpose, VolumeLock};
use sealblk::catalog::metadata::Geometry;
use sealblk::catalog::tags::Tags;
use sealblk::catalog::{Catalog, Metadata, VolumeId};
use sealblk::config::Settings;
use sealblk::crypt::SectorSize;
use sealblk::events::EventLog;
use sealblk::kms::{EncryptionContext, KeyDescription, KeyProvider, KmsError, WrappedKey};
use sealblk::ops::delete;
use sealblk::ops::keys::WrappingKey;
use sealblk::ops::make::{self, Wanted};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

/// A KMS with one key, which is on or off.
struct OneKey {
    enabled: bool,
}

const KEY: &str = "arn:aws:kms:us-east-1:000000000000:key/1";

impl KeyProvider for OneKey {
    fn name(&self) -> &'static str {
        "one-key"
    }

    fn describe(&self, _: &str) -> Result<KeyDescription, KmsError> {
        unreachable!("making and deleting describe no key")
    }

    fn generate_wrapped(
        &self,
        key: &str,
        len: usize,
        context: &EncryptionContext,
    ) -> Result<WrappedKey, KmsError> {
        assert_eq!((key, len), ("alias/one", 64));
        if !self.enabled {
            return Err(KmsError::Disabled(format!("{KEY} is disabled.")));
        }
        Ok(WrappedKey { key_id: KEY.into(), blob: format!("{:?}", context.pairs()).into_bytes() })
    }

    fn decrypt(&self, _: &WrappedKey, _: &EncryptionContext) -> Result<Zeroizing<Vec<u8>>, KmsError> {
        unreachable!("making and deleting unwrap no key")
    }

    fn rewrap(
        &self,
        _: &WrappedKey,
        _: &EncryptionContext,
        _: &str,
        _: &EncryptionContext,
    ) -> Result<WrappedKey, KmsError> {
        unreachable!("making and deleting re-wrap no key")
    }
}

struct Store {
    _dir: tempfile::TempDir,
    root: Root,
    catalog: Catalog,
    events: EventLog,
}

impl Store {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(dir.path().join("store"));
        let (catalog, events) = (Catalog::new(&root), EventLog::new(&root, &Settings::default()));
        Store { _dir: dir, root, catalog, events }
    }

    fn create(&self, name: Option<&str>) -> Result<Metadata, Error> {
        let kms = OneKey { enabled: true };
        let key = WrappingKey { provider: &kms, key: "alias/one", also: None };
        make::create(&self.catalog, &self.events, &wanted(name), Some(key))
    }

    fn delete(&self, id: VolumeId) -> Result<(), Error> {
        delete::delete(&self.catalog, &self.events, id).map(drop)
    }

    fn hold(&self, id: VolumeId) -> VolumeLock {
        let holder = Holder::this_process(Purpose::Attach, Some(Path::new("/run/vm.sock"))).unwrap();
        VolumeLock::acquire(&self.catalog.folder(id), id, &holder).unwrap()
    }

    fn record(&self, id: VolumeId, name: &str) -> PathBuf {
        self.catalog.folder(id).join(name)
    }

    fn layer(&self, volume: &Metadata) -> PathBuf {
        self.catalog.layer_path(volume.top().id)
    }

    /// Every file of the volumes, by path; locks are left out, since taking one writes.
    fn files(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut files = BTreeMap::new();
        let mut folders = vec![self.root.volumes(), self.root.layers()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).into_iter().flatten() {
                let path = entry.unwrap().path();
                match path.is_dir() {
                    true => folders.push(path),
                    false if path.ends_with("lock") => {}
                    false => drop(files.insert(path.clone(), fs::read(&path).unwrap())),
                }
            }
        }
        files
    }

    fn folders(&self) -> usize {
        fs::read_dir(self.root.volumes()).unwrap().count()
    }

    fn last_event(&self) -> serde_json::Value {
        let text = fs::read_to_string(self.root.events()).unwrap();
        serde_json::from_str(text.lines().last().unwrap()).unwrap()
    }
}

fn wanted(name: Option<&str>) -> Wanted {
    let geometry = Geometry::new(1 << 20, SectorSize::B512).unwrap();
    Wanted {
        geometry,
        name: name.map(|n| n.parse().unwrap()),
        tags: Tags::default(),
        preallocate: false,
        device: None,
    }
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn a_new_volume_is_private_sparse_and_unsealed() {
    let store = Store::new();
    let made = store.create(Some("db")).unwrap();
    assert_eq!(store.catalog.load(made.id()).unwrap(), made);
    assert!(made.is_encrypted() && !made.is_sealed() && !made.attached_before());
    assert_eq!(made.generation(), 1);
    let context = EncryptionContext::pair("aws:ebs:id", made.id().to_string());
    assert_eq!(made.encryption_context(), context);
    assert_eq!(made.keys()[0].first().wrapped.blob, format!("{:?}", context.pairs()).into_bytes());
    let layer = fs::metadata(store.layer(&made)).unwrap();
    assert_eq!((layer.len(), layer.blocks()), (1 << 20, 0));
    assert_eq!(mode(&store.layer(&made)), 0o600);
    assert_eq!(mode(&store.record(made.id(), "volume.json")), 0o600);
    assert_eq!(mode(&store.record(made.id(), "lock")), 0o600);
    assert_eq!(mode(&store.catalog.folder(made.id())), 0o700);
    store.catalog.check_layers(&made).unwrap();
    assert_eq!(store.catalog.held(made.id()).unwrap(), Held::Free);
}

#[test]
fn preallocation_sets_the_space_aside() {
    let store = Store::new();
    let wanted = Wanted { preallocate: true, ..wanted(None) };
    let made = make::create(&store.catalog, &store.events, &wanted, None).unwrap();
    let layer = fs::metadata(store.layer(&made)).unwrap();
    assert_eq!(layer.len(), 1 << 20);
    assert!(layer.blocks() * 512 >= 1 << 20);
    assert!(fs::read(store.layer(&made)).unwrap().iter().all(|&b| b == 0));
}

#[test]
fn a_kms_that_refuses_leaves_nothing_but_the_event() {
    let store = Store::new();
    let kms = OneKey { enabled: false };
    let key = WrappingKey { provider: &kms, key: "alias/one", also: None };
    let e = make::create(&store.catalog, &store.events, &wanted(None), Some(key)).unwrap_err();
    assert_eq!(e.kind(), Kind::KmsRefused);
    // Of a KMS that sealblk does not know it names no commands.
    assert_eq!(e.to_string(), format!("create a volume: {KEY} is disabled."));
    assert!(!store.root.volumes().exists() && !store.root.layers().exists());
    let detail = store.last_event()["detail"].clone();
    assert_eq!(detail["event"], "createVolume");
    assert_eq!(detail["result"], "failed");
    assert_eq!(detail["cause"], format!("{KEY} is disabled."));
}

#[test]
fn a_volume_that_does_not_fit_leaves_nothing_but_the_event() {
    let store = Store::new();
    let geometry = Geometry::new(1 << 62, SectorSize::B512).unwrap();
    let wanted = Wanted { geometry, preallocate: true, ..wanted(None) };
    make::create(&store.catalog, &store.events, &wanted, None).unwrap_err();
    assert!(store.files().is_empty());
    assert_eq!(store.folders(), 0);
    assert_eq!(store.last_event()["detail"]["result"], "failed");
}

#[test]
fn a_name_is_given_once() {
    let store = Store::new();
    let made = store.create(Some("db")).unwrap();
    let before = store.files();
    let e = store.create(Some("db")).unwrap_err();
    assert_eq!(e.kind(), Kind::Busy);
    assert!(e.to_string().contains(&made.id().to_string()), "{e}");
    assert_eq!(store.files(), before);
    store.delete(made.id()).unwrap();
    store.create(Some("db")).unwrap();
}

#[test]
fn of_many_that_want_a_name_at_once_one_gets_it() {
    let store = Store::new();
    let results: Vec<_> = std::thread::scope(|threads| {
        let running: Vec<_> = (0..8).map(|_| threads.spawn(|| store.create(Some("db")))).collect();
        running.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(results.iter().filter(|r| r.is_ok()).count(), 1);
    assert!(results.iter().flat_map(|r| r.as_ref().err()).all(|e| e.kind() == Kind::Busy));
    assert_eq!(store.catalog.list().unwrap().len(), 1);
    assert_eq!((store.files().len(), store.folders()), (2, 1));
}

#[test]
fn deleting_takes_the_layer_along() {
    let store = Store::new();
    let (one, other) = (store.create(None).unwrap(), store.create(None).unwrap());
    store.delete(one.id()).unwrap();
    assert_eq!(store.catalog.ids().unwrap(), [other.id()]);
    assert_eq!((store.files().len(), store.folders()), (2, 1));
    assert_eq!(store.last_event()["detail"]["event"], "deleteVolume");
    assert_eq!(store.delete(one.id()).unwrap_err().kind(), Kind::NotFound);
    assert!(!store.catalog.folder(one.id()).exists());
}

#[test]
fn an_attached_volume_is_not_deleted() {
    let store = Store::new();
    let made = store.create(None).unwrap();
    let before = store.files();
    let lock = store.hold(made.id());
    let e = store.delete(made.id()).unwrap_err();
    assert_eq!(e.kind(), Kind::Busy);
    let holder = format!("is attached by process {}", std::process::id());
    assert!(e.to_string().contains(&holder) && e.to_string().contains("/run/vm.sock"), "{e}");
    assert_eq!(store.files(), before);
    drop(lock);
    store.delete(made.id()).unwrap();
}

/// Brings a whole volume into the state in which a create or delete was cut off.
type CutOff = fn(&Store, &Metadata);

/// After which step it was cut off, and what it leaves then.
fn remains() -> Vec<(&'static str, CutOff)> {
    fn rename(store: &Store, volume: &Metadata, to: &str) {
        fs::rename(store.record(volume.id(), "volume.json"), store.record(volume.id(), to)).unwrap();
    }
    fn remove_layer(store: &Store, volume: &Metadata) {
        fs::remove_file(store.layer(volume)).unwrap();
    }
    vec![
        ("create: the folder", |s, v| {
            remove_layer(s, v);
            fs::remove_file(s.record(v.id(), "volume.json")).unwrap();
            fs::remove_file(s.record(v.id(), "lock")).unwrap();
        }),
        ("create: the lock, or delete: all but the lock", |s, v| {
            remove_layer(s, v);
            fs::remove_file(s.record(v.id(), "volume.json")).unwrap();
        }),
        ("create: half a record", |s, v| {
            remove_layer(s, v);
            rename(s, v, "creating.json.00000000000000000000000000000000.tmp");
        }),
        ("create: the record", |s, v| {
            remove_layer(s, v);
            rename(s, v, "creating.json");
        }),
        ("create: an empty layer", |s, v| {
            fs::write(s.layer(v), "").unwrap();
            rename(s, v, "creating.json");
        }),
        ("create: all but the commit", |s, v| rename(s, v, "creating.json")),
        ("delete: the commit", |s, v| rename(s, v, "deleting.json")),
        ("delete: the layer", |s, v| {
            remove_layer(s, v);
            rename(s, v, "deleting.json");
        }),
    ]
}

#[test]
fn what_a_cut_off_command_leaves_is_no_volume_and_is_cleared_away() {
    for (at, cut_off) in remains() {
        let store = Store::new();
        let (gone, kept) = (store.create(Some("gone")).unwrap(), store.create(Some("kept")).unwrap());
        cut_off(&store, &gone);
        assert_eq!(store.catalog.ids().unwrap(), [kept.id()], "{at}");
        assert_eq!(store.catalog.resolve("gone").unwrap_err().kind(), Kind::NotFound, "{at}");
        assert_eq!(store.catalog.load(gone.id()).unwrap_err().kind(), Kind::NotFound, "{at}");
        let next = store.create(Some("gone")).unwrap();
        let expected = [&kept, &next].map(|v| [store.layer(v), store.record(v.id(), "volume.json")]);
        let mut expected = expected.concat();
        expected.sort();
        assert_eq!(store.files().into_keys().collect::<Vec<_>>(), expected, "{at}");
        assert_eq!(store.folders(), 2, "{at}");
    }
}

#[test]
fn what_another_process_is_at_is_left_alone() {
    for (at, cut_off) in remains().into_iter().skip(1) {
        let store = Store::new();
        let volume = store.create(None).unwrap();
        cut_off(&store, &volume);
        let lock = store.hold(volume.id());
        let before = store.files();
        store.create(None).unwrap();
        assert!(before.iter().all(|(path, bytes)| store.files().get(path) == Some(bytes)), "{at}");
        assert!(store.catalog.folder(volume.id()).exists(), "{at}");
        drop(lock);
    }
}

#[test]
fn what_is_not_understood_is_left_alone() {
    let damage: [CutOff; 3] = [
        |s, v| fs::write(s.record(v.id(), "creating.json"), "{").unwrap(),
        |s, v| fs::write(s.record(v.id(), "volume.json.bak"), "my copy").unwrap(),
        |s, v| fs::write(s.record(v.id(), "deleting.json"), r#"{"format": 2}"#).unwrap(),
    ];
    for cut_off in damage {
        let store = Store::new();
        let volume = store.create(None).unwrap();
        fs::remove_file(store.record(volume.id(), "volume.json")).unwrap();
        cut_off(&store, &volume);
        let before = store.files();
        let other = store.create(None).unwrap();
        store.delete(other.id()).unwrap();
        assert_eq!(store.files(), before);
    }
}

#[test]
fn metadata_is_replaced_whole_and_counted() {
    let store = Store::new();
    let mut volume = store.create(None).unwrap();
    let lock = store.hold(volume.id());
    let left_over = store.record(volume.id(), "volume.json.00000000000000000000000000000000.tmp");
    fs::write(&left_over, "{").unwrap();
    assert!(volume.mark_attached());
    assert!(!volume.mark_attached());
    store.catalog.save(&lock, &mut volume).unwrap();
    assert!(!left_over.exists());
    let read = store.catalog.load(volume.id()).unwrap();
    assert_eq!((read.generation(), read.attached_before()), (2, true));
    assert_eq!(read, volume);
}

#[test]
fn a_write_that_fails_leaves_the_metadata_as_it_was() {
    let store = Store::new();
    let mut volume = store.create(None).unwrap();
    let lock = store.hold(volume.id());
    let (file, aside) = (store.record(volume.id(), "volume.json"), store.root.path().join("aside"));
    fs::rename(&file, &aside).unwrap();
    // A folder cannot be replaced by a file.
    fs::create_dir_all(file.join("in the way")).unwrap();
    let before = volume.clone();
    store.catalog.save(&lock, &mut volume).unwrap_err();
    assert_eq!(volume, before);
    fs::remove_dir_all(&file).unwrap();
    fs::rename(&aside, &file).unwrap();
    assert_eq!(store.catalog.load(volume.id()).unwrap(), before);
    assert_eq!(store.files().len(), 2);
}

#[test]
fn a_volume_moved_into_another_folder_is_refused() {
    let store = Store::new();
    let (one, other) = (store.create(None).unwrap(), store.create(None).unwrap());
    fs::copy(store.record(one.id(), "volume.json"), store.record(other.id(), "volume.json")).unwrap();
    let e = store.catalog.load(other.id()).unwrap_err();
    assert_eq!(e.kind(), Kind::Corrupt);
    assert!(e.to_string().contains(&format!("describes {}, not {}", one.id(), other.id())), "{e}");
    assert_eq!(store.delete(other.id()).unwrap_err().kind(), Kind::Corrupt);
    assert!(store.layer(&one).exists() && store.layer(&other).exists());
}

#[test]
fn layers_are_there_and_as_long_as_the_volume() {
    let store = Store::new();
    let volume = store.create(None).unwrap();
    let refusal = || {
        let e = store.catalog.check_layers(&volume).unwrap_err();
        assert_eq!(e.kind(), Kind::Corrupt);
        assert!(e.to_string().contains(&store.layer(&volume).display().to_string()), "{e}");
        e.to_string()
    };
    let file = fs::OpenOptions::new().write(true).open(store.layer(&volume)).unwrap();
    for len in [0, (1 << 20) - 512, (1 << 20) + 512] {
        file.set_len(len).unwrap();
        assert!(refusal().contains(&format!("has {len} bytes instead of 1048576")));
    }
    fs::remove_file(store.layer(&volume)).unwrap();
    assert!(refusal().contains("is missing"));
    fs::create_dir(store.layer(&volume)).unwrap();
    assert!(refusal().contains("is not a file"));
}

#[test]
fn a_file_without_end_is_not_read_into_memory() {
    let store = Store::new();
    let volume = store.create(None).unwrap();
    let file = fs::OpenOptions::new().write(true).open(store.record(volume.id(), "volume.json")).unwrap();
    file.set_len(1 << 40).unwrap();
    let e = store.catalog.load(volume.id()).unwrap_err();
    assert!(e.kind() == Kind::Corrupt && e.to_string().contains("longer than"), "{e}");
}
