//! Making a volume, empty or from a snapshot; and the rules of that, which other verbs ask about beforehand.

use super::Store;
use super::also_keys::{Also, AlsoKeys};
use super::clone::{self, Keys, TopKey};
use super::device::Candidate;
use super::keys::{NamedKey, WrappingKey};
use super::make::{self, Wanted};
use super::need::Budget;
use crate::backing::device::BLOCK;
use crate::base::{Error, Kind, Result};
use crate::catalog::layout::MAX_LAYERS;
use crate::catalog::metadata::{Geometry, KeyOwner, VolumeName};
use crate::catalog::tags::Tags;
use crate::catalog::{Metadata, Snapshot};
use crate::config::{CloneDataKey, shown_file};
use crate::crypt::SectorSize;
use crate::virtio::SECTOR_SIZE;
use std::sync::Arc;

/// A volume that somebody wants made.
#[derive(Clone, Debug, Default)]
pub struct NewVolume {
    /// Its size in bytes; without one, what its device has room for, or the snapshot's.
    pub size: Option<u64>,
    /// Its sector size; without one, the snapshot's, its device's, or 512 bytes.
    pub sector_size: Option<SectorSize>,
    /// The KMS key, by id, ARN or alias; without one, the snapshot's, or the default key of the settings.
    pub key: Option<String>,
    /// The KMS keys that wrap its data key besides.
    pub also: AlsoKeys,
    /// Whether it is not encrypted.
    pub unencrypted: bool,
    /// Whether, made from a snapshot, it has a data key of its own; without, the settings say.
    pub own_data_key: bool,
    /// Its name; no other volume may have it.
    pub name: Option<VolumeName>,
    /// Its tags.
    pub tags: Tags,
    /// Whether the file system sets the whole size aside now.
    pub preallocate: bool,
    /// The block device that it lies on, or its top layer; without, that is a file of the store.
    pub device: Option<Arc<Candidate>>,
    /// What may be used for what is going to be copied up.
    pub budget: Budget,
}

/// Makes a volume, from `snapshot` if there is one, and reports a `createVolume` event.
///
/// # Errors
/// `Usage` for what breaks a rule ([`check`]); `NoSpace` if the file system has too little for what is going
/// to be copied up; `Busy` if the name is taken; those of the KMS and of the file
/// system. Nothing of the volume is left then.
pub fn create(store: &Store, new: &NewVolume, snapshot: Option<&Snapshot>) -> Result<Metadata> {
    let geometry = check(store, new, snapshot)?;
    let wanted = Wanted {
        geometry,
        name: new.name.clone(),
        tags: new.tags.clone(),
        preallocate: new.preallocate,
        device: new.device.clone(),
    };
    let key = key(store, new, snapshot)?;
    let key = key.as_ref().map(NamedKey::wrapping);
    let (catalog, events) = (store.catalog(), store.events());
    let Some(snapshot) = snapshot else {
        return match wanted.device.is_some() || store.root().pool().is_some() {
            false => make::create(&catalog, &events, &wanted, key),
            true => on_device(store, &wanted, key),
        };
    };
    let top = match (key, has_own_key(store, new, Some(snapshot))) {
        (None, _) => TopKey::Snapshots,
        (Some(key), true) => TopKey::Under { key, own: wants_own_data_key(store, new) },
        (Some(key), false) => TopKey::Own(key),
    };
    let open_provider = |name: &str| store.provider(name);
    let unwrap = |owner, key: &_| store.unwrap(owner, key);
    let also = Also::named(store, &new.also)?;
    let keys = Keys { open_provider: &open_provider, unwrap: &unwrap, also: &also };
    clone::create(&catalog, &events, &wanted, snapshot, (top, new.budget), keys)
}

/// Makes a volume on a device. It has its seal from the beginning: the first attach of one without would have
/// to look whether there is nothing in it, and to read all of the device for that. The device can be taken to
/// another host at once, besides.
fn on_device(store: &Store, wanted: &Wanted, key: Option<WrappingKey<'_>>) -> Result<Metadata> {
    make::create_with(&store.catalog(), &store.events(), wanted, |id| {
        let fresh = key.map(|with| with.generate(id)).transpose()?;
        let mut metadata = Metadata::new(id, wanted.name.clone(), wanted.geometry, fresh);
        let unwrap = |owner, key: &_| store.unwrap(owner, key);
        let deks = metadata.keys().iter().map(|record| unwrap(KeyOwner::Volume(id), record));
        let deks = deks.collect::<Result<Vec<_>, _>>()?;
        metadata.prove(&deks, || Ok(false))?;
        Ok(metadata)
    })
}

