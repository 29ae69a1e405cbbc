//! Keys that are in HSMs, used: a session with each token that is needed, and what is
//! encrypted and decrypted by it.
//!
//! No lock of the store is held while a token is asked: it may be slow. What a key's state was when the log
//! was asked is what counts, as for every key.

use crate::crypt::secret_mem::on_scrubbed_stack;
use crate::hsm::message::{Answer, Bytes, Question};
use crate::hsm::{Pin, Problem, Refusal, Token};
use crate::kms::embedded::Embedded;
use crate::kms::embedded::blob::{Blob, IV_LEN, hsm_aad, of_hsm, random};
use crate::kms::embedded::data::{Opened, Sealed};
use crate::kms::embedded::key_stores::invalid_state;
use crate::kms::embedded::open_log::OpenLog;
use crate::kms::embedded::records::{
    Change, Connection, InKeyStore, KeyEntry, KeyStoreEntry, Orphan, material_id,
};
use crate::kms::embedded::root_key::passphrase;
use crate::kms::patience::Patience;
use crate::kms::{EncryptionContext, KmsError};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use uuid::Uuid;
use zeroize::Zeroizing;

/// How long a token is waited for at most.
const LONGEST: Duration = Duration::from_secs(15);
/// How long it is waited for at least.
const SHORTEST: Duration = Duration::from_secs(3);

/// The tokens that this process has sessions with, by the id of the key store.
#[derive(Default)]
pub(super) struct Tokens(Mutex<BTreeMap<String, Known>>);

/// A token, and the PIN that the key store had kept, sealed, when it was made.
struct Known {
    token: Arc<Token>,
    pin: Option<String>,
}

/// How long a token is waited for.
#[derive(Clone, Copy)]
pub(super) struct Waiting {
    patience: Patience,
    longest: Duration,
}

impl Default for Waiting {
    fn default() -> Self {
        Waiting { patience: Patience(Duration::ZERO), longest: LONGEST }
    }
}

impl Waiting {
    /// With this patience.
    pub(super) fn of(patience: Patience) -> Self {
        Waiting { patience, longest: patience.0.clamp(SHORTEST, LONGEST) }
    }

    /// Without asking again.
    pub(super) fn once(self) -> Self {
        Waiting { patience: Patience(Duration::ZERO), ..self }
    }
}

/// A key in an HSM, and where that is.
pub(super) struct KeyInHsm {
    arn: String,
    key: Uuid,
    version: Uuid,
    store: KeyStoreEntry,
}

impl Embedded {
    /// Where the key is; none if it is not in an HSM.
    pub(super) fn in_hsm(&self, log: &OpenLog, key: &KeyEntry) -> Result<Option<Box<KeyInHsm>>, KmsError> {
        let Some(of) = &key.key_store else { return Ok(None) };
        let store = log.state().key_store(&of.id).cloned();
        let store = store.ok_or_else(|| {
            KmsError::Corrupt(format!("KMS key {} is in a key store {} that is not there", key.id, of.id))
        })?;
        let arn = self.place.key_arn(key.id);
        Ok(Some(Box::new(KeyInHsm { arn, key: key.id, version: of.version, store })))
    }

    /// Encrypts by a key in an HSM.
    pub(super) fn seal_in_hsm(
        &self,
        key: &KeyInHsm,
        plaintext: &[u8],
        context: &EncryptionContext,
    ) -> Result<Sealed, KmsError> {
        let mut iv = [0; IV_LEN];
        random(&mut iv)?;
        let question = Question::Encrypt {
            id: key.id(),
            iv: Bytes(iv.to_vec()),
            aad: Bytes(hsm_aad(key.key, key.version, context)),
            len: plaintext.len(),
        };
        let answer = self.ask_patiently(key, &question, plaintext)?.0;
        let Answer::Encrypted { iv, text } = answer else { return Err(strange()) };
        let iv = iv.0.try_into().map_err(|_| strange())?;
        Ok(Sealed {
            key: key.arn.clone(),
            material: material_id(key.key, key.version),
            blob: of_hsm(key.key, key.version, &iv, &text.0),
        })
    }

