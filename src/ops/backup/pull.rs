//! A snapshot comes from a place outside: it is another snapshot here, with an id of its own and layers of
//! its own, under the same data keys, which the KMS has wrapped for it.
//!
//! Nothing is made before the manifest is proved, and nothing is written that is not. The steps are those of
//! a copy ([`full`]): a record that names the layers, the layers, and the rename **which is the moment**.
//! What was interrupted is gone on with by the same command, and cleared away by "sealblk gc".

use super::{For, Session, Target, check_name, choose, keys_of, mark_of, missing};
use crate::backup::block::{self, BLOCK, SECTOR};
use crate::backup::manifest::{self, Claim, Manifest};
use crate::backup::page::RUN;
use crate::backup::{BLOCKS, ContentName, PAGES};
use crate::base::root::files;
use crate::base::zeros::is_zero;
use crate::base::{Context, Error, Kind, Result, Timestamp};
use crate::catalog::layout::{KeyRecord, LayerRecord};
use crate::catalog::slots::KeySlot;
use crate::catalog::snapshot::{Label, Snapshot};
use crate::catalog::store_locks::RecordsLock;
use crate::catalog::{Catalog, SnapshotId};
use crate::crypt::BackupKeys;
use crate::disk::transfer::Watch;
use crate::events::Event;
use crate::helper::carry::UnderWay;
use crate::helper::rewrap;
use crate::kms::Failure;
use crate::kms::key_ref::{KeyRef, is_same_key};
use crate::ops::Store;
use crate::ops::clone::rewrap_slots;
use crate::ops::copy::full;
use crate::ops::need::{self, Budget, Gate};
use crate::sandbox;
use nix::fcntl::{Flock, OFlag};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// Blocks on their way at a time.
const WINDOW: usize = 12;

/// How a snapshot is to come.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wanted {
    /// The KMS key that is to wrap its data keys; without one, those that wrap them in the place.
    pub key: Option<String>,
    /// Its tag `Name`; without one, that of the snapshot in the place.
    pub name: Option<String>,
    /// Further tags, in place of those with the same keys.
    pub tags: Vec<(String, String)>,
    /// What may be used of the file system.
    pub budget: Budget,
}

/// Makes a snapshot of what a place has: of the snapshot that is `named`, or of its only one. Reports a
/// `pullSnapshot` event. `watch` is told how far it has come; an error of it ends the pull, which the next
/// one goes on with. This process, and what it starts, has no network afterwards.
///
/// # Errors
/// `NotFound` if there is no such snapshot; `Corrupt` for a manifest, page or block that is not what somebody
/// wrote who had the data keys, that is missing, or that is older than what this host has seen: nothing is
/// left then; `NoSpace`; those of the KMS, which name the key, and of the place.
pub fn pull(
    store: &Store,
    named: Option<SnapshotId>,
    target: &Target,
    wanted: &Wanted,
    watch: Watch<'_>,
) -> Result<Snapshot> {
    let started = Timestamp::now();
    let attempt = || format!("pull from {}", target.url);
    let mut session = Session::open(store, target, For::Reading).context(attempt)?;
    let id = choose(&mut session, named)?;
    let attempt = || format!("pull {id} from {}", target.url);
    let claim = session.claim_of_known(id).context(attempt)?;
    let volume = claim.claimed().snapshot.volume();
    let done = begin(store, &mut session, claim, wanted, watch);
    let result = done.as_ref().map(Snapshot::id).map_err(|failure| failure.cause.clone());
    store.events().record(&Event::pull_snapshot(id, volume, result, started));
    done.map_err(|failure| failure.error.context(attempt()))
}

