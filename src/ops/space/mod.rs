//! Space that nobody needs any more is given back: what layers above cover in every chain, and layers that no
//! record tells apart from their neighbours.
//!
//! 1. What is [covered](cover) is given back where it lies. That is all that a deleted snapshot alone
//!    needed; it moves nothing.
//! 2. Layers that lie next to one another wherever they are named are [merged](merge), in the direction that
//!    moves less, so that chains stay as short as there are snapshots.
//! 3. Layers that hold nothing then leave the chains of attached volumes at once, and those of others when
//!    their record is next sealed ([`let_empty_layers_go`]).
//!
//! Everything is done while volumes are attached, and can be interrupted at any moment: whoever comes next
//! finds in the layers what is still to be done. Only one command of a store does it at a time.

mod cover;
mod layer;
mod merge;

use super::Store;
use super::brake::Brake;
use super::reach::is_attached;
use crate::base::root::files;
use crate::base::{Context, Error, Kind, Result};
use crate::catalog::chains::{Chain, above, chains};
use crate::catalog::store_locks::RecordsLock;
use crate::catalog::{Catalog, LayerId, VolumeId, leaving};
use crate::host::control;
use crate::volume::open::Taken;
use cover::Covers;
use layer::LayerFile;
use merge::{Merge, Pair, Way, cheaper, pairs};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::rc::Rc;

/// From so many layers with data on, a chain is made shorter whatever that moves.
const LONG_CHAIN: usize = 32;

/// What came of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Given {
    /// Bytes that layers above covered, and that were given back.
    pub bytes: u64,
    /// Bytes that were moved, from layers that hold nothing now.
    pub moved: u64,
    /// Layers that were merged with a neighbour.
    pub merged: usize,
    /// Pairs of layers that could be merged, and were left for another time: somebody reads them, and it
    /// would move much more now than when nobody does.
    pub later: usize,
    /// Whether another command was at it, so that nothing was done.
    pub is_busy: bool,
    /// Whether the file system makes no holes, so that nothing was done.
    pub has_no_holes: bool,
}

/// How far it has come: what it does, and how many bytes of how many are done.
pub type Tell<'a> = dyn FnMut(&'static str, u64, u64) -> Result<()> + 'a;

/// Gives back what can be of these layers, and of all layers of the store if there are none given. At most
/// `rate` bytes a second are moved; 0: no limit. `tell` ends it with an error.
///
/// # Errors
/// `Corrupt` if a record cannot be read, and the ledger does not know its layers: then nobody knows what it
/// needs, and nothing is done. Those of the file system and of `tell`: what was given back by then is.
pub fn give_back(store: &Store, of: Option<&[LayerId]>, rate: u64, tell: &mut Tell<'_>) -> Result<Given> {
    let catalog = store.catalog();
    // Images are not made holes in from here, nor are two made one.
    if catalog.root().pool().is_some() || !files::exists(&catalog.root().layers()) {
        return Ok(Given::default());
    }
    let Some(_turn) = Turn::take(&catalog)? else {
        return Ok(Given { is_busy: true, ..Given::default() });
    };
    let mut work = Work { catalog: &catalog, of, brake: Brake::new(rate), tell, given: Given::default() };
    if !work.can_have_holes()? {
        return Ok(Given { has_no_holes: true, ..Given::default() });
    }
    work.give_back_covered(true)?;
    work.merge_all()?;
    work.let_empty_go()?;
    Ok(work.given)
}

/// Gives back what of these layers is covered, and moves nothing: behind a copy that brings up what they
/// hold. Returns how many bytes that was.
///
/// # Errors
/// As for [`give_back`]; `Unsupported` on a file system that makes no holes.
pub(super) fn give_back_covered(store: &Store, of: &[LayerId]) -> Result<u64> {
    let catalog = store.catalog();
    if catalog.root().pool().is_some() {
        return Ok(0);
    }
    let Some(_turn) = Turn::take(&catalog)? else { return Ok(0) };
    let tell: &mut Tell<'_> = &mut |_, _, _| Ok(());
    let mut work =
        Work { catalog: &catalog, of: Some(of), brake: Brake::new(0), tell, given: Given::default() };
    work.give_back_covered(true)?;
    Ok(work.given.bytes)
}

/// Whether the file system of these layers makes holes, so that any of it can be given back.
///
/// # Errors
/// Those of the file system.
pub(super) fn can_have_holes(catalog: &Catalog, layers: impl IntoIterator<Item = LayerId>) -> Result<bool> {
    for layer in layers {
        // A block device has none to give back.
        if let Some(layer) = LayerFile::change(catalog, layer)? {
            return layer.can_have_holes();
        }
    }
    Ok(true)
}

/// How many bytes [`give_back`] would give back of the whole store without moving any.
///
/// # Errors
/// As for that.
pub fn look(store: &Store, tell: &mut Tell<'_>) -> Result<u64> {
    let catalog = store.catalog();
    if !files::exists(&catalog.root().layers()) {
        return Ok(0);
    }
    let mut work = Work { catalog: &catalog, of: None, brake: Brake::new(0), tell, given: Given::default() };
    work.give_back_covered(false)?;
    Ok(work.given.bytes)
}

