//! What a place has is read back and proved, from the manifests to the last block, and held against what this
//! host has seen there. Nothing is decrypted for it.

use super::{For, Session, Target, check_name, keys_of, mark_of, missing};
use crate::backup::block::{self, BLOCK};
use crate::backup::manifest::{self, Claim, Manifest};
use crate::backup::page::RUN;
use crate::backup::{BLOCKS, ContentName, PAGES};
use crate::base::{Error, Kind, Result};
use crate::catalog::snapshot::Snapshot;
use crate::catalog::{SnapshotId, VolumeId};
use crate::crypt::BackupKeys;
use crate::disk::transfer::Watch;
use crate::helper::carry::UnderWay;
use crate::ops::Store;
use crate::sandbox;
use std::collections::{HashMap, HashSet, VecDeque};
use std::rc::Rc;

/// Blocks on their way at a time.
const WINDOW: usize = 12;

/// What came of it.
pub struct Verified {
    /// The snapshots that the place lists, or that were asked for, sorted.
    pub snapshots: Vec<One>,
    /// Those that this host has seen there, and that the place does not list.
    pub missing: Vec<SnapshotId>,
}

impl Verified {
    /// The first thing that is wrong.
    pub fn problem(&self) -> Option<Error> {
        let of_one = |one: &One| one.problem.as_ref().map(|e| Error::new(e.kind(), e.to_string()));
        let of_missing = |id: &SnapshotId| {
            let message = format!(
                "{id}, which this host has seen there, is not in the place any more: it was removed by \
                 another host, or the place hides it"
            );
            Error::new(Kind::Corrupt, message)
        };
        self.snapshots.iter().find_map(of_one).or_else(|| self.missing.first().map(of_missing))
    }
}

/// One snapshot.
pub struct One {
    /// Its id.
    pub id: SnapshotId,
    /// How many blocks of it were proved.
    pub blocks: u64,
    /// What is wrong with it; none: everything is there, and as somebody wrote it who had its data keys.
    pub problem: Option<Error>,
}

/// What a manifest says, and the keys of the snapshot.
type WithKeys = (Claim, Vec<Rc<BackupKeys>>);

/// Which data key it is, as a KMS would be asked for it.
type KeyId = (String, VolumeId, String, Vec<u8>);

/// Reads the snapshots of a place back, or the one that is `named`. `watch` is told how far it has come. This
/// process, and what it starts, has no network afterwards.
///
/// # Errors
/// Those of reaching the place; what `watch` says. What is wrong with a snapshot is in what is returned.
pub fn verify(
    store: &Store,
    named: Option<SnapshotId>,
    target: &Target,
    watch: Watch<'_>,
) -> Result<Verified> {
    let mut session = Session::open(store, target, For::Reading)?;
    let listed = session.snapshots()?;
    let known = session.marks.all()?;
    let missing: Vec<SnapshotId> = match named {
        None => known.into_iter().filter(|id| !listed.contains(id)).collect(),
        Some(_) => Vec::new(),
    };
    let wanted = named.map_or(listed, |id| vec![id]);
    let mut cache: HashMap<KeyId, Rc<BackupKeys>> = HashMap::new();
    let mut found: Vec<(SnapshotId, Result<WithKeys>)> = Vec::new();
    for id in wanted {
        let claim = session.claim_of_known(id);
        let with_keys = claim.and_then(|claim| {
            let keys = cached_keys(store, &claim.claimed().snapshot, &mut cache)?;
            Ok((claim, keys))
        });
        found.push((id, with_keys));
    }
    sandbox::give_up_network()?;
    let total =
        found.iter().filter_map(|(_, it)| it.as_ref().ok()).map(|(claim, _)| claim.claimed().blocks());
    let total = total.fold(0, u64::saturating_add).saturating_mul(BLOCK as u64);
    let mut walk = Walk { session: &mut session, seen: HashSet::new(), done: 0, total, watch };
    let mut snapshots = Vec::new();
    for (id, found) in found {
        let mut blocks = 0;
        let proved = found.and_then(|(claim, keys)| walk.snapshot(claim, &keys, &mut blocks));
        match proved {
            // Of the command's own end nobody can be told later.
            Err(e) if walk.is_interrupted() => return Err(e),
            proved => snapshots.push(One { id, blocks, problem: proved.err() }),
        }
    }
    Ok(Verified { snapshots, missing })
}

