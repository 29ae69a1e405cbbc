//! Snapshots leave the house: to a place outside, as ciphertext, and back.
//!
//! Two processes are at it. This one has the keys by which objects are named and manifests sealed, which open
//! no data and come from a helper that unwraps the data key ([`unwrap::backup_keys`]); from then on it has no
//! network. The other one, the carrier, has a network and no key ([`crate::helper::carry`]). What comes from
//! a place is a claim: it is proved here by its name or its MAC before anything is done with it.

pub mod all;
pub mod complete;
mod drill;
pub(crate) mod fetch;
mod into;
mod kms_log;
mod leases;
pub mod list;
pub mod other_host;
pub mod pull;
pub mod push;
pub mod receive;
pub mod remove;
pub mod restore;
pub mod send;
mod source;
pub(crate) mod step;
pub mod verify;
pub mod worker;

use super::Store;
use super::brake::Brake;
use crate::backup::manifest::{self, Claim};
use crate::backup::marks::{Mark, Marks};
use crate::backup::page::{self, Page};
use crate::backup::{self as place, ContentName, PAGES, PlaceId};
use crate::base::{Error, Kind, Result};
use crate::catalog::SnapshotId;
use crate::catalog::snapshot::Snapshot;
use crate::crypt::BackupKeys;
use crate::helper::carry::Carrier;
use crate::helper::unwrap;
use crate::kms::Failure;
use crate::place::{Access, PlaceUrl, Put};
use serde::{Deserialize, Serialize};

/// A place, and how it is used.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Target {
    /// Where it is.
    pub url: PlaceUrl,
    /// How it is reached.
    pub access: Access,
    /// At most so many bytes a second; 0: no limit.
    pub rate: u64,
}

impl Target {
    /// The place that `text` names, and the snapshot, where the URL goes on with one: `URL/snap-…`.
    ///
    /// # Errors
    /// `Usage` for what is no URL of a place.
    pub fn parse(text: &str, access: Access, rate: u64) -> Result<(Self, Option<SnapshotId>)> {
        let (place, snapshot) = match text.trim_end_matches('/').rsplit_once('/') {
            Some((place, last)) => match last.parse::<SnapshotId>() {
                Ok(id) => (place, Some(id)),
                Err(_) => (text, None),
            },
            None => (text, None),
        };
        Ok((Target { url: place.parse()?, access, rate }, snapshot))
    }
}

/// A place that is open.
struct Session {
    carrier: Carrier,
    url: PlaceUrl,
    id: PlaceId,
    marks: Marks,
    brake: Brake,
}

/// What a place is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum For {
    /// A snapshot is brought: a place that has none yet is begun.
    Pushing,
    /// What is there is removed.
    Removing,
    /// What is there is read.
    Reading,
}

impl Session {
    fn open(store: &Store, target: &Target, what_for: For) -> Result<Self> {
        Self::open_if_begun(store, target, what_for)?.ok_or_else(|| {
            let message = format!("{} has no snapshots of sealblk's: there is no place.json", target.url);
            Error::new(Kind::NotFound, message)
        })
    }

    /// As [`Session::open`]; none for a place that can be reached, and that nothing was ever pushed to.
    fn open_if_begun(store: &Store, target: &Target, what_for: For) -> Result<Option<Self>> {
        let writes = what_for != For::Reading;
        let mut carrier = Carrier::start(store.root(), &target.url, &target.access, writes)?;
        let marks = Marks::of(&target.url)?;
        let file = place::place_file();
        let mut found = carrier.get(&file, place::PLACE_MAX)?;
        if found.is_none() && what_for == For::Pushing {
            carrier.put(&file, &PlaceId::random().to_json(), Put::IfNew)?;
            // Another host may have been faster.
            found = carrier.get(&file, place::PLACE_MAX)?;
        }
        let Some(bytes) = found else { return Ok(None) };
        let id = PlaceId::from_json(&bytes)?;
        marks.check_place(id, what_for == For::Pushing)?;
        Ok(Some(Session { carrier, url: target.url.clone(), id, marks, brake: Brake::new(target.rate) }))
    }

    /// The snapshots that the place lists, sorted.
    fn snapshots(&mut self) -> Result<Vec<SnapshotId>> {
        let listed = self.carrier.list(&place::manifests())?;
        let mut ids: Vec<SnapshotId> = listed.iter().filter_map(|it| place::snapshot_of(&it.name)).collect();
        ids.sort_unstable();
        ids.dedup();
        Ok(ids)
    }

