//! Destroying the wrapped copies of a volume's data keys, and telling what that reaches.
//!
//! A wrapped key is worth something to whoever can ask the KMS for it. Overwriting takes it from the file
//! system, as far as that writes in place; what else there may be of it, the receipt says.

use crate::audit::{AuditLog, Entry, Step};
use crate::base::root::{files, sync_dir};
use crate::base::{Context, Error, Kind, Result, Timestamp, printable};
use crate::catalog::DELETING;
use crate::catalog::metadata::{KeyRecord, Metadata};
use crate::catalog::slots::KeySlot;
use crate::catalog::{Catalog, VolumeId, leaving, lock};
use crate::kms::KmsKey;
use nix::fcntl::OFlag;
use nix::sys::statfs;
use serde::Serialize;
use serde_json::Value;
use std::io::Write;
use std::path::{Path, PathBuf};

/// What `volume.json` is called from the moment in which the volume is not there any more
/// until it is overwritten.
pub const FILE: &str = "shredding.json";

/// Not in nix.
const XFS_SUPER_MAGIC: statfs::FsType = statfs::FsType(0x5846_5342);

/// One file that held a wrapped copy of a data key, or may have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Destroyed {
    /// Where it was.
    #[serde(serialize_with = "printable::path")]
    pub path: PathBuf,
    /// Its length in bytes, all of which were overwritten and synced before it was removed.
    pub bytes: u64,
}

/// A KMS key that could unwrap a copy, wherever there is one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct WrappedBy {
    /// The provider.
    pub provider: String,
    /// The key's ARN.
    pub key_id: String,
    /// What else in the store is under that key.
    pub used_by: Vec<String>,
}

/// What was destroyed, and what that does not reach.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Receipt {
    /// The volume.
    pub volume: VolumeId,
    /// When.
    pub time: Timestamp,
    /// The copies.
    pub destroyed: Vec<Destroyed>,
    /// The files of its data that were removed with it, since nothing else needs them;
    /// ciphertext, not overwritten.
    #[serde(serialize_with = "printable::paths")]
    pub layers: Vec<PathBuf>,
    /// What can still unwrap a copy that somebody else has.
    pub wrapped_by: Vec<WrappedBy>,
    /// What in the store holds the same data key, wrapped for itself.
    pub same_data_key: Vec<String>,
    /// The file system, and whether it writes in place.
    pub file_system: FileSystem,
}

/// How the store's file system treats what is overwritten.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FileSystem {
    /// Its name, as far as it is known.
    pub name: String,
    /// Whether it is known to overwrite in place.
    pub overwrites: bool,
}

impl Receipt {
    /// What will be destroyed with the volume, except for the copies themselves.
    pub fn new(catalog: &Catalog, metadata: &Metadata) -> Result<Self> {
        let others = others(catalog, metadata)?;
        let mut kms_keys: Vec<KmsKey> = kms_keys(metadata.keys()).collect();
        kms_keys.sort();
        kms_keys.dedup();
        let wrapped_by = kms_keys.into_iter().map(|KmsKey { provider, key_id }| {
            let users = others.iter().filter(|o| o.keys.iter().any(|it| it.key_id == key_id));
            let used_by = users.map(|other| other.name.clone()).collect();
            WrappedBy { provider, key_id, used_by }
        });
        let left = catalog.left_layers(metadata.id())?;
        let layers = metadata.layers().iter().map(|layer| layer.id).chain(left);
        Ok(Receipt {
            volume: metadata.id(),
            time: Timestamp::now(),
            destroyed: Vec::new(),
            layers: layers
                .map(|layer| match catalog.on_device(layer) {
                    Ok(Some(_)) => catalog.device_file(layer),
                    _ => catalog.file_of(layer),
                })
                .collect(),
            wrapped_by: wrapped_by.collect(),
            same_data_key: others
                .iter()
                .filter(|other| other.same_data_key)
                .map(|other| other.name.clone())
                .collect(),
            file_system: FileSystem::of(&catalog.folder(metadata.id()))?,
        })
    }

    /// What is outside the reach of what was done, in words.
    pub fn outside(&self) -> Vec<String> {
        let mut outside = Vec::new();
        if !self.file_system.overwrites {
            outside.push(format!(
                "this file system ({}) may have written the zeros beside the old bytes instead of over them",
                self.file_system.name
            ));
        }
        outside.push(
            "earlier versions of volume.json, in blocks that the file system has freed and not used again"
                .into(),
        );
        outside.push("backups of the store, and snapshots of its file system or of the disk below it".into());
        outside.push(
            "what the medium keeps by itself: blocks that an SSD has replaced, journals, caches, RAID and \
             replicas"
                .into(),
        );
        for holder in &self.same_data_key {
            outside.push(format!("{holder}, which has the same data key, wrapped for itself"));
        }
        for key in &self.wrapped_by {
            let arn = &key.key_id;
            outside.push(match &key.used_by[..] {
                [] => format!(
                    "{arn} ({}), which could unwrap any such copy; nothing else in this store is under it: \
                     if nothing elsewhere is either, delete it, and every copy is worthless",
                    key.provider
                ),
                others => format!(
                    "{arn} ({}), which could unwrap any such copy, and is needed by {}",
                    key.provider,
                    others.join(", ")
                ),
            });
        }
        outside
    }
}

