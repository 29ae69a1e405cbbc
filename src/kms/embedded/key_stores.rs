//! Custom key stores: tokens of HSMs that keep keys, as AWS KMS has AWS CloudHSM clusters.
//!
//! A key store is connected or not. That is a word in the log, which every process heeds; each process that
//! needs a key has a session of its own with the token ([`crate::kms::embedded::hsm_keys`]).

use crate::config::Settings;
use crate::hsm::message::{Bytes, Question};
use crate::hsm::{Pin, Place, Problem, Refusal};
use crate::kms::embedded::audit::Call;
use crate::kms::embedded::blob::random;
use crate::kms::embedded::keys::LogKeys;
use crate::kms::embedded::records::{Change, Connection, KeyStoreEntry, KeyStoreId, Orphan};
use crate::kms::embedded::{Embedded, state::State};
use crate::kms::{Exception, KmsError};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest, Sha256};

/// The longest name of a key store, in characters.
pub const NAME_MAX: usize = 256;

/// What CreateCustomKeyStore is asked for.
pub struct NewKeyStore<'a> {
    /// Its name, which no other has.
    pub name: &'a str,
    /// Where its token is.
    pub place: Place,
    /// What the wire names the token by; without one, what follows from where it is.
    pub cluster: Option<String>,
    /// The PIN, if it is to be kept in the log, sealed.
    pub pin: Option<Pin>,
}

/// What UpdateCustomKeyStore changes.
#[derive(Default)]
pub struct KeyStoreChanges<'a> {
    /// Its name.
    pub name: Option<&'a str>,
    /// The PIN that is kept.
    pub pin: Option<Pin>,
    /// Where its token is now, and what the wire names that by. It has to have the key store's keys.
    pub place: Option<(Place, Option<String>)>,
}

/// What is told of a key store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyStoreMetadata {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// What the wire names the token by.
    pub cluster: String,
    /// Where the token is.
    pub place: Place,
    /// When it was made: milliseconds since 1970.
    pub created: i64,
    /// Whether its keys can be used.
    pub connection: Connection,
    /// Whether the token's PIN is kept in the log.
    pub keeps_pin: bool,
    /// How many keys are in it.
    pub keys: usize,
}

impl Connection {
    /// AWS KMS's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Connection::Connected => "CONNECTED",
            Connection::Disconnected => "DISCONNECTED",
            _ => "FAILED",
        }
    }

    /// AWS KMS's name for why connecting has failed; none where it has not.
    pub fn error_code(self) -> Option<&'static str> {
        match self {
            Connection::Connected | Connection::Disconnected => None,
            Connection::FailedByPin => Some("INVALID_CREDENTIALS"),
            Connection::FailedByLockedPin => Some("USER_LOCKED_OUT"),
            Connection::FailedByToken => Some("CLUSTER_NOT_FOUND"),
            Connection::Failed => Some("INTERNAL_ERROR"),
        }
    }

    fn failed_by(problem: Problem) -> Self {
        match problem {
            Problem::WrongPin => Connection::FailedByPin,
            Problem::PinLocked => Connection::FailedByLockedPin,
            Problem::NoToken => Connection::FailedByToken,
            _ => Connection::Failed,
        }
    }
}

impl Embedded {
    /// Where the token is that the settings name so, for whoever asks over the wire.
    ///
    /// # Errors
    /// CloudHsmClusterNotFound if the settings do not name it.
    pub fn token_named(&self, cluster: &str) -> Result<Place, KmsError> {
        let settings = Settings::load(&self.root).map_err(|e| KmsError::Internal(e.to_string()))?;
        let found = settings.pkcs11_tokens.into_iter().find(|token| token.cluster == cluster);
        let found = found.map(|it| Place {
            module: it.module,
            token: it.token,
            paths: it.paths,
            network: it.network,
        });
        found.ok_or_else(|| {
            let message =
                format!("The cluster {cluster} is none of this KMS's: its settings do not name it.");
            KmsError::Other(Exception::CloudHsmClusterNotFound, message)
        })
    }

