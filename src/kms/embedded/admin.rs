//! The life of keys and aliases: what an operator does to the embedded KMS, with AWS's rules and words.

use crate::kms::embedded::audit::{Call, Due};
use crate::kms::embedded::multi_region::{Relatives, new_multi_region_id};
use crate::kms::embedded::open_log::OpenLog;
use crate::kms::embedded::records::{
    AliasEntry, AliasName, Change, Deletion, External, InKeyStore, KeyEntry, MultiRegion, material_id,
};
use crate::kms::embedded::rotation::first_version;
use crate::kms::embedded::shared_log::Now;
use crate::kms::embedded::{Embedded, due, tags};
use crate::kms::errors::out_of_range;
use crate::kms::key_ref::{
    ALIAS_MAX, ALIAS_PREFIX, DEFAULT_KEY_ALIAS, RESERVED_ALIAS_PREFIX, id_text, is_alias,
};
use crate::kms::{Exception, KeyState, KmsError};
use std::ops::RangeInclusive;
use uuid::Uuid;

/// The waiting window of a deletion, days.
pub const DELETION_DAYS: RangeInclusive<u32> = 7..=30;
/// The longest description, characters.
pub const DESCRIPTION_MAX: usize = 8192;

/// What the KMS tells of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyMetadata {
    /// Its id.
    pub id: Uuid,
    /// Its ARN.
    pub arn: String,
    /// Its state now.
    pub state: KeyState,
    /// The operator's words.
    pub description: String,
    /// When it was made: milliseconds since 1970.
    pub created: i64,
    /// When the waiting window of its deletion ends, if it waits: milliseconds since 1970.
    pub deletion: Option<i64>,
    /// The days of that window.
    pub deletion_days: Option<u32>,
    /// Where its material comes from, as the wire names it: `AWS_KMS`, `EXTERNAL` or `AWS_CLOUDHSM`.
    pub origin: &'static str,
    /// The ids of the custom key store that has it, and of its token, if one has.
    pub key_store: Option<(String, String)>,
    /// What it is among its relatives, if it is a multi-Region key.
    pub multi_region: Option<Relatives>,
    /// When imported material is forgotten, if ever: milliseconds since 1970.
    pub expires: Option<i64>,
    /// KeyMaterialId of the version that encrypts, if there is one.
    pub material: Option<String>,
    /// The aliases that mean it, sorted.
    pub aliases: Vec<String>,
}

/// What the KMS tells of an alias.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AliasMetadata {
    /// The whole name, `alias/` included.
    pub name: String,
    /// Its ARN.
    pub arn: String,
    /// The id of the key it means.
    pub key: Uuid,
    /// When it was made: milliseconds since 1970.
    pub created: i64,
    /// When it was last pointed at a key.
    pub updated: i64,
}

/// What CreateKey is asked for.
#[derive(Clone, Debug, Default)]
pub struct NewKey<'a> {
    /// The operator's words.
    pub description: &'a str,
    /// An alias to make with it, with `alias/`.
    pub alias: Option<&'a str>,
    /// Whether its material is to be imported: origin EXTERNAL.
    pub external: bool,
    /// The id or the name of the custom key store in whose token it is to be made: origin AWS_CLOUDHSM.
    pub key_store: Option<&'a str>,
    /// Whether it can be replicated into other regions.
    pub multi_region: bool,
    /// Its tags.
    pub tags: &'a [(String, String)],
    /// Its policy, if not the one that every key is made with.
    pub policy: Option<&'a str>,
}

impl Embedded {
    /// CreateKey: a new enabled key, and its alias if one is wanted, both or neither. Makes the store
    /// if this is the first key.
    pub fn create_key(&self, description: &str, alias: Option<&str>) -> Result<KeyMetadata, KmsError> {
        self.create(&NewKey { description, alias, ..NewKey::default() })
    }

