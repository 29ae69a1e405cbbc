//! A volume moves to another host, by a place that both reach: most of it is brought there while it is used,
//! and the rest when it stands still. It is removed here when the other host says that it has it.

use super::all::{check_can_be_pushed, copy_of};
use super::other_host::{Connection, Way, forget};
use super::step::{Came, Site, Step, other};
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
use crate::place::{Access, PlaceUrl, Put};
use nix::fcntl::OFlag;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// How often it is looked whether the other host has it.
const LOOK: Duration = Duration::from_millis(500);
/// How long it is looked whether another host has begun already to take what is there.
const GRACE: Duration = Duration::from_secs(2);
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

/// Sends a volume by a place. An attached one is detached when most of it is there, and, if another host
/// takes that already, when that has it. `tell` is told when it is, and `watch` how far it has come; an
/// error of that calls it off.
///
/// # Errors
/// `Busy` if the other host does not take it in time, or if somebody attaches it; `Unsupported` for one that
/// is not encrypted; those of the KMS and of the place. The volume is here then, as it was, and not attached
/// if it was detached already; unless the error says that nobody knows. The same command finds out then.
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
    send_by(store, id, target, wanted, tell, watch).context(attempt)
}

/// Sends a volume to a host by a connection, to "sealblk volume receive -" there, at no more than `rate`
/// bytes a second (0: no limit). Otherwise as [`send`].
///
/// # Errors
/// As for that; `Other` if no sealblk receives there.
pub fn send_to(
    store: &Store,
    id: VolumeId,
    (way, rate): (&Way, u64),
    wanted: WantedSend,
    tell: &mut dyn FnMut(&str),
    watch: Watch<'_>,
) -> Result<SentVolume> {
    let passphrase = passphrase::inherited_descriptors().map_err(Error::from)?;
    let attempt = || format!("send {id} to another host");
    check_can_be_pushed(&store.catalog().load(id)?).context(attempt)?;
    let connection = Connection::open(store.root(), way, &passphrase, watch).context(attempt)?;
    let target = Target { url: connection.url(), access: Access::default(), rate };
    let sent = send_by(store, id, &target, wanted, tell, watch).context(attempt)?;
    connection.end();
    Ok(sent)
}

fn send_by(
    store: &Store,
    id: VolumeId,
    target: &Target,
    wanted: WantedSend,
    tell: &mut dyn FnMut(&str),
    watch: Watch<'_>,
) -> Result<SentVolume> {
    let catalog = store.catalog();
    let metadata = catalog.load(id)?;
    check_can_be_pushed(&metadata)?;
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
    let (made, is_undecided) = (Vec::new(), false);
    let mut sending = Sending { store, catalog, id, target, site, session, saved, made, is_undecided };
    let sent = sending.run(wanted, tell, watch);
    if sending.is_undecided {
        // By them the next command finds out.
        return sent.map(|(sent, _)| sent);
    }
    let (sent, lock) = match sent {
        Ok(sent) => sent,
        Err(e) => {
            if let Err(e) = sending.tidy() {
                log::warn!("the snapshots that were made for it are left: {e}");
            }
            return Err(e);
        }
    };
    drop(lock);
    // The volume goes first: by the snapshots the next command finds out that the other host has it.
    if !wanted.keep {
        delete::delete(&store.catalog(), &store.events(), id)
            .context(|| format!("{id} is on the other host now, and is to be deleted here"))?;
    }
    if matches!(target.url, PlaceUrl::Connection { .. }) {
        forget(&sending.session, &sending.made);
    }
    sending.tidy().context(|| format!("{id} is on the other host now; its snapshots here"))?;
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
    /// Whether nobody here knows if the other host has it.
    is_undecided: bool,
}

