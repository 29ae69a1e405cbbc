//! What volumes take on disk, and what they may come to take: a volume is as large as it was made, and takes
//! what was written. All of them together can be larger than the file system that they lie on.
#![forbid(unsafe_code)]

use crate::base::Result;
use crate::base::space::Space;
use crate::catalog::metadata::LayerRecord;
use crate::catalog::{Catalog, Entry, LayerId, VolumeId};
use std::collections::HashMap;
use std::fmt::Display;
use std::os::unix::fs::MetadataExt;

/// What the layers of a volume take on disk, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Of the layers that nothing else names.
    pub own: u64,
    /// Of those that a snapshot or another volume names as well.
    pub shared: u64,
    /// How long those are that lie on block devices, and take nothing of the file system.
    pub on_devices: u64,
}

/// All volumes against the file system that they lie on.
pub struct Overview {
    usage: HashMap<VolumeId, Usage>,
    /// The sum of the sizes of those that write into the file system, in bytes.
    pub sizes: u64,
    /// What they take in all, each layer once, in bytes.
    pub used: u64,
    /// The file system; none where it does not say.
    pub space: Option<Space>,
}

impl Overview {
    /// Looks at these volumes, which are all that there are. What cannot be read, or
    /// looked at, takes nothing.
    ///
    /// # Errors
    /// Those of listing the snapshots.
    pub fn of<'a>(catalog: &Catalog, volumes: impl IntoIterator<Item = &'a Entry>) -> Result<Self> {
        let volumes: Vec<_> = volumes.into_iter().filter_map(|entry| entry.metadata.as_ref().ok()).collect();
        let volumes = || volumes.iter().copied();
        let mut names: HashMap<LayerId, (u32, u64)> = HashMap::new();
        let mut note = |id: LayerId| match names.get_mut(&id) {
            Some((count, _)) => *count += 1,
            None => drop(names.insert(id, (1, on_disk(catalog, id)))),
        };
        volumes().flat_map(|volume| volume.layers()).for_each(|layer| note(layer.id));
        for snapshot in catalog.snapshots()? {
            let snapshot = snapshot.snapshot.iter();
            snapshot.flat_map(|snapshot| snapshot.layers()).for_each(|layer| note(layer.id));
        }
        let usage = volumes().map(|volume| {
            let mut usage = Usage::default();
            let on_device = volume.layers().iter().filter(|layer| is_on_device(catalog, layer.id));
            usage.on_devices = on_device.map(|layer| layer.size).fold(0, u64::saturating_add);
            for (count, bytes) in volume.layers().iter().filter_map(|layer| names.get(&layer.id)) {
                *(if *count == 1 { &mut usage.own } else { &mut usage.shared }) += bytes;
            }
            (volume.id(), usage)
        });
        Ok(Overview {
            usage: usage.collect(),
            sizes: volumes()
                .filter(|volume| !is_on_device(catalog, volume.top().id))
                .map(|volume| volume.size())
                .fold(0, u64::saturating_add),
            used: names.values().map(|(_, bytes)| bytes).sum(),
            space: match catalog.root().pool() {
                // Images take nothing of a file system of this host's.
                Some(_) => None,
                None => Space::at(&catalog.root().layers()).ok().flatten(),
            },
        })
    }

    /// What a volume takes.
    pub fn usage(&self, id: VolumeId) -> Usage {
        self.usage.get(&id).copied().unwrap_or_default()
    }
}

/// What one layer takes on disk, and who needs it.
pub struct OfLayer {
    /// Its file's blocks, in bytes; nothing of a layer on a device.
    pub on_disk: u64,
    /// How long it is, if it lies on a block device.
    pub on_device: Option<u64>,
    /// The ids of the other volumes and snapshots that name it.
    pub shared_with: Vec<String>,
}

/// What each layer of a volume or snapshot takes, and who else names it; `whose` is its id. What cannot be
/// read names nothing here.
///
/// # Errors
/// Those of listing volumes and snapshots.
pub fn of_layers(catalog: &Catalog, whose: &dyn Display, layers: &[LayerRecord]) -> Result<Vec<OfLayer>> {
    let whose = whose.to_string();
    let look = |layer: &LayerRecord| OfLayer {
        on_disk: on_disk(catalog, layer.id),
        on_device: is_on_device(catalog, layer.id).then_some(layer.size),
        shared_with: Vec::new(),
    };
    let mut found: Vec<OfLayer> = layers.iter().map(look).collect();
    let mut note = |id: String, theirs: &[LayerRecord]| {
        for (layer, found) in layers.iter().zip(&mut found) {
            if id != whose && theirs.iter().any(|other| other.id == layer.id) {
                found.shared_with.push(id.clone());
            }
        }
    };
    for id in catalog.ids()? {
        if let Ok(volume) = catalog.load_claim(id) {
            note(id.to_string(), volume.layers());
        }
    }
    for id in catalog.snapshot_ids()? {
        if let Ok(snapshot) = catalog.load_snapshot_claim(id) {
            note(id.to_string(), snapshot.layers());
        }
    }
    Ok(found)
}

/// Whether a layer lies on a block device; where that cannot be told, it does not.
fn is_on_device(catalog: &Catalog, layer: LayerId) -> bool {
    matches!(catalog.on_device(layer), Ok(Some(_)))
}

/// In how many bytes a layer may have something: its file's blocks; all of a device.
pub fn most_in(catalog: &Catalog, layer: &LayerRecord) -> u64 {
    if is_on_device(catalog, layer.id) { layer.size } else { on_disk(catalog, layer.id) }
}

/// What a layer's file takes on disk, in bytes; nothing if it cannot be looked at, and of one on a device.
fn on_disk(catalog: &Catalog, layer: LayerId) -> u64 {
    std::fs::symlink_metadata(catalog.file_of(layer)).map_or(0, |found| found.blocks() * 512)
}