    /// CreateKey, with everything that can be said of the new key.
    pub fn create(&self, new: &NewKey<'_>) -> Result<KeyMetadata, KmsError> {
        check_description(new.description)?;
        new.alias.map_or(Ok(()), check_alias)?;
        new.policy.map_or(Ok(()), tags::check_policy)?;
        tags::check_tags(new.tags)?;
        if new.multi_region && new.key_store.is_some() {
            let message = "A key in a custom key store is in one region.";
            return Err(KmsError::Unsupported(message.into()));
        }
        self.log.create_if_absent()?;
        let make = |log: &OpenLog, now: &Now, key_store: Option<InKeyStore>| {
            new.alias.map_or(Ok(()), |name| self.check_alias_is_free(log, name))?;
            self.new_key(log, now, new, key_store)
        };
        let made = match new.key_store {
            None => self.log.write(|log, now| make(log, now, None)),
            Some(which) => self.make_in_hsm(which, |log, now, of| make(log, now, Some(of))),
        };
        let id = made.as_ref().map(|id| id_text(*id)).unwrap_or_default();
        let origin = match (new.key_store, new.external) {
            (Some(_), _) => "AWS_CLOUDHSM",
            (None, true) => "EXTERNAL",
            (None, false) => "AWS_KMS",
        };
        let call = Call::new("CreateKey").about(&id).with("description", new.description);
        let call = call.with("origin", origin).with("multiRegion", new.multi_region);
        self.record(call, made)?;
        if let Some(name) = new.alias {
            self.record(Call::new("CreateAlias").about(&id).with("aliasName", name), Ok(()))?;
        }
        self.key(&id)
    }

    /// DescribeKey, for a key argument of any form.
    pub fn key(&self, key: &str) -> Result<KeyMetadata, KmsError> {
        self.current(|log| Ok(self.metadata(log, log.state().key(key, &self.place)?)))
    }

    /// ListKeys, by id. Without a store there are none.
    pub fn keys(&self) -> Result<Vec<KeyMetadata>, KmsError> {
        if !self.log.exists()? {
            return Ok(Vec::new());
        }
        self.current(|log| Ok(log.state().keys().map(|key| self.metadata(log, key)).collect()))
    }

    /// EnableKey.
    pub fn enable(&self, key: &str) -> Result<KeyMetadata, KmsError> {
        let enabled = self.change_key(key, |entry, _| {
            entry.check_ready(&self.place)?;
            Ok(KeyEntry { enabled: true, ..entry.clone() })
        });
        self.record(Call::new("EnableKey").on(key), enabled)
    }

    /// DisableKey: no Encrypt or Decrypt that begins after this has answered succeeds.
    pub fn disable(&self, key: &str) -> Result<KeyMetadata, KmsError> {
        let disabled = self.change_key(key, |entry, _| {
            entry.check_ready(&self.place)?;
            Ok(KeyEntry { enabled: false, ..entry.clone() })
        });
        self.record(Call::new("DisableKey").on(key), disabled)
    }

    /// UpdateKeyDescription.
    pub fn update_description(&self, key: &str, description: &str) -> Result<(), KmsError> {
        check_description(description)?;
        let change = |entry: &KeyEntry, _: &Now| {
            entry.check_alive(&self.place)?;
            Ok(KeyEntry { description: description.to_owned(), ..entry.clone() })
        };
        let call = Call::new("UpdateKeyDescription").on(key).with("description", description);
        self.record(call, self.change_key(key, change).map(drop))
    }

    /// ScheduleKeyDeletion, after `days` of [`DELETION_DAYS`]. Of a primary key that has replicas the days
    /// begin when the last of these is deleted.
    pub fn schedule_deletion(&self, key: &str, days: u32) -> Result<KeyMetadata, KmsError> {
        if !DELETION_DAYS.contains(&days) {
            return Err(out_of_range(days, "pendingWindowInDays", &DELETION_DAYS));
        }
        let dying = self.change_key(key, |entry, now| {
            entry.check_alive(&self.place)?;
            self.check_not_updating(entry)?;
            if let Some(waiting) = self.until_replicas_are_gone(entry, days) {
                return Ok(waiting);
            }
            let deletion = Some(Deletion::ask(days, &now.moment, now.time));
            Ok(KeyEntry { enabled: false, deletion, ..entry.clone() })
        });
        self.record(Call::new("ScheduleKeyDeletion").on(key).with("pendingWindowInDays", days), dying)
    }

    /// CancelKeyDeletion: the key is Disabled afterwards.
    pub fn cancel_deletion(&self, key: &str) -> Result<KeyMetadata, KmsError> {
        let kept = self.change_key(key, |entry, _| match entry.check_alive(&self.place) {
            Err(_) => Ok(KeyEntry { deletion: None, ..entry.clone() }.not_waiting_for_replicas()),
            Ok(()) => {
                let arn = self.place.key_arn(entry.id);
                Err(KmsError::InvalidState(format!("{arn} is not pending deletion.")))
            }
        });
        self.record(Call::new("CancelKeyDeletion").on(key), kept)
    }

