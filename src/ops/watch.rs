//! Whether the KMS keys of a store's volumes can be used: asked from time to time, so that a key that cannot
//! be used any more is heard of before the next attach is refused.
//!
//! A round asks DescribeKey for each key that a volume needs, once, those of attached volumes first and with
//! pauses in between, and records a `watchKey` event where the answer is not what it was. What was answered
//! last lies in `key-watch.json` in the store. That file is believed for nothing but what was told already,
//! and shown: whoever can write it can have an event told twice, or keep one from being told.
#![forbid(unsafe_code)]

use super::Store;
use crate::base::root::{Root, create_dir_durable, files, replace_file};
use crate::base::{Context, Result, Timestamp, locks, printable};
use crate::catalog::lock::Held;
use crate::catalog::{Catalog, VolumeId};
use crate::events::Event;
use crate::kms::patience::Patience;
use crate::kms::{KeyProvider, KeyState, KmsError};
use nix::fcntl::OFlag;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;

/// How long a round waits between two questions: a KMS has limits on questions for all its clients together.
const GAP: Duration = Duration::from_millis(200);
/// Longer files are not ours, in bytes.
const MAX_LEN: u64 = 16 << 20;
/// Characters that are kept of what a KMS says.
const MAX_MESSAGE: usize = 1000;
const FORMAT: u32 = 1;

/// In what state a key was when it was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Health {
    /// The next attach gets its data key.
    Usable,
    /// The KMS was not reached, or could not answer: nothing is known of the key.
    Unreachable,
    /// It is switched off.
    Disabled,
    /// It waits for its deletion.
    PendingDeletion,
    /// It has no key material.
    PendingImport,
    /// The KMS has no such key.
    Missing,
    /// The KMS, or the settings, do not let this host use it.
    Refused,
    /// Something else is in the way; the message says what.
    Broken,
}

impl Health {
    /// In words.
    pub fn words(self) -> &'static str {
        match self {
            Health::Usable => "usable",
            Health::Unreachable => "unreachable",
            Health::Disabled => "disabled",
            Health::PendingDeletion => "pending deletion",
            Health::PendingImport => "pending import",
            Health::Missing => "missing",
            Health::Refused => "refused",
            Health::Broken => "broken",
        }
    }

    /// What an event has as its result.
    fn result(self) -> &'static str {
        match self {
            Health::Usable => "usable",
            Health::Unreachable => "unreachable",
            Health::PendingDeletion => "pending-deletion",
            _ => "unusable",
        }
    }
}

/// A KMS key, as records name it: its KMS, and its canonical id.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct KeyName {
    /// The name of its KMS.
    pub provider: String,
    /// Its ARN.
    pub key_id: String,
}

/// What is known of a key from the last time that it was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Known {
    /// Which key.
    #[serde(flatten)]
    pub key: KeyName,
    /// In what state it was.
    pub state: Health,
    /// When it is deleted, if it waits for that and the KMS says so.
    pub deletion: Option<Timestamp>,
    /// What is in the way, in the KMS's words.
    pub message: Option<String>,
    /// Since when it has been in this state, as far as was seen.
    pub since: Timestamp,
    /// When it was asked for last.
    pub checked: Timestamp,
}

#[derive(Serialize, Deserialize)]
struct Written {
    format: u32,
    keys: Vec<Known>,
}

/// The volumes that need a key, and whether somebody has them attached.
pub type NeededBy = Vec<(VolumeId, bool)>;

/// A key whose state is not what it was.
pub struct Changed {
    /// What is known of it now.
    pub now: Known,
    /// Who needs it.
    pub volumes: NeededBy,
}

/// What was known of each key when it was asked for last; nothing where nobody has ever asked.
pub fn last_known(root: &Root) -> BTreeMap<KeyName, Known> {
    let bytes = files::read(&root.key_watch(), MAX_LEN).unwrap_or_default();
    let written = serde_json::from_slice::<Written>(&bytes).ok().filter(|it| it.format == FORMAT);
    written.into_iter().flat_map(|it| it.keys).map(|known| (known.key.clone(), known)).collect()
}