fn begin(
    store: &Store,
    session: &mut Session,
    claim: Claim,
    wanted: &Wanted,
    watch: Watch<'_>,
) -> Result<Snapshot, Failure> {
    let catalog = store.catalog();
    let label = label(claim.claimed(), wanted)?;
    let to = wanted.key.as_deref().map(|key| target_key(store, key)).transpose()?;
    let interrupted = interrupted(&catalog, &claim.claimed().snapshot, &label, to.as_ref())?;
    let (id, owned) = match &interrupted {
        Some((copy, _)) => (copy.id(), copy.clone()),
        None => {
            let id = SnapshotId::random();
            (id, wrapped_for(store, &claim.claimed().snapshot, id, to.as_ref())?)
        }
    };
    let keys = keys_of(store, &owned)?;
    sandbox::give_up_network()?;
    let mark = mark_of(&claim);
    let [top, ..] = &keys[..] else {
        return Err(Error::new(Kind::Corrupt, "the manifest is of something without a data key").into());
    };
    let manifest = claim.prove(top)?;
    session.marks.check_place(session.id, true)?;
    session.marks.note(manifest.snapshot.id(), mark)?;
    let budget = wanted.budget;
    let (copy, lock) = match interrupted {
        Some((copy, lock)) => {
            manifest::check_seal(&copy, top)?;
            log::info!("going on with {id}, which was interrupted");
            (copy, lock)
        }
        None => {
            budget.check(&catalog, manifest.blocks().saturating_mul(BLOCK as u64))?;
            let copy = manifest::pulled(&manifest.snapshot, id, owned.keys().to_vec(), label, top);
            let lock = full::note(&catalog, &copy)?;
            (copy, lock)
        }
    };
    let pull = Pull { catalog: &catalog, manifest: &manifest, copy: &copy, keys: &keys };
    let filled = pull.fill(session, budget, watch);
    match filled.and_then(|()| full::commit(&catalog, &copy)) {
        Ok(()) => Ok(copy),
        // What does not prove right is not kept, in no part.
        Err(e) if e.kind() == Kind::Corrupt => {
            pull.abandon(lock);
            Err(e.into())
        }
        Err(e) => Err(e.into()),
    }
}

fn label(manifest: &Manifest, wanted: &Wanted) -> Result<Label> {
    let mut label = manifest.snapshot.label().clone();
    if let Some(name) = &wanted.name {
        label.tags.set("Name", name)?;
    }
    for (key, value) in &wanted.tags {
        label.tags.set(key, value)?;
    }
    Ok(label)
}

/// The KMS key that is to wrap the data keys: as its KMS names it, and its own id.
struct TargetKey {
    reference: KeyRef,
    key_id: String,
}

fn target_key(store: &Store, text: &str) -> Result<TargetKey, Failure> {
    let reference = KeyRef::of_operator(text, &store.settings().locality)?;
    let named = store.key_of(reference.clone())?;
    let described = named.describe().map_err(|e| Failure::kms(e, named.provider_name(), text))?;
    Ok(TargetKey { reference, key_id: described.key_id })
}

/// What is going to have the id `id`, as far as its keys go: the snapshot of the manifest, whose data keys
/// the KMS has wrapped for it.
fn wrapped_for(
    store: &Store,
    from: &Snapshot,
    id: SnapshotId,
    to: Option<&TargetKey>,
) -> Result<Snapshot, Failure> {
    let by = |slot: &KeySlot| format!("{} of the KMS \"{}\"", slot.wrapped.key_id, slot.provider);
    let mut copy = from.clone();
    (copy.id, copy.copy_of) = (id, Some(from.id()));
    for (new, old) in copy.layout.keys.iter_mut().zip(from.keys()) {
        *new = wrap(store, from, id, old, to).map_err(|failure| {
            failure.context(format!(
                "its data key is wrapped by {}, which has to unwrap it here",
                old.slots().iter().map(by).collect::<Vec<_>>().join(", or by ")
            ))
        })?;
    }
    Ok(copy)
}