    /// CreateAlias.
    pub fn create_alias(&self, name: &str, key: &str) -> Result<(), KmsError> {
        check_alias(name)?;
        let made = self.log.write(|log, now| {
            let entry = log.state().key(key, &self.place)?;
            entry.check_alive(&self.place)?;
            self.check_alias_is_free(log, name)?;
            Ok((vec![new_alias(name, entry.id, now)], ()))
        });
        self.record(
            Call::new("CreateAlias").about(key).with("aliasName", name).with("targetKeyId", key),
            made,
        )
    }

    /// UpdateAlias: away from a dying key, but not towards one.
    pub fn update_alias(&self, name: &str, key: &str) -> Result<(), KmsError> {
        check_alias(name)?;
        let moved = self.log.write(|log, now| {
            let alias = log.state().alias(name, &self.place)?;
            let entry = log.state().key(key, &self.place)?;
            entry.check_alive(&self.place)?;
            let alias = AliasEntry { key: entry.id, updated: now.time, ..alias.clone() };
            Ok((vec![Change::Alias(alias)], ()))
        });
        self.record(
            Call::new("UpdateAlias").about(key).with("aliasName", name).with("targetKeyId", key),
            moved,
        )
    }

    /// DeleteAlias: the key itself stays as it is.
    pub fn delete_alias(&self, name: &str) -> Result<(), KmsError> {
        check_alias(name)?;
        let deleted = self.log.write(|log, _| {
            let name = log.state().alias(name, &self.place)?.name.clone();
            Ok((vec![Change::AliasDeleted(AliasName { name })], ()))
        });
        self.record(Call::new("DeleteAlias").with("aliasName", name), deleted)
    }

    /// ListAliases, by name. Without a store there are none.
    pub fn aliases(&self) -> Result<Vec<AliasMetadata>, KmsError> {
        if !self.log.exists()? {
            return Ok(Vec::new());
        }
        let metadata = |alias: &AliasEntry| AliasMetadata {
            name: alias.name.clone(),
            arn: self.place.alias_arn(&alias.name),
            key: alias.key,
            created: alias.created,
            updated: alias.updated,
        };
        self.log.read(|log| Ok(log.state().aliases().map(metadata).collect()))
    }

    /// Does what the passing of time asks for: deletes the keys whose waiting window is over, material
    /// included, as far as the clocks can be believed, and rotates what is due.
    ///
    /// Called whenever the KMS is opened, and when an operation sees that something is due.
    pub fn purge(&self) -> Result<(), KmsError> {
        if !self.log.exists()? {
            return Ok(());
        }
        let now = self.log.now();
        let is_due = |log: &OpenLog| log.wants_rewriting() || due::is_due(log, &now, &self.place.region);
        let due = self.log.read(|log| Ok(is_due(log)))?;
        if !due {
            return Ok(());
        }
        let done: Vec<Due> = self.log.write(|log, now| {
            let changes = due::changes(log, &now.moment, &self.place.region)?;
            for change in &changes {
                if let Change::KeyDeleted(key) = change {
                    log::warn!("deleting KMS key {}: its waiting window is over", self.place.key_arn(key.id));
                }
            }
            let done = changes.iter().filter_map(|change| Due::of(change, log.state())).collect();
            Ok((changes, done))
        })?;
        self.record_due(&done);
        self.destroy_what_was_deleted();
        Ok(())
    }

    /// Makes the default key and its alias if nobody has, one for all who try at once.
    pub(super) fn ensure_default_key(&self) -> Result<(), KmsError> {
        self.log.create_if_absent()?;
        if self.log.read(|log| Ok(log.state().has_alias(DEFAULT_KEY_ALIAS)))? {
            return Ok(());
        }
        let made = self.log.write(|log, now| {
            if log.state().has_alias(DEFAULT_KEY_ALIAS) {
                return Ok((Vec::new(), None));
            }
            let description = "Default key that protects volumes when no other key is named";
            let new = NewKey { description, alias: Some(DEFAULT_KEY_ALIAS), ..NewKey::default() };
            let (changes, id) = self.new_key(log, now, &new, None)?;
            Ok((changes, Some(id)))
        })?;
        self.record_due(&made.map(Due::default_key).into_iter().collect::<Vec<_>>());
        Ok(())
    }

    pub(super) fn change_key(
        &self,
        key: &str,
        f: impl FnOnce(&KeyEntry, &Now) -> Result<KeyEntry, KmsError>,
    ) -> Result<KeyMetadata, KmsError> {
        self.log.write(|log, now| {
            let before = log.state().key(key, &self.place)?;
            let after = f(before, now)?;
            let metadata = self.metadata(log, &after);
            let changes = if after == *before { Vec::new() } else { vec![Change::Key(after)] };
            Ok((changes, metadata))
        })
    }

