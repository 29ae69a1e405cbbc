//! A snapshot is brought to a place outside: its blocks, its pages, and its manifest last.
//!
//! What the place has already does not travel, and is not read either: of an earlier snapshot that is in the
//! place and still at home, the layers tell what has changed since ([`base`]). docs/format.md
//! argues the order, and what a cut at each step leaves.

mod base;
mod way;

use super::leases::Held;
use super::{For, Session, Target};
use crate::backup as place;
use crate::backup::lease::Lease;
use crate::backup::manifest::{self, Manifest, Planes};
use crate::backup::marks::Mark;
use crate::base::{Error, Kind, Result, Timestamp};
use crate::catalog::SnapshotId;
use crate::catalog::snapshot::Snapshot;
use crate::crypt::BackupKeys;
use crate::disk::transfer::Watch;
use crate::events::Event;
use crate::helper::unwrap;
use crate::kms::Failure;
use crate::ops::Store;
use crate::place::{PlaceUrl, Put};
use crate::sandbox;
use base::is_as;
use serde::{Deserialize, Serialize};
use way::Way;

/// What a push has done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pushed {
    /// The snapshot.
    pub snapshot: SnapshotId,
    /// Its URL: what "snapshot pull" takes.
    pub url: String,
    /// How many blocks of 512 KiB it has in the place.
    pub blocks: u64,
    /// How many of them were brought there now.
    pub put_blocks: u64,
    /// How many bytes were brought there now.
    pub put_bytes: u64,
    /// The snapshot that the place had, from which what has changed was found.
    pub base: Option<SnapshotId>,
    /// Whether it was there already, whole and as it is now.
    pub was_there: bool,
}

/// Brings a snapshot to a place, and reports a `pushSnapshot` event. `watch` is told how far it has
/// come; an error of it ends the push, which the next one goes on with. This process, and what it
/// starts, has no network afterwards.
///
/// # Errors
/// `NotFound` if the snapshot was deleted meanwhile; `Unsupported` for one that is not encrypted whole;
/// `Busy` if it is being pushed there already, or if somebody removes snapshots there; `Corrupt` for a
/// snapshot that was edited, and for a place that is not what it was; those of the KMS and of the place.
pub fn push(store: &Store, id: SnapshotId, target: &Target, watch: Watch<'_>) -> Result<Pushed> {
    let started = Timestamp::now();
    let attempt = || format!("push {id} to {}", target.url);
    let snapshot = store.catalog().load_snapshot(id)?;
    let done = begin(store, &snapshot, target, watch);
    let result = done.as_ref().map(|it| it.base.is_some()).map_err(|failure| failure.cause.clone());
    store.events().record(&Event::push_snapshot(id, snapshot.volume(), result, started));
    done.map_err(|failure| failure.error.context(attempt()))
}

fn begin(store: &Store, snapshot: &Snapshot, target: &Target, watch: Watch<'_>) -> Result<Pushed, Failure> {
    let Some(planes) = Planes::of(snapshot.layout()) else { return Err(not_encrypted(snapshot).into()) };
    store.catalog().check_snapshot(snapshot)?;
    store.catalog().check_has_come(snapshot.layers())?;
    let mut session = Session::open(store, target, For::Pushing)?;
    let held = session.marks.lock(snapshot.id())?;
    let (owner, volume) = (snapshot.key_owner(), snapshot.volume());
    let keys = planes.keys.iter().map(|&n| {
        let key = &snapshot.keys()[n];
        unwrap::backup_keys(store.hardened(), store.root(), owner, key, volume)
    });
    let keys = keys.collect::<Result<Vec<_>, _>>()?;
    sandbox::give_up_network()?;
    let done = Push { store, snapshot, planes, keys }.run(&mut session, watch)?;
    session.marks.unlock(snapshot.id(), held);
    Ok(done)
}