    /// Decrypts by a key in an HSM.
    pub(super) fn unseal_in_hsm(
        &self,
        key: &KeyInHsm,
        blob: &Blob<'_>,
        context: &EncryptionContext,
    ) -> Result<Opened, KmsError> {
        if !blob.is_of_hsm || blob.version != key.version {
            return Err(KmsError::InvalidCiphertext);
        }
        let question = Question::Decrypt {
            id: key.id(),
            iv: Bytes(blob.iv().to_vec()),
            aad: Bytes(hsm_aad(key.key, key.version, context)),
            text: Bytes(blob.text()),
        };
        let (answer, plaintext) = self.ask_patiently(key, &question, &[])?;
        let Answer::Filled(_) = answer else { return Err(strange()) };
        Ok(Opened { key: key.arn.clone(), material: material_id(key.key, key.version), plaintext })
    }

    /// GenerateRandom, by the token of a key store: so many bytes.
    pub fn generate_random_in(&self, which: &str, len: usize) -> Result<Zeroizing<Vec<u8>>, KmsError> {
        let store = self.connected_key_store(which)?;
        let reply = self.ask_token(&store, &Question::Random { len }, &[]);
        Ok(reply.map_err(|refusal| self.refused(&store, refusal))?.secret)
    }

    /// Makes a key in the token of a key store that is connected, and then the changes that `changes` says;
    /// if those cannot be made, the token's key is destroyed again.
    pub(super) fn make_in_hsm(
        &self,
        which: &str,
        changes: impl Fn(&OpenLog, &super::shared_log::Now, InKeyStore) -> Result<(Vec<Change>, Uuid), KmsError>,
    ) -> Result<Uuid, KmsError> {
        let store = self.connected_key_store(which)?;
        let of = InKeyStore { id: store.id.clone(), version: Uuid::new_v4() };
        let orphan = of.clone().as_orphan();
        // A process that ends before the key is noted leaves a key in the token that is
        // known to be for nothing.
        self.log.write(|_, _| Ok((vec![Change::Orphan(orphan.clone())], ())))?;
        let question = Question::Make {
            id: Bytes(of.version.as_bytes().to_vec()),
            label: format!("sealblk {}", of.version.simple()),
        };
        let made = self.ask_token(&store, &question, &[]).map_err(|refusal| self.refused(&store, refusal));
        let made = made.and_then(|_| {
            self.log.write(|log, now| {
                let entry = log.state().key_store(&store.id).filter(|entry| **entry == store);
                let is_there = log.state().orphans_of(&store.id).any(|it| *it == orphan);
                if entry.is_none() || !is_there {
                    return Err(invalid_state(&store, "to be left alone meanwhile"));
                }
                let (mut made, id) = changes(log, now, of.clone())?;
                made.push(Change::OrphanGone(orphan.clone()));
                Ok((made, id))
            })
        });
        if made.is_err() {
            self.take_back(&store, &orphan);
        }
        made
    }

    fn take_back(&self, store: &KeyStoreEntry, orphan: &Orphan) {
        let id = Bytes(orphan.version.as_bytes().to_vec());
        let gone = self.ask_token(store, &Question::Destroy { id }, &[]).is_ok();
        let noted = gone.then(|| self.log.write(|_, _| Ok((vec![Change::OrphanGone(orphan.clone())], ()))));
        if !matches!(noted, Some(Ok(()))) {
            log::warn!(
                "{} may have a key that nothing needs; it is destroyed when it is connected",
                store.place
            );
        }
    }

    /// Destroys the keys of KMS keys that were deleted, in those tokens that this process has sessions with.
    /// Others do so when they are connected.
    pub(super) fn destroy_what_was_deleted(&self) {
        let known: Vec<String> = self.tokens.all().keys().cloned().collect();
        for id in known {
            let destroyed = self.connected_key_store(&id).and_then(|store| self.destroy_orphans(&store));
            if let Err(e) = destroyed {
                log::warn!("keys that are needed no more may still be in the token of {id}: {e}");
            }
        }
    }