/// The keys that volumes need, those that attached ones need first, each with its volumes.
///
/// # Errors
/// Those of listing the volumes. One whose record cannot be read needs nothing here.
pub fn needed(catalog: &Catalog) -> Result<Vec<(KeyName, NeededBy)>> {
    let mut needed: BTreeMap<KeyName, NeededBy> = BTreeMap::new();
    for metadata in catalog.list()?.into_iter().filter_map(|entry| entry.metadata.ok()) {
        if metadata.keys().is_empty() {
            continue;
        }
        let volume = (metadata.id(), catalog.held(metadata.id())? != Held::Free);
        for key in metadata.keys() {
            let (provider, key_id) = (key.provider.clone(), key.wrapped.key_id.clone());
            let volumes = needed.entry(KeyName { provider, key_id }).or_default();
            if volumes.last() != Some(&volume) {
                volumes.push(volume);
            }
        }
    }
    let mut needed: Vec<_> = needed.into_iter().collect();
    needed.sort_by_key(|(_, volumes)| !volumes.iter().any(|(_, attached)| *attached));
    Ok(needed)
}

/// Asks for every key once, records an event for each that is not as it was, and returns those. Between two
/// questions it calls `pause`, which says whether to go on. While another process is at a round of this
/// store, this one does nothing.
///
/// A key that is usable when it is seen for the first time is no news.
///
/// # Errors
/// Those of listing the volumes, and of the file system. What a KMS answers is none.
pub fn round(store: &Store, pause: &mut dyn FnMut(Duration) -> bool) -> Result<Vec<Changed>> {
    let (root, catalog, events) = (store.root(), store.catalog(), store.events());
    create_dir_durable(root.path())?;
    let path = root.path().join("key-watch.lock");
    let lock = files::open_with(&path, OFlag::O_WRONLY | OFlag::O_CREAT);
    let lock = lock.context(|| format!("open {}", path.display()))?;
    if !locks::try_lock(&lock, locks::Kind::Exclusive, locks::Bytes::ALL)? {
        return Ok(Vec::new());
    }
    let before = last_known(root);
    let (mut known, mut changed) = (Vec::new(), Vec::new());
    let mut providers = Providers { store, opened: BTreeMap::new(), unreachable: BTreeMap::new() };
    let mut goes_on = true;
    for (n, (key, volumes)) in needed(&catalog)?.into_iter().enumerate() {
        let was = before.get(&key);
        goes_on = goes_on && (n == 0 || pause(GAP));
        if !goes_on {
            known.extend(was.cloned());
            continue;
        }
        let Some(now) = providers.ask(&key, was) else {
            known.extend(was.cloned());
            continue;
        };
        let is_news = was.map_or(now.state != Health::Usable, |was| {
            (was.state, was.deletion) != (now.state, now.deletion)
        });
        if is_news {
            // Told first, and noted as told then: rather twice than never.
            let volumes_of_event: Vec<VolumeId> = volumes.iter().map(|(id, _)| *id).collect();
            events.append(&event(&now, volumes_of_event))?;
            changed.push(Changed { now: now.clone(), volumes });
        }
        known.push(now);
    }
    let written = Written { format: FORMAT, keys: known };
    let bytes = serde_json::to_vec_pretty(&written).expect("strings, numbers and lists of them");
    replace_file(&root.key_watch(), &bytes)?;
    Ok(changed)
}

fn event(now: &Known, volumes: Vec<VolumeId>) -> Event {
    let mut cause = match now.state {
        Health::Usable => "the key can be used again".to_owned(),
        _ => now.message.clone().unwrap_or_else(|| now.state.words().to_owned()),
    };
    if let Some(deletion) = now.deletion {
        cause.push_str(&format!(" It is deleted at {deletion}."));
    }
    Event::watch_key(volumes, &now.key.key_id, now.state.result(), cause)
}