fn not_encrypted(snapshot: &Snapshot) -> Error {
    let id = snapshot.id();
    let message = match snapshot.is_encrypted() {
        false => format!(
            "{id} is not encrypted, and nothing leaves in the clear: copy it under a KMS key first \
             (\"sealblk snapshot copy {id} --key …\"), and push the copy"
        ),
        true => format!(
            "a part of {id} is in the clear, from before its volume was encrypted, and nothing leaves so: \
             push a snapshot that is made when everything is encrypted (\"sealblk volume show {}\" says how \
             far that is), or a copy under another KMS key",
            snapshot.volume()
        ),
    };
    Error::new(Kind::Unsupported, message)
}

/// A snapshot that is pushed, with its keys: one set for each plane.
struct Push<'a> {
    store: &'a Store,
    snapshot: &'a Snapshot,
    planes: Planes,
    keys: Vec<BackupKeys>,
}

impl Push<'_> {
    fn run(&self, session: &mut Session, watch: Watch<'_>) -> Result<Pushed> {
        manifest::check_seal(self.snapshot, &self.keys[0])?;
        let id = self.snapshot.id();
        let lease = Lease::Push(id, session.marks.host()?);
        let mut lease = Held::push(session, lease)?;
        let record = manifest::record(self.snapshot, &self.planes, &self.keys[0]);
        let before = self.before(session)?;
        if let Some(before) = before.as_ref().filter(|it| is_as(&it.snapshot, &record)) {
            lease.give_back(session)?;
            let (url, blocks) = (url_of(&session.url, id), before.blocks());
            let (put_blocks, put_bytes) = (0, 0);
            return Ok(Pushed {
                snapshot: id,
                url,
                blocks,
                put_blocks,
                put_bytes,
                base: None,
                was_there: true,
            });
        }
        let number = before.as_ref().map_or(0, |it| it.number);
        let known = session.marks.known(id)?.map_or(0, |mark| mark.number);
        let number = number.max(known).checked_add(1);
        let number = number.ok_or_else(|| Error::new(Kind::Corrupt, "the manifest's number has no next"))?;
        let base = match before {
            // Its blocks are there; how its data keys are wrapped, or what is said of it, has changed.
            Some(before) => self.same(&before),
            None => self.base(session)?,
        };
        let base_id = base.as_ref().and_then(|base| base.id).filter(|base| *base != id);
        let mut way = Way::new(self, base, lease.was_there && !matches!(session.url, PlaceUrl::Folder(_)));
        let planes = way.bring_all(session, &mut lease, watch)?;
        let chain = self.snapshot.layers().iter().map(|layer| layer.id).collect();
        let manifest = Manifest { place: session.id, number, snapshot: record, chain, planes };
        self.commit(session, &manifest, &lease)?;
        lease.give_back(session)?;
        Ok(Pushed {
            snapshot: id,
            url: url_of(&session.url, id),
            blocks: manifest.blocks(),
            put_blocks: way.put_blocks,
            put_bytes: way.put_bytes,
            base: base_id,
            was_there: false,
        })
    }

    /// Puts the manifest, **which is the moment**: everything that it names is there, durably.
    fn commit(&self, session: &mut Session, manifest: &Manifest, lease: &Held) -> Result<()> {
        let id = self.snapshot.id();
        // Its record has been there all the time, and so has everything that it shows.
        self.store.catalog().load_snapshot(id)?;
        session.carrier.sync()?;
        lease.check(session)?;
        let bytes = manifest.to_bytes(&self.keys[0]);
        let name = place::manifest_of(id);
        let put = if manifest.number == 1 { Put::IfNew } else { Put::Replace };
        // A put whose answer was lost is tried again, and then finds what it has put itself.
        let is_ours = session.carrier.put(&name, &bytes, put)?
            || session.carrier.get(&name, manifest::MAX)?.is_some_and(|there| there == bytes);
        if !is_ours {
            let message = format!("another host has pushed {id} there just now");
            return Err(Error::new(Kind::Busy, message));
        }
        session.carrier.sync()?;
        if let Err(e) = lease.check(session) {
            // What it names may have been swept meanwhile.
            session.carrier.remove(&name)?;
            return Err(e);
        }
        session.marks.note(id, Mark { number: manifest.number, digest: manifest::digest(&bytes) })
    }
}

fn url_of(place: &PlaceUrl, id: SnapshotId) -> String {
    format!("{place}/{id}")
}
