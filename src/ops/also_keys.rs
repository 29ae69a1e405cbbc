//! The KMS keys that wrap a data key besides the one that made it.

use super::Store;
use crate::base::root::Root;
use crate::base::{Context, Error, Kind, Result};
use crate::catalog::metadata::{KeyOwner, KeyRecord};
use crate::config::{Settings, shown_file};
use crate::helper::rewrap::by_helper;
use crate::kms::{Failure, KeyRef, KmsKey};

/// Which KMS keys wrap a new data key besides.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum AlsoKeys {
    /// Those of the settings; or, where the new data key takes the place of another, those of that one.
    #[default]
    Usual,
    /// These, perhaps none, by id, ARN or alias.
    These(Vec<String>),
}

/// KMS keys that are going to wrap a data key besides.
pub struct Also {
    root: Root,
    settings: Settings,
    keys: Vec<KeyRef>,
    /// Who wants that.
    from: From,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum From {
    /// Whoever gave the command, for this data key.
    Command,
    Settings,
    /// Another data key of the volume is wrapped by them.
    Record,
}

impl Also {
    /// Those that `wanted` means for a data key that takes no other's place.
    ///
    /// # Errors
    /// `Usage` for what names no key.
    pub(super) fn new(store: &Store, wanted: &AlsoKeys) -> Result<Self> {
        let (names, from) = match wanted {
            AlsoKeys::Usual => (&store.settings().also_keys, From::Settings),
            AlsoKeys::These(names) => (names, From::Command),
        };
        let keys = names.iter().map(|name| store.reference(name)).collect::<Result<Vec<_>>>();
        let keys = keys.context(|| match from {
            From::Settings => format!("also-keys in {}", shown_file().display()),
            From::Command | From::Record => "--also-key".to_owned(),
        })?;
        Ok(Also::of(store, keys, from))
    }

    /// Those that `wanted` means for a data key that takes the place of one: without a wish, the KMS keys
    /// that wrap that one, except for `first`.
    ///
    /// # Errors
    /// As [`Also::new`]; `Unsupported` for a KMS that this version does not have.
    pub(super) fn as_of(
        store: &Store,
        wanted: &AlsoKeys,
        record: &KeyRecord,
        first: &KmsKey,
    ) -> Result<Self> {
        if *wanted != AlsoKeys::Usual {
            return Also::new(store, wanted);
        }
        let others = record.slots().iter().map(|slot| slot.kms_key()).filter(|key| key != first);
        let named = |key: KmsKey| {
            KeyRef::of_provider(&key.provider, &key.key_id).ok_or_else(|| {
                Error::new(Kind::Unsupported, format!("{key}: this version does not have that KMS"))
            })
        };
        Ok(Also::of(store, others.map(named).collect::<Result<_>>()?, From::Record))
    }

    /// Those that `wanted` names for a data key that there is already: the settings are about new ones.
    ///
    /// # Errors
    /// As [`Also::new`].
    pub(super) fn named(store: &Store, wanted: &AlsoKeys) -> Result<Self> {
        match wanted {
            AlsoKeys::Usual => Ok(Also::of(store, Vec::new(), From::Command)),
            AlsoKeys::These(_) => Also::new(store, wanted),
        }
    }

    fn of(store: &Store, keys: Vec<KeyRef>, from: From) -> Self {
        Also { root: store.root().clone(), settings: store.settings().clone(), keys, from }
    }

    /// This data key of `owner`, wrapped by all of these as well. Nobody sees it outside of a helper process.
    ///
    /// # Errors
    /// Those of the KMSs.
    pub(super) fn wrap(&self, owner: KeyOwner, record: KeyRecord) -> Result<KeyRecord, Failure> {
        self.keys.iter().try_fold(record, |record, to| {
            let slot = by_helper(&self.root, &self.settings, owner, &record, None, to);
            let slot = slot.map_err(|e| self.explained(e, to))?;
            // Two names may mean one key; and what a data key was made under may be among these.
            Ok(if record.slot_by(&slot.kms_key()).is_some() { record } else { record.and(slot) })
        })
    }

    /// This new data key of `owner`, wrapped by all of these as well.
    ///
    /// # Errors
    /// As [`Also::wrap`]; `Usage` where the command names one key twice, and so fewer keys than it seems.
    pub(super) fn wrap_new(&self, owner: KeyOwner, record: KeyRecord) -> Result<KeyRecord, Failure> {
        let record = self.wrap(owner, record)?;
        if self.from == From::Command && record.slots().len() <= self.keys.len() {
            let message = "two of the KMS keys that are named are one, which wraps the data key once";
            return Err(Error::new(Kind::Usage, message).into());
        }
        Ok(record)
    }

    fn explained(&self, e: Failure, to: &KeyRef) -> Failure {
        let attempt = format!("have {to} wrap the data key as well");
        if self.from == From::Command {
            return e.context(attempt);
        }
        let whose = match self.from {
            From::Settings => format!("also-keys in {}", shown_file().display()),
            _ => "it wraps the present data key".into(),
        };
        e.context(format!("{attempt} ({whose}; --no-also-keys does without)"))
    }
}
