//! A volume comes from another host that sends it by a place.

use super::pull::Ahead;
use super::restore::{check_name, made_before, made_of, pulled_before};
use super::step::{Came, Made, Site, Step, other};
use super::{For, Session, Target};
use crate::backup::marks::Marks;
use crate::backup::moved;
use crate::backup::saved::{SavedVolume, Sent};
use crate::base::{Context, Error, Kind, Result, Timestamp};
use crate::catalog::store_locks::RecordsLock;
use crate::catalog::{Catalog, SnapshotId, VolumeId};
use crate::disk::transfer::Watch;
use crate::kms::embedded::root_key::passphrase;
use crate::ops::copy::full;
use crate::ops::need::Budget;
use crate::ops::{Store, delete};
use crate::place::Put;
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
    /// Whether the most of it was pulled while the volume was used there.
    pub came_ahead: bool,
}

/// Receives a volume: it is pulled, every block proved, and made a volume again. Between the two, whoever
/// has sent it is told. What is there while the volume is still used is pulled ahead, so that little is
/// left for when the volume stands still. `watch` is told how far it has come; an error of it ends it, and
/// the same command goes on.
///
/// # Errors
/// `NotFound` if nothing was sent in time; `Usage` if several volumes were; `Busy` if its name is taken here,
/// or if it was called off; those of the place and the KMS. It is still with whoever has sent it then, unless
/// the error says otherwise: what was pulled is kept here then.
pub fn receive(store: &Store, target: &Target, wanted: &WantedReceive, watch: Watch<'_>) -> Result<Received> {
    let _passphrase = passphrase::inherited_descriptors().map_err(Error::from)?;
    receive_by(store, target, wanted, &|| Ok(()), watch)
}

/// As [`receive`], as long as `is_there` does not fail, until the volume is taken: that is whether whoever
/// sends it is there.
pub(super) fn receive_by(
    store: &Store,
    target: &Target,
    wanted: &WantedReceive,
    is_there: &dyn Fn() -> Result<()>,
    watch: Watch<'_>,
) -> Result<Received> {
    let site = Site { root: store.root().clone(), config: None };
    let mut receiving =
        Receiving { store, target, wanted, is_there, site, ahead: None, over: HashSet::new() };
    let received = receiving.run(watch);
    // What was pulled ahead, and has not become the volume, is of no use to anybody.
    receiving.forget_ahead();
    received
}

/// What was pulled of a volume while that was still used.
struct Pulled {
    /// The moment that the sending is of.
    moment: Uuid,
    /// The snapshot in the place, and the one in the making here; none if it could not be pulled.
    snapshots: Option<(SnapshotId, SnapshotId)>,
}

struct Receiving<'a> {
    store: &'a Store,
    target: &'a Target,
    wanted: &'a WantedReceive,
    is_there: &'a dyn Fn() -> Result<()>,
    site: Site,
    ahead: Option<Pulled>,
    /// The moments of what was sent and is decided.
    over: HashSet<Uuid>,
}