    /// Has the next question to the token of this key store asked with this PIN.
    pub(super) fn use_pin(&self, store: &KeyStoreEntry, pin: Pin) {
        let token = Arc::new(Token::new(store.place.clone(), pin));
        self.tokens.all().insert(store.id.clone(), Known { token, pin: store.pin.clone() });
    }

    /// Ends the session with the token of this key store.
    pub(super) fn forget_token(&self, id: &str) {
        self.tokens.all().remove(id);
    }

    /// Asks a token on behalf of a key, as patiently as is wanted.
    fn ask_patiently(
        &self,
        key: &KeyInHsm,
        question: &Question,
        secret: &[u8],
    ) -> Result<(Answer, Zeroizing<Vec<u8>>), KmsError> {
        let ask = |time: Duration| {
            let refused = |refusal: Refusal| match refusal.problem {
                Problem::NoKey => KmsError::InvalidState(format!("{} is unavailable: {refusal}", key.arn)),
                _ => self.refused(&key.store, refusal),
            };
            let reply = self.ask_token_within(&key.store, question, secret, time).map_err(refused)?;
            Ok((reply.answer, reply.secret))
        };
        on_scrubbed_stack(|| self.waiting.patience.call(ask))
    }

    /// Asks the token of a key store.
    pub(super) fn ask_token(
        &self,
        store: &KeyStoreEntry,
        question: &Question,
        secret: &[u8],
    ) -> Result<crate::hsm::Reply, Refusal> {
        on_scrubbed_stack(|| self.ask_token_within(store, question, secret, LONGEST))
    }

    fn ask_token_within(
        &self,
        store: &KeyStoreEntry,
        question: &Question,
        secret: &[u8],
        time: Duration,
    ) -> Result<crate::hsm::Reply, Refusal> {
        let token = self.token(store).map_err(|e| Refusal::new(Problem::WrongPin, e.to_string()))?;
        let asked = token.ask(question, secret, time.min(self.waiting.longest));
        if let Err(refusal) = &asked
            && matches!(refusal.problem, Problem::WrongPin | Problem::PinLocked)
        {
            self.forget_token(&store.id);
            self.note_bad_pin(store, refusal.problem);
        }
        asked
    }

    /// A PIN that is kept, and is another one by now, would be tried by every attach until
    /// the token locks it.
    fn note_bad_pin(&self, store: &KeyStoreEntry, problem: Problem) {
        if store.pin.is_none() || store.connection != Connection::Connected {
            return;
        }
        let connection = if problem == Problem::PinLocked {
            Connection::FailedByLockedPin
        } else {
            Connection::FailedByPin
        };
        match self.set_connection(store, connection) {
            Ok(()) => log::warn!(
                "the key store \"{}\" is not connected any more: its token has another PIN than the one that \
                 is kept",
                store.name
            ),
            Err(e) => {
                log::warn!("that the PIN of the key store \"{}\" is wrong is not noted: {e}", store.name)
            }
        }
    }

    fn pin_of(&self, id: &str, name: &str) -> Result<Pin, KmsError> {
        passphrase::pin(Some(id), &passphrase::of_key_store(name), self.log.hardened())
    }

    /// The token of a key store, with the PIN that is kept, or that somebody gives.
    fn token(&self, store: &KeyStoreEntry) -> Result<Arc<Token>, KmsError> {
        let mut all = self.tokens.all();
        let is_current = |known: &&Known| *known.token.place() == store.place && known.pin == store.pin;
        if let Some(known) = all.get(&store.id).filter(is_current) {
            return Ok(known.token.clone());
        }
        let pin = match self.kept_pin(store)? {
            Some(pin) => pin,
            None => self.pin_of(&store.id, &store.name)?,
        };
        let token = Arc::new(Token::new(store.place.clone(), pin));
        all.insert(store.id.clone(), Known { token: token.clone(), pin: store.pin.clone() });
        Ok(token)
    }
}

impl Tokens {
    fn all(&self) -> MutexGuard<'_, BTreeMap<String, Known>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl KeyInHsm {
    fn id(&self) -> Bytes {
        Bytes(self.version.as_bytes().to_vec())
    }
}

fn strange() -> KmsError {
    KmsError::Internal("a token has answered something else than it was asked".into())
}