    /// CreateCustomKeyStore: a key store that is not connected; returns its id. Makes the
    /// store if there is none.
    pub fn create_key_store(&self, new: &NewKeyStore<'_>) -> Result<String, KmsError> {
        check_name(new.name)?;
        self.log.create_if_absent()?;
        let made = self.log.write(|log, now| {
            check_name_is_free(log.state(), new.name)?;
            check_token_is_free(log.state(), &new.place, None)?;
            let entry = KeyStoreEntry {
                id: new_id()?,
                name: new.name.to_owned(),
                cluster: new.cluster.clone().unwrap_or_else(|| cluster_of(&new.place)),
                created: now.time,
                place: new.place.clone(),
                connection: Connection::Disconnected,
                pin: None,
            };
            let pin = seal_pin(log.keys(), &entry.id, new.pin.as_ref())?;
            let id = entry.id.clone();
            Ok((vec![Change::KeyStore(KeyStoreEntry { pin, ..entry })], id))
        });
        let call = Call::new("CreateCustomKeyStore").with("customKeyStoreName", new.name);
        self.record(call.with("token", new.place.token.as_str()), made)
    }

    /// DescribeCustomKeyStores, by id. Without a store there are none.
    pub fn key_stores(&self) -> Result<Vec<KeyStoreMetadata>, KmsError> {
        if !self.log.exists()? {
            return Ok(Vec::new());
        }
        self.current(|log| {
            let state = log.state();
            Ok(state.key_stores().map(|entry| metadata(state, entry)).collect())
        })
    }

    /// The key store of this id or name.
    ///
    /// # Errors
    /// CustomKeyStoreNotFound.
    pub fn key_store(&self, which: &str) -> Result<KeyStoreMetadata, KmsError> {
        if !self.log.exists()? {
            return Err(not_found(which));
        }
        self.current(|log| Ok(metadata(log.state(), find(log.state(), which)?)))
    }

    /// ConnectCustomKeyStore: logs in to the token, with this PIN if one is given, and destroys keys there
    /// that are needed no more. Of one that is connected, it does the same again.
    ///
    /// # Errors
    /// What the token has said; the key store's connection has failed then.
    pub fn connect_key_store(&self, which: &str, pin: Option<Pin>) -> Result<(), KmsError> {
        let connected = self.connect(which, pin);
        self.record(Call::new("ConnectCustomKeyStore").with("customKeyStoreId", which), connected)
    }

    fn connect(&self, which: &str, pin: Option<Pin>) -> Result<(), KmsError> {
        let entry = self.key_store_entry(which)?;
        if !matches!(entry.connection, Connection::Connected | Connection::Disconnected) {
            return Err(invalid_state(&entry, "to be disconnected before it is connected again"));
        }
        if let Some(pin) = pin {
            self.use_pin(&entry, pin);
        }
        let outcome = self.ask_token(&entry, &Question::Random { len: 16 }, &[]);
        let connection = match &outcome {
            Ok(_) => Connection::Connected,
            // Whoever uses its keys hears of it; they may be usable again the next moment.
            Err(_) if entry.connection == Connection::Connected => Connection::Connected,
            Err(refusal) => Connection::failed_by(refusal.problem),
        };
        self.set_connection(&entry, connection)?;
        outcome.map_err(|refusal| self.refused(&entry, refusal))?;
        if let Err(e) = self.destroy_orphans(&entry) {
            log::warn!("keys that are needed no more are still in {}: {e}", entry.place);
        }
        Ok(())
    }

    /// DisconnectCustomKeyStore: no use of its keys that begins after this has answered succeeds.
    pub fn disconnect_key_store(&self, which: &str) -> Result<(), KmsError> {
        let disconnected = self.log_of_key_stores(which).and_then(|()| {
            self.log.write(|log, _| {
                let entry = find(log.state(), which)?;
                if entry.connection == Connection::Disconnected {
                    return Err(invalid_state(entry, "to be connected"));
                }
                let after = KeyStoreEntry { connection: Connection::Disconnected, ..entry.clone() };
                Ok((vec![Change::KeyStore(after)], entry.id.clone()))
            })
        });
        if let Ok(id) = &disconnected {
            self.forget_token(id);
        }
        let call = Call::new("DisconnectCustomKeyStore").with("customKeyStoreId", which);
        self.record(call, disconnected.map(drop))
    }

