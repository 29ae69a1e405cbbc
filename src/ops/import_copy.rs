//! Volumes made from disk images: encrypted on the way in, and there only when all of it is.
//!
//! It is making a volume ([`make`]) with one step more: the data, through the disk's own write path,
//! durable before `volume.json` gets its name. Until then there is no volume, and what was written is
//! cleared up like what any interrupted command leaves. Such a volume has data from its beginning, so it
//! has a seal from its beginning.

use crate::base::{Context, Result};
use crate::catalog::Catalog;
use crate::catalog::metadata::{KeyOwner, Metadata};
use crate::catalog::slots::Unwrapped;
use crate::crypt::SectorSize;
use crate::disk::Disk;
use crate::disk::transfer::{self, Transfer};
use crate::events::EventLog;
use crate::image::Image;
use crate::image::lock::Access;
use crate::image::stream::Stream;
use crate::kms::Failure;
use crate::ops::keys::WrappingKey;
use crate::ops::make::{self, Wanted};
use crate::volume::layers;
use crate::volume::open::{Deks, Unwrap, shape};
use std::cell::OnceCell;
use std::sync::Arc;
use zeroize::Zeroizing;

use crate::disk::transfer::Watch;

/// Under which KMS key an imported volume is, and how its data key is unwrapped for the time that it takes.
#[derive(Clone, Copy)]
pub(super) struct Key<'a> {
    /// Makes and wraps the data key.
    pub wrapping: WrappingKey<'a>,
    /// Unwraps it.
    pub unwrap: Unwrap<'a>,
}

/// What an imported volume is going to hold.
pub(super) enum Content<'a> {
    /// What an image holds.
    Image(&'a Image),
    /// What comes out of a stream.
    Stream {
        stream: &'a mut Stream,
        /// Whether its form does not matter.
        is_raw: bool,
    },
}

/// The least size in bytes of a volume that an image of `len` bytes fits into: whole sectors.
pub(super) fn size_of(len: u64, sector_size: SectorSize) -> u64 {
    let unit = u64::from(sector_size.bytes());
    len.checked_next_multiple_of(unit).unwrap_or(u64::MAX)
}

/// Makes a volume that holds the `content`, with zeros to the end of `wanted.geometry`, which is no smaller.
/// Without a `key` it is not encrypted. Reports a `createVolume` event.
///
/// # Errors
/// As [`make::create`]; those of reading the image; what `watch` returns. Nothing of the volume is left then.
pub(super) fn import(
    catalog: &Catalog,
    events: &EventLog,
    wanted: &Wanted,
    content: Content<'_>,
    key: Option<Key<'_>>,
    watch: Watch<'_>,
) -> Result<Metadata> {
    if let Content::Image(image) = &content {
        assert!(wanted.geometry.size() >= image.size(), "the volume is no smaller than the image");
    }
    let deks = OnceCell::new();
    let prepare = |id| {
        let fresh = key.map(|key| key.wrapping.generate(id)).transpose()?;
        let mut metadata = Metadata::new(id, wanted.name.clone(), wanted.geometry, fresh);
        let found = unwrap_all(&metadata, key)?;
        metadata.seal(&found);
        Ok(deks.get_or_init(|| found)).map(|_| metadata)
    };
    make::create_filled(catalog, events, wanted, prepare, |metadata| {
        let deks = deks.get().expect("what is filled was prepared");
        fill(catalog, metadata, deks, content, watch).context(|| "copy the image")
    })
}

/// The data keys of a new volume.
pub(crate) fn unwrap_all(metadata: &Metadata, key: Option<Key<'_>>) -> Result<Deks, Failure> {
    let Some(Key { unwrap, .. }) = key else { return Ok(Vec::new()) };
    metadata.keys().iter().map(|record| unwrap(KeyOwner::Volume(metadata.id()), record)).collect()
}

/// Copies the content into the volume's only layer, durably.
fn fill(
    catalog: &Catalog,
    metadata: &Metadata,
    deks: &[Unwrapped],
    content: Content<'_>,
    watch: Watch<'_>,
) -> Result<()> {
    let layers = layers::open_all(catalog, metadata.layout(), deks, Access::ReadWrite)?;
    let disk = Disk::layered(shape(metadata.geometry(), false), "", layers::chain(&layers))
        .context(|| "open the new layer")?;
    let mut transfer = Transfer::new(&Arc::new(disk))?;
    match content {
        Content::Image(image) => {
            let next_data = |from| image.next_data(from);
            transfer::each_chunk(metadata.size(), &next_data, watch, &mut |at, chunk| {
                image.read(at, chunk)?;
                transfer.write(at, chunk)
            })?;
            image.check_unchanged()?;
        }
        Content::Stream { stream, is_raw } => {
            let unit = u64::from(metadata.geometry().sector_size().bytes());
            let got = copy_stream(stream, metadata.size(), unit, &mut transfer, watch)?;
            stream.check_whole(got, metadata.size(), unit, is_raw, &mut || watch(got, metadata.size()))?;
        }
    }
    transfer.flush()
}

/// Copies a stream to its end, or to that of the volume; returns how many bytes it had.
fn copy_stream(
    stream: &mut Stream,
    size: u64,
    unit: u64,
    transfer: &mut Transfer,
    watch: Watch<'_>,
) -> Result<u64> {
    let mut room = Zeroizing::new(vec![0; transfer::CHUNK]);
    let mut at = 0;
    while at < size {
        watch(at, size)?;
        let chunk = &mut room[..(size - at).min(transfer::CHUNK as u64) as usize];
        let got = stream.read(chunk, &mut || watch(at, size))?;
        let whole = got.next_multiple_of(unit as usize);
        chunk[got..whole].fill(0);
        transfer.write(at, &chunk[..whole])?;
        at += got as u64;
        if got < chunk.len() {
            break;
        }
    }
    Ok(at)
}