impl Sending<'_> {
    fn run(
        &mut self,
        wanted: WantedSend,
        tell: &mut dyn FnMut(&str),
        watch: Watch<'_>,
    ) -> Result<(SentVolume, VolumeLock)> {
        if let Some(last) = self.settle_earlier()? {
            tell("another host has it already, from an earlier command");
            // Until it is here no more, the next command finds the same.
            self.is_undecided = true;
            let lock = self.take_as_of(last)?;
            self.is_undecided = false;
            let (before, after, downtime) = (0, 0, Duration::ZERO);
            return Ok((SentVolume { snapshot: last, before, after, downtime }, lock));
        }
        let first_id = self.snapshot(Sent::First)?;
        let first = self.site.push(first_id, self.target, watch)?;
        self.wait_until_ahead(first_id, wanted.patience, watch)?;
        let begun = Instant::now();
        if reach::is_attached(&self.catalog, self.id)? {
            tell("most of it is there: it is detached");
            control::detach(&self.catalog, self.id)?;
        }
        let (last, lock) = self.last_snapshot()?;
        let pushed = self.site.push(last, self.target, watch);
        let after = pushed.as_ref().map_or(0, |pushed| pushed.put_bytes);
        match pushed {
            Ok(_) => {
                tell("all of it is there: waiting for the other host");
                self.wait_until_received(last, begun, wanted.patience, watch)?;
            }
            // It may have failed when all of it was there.
            Err(e) => self.call_off(last, e)?,
        }
        let sent = SentVolume { snapshot: last, before: first.put_bytes, after, downtime: begun.elapsed() };
        Ok((sent, lock))
    }

    /// Has nobody take what an earlier command has brought that was killed: the volume may have been used
    /// since. Returns its last snapshot if another host was faster, and has the volume.
    fn settle_earlier(&mut self) -> Result<Option<SnapshotId>> {
        let (mut received, volume) = (None, self.id);
        let left = self.catalog.snapshots()?.into_iter().filter_map(|entry| entry.snapshot.ok());
        for snapshot in left.filter(|it| it.volume() == volume && it.copy_of().is_none()) {
            let saved = SavedVolume::of(snapshot.label()).filter(|it| it.place == self.saved.place);
            let Some(sent) = saved.and_then(|it| it.sent) else { continue };
            let id = snapshot.id();
            self.made.push(id);
            // Nobody takes the first one.
            let is_decided = sent == Sent::Last
                && !self.session.carrier.put(&moved::moved_of(id), moved::WITHDRAWN, Put::IfNew)?;
            // It may have been called off before, and what says otherwise was not written with the data key.
            if is_decided && self.is_received(id)? {
                received = Some(id);
            }
        }
        self.session.carrier.sync()?;
        Ok(received)
    }

    /// The volume, which another host has as of this snapshot, if nobody has written to it since.
    fn take_as_of(&self, last: SnapshotId) -> Result<VolumeLock> {
        let holder = Holder::this_process(Purpose::Export, None)?;
        let lock = VolumeLock::acquire_in_turn(&self.catalog.folder(self.id), self.id, &holder)?;
        let (metadata, last) = (self.catalog.load(self.id)?, self.catalog.load_snapshot(last)?);
        let is_of_last = metadata.layers()[1..].iter().map(|layer| layer.id);
        if is_of_last.eq(last.layers().iter().map(|layer| layer.id)) && !self.is_written(&metadata)? {
            return Ok(lock);
        }
        let message = format!(
            "another host has it as of {}, and it was changed here since: there are two of it now. Keep one: \
             delete the volume on one of the two hosts, and here the snapshots that are tagged \
             \"sealblk:sent\"",
            last.created()
        );
        Err(Error::new(Kind::Busy, message))
    }

    /// Waits while another host takes what is there already, so that little is left for when the volume
    /// stands still. What the place says of it is a hint, and nothing depends on whether it is true.
    fn wait_until_ahead(&mut self, first: SnapshotId, patience: Duration, watch: Watch<'_>) -> Result<()> {
        let (name, begun) = (moved::moved_of(first), Instant::now());
        while begun.elapsed() < patience {
            match self.session.carrier.get(&name, moved::MAX)?.as_deref() {
                Some(moved::COMING) => {}
                None if begun.elapsed() < GRACE => {}
                _ => break,
            }
            watch(0, 0)?;
            std::thread::sleep(LOOK);
        }
        Ok(())
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
                Ok(Some(_)) => return self.decide(last, None),
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
        self.call_off(last, why)
    }

    /// Has nobody take it any more, for this reason. Returns well if the other host was faster.
    fn call_off(&mut self, last: SnapshotId, why: Error) -> Result<()> {
        let carrier = &mut self.session.carrier;
        let put = carrier.put(&moved::moved_of(last), moved::WITHDRAWN, Put::IfNew);
        // After a power cut in the place nobody could take it either.
        match put.and_then(|is_put| carrier.sync().map(|()| is_put)) {
            // The other host was faster, or this very put was made twice.
            Ok(false) => self.decide(last, Some(why)),
            Ok(true) => Err(why),
            Err(e) => {
                self.is_undecided = true;
                let message = format!(
                    "{why}; and whether another host has it nobody knows, since it could not be called off: \
                     {e}. Before it is attached here, run the same command again, which finds out"
                );
                Err(Error::new(e.kind(), message))
            }
        }
    }

    /// Whether the other host has it, as the place says. If not, that is for this reason.
    fn decide(&mut self, last: SnapshotId, why: Option<Error>) -> Result<()> {
        let forged = "what the place has as the other host's word was not written by somebody who has the \
                      data key: the volume stays here";
        match self.is_received(last)? {
            true => Ok(()),
            false => Err(why.unwrap_or_else(|| Error::new(Kind::Corrupt, forged))),
        }
    }

    /// Whether a host that has the data key says that it has the volume whose last snapshot this is. An error
    /// leaves that open.
    fn is_received(&mut self, last: SnapshotId) -> Result<bool> {
        match self.site.run(&Step::Received(last, self.target.clone()), &mut |_, _| Ok(())) {
            Ok(Came::IsReceived(is_it)) => Ok(is_it),
            Ok(_) => Err(other()),
            Err(e) => {
                self.is_undecided = true;
                Err(e.context("whether another host has it nobody knows; the same command finds out"))
            }
        }
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