    /// UpdateCustomKeyStore, of one that is disconnected.
    pub fn update_key_store(&self, which: &str, changes: &KeyStoreChanges<'_>) -> Result<(), KmsError> {
        let call = Call::new("UpdateCustomKeyStore").with("customKeyStoreId", which);
        let call = call.with("newCustomKeyStoreName", changes.name);
        self.record(call, self.update(which, changes))
    }

    fn update(&self, which: &str, changes: &KeyStoreChanges<'_>) -> Result<(), KmsError> {
        changes.name.map_or(Ok(()), check_name)?;
        let before = self.key_store_entry(which)?;
        if before.connection != Connection::Disconnected {
            return Err(invalid_state(&before, "to be disconnected"));
        }
        if let Some((place, _)) = &changes.place {
            self.check_has_keys(&before, place, changes.pin.clone())?;
        }
        self.log.write(|log, _| {
            let entry = find(log.state(), &before.id)?;
            if *entry != before {
                return Err(invalid_state(entry, "to be left alone meanwhile"));
            }
            let mut after = entry.clone();
            if let Some(name) = changes.name.filter(|name| *name != entry.name) {
                check_name_is_free(log.state(), name)?;
                after.name = name.to_owned();
            }
            if let Some((place, cluster)) = &changes.place {
                check_token_is_free(log.state(), place, Some(&entry.id))?;
                after.place = place.clone();
                after.cluster = cluster.clone().unwrap_or_else(|| cluster_of(place));
            }
            if changes.pin.is_some() {
                after.pin = seal_pin(log.keys(), &entry.id, changes.pin.as_ref())?;
            }
            Ok((vec![Change::KeyStore(after)], ()))
        })?;
        self.forget_token(&before.id);
        Ok(())
    }

    /// DeleteCustomKeyStore, of one that is disconnected and has no keys, not even such as wait for their
    /// deletion.
    pub fn delete_key_store(&self, which: &str) -> Result<(), KmsError> {
        let deleted = self.log_of_key_stores(which).and_then(|()| {
            self.log.write(|log, _| {
                let entry = find(log.state(), which)?;
                let has_keys = keys_in(log.state(), &entry.id) > 0;
                if has_keys {
                    let message = format!(
                        "The custom key store {} has keys. Schedule their deletion, and wait for it, before \
                         you delete the key store.",
                        entry.id
                    );
                    return Err(KmsError::Other(Exception::CustomKeyStoreHasKeys, message));
                }
                if entry.connection != Connection::Disconnected {
                    return Err(invalid_state(entry, "to be disconnected"));
                }
                let left: Vec<String> = log
                    .state()
                    .orphans_of(&entry.id)
                    .map(|orphan| orphan.version.simple().to_string())
                    .collect();
                let change = Change::KeyStoreDeleted(KeyStoreId { id: entry.id.clone() });
                Ok((vec![change], (entry.id.clone(), left)))
            })
        });
        if let Ok((id, left)) = &deleted {
            self.forget_token(id);
            if !left.is_empty() {
                log::warn!("the token may still have the keys {}, which nothing needs", left.join(", "));
            }
        }
        let call = Call::new("DeleteCustomKeyStore").with("customKeyStoreId", which);
        self.record(call, deleted.map(drop))
    }

    /// The entry of the key store of this id or name, and one that is connected.
    pub(super) fn connected_key_store(&self, which: &str) -> Result<KeyStoreEntry, KmsError> {
        let entry = self.key_store_entry(which)?;
        match entry.connection {
            Connection::Connected => Ok(entry),
            _ => Err(invalid_state(&entry, "to be connected")),
        }
    }

