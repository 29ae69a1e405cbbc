//! Who else has a data key that a volume has: the snapshot that it was made from, other
//! volumes made from that, copies.
//!
//! Whoever breaks into the host process of one of them has that key, and reads whatever is under it. Records
//! tell: two that name one layer have its data key, and so have two whose keys have the same check value.
//! What the first attach of a volume has not noted yet is found by way of the layers.

use crate::base::Result;
use crate::catalog::layout::Layout;
use crate::catalog::{Catalog, LayerId, Metadata, SnapshotId, VolumeId};
use std::collections::{HashMap, HashSet};

/// Who has a data key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Holder {
    /// A snapshot.
    Snapshot(SnapshotId),
    /// A volume.
    Volume(VolumeId),
}

/// For each data key of the volume, in their order, who else has it: snapshots first, each sorted by id. A
/// record that cannot be read is left out.
///
/// # Errors
/// Those of listing the store.
pub fn of(catalog: &Catalog, volume: &Metadata) -> Result<Vec<Vec<Holder>>> {
    let volumes: Vec<Metadata> =
        catalog.list()?.into_iter().filter_map(|entry| entry.metadata.ok()).collect();
    let snapshots: Vec<_> =
        catalog.snapshots()?.into_iter().filter_map(|entry| entry.snapshot.ok()).collect();
    let volumes = volumes.iter().map(|v| (Holder::Volume(v.id()), v.layout()));
    let snapshots = snapshots.iter().map(|s| (Holder::Snapshot(s.id()), s.layout()));
    Ok(sharing((Holder::Volume(volume.id()), volume.layout()), volumes.chain(snapshots)))
}

/// A data key as a record has it: whose, and its number there.
type Place = (Holder, usize);

/// What two records have in common that have the same data key.
#[derive(PartialEq, Eq, Hash)]
enum Sign {
    Layer(LayerId),
    Check([u8; 16]),
}

fn sharing<'a>(
    (whose, layout): (Holder, &Layout),
    records: impl Iterator<Item = (Holder, &'a Layout)>,
) -> Vec<Vec<Holder>> {
    let mut signs: HashMap<Place, Vec<Sign>> = HashMap::new();
    let mut places: HashMap<Sign, Vec<Place>> = HashMap::new();
    let mut note = |holder: Holder, layout: &Layout| {
        for (n, key) in layout.keys().iter().enumerate() {
            let of_layers = layout.layers().iter().filter(|l| l.key == Some(n)).map(|l| l.id);
            let all = || of_layers.clone().map(Sign::Layer).chain(key.check().map(Sign::Check));
            all().for_each(|sign| places.entry(sign).or_default().push((holder, n)));
            signs.insert((holder, n), all().collect());
        }
    };
    note(whose, layout);
    records.filter(|(holder, _)| *holder != whose).for_each(|(holder, layout)| note(holder, layout));
    let who_has = |key: usize| {
        let mut found = HashSet::from([(whose, key)]);
        let mut next = vec![(whose, key)];
        while let Some(place) = next.pop() {
            for same in signs.get(&place).into_iter().flatten().filter_map(|sign| places.get(sign)).flatten()
            {
                if found.insert(*same) {
                    next.push(*same);
                }
            }
        }
        let holders: HashSet<Holder> = found.into_iter().map(|(holder, _)| holder).collect();
        let mut others: Vec<Holder> = holders.into_iter().filter(|holder| *holder != whose).collect();
        others.sort_unstable();
        others
    };
    (0..layout.keys().len()).map(who_has).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::metadata::{Geometry, KeyRecord, LayerRecord};
    use crate::catalog::slots::KeySlot;
    use crate::crypt::SectorSize;
    use crate::kms::WrappedKey;

    fn key(check: Option<u8>) -> KeyRecord {
        let wrapped = WrappedKey { key_id: "arn:1".into(), blob: vec![1] };
        let mut key = KeyRecord::new(KeySlot::new("embedded", wrapped));
        key.check = check.map(|n| [n; 16]);
        key
    }

    fn layout(keys: &[Option<u8>], layers: &[(LayerId, usize)]) -> Layout {
        let geometry = Geometry::new(512, SectorSize::B512).unwrap();
        let layer =
            |&(id, key): &(LayerId, usize)| LayerRecord { id, key: Some(key), masked: false, size: 512 };
        let (keys, layers) = (keys.iter().copied().map(key).collect(), layers.iter().map(layer).collect());
        Layout { geometry, keys, layers, hydrate: None }
    }

    #[test]
    fn a_key_is_shared_by_layers_and_by_check_values_and_by_way_of_others() {
        let [golden, top, own, flat] = [(); 4].map(|()| LayerId::random());
        let snapshot = Holder::Snapshot(SnapshotId::random());
        let [clone, apart, flattened, stranger] = [(); 4].map(|()| Holder::Volume(VolumeId::random()));
        let records = [
            (snapshot, layout(&[Some(1)], &[(golden, 0)])),
            (clone, layout(&[None], &[(top, 0), (golden, 0)])),
            (apart, layout(&[None, None], &[(own, 1), (golden, 0)])),
            // It names no layer of the others any more.
            (flattened, layout(&[Some(1)], &[(flat, 0)])),
            (stranger, layout(&[Some(2)], &[(LayerId::random(), 0)])),
        ];
        let of = |whose: Holder| {
            let layout = &records.iter().find(|(holder, _)| *holder == whose).unwrap().1;
            sharing((whose, layout), records.iter().map(|(holder, layout)| (*holder, layout)))
        };
        let sorted = |mut holders: Vec<Holder>| {
            holders.sort_unstable();
            holders
        };
        assert_eq!(of(clone), [sorted(vec![snapshot, apart, flattened])]);
        assert_eq!(of(apart), [sorted(vec![snapshot, clone, flattened]), vec![]]);
        assert_eq!(of(flattened), [sorted(vec![snapshot, clone, apart])]);
        assert_eq!(of(stranger), [[]]);
    }
}
