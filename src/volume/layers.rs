//! The layers of a volume as an attach has opened them, and what becomes of them when the top is frozen.

use crate::backing::chain::Chain;
use crate::backing::coming;
use crate::backing::file::{Earlier, FileBacking, Place};
use crate::base::root::files;
use crate::base::{Context, Error, Kind, Result};
use crate::catalog::layout::Layout;
use crate::catalog::metadata::LayerRecord;
use crate::catalog::{Catalog, VolumeId};
use crate::crypt::xts::{Engine, SectorCipher, new_cipher};
use crate::crypt::{Dek, SectorSize};
use crate::disk::{Cipher, Layers};
use crate::image::lock::{Access, ImageLock};
use nix::fcntl::OFlag;
use std::borrow::Borrow;
use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a frozen layer may be locked by a command that moves data out of it or into it.
const MOMENT: Duration = Duration::from_secs(5);
/// How often to look whether that is over.
const LOOK: Duration = Duration::from_millis(20);

/// One layer in a file, on a block device or behind an NBD server.
#[derive(Clone)]
pub struct Layer {
    /// Its bytes.
    pub backing: Arc<FileBacking>,
    /// How they are encrypted.
    pub cipher: Cipher,
    /// What keeps others off them.
    pub image_lock: Arc<ImageLock>,
}

impl Layer {
    /// Opens the layer at `place` for transfers in multiples of `block_size` bytes (512 or 4096), and takes
    /// QEMU's locks. `near` is another layer of the volume, if one is open: see [`FileBacking::open`].
    ///
    /// # Errors
    /// `Busy` if somebody has it open in a way that does not go together with `access`; as
    /// [`FileBacking::open`].
    pub fn open(
        place: &Place,
        access: Access,
        block_size: u32,
        cipher: Cipher,
        near: Option<&Layer>,
    ) -> Result<Self> {
        Self::open_locked(place, access, block_size, cipher, near, &PassedLocks::default())
    }

    /// As [`Layer::open`], from a process that serves the layer until now.
    fn open_locked(
        place: &Place,
        access: Access,
        block_size: u32,
        cipher: Cipher,
        near: Option<&Layer>,
        passed: &PassedLocks,
    ) -> Result<Self> {
        let path = &*place.path;
        let theirs = passed.lock_of(path)?;
        let earlier = if theirs.is_some() { Earlier::Done } else { Earlier::Awaited };
        let image_lock = match theirs {
            Some(lock) => lock,
            None => Arc::new(lock(path, access)?),
        };
        let near = near.map(|near| &*near.backing);
        let backing = FileBacking::open_after(place, access == Access::Read, block_size, near, earlier);
        let backing = backing.context(|| path.display().to_string())?;
        if !image_lock.is_on(backing.file())? {
            let message = format!("{} was replaced by another file just now", path.display());
            return Err(Error::new(Kind::Busy, message));
        }
        Ok(Layer { backing: Arc::new(backing), cipher, image_lock })
    }

    /// This layer, which is still coming: reads of what is not here wait for the fetcher's word, or fail
    /// where this process has no fetcher.
    fn coming(self, layer: &LayerRecord) -> Result<Self> {
        let coming = coming::of(layer.id.as_bytes(), layer.size);
        let unshared = || Error::new(Kind::Other, "a layer that was opened just now is in use");
        let backing = Arc::into_inner(self.backing).ok_or_else(unshared)?.with_coming(coming);
        Ok(Layer { backing: Arc::new(backing), ..self })
    }

    /// This layer for reading alone, from now on: others may read it too. Whoever still holds it as it was
    /// must not write any more.
    pub fn frozen(&self) -> Result<Self> {
        let backing = self.backing.frozen().context(|| "open the layer for reading")?;
        self.image_lock.stop_writing();
        Ok(Layer { backing: Arc::new(backing), ..self.clone() })
    }
}

/// What the process that serves a volume until now has passed of its layers: it has nothing in flight, and
/// keeps its locks until they are this process's.
#[derive(Default)]
pub struct PassedLocks {
    /// QEMU's locks on the layers, in any order.
    pub image_locks: Vec<Arc<ImageLock>>,
}

impl PassedLocks {
    /// Its lock on the file at `path`, if it has passed one.
    fn lock_of(&self, path: &Path) -> Result<Option<Arc<ImageLock>>> {
        if self.image_locks.is_empty() {
            return Ok(None);
        }
        let file = files::open_layer(path, OFlag::O_RDONLY).context(|| path.display().to_string())?;
        for lock in &self.image_locks {
            if lock.is_on(&file)? {
                return Ok(Some(lock.clone()));
            }
        }
        Ok(None)
    }
}

/// Takes QEMU's locks. A command that moves data between frozen layers has them to itself for moments.
fn lock(path: &Path, access: Access) -> Result<ImageLock> {
    let until = Instant::now() + MOMENT;
    loop {
        match ImageLock::acquire(path, access) {
            Err(e) if access == Access::Read && e.kind() == Kind::Busy && Instant::now() < until => {
                std::thread::sleep(LOOK);
            }
            locked => return locked,
        }
    }
}