    pub(super) fn key_store_entry(&self, which: &str) -> Result<KeyStoreEntry, KmsError> {
        self.log_of_key_stores(which)?;
        self.log.read(|log| find(log.state(), which).cloned())
    }

    /// Fails if there is no log that could have key stores.
    fn log_of_key_stores(&self, which: &str) -> Result<(), KmsError> {
        if self.log.exists()? { Ok(()) } else { Err(not_found(which)) }
    }

    /// The PIN that is kept for a key store, if one is.
    pub(super) fn kept_pin(&self, entry: &KeyStoreEntry) -> Result<Option<Pin>, KmsError> {
        let Some(sealed) = &entry.pin else { return Ok(None) };
        let damaged = || {
            KmsError::Corrupt(format!("the PIN that is kept for the key store {} does not open", entry.id))
        };
        let sealed = STANDARD.decode(sealed).map_err(|_| damaged())?;
        self.log.read(|log| {
            let pin = log.keys().open_token(&pin_label(&entry.id), &sealed).ok_or_else(damaged)?;
            Pin::copy_of(&pin).map(Some).map_err(|e| KmsError::Internal(e.to_string()))
        })
    }

    /// Notes what became of the connection of a key store that is still as it was.
    pub(super) fn set_connection(
        &self,
        entry: &KeyStoreEntry,
        connection: Connection,
    ) -> Result<(), KmsError> {
        self.log.write(|log, _| {
            let now = find(log.state(), &entry.id)?;
            if now != entry {
                return Err(invalid_state(now, "to be left alone meanwhile"));
            }
            let after = KeyStoreEntry { connection, ..now.clone() };
            let changes = if after == *now { Vec::new() } else { vec![Change::KeyStore(after)] };
            Ok((changes, ()))
        })
    }

    /// Destroys the keys that the token has for nothing.
    pub(super) fn destroy_orphans(&self, entry: &KeyStoreEntry) -> Result<(), KmsError> {
        let orphans: Vec<Orphan> =
            self.log.read(|log| Ok(log.state().orphans_of(&entry.id).cloned().collect()))?;
        for orphan in orphans {
            let id = Bytes(orphan.version.as_bytes().to_vec());
            let destroyed = self.ask_token(entry, &Question::Destroy { id }, &[]);
            destroyed.map_err(|refusal| self.refused(entry, refusal))?;
            self.log.write(|_, _| Ok((vec![Change::OrphanGone(orphan.clone())], ())))?;
        }
        Ok(())
    }

    /// Fails unless the token there has every key of the key store.
    fn check_has_keys(&self, entry: &KeyStoreEntry, place: &Place, pin: Option<Pin>) -> Result<(), KmsError> {
        let moved = KeyStoreEntry { place: place.clone(), ..entry.clone() };
        if let Some(pin) = pin {
            self.use_pin(&moved, pin);
        }
        let versions: Vec<Bytes> = self.log.read(|log| {
            let of = log.state().keys().filter_map(|key| key.key_store.as_ref());
            let of = of.filter(|of| of.id == entry.id);
            Ok(of.map(|of| Bytes(of.version.as_bytes().to_vec())).collect())
        })?;
        for id in versions {
            let found = self.ask_token(&moved, &Question::Find { id }, &[]);
            let found = found.map_err(|refusal| self.refused(&moved, refusal))?;
            if found.answer != crate::hsm::message::Answer::Found(true) {
                let message =
                    format!("{place} does not have every key of the custom key store {}.", entry.id);
                return Err(KmsError::Other(Exception::CloudHsmClusterNotRelated, message));
            }
        }
        Ok(())
    }

    /// What a token's refusal means for whoever needs a key.
    pub(super) fn refused(&self, entry: &KeyStoreEntry, Refusal { problem, words }: Refusal) -> KmsError {
        let message = format!("the key store \"{}\": {words}", entry.name);
        match problem {
            Problem::BadCiphertext => KmsError::InvalidCiphertext,
            Problem::NoKey => KmsError::InvalidState(message),
            Problem::WrongPin | Problem::PinLocked => KmsError::AccessDenied(message),
            Problem::Unsuitable => KmsError::Other(Exception::CloudHsmClusterInvalidConfiguration, message),
            Problem::NotBuilt => KmsError::Unsupported(message),
            // It names a path of this machine.
            Problem::NoModule => KmsError::Internal(message),
            Problem::NoToken | Problem::Lost => KmsError::Unavailable(message),
        }
    }
}