/// Whether such a volume can be made, as far as that can be known before; its size and sector size.
///
/// # Errors
/// `Usage`, naming the rule that it breaks.
pub fn check(store: &Store, new: &NewVolume, snapshot: Option<&Snapshot>) -> Result<Geometry> {
    if new.unencrypted {
        check_may_be_unencrypted(store)?;
    }
    let is_encrypted = has_own_key(store, new, snapshot) || snapshot.is_some_and(Snapshot::is_encrypted);
    if let Some(snapshot) = snapshot {
        let what = format!("without --key, a volume made from {}", snapshot.id());
        store.settings().check_encrypted(what, is_encrypted)?;
    }
    if new.own_data_key && !snapshot.is_some_and(|it| it.is_encrypted() || is_encrypted) {
        return refuse(match snapshot {
            None => {
                "a volume that is made from no snapshot has a data key of its own in any case".to_string()
            }
            Some(it) => format!("{} is not encrypted, and so is what is made from it without --key", it.id()),
        });
    }
    if matches!(&new.also, AlsoKeys::These(keys) if !keys.is_empty()) && !is_encrypted {
        return refuse("it is not encrypted, so no KMS key wraps a data key of it".into());
    }
    if let Some(pooled) = store.root().pool() {
        check_for_pool(&pooled.shown, new)?;
    }
    if let Some(device) = &new.device {
        let least = snapshot.map_or(0, |it| it.geometry().size());
        device.check_size(new.size.unwrap_or(device.room().max(least)))?;
        // Making the device zeros may take hours.
        make::check_name_is_free(&store.catalog(), new.name.as_ref(), None)?;
    }
    let Some(snapshot) = snapshot else {
        let device = new.device.as_ref();
        let size = new.size.or(device.map(|device| device.room()));
        let own = device.filter(|device| device.logical_block() > SECTOR_SIZE).map(|_| SectorSize::B4096);
        let sector_size = new.sector_size.or(own).unwrap_or_default();
        return Geometry::new(size.unwrap_or(0), sector_size);
    };
    let (id, of) = (snapshot.id(), snapshot.geometry());
    if new.unencrypted && snapshot.is_encrypted() {
        return refuse(format!(
            "{id} is encrypted, and so is every volume that is made from it; leave out --unencrypted"
        ));
    }
    if new.size.is_some_and(|size| size < of.size()) {
        return refuse(format!("{id} is of {} bytes; a volume made from it cannot be smaller", of.size()));
    }
    if new.sector_size.is_some_and(|it| it != of.sector_size()) {
        let bytes = of.sector_size().bytes();
        return refuse(format!("{id} has sectors of {bytes} bytes, and so has a volume made from it"));
    }
    if snapshot.layers().len() >= MAX_LAYERS {
        return refuse(format!(
            "{id} has {MAX_LAYERS} layers, the most that a volume can have; copy or flatten it first"
        ));
    }
    let device = new.device.as_ref().map(|device| device.room());
    Geometry::new(new.size.or(device).unwrap_or(of.size()), of.sector_size())
}

/// Whether it can lie in a pool, with its records.
fn check_for_pool(shown: &str, new: &NewVolume) -> Result<()> {
    let not_yet = |what: &str| {
        Err(Error::new(Kind::Unsupported, format!("{what} is not there yet for a store in a pool ({shown})")))
    };
    if new.device.is_some() {
        return not_yet("a volume on a device, an export or an image of one's own choice");
    }
    if new.preallocate {
        return not_yet("setting space aside");
    }
    match new.size.is_some_and(|size| !size.is_multiple_of(BLOCK)) {
        true => refuse(format!("a volume in an image consists of whole blocks of {BLOCK} bytes")),
        false => Ok(()),
    }
}

/// # Errors
/// `Usage` if the settings say that every new volume is encrypted; `Refused` if they let no other be opened.
pub fn check_may_be_unencrypted(store: &Store) -> Result<()> {
    store.settings().check_encrypted("such a volume", false)?;
    if !store.settings().encrypt_by_default {
        return Ok(());
    }
    refuse(format!(
        "{} says encrypt-by-default: no unencrypted volume can be made; leave out --unencrypted",
        shown_file().display()
    ))
}

/// Whether a volume that is made so is encrypted under a KMS key of its own, and not as its snapshot is.
pub fn has_own_key(store: &Store, new: &NewVolume, snapshot: Option<&Snapshot>) -> bool {
    match snapshot {
        _ if new.unencrypted => false,
        None => true,
        // Without a wish, an encrypted snapshot's key; an unencrypted one's only where the
        // settings let that be.
        Some(snapshot) => {
            new.key.is_some() || (store.settings().encrypt_by_default && !snapshot.is_encrypted())
        }
    }
}

/// Whether a volume that is made from a snapshot is not to have the snapshot's data key.
fn wants_own_data_key(store: &Store, new: &NewVolume) -> bool {
    new.own_data_key || store.settings().clone_data_key == CloneDataKey::Own
}

/// The KMS key that a new data key is made under; none where there is no new data key.
fn key(store: &Store, new: &NewVolume, snapshot: Option<&Snapshot>) -> Result<Option<NamedKey>> {
    if has_own_key(store, new, snapshot) {
        return store.keys(new.key.as_deref(), &new.also).map(Some);
    }
    let top = snapshot.filter(|_| wants_own_data_key(store, new)).and_then(Snapshot::top_key);
    top.map(|top| store.keys_as_of(top, &new.also)).transpose()
}

fn refuse<T>(message: String) -> Result<T> {
    Err(Error::new(Kind::Usage, message))
}