    /// What the place says of a snapshot; none if there is no manifest of it.
    fn claim(&mut self, id: SnapshotId) -> Result<Option<Claim>> {
        match self.carrier.get(&place::manifest_of(id), manifest::MAX)? {
            None => Ok(None),
            Some(bytes) => Claim::parse(&bytes, id).map(Some).map_err(|e| e.context(id)),
        }
    }

    /// As [`Session::claim`], of a snapshot that must be there, as new as this host has seen it,
    /// and written for this place.
    fn claim_of_known(&mut self, id: SnapshotId) -> Result<Claim> {
        let known = self.marks.known(id)?;
        let Some(claim) = self.claim(id)? else {
            let message = match known {
                None => format!("there is no snapshot {id} in {}", self.url),
                Some(_) => format!(
                    "{id} is not in {} any more, where this host has seen it: it was removed by another \
                     host, or the place hides it",
                    self.url
                ),
            };
            return Err(Error::new(Kind::NotFound, message));
        };
        self.check_claim(id, &claim, known)?;
        Ok(claim)
    }

    fn check_claim(&self, id: SnapshotId, claim: &Claim, known: Option<Mark>) -> Result<()> {
        mark_of(claim).against(known).check(id)?;
        if claim.claimed().place != self.id {
            let message = format!(
                "{id}: its manifest was written for another place ({}), and somebody has put it into this \
                 one ({})",
                claim.claimed().place,
                self.id
            );
            return Err(Error::new(Kind::Corrupt, message));
        }
        Ok(())
    }

    /// The page of this name, proved; none if it is not there.
    fn page(&mut self, name: ContentName, keys: &BackupKeys) -> Result<Option<Page>> {
        let Some(bytes) = self.carrier.get(&name.object(PAGES), page::MAX)? else { return Ok(None) };
        self.brake.wait(bytes.len() as u64);
        check_name(name, &bytes, keys, PAGES)?;
        Page::decode(&bytes).map(Some)
    }
}

/// Fails unless an object has the bytes that it is named for.
fn check_name(name: ContentName, bytes: &[u8], keys: &BackupKeys, folder: &str) -> Result<()> {
    match name.is(&keys.name(bytes)) {
        true => Ok(()),
        false => Err(Error::new(
            Kind::Corrupt,
            format!(
                "{} does not hold what it is named for: it is damaged, or was changed",
                name.object(folder)
            ),
        )),
    }
}

fn missing(name: ContentName, folder: &str) -> Error {
    let message = format!("{} is missing; push the snapshot again from where it is", name.object(folder));
    Error::new(Kind::Corrupt, message)
}

fn mark_of(claim: &Claim) -> Mark {
    Mark { number: claim.claimed().number, digest: claim.digest() }
}

/// The keys of names and manifests of a snapshot, one set for each of its data keys.
fn keys_of(store: &Store, snapshot: &Snapshot) -> Result<Vec<BackupKeys>, Failure> {
    let (owner, volume) = (snapshot.key_owner(), snapshot.volume());
    let keys = snapshot.keys().iter();
    keys.map(|key| unwrap::backup_keys(store.hardened(), store.root(), owner, key, volume)).collect()
}

/// Which of the snapshots of a place is meant, if one was named, or there is only one.
fn choose(session: &mut Session, named: Option<SnapshotId>) -> Result<SnapshotId> {
    if let Some(id) = named {
        return Ok(id);
    }
    let all = session.snapshots()?;
    match all[..] {
        [only] => Ok(only),
        [] => Err(Error::new(Kind::NotFound, format!("{} has no snapshot", session.url))),
        _ => {
            let url = &session.url;
            let message = format!(
                "{url} has {} snapshots; name one: \"{url}/snap-…\" (\"sealblk snapshot list {url}\" shows \
                 them)",
                all.len()
            );
            Err(Error::new(Kind::Usage, message))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_may_end_with_a_snapshot() {
        let id = SnapshotId::random();
        let parse =
            |text: &str| Target::parse(text, Access::default(), 0).map(|(it, id)| (it.url.to_string(), id));
        for (text, place, snapshot) in [
            ("file:///mnt/x".to_owned(), "file:///mnt/x", None),
            (format!("file:///mnt/x/{id}"), "file:///mnt/x", Some(id)),
            (format!("s3://bucket/a/{id}/"), "s3://bucket/a", Some(id)),
            (format!("s3://bucket/{id}"), "s3://bucket", Some(id)),
        ] {
            assert_eq!(parse(&text).unwrap(), (place.to_owned(), snapshot), "{text}");
        }
        assert!(parse(&id.to_string()).is_err() && parse("").is_err());
    }
}
