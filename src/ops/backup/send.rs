//! A volume moves to another host, by a place that both reach: most of it is brought there while it is used,
//! and the rest when it stands still. It is removed here when the other host says that it has it.

use super::all::{check_can_be_pushed, copy_of};
use super::step::{Site, Step};
use super::{For, Session, Target};
use crate::backing::file::next_data_of;
use crate::backup::moved;
use crate::backup::saved::{SavedVolume, Sent};
use crate::base::root::files;
use crate::base::{Context, Error, Kind, Result};
use crate::catalog::lock::{Holder, Purpose, VolumeLock};
use crate::catalog::{Catalog, LayerId, Metadata, SnapshotId, VolumeId};
use crate::disk::transfer::Watch;
use crate::host::control;
use crate::kms::embedded::root_key::passphrase;
use crate::ops::{Store, delete, reach, snapshot, space};
use crate::place::Put;
use nix::fcntl::OFlag;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// How often it is looked whether the other host has it.
const LOOK: Duration = Duration::from_millis(500);
/// How often the last snapshot is made again, of a volume that somebody has written to meanwhile.
const TRIES: u32 = 3;

/// How a volume is to be sent.
#[derive(Clone, Copy, Debug)]
pub struct WantedSend {
    /// Whether it stays here as well.
    pub keep: bool,
    /// How long the other host may take, before it is called off.
    pub patience: Duration,
}

/// A volume that another host has now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SentVolume {
    /// Its last snapshot, as it lies in the place.
    pub snapshot: SnapshotId,
    /// How many bytes were sent while it was used.
    pub before: u64,
    /// How many bytes were sent while it stood still.
    pub after: u64,
    /// How long it stood still: until the other host had it.
    pub downtime: Duration,
}

/// Sends a volume. An attached one is detached when most of it is there. `tell` is told when it is, and
/// `watch` how far it has come; an error of that calls it off.
///
/// # Errors
/// `Busy` if the other host does not take it in time, or if somebody attaches it; `Unsupported` for one that
/// is not encrypted; those of the KMS and of the place. The volume is here then, as it was, and not attached
/// if it was detached already.
pub fn send(
    store: &Store,
    id: VolumeId,
    target: &Target,
    wanted: WantedSend,
    tell: &mut dyn FnMut(&str),
    watch: Watch<'_>,
) -> Result<SentVolume> {
    let _passphrase = passphrase::inherited_descriptors().map_err(Error::from)?;
    let attempt = || format!("send {id} by {}", target.url);
    let catalog = store.catalog();
    let metadata = catalog.load(id)?;
    check_can_be_pushed(&metadata).context(attempt)?;
    let session = Session::open(store, target, For::Pushing)?;
    let (store_id, lock) = session.marks.store(store.root())?;
    drop(lock);
    let saved = SavedVolume {
        place: session.id.0,
        store: store_id,
        moment: Uuid::now_v7(),
        of_moment: 1,
        name: metadata.name().map(ToString::to_string),
        attach: catalog.attach_settings(id)?,
        kms: None,
        sent: Some(Sent::First),
    };
    let site = Site { root: store.root().clone(), config: None };
    let mut sending = Sending { store, catalog, id, target, site, session, saved, made: Vec::new() };
    let sent = sending.run(wanted, tell, watch);
    let tidied = sending.tidy();
    if let (Err(_), Err(e)) = (&sent, &tidied) {
        log::warn!("the snapshots that were made for it are left: {e}");
    }
    let (sent, lock) = sent.context(attempt)?;
    drop(lock);
    tidied.context(|| format!("{id} is on the other host now; its snapshots here"))?;
    if !wanted.keep {
        delete::delete(&store.catalog(), &store.events(), id)
            .context(|| format!("{id} is on the other host now, and is to be deleted here"))?;
    }
    Ok(sent)
}

struct Sending<'a> {
    store: &'a Store,
    catalog: Catalog,
    id: VolumeId,
    target: &'a Target,
    site: Site,
    session: Session,
    saved: SavedVolume,
    /// The snapshots that were made for it.
    made: Vec<SnapshotId>,
}