/// What the wire names a token by that no setting names.
pub fn cluster_of(place: &Place) -> String {
    let mut hash = Sha256::new();
    hash.update(b"sealblk kms token\0");
    hash.update(place.module.as_os_str().as_encoded_bytes());
    hash.update([0]);
    hash.update(place.token.as_bytes());
    format!("cluster-{}", &hex::encode(hash.finalize())[..16])
}

fn metadata(state: &State, entry: &KeyStoreEntry) -> KeyStoreMetadata {
    KeyStoreMetadata {
        id: entry.id.clone(),
        name: entry.name.clone(),
        cluster: entry.cluster.clone(),
        place: entry.place.clone(),
        created: entry.created,
        connection: entry.connection,
        keeps_pin: entry.pin.is_some(),
        keys: keys_in(state, &entry.id),
    }
}

fn keys_in(state: &State, id: &str) -> usize {
    state.keys().filter(|key| key.key_store.as_ref().is_some_and(|of| of.id == id)).count()
}

fn find<'a>(state: &'a State, which: &str) -> Result<&'a KeyStoreEntry, KmsError> {
    let named = || state.key_stores().find(|entry| entry.name == which);
    state.key_store(which).or_else(named).ok_or_else(|| not_found(which))
}

fn not_found(which: &str) -> KmsError {
    KmsError::Other(Exception::CustomKeyStoreNotFound, format!("There is no custom key store {which}."))
}

pub(super) fn invalid_state(entry: &KeyStoreEntry, must: &str) -> KmsError {
    let (id, state) = (&entry.id, entry.connection.name());
    let message = format!("The custom key store {id} is {state}. For this, it has {must}.");
    KmsError::Other(Exception::CustomKeyStoreInvalidState, message)
}

fn check_name(name: &str) -> Result<(), KmsError> {
    if name.is_empty() || name.chars().count() > NAME_MAX || name.chars().any(char::is_control) {
        return Err(KmsError::Validation(format!(
            "1 validation error detected: Value at 'customKeyStoreName' failed to satisfy constraint: Member \
             must have length less than or equal to {NAME_MAX}, greater than or equal to 1, and no control \
             characters"
        )));
    }
    Ok(())
}

fn check_name_is_free(state: &State, name: &str) -> Result<(), KmsError> {
    // An id is never a name, so that what names one key store names no other.
    if name.starts_with("cks-") || state.key_stores().any(|entry| entry.name == name) {
        let message = format!("The custom key store name {name} is in use.");
        return Err(KmsError::Other(Exception::CustomKeyStoreNameInUse, message));
    }
    Ok(())
}

fn check_token_is_free(state: &State, place: &Place, except: Option<&str>) -> Result<(), KmsError> {
    let same = |entry: &&KeyStoreEntry| {
        (&entry.place.module, &entry.place.token) == (&place.module, &place.token)
            && except != Some(entry.id.as_str())
    };
    match state.key_stores().find(same) {
        None => Ok(()),
        Some(other) => Err(KmsError::Other(
            Exception::CloudHsmClusterInUse,
            format!("The custom key store {} is {place}.", other.id),
        )),
    }
}

fn new_id() -> Result<String, KmsError> {
    let mut bytes = [0; 9];
    random(&mut bytes)?;
    Ok(format!("cks-{}", &hex::encode(bytes)[..17]))
}

fn seal_pin(keys: &LogKeys, id: &str, pin: Option<&Pin>) -> Result<Option<String>, KmsError> {
    pin.map(|pin| Ok(STANDARD.encode(keys.seal_token(&pin_label(id), pin.bytes())?))).transpose()
}

fn pin_label(id: &str) -> String {
    format!("pin of {id}")
}
