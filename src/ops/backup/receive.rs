//! A volume comes from another host that sends it by a place.

use super::restore::{check_name, pulled_before};
use super::step::{Made, Site, Step};
use super::{For, Session, Target};
use crate::backup::moved;
use crate::backup::saved::{SavedVolume, Sent};
use crate::base::{Context, Error, Kind, Result, Timestamp};
use crate::catalog::{SnapshotId, VolumeId};
use crate::disk::transfer::Watch;
use crate::kms::embedded::root_key::passphrase;
use crate::ops::need::Budget;
use crate::ops::{Store, delete};
use std::collections::{BTreeMap, HashSet};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// How often it is looked whether something was sent.
const LOOK: Duration = Duration::from_millis(500);

/// What is to be received, and how.
#[derive(Clone, Debug, Default)]
pub struct WantedReceive {
    /// The volume, by the name or id that it had; without one, the only one that was sent.
    pub volume: Option<String>,
    /// The KMS key that wraps its data keys from now on.
    pub key: Option<String>,
    /// What may be used of the file system.
    pub budget: Budget,
    /// How long it is waited for.
    pub patience: Duration,
}

/// A volume that has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Received {
    /// The volume here.
    pub made: Made,
    /// The snapshot in the place that it was made of.
    pub snapshot: SnapshotId,
    /// The volume, as it was called where it was sent.
    pub volume: VolumeId,
    /// Its name.
    pub name: Option<String>,
}

/// Receives a volume: it is pulled, every block proved, and made a volume again. Between the two,
/// whoever has sent it is told. `watch` is told how far it has come; an error of it ends it, and
/// the same command goes on.
///
/// # Errors
/// `NotFound` if nothing was sent in time; `Usage` if several volumes were; `Busy` if its name is taken here,
/// or if it was called off; those of the place and the KMS. It is still with whoever has sent it then, unless
/// the error says otherwise.
pub fn receive(store: &Store, target: &Target, wanted: &WantedReceive, watch: Watch<'_>) -> Result<Received> {
    let _passphrase = passphrase::inherited_descriptors().map_err(Error::from)?;
    let catalog = store.catalog();
    let found = find(store, target, wanted, watch)?;
    let Found { snapshot, volume, name, .. } = found;
    check_name(&catalog, name.as_deref())?;
    let site = Site { root: store.root().clone(), config: None };
    let pulled = match pulled_before(&catalog, &snapshot.to_string())? {
        Some(id) => id,
        None => site.pull_to_restore(snapshot, target, wanted.key.clone(), wanted.budget, watch)?,
    };
    if let Err(e) = site.run(&Step::Accept(pulled, snapshot, target.clone()), watch) {
        if e.kind() == Kind::Busy {
            delete::delete_snapshot(&catalog, pulled)?;
        }
        return Err(e);
    }
    let told = "whoever has sent the volume was told that it is here, and it is, as a snapshot; the same \
                command makes the volume of it";
    let made = site.make(pulled, watch).context(|| told)?;
    Ok(Received { made, snapshot, volume, name })
}

/// A volume that was sent.
struct Found {
    snapshot: SnapshotId,
    volume: VolumeId,
    name: Option<String>,
    created: Timestamp,
    moment: Uuid,
}

/// Waits for a volume that was sent.
fn find(store: &Store, target: &Target, wanted: &WantedReceive, watch: Watch<'_>) -> Result<Found> {
    let begun = Instant::now();
    // A place begins with the first push.
    let mut session = loop {
        match Session::open_if_begun(store, target, For::Reading)? {
            Some(session) => break session,
            None if begun.elapsed() >= wanted.patience => return Err(nothing(target)),
            None => {}
        }
        watch(0, 0)?;
        std::thread::sleep(LOOK);
    };
    let mut others: HashSet<SnapshotId> = HashSet::new();
    loop {
        let mut sent: BTreeMap<VolumeId, Vec<Found>> = BTreeMap::new();
        for id in session.snapshots()? {
            if others.contains(&id) {
                continue;
            }
            match look(store, &mut session, id, wanted)? {
                Some(found) => sent.entry(found.volume).or_default().push(found),
                None => drop(others.insert(id)),
            }
        }
        let count = sent.len();
        match sent.into_values().next() {
            Some(of_volume) if count == 1 => {
                if let Some(found) = of_volume.into_iter().max_by_key(|it| (it.created, it.moment)) {
                    return Ok(found);
                }
            }
            Some(_) => {
                let message = format!("{} has {count} volumes that were sent; name one", session.url);
                return Err(Error::new(Kind::Usage, message));
            }
            None => {}
        }
        if begun.elapsed() >= wanted.patience {
            return Err(nothing(target));
        }
        watch(0, 0)?;
        std::thread::sleep(LOOK);
    }
}