impl Receiving<'_> {
    fn run(&mut self, watch: Watch<'_>) -> Result<Received> {
        let catalog = self.store.catalog();
        let found = self.find(watch)?;
        let Found { snapshot, volume, name, moment, .. } = found;
        let pulled = pulled_before(&catalog, &snapshot.to_string())?;
        check_is_new(&catalog, snapshot, pulled, name.as_deref())?;
        let mut came_ahead = false;
        let pulled = match pulled {
            Some(id) => id,
            None => {
                let ahead = self.ahead.as_ref().filter(|it| it.moment == moment).and_then(|it| it.snapshots);
                came_ahead = ahead.is_some();
                self.pull(snapshot, ahead.map_or(Ahead::No, |(first, copy)| Ahead::Was(first, copy)), watch)?
            }
        };
        (self.is_there)()?;
        match self.site.run(&Step::Accept(pulled, snapshot, self.target.clone()), watch)? {
            Came::Done => {}
            // Nobody can have been told that it is here: it is still where it was.
            Came::CalledOff => {
                delete::delete_snapshot(&catalog, pulled)?;
                let message = "whoever has sent it has called it off; it is still there";
                return Err(Error::new(Kind::Busy, message));
            }
            _ => return Err(other()),
        }
        let told = || {
            format!(
                "whoever has sent the volume was told that it is here, and it is, as a snapshot; \"sealblk \
                 volume receive {}\" makes the volume of it",
                self.target.url
            )
        };
        let made = self.site.make(pulled, watch).context(told)?;
        if let Err(e) = Marks::of(&self.target.url).and_then(|marks| marks.forget_said(pulled)) {
            log::warn!("{e}");
        }
        Ok(Received { made, snapshot, volume, name, came_ahead })
    }

    fn pull(&self, snapshot: SnapshotId, ahead: Ahead, watch: Watch<'_>) -> Result<SnapshotId> {
        let mut watch = |done, total| {
            (self.is_there)()?;
            watch(done, total)
        };
        let (key, budget) = (self.wanted.key.clone(), self.wanted.budget);
        self.site.pull_to_restore(snapshot, self.target, key, budget, ahead, &mut watch)
    }

    /// Waits for a volume that was sent.
    fn find(&mut self, watch: Watch<'_>) -> Result<Found> {
        let begun = Instant::now();
        // A place begins with the first push.
        let mut session = loop {
            match Session::open_if_begun(self.store, self.target, For::Removing)? {
                Some(session) => break session,
                None => self.wait(begun, watch)?,
            }
        };
        let (mut others, mut first): (HashSet<SnapshotId>, Vec<Found>) = Default::default();
        loop {
            let mut sent: BTreeMap<VolumeId, Vec<Found>> = BTreeMap::new();
            for id in session.snapshots()? {
                if others.contains(&id) {
                    continue;
                }
                match self.look(&mut session, id)? {
                    Some(found) if found.is_last => sent.entry(found.volume).or_default().push(found),
                    Some(found) => {
                        others.insert(id);
                        first.push(found);
                    }
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
                None => self.pull_ahead(&mut session, &first, watch)?,
            }
            self.wait(begun, watch)?;
        }
    }

    fn wait(&self, begun: Instant, watch: Watch<'_>) -> Result<()> {
        if begun.elapsed() >= self.wanted.patience {
            return Err(nothing(self.target));
        }
        (self.is_there)()?;
        watch(0, 0)?;
        std::thread::sleep(LOOK);
        Ok(())
    }

    /// Pulls what is there of a volume that is still used, if that is one volume.
    fn pull_ahead(&mut self, session: &mut Session, first: &[Found], watch: Watch<'_>) -> Result<()> {
        let undecided = || first.iter().filter(|it| !self.over.contains(&it.moment));
        let volumes: HashSet<VolumeId> = undecided().map(|it| it.volume).collect();
        let Some(newest) = undecided().max_by_key(|it| (it.created, it.moment)) else { return Ok(()) };
        let is_known = self.ahead.as_ref().is_some_and(|it| it.moment == newest.moment);
        if volumes.len() > 1 || is_known {
            return Ok(());
        }
        self.forget_ahead();
        check_name(&self.store.catalog(), newest.name.as_deref())?;
        let hint = moved::moved_of(newest.snapshot);
        session.carrier.put(&hint, moved::COMING, Put::Replace)?;
        let pulled = self.pull(newest.snapshot, Ahead::Is, watch);
        session.carrier.put(&hint, moved::AHEAD, Put::Replace)?;
        let snapshots = match pulled {
            Ok(copy) => Some((newest.snapshot, copy)),
            Err(e) => {
                // Whoever waits here may have had enough; else all of it comes in the end.
                watch(0, 0)?;
                (self.is_there)()?;
                log::warn!("what is there of the volume already could not be pulled ahead: {e}");
                None
            }
        };
        self.ahead = Some(Pulled { moment: newest.moment, snapshots });
        Ok(())
    }

    /// Removes what was pulled ahead and did not become the volume.
    fn forget_ahead(&mut self) {
        let Some((first, copy)) = self.ahead.take().and_then(|it| it.snapshots) else { return };
        if let Err(e) = abandon(&self.store.catalog(), first, copy) {
            log::warn!("{e}; \"sealblk gc\" tries again");
        }
    }

    /// What a snapshot is, if it is of a volume that was sent, that is wanted and that nobody has.
    fn look(&mut self, session: &mut Session, id: SnapshotId) -> Result<Option<Found>> {
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
        let Some(sent) = saved.sent else { return Ok(None) };
        let (volume, name, created) = (snapshot.volume(), saved.name, snapshot.created());
        let (moment, is_last) = (saved.moment, sent == Sent::Last);
        let is_meant = |text: &String| name.as_ref() == Some(text) || volume.to_string() == *text;
        if !self.wanted.volume.as_ref().is_none_or(is_meant) {
            return Ok(None);
        }
        // What this host has pulled and not made a volume of yet goes on.
        if is_last
            && session.carrier.exists(&moved::moved_of(id))?
            && pulled_before(&self.store.catalog(), &id.to_string())?.is_none()
        {
            self.over.insert(moment);
            return Ok(None);
        }
        Ok(Some(Found { snapshot: id, is_last, volume, name, created, moment }))
    }
}

/// # Errors
/// `Busy` if the volume of this snapshot in the place cannot be made here: another volume has its name, or
/// was made of a snapshot with the same id.
fn check_is_new(
    catalog: &Catalog,
    snapshot: SnapshotId,
    pulled: Option<SnapshotId>,
    name: Option<&str>,
) -> Result<()> {
    let mark = snapshot.to_string();
    let Some(there) = made_before(catalog, &mark)? else { return check_name(catalog, name) };
    let made = match pulled {
        Some(pulled) => made_of(catalog, &catalog.load_snapshot(pulled)?, &mark)?,
        None => None,
    };
    match made {
        // Whoever made it was interrupted in what follows.
        Some(_) => Ok(()),
        None => {
            let volume = there.volume;
            let message = format!("{volume} was made here of another snapshot that had the id {snapshot}");
            Err(Error::new(Kind::Busy, message))
        }
    }
}