/// The KMSs that a round has asked, or why one cannot be asked.
struct Providers<'a> {
    store: &'a Store,
    opened: BTreeMap<String, Result<Box<dyn KeyProvider>, KmsError>>,
    /// Those that were not reached, each in a region: they are not asked again in this round.
    unreachable: BTreeMap<(String, String), KmsError>,
}

impl Providers<'_> {
    /// What is known of a key now; none if the KMS was too busy to say.
    fn ask(&mut self, key: &KeyName, was: Option<&Known>) -> Option<Known> {
        // arn:aws:kms:REGION:…
        let region = key.key_id.split(':').nth(3).unwrap_or_default();
        let place = (key.provider.clone(), region.to_owned());
        // The next round is soon enough.
        let open = || self.store.provider_within(&key.provider, Some(Patience(Duration::ZERO)));
        let described = match self.opened.entry(key.provider.clone()).or_insert_with(open) {
            Ok(provider) => match self.unreachable.get(&place) {
                Some(e) => Err(e.clone()),
                None => provider.describe(&key.key_id),
            },
            Err(e) => Err(e.clone()),
        };
        match &described {
            Err(KmsError::Throttled(_)) => return None,
            Err(e @ KmsError::Transport(_)) => drop(self.unreachable.insert(place, e.clone())),
            _ => {}
        }
        let (state, deletion, problem) = match described {
            Ok(key) => (health(key.state), key.deletion, key.state.refusal(&key.key_id)),
            Err(e) => (health_of(&e), None, Some(e)),
        };
        let message =
            |e: KmsError| printable::line(&e.to_string()).chars().take(MAX_MESSAGE).collect::<String>();
        let checked = Timestamp::now();
        let since = was.filter(|was| was.state == state).map_or(checked, |was| was.since);
        Some(Known { key: key.clone(), state, deletion, message: problem.map(message), since, checked })
    }
}

fn health(state: KeyState) -> Health {
    match state {
        KeyState::Enabled => Health::Usable,
        KeyState::Disabled => Health::Disabled,
        KeyState::PendingDeletion => Health::PendingDeletion,
        KeyState::PendingImport => Health::PendingImport,
    }
}

fn health_of(e: &KmsError) -> Health {
    match e {
        KmsError::Unavailable(_) | KmsError::Transport(_) => Health::Unreachable,
        KmsError::Disabled(_) => Health::Disabled,
        KmsError::PendingDeletion(_) => Health::PendingDeletion,
        KmsError::PendingImport(_) => Health::PendingImport,
        KmsError::NotFound(_) => Health::Missing,
        KmsError::AccessDenied(_) | KmsError::NotAuthenticated(_) | KmsError::NotAllowed(_) => {
            Health::Refused
        }
        _ => Health::Broken,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_has_written_here_is_nothing_known() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(dir.path());
        assert!(last_known(&root).is_empty());
        for text in
            ["", "{", "{\"format\":2,\"keys\":[]}", "{\"format\":1,\"keys\":[{\"state\":\"x\"}]}", "\0\0"]
        {
            std::fs::write(root.key_watch(), text).unwrap();
            assert!(last_known(&root).is_empty(), "{text}");
        }
        let key = KeyName { provider: "embedded".into(), key_id: "arn:x".into() };
        let now = Timestamp::now();
        let known = Known {
            key: key.clone(),
            state: Health::PendingDeletion,
            deletion: Some(now),
            message: None,
            since: now,
            checked: now,
        };
        let written = serde_json::to_vec(&Written { format: FORMAT, keys: vec![known.clone()] }).unwrap();
        std::fs::write(root.key_watch(), written).unwrap();
        assert_eq!(last_known(&root), BTreeMap::from([(key, known)]));
    }

    #[test]
    fn a_kms_that_is_not_reached_says_nothing_of_a_key() {
        assert_eq!(health_of(&KmsError::Transport(String::new())), Health::Unreachable);
        assert_eq!(health_of(&KmsError::NotFound(String::new())), Health::Missing);
        assert_eq!(health_of(&KmsError::NotAllowed(String::new())), Health::Refused);
        assert_eq!(health_of(&KmsError::Corrupt(String::new())), Health::Broken);
    }
}
