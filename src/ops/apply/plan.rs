//! What has to be done so that the volumes are what a file says; or why it cannot be.

use super::file::Wanted;
use crate::base::{Context, Error, Kind, Result};
use crate::catalog::attach_settings::AttachSettings;
use crate::catalog::metadata::LayerRecord;
use crate::catalog::tags::Tags;
use crate::catalog::{Catalog, Metadata, Snapshot, SnapshotId, VolumeId, grow};
use crate::config::DEFAULT_KEY;
use crate::kms::KmsKey;
use crate::ops::also_keys::AlsoKeys;
use crate::ops::create::{self, NewVolume};
use crate::ops::need::Budget;
use crate::ops::{Store, modify, resize};

/// What will be done, in order.
pub struct Plan {
    changes: Vec<Planned>,
    unchanged: Vec<String>,
}

/// One change.
pub struct Planned {
    /// The volume's name.
    pub name: String,
    /// What is done to it.
    pub change: Change,
}

/// What is done to a volume.
pub enum Change {
    /// The volume is made.
    Create(Wanted),
    /// The volume is made larger.
    Grow {
        /// The volume.
        id: VolumeId,
        /// Its size in bytes.
        from: u64,
        /// Its size in bytes when that is done.
        to: u64,
    },
    /// The volume gets these tags, and no others.
    Tag {
        /// The volume.
        id: VolumeId,
        /// The tags.
        tags: Tags,
    },
    /// This is kept with the volume for its attaches.
    Modify {
        /// The volume.
        id: VolumeId,
        /// What is kept.
        settings: AttachSettings,
    },
}

impl Plan {
    /// Compares what is wanted with what there is.
    ///
    /// # Errors
    /// `Usage` for what cannot be changed, and whatever would keep a volume from being made, as far as that
    /// can be known before; nothing has been done then.
    pub fn make(store: &Store, wanted: &[Wanted]) -> Result<Self> {
        let catalog = store.catalog();
        let there = catalog.list()?;
        let mut plan = Plan { changes: Vec::new(), unchanged: Vec::new() };
        for volume in wanted {
            let name = volume.name.as_str();
            let found = there.iter().find(|entry| entry.name() == Some(name)).map(|entry| &entry.metadata);
            let look = Look { store, catalog: &catalog, wanted: volume };
            let changes = match found {
                Some(Ok(metadata)) => look.at_existing(metadata),
                // One that cannot be read has no name.
                Some(Err(_)) | None => look.at_missing().map(|()| vec![Change::Create(volume.clone())]),
            };
            let changes = changes.context(|| format!("the volume \"{name}\""))?;
            if changes.is_empty() {
                plan.unchanged.push(name.to_string());
            }
            plan.changes.extend(changes.into_iter().map(|change| Planned { name: name.to_string(), change }));
        }
        Ok(plan)
    }

    /// The changes, in the order in which they are made.
    pub fn changes(&self) -> &[Planned] {
        &self.changes
    }

    /// The names of volumes that are what they shall be.
    pub fn unchanged(&self) -> &[String] {
        &self.unchanged
    }
}

/// One volume of the file, and what it is compared with.
struct Look<'a> {
    store: &'a Store,
    catalog: &'a Catalog,
    wanted: &'a Wanted,
}

