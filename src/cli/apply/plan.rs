//! What has to be done so that the volumes are what a file says; or why it cannot be.
#![forbid(unsafe_code)]

use crate::base::{Context, Error, Kind, Result};
use crate::catalog::metadata::Geometry;
use crate::catalog::tags::Tags;
use crate::catalog::{Catalog, Metadata, Snapshot, SnapshotId, VolumeId};
use crate::cli::Env;
use crate::cli::apply::file::Wanted;
use crate::cli::apply::shown;
use crate::cli::provider::NamedKey;
use crate::cli::volume::create::check_may_be_unencrypted;
use crate::config::{DEFAULT_KEY, Settings};
use crate::kms::KmsError;
use serde_json::{Value, json};

/// What will be done, in order.
pub struct Plan {
    changes: Vec<Planned>,
    unchanged: Vec<String>,
}

/// One change.
pub struct Planned {
    /// The volume's name.
    pub name: String,
    pub change: Change,
}

/// What is done to a volume.
pub enum Change {
    Create(Wanted),
    Grow { id: VolumeId, from: u64, to: u64 },
    Tag { id: VolumeId, tags: Tags },
}

impl Plan {
    /// Compares what is wanted with what there is.
    ///
    /// # Errors
    /// `Usage` for what cannot be changed, and whatever would keep a volume from being made, as far as that can be known
    /// before; nothing has been done then.
    pub fn make(env: &Env, settings: &Settings, wanted: &[Wanted]) -> Result<Self> {
        let catalog = env.catalog();
        let there = catalog.list()?;
        let mut plan = Plan { changes: Vec::new(), unchanged: Vec::new() };
        for volume in wanted {
            let name = volume.name.as_str();
            let found = there.iter().find(|entry| entry.name() == Some(name)).map(|entry| &entry.metadata);
            let look = Look { env, settings, catalog: &catalog, wanted: volume };
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
    env: &'a Env,
    settings: &'a Settings,
    catalog: &'a Catalog,
    wanted: &'a Wanted,
}

impl Look<'_> {
    fn at_missing(&self) -> Result<()> {
        let wanted = self.wanted;
        if wanted.unencrypted {
            check_may_be_unencrypted(self.env, self.settings)?;
        }
        let snapshot = wanted.snapshot.as_deref().map(|reference| self.snapshot(reference)).transpose()?;
        let sector_size = wanted.sector_size.or(snapshot.as_ref().map(|s| s.geometry().sector_size()));
        if let Some(size) = wanted.size {
            Geometry::new(size, sector_size.unwrap_or_default())?;
        }
        if let Some(snapshot) = &snapshot {
            check_goes_with(wanted, snapshot)?;
        }
        // A volume from a snapshot has the snapshot's key unless another is named.
        if !wanted.unencrypted && (wanted.key.is_some() || snapshot.is_none()) {
            self.check_key_is_usable()?;
        }
        Ok(())
    }

    fn snapshot(&self, reference: &str) -> Result<Snapshot> {
        self.catalog.load_snapshot(self.catalog.resolve_snapshot(reference)?)
    }

    fn check_key_is_usable(&self) -> Result<()> {
        let key = self.wanted.key.as_deref();
        let name = key.unwrap_or(&self.settings.default_key);
        let named = NamedKey::open(self.env, self.settings, key)?;
        match named.describe() {
            Ok(key) => match key.state.refusal(&key.key_id) {
                Some(refusal) => Err(refusal.with_advice(name)),
                None => Ok(()),
            },
            // It is made at its first use.
            Err(KmsError::NotFound(_)) if name == DEFAULT_KEY => Ok(()),
            Err(e) => Err(e.with_advice(name)),
        }
    }

    fn at_existing(&self, there: &Metadata) -> Result<Vec<Change>> {
        self.check_fixed(there)?;
        let (wanted, id) = (self.wanted, there.id());
        let mut changes = Vec::new();
        match wanted.size {
            Some(size) if size < there.size() => {
                return refuse(format!("{id} has {} and cannot be made smaller", shown(there.size())));
            }
            Some(to) if to > there.size() => {
                Geometry::new(to, there.sector_size())?;
                changes.push(Change::Grow { id, from: there.size(), to });
            }
            _ => {}
        }
        if let Some(tags) = &wanted.tags
            && *tags != self.catalog.tags(id)?
        {
            changes.push(Change::Tag { id, tags: tags.clone() });
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
        match &wanted.key {
            Some(key) => self.check_key(there, key),
            None => Ok(()),
        }
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

    fn check_key(&self, there: &Metadata, name: &str) -> Result<()> {
        let named = NamedKey::open(self.env, self.settings, Some(name))?;
        let key_id = named.describe().map_err(|e| e.with_advice(name))?.key_id;
        let top = there.top().key.map(|n| &there.keys()[n]);
        match top.map(|key| (key.provider.as_str(), &key.wrapped.key_id)) {
            Some(now) if now == (named.provider_name(), &key_id) => Ok(()),
            now => refuse(format!(
                "{} is under the key {}, not {key_id}; \"sealblk volume rewrap\" changes that",
                there.id(),
                now.map_or("-", |(_, id)| id)
            )),
        }
    }
}

fn check_goes_with(wanted: &Wanted, snapshot: &Snapshot) -> Result<()> {
    let (id, geometry) = (snapshot.id(), snapshot.geometry());
    if wanted.unencrypted && snapshot.is_encrypted() {
        return refuse(format!("{id} is encrypted, and so is every volume that is made from it"));
    }
    if wanted.size.is_some_and(|size| size < geometry.size()) {
        return refuse(format!(
            "{id} has {}; a volume made from it cannot be smaller",
            shown(geometry.size())
        ));
    }
    match wanted.sector_size.is_some_and(|it| it != geometry.sector_size()) {
        true => refuse(format!("{id} has sectors of {} bytes", geometry.sector_size().bytes())),
        false => Ok(()),
    }
}

fn refuse<T>(message: String) -> Result<T> {
    Err(Error::new(Kind::Usage, message))
}

impl Planned {
    /// The change as a row of a table.
    pub fn row(&self) -> Vec<String> {
        let (sign, what) = match &self.change {
            Change::Create(volume) => ("+", describe(volume)),
            Change::Grow { from, to, .. } => ("~", format!("grow from {} to {}", shown(*from), shown(*to))),
            Change::Tag { tags, .. } if tags.is_empty() => ("~", "take all tags away".into()),
            Change::Tag { tags, .. } => {
                let tags: Vec<String> = tags.iter().map(|(key, value)| format!("{key}={value}")).collect();
                ("~", format!("tag {}", tags.join(" ")))
            }
        };
        vec![sign.into(), self.name.clone(), what]
    }

    /// The change in JSON.
    pub fn json(&self) -> Value {
        match &self.change {
            Change::Create(volume) => json!({
                "name": self.name, "action": "create", "size": volume.size, "key": volume.key,
                "sector_size": volume.sector_size, "snapshot": volume.snapshot,
                "encrypted": !volume.unencrypted, "tags": volume.tags,
            }),
            Change::Grow { id, from, to } => {
                json!({"name": self.name, "action": "grow", "id": id, "from": from, "to": to})
            }
            Change::Tag { id, tags } => {
                json!({"name": self.name, "action": "tag", "id": id, "tags": tags})
            }
        }
    }
}

fn describe(volume: &Wanted) -> String {
    let mut text = "create".to_string();
    if let Some(size) = volume.size {
        text += &format!(", {}", shown(size));
    }
    if let Some(snapshot) = &volume.snapshot {
        text += &format!(", from {snapshot}");
    }
    match (&volume.key, volume.unencrypted) {
        (Some(key), _) => text += &format!(", under {key}"),
        (None, true) => text += ", not encrypted",
        (None, false) => {}
    }
    text
}
