//! What the log's records say: the JSON of a record's body.
//!
//! Pure. A body is a transaction: a time and the changes made at once. Each change states the whole new
//! value of one thing, so that replaying is an upsert and a compacted log is the list of what lives.
//! New kinds of things (grants, principals, policies) are new kinds of changes; a version that does not
//! know one refuses the log.

use crate::hsm::Place;
use crate::kms::KmsError;
use crate::kms::embedded::clock::Moment;
use crate::kms::embedded::grant_records::{GrantEntry, GrantName};
use crate::kms::embedded::keys::SEALED_LEN;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use uuid::Uuid;

/// One record's body.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Transaction {
    /// Milliseconds since 1970; never less than in the record before.
    pub time: i64,
    /// What changed, in order.
    pub changes: Vec<Change>,
}

/// The new value, or the end, of one thing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Change {
    /// A key is now as stated.
    Key(KeyEntry),
    /// A key and its material are gone; the log is rewritten without them.
    KeyDeleted(KeyId),
    /// An alias is now as stated.
    Alias(AliasEntry),
    /// An alias is gone.
    AliasDeleted(AliasName),
    /// A grant is now as stated.
    Grant(GrantEntry),
    /// A grant is gone.
    GrantDeleted(GrantName),
    /// A custom key store is now as stated.
    KeyStore(KeyStoreEntry),
    /// A custom key store is gone.
    KeyStoreDeleted(KeyStoreId),
    /// A key that an HSM may have, and that nothing here needs (any more), is to be destroyed there.
    Orphan(Orphan),
    /// It was destroyed, or is needed now.
    OrphanGone(Orphan),
    /// A principal is now as stated.
    Principal(PrincipalEntry),
    /// A principal is gone.
    PrincipalDeleted(PrincipalName),
}

/// A KMS key.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyEntry {
    /// Its id, random.
    pub id: Uuid,
    /// When it was made: milliseconds since 1970.
    pub created: i64,
    /// The operator's words, at most 8192 characters.
    pub description: String,
    /// Whether it is switched on; for a key that waits for deletion, false.
    pub enabled: bool,
    /// There while it waits for deletion.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deletion: Option<Deletion>,
    /// There while it is rotated by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rotation: Option<Rotation>,
    /// There if its material is imported: its origin is EXTERNAL.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub external: Option<External>,
    /// Its tags.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tags: BTreeMap<String, String>,
    /// Its policy, JSON; absent while it is the one that every key is made with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
    /// There if the key is in an HSM: its origin is AWS_CLOUDHSM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_store: Option<InKeyStore>,
    /// There if the key is a multi-Region key, which its id tells as well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub multi_region: Option<MultiRegion>,
    /// Its versions, oldest first; the last one that does not wait encrypts. Empty while material is to be
    /// imported, and for a key in an HSM.
    pub versions: Vec<VersionEntry>,
}

/// What is known of a key's imported material, also while the material is not there.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct External {
    /// The id of its one version, the same whenever the material is imported again.
    pub version: Uuid,
    /// A MAC of the material of a key in one region, once there was one: no other can be imported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub check: Option<String>,
    /// The same of a multi-Region key. All relatives share it, and the primary key alone sets it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<Box<Fingerprint>>,
    /// When the material is to be forgotten: milliseconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires: Option<i64>,
}

/// What tells the material of a multi-Region key from any other, in whichever region that is imported.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fingerprint {
    /// Random: names it to regions that have it.
    pub id: Uuid,
    /// A MAC that has the material as its key, sealed under the store key; base64.
    #[serde(with = "sealed")]
    pub sealed: [u8; SEALED_LEN],
}

/// In which HSM a key is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InKeyStore {
    /// The id of its custom key store.
    pub id: String,
    /// The id of its one version, named in each blob.
    pub version: Uuid,
}

/// What is known of a multi-Region key's relatives: the keys of the same id in other regions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MultiRegion {
    /// The region of the primary key; all other keys of this id are its replicas.
    pub primary: String,
    /// Counts the changes of what all of them share, from 1. At a replica: of what it has.
    pub generation: u64,
    /// The regions of the replicas. At the primary key, for each the generation that it is known to have; 0
    /// while it is not known to be there.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub replicas: BTreeMap<String, u64>,
    /// There at a primary key while the replica in this region becomes the primary one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moving_to: Option<String>,
    /// There at a primary key while its deletion waits for that of its replicas: the waiting window that
    /// begins then, days.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deletion_days: Option<u32>,
}