impl Look<'_> {
    fn at_missing(&self) -> Result<()> {
        let (new, snapshot) = (new_volume(self.wanted, Budget::default()), self.made_from()?);
        create::check(self.store, &new, snapshot.as_ref())?;
        // A volume from a snapshot has the snapshot's key unless another is named.
        if !new.unencrypted && (new.key.is_some() || snapshot.is_none()) {
            self.check_key_is_usable()?;
        }
        Ok(())
    }

    fn made_from(&self) -> Result<Option<Snapshot>> {
        self.wanted.snapshot.as_deref().map(|reference| self.snapshot(reference)).transpose()
    }

    fn snapshot(&self, reference: &str) -> Result<Snapshot> {
        self.catalog.load_snapshot(self.catalog.resolve_snapshot(reference)?)
    }

    fn check_key_is_usable(&self) -> Result<()> {
        let key = self.wanted.key.as_deref();
        let name = key.unwrap_or(&self.store.settings().default_key);
        self.store.key(key)?.check_usable(name == DEFAULT_KEY)?;
        let also = self.wanted.also_keys.as_ref().unwrap_or(&self.store.settings().also_keys);
        also.iter().try_for_each(|name| self.store.key(Some(name))?.check_usable(false))
    }

    fn at_existing(&self, there: &Metadata) -> Result<Vec<Change>> {
        self.check_fixed(there)?;
        let (wanted, id) = (self.wanted, there.id());
        let mut changes = Vec::new();
        match wanted.size {
            Some(to) if to != there.size() => {
                grow::check(there, to).context(|| id.to_string())?;
                changes.push(Change::Grow { id, from: there.size(), to });
            }
            _ => {}
        }
        if let Some(tags) = &wanted.tags
            && *tags != self.catalog.tags(id)?
        {
            changes.push(Change::Tag { id, tags: tags.clone() });
        }
        let kept = self.catalog.attach_settings(id)?;
        let settings = wanted.attach_settings(&kept);
        if settings != kept {
            changes.push(Change::Modify { id, settings });
        }
        Ok(changes)
    }

    /// What never changes in a volume's life, or not by this command.
    fn check_fixed(&self, there: &Metadata) -> Result<()> {
        let (wanted, id) = (self.wanted, there.id());
        if wanted.unencrypted && there.is_encrypted() {
            return refuse(format!("{id} is encrypted, which never changes"));
        }
        // Without a key, one from a snapshot is what the snapshot was.
        if !wanted.unencrypted && !there.is_encrypted() && (wanted.key.is_some() || wanted.snapshot.is_none())
        {
            return refuse(format!("{id} is not encrypted, which never changes; say unencrypted = true"));
        }
        if let Some(sector_size) = wanted.sector_size.filter(|it| *it != there.sector_size()) {
            let (now, then) = (there.sector_size().bytes(), sector_size.bytes());
            return refuse(format!("{id} has sectors of {now} bytes; that cannot become {then}"));
        }
        if let Some(reference) = &wanted.snapshot {
            self.check_snapshot(there, reference)?;
        }
        if wanted.own_data_key {
            self.check_own_data_key(there)?;
        }
        if let Some(key) = &wanted.key {
            self.check_key(there, key, "rewrap")?;
        }
        let also = wanted.also_keys.iter().flatten();
        also.into_iter().try_for_each(|key| self.check_key(there, key, "key add"))
    }

    fn check_snapshot(&self, there: &Metadata, reference: &str) -> Result<()> {
        // One that it was made from need not be there any more.
        let wanted = match reference.parse::<SnapshotId>() {
            Ok(id) => id,
            Err(_) => self.catalog.resolve_snapshot(reference)?,
        };
        match there.origin().map(|origin| origin.snapshot) {
            Some(origin) if origin == wanted => Ok(()),
            Some(origin) => refuse(format!("{} was made from {origin}, not from {wanted}", there.id())),
            None => refuse(format!("{} was not made from a snapshot", there.id())),
        }
    }

    /// As far as that can be known: where its snapshot is not there any more, nobody else has that data key
    /// by it.
    fn check_own_data_key(&self, there: &Metadata) -> Result<()> {
        let Some(origin) = there.origin() else { return Ok(()) };
        let Ok(snapshot) = self.catalog.load_snapshot(origin.snapshot) else { return Ok(()) };
        let shared =
            |layer: &LayerRecord| layer.id == snapshot.layout().top().id && layer.key == there.top().key;
        if there.is_encrypted() && !there.layers().iter().any(shared) {
            return Ok(());
        }
        let (id, of) = (there.id(), snapshot.id());
        refuse(format!(
            "{id} has no data key of its own, but that of {of}; \"sealblk volume rekey {id}\" gives it one"
        ))
    }

    /// Whether this KMS key is one of those that wrap the data key of what the volume writes; `verb` is the
    /// command that has it do so.
    fn check_key(&self, there: &Metadata, name: &str, verb: &str) -> Result<()> {
        let named = self.store.key(Some(name))?;
        let key_id = named.describe().map_err(|e| named.advise(e))?.key_id;
        let wanted = KmsKey { provider: named.provider_name().into(), key_id };
        let slots = there.top().key.map_or(&[][..], |n| there.keys()[n].slots());
        if slots.iter().any(|slot| slot.is_by(&wanted)) {
            return Ok(());
        }
        let now: Vec<&str> = slots.iter().map(|slot| slot.wrapped.key_id.as_str()).collect();
        let now = if now.is_empty() { "-".to_owned() } else { now.join(" and ") };
        refuse(format!(
            "{} is under the key {now}, not {}; \"sealblk volume {verb}\" changes that",
            there.id(),
            wanted.key_id
        ))
    }
}

fn refuse<T>(message: String) -> Result<T> {
    Err(Error::new(Kind::Usage, message))
}

impl Planned {
    /// Makes the change, and returns its volume.
    pub(super) fn carry_out(&self, store: &Store, budget: Budget) -> Result<VolumeId> {
        match &self.change {
            Change::Create(wanted) => {
                let catalog = store.catalog();
                let snapshot = wanted.snapshot.as_deref();
                let snapshot = snapshot.map(|name| catalog.load_snapshot(catalog.resolve_snapshot(name)?));
                let made =
                    create::create(store, &new_volume(wanted, budget), snapshot.transpose()?.as_ref())?;
                let settings = wanted.attach_settings(&AttachSettings::default());
                if !settings.is_empty() {
                    keep(store, made.id(), &settings)?;
                }
                Ok(made.id())
            }
            Change::Grow { id, to, .. } => resize::resize(store, *id, *to).map(|_| *id),
            Change::Tag { id, tags } => {
                store.catalog().change_tags(*id, |now| {
                    *now = tags.clone();
                    Ok(())
                })?;
                Ok(*id)
            }
            Change::Modify { id, settings } => keep(store, *id, settings).map(|()| *id),
        }
    }
}

fn keep(store: &Store, id: VolumeId, settings: &AttachSettings) -> Result<()> {
    let change = |kept: &mut AttachSettings| {
        kept.clone_from(settings);
        Ok(())
    };
    modify::modify(store, id, change).map(drop)
}

fn new_volume(wanted: &Wanted, budget: Budget) -> NewVolume {
    NewVolume {
        size: wanted.size,
        sector_size: wanted.sector_size,
        key: wanted.key.clone(),
        also: wanted.also_keys.clone().map_or(AlsoKeys::Usual, AlsoKeys::These),
        unencrypted: wanted.unencrypted,
        own_data_key: wanted.own_data_key,
        name: Some(wanted.name.clone()),
        tags: wanted.tags.clone().unwrap_or_default(),
        preallocate: false,
        device: None,
        budget,
    }
}