/// Takes frozen layers that hold nothing out of a volume's chain, whose record this process can seal: it has
/// the volume, and nobody has it attached.
///
/// # Errors
/// Those of the file system: the volume goes on with the layers that it had.
pub(super) fn let_empty_layers_go(catalog: &Catalog, taken: &mut Taken) -> Result<()> {
    let opened = &mut taken.opened;
    if opened.metadata.layout().hydrate().is_some() {
        return Ok(());
    }
    let mut empty = Vec::new();
    for layer in &opened.metadata.layers()[1..] {
        if LayerFile::is_empty(catalog, layer.id)? {
            empty.push(layer.id);
        }
    }
    if empty.is_empty() {
        return Ok(());
    }
    let stays: Vec<bool> = opened.metadata.layers().iter().map(|layer| !empty.contains(&layer.id)).collect();
    leaving::commit_empty(catalog, &taken.lock, &mut opened.metadata, &empty, opened.seal_key.as_ref())?;
    let mut stays = stays.into_iter();
    opened.layers.retain(|_| stays.next().unwrap_or(true));
    log::info!("{}: {} layers that hold nothing have left its chain", opened.metadata.id(), empty.len());
    // With this their files go, where nothing else names them.
    catalog.recover(&taken.lock, &opened.metadata)
}

/// The right to move data between layers: an flock on `layers/`.
struct Turn {
    _folder: Flock<File>,
}

impl Turn {
    /// None if another command has it.
    fn take(catalog: &Catalog) -> Result<Option<Self>> {
        let path = catalog.root().layers();
        let attempt = || format!("lock {}", path.display());
        let folder = files::folder(&path).context(attempt)?;
        match Flock::lock(folder, FlockArg::LockExclusiveNonblock) {
            Ok(folder) => Ok(Some(Turn { _folder: folder })),
            Err((_, Errno::EWOULDBLOCK)) => Ok(None),
            Err((_, e)) => Err(Error::from(e).context(attempt())),
        }
    }
}

struct Work<'a, 'b> {
    catalog: &'a Catalog,
    of: Option<&'a [LayerId]>,
    brake: Brake,
    tell: &'a mut Tell<'b>,
    given: Given,
}

impl Work<'_, '_> {
    fn chains(&self) -> Result<Vec<Chain>> {
        chains(self.catalog, &RecordsLock::acquire(self.catalog)?).map_err(|e| {
            e.context("nothing is given back, since it is not known which layers are still needed")
        })
    }

    fn can_have_holes(&self) -> Result<bool> {
        let chains = self.chains()?;
        can_have_holes(self.catalog, chains.iter().flat_map(|chain| &chain.links).map(|link| link.id))
    }

    fn is_wanted(&self, layer: LayerId) -> bool {
        self.of.is_none_or(|of| of.contains(&layer))
    }

    /// Whether a chain has one of the layers that this is about.
    fn is_about(&self, chain: &Chain) -> bool {
        chain.links.iter().any(|link| self.is_wanted(link.id))
    }

    fn give_back_covered(&mut self, punched: bool) -> Result<()> {
        let chains = self.chains()?;
        let mut wanted: Vec<LayerId> =
            chains.iter().flat_map(|chain| &chain.links).map(|link| link.id).collect();
        wanted.sort_unstable();
        wanted.dedup();
        wanted.retain(|&id| self.is_wanted(id));
        let mut open: HashMap<LayerId, Rc<LayerFile>> = HashMap::new();
        for id in wanted {
            let Some(lists) = above(id, &chains) else { continue };
            let layer = match punched {
                true => LayerFile::change(self.catalog, id)?,
                false => LayerFile::look_at(self.catalog, id)?,
            };
            let Some(layer) = layer else { continue };
            open.retain(|id, _| lists.iter().flatten().any(|other| other == id));
            let covers =
                lists.iter().map(|list| self.open_all(list, &mut open)).collect::<Result<Covers>>()?;
            let (size, tell) = (layer.size, &mut *self.tell);
            let mut step = |at| tell("looking for data that nobody needs", at, size);
            self.given.bytes += cover::give_back(&layer, &covers, punched, &mut step)?;
        }
        Ok(())
    }

    fn open_all(
        &self,
        list: &[LayerId],
        open: &mut HashMap<LayerId, Rc<LayerFile>>,
    ) -> Result<Vec<Rc<LayerFile>>> {
        let mut files = Vec::new();
        for &id in list {
            if let Some(file) = open.get(&id) {
                files.push(file.clone());
            // One that is no file, or has gone, covers nothing.
            } else if let Some(file) = LayerFile::look_at(self.catalog, id)? {
                files.push(open.entry(id).insert_entry(Rc::new(file)).get().clone());
            }
        }
        Ok(files)
    }

