//! Hydration by a command: of a volume that nobody has attached, and of a copy of a snapshot.

use crate::base::hardened::Hardened;
use crate::base::{Context, Error, Kind, Result};
use crate::catalog::lock::{Holder, Purpose, VolumeLock};
use crate::catalog::{Catalog, Metadata, Snapshot, VolumeId, leaving};
use crate::crypt::xts::Engine;
use crate::disk::Disk;
use crate::disk::hydrate::{End, Hydration};
use crate::helper::unwrap;
use crate::host::status::Progress;
use crate::image::lock::Access;
use crate::ops::copy::full::Copying;
use crate::virtio::{Geometry, SECTOR_SIZE};
use crate::volume::layers::{self, Layer};
use crate::volume::open::{Deks, Opened, Opening, open, shape};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::Duration;

/// How often it is told how far it has come.
const TELL: Duration = Duration::from_millis(250);

/// Marks everything below the top of a volume to be copied up. Answers whether there is anything.
///
/// # Errors
/// `Busy`, naming the process that has it; those of the file system.
pub fn mark(catalog: &Catalog, volume: VolumeId) -> Result<bool> {
    let lock = take(catalog, volume)?;
    let mut metadata = catalog.load(volume)?;
    catalog.recover(&lock, &metadata)?;
    crate::catalog::rekey::mark_to_flatten(catalog, &lock, &mut metadata)
}

/// Copies up what is marked of a volume, at most `rate` bytes a second (0: no limit), and takes the layers out of its
/// chain. `tell` is told now and then how far it has come. If it is interrupted, it can be begun again, here or by an
/// attach.
///
/// # Errors
/// `Busy`, naming the process that has it; `Corrupt` for a volume that an attach would refuse; the KMS's; those of the file
/// system.
pub fn complete(
    catalog: &Catalog,
    volume: VolumeId,
    rate: u64,
    hardened: Hardened,
    tell: &mut dyn FnMut(&Progress),
) -> Result<Metadata> {
    let lock = take(catalog, volume)?;
    let keys = |metadata: &Metadata| {
        let unwrap = |key| unwrap::unwrap(hardened, catalog.root(), volume, key);
        let dek = |key| Ok(Arc::new(unwrap(key).map_err(|r| r.error())?));
        metadata.keys().iter().map(dek).collect::<Result<Deks>>()
    };
    let (Opened { mut metadata, seal_key, layers }, deks) =
        open(catalog, &lock, Opening::Change, Access::ReadWrite, Engine::Auto, keys)?;
    drop(deks);
    let leaving = metadata.layout().leaving();
    if leaving == 0 {
        return Ok(metadata);
    }
    let disk = Disk::layered(shape(&metadata, false), "", layers::chain(&layers));
    let disk = disk.context(|| "open its layers")?.hydrating_lowest(leaving);
    drop(layers);
    copy(&*Hydration::new(Arc::new(disk), rate)?, rate, tell)?;
    leaving::commit(catalog, &lock, &mut metadata, seal_key.as_ref())?;
    // With this their files go.
    catalog.recover(&lock, &metadata)?;
    Ok(metadata)
}

/// Brings everything that the layers of `source` have into the one layer of its copy, at most `rate` bytes a second (0: no
/// limit), durably. `tell` is told now and then how far that has come.
///
/// # Errors
/// `Busy` if somebody uses a layer in a way that does not go together with this; those of the file system.
pub fn fill_copy(
    catalog: &Catalog,
    source: &Snapshot,
    copying: &Copying,
    rate: u64,
    tell: &mut dyn FnMut(&Progress),
) -> Result<()> {
    let (dek, source_deks) = copying.deks();
    let top = layers::ciphers(std::slice::from_ref(dek), copying.copy().layout(), Engine::Auto)?;
    let below = layers::ciphers(source_deks, source.layout(), Engine::Auto)?;
    let block_size = source.geometry().sector_size().bytes();
    let records: Vec<_> = copying.copy().layers().iter().chain(source.layers()).collect();
    let ciphers: Vec<_> = top.into_iter().chain(below).collect();
    let opened = layers::open_stack(records.len(), |n, near| {
        let access = if n == 0 { Access::ReadWrite } else { Access::Read };
        Layer::open(&catalog.layer_path(records[n].id), access, block_size, ciphers[n].clone(), near)
    })?;
    let sectors = source.geometry().size() / SECTOR_SIZE;
    let disk = Disk::layered(Geometry { sectors, block_size, read_only: false }, "", layers::chain(&opened));
    let disk = disk.context(|| "open the layers")?.hydrating();
    drop(opened);
    copy(&*Hydration::new(Arc::new(disk), rate)?, rate, tell)
}

fn take(catalog: &Catalog, volume: VolumeId) -> Result<VolumeLock> {
    let holder = Holder::this_process(Purpose::Hydrate, None)?;
    VolumeLock::acquire(&catalog.folder(volume), volume, &holder)
}

/// Runs it to its end.
fn copy(hydration: &Hydration, rate: u64, tell: &mut dyn FnMut(&Progress)) -> Result<()> {
    let end = std::thread::scope(|threads| {
        let (over, wait) = sync_channel(1);
        threads.spawn(move || over.send(hydration.run()));
        loop {
            match wait.recv_timeout(TELL) {
                Ok(end) => return end,
                Err(RecvTimeoutError::Timeout) => {
                    tell(&Progress { left: hydration.left(), rate, problem: None })
                }
                Err(RecvTimeoutError::Disconnected) => return Err(std::io::Error::other("it panicked")),
            }
        }
    })?;
    match end {
        End::Complete => Ok(()),
        End::Stopped => Err(Error::new(Kind::Other, "it was stopped")),
    }
}