/// A custom key store: a token of an HSM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyStoreEntry {
    /// Its id: `cks-` and 17 hex digits, random.
    pub id: String,
    /// Its name.
    pub name: String,
    /// What the wire names the token by.
    pub cluster: String,
    /// When it was made: milliseconds since 1970.
    pub created: i64,
    /// Where the token is.
    pub place: Place,
    /// Whether its keys can be used.
    pub connection: Connection,
    /// The token's PIN, sealed under the store key, base64; absent where whoever needs it has to give it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pin: Option<String>,
}

/// Whether the keys of a custom key store can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Connection {
    /// They can.
    Connected,
    /// They cannot, until it is connected.
    Disconnected,
    /// Connecting it has failed: the PIN was another one.
    FailedByPin,
    /// Connecting it has failed: the PIN is locked.
    FailedByLockedPin,
    /// Connecting it has failed: there was no such token.
    FailedByToken,
    /// Connecting it has failed for another reason.
    Failed,
}

/// Names a custom key store.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyStoreId {
    /// Its id.
    pub id: String,
}

/// A key that an HSM may have, and that is no KMS key.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Orphan {
    /// The id of the custom key store.
    pub store: String,
    /// The id of the version, by which the HSM knows it.
    pub version: Uuid,
}

/// When a key is rotated by itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rotation {
    /// How often, days: 90..=2560.
    pub days: u32,
    /// When next: milliseconds since 1970.
    pub next: i64,
}

/// What made a version that is not a key's first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RotationType {
    /// The key's rotation period was over.
    Automatic,
    /// RotateKeyOnDemand.
    OnDemand,
}

/// One version of a key's material.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VersionEntry {
    /// Its id, random, named in each blob.
    pub id: Uuid,
    /// When it was made: milliseconds since 1970.
    pub created: i64,
    /// What made it; absent for the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rotation: Option<RotationType>,
    /// Whether it only decrypts, until every related key in another region has it.
    #[serde(default, skip_serializing_if = "is_false")]
    pub waits: bool,
    /// The material, sealed under the store key; base64.
    #[serde(with = "sealed")]
    pub sealed: [u8; SEALED_LEN],
}

/// A deletion that was asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Deletion {
    /// The waiting window, 7..=30.
    pub days: u32,
    /// When it ends: milliseconds since 1970.
    pub at: i64,
    /// When it was asked for.
    pub asked: Moment,
    /// When the end was first seen to have passed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seen: Option<Moment>,
}

/// A name for a key.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AliasEntry {
    /// The whole name, `alias/` included.
    pub name: String,
    /// The key it means.
    pub key: Uuid,
    /// When it was made: milliseconds since 1970.
    pub created: i64,
    /// When it was last pointed at a key.
    pub updated: i64,
}

/// Names a key.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyId {
    /// Its id.
    pub id: Uuid,
}

/// Names an alias.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AliasName {
    /// The whole name.
    pub name: String,
}

/// Somebody who may ask the KMS over the wire.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PrincipalEntry {
    /// Its name; `root` is the root principal.
    pub name: String,
    /// Its id, random: another principal of the same name has another.
    pub id: Uuid,
    /// Whether it may do everything; otherwise only what grants let it do.
    pub admin: bool,
    /// There if it is the KMS of this region, which may synchronize multi-Region keys.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<String>,
    /// When it was made: milliseconds since 1970.
    pub created: i64,
    /// The id of its access key.
    pub access_key: String,
    /// The seed of the secret access key, sealed under the store key; base64.
    #[serde(with = "sealed")]
    pub sealed: [u8; SEALED_LEN],
    /// There while one access key takes over from the other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub second: Option<AccessKeyEntry>,
}

/// A further access key of a principal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AccessKeyEntry {
    /// Its id.
    pub access_key: String,
    /// When it was made: milliseconds since 1970.
    pub created: i64,
    /// The seed of its secret, sealed under the store key; base64.
    #[serde(with = "sealed")]
    pub sealed: [u8; SEALED_LEN],
}

/// Names a principal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PrincipalName {
    /// Its name.
    pub name: String,
}

impl Transaction {
    /// The body's bytes.
    pub fn encode(&self) -> Result<Vec<u8>, KmsError> {
        serde_json::to_vec(self)
            .map_err(|e| KmsError::Internal(format!("write a record of the KMS store: {e}")))
    }

    /// Parses the body of record `seq`, whose MAC was right: what cannot be read was therefore written by
    /// another version of sealblk.
    pub fn decode(seq: u64, body: &[u8]) -> Result<Self, KmsError> {
        let newer = |why: &str| {
            KmsError::Corrupt(format!(
                "record {seq} of the KMS store was made by a newer version of sealblk ({why}); use that \
                 version"
            ))
        };
        let transaction: Transaction = serde_json::from_slice(body).map_err(|e| newer(&e.to_string()))?;
        let is_empty =
            |key: &KeyEntry| key.versions.is_empty() && key.external.is_none() && key.key_store.is_none();
        let empty = |c: &Change| matches!(c, Change::Key(key) if is_empty(key));
        if transaction.changes.iter().any(empty) {
            return Err(newer("a key without material"));
        }
        Ok(transaction)
    }
}