fn nothing(target: &Target) -> Error {
    let message = format!("{} has no volume that was sent and not received yet", target.url);
    Error::new(Kind::NotFound, message)
}

/// What a snapshot is, if it is the last one of a volume that was sent, that is wanted and that nobody has.
fn look(
    store: &Store,
    session: &mut Session,
    id: SnapshotId,
    wanted: &WantedReceive,
) -> Result<Option<Found>> {
    let claim = match session.claim_of_known(id) {
        Ok(claim) => claim,
        Err(e) if matches!(e.kind(), Kind::Corrupt | Kind::NotFound) => {
            log::warn!("passed over: {e}");
            return Ok(None);
        }
        Err(e) => return Err(e),
    };
    let snapshot = &claim.claimed().snapshot;
    let Some(saved) = SavedVolume::of(snapshot.label()) else { return Ok(None) };
    let (volume, name, created) = (snapshot.volume(), saved.name, snapshot.created());
    let moment = saved.moment;
    let is_meant = |text: &String| name.as_ref() == Some(text) || volume.to_string() == *text;
    if saved.sent != Some(Sent::Last) || !wanted.volume.as_ref().is_none_or(is_meant) {
        return Ok(None);
    }
    let is_decided = session.carrier.exists(&moved::moved_of(id))?;
    // What this host has pulled and not made a volume of yet.
    if is_decided && pulled_before(&store.catalog(), &id.to_string())?.is_none() {
        return Ok(None);
    }
    Ok(Some(Found { snapshot: id, volume, name, created, moment }))
}

/// Says in the place that the volume has come of which `pulled` was pulled from there as `source`.
///
/// # Errors
/// `Busy` if it was called off before, or if another host has it; those of the KMS and of the place.
pub(super) fn accept(store: &Store, pulled: SnapshotId, source: SnapshotId, target: &Target) -> Result<()> {
    let snapshot = store.catalog().load_snapshot(pulled)?;
    let mut session = Session::open(store, target, For::Removing)?;
    let keys = super::keys_of(store, &snapshot).map_err(|failure| failure.error)?;
    crate::sandbox::give_up_network()?;
    let top = keys.first().ok_or_else(|| Error::new(Kind::Corrupt, "it has no data key"))?;
    let (name, bytes) = (moved::moved_of(source), moved::received(source, pulled, top));
    let is_ours = session.carrier.put(&name, &bytes, crate::place::Put::IfNew)?
        || session.carrier.get(&name, moved::MAX)?.is_some_and(|there| there == bytes);
    session.carrier.sync()?;
    match is_ours {
        true => Ok(()),
        false => Err(Error::new(Kind::Busy, "whoever has sent it has called it off; it is still there")),
    }
}

/// Fails unless a host that has the data key says that it has the volume whose last snapshot this is.
///
/// # Errors
/// `Corrupt` for anything else; those of the KMS and of the place.
pub(super) fn check_received(store: &Store, last: SnapshotId, target: &Target) -> Result<()> {
    let snapshot = store.catalog().load_snapshot(last)?;
    let mut session = Session::open(store, target, For::Reading)?;
    let said = session.carrier.get(&moved::moved_of(last), moved::MAX)?.unwrap_or_default();
    let keys = super::keys_of(store, &snapshot).map_err(|failure| failure.error)?;
    match snapshot.top_key().is_some() && is_said_by_any(&said, last, &keys) {
        true => Ok(()),
        false => {
            let message = "what the place has as the other host's word was not written by somebody who has \
                           the data key: the volume stays here";
            Err(Error::new(Kind::Corrupt, message))
        }
    }
}

/// The top layer's key has another number in a manifest than at home.
fn is_said_by_any(said: &[u8], last: SnapshotId, keys: &[crate::crypt::BackupKeys]) -> bool {
    keys.iter().any(|keys| moved::is_received(said, last, keys))
}
