//! The use cases: what can be done with a store, its volumes and its snapshots, one file a verb.
//!
//! A verb is a function of a [`Store`] and of what the caller wants. It does the whole: it looks who has the
//! volume at this moment ([`reach`]), does the work itself or has the volume's host process do it, reports
//! events, and writes the audit log where keys are used. The command line, a test and whatever else asks for
//! it call the same function; whoever calls one prints the result.
//!
//! | verbs | files |
//! |---|---|
//! | volumes: make, delete | [`create`], [`import`], [`delete`] |
//! | volumes: change | [`resize`], [`rename`], [`modify`], [`rekey`], [`flatten`], [`rewrap`], [`slots`] |
//! | volumes: who serves them | [`upgrade`] |
//! | snapshots | [`snapshot`], [`copy`] |
//! | snapshots outside, as ciphertext | [`backup`] |
//! | data, in the clear | [`export`] |
//! | data keys: who else has them, which KMS keys wrap them | [`key_sharing`], [`also_keys`] |
//! | KMS keys: who needs them, whether they can be used | [`keys`], [`watch`] |
//! | space: what a copy needs, what volumes take | [`need`], [`usage`] |
//! | what attached volumes do | [`observe`], [`rates`], [`metrics`] |
//! | the store as a whole | [`apply`], [`gc`], [`space`], [`accept`] |
//! | which stores there are | [`stores`] |
#![forbid(unsafe_code)]

pub mod accept;
pub mod adopt;
pub mod also_keys;
pub mod apply;
pub mod backup;
mod brake;
pub mod clone;
pub mod copy;
pub mod create;
pub mod delete;
pub mod device;
pub mod export;
pub mod flatten;
pub mod gc;
pub mod import;
mod import_copy;
mod import_in_place;
pub mod key_sharing;
pub mod keys;
pub mod make;
pub mod metrics;
pub mod modify;
pub mod move_to;
pub mod need;
mod new_top;
pub mod observe;
pub mod rates;
pub mod reach;
pub mod rekey;
pub mod rename;
pub mod resize;
pub mod rewrap;
pub mod shred;
pub mod slots;
pub mod snapshot;
pub mod space;
pub mod stores;
pub mod upgrade;
pub mod usage;
pub mod watch;

use crate::base::Result;
use crate::base::hardened::Hardened;
use crate::base::root::Root;
use crate::catalog::Catalog;
use crate::catalog::lock::VolumeLock;
use crate::catalog::metadata::{KeyOwner, KeyRecord};
use crate::catalog::slots::Unwrapped;
use crate::config::Settings;
use crate::events::EventLog;
use crate::helper::slots::asked;
use crate::helper::unwrap;
use crate::image::lock::Access;
use crate::kms::embedded::Embedded;
use crate::kms::key_ref::ProviderName;
use crate::kms::patience::Patience;
use crate::kms::{self, Failure, KeyProvider, KeyRef, KmsError};
use crate::volume::open::{Opening, Taken};
use also_keys::{Also, AlsoKeys};
use keys::NamedKey;
use uuid::Uuid;

/// A store, as the use cases see it: where it lies, its settings, and the proof that this
/// process may see keys.
pub struct Store {
    root: Root,
    settings: Settings,
    hardened: Hardened,
}

impl Store {
    /// The store at `root`, which need not exist yet.
    ///
    /// # Errors
    /// `Usage` for settings that cannot be understood.
    pub fn open(root: &Root, hardened: Hardened) -> Result<Self> {
        Ok(Store { root: root.clone(), settings: Settings::load(root)?, hardened })
    }

    /// The folder in which the store lies.
    pub fn root(&self) -> &Root {
        &self.root
    }

    /// The settings, as they were when the store was opened.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The proof that this process has hardened itself.
    pub fn hardened(&self) -> Hardened {
        self.hardened
    }

    /// The records of volumes and snapshots.
    pub fn catalog(&self) -> Catalog {
        Catalog::with_ledger(&self.root)
    }

    /// Where events are reported.
    pub fn events(&self) -> EventLog {
        EventLog::new(&self.root, &self.settings)
    }

    /// The KMS key that `reference` names; without one, the default key of the settings.
    ///
    /// # Errors
    /// `Usage` for what names no key; those of its KMS.
    pub fn key(&self, reference: Option<&str>) -> Result<NamedKey> {
        self.key_of(self.reference(reference.unwrap_or(&self.settings.default_key))?)
    }