/// Opens the layers of `layout`, as yet without their ciphers; the top is the first of what it
/// returns. `top` is what is going to be done with the top layer; those below it are read. `volume`
/// is whose layers they are. Locks that were `passed` are not taken anew.
///
/// # Errors
/// As [`Layer::open`].
pub(super) fn open_without_ciphers(
    catalog: &Catalog,
    volume: VolumeId,
    layout: &Layout,
    top: Access,
    passed: &PassedLocks,
) -> Result<Vec<Layer>> {
    let bytes = layout.geometry().sector_size().bytes();
    open_stack(layout.layers().len(), |number, near| {
        let layer = &layout.layers()[number];
        let access = if number == 0 { top } else { Access::Read };
        // Made by a process that has not detached since: that name a confined process may open.
        let own = catalog.own_layer_path(volume, layer.id);
        let open = || -> Result<_> {
            let (place, is_coming) = match files::exists(&own) {
                true => (Place::whole(own.clone()), false),
                false => catalog.place_or_coming(layer)?,
            };
            let opened = Layer::open_locked(&place, access, bytes, None, near, passed);
            Ok((opened, is_coming))
        };
        let (opened, is_coming) = match open()? {
            // The last of it has come just now, and it has its other name.
            (Err(_), true) if !catalog.is_coming(layer.id) => open()?,
            done => done,
        };
        let opened = if is_coming { opened?.coming(layer)? } else { opened? };
        catalog.check_is_layers(layer.id, opened.backing.medium(), opened.backing.export())?;
        Ok(opened)
    })
}

/// Opens all layers of a volume that is being made, or of a snapshot, with their ciphers: `deks` has a data
/// key for each of the layout's keys, in that order. `top` is what is going to be done with the top layer;
/// those below it are read.
///
/// # Errors
/// As [`Layer::open`].
pub fn open_all(
    catalog: &Catalog,
    layout: &Layout,
    deks: &[impl Borrow<Dek>],
    top: Access,
) -> Result<Vec<Layer>> {
    let bytes = layout.geometry().sector_size().bytes();
    let ciphers = ciphers(deks, layout, Engine::Auto)?;
    open_stack(layout.layers().len(), |number, near| {
        let access = if number == 0 { top } else { Access::Read };
        open_one(catalog, &layout.layers()[number], access, bytes, ciphers[number].clone(), near)
    })
}

/// Opens a layer of the store as [`Layer::open`] does, wherever it lies.
///
/// # Errors
/// As for that; `Corrupt` for a device that is not the layer's.
pub fn open_one(
    catalog: &Catalog,
    layer: &LayerRecord,
    access: Access,
    block_size: u32,
    cipher: Cipher,
    near: Option<&Layer>,
) -> Result<Layer> {
    let opened = Layer::open(&catalog.place(layer)?, access, block_size, cipher, near)?;
    catalog.check_is_layers(layer.id, opened.backing.medium(), opened.backing.export())?;
    Ok(opened)
}

/// Opens `count` layers with `open`, which is told the number of each (0: the top) and the one below it; the
/// top is the first of what it returns. The lowest is opened first: it has data most likely, and with data it
/// shows how the disk is reached.
///
/// # Errors
/// As `open`.
pub fn open_stack(
    count: usize,
    mut open: impl FnMut(usize, Option<&Layer>) -> Result<Layer>,
) -> Result<Vec<Layer>> {
    let mut opened: VecDeque<Layer> = VecDeque::with_capacity(count);
    for n in (0..count).rev() {
        let layer = open(n, opened.front())?;
        opened.push_front(layer);
    }
    Ok(opened.into())
}

/// How each layer of `layout` is encrypted; `deks` are in the order of its keys. Layers under the same
/// key share its round keys.
pub fn ciphers(deks: &[impl Borrow<Dek>], layout: &Layout, engine: Engine) -> Result<Vec<Cipher>> {
    let unit = layout.geometry().sector_size();
    let of_keys = deks.iter().map(|dek| cipher(dek.borrow(), unit, engine)).collect::<Result<Vec<_>>>()?;
    ciphers_of_layers(&of_keys, layout, engine)
}

/// How each layer of `layout` is encrypted; `of_keys` has a cipher for each of its keys, in that order.
pub(super) fn ciphers_of_layers(
    of_keys: &[Arc<dyn SectorCipher>],
    layout: &Layout,
    engine: Engine,
) -> Result<Vec<Cipher>> {
    let unit = layout.geometry().sector_size();
    let of_layer = |layer: &LayerRecord| match layer.key {
        Some(key) => Ok(Some(of_keys[key].clone())),
        None => mask(layer, engine, unit),
    };
    layout.layers().iter().map(of_layer).collect()
}

/// The cipher of layers under this data key.
pub(super) fn cipher(dek: &Dek, unit: SectorSize, engine: Engine) -> Result<Arc<dyn SectorCipher>> {
    new_cipher(engine, dek, unit).map(Arc::from)
}

/// The cipher of a layer that has no key: its mask, which is no secret, or none.
pub fn mask(layer: &LayerRecord, engine: Engine, unit: SectorSize) -> Result<Cipher> {
    if !layer.masked {
        return Ok(None);
    }
    let mask = Dek::mask_of_layer(layer.id.as_bytes())?;
    Ok(Some(Arc::from(new_cipher(engine, &mask, unit)?)))
}

/// Layers as a disk takes them, the top first. There is at least one.
pub fn chain(layers: &[Layer]) -> Layers {
    let backings: Vec<_> = layers.iter().map(|layer| layer.backing.clone()).collect();
    Layers {
        backing: Arc::new(Chain::new(backings[0].clone(), backings[1..].to_vec())),
        ciphers: layers.iter().map(|layer| layer.cipher.clone()).collect(),
        image_locks: layers.iter().map(|layer| layer.image_lock.clone()).collect(),
    }
}
