//! How a volume or snapshot is laid out: its size, its layers from the top down, and the
//! data keys they are under.
//!
//! A [`Layout`] has been checked: it has a layer, every layer's key exists and is used, no layer is longer
//! than what it is a layer of. It holds no key in the clear, and touches no file.

pub(crate) mod written;

use crate::catalog::LayerId;
use crate::catalog::metadata::Geometry;
use std::collections::HashSet;

pub use crate::catalog::slots::KeyRecord;

/// The most layers that a volume may have. A read may have to look into every one of them.
pub const MAX_LAYERS: usize = 64;

impl LayerRecord {
    /// A new layer above others, `size` bytes long.
    pub(crate) fn new_top(key: Option<usize>, size: u64) -> Self {
        LayerRecord { id: LayerId::random(), key, masked: key.is_none(), size }
    }
}

/// A layer as a volume has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerRecord {
    /// Names its file.
    pub id: LayerId,
    /// Which of the volume's keys encrypts it; none: it is no secret.
    pub key: Option<usize>,
    /// Without a key: whether it is masked, with [`crate::crypt::Dek::mask_of_layer`], so that zeros in it
    /// are not mistaken for nothing. Otherwise it is plaintext, and the lowest layer.
    pub masked: bool,
    /// Its length in bytes: whole sectors, at most the volume's size. What lies beyond is not in it.
    pub size: u64,
}

/// The layers of a volume or snapshot and what they are encrypted with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    pub(crate) geometry: Geometry,
    pub(crate) keys: Vec<KeyRecord>,
    pub(crate) layers: Vec<LayerRecord>,
    pub(crate) hydrate: Option<LayerId>,
}

impl Layout {
    /// One layer that holds nothing yet, encrypted with `key` or, without one, not at all.
    pub(crate) fn new(geometry: Geometry, key: Option<KeyRecord>) -> Self {
        let (id, size) = (LayerId::random(), geometry.size());
        let layer = LayerRecord { id, key: key.is_some().then_some(0), masked: false, size };
        Layout { geometry, keys: key.into_iter().collect(), layers: vec![layer], hydrate: None }
    }

    /// Size and sector size.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The data keys of the layers, none if nothing is encrypted.
    pub fn keys(&self) -> &[KeyRecord] {
        &self.keys
    }

    /// Whether any of its data keys has several slots: records without say nothing of slots.
    pub(crate) fn has_slots(&self) -> bool {
        self.keys.iter().any(|key| key.slots().len() > 1)
    }

    /// The layers, the top one first.
    pub fn layers(&self) -> &[LayerRecord] {
        &self.layers
    }

    /// The top layer.
    pub fn top(&self) -> &LayerRecord {
        self.layers.first().expect("a layout has a layer: new() makes one, check() looks")
    }

    /// Whether the top layer is encrypted, and with it what is written from now on.
    pub fn is_encrypted(&self) -> bool {
        self.top().key.is_some()
    }

    /// The uppermost of the layers that are being copied up and will then leave the chain, with all below it.
    pub fn hydrate(&self) -> Option<LayerId> {
        self.hydrate
    }

    /// This layout with an empty layer on top.
    pub(crate) fn with_new_top(&self, top: LayerRecord) -> Self {
        let mut next = self.clone();
        next.layers.insert(0, top);
        next
    }

    /// How many of the layers, the lowest ones, are being copied up and will then leave the chain.
    pub fn leaving(&self) -> usize {
        let found = self.hydrate.and_then(|id| self.layers.iter().position(|l| l.id == id));
        found.map_or(0, |position| self.layers.len() - position)
    }

    /// The layers that are being copied up and will then leave the chain: the lowest ones.
    pub(crate) fn leaving_layers(&self) -> &[LayerRecord] {
        &self.layers[self.layers.len() - self.leaving()..]
    }

    /// This layout with everything below the top to be copied up; `None` if there is nothing below.
    pub(crate) fn with_all_leaving(&self) -> Option<Self> {
        let hydrate = Some(self.layers.get(1)?.id);
        Some(Layout { hydrate, ..self.clone() })
    }

    /// This layout with an empty layer on top that is encrypted with another `key`, and all
    /// below it to be copied up.
    pub(crate) fn rekeyed(&self, top: LayerRecord, key: KeyRecord) -> Self {
        let mut next = self.with_new_top(LayerRecord { key: Some(self.keys.len()), masked: false, ..top });
        next.keys.push(key);
        next.hydrate = Some(self.top().id);
        next
    }

    /// This layout without the layers that were copied up, and without the keys that no other layer has.
    pub(crate) fn hydrated(&self) -> Self {
        let mut next = self.clone();
        next.layers.truncate(self.layers.len() - self.leaving());
        next.hydrate = None;
        next.drop_unused_keys();
        next
    }