    /// Which KMS's key `text` means. An ARN whose place both the embedded KMS and an account at AWS have,
    /// since the settings say so, is the embedded KMS's if that has a key of this id, and else AWS's.
    ///
    /// # Errors
    /// `Usage` for what names no key, and for the ARN of an alias that both could have; those of the embedded
    /// KMS, where it is to be looked into.
    pub fn reference(&self, text: &str) -> Result<KeyRef> {
        let has = |id: Uuid| {
            keys::check_kms_is_there(&self.root)?;
            if !Embedded::is_at(&self.root) {
                return Ok(Some(false));
            }
            match self.provider(ProviderName::Embedded.as_str())?.describe(&id.to_string()) {
                Ok(_) => Ok(Some(true)),
                Err(KmsError::NotFound(_) | KmsError::NotAllowed(_)) => Ok(Some(false)),
                Err(e) => Err(e),
            }
        };
        KeyRef::of_operator_by(text, &self.settings.locality, has)
    }

    /// The KMS keys that a new data key is made and wrapped by: the one that `reference` names, without one
    /// the default key of the settings, and besides those that `also` means.
    ///
    /// # Errors
    /// `Usage` for what names no key; those of the KMS.
    pub fn keys(&self, reference: Option<&str>, also: &AlsoKeys) -> Result<NamedKey> {
        Ok(self.key(reference)?.and(Also::new(self, also)?))
    }

    /// The KMS keys that a new data key is made and wrapped by which takes the place of `record`: those of
    /// that one, the one first that is asked first, except where `also` means others.
    ///
    /// # Errors
    /// `Unsupported` for a KMS that this version does not have; those of the KMS.
    fn keys_as_of(&self, record: &KeyRecord, also: &AlsoKeys) -> Result<NamedKey> {
        let order = asked(record, &self.settings);
        let first = order.first().map_or(record.first(), |&n| &record.slots()[n]).kms_key();
        let named = NamedKey::new(self.provider(&first.provider)?, first.key_id.clone());
        Ok(named.and(Also::as_of(self, also, record, &first)?))
    }

    /// This KMS key.
    ///
    /// # Errors
    /// Those of its KMS.
    pub fn key_of(&self, reference: KeyRef) -> Result<NamedKey> {
        let provider = self.provider(reference.provider.as_str())?;
        Ok(NamedKey::new(provider, reference.key))
    }

    /// The KMS of this name, as records keep it.
    ///
    /// # Errors
    /// `Unsupported` for a KMS that this version does not know; those of the KMS.
    pub fn provider(&self, name: &str) -> Result<Box<dyn KeyProvider>, KmsError> {
        self.provider_within(name, None)
    }

    /// As [`Store::provider`], with another patience than that of the settings, if one is given.
    ///
    /// # Errors
    /// As [`Store::provider`].
    fn provider_within(
        &self,
        name: &str,
        patience: Option<Patience>,
    ) -> Result<Box<dyn KeyProvider>, KmsError> {
        if name == ProviderName::Embedded.as_str() {
            keys::check_kms_is_there(&self.root)?;
        }
        kms::open_patient_provider(self.hardened, &self.root, name, patience)
    }

    /// Opens a volume that was taken, to change it.
    fn open_taken(&self, lock: VolumeLock) -> Result<Taken, Failure> {
        let mut taken = self.open_as(lock, Opening::Change, Access::ReadWrite)?;
        space::let_empty_layers_go(&self.catalog(), &mut taken)?;
        Ok(taken)
    }

    /// Opens a volume that was taken.
    ///
    /// # Errors
    /// `Refused` for one that is not encrypted, where the settings require that; as [`Taken::open`].
    fn open_as(&self, lock: VolumeLock, opening: Opening, top: Access) -> Result<Taken, Failure> {
        let unwrap = |owner, key: &_| self.unwrap(owner, key);
        let taken = Taken::open(&self.catalog(), lock, opening, top, &unwrap)?;
        // Of the record that was opened: another look at the file could find another one.
        let opened = &taken.opened.metadata;
        self.settings.check_encrypted(opened.id(), opened.is_encrypted())?;
        Ok(taken)
    }

    /// Unwraps a data key by a helper process, as an attach does.
    fn unwrap(&self, owner: KeyOwner, key: &KeyRecord) -> Result<Unwrapped, Failure> {
        unwrap::unwrap(self.hardened, &self.root, owner, key)
    }
}