/// The keys of a snapshot, each data key asked for once.
fn cached_keys(
    store: &Store,
    snapshot: &Snapshot,
    cache: &mut HashMap<KeyId, Rc<BackupKeys>>,
) -> Result<Vec<Rc<BackupKeys>>> {
    let id_of = |n: usize| {
        let wrapped = &snapshot.keys()[n].first().wrapped;
        (snapshot.key_owner().to_string(), snapshot.volume(), wrapped.key_id.clone(), wrapped.blob.clone())
    };
    let known: Option<Vec<_>> = (0..snapshot.keys().len()).map(|n| cache.get(&id_of(n)).cloned()).collect();
    if let Some(known) = known {
        return Ok(known);
    }
    let keys = keys_of(store, snapshot).map_err(|failure| failure.error.context(snapshot.id()))?;
    let keys: Vec<_> = keys.into_iter().map(Rc::new).collect();
    keys.iter().enumerate().for_each(|(n, keys)| drop(cache.insert(id_of(n), keys.clone())));
    Ok(keys)
}

struct Walk<'a> {
    session: &'a mut Session,
    /// The pages and blocks that were proved already, as part of another snapshot.
    seen: HashSet<ContentName>,
    done: u64,
    total: u64,
    watch: Watch<'a>,
}

impl Walk<'_> {
    /// Whether whoever watches has had enough: only then does asking again fail.
    fn is_interrupted(&mut self) -> bool {
        (self.watch)(self.done, self.total).is_err()
    }

    fn snapshot(&mut self, claim: Claim, keys: &[Rc<BackupKeys>], blocks: &mut u64) -> Result<()> {
        let (id, mark) = (claim.claimed().snapshot.id(), mark_of(&claim));
        let top = keys.first().ok_or_else(|| Error::new(Kind::Corrupt, "it has no data key"))?;
        let manifest = claim.prove(top).map_err(|e| e.context(id))?;
        for (n, keys) in keys.iter().enumerate() {
            self.plane(&manifest, n, keys, blocks).map_err(|e| e.context(id))?;
        }
        self.session.marks.note(id, mark)
    }

    fn plane(&mut self, manifest: &Manifest, n: usize, keys: &BackupKeys, blocks: &mut u64) -> Result<()> {
        let all = manifest::blocks_of(manifest.snapshot.geometry().size());
        for (&number, entry) in &manifest.planes[n].pages {
            let page = self.session.page(entry.name, keys)?.ok_or_else(|| missing(entry.name, PAGES))?;
            let last = page.0.keys().next_back().map_or(0, |&at| u64::from(number) * RUN + u64::from(at));
            if page.0.len() != entry.blocks as usize || last >= all {
                let problem = format!("{} does not fit its manifest", entry.name.object(PAGES));
                return Err(Error::new(Kind::Corrupt, problem));
            }
            // A page whose blocks were all proved needs no second look at them.
            let is_known = !self.seen.insert(entry.name);
            let mut coming: VecDeque<(UnderWay, ContentName)> = VecDeque::new();
            for name in page.0.values().copied() {
                (self.watch)(self.done, self.total)?;
                (self.done, *blocks) = (self.done + BLOCK as u64, *blocks + 1);
                if is_known || !self.seen.insert(name) {
                    continue;
                }
                if coming.len() >= WINDOW {
                    self.arrive(&mut coming, keys)?;
                }
                coming.push_back((self.session.carrier.begin_get(&name.object(BLOCKS), block::MAX)?, name));
            }
            while !coming.is_empty() {
                if let Err(e) = self.arrive(&mut coming, keys) {
                    self.seen.remove(&entry.name);
                    return Err(e);
                }
            }
        }
        Ok(())
    }

    fn arrive(&mut self, coming: &mut VecDeque<(UnderWay, ContentName)>, keys: &BackupKeys) -> Result<()> {
        let Some((under_way, name)) = coming.pop_front() else { return Ok(()) };
        let proved = self.session.carrier.got(under_way).and_then(|object| {
            let object = object.ok_or_else(|| missing(name, BLOCKS))?;
            self.session.brake.wait(object.len() as u64);
            check_name(name, &object, keys, BLOCKS)
        });
        // Another snapshot that has it is no better.
        if proved.is_err() {
            self.seen.remove(&name);
        }
        proved
    }
}