/// Takes back the pull in the making `copy`, of this snapshot in a place, unless somebody is at it.
fn abandon(catalog: &Catalog, first: SnapshotId, copy: SnapshotId) -> Result<()> {
    let records = RecordsLock::acquire(catalog)?;
    let Some(_lock) = full::lock(&catalog.copying_path(copy))? else { return Ok(()) };
    match catalog.load_copying(copy)?.copy_of() == Some(first) {
        true => catalog.abandon_copy(copy, &records),
        false => Ok(()),
    }
}

/// Has nobody take what earlier connections have brought into a place of this host's own, and what nobody has
/// taken: whoever has sent it does not wait for that any more.
pub(super) fn call_off_all(store: &Store, target: &Target) -> Result<()> {
    let Some(mut session) = Session::open_if_begun(store, target, For::Removing)? else { return Ok(()) };
    for id in session.snapshots()? {
        let claim = session.claim(id).ok().flatten();
        let saved = claim.and_then(|claim| SavedVolume::of(claim.claimed().snapshot.label()));
        if saved.is_some_and(|saved| saved.sent == Some(Sent::Last)) {
            let put = Put::IfNew;
            session.carrier.put(&moved::moved_of(id), moved::WITHDRAWN, put)?;
        }
    }
    session.carrier.sync()
}

/// A volume that was sent.
struct Found {
    snapshot: SnapshotId,
    /// Whether the volume is made of it; else it was made while the volume was used.
    is_last: bool,
    volume: VolumeId,
    name: Option<String>,
    created: Timestamp,
    moment: Uuid,
}

fn nothing(target: &Target) -> Error {
    let message = format!("{} has no volume that was sent and not received yet", target.url);
    Error::new(Kind::NotFound, message)
}

/// Says in the place that the volume has come of which `pulled` was pulled from there as `source`. Returns
/// whether it was said: not if it was called off before.
///
/// The place cannot forge the word. But it can keep the word, say here that it was called off, and show the
/// word to the sender later, who deletes the volume then. So from the moment that the word can have left this
/// process, which is noted before, nothing that the place says has what was pulled deleted.
///
/// # Errors
/// `Busy` if the place says, when it can have the word, that it was called off or that another host has the
/// volume; those of the KMS and of the place. What was pulled has to stay.
pub(super) fn accept(store: &Store, pulled: SnapshotId, source: SnapshotId, target: &Target) -> Result<bool> {
    let snapshot = store.catalog().load_snapshot(pulled)?;
    let mut session = Session::open(store, target, For::Removing)?;
    let keys = super::keys_of(store, &snapshot).map_err(|failure| failure.error)?;
    crate::sandbox::give_up_network()?;
    let top = keys.first().ok_or_else(|| Error::new(Kind::Corrupt, "it has no data key"))?;
    let (name, bytes) = (moved::moved_of(source), moved::received(source, pulled, top));
    if !session.marks.is_said(pulled) {
        if session.carrier.get(&name, moved::MAX)?.is_some_and(|there| there != bytes) {
            return Ok(false);
        }
        session.marks.note_said(pulled)?;
    }
    let is_ours = session.carrier.put(&name, &bytes, Put::IfNew)?
        || session.carrier.get(&name, moved::MAX)?.is_some_and(|there| there == bytes);
    session.carrier.sync()?;
    match is_ours {
        true => Ok(true),
        false => Err(Error::new(
            Kind::Busy,
            format!(
                "the place says that it was called off, and can have this host's word that it has come: all \
                 of it is kept here, as {pulled}. Look where it was sent from. If the volume is there, \
                 \"sealblk snapshot delete {pulled}\" here; if not, \"sealblk volume create --snapshot \
                 {pulled}\" makes it"
            ),
        )),
    }
}

/// Whether a host that has the data key says that it has the volume whose last snapshot this is.
///
/// # Errors
/// Those of the KMS and of the place.
pub(super) fn is_received(store: &Store, last: SnapshotId, target: &Target) -> Result<bool> {
    let snapshot = store.catalog().load_snapshot(last)?;
    let mut session = Session::open(store, target, For::Reading)?;
    let said = session.carrier.get(&moved::moved_of(last), moved::MAX)?.unwrap_or_default();
    if said == moved::WITHDRAWN {
        return Ok(false);
    }
    let keys = super::keys_of(store, &snapshot).map_err(|failure| failure.error)?;
    Ok(snapshot.top_key().is_some() && is_said_by_any(&said, last, &keys))
}

/// The top layer's key has another number in a manifest than at home.
fn is_said_by_any(said: &[u8], last: SnapshotId, keys: &[crate::crypt::BackupKeys]) -> bool {
    keys.iter().any(|keys| moved::is_received(said, last, keys))
}