fn wrap(
    store: &Store,
    from: &Snapshot,
    id: SnapshotId,
    old: &KeyRecord,
    to: Option<&TargetKey>,
) -> Result<KeyRecord, Failure> {
    let mut new = match to {
        // The data key is in a helper's memory for the moment, if at all.
        Some(to) => {
            let (root, settings, owner) = (store.root(), store.settings(), from.key_owner());
            let slot = rewrap::for_another_by_helper(root, settings, owner, id, old, &to.reference)?;
            KeyRecord::new(slot)
        }
        None => rewrap_slots(from, old, id.into(), None, &|name| store.provider(name))?,
    };
    new.check = old.check();
    Ok(new)
}

/// A pull of the same snapshot in the same way that was begun, and that nobody is at.
fn interrupted(
    catalog: &Catalog,
    from: &Snapshot,
    label: &Label,
    to: Option<&TargetKey>,
) -> Result<Option<(Snapshot, Flock<File>)>> {
    let _records = RecordsLock::acquire(catalog)?;
    let is_under = |new: &KeyRecord, old: &KeyRecord| {
        let is_by = |slot: &KeySlot, provider: &str, key: &str| {
            slot.provider == provider && is_same_key(provider, &slot.wrapped.key_id, key)
        };
        let is_wanted = |slot: &KeySlot| match to {
            Some(to) => is_by(slot, to.reference.provider.as_str(), &to.key_id),
            None => old.slots().iter().any(|old| is_by(slot, &old.provider, &old.wrapped.key_id)),
        };
        new.check() == old.check() && new.slots().iter().all(is_wanted)
    };
    for (id, path) in catalog.copies_in_the_making()? {
        let read = catalog.load_copying(id);
        let Ok(copy) = read.inspect_err(|e| log::warn!("left as it is: {e}")) else { continue };
        let is_laid_out_so = copy.layers().len() == from.layers().len()
            && copy.keys().len() == from.keys().len()
            && copy.keys().iter().zip(from.keys()).all(|(new, old)| is_under(new, old));
        let same =
            copy.copy_of() == Some(from.id()) && copy.volume() == from.volume() && copy.label() == label;
        if same
            && is_laid_out_so
            && copy.geometry() == from.geometry()
            && let Some(lock) = full::lock(&path)?
        {
            return Ok(Some((copy, lock)));
        }
    }
    Ok(None)
}

/// A pull in the making.
struct Pull<'a> {
    catalog: &'a Catalog,
    manifest: &'a Manifest,
    copy: &'a Snapshot,
    keys: &'a [BackupKeys],
}

/// A block on its way into its layer.
struct Coming {
    under_way: UnderWay,
    number: u64,
    name: ContentName,
}

