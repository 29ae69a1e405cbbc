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
use crate::catalog::metadata::KeyRecord;
use crate::catalog::slots::KeySlot;
use crate::catalog::{Catalog, VolumeId};
use crate::events::Event;
use crate::kms::patience::Patience;
use crate::kms::{KeyProvider, KeyState, KmsError, KmsKey};
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
    /// The key store that has it is not connected.
    Unavailable,
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
            Health::Unavailable => "unavailable",
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

/// What is known of a key from the last time that it was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Known {
    /// Which key.
    #[serde(flatten)]
    pub key: KmsKey,
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
    /// Who has data keys that it wraps.
    pub volumes: NeededBy,
    /// Those of them that have a data key which no other KMS key gives, as far as is known.
    pub without_another: Vec<VolumeId>,
}

impl Changed {
    /// Whether the key cannot be used, and every volume has another one that can.
    fn is_spared(&self) -> bool {
        self.now.state != Health::Usable && self.without_another.is_empty()
    }

    /// What it means for those who need it, where some have another key; none where it goes without saying.
    pub fn others(&self) -> Option<String> {
        let (all, without) = (self.volumes.len(), self.without_another.len());
        match without {
            _ if self.now.state == Health::Usable || without == all => None,
            0 => Some("each volume that it is of has another key that can be used".into()),
            _ => Some(format!(
                "{without} of the {all} volumes that it is of have no other key that can be used"
            )),
        }
    }
}

/// What a volume's data keys can be had by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outlook {
    /// For the data key that is worst off: the state of the KMS key that is best; none: nobody has asked.
    pub worst: Option<Health>,
    /// When that one is deleted, if it waits for that.
    pub deletion: Option<Timestamp>,
    /// Whether all KMS keys that wrap its data keys can be used.
    pub all_usable: bool,
}

impl Outlook {
    /// Of these data keys, with what is known of KMS keys; none for no data key.
    pub fn of(keys: &[KeyRecord], known: &BTreeMap<KmsKey, Known>) -> Option<Self> {
        let best = |key: &KeyRecord| {
            let known: Vec<Option<&Known>> =
                key.slots().iter().map(|slot| known.get(&slot.kms_key())).collect();
            let best = known.iter().copied().flatten().min_by_key(|known| known.state);
            // One that nobody has asked may be better than the best of the others.
            match best {
                Some(best) if best.state != Health::Usable && known.contains(&None) => None,
                best => best,
            }
        };
        let best: Vec<Option<&Known>> = keys.iter().map(best).collect();
        let worst = match best.contains(&None) {
            true => None,
            false => best.iter().copied().flatten().max_by_key(|known| known.state),
        };
        let is_usable =
            |slot: &KeySlot| known.get(&slot.kms_key()).is_some_and(|it| it.state == Health::Usable);
        let all_usable = keys.iter().flat_map(KeyRecord::slots).all(is_usable);
        let outlook = Outlook {
            worst: worst.map(|it| it.state),
            deletion: worst.and_then(|it| it.deletion),
            all_usable,
        };
        (!keys.is_empty()).then_some(outlook)
    }
}

/// Those of `volumes` that have a data key which `key` wraps, and which no KMS key gives that is usable now.
fn without_another(catalog: &Catalog, key: &KmsKey, volumes: &NeededBy, known: &[Known]) -> Vec<VolumeId> {
    let is_usable = |slot: &KeySlot| known.iter().any(|it| slot.is_by(&it.key) && it.state == Health::Usable);
    let has_another =
        |record: &KeyRecord| record.slots().iter().any(|slot| !slot.is_by(key) && is_usable(slot));
    let is_without = |id: &VolumeId| match catalog.load(*id) {
        Ok(volume) => {
            volume.keys().iter().any(|record| record.slot_by(key).is_some() && !has_another(record))
        }
        Err(_) => true,
    };
    volumes.iter().map(|(id, _)| *id).filter(is_without).collect()
}

/// What was known of each key when it was asked for last; nothing where nobody has ever asked.
pub fn last_known(root: &Root) -> BTreeMap<KmsKey, Known> {
    let bytes = files::read(&root.key_watch(), MAX_LEN).unwrap_or_default();
    let written = serde_json::from_slice::<Written>(&bytes).ok().filter(|it| it.format == FORMAT);
    written.into_iter().flat_map(|it| it.keys).map(|known| (known.key.clone(), known)).collect()
}