    /// This layout without those of `layers` that lie below its top, and without the keys that no other layer
    /// has.
    pub(crate) fn without(&self, layers: &[LayerId]) -> Self {
        let mut next = self.clone();
        let top = self.top().id;
        next.layers.retain(|layer| layer.id == top || !layers.contains(&layer.id));
        next.drop_unused_keys();
        next
    }

    fn drop_unused_keys(&mut self) {
        let used = |n: &usize| self.layers.iter().any(|l| l.key == Some(*n));
        let stay: Vec<usize> = (0..self.keys.len()).filter(used).collect();
        self.keys = stay.iter().map(|&n| self.keys[n].clone()).collect();
        for layer in &mut self.layers {
            layer.key = layer.key.and_then(|old| stay.iter().position(|&n| n == old));
        }
    }

    /// The keys' check values; for a layout that is sealed or being sealed.
    pub(crate) fn checks(&self) -> Vec<[u8; 16]> {
        let check = |key: &KeyRecord| key.check.expect("verify and seal have looked, or noted it");
        self.keys.iter().map(check).collect()
    }

    /// # Errors
    /// A sentence, for what does not fit together.
    fn check(&self) -> Result<(), String> {
        let top = self.layers.first().ok_or("it has no layer")?;
        let mut ids = HashSet::new();
        for layer in &self.layers {
            self.check_layer(layer)?;
            if !ids.insert(layer.id) {
                return Err(format!("layer {} is there twice", layer.id));
            }
        }
        if let Some(n) = (0..self.keys.len()).find(|&n| self.layers.iter().all(|l| l.key != Some(n))) {
            return Err(format!("key {n} belongs to no layer"));
        }
        let (_lowest, above) = self.layers.split_last().ok_or("it has no layer")?;
        if let Some(layer) = above.iter().find(|l| l.key.is_none() && !l.masked) {
            return Err(format!("layer {} is plaintext, and not the lowest", layer.id));
        }
        if top.size != self.geometry.size() {
            return Err(format!("its top layer has {} bytes, not its size", top.size));
        }
        match self.hydrate {
            Some(id) if !self.layers[1..].iter().any(|l| l.id == id) => {
                Err(format!("it is to hydrate from {id}, which is none of its lower layers"))
            }
            _ => Ok(()),
        }
    }

    fn check_layer(&self, layer: &LayerRecord) -> Result<(), String> {
        let keys = self.keys.len();
        if let Some(n) = layer.key.filter(|&n| n >= keys) {
            return Err(format!("layer {} has key {n}, but there are {keys} keys", layer.id));
        }
        if layer.key.is_some() && layer.masked {
            return Err(format!("layer {} has a key, and is masked", layer.id));
        }
        let unit = u64::from(self.geometry.sector_size().bytes());
        match layer.size {
            0 => Err(format!("layer {} is empty", layer.id)),
            size if size > self.geometry.size() => {
                Err(format!("layer {} has {size} bytes, more than the whole", layer.id))
            }
            size if !size.is_multiple_of(unit) => {
                Err(format!("layer {} has {size} bytes, which are not whole sectors", layer.id))
            }
            _ => Ok(()),
        }
    }
}

/// Which message a MAC is over: what this version writes, or what the first one wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SealVersion {
    /// All layers are as long as the volume, and their lengths not in the message.
    V1,
    /// Each layer's length is in the message.
    V2,
}

impl SealVersion {
    pub(crate) fn number(self) -> u32 {
        match self {
            SealVersion::V1 => 1,
            SealVersion::V2 => 2,
        }
    }
}

/// What a MAC covers, as docs/format.md has it: what the data means, and nothing of how a data
/// key is wrapped. Every part has a fixed length or its length before it, so that no two
/// layouts have the same bytes.
///
/// `checks` are the check values of the keys that `layers` use, in the order of their numbers.
pub(crate) fn sealed_bytes(
    version: SealVersion,
    id: &str,
    geometry: Geometry,
    layers: &[LayerRecord],
    checks: &[[u8; 16]],
) -> Vec<u8> {
    let count = |n: usize| u32::try_from(n).expect("MAX_FILE_LEN allows no such number").to_le_bytes();
    let mut bytes = Vec::new();
    bytes.extend(version.number().to_le_bytes());
    bytes.extend(count(id.len()));
    bytes.extend(id.as_bytes());
    bytes.extend(geometry.size().to_le_bytes());
    bytes.extend(geometry.sector_size().bytes().to_le_bytes());
    bytes.push(u8::from(layers.first().is_some_and(|top| top.key.is_some())));
    bytes.extend(count(layers.len()));
    for layer in layers {
        bytes.extend(layer.id.as_bytes());
        bytes.extend(match layer.key {
            Some(key) => count(key),
            None => (u32::MAX - u32::from(layer.masked)).to_le_bytes(),
        });
        if version == SealVersion::V2 {
            bytes.extend(layer.size.to_le_bytes());
        }
    }
    bytes.extend(count(checks.len()));
    checks.iter().for_each(|check| bytes.extend(check));
    bytes
}