impl Pull<'_> {
    /// Brings everything into the layers, durably.
    fn fill(&self, session: &mut Session, budget: Budget, watch: Watch<'_>) -> Result<()> {
        let total = self.manifest.blocks().saturating_mul(BLOCK as u64);
        let place = need::place(self.catalog.root());
        let mut gate = Gate::new(&place, budget.reserve);
        let mut done = 0;
        let mut step = || {
            watch(done, total)?;
            done += BLOCK as u64;
            gate.wait(&mut || watch(done.min(total), total))
        };
        for (n, layer) in self.copy.layers().iter().enumerate() {
            full::make_empty(self.catalog, layer)?;
            self.fill_layer(session, n, layer, &mut step)?;
        }
        watch(total, total)
    }

    fn fill_layer(
        &self,
        session: &mut Session,
        n: usize,
        layer: &LayerRecord,
        step: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        let path = self.catalog.layer_path(layer.id);
        let attempt = || format!("write {}", path.display());
        let file = files::open_layer(&path, OFlag::O_RDWR).context(attempt)?;
        let mut into = Into { file, size: layer.size, room: vec![0; BLOCK] };
        let mut coming: VecDeque<Coming> = VecDeque::new();
        let keys = &self.keys[n];
        for (&number, entry) in &self.manifest.planes[n].pages {
            let page = session.page(entry.name, keys)?.ok_or_else(|| missing(entry.name, PAGES))?;
            if page.0.len() != entry.blocks as usize {
                let problem = format!("{} has another number of blocks", entry.name.object(PAGES));
                return Err(Error::new(Kind::Corrupt, problem));
            }
            for (at, name) in page.0 {
                let number = u64::from(number) * RUN + u64::from(at);
                into.check(number)?;
                step()?;
                if into.has(number, name, keys).context(attempt)? {
                    continue;
                }
                while coming.len() >= WINDOW {
                    self.arrive(session, &mut coming, &mut into, keys)?;
                }
                let under_way = session.carrier.begin_get(&name.object(BLOCKS), block::MAX)?;
                coming.push_back(Coming { under_way, number, name });
            }
        }
        while !coming.is_empty() {
            self.arrive(session, &mut coming, &mut into, keys)?;
        }
        into.file.sync_data().context(attempt)
    }

    /// Waits for the first block, proves it, and writes it.
    fn arrive(
        &self,
        session: &mut Session,
        coming: &mut VecDeque<Coming>,
        into: &mut Into,
        keys: &BackupKeys,
    ) -> Result<()> {
        let Some(Coming { under_way, number, name }) = coming.pop_front() else { return Ok(()) };
        let object = session.carrier.got(under_way)?.ok_or_else(|| missing(name, BLOCKS))?;
        session.brake.wait(object.len() as u64);
        check_name(name, &object, keys, BLOCKS)?;
        into.write(number, &object).context(|| format!("write a block of {}", self.copy.id()))
    }

    /// Takes back what was begun.
    fn abandon(&self, lock: Flock<File>) {
        let clear = || -> Result<()> {
            let records = RecordsLock::acquire(self.catalog)?;
            self.catalog.abandon_copy(self.copy.id(), &records)
        };
        if let Err(e) = clear() {
            log::warn!("{e}; \"sealblk gc\" tries again");
        }
        drop(lock);
    }
}

/// A layer that is being filled.
struct Into {
    file: File,
    size: u64,
    room: Vec<u8>,
}

impl Into {
    fn bytes_of(&self, number: u64) -> Range<u64> {
        let at = number * BLOCK as u64;
        at..(at + BLOCK as u64).min(self.size)
    }

    /// Fails for a block that lies beyond the end.
    fn check(&self, number: u64) -> Result<()> {
        match number < manifest::blocks_of(self.size) {
            true => Ok(()),
            false => Err(Error::new(Kind::Corrupt, format!("there is a block {number}, beyond its end"))),
        }
    }

    /// Whether the block is there already, from a pull that was interrupted.
    fn has(&mut self, number: u64, name: ContentName, keys: &BackupKeys) -> Result<bool> {
        let bytes = self.bytes_of(number);
        let data = crate::backing::file::next_data_of(&self.file, bytes.start)?;
        if data.is_none_or(|data| data.start >= bytes.end) {
            return Ok(false);
        }
        let room = &mut self.room[..(bytes.end - bytes.start) as usize];
        self.file.read_exact_at(room, bytes.start)?;
        Ok(block::encode(room).is_some_and(|object| name.is(&keys.name(&object))))
    }

    /// Writes a block of which `object` is the object. What is not there becomes no hole: the layer was
    /// empty, or has a part of this very block.
    fn write(&mut self, number: u64, object: &[u8]) -> Result<()> {
        let bytes = self.bytes_of(number);
        let room = &mut self.room[..(bytes.end - bytes.start) as usize];
        block::decode(object, room)?;
        let mut at = 0;
        while at < room.len() {
            let len = room[at..]
                .chunks(SECTOR)
                .take_while(|sector| !is_zero(sector))
                .map(<[u8]>::len)
                .sum::<usize>();
            self.file.write_all_at(&room[at..at + len], bytes.start + at as u64)?;
            at += len;
            at += room[at..]
                .chunks(SECTOR)
                .take_while(|sector| is_zero(sector))
                .map(<[u8]>::len)
                .sum::<usize>();
        }
        Ok(())
    }
}
