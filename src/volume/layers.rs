//! The layers of a volume as an attach has opened them, and what becomes of them when the top is frozen.

use super::catalog::Catalog;
use super::image_lock::{Access, ImageLock};
use super::io::{Cipher, Layers};
use super::layout::Layout;
use crate::crypt::Dek;
use crate::crypt::xts::{DataUnit, Engine, SectorCipher, new_cipher};
use crate::error::{Context, Error, Kind, Result};
use crate::store::chain::Chain;
use crate::store::file::FileStore;
use std::path::Path;
use std::sync::Arc;

/// One layer in a file or on a block device.
#[derive(Clone)]
pub struct Layer {
    /// Its bytes.
    pub store: Arc<FileStore>,
    /// How they are encrypted.
    pub cipher: Cipher,
    /// What keeps others off them.
    pub image_lock: Arc<ImageLock>,
}

impl Layer {
    /// Opens the layer at `path` for transfers in multiples of `block_size` bytes (512 or 4096), and takes QEMU's locks.
    ///
    /// # Errors
    /// `Busy` if somebody has it open in a way that does not go together with `access`; as [`FileStore::open`].
    pub fn open(path: &Path, access: Access, block_size: u32, cipher: Cipher) -> Result<Self> {
        let image_lock = Arc::new(ImageLock::acquire(path, access)?);
        let store = FileStore::open(path, access == Access::Read, block_size);
        let store = store.context(|| path.display().to_string())?;
        if !image_lock.is_on(store.file())? {
            let message = format!("{} was replaced by another file just now", path.display());
            return Err(Error::new(Kind::Busy, message));
        }
        Ok(Layer { store: Arc::new(store), cipher, image_lock })
    }

    /// The same for reading alone, from now on: others may read it too. Whoever still holds it as it was must not
    /// write any more.
    pub fn frozen(&self) -> Result<Self> {
        let store = self.store.frozen().context(|| "open the layer for reading")?;
        self.image_lock.stop_writing();
        Ok(Layer { store: Arc::new(store), ..self.clone() })
    }
}

/// Opens all layers of a volume that nobody has attached, or of a snapshot, with their keys: `deks` has one for each of
/// the layout's, in that order. `top` is what is going to be done with the top layer; those below it are read.
///
/// # Errors
/// As [`Layer::open`].
pub fn open_all(catalog: &Catalog, layout: &Layout, deks: &[Dek], top: Access) -> Result<Vec<Layer>> {
    let bytes = layout.geometry().sector_size().bytes();
    let unit = DataUnit::from_bytes(bytes as usize).expect("sector sizes are data units");
    let cipher = |dek: &Dek| new_cipher(Engine::Auto, dek, unit).map(Arc::<dyn SectorCipher>::from);
    let ciphers = deks.iter().map(cipher).collect::<Result<Vec<_>>>()?;
    let mut opened = Vec::new();
    for (n, layer) in layout.layers().iter().enumerate() {
        let cipher = match layer.key {
            Some(key) => Some(ciphers[key].clone()),
            None if layer.masked => Some(cipher(&Dek::mask_of_layer(layer.id.as_bytes())?)?),
            None => None,
        };
        let access = if n == 0 { top } else { Access::Read };
        opened.push(Layer::open(&catalog.layer_path(layer.id), access, bytes, cipher)?);
    }
    Ok(opened)
}

/// Layers as a disk takes them, the top first. There is at least one.
pub fn chain(layers: &[Layer]) -> Layers {
    let stores: Vec<_> = layers.iter().map(|layer| layer.store.clone()).collect();
    Layers {
        store: Arc::new(Chain::new(stores[0].clone(), stores[1..].to_vec())),
        ciphers: layers.iter().map(|layer| layer.cipher.clone()).collect(),
        image_locks: layers.iter().map(|layer| layer.image_lock.clone()).collect(),
    }
}