impl FileSystem {
    /// The one that `folder` lies on.
    fn of(folder: &Path) -> Result<Self> {
        let kind = statfs::statfs(folder).context(|| folder.display().to_string())?.filesystem_type();
        let known = [
            (statfs::EXT4_SUPER_MAGIC, "ext4", true),
            (statfs::TMPFS_MAGIC, "tmpfs", true),
            // Where files share blocks, xfs writes elsewhere; volume.json shares none
            // unless somebody copied it so.
            (XFS_SUPER_MAGIC, "xfs", true),
            (statfs::BTRFS_SUPER_MAGIC, "btrfs", false),
            (statfs::OVERLAYFS_SUPER_MAGIC, "overlayfs", false),
            (statfs::NFS_SUPER_MAGIC, "nfs", false),
        ];
        let found = known.iter().find(|(magic, ..)| *magic == kind);
        Ok(found.map_or_else(
            || FileSystem { name: format!("type {:#x}", kind.0), overwrites: false },
            |(_, name, overwrites)| FileSystem { name: (*name).into(), overwrites: *overwrites },
        ))
    }
}

/// Something else in the store that has data keys.
struct Holder {
    name: String,
    keys: Vec<KmsKey>,
    same_data_key: bool,
}

/// Everything else in the store that has data keys: volumes and snapshots.
fn others(catalog: &Catalog, metadata: &Metadata) -> Result<Vec<Holder>> {
    let mine = checks(metadata.keys());
    let holder = |name: String, keys: &[KeyRecord]| Holder {
        name,
        keys: kms_keys(keys).collect(),
        same_data_key: checks(keys).iter().any(|check| mine.contains(check)),
    };
    let volumes = catalog.list()?.into_iter().filter(|entry| entry.id != metadata.id());
    let volumes =
        volumes.map(|entry| entry.metadata.map(|other| holder(other.id().to_string(), other.keys())));
    let snapshots = catalog.snapshots()?.into_iter();
    let snapshots =
        snapshots.map(|entry| entry.snapshot.map(|other| holder(other.id().to_string(), other.keys())));
    let unreadable = |e: &Error| log::warn!("{e}; whether it is under the same key is not known");
    Ok(volumes.chain(snapshots).filter_map(|other| other.inspect_err(unreadable).ok()).collect())
}

/// The KMS keys that wrap these data keys.
fn kms_keys(keys: &[KeyRecord]) -> impl Iterator<Item = KmsKey> {
    keys.iter().flat_map(KeyRecord::slots).map(KeySlot::kms_key)
}

/// What tells data keys apart, as far as it is known: check values are noted at the first attach.
fn checks(keys: &[KeyRecord]) -> Vec<[u8; 16]> {
    keys.iter().filter_map(|key| key.check).collect()
}

/// `metadata` as a file, without the wrapped keys: enough to find what is to be removed with the volume.
pub fn without_wrapped_keys(metadata: &Metadata) -> Result<Vec<u8>> {
    let unreadable = |e: serde_json::Error| Error::of(Kind::Other, e);
    let mut value: Value = serde_json::from_slice(&metadata.to_json()).map_err(unreadable)?;
    for key in value["keys"].as_array_mut().into_iter().flatten() {
        // One byte, since none is not possible.
        match key.get_mut("slots").and_then(Value::as_array_mut) {
            Some(slots) => slots.iter_mut().for_each(|slot| slot["wrapped"] = "AA==".into()),
            None => key["wrapped"] = "AA==".into(),
        }
    }
    serde_json::to_vec_pretty(&value).map_err(unreadable)
}

/// Overwrites and removes every file in a volume's folder, except for the lock, and the records without
/// wrapped keys that tell what else is to be removed.
pub fn destroy_all(folder: &Path) -> Result<Vec<Destroyed>> {
    let attempt = || format!("list {}", folder.display());
    let mut destroyed = Vec::new();
    for name in files::names(folder).context(attempt)? {
        let is_spared = [lock::FILE, DELETING, leaving::FILE].iter().any(|spared| name == *spared);
        let path = folder.join(name);
        if !is_spared && path.symlink_metadata().context(attempt)?.is_file() {
            destroyed.push(destroy(&path)?);
        }
    }
    sync_dir(folder)?;
    destroyed.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(destroyed)
}

/// Does what an interrupted shredding has left undone.
pub fn finish(folder: &Path) -> Result<()> {
    if !files::exists(&folder.join(FILE)) {
        return Ok(());
    }
    destroy_all(folder).map(drop)
}

/// Overwrites a file with zeros, syncs it, and removes it.
fn destroy(path: &Path) -> Result<Destroyed> {
    let overwrite = || -> std::io::Result<u64> {
        let mut file = files::open_with(path, OFlag::O_WRONLY)?;
        let bytes = file.metadata()?.len();
        let zeros = vec![0; 64 << 10];
        let mut left = bytes;
        while left > 0 {
            let part = left.min(zeros.len() as u64);
            file.write_all(&zeros[..part as usize])?;
            left -= part;
        }
        file.sync_all()?;
        files::remove(path)?;
        Ok(bytes)
    };
    let bytes = overwrite().context(|| format!("overwrite {}", path.display()))?;
    Ok(Destroyed { path: path.to_owned(), bytes })
}

/// Writes down that the wrapped copies of a volume's data keys are gone, or are not all.
pub fn record_destroyed<T>(catalog: &Catalog, metadata: &Metadata, outcome: &Result<T>) {
    let log = match AuditLog::new(catalog.root()) {
        Ok(log) => log,
        Err(e) => return log::error!("an audit record was lost: {e}"),
    };
    let context = metadata.encryption_context();
    for KmsKey { provider, key_id } in kms_keys(metadata.keys()) {
        let entry = Entry::dek(Step::Destroy, context.pairs(), &provider, &key_id);
        log.record(&match outcome {
            Ok(_) => entry,
            Err(e) => entry.failed(e.kind().name(), &e.to_string()),
        });
    }
}