fn is_false(value: &bool) -> bool {
    !value
}

mod sealed {
    use super::SEALED_LEN;
    use base64::Engine;
    use base64::engine::general_purpose::STANDARD;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8; SEALED_LEN], s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&STANDARD.encode(bytes))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<[u8; SEALED_LEN], D::Error> {
        let text = String::deserialize(d)?;
        let bytes = STANDARD.decode(text).map_err(D::Error::custom)?;
        bytes.try_into().map_err(|_| D::Error::custom("sealed material has another length"))
    }
}

/// KeyMaterialId: names one version of one key on the wire, and says nothing of its secret.
pub fn material_id(key: Uuid, version: Uuid) -> String {
    let mut hash = Sha256::new();
    hash.update(b"sealblk kms key material id\0");
    hash.update(key.as_bytes());
    hash.update(version.as_bytes());
    hex::encode(hash.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_changes_and_fields_come_from_a_newer_version() {
        let newer = |body: &str| {
            let error = Transaction::decode(7, body.as_bytes()).unwrap_err().to_string();
            assert!(error.starts_with("record 7 ") && error.contains("newer version"), "{error}");
        };
        newer(r#"{"time":1,"changes":[{"type":"audit","id":"x"}]}"#);
        newer(r#"{"time":1,"changes":[{"type":"grant-deleted","key":"x"}]}"#);
        newer(r#"{"time":1,"changes":[{"type":"alias-deleted","name":"alias/x","by":"y"}]}"#);
        newer(r#"{"time":1,"changes":[],"audit":1}"#);
        newer(
            r#"{"time":1,"changes":[{"type":"key","id":"00000000-0000-0000-0000-000000000001","created":1,"description":"","enabled":true,"versions":[]}]}"#,
        );
    }

    #[test]
    fn what_is_written_is_read() {
        let moment = Moment { wall: 5, boot: Some(Uuid::from_u128(9)), up: 3 };
        let key = KeyEntry {
            id: Uuid::from_u128(1),
            created: 4,
            description: "ä".into(),
            enabled: false,
            deletion: Some(Deletion { days: 7, at: 6, asked: moment.clone(), seen: Some(moment) }),
            rotation: Some(Rotation { days: 90, next: 7 }),
            external: Some(External {
                version: Uuid::from_u128(2),
                check: Some("c".into()),
                fingerprint: Some(Box::new(Fingerprint { id: Uuid::from_u128(3), sealed: [8; SEALED_LEN] })),
                expires: None,
            }),
            tags: BTreeMap::from([("a".into(), "b".into())]),
            policy: Some("{}".into()),
            key_store: Some(InKeyStore { id: "cks-1".into(), version: Uuid::from_u128(2) }),
            multi_region: Some(MultiRegion {
                primary: "us-east-1".into(),
                generation: 3,
                replicas: BTreeMap::from([("eu-west-1".into(), 2)]),
                moving_to: Some("eu-west-1".into()),
                deletion_days: Some(7),
            }),
            versions: vec![VersionEntry {
                id: Uuid::from_u128(2),
                created: 4,
                rotation: Some(RotationType::OnDemand),
                waits: true,
                sealed: [8; SEALED_LEN],
            }],
        };
        let alias = AliasEntry { name: "alias/x".into(), key: key.id, created: 1, updated: 2 };
        let place = Place { module: "/m.so".into(), token: "t".into(), paths: Vec::new(), network: true };
        let store = KeyStoreEntry {
            id: "cks-1".into(),
            name: "n".into(),
            cluster: "cluster-1".into(),
            created: 1,
            place,
            connection: Connection::FailedByPin,
            pin: Some("cA==".into()),
        };
        let orphan = Orphan { store: "cks-1".into(), version: key.id };
        let changes = vec![
            Change::KeyStore(store),
            Change::KeyStoreDeleted(KeyStoreId { id: "cks-1".into() }),
            Change::Orphan(orphan.clone()),
            Change::OrphanGone(orphan),
            Change::Alias(alias),
            Change::AliasDeleted(AliasName { name: "alias/x".into() }),
            Change::KeyDeleted(KeyId { id: key.id }),
            Change::Key(key),
        ];
        let transaction = Transaction { time: 9, changes };
        assert_eq!(Transaction::decode(1, &transaction.encode().unwrap()), Ok(transaction));
    }
}