    pub(super) fn metadata(&self, log: &OpenLog, key: &KeyEntry) -> KeyMetadata {
        KeyMetadata {
            id: key.id,
            arn: self.place.key_arn(key.id),
            state: log.state().state_of(key),
            description: key.description.clone(),
            created: key.created,
            deletion: key.deletion.as_ref().map(|d| d.at),
            deletion_days: key.deletion_days(),
            origin: key.origin(),
            key_store: key.key_store.as_ref().map(|of| {
                let cluster = log.state().key_store(&of.id).map(|store| store.cluster.clone());
                (of.id.clone(), cluster.unwrap_or_default())
            }),
            multi_region: key.multi_region.as_ref().map(|it| self.relatives(key.id, it)),
            expires: key.external.as_ref().and_then(|external| external.expires),
            material: key
                .current()
                .map(|version| version.id)
                .or(key.key_store.as_ref().map(|of| of.version))
                .map(|version| material_id(key.id, version)),
            aliases: log.state().aliases_of(key.id).map(|a| a.name.clone()).collect(),
        }
    }

    fn check_alias_is_free(&self, log: &OpenLog, name: &str) -> Result<(), KmsError> {
        if !log.state().has_alias(name) {
            return Ok(());
        }
        let arn = self.place.alias_arn(name);
        Err(KmsError::AlreadyExists(format!("An alias with the name {arn} already exists")))
    }

    /// A new key, and an alias for it.
    fn new_key(
        &self,
        log: &OpenLog,
        now: &Now,
        new: &NewKey<'_>,
        key_store: Option<InKeyStore>,
    ) -> Result<(Vec<Change>, Uuid), KmsError> {
        let id = if new.multi_region { new_multi_region_id()? } else { Uuid::new_v4() };
        let external = External { version: Uuid::new_v4(), check: None, fingerprint: None, expires: None };
        let is_elsewhere = new.external || key_store.is_some();
        let versions = if is_elsewhere { Vec::new() } else { vec![first_version(log, id, now.time)?] };
        let mut changes = vec![Change::Key(KeyEntry {
            id,
            created: now.time,
            description: new.description.to_owned(),
            enabled: true,
            deletion: None,
            rotation: None,
            external: new.external.then_some(external),
            tags: new.tags.iter().cloned().collect(),
            policy: new.policy.map(str::to_owned),
            key_store,
            multi_region: new.multi_region.then(|| MultiRegion::primary_in(&self.place.region)),
            versions,
        })];
        changes.extend(new.alias.map(|name| new_alias(name, id, now)));
        Ok((changes, id))
    }
}

fn new_alias(name: &str, key: Uuid, now: &Now) -> Change {
    Change::Alias(AliasEntry { name: name.to_owned(), key, created: now.time, updated: now.time })
}

pub(super) fn check_description(description: &str) -> Result<(), KmsError> {
    if description.chars().count() <= DESCRIPTION_MAX {
        return Ok(());
    }
    Err(KmsError::Validation(format!(
        "1 validation error detected: Value at 'description' failed to satisfy constraint: Member must have \
         length less than or equal to {DESCRIPTION_MAX}"
    )))
}

/// Whether users may make, move or delete an alias of this name.
fn check_alias(name: &str) -> Result<(), KmsError> {
    let constraint = |what: &str| {
        Err(KmsError::Validation(format!(
            "1 validation error detected: Value '{name}' at 'aliasName' failed to satisfy constraint: Member \
             must {what}"
        )))
    };
    if !name.starts_with(ALIAS_PREFIX) {
        return Err(KmsError::Validation(
            "Alias must start with the prefix \"alias/\". Please see \
             https://docs.aws.amazon.com/kms/latest/developerguide/kms-alias.html"
                .into(),
        ));
    }
    if name.len() > ALIAS_MAX {
        return constraint(&format!("have length less than or equal to {ALIAS_MAX}"));
    }
    if !is_alias(name) {
        return constraint("satisfy regular expression pattern: ^alias/[a-zA-Z0-9:/_-]+$");
    }
    if name.starts_with(RESERVED_ALIAS_PREFIX) {
        return Err(KmsError::Other(
            Exception::InvalidAliasName,
            format!(
                "{name} is reserved: aliases that begin with \"{RESERVED_ALIAS_PREFIX}\" are the KMS's own"
            ),
        ));
    }
    Ok(())
}