    fn merge_all(&mut self) -> Result<()> {
        let mut left = HashSet::new();
        loop {
            let chains = self.chains()?;
            let empty = self.empty_layers(&chains)?;
            let is_wanted = |id| self.is_wanted(id);
            let found = pairs(&chains, &empty, is_wanted);
            let mut found = found.into_iter().filter(|pair| !left.contains(&(pair.upper.id, pair.lower.id)));
            // A layer on a device takes the device, merged or not.
            let is_file = |id| Ok::<_, Error>(self.catalog.on_device(id)?.is_none());
            let is_of_files =
                |pair: &Pair| Ok::<_, Error>(is_file(pair.upper.id)? && is_file(pair.lower.id)?);
            let next = found.find_map(|pair| match is_of_files(&pair) {
                Ok(true) => Some(Ok(pair)),
                Ok(false) => None,
                Err(e) => Some(Err(e)),
            });
            let Some(pair) = next.transpose()? else { return Ok(()) };
            let is_pressing = chains.iter().any(|chain| {
                let full = chain.links.iter().filter(|link| !empty.contains(&link.id));
                chain.position(pair.upper.id).is_some() && full.count() >= LONG_CHAIN
            });
            if !self.merge(&pair, is_pressing)? {
                self.given.later += 1;
                left.insert((pair.upper.id, pair.lower.id));
            }
        }
    }

    /// The frozen layers that hold nothing, of the chains that this is about.
    fn empty_layers(&self, chains: &[Chain]) -> Result<HashSet<LayerId>> {
        let written: HashSet<LayerId> = chains
            .iter()
            .filter(|chain| chain.is_written)
            .filter_map(|chain| chain.links.first())
            .map(|l| l.id)
            .collect();
        let about = chains.iter().filter(|chain| self.is_about(chain));
        let mut frozen: Vec<LayerId> = about.flat_map(|chain| &chain.links).map(|link| link.id).collect();
        frozen.sort_unstable();
        frozen.dedup();
        let mut empty = HashSet::new();
        for id in frozen.into_iter().filter(|id| !written.contains(id)) {
            if LayerFile::is_empty(self.catalog, id)? {
                empty.insert(id);
            }
        }
        Ok(empty)
    }

    /// Merges two layers, if that can be done now; returns whether it was.
    fn merge(&mut self, pair: &Pair, is_pressing: bool) -> Result<bool> {
        let catalog = self.catalog;
        let (upper, lower) =
            (LayerFile::change(catalog, pair.upper.id)?, LayerFile::change(catalog, pair.lower.id)?);
        let (Some(upper), Some(lower)) = (upper, lower) else { return Ok(false) };
        let mut served: Vec<VolumeId> = Vec::new();
        for &volume in &pair.volumes {
            match is_attached(catalog, volume) {
                Ok(true) => served.push(volume),
                Ok(false) => {}
                Err(e) if e.kind() == Kind::NotFound => {}
                Err(e) => return Err(e),
            }
        }
        let (way, total) = cheaper(&upper, &lower, !served.is_empty(), is_pressing)?;
        let merge = Merge { catalog, pair, upper: &upper, lower: &lower, served: &served };
        let (mut done, tell, brake) = (0, &mut *self.tell, &mut self.brake);
        let mut step = |bytes| {
            done += bytes;
            brake.wait(bytes);
            tell("merging layers", done, total.max(done))
        };
        let merged = match way {
            Way::Later => return Ok(false),
            Way::Down => merge.down(&mut step),
            Way::Up => merge.up(&mut step),
        };
        self.given.moved += done;
        match merged {
            Ok(()) => {
                self.given.merged += 1;
                Ok(true)
            }
            // Somebody reads them, or has detached or attached just now.
            Err(e) if matches!(e.kind(), Kind::Busy | Kind::NotFound | Kind::Unsupported | Kind::Usage) => {
                log::info!("layers {} and {} are not merged now: {e}", pair.upper.id, pair.lower.id);
                Ok(false)
            }
            Err(e) => Err(e),
        }
    }

    /// Has attached volumes let go of layers that hold nothing.
    fn let_empty_go(&self) -> Result<()> {
        let chains = self.chains()?;
        let empty = self.empty_layers(&chains)?;
        for chain in chains.iter().filter(|chain| !chain.is_hydrating) {
            let Some(volume) = chain.volume else { continue };
            let below = chain.links.iter().skip(1).map(|link| link.id);
            let below: Vec<LayerId> = below.filter(|id| empty.contains(id)).collect();
            if below.is_empty() || !is_attached(self.catalog, volume).unwrap_or(false) {
                continue;
            }
            let gone = control::let_go(self.catalog, volume, &below);
            if let Err(e) = gone.and_then(|()| self.catalog.clear_left(volume)) {
                log::info!("{volume} keeps {} layers that hold nothing for now: {e}", below.len());
            }
        }
        Ok(())
    }
}
