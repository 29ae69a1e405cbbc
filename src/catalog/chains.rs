//! Which layers lie above one another in every record: what it takes to know who needs what of a layer.
//!
//! A sector of a layer is seen by those records alone that name the layer and have nothing of that sector
//! in a layer above it. So what all of them cover is needed by nobody.

use crate::base::{Error, Kind, Result};
use crate::catalog::layout::{KeyRecord, Layout};
use crate::catalog::lock::Held;
use crate::catalog::store_locks::RecordsLock;
use crate::catalog::{self, CREATING, Catalog, LayerId, VolumeId};
use crate::crypt::SectorSize;

/// The layers of one record.
#[derive(Clone, Debug)]
pub(crate) struct Chain {
    /// The volume whose record it is; none for a snapshot's.
    pub(crate) volume: Option<VolumeId>,
    /// The top one first.
    pub(crate) links: Vec<Link>,
    /// Whether the top one takes writes.
    pub(crate) is_written: bool,
    /// Whether some of them are being copied up, to leave the chain.
    pub(crate) is_hydrating: bool,
}

/// A layer in a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Link {
    /// Names its file.
    pub(crate) id: LayerId,
    /// Its length in bytes.
    pub(crate) size: u64,
    /// The cipher's data unit.
    pub(crate) unit: SectorSize,
    /// How what it holds is encrypted.
    pub(crate) secret: Secret,
}

/// How a layer's bytes are to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Secret {
    /// Under the data key with this check value.
    Key([u8; 16]),
    /// Under a data key that nobody has had in hands yet, so that it is known from no other.
    Unproved,
    /// Under a mask, which is no secret.
    Mask,
    /// Not at all.
    Plain,
}

impl Chain {
    fn of(volume: Option<VolumeId>, layout: &Layout, is_written: bool) -> Self {
        let unit = layout.geometry().sector_size();
        let check = |n: usize| layout.keys().get(n).and_then(KeyRecord::check);
        let links = layout.layers().iter().map(|layer| {
            let secret = match layer.key {
                Some(n) => check(n).map_or(Secret::Unproved, Secret::Key),
                None if layer.masked => Secret::Mask,
                None => Secret::Plain,
            };
            Link { id: layer.id, size: layer.size, unit, secret }
        });
        Chain { volume, links: links.collect(), is_written, is_hydrating: layout.hydrate().is_some() }
    }

    /// A layer of which nothing else is known than that it is needed.
    fn of_one(id: LayerId) -> Self {
        let link = Link { id, size: 0, unit: SectorSize::B512, secret: Secret::Unproved };
        Chain { volume: None, links: vec![link], is_written: true, is_hydrating: true }
    }

    /// Where in the chain a layer is, counted from the top.
    pub(crate) fn position(&self, layer: LayerId) -> Option<usize> {
        self.links.iter().position(|link| link.id == layer)
    }
}

/// The chains of all volumes and snapshots, also of those that are being made.
///
/// Records are read as they stand there, whoever wrote them: one that says more than it may only makes more
/// of a layer needed. What a record names that cannot be read, the ledger knows, and not in which order: all
/// of those layers are needed. All volumes are read before the snapshots, for the reason that
/// [`crate::catalog::references`] gives.
///
/// # Errors
/// `Corrupt`, naming the first record that cannot be read, and of which the ledger knows nothing either: then
/// nobody knows what it needs.
pub(crate) fn chains(catalog: &Catalog, _records: &RecordsLock) -> Result<Vec<Chain>> {
    let mut all = Vec::new();
    for id in catalog.folders()? {
        for name in [CREATING, catalog::FILE] {
            match catalog.read_record(&catalog.folder(id).join(name), id) {
                Ok(metadata) => {
                    all.push(Chain::of(Some(id), metadata.layout(), true));
                    break;
                }
                Err(e) if e.kind() == Kind::NotFound => {}
                // Never to become a volume: whoever was at it is gone.
                Err(_) if name == CREATING && catalog.held(id)? == Held::Free => {}
                Err(e) => all.extend(needed(catalog.layers_in_ledger(id)?, e)?),
            }
        }
    }
    for (id, _) in catalog.copies_in_the_making()? {
        match (catalog.load_copying(id), catalog.load_copying_claim(id)) {
            (Ok(copy), _) => all.push(Chain::of(None, copy.layout(), true)),
            (_, Err(e)) if e.kind() == Kind::NotFound => {}
            // Believed or not, what it names is needed.
            (Err(_), Ok(copy)) => all.extend(copy.layers().iter().map(|layer| Chain::of_one(layer.id))),
            (Err(_), Err(e)) => all.extend(needed(catalog.snapshot_layers_in_ledger(id)?, e)?),
        }
    }
    for id in catalog.snapshot_ids()? {
        match catalog.load_snapshot_claim(id) {
            Ok(snapshot) => all.push(Chain::of(None, snapshot.layout(), false)),
            Err(e) if e.kind() == Kind::NotFound => {}
            Err(e) => all.extend(needed(catalog.snapshot_layers_in_ledger(id)?, e)?),
        }
    }
    Ok(all)
}

/// Layers of a record that cannot be read, for the reason `e`, as the ledger knows them.
fn needed(known: Option<Vec<LayerId>>, e: Error) -> Result<impl Iterator<Item = Chain>> {
    let layers = known.ok_or(e)?;
    Ok(layers.into_iter().map(Chain::of_one))
}

/// What lies above a layer in each chain that has it, the nearest first, as far as one does not follow from
/// another: what the layers of a shorter list cover, those of a list that begins with them cover as well.
/// None if some chain has nothing above it, so that all of the layer is seen.
pub(crate) fn above(layer: LayerId, chains: &[Chain]) -> Option<Vec<Vec<LayerId>>> {
    let mut lists: Vec<Vec<LayerId>> = Vec::new();
    for chain in chains {
        let Some(position) = chain.position(layer) else { continue };
        lists.push(chain.links[..position].iter().rev().map(|link| link.id).collect());
    }
    lists.sort_unstable_by_key(Vec::len);
    let mut fewest: Vec<Vec<LayerId>> = Vec::new();
    for list in lists {
        if list.is_empty() {
            return None;
        }
        if !fewest.iter().any(|other| list.starts_with(other)) {
            fewest.push(list);
        }
    }
    (!fewest.is_empty()).then_some(fewest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(layers: &[LayerId]) -> Chain {
        let link = |&id: &LayerId| Link { id, size: 4096, unit: SectorSize::B512, secret: Secret::Unproved };
        Chain {
            volume: None,
            links: layers.iter().map(link).collect(),
            is_written: false,
            is_hydrating: false,
        }
    }

    #[test]
    fn what_lies_above_is_said_once_and_nothing_where_somebody_sees_all() {
        let [a, b, c, d] = std::array::from_fn(|_| LayerId::random());
        let (volume, snapshot) = (chain(&[a, b, c]), chain(&[b, c]));
        assert_eq!(above(c, &[volume.clone(), snapshot.clone()]), Some(vec![vec![b]]));
        // Another volume has something else above it.
        assert_eq!(above(c, &[volume.clone(), snapshot, chain(&[d, c])]), Some(vec![vec![b], vec![d]]));
        assert_eq!(above(c, &[volume.clone(), chain(&[c])]), None);
        assert_eq!(above(a, std::slice::from_ref(&volume)), None);
        assert_eq!(above(d, &[volume]), None);
    }
}