/// The keys that volumes need, those that attached ones need first, each with its volumes.
///
/// # Errors
/// Those of listing the volumes. One whose record cannot be read needs nothing here.
pub fn needed(catalog: &Catalog) -> Result<Vec<(KmsKey, NeededBy)>> {
    let mut needed: BTreeMap<KmsKey, NeededBy> = BTreeMap::new();
    for metadata in catalog.list()?.into_iter().filter_map(|entry| entry.metadata.ok()) {
        if metadata.keys().is_empty() {
            continue;
        }
        let volume = (metadata.id(), catalog.held(metadata.id())? != Held::Free);
        for slot in metadata.keys().iter().flat_map(KeyRecord::slots) {
            let volumes = needed.entry(slot.kms_key()).or_default();
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
    let (mut known, mut news) = (Vec::new(), Vec::new());
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
            news.push((now.clone(), volumes));
        }
        known.push(now);
    }
    let mut changed = Vec::new();
    for (now, volumes) in news {
        // By now it is known how it is with their other keys.
        let without_another = without_another(&catalog, &now.key, &volumes, &known);
        let it = Changed { now, volumes, without_another };
        // Told first, and noted as told then: rather twice than never.
        events.append(&event(&it))?;
        changed.push(it);
    }
    let written = Written { format: FORMAT, keys: known };
    let bytes = serde_json::to_vec_pretty(&written).expect("strings, numbers and lists of them");
    replace_file(&root.key_watch(), &bytes)?;
    Ok(changed)
}

fn event(changed: &Changed) -> Event {
    let now = &changed.now;
    let mut cause = match now.state {
        Health::Usable => "the key can be used again".to_owned(),
        _ => now.message.clone().unwrap_or_else(|| now.state.words().to_owned()),
    };
    if let Some(deletion) = now.deletion {
        cause.push_str(&format!(" It is deleted at {deletion}."));
    }
    if let Some(others) = changed.others() {
        cause.push_str(&format!(" ({others})"));
    }
    // Those first that nothing else helps: an event names no more than it has room for.
    let without = changed.without_another.iter().copied();
    let others = changed.volumes.iter().map(|(id, _)| *id).filter(|id| !changed.without_another.contains(id));
    let result = if changed.is_spared() { "degraded" } else { now.state.result() };
    Event::watch_key(without.chain(others).collect(), &now.key.key_id, result, cause)
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
    fn ask(&mut self, key: &KmsKey, was: Option<&Known>) -> Option<Known> {
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
        KeyState::Enabled | KeyState::Updating => Health::Usable,
        KeyState::Disabled => Health::Disabled,
        KeyState::PendingDeletion | KeyState::PendingReplicaDeletion => Health::PendingDeletion,
        KeyState::PendingImport => Health::PendingImport,
        KeyState::Unavailable => Health::Unavailable,
    }
}

fn health_of(e: &KmsError) -> Health {
    match e {
        KmsError::Unavailable(_) | KmsError::Transport(_) => Health::Unreachable,
        KmsError::Disabled(_) => Health::Disabled,
        KmsError::PendingDeletion(_) => Health::PendingDeletion,
        KmsError::PendingImport(_) => Health::PendingImport,
        KmsError::KeyStoreDisconnected(_) => Health::Unavailable,
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
        let key = KmsKey { provider: "embedded".into(), key_id: "arn:x".into() };
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

    fn slot(id: &str) -> KeySlot {
        KeySlot::new("aws", crate::kms::WrappedKey { key_id: id.into(), blob: vec![1] })
    }

    #[test]
    fn a_volume_is_as_well_off_as_the_best_key_of_its_worst_data_key() {
        let now = Timestamp::now();
        let known = |states: &[(&str, Health)]| -> BTreeMap<KmsKey, Known> {
            let known = |(id, state): &(&str, Health)| {
                let key = slot(id).kms_key();
                let (deletion, message) = (None, None);
                (key.clone(), Known { key, state: *state, deletion, message, since: now, checked: now })
            };
            states.iter().map(known).collect()
        };
        let (a, b, c) =
            (KeyRecord::new(slot("a")), KeyRecord::new(slot("a")).and(slot("b")), KeyRecord::new(slot("c")));
        let outlook = |keys: &[KeyRecord], states: &[(&str, Health)]| {
            let outlook = Outlook::of(keys, &known(states)).unwrap();
            (outlook.worst, outlook.all_usable)
        };
        use Health::{Disabled, Unreachable, Usable};
        assert_eq!(Outlook::of(&[], &known(&[])), None);
        assert_eq!(outlook(std::slice::from_ref(&a), &[("a", Disabled)]), (Some(Disabled), false));
        assert_eq!(
            outlook(std::slice::from_ref(&b), &[("a", Disabled), ("b", Usable)]),
            (Some(Usable), false)
        );
        assert_eq!(outlook(std::slice::from_ref(&b), &[("a", Usable)]), (Some(Usable), false));
        assert_eq!(outlook(std::slice::from_ref(&b), &[("a", Disabled)]), (None, false), "b may be usable");
        let both = [("a", Disabled), ("b", Unreachable)];
        assert_eq!(outlook(std::slice::from_ref(&b), &both), (Some(Unreachable), false));
        let all = [("a", Usable), ("b", Usable), ("c", Disabled)];
        assert_eq!(outlook(&[b.clone(), c.clone()], &all), (Some(Disabled), false));
        assert_eq!(outlook(&[a, b], &all), (Some(Usable), true));
        assert_eq!(outlook(&[c], &[]), (None, false));
    }
}
