//! What a store holds, as the log's records add up: keys, aliases and the time they were written at.
//!
//! Pure. It answers lookups and state questions in AWS's words and does not know how changes become durable.

use crate::kms::embedded::grant_records::GrantEntry;
use crate::kms::embedded::records::{
    AliasEntry, Change, Connection, InKeyStore, KeyEntry, KeyStoreEntry, Orphan, PrincipalEntry, Transaction,
    VersionEntry,
};
use crate::kms::key_ref::{KeyName, Locality};
use crate::kms::{KeyState, KmsError};
use std::collections::{BTreeMap, BTreeSet};
use uuid::Uuid;

/// The sum of a log's records.
#[derive(Debug, Default)]
pub struct State {
    keys: BTreeMap<Uuid, KeyEntry>,
    aliases: BTreeMap<String, AliasEntry>,
    grants: BTreeMap<Uuid, BTreeMap<String, GrantEntry>>,
    principals: BTreeMap<String, PrincipalEntry>,
    key_stores: BTreeMap<String, KeyStoreEntry>,
    orphans: BTreeSet<Orphan>,
    time: i64,
    holds_deleted: bool,
}

impl State {
    /// Adds one record.
    pub fn apply(&mut self, transaction: Transaction) {
        self.time = self.time.max(transaction.time);
        for change in transaction.changes {
            match change {
                Change::Key(key) => {
                    let versions = key.versions.len();
                    let before = self.keys.insert(key.id, key);
                    self.holds_deleted |= before.is_some_and(|key| key.versions.len() > versions);
                }
                Change::KeyDeleted(key) => {
                    let removed = self.keys.remove(&key.id);
                    self.orphans.extend(removed.and_then(|key| key.key_store).map(InKeyStore::as_orphan));
                    self.grants.remove(&key.id);
                    self.holds_deleted = true;
                }
                Change::Alias(alias) => drop(self.aliases.insert(alias.name.clone(), alias)),
                Change::AliasDeleted(alias) => drop(self.aliases.remove(&alias.name)),
                Change::Grant(grant) => {
                    self.grants.entry(grant.key).or_default().insert(grant.id.clone(), grant);
                }
                Change::GrantDeleted(grant) => {
                    self.grants.get_mut(&grant.key).and_then(|grants| grants.remove(&grant.id));
                }
                Change::KeyStore(store) => drop(self.key_stores.insert(store.id.clone(), store)),
                Change::KeyStoreDeleted(store) => {
                    self.key_stores.remove(&store.id);
                    self.orphans.retain(|orphan| orphan.store != store.id);
                }
                Change::Orphan(orphan) => drop(self.orphans.insert(orphan)),
                Change::OrphanGone(orphan) => drop(self.orphans.remove(&orphan)),
                Change::Principal(principal) => {
                    self.principals.insert(principal.name.clone(), principal);
                }
                Change::PrincipalDeleted(principal) => drop(self.principals.remove(&principal.name)),
            }
        }
    }

    /// The changes that lead from nothing to here.
    pub fn live(&self) -> Vec<Change> {
        let keys = self.keys.values().cloned().map(Change::Key);
        let stores = self.key_stores.values().cloned().map(Change::KeyStore);
        let orphans = self.orphans.iter().cloned().map(Change::Orphan);
        keys.chain(stores)
            .chain(orphans)
            .chain(self.aliases.values().cloned().map(Change::Alias))
            .chain(self.principals.values().cloned().map(Change::Principal))
            .chain(self.grants().cloned().map(Change::Grant))
            .collect()
    }

    /// The number of things that live.
    pub fn len(&self) -> usize {
        let grants: usize = self.grants.values().map(BTreeMap::len).sum();
        let stores = self.key_stores.len() + self.orphans.len();
        self.keys.len() + self.aliases.len() + self.principals.len() + stores + grants
    }

    /// The highest time of any record: milliseconds since 1970.
    pub fn time(&self) -> i64 {
        self.time
    }

    /// Whether the log still holds the material of a key that was deleted.
    pub fn holds_deleted(&self) -> bool {
        self.holds_deleted
    }

    /// All keys, by id.
    pub fn keys(&self) -> impl Iterator<Item = &KeyEntry> {
        self.keys.values()
    }

    /// All aliases, by name.
    pub fn aliases(&self) -> impl Iterator<Item = &AliasEntry> {
        self.aliases.values()
    }

    /// All grants, by key and id.
    pub fn grants(&self) -> impl Iterator<Item = &GrantEntry> {
        self.grants.values().flat_map(BTreeMap::values)
    }

    /// The grants of `key`, by id.
    pub fn grants_of(&self, key: Uuid) -> impl ExactSizeIterator<Item = &GrantEntry> {
        static NONE: BTreeMap<String, GrantEntry> = BTreeMap::new();
        self.grants.get(&key).unwrap_or(&NONE).values()
    }

    /// All principals, by name.
    pub fn principals(&self) -> impl Iterator<Item = &PrincipalEntry> {
        self.principals.values()
    }

    /// The principal of this name.
    pub fn principal(&self, name: &str) -> Option<&PrincipalEntry> {
        self.principals.get(name)
    }

    /// All custom key stores, by id.
    pub fn key_stores(&self) -> impl Iterator<Item = &KeyStoreEntry> {
        self.key_stores.values()
    }