impl Sending<'_> {
    fn run(
        &mut self,
        wanted: WantedSend,
        tell: &mut dyn FnMut(&str),
        watch: Watch<'_>,
    ) -> Result<(SentVolume, VolumeLock)> {
        self.call_off_earlier()?;
        let first = self.snapshot(Sent::First)?;
        let first = self.site.push(first, self.target, watch)?;
        let begun = Instant::now();
        if reach::is_attached(&self.catalog, self.id)? {
            tell("most of it is there: it is detached");
            control::detach(&self.catalog, self.id)?;
        }
        let (last, lock) = self.last_snapshot()?;
        let pushed = self.site.push(last, self.target, watch)?;
        tell("all of it is there: waiting for the other host");
        self.wait_until_received(last, begun, wanted.patience, watch)?;
        let sent = SentVolume {
            snapshot: last,
            before: first.put_bytes,
            after: pushed.put_bytes,
            downtime: begun.elapsed(),
        };
        Ok((sent, lock))
    }

    /// Has nobody take what an earlier command has brought that was killed: the volume was used since.
    fn call_off_earlier(&mut self) -> Result<()> {
        let left = self.catalog.snapshots()?.into_iter().filter_map(|entry| entry.snapshot.ok());
        for snapshot in left.filter(|it| it.volume() == self.id && it.copy_of().is_none()) {
            let saved = SavedVolume::of(snapshot.label());
            if saved.as_ref().is_some_and(|it| it.sent.is_some() && it.place == self.saved.place) {
                let name = moved::moved_of(snapshot.id());
                self.session.carrier.put(&name, moved::WITHDRAWN, Put::IfNew)?;
                self.made.push(snapshot.id());
            }
        }
        self.session.carrier.sync()
    }

    fn snapshot(&mut self, sent: Sent) -> Result<SnapshotId> {
        let saved = SavedVolume { sent: Some(sent), ..self.saved.clone() };
        let (label, left_out) = saved.label(&self.catalog.tags(self.id)?)?;
        if left_out > 0 {
            log::warn!("{} has more tags than go with it: {left_out} are left out", self.id);
        }
        let made = snapshot::create(self.store, &[(self.id, label)])?;
        let made = made.first().ok_or_else(|| Error::new(Kind::Other, "there is no snapshot"))?;
        self.made.push(made.snapshot.id());
        Ok(made.snapshot.id())
    }

    /// The snapshot that has everything, and the volume, which nobody can attach while that is held.
    fn last_snapshot(&mut self) -> Result<(SnapshotId, VolumeLock)> {
        for _ in 0..TRIES {
            let last = self.snapshot(Sent::Last)?;
            let holder = Holder::this_process(Purpose::Export, None)?;
            let lock = VolumeLock::acquire_in_turn(&self.catalog.folder(self.id), self.id, &holder)?;
            if !self.is_written(&self.catalog.load(self.id)?)? {
                return Ok((last, lock));
            }
        }
        let message = "somebody attaches it again and again, and writes to it";
        Err(Error::new(Kind::Busy, message))
    }

    /// Whether its top layer has anything: it was made with the last snapshot.
    fn is_written(&self, metadata: &Metadata) -> Result<bool> {
        let path = self.catalog.layer_path(metadata.top().id);
        let attempt = || format!("look for data in {}", path.display());
        let file = files::open_layer(&path, OFlag::O_RDONLY).context(attempt)?;
        Ok(next_data_of(&file, 0).context(attempt)?.is_some())
    }

    /// Returns when the other host has said, proved by the data key, that it has the volume. Otherwise it is
    /// called off, so that the other host cannot take it any more.
    fn wait_until_received(
        &mut self,
        last: SnapshotId,
        begun: Instant,
        patience: Duration,
        watch: Watch<'_>,
    ) -> Result<()> {
        let name = moved::moved_of(last);
        let why = loop {
            match self.session.carrier.get(&name, moved::MAX) {
                Ok(Some(_)) => return self.check_received(last),
                Ok(None) => {}
                Err(e) => break e,
            }
            if begun.elapsed() >= patience {
                let seconds = patience.as_secs();
                break Error::new(Kind::Busy, format!("no other host has taken it within {seconds} seconds"));
            }
            if let Err(e) = watch(0, 0) {
                break e;
            }
            std::thread::sleep(LOOK);
        };
        match self.session.carrier.put(&name, moved::WITHDRAWN, Put::IfNew) {
            // The other host was faster, or this very put was made twice.
            Ok(false) => self.check_received(last).map_err(|_| why),
            Ok(true) => Err(why),
            Err(e) => Err(Error::new(
                e.kind(),
                format!(
                    "{why}; and whether another host has it nobody knows, since it could not be called off: \
                     {e}. Before it is attached here, look there"
                ),
            )),
        }
    }

    fn check_received(&self, last: SnapshotId) -> Result<()> {
        self.site.run(&Step::Received(last, self.target.clone()), &mut |_, _| Ok(())).map(drop)
    }

    /// Deletes the snapshots that were made for it.
    fn tidy(&mut self) -> Result<()> {
        let mut layers: Vec<LayerId> = Vec::new();
        for id in std::mem::take(&mut self.made) {
            layers.extend(delete::delete_snapshot(&self.catalog, id)?);
        }
        space::give_back(self.store, Some(&layers), 0, &mut |_, _, _| Ok(()))
            .map(drop)
            .map_err(|e| copy_of(&e))
    }
}