    /// The custom key store of this id.
    pub fn key_store(&self, id: &str) -> Option<&KeyStoreEntry> {
        self.key_stores.get(id)
    }

    /// The keys that the token of this custom key store may have for nothing.
    pub fn orphans_of(&self, store: &str) -> impl Iterator<Item = &Orphan> {
        self.orphans.iter().filter(move |orphan| orphan.store == store)
    }

    /// The state that AWS would name: a key in a custom key store that is not connected is unavailable,
    /// unless it waits for its deletion.
    pub fn state_of(&self, key: &KeyEntry) -> KeyState {
        let is_connected = |of: &InKeyStore| {
            self.key_store(&of.id).is_some_and(|store| store.connection == Connection::Connected)
        };
        match key.state() {
            state @ (KeyState::PendingDeletion | KeyState::PendingReplicaDeletion) => state,
            _ if key.key_store.as_ref().is_some_and(|of| !is_connected(of)) => KeyState::Unavailable,
            state => state,
        }
    }

    /// The names that mean `key`.
    pub fn aliases_of(&self, key: Uuid) -> impl Iterator<Item = &AliasEntry> {
        self.aliases().filter(move |alias| alias.key == key)
    }

    /// The alias `name`; NotFound if there is none.
    pub fn alias(&self, name: &str, place: &Locality) -> Result<&AliasEntry, KmsError> {
        let not_found = || KmsError::NotFound(format!("Alias {} is not found.", place.alias_arn(name)));
        self.aliases.get(name).ok_or_else(not_found)
    }

    /// Whether `name` is taken.
    pub fn has_alias(&self, name: &str) -> bool {
        self.aliases.contains_key(name)
    }

    /// The key with this id, if it lives.
    pub fn key_by_id(&self, id: Uuid) -> Option<&KeyEntry> {
        self.keys.get(&id)
    }

    /// The key that a key argument means; NotFound if there is none.
    pub fn key(&self, text: &str, place: &Locality) -> Result<&KeyEntry, KmsError> {
        let id = match place.parse(text)? {
            KeyName::Id(id) => id,
            KeyName::Alias(name) => self.alias(&name, place)?.key,
        };
        let not_found = || KmsError::NotFound(format!("Key '{}' does not exist", place.key_arn(id)));
        self.key_by_id(id).ok_or_else(not_found)
    }
}

impl InKeyStore {
    /// The key in the HSM, as one that is not needed any more.
    pub fn as_orphan(self) -> Orphan {
        Orphan { store: self.id, version: self.version }
    }
}

impl KeyEntry {
    /// Where its material comes from, as the wire names it.
    pub fn origin(&self) -> &'static str {
        match (&self.external, &self.key_store) {
            (_, Some(_)) => "AWS_CLOUDHSM",
            (Some(_), None) => "EXTERNAL",
            (None, None) => "AWS_KMS",
        }
    }

    /// The state that AWS would name, except for custom key stores ([`State::state_of`]).
    pub fn state(&self) -> KeyState {
        let related = self.multi_region.as_ref();
        match (&self.deletion, self.enabled) {
            (Some(_), _) => KeyState::PendingDeletion,
            (None, _) if related.is_some_and(|it| it.deletion_days.is_some()) => {
                KeyState::PendingReplicaDeletion
            }
            (None, _) if self.versions.is_empty() && self.key_store.is_none() => KeyState::PendingImport,
            (None, true) if related.is_some_and(|it| it.moving_to.is_some()) => KeyState::Updating,
            (None, true) => KeyState::Enabled,
            (None, false) => KeyState::Disabled,
        }
    }

    /// The version that encrypts, if there is one here.
    pub fn current(&self) -> Option<&VersionEntry> {
        self.versions.iter().rev().find(|version| !version.waits)
    }

    /// Fails unless the key may encrypt and decrypt.
    pub fn check_usable(&self, place: &Locality) -> Result<(), KmsError> {
        match self.state() {
            KeyState::Disabled => Err(KmsError::Disabled(format!("{} is disabled.", place.key_arn(self.id)))),
            _ => self.check_ready(place),
        }
    }

    /// Fails if the key waits for deletion or has no material.
    pub fn check_ready(&self, place: &Locality) -> Result<(), KmsError> {
        match self.state() {
            KeyState::PendingImport => Err(self.pending_import(place)),
            _ => self.check_alive(place),
        }
    }

    /// What is answered while there is no material.
    pub fn pending_import(&self, place: &Locality) -> KmsError {
        KmsError::PendingImport(format!("{} is pending import.", place.key_arn(self.id)))
    }

    /// Fails if the key waits for deletion.
    pub fn check_alive(&self, place: &Locality) -> Result<(), KmsError> {
        let state = self.state();
        let is_dying = matches!(state, KeyState::PendingDeletion | KeyState::PendingReplicaDeletion);
        let refusal = is_dying.then(|| state.refusal(&place.key_arn(self.id)));
        refusal.flatten().map_or(Ok(()), Err)
    }

    /// Fails unless the key's material is imported, or is the KMS's own, as `external` says.
    pub fn check_origin(&self, external: bool, place: &Locality) -> Result<(), KmsError> {
        let origin = self.origin();
        if origin == if external { "EXTERNAL" } else { "AWS_KMS" } {
            return Ok(());
        }
        let arn = place.key_arn(self.id);
        Err(KmsError::Unsupported(format!("{arn} origin is {origin} which is not valid for this operation.")))
    }
}
