//! Making a volume from a disk image: its data copied in, or the file itself taken where it lies.

use super::Store;
use super::also_keys::AlsoKeys;
use super::create::check_may_be_unencrypted;
use super::import_copy::{self, Content, Key, size_of};
use super::import_in_place::{self, Candidate};
use super::make::Wanted;
use super::need::{self, Budget, Gate};
use crate::base::{Context, Error, Kind, Result};
use crate::catalog::Metadata;
use crate::catalog::metadata::{Geometry, VolumeName};
use crate::catalog::tags::Tags;
use crate::crypt::SectorSize;
use crate::disk::transfer;
use crate::image::stream::Stream;
use crate::image::{BackingFiles, Format, Image};
use std::fmt;
use std::path::PathBuf;

pub use crate::disk::transfer::{Watch, interrupted};

/// Where an image comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// A file or a block device.
    Path(PathBuf),
    /// Standard input, which has a raw image.
    StandardInput,
}

impl fmt::Display for Input {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Input::Path(path) => path.display().fmt(f),
            Input::StandardInput => f.write_str("standard input"),
        }
    }
}

/// An image that is to become a volume.
#[derive(Clone, Debug)]
pub struct Import {
    /// Where the image comes from.
    pub input: Input,
    /// How its bytes are to be understood; without one, it is looked at.
    pub format: Option<Format>,
    /// Whether the files are read that a qcow2 image says it is based on.
    pub backing: BackingFiles,
    /// The volume's size in bytes; without one, the image's in whole sectors. A pipe's image must have it.
    pub size: Option<u64>,
    /// The volume's sector size; without one, 512 bytes.
    pub sector_size: Option<SectorSize>,
    /// The KMS key, by id, ARN or alias; without one, the default key of the settings.
    pub key: Option<String>,
    /// The KMS keys that wrap its data key besides.
    pub also: AlsoKeys,
    /// Whether the volume is not encrypted.
    pub unencrypted: bool,
    /// Its name; no other volume may have it.
    pub name: Option<VolumeName>,
    /// Its tags.
    pub tags: Tags,
    /// Whether the file system sets the whole size aside now.
    pub preallocate: bool,
    /// What may be used.
    pub budget: Budget,
}

/// Makes a volume with what the image holds. `watch` is told how far it has come. Reports
/// a `createVolume` event.
///
/// # Errors
/// `NoSpace` if the file system has too little; `Usage` for an image that cannot be read, or a size that
/// is too small for it, or that a pipe's image does not have; `Busy` for an image that somebody has open
/// for writing, or that was changed meanwhile; as [`super::create::create`]; what `watch` says. Nothing of
/// the volume is left then.
pub fn copied(store: &Store, import: &Import, watch: Watch<'_>) -> Result<Metadata> {
    let mut copy = || {
        if import.unencrypted {
            check_may_be_unencrypted(store)?;
        }
        match &import.input {
            Input::Path(path) => {
                let image = Image::open(path, import.format, import.backing)?;
                image.check_at_rest()?;
                let wanted = wanted(import, image.size())?;
                check_space(store, import, &wanted, &image)?;
                copy_from(store, import, &wanted, Content::Image(&image), watch)
            }
            Input::StandardInput => {
                let is_raw = is_raw_stream(import)?;
                let mut stream = Stream::standard_input()?;
                let len = stream.known_len().or(import.size).ok_or_else(|| {
                    Error::new(
                        Kind::Usage,
                        "how long a pipe's image is shows only at its end; say how long it is going to be: \
                         --size",
                    )
                })?;
                if len == 0 {
                    return Err(Error::new(Kind::Usage, "it is empty"));
                }
                let wanted = wanted(import, len)?;
                if !is_raw {
                    stream.check_start(&mut || watch(0, len))?;
                }
                copy_from(store, import, &wanted, Content::Stream { stream: &mut stream, is_raw }, watch)
            }
        }
    };
    copy().context(|| attempt(import))
}

/// # Errors
/// `NoSpace` if the file system has too little for what the image may hold, or for all of it where that is to
/// be set aside.
fn check_space(store: &Store, import: &Import, wanted: &Wanted, image: &Image) -> Result<()> {
    let need = match wanted.preallocate {
        true => wanted.geometry.size(),
        false => transfer::bytes_of(wanted.geometry.size(), &|from| image.next_data(from))?,
    };
    import.budget.check(&store.catalog(), need)
}

/// Whether it was said that the bytes are raw.
fn is_raw_stream(import: &Import) -> Result<bool> {
    let usage = |message: &str| Err(Error::new(Kind::Usage, message));
    if import.backing == BackingFiles::Read {
        return usage(
            "standard input has a raw image, which is based on no files; leave out --backing-files",
        );
    }
    match import.format {
        None => Ok(false),
        Some(Format::Raw) => Ok(true),
        Some(Format::Qcow2) => {
            usage("qcow2 cannot be read from one end to the other; write it into a file, and import that")
        }
    }
}

fn copy_from(
    store: &Store,
    import: &Import,
    wanted: &Wanted,
    content: Content<'_>,
    watch: Watch<'_>,
) -> Result<Metadata> {
    let (catalog, events) = (store.catalog(), store.events());
    let place = need::place(store.root());
    let mut gate = Gate::new(&place, import.budget.reserve);
    let watch = &mut |done, total| {
        watch(done, total)?;
        // What was set aside is there.
        if done < total && !wanted.preallocate { gate.wait(&mut || watch(done, total)) } else { Ok(()) }
    };
    if import.unencrypted {
        return import_copy::import(&catalog, &events, wanted, content, None, watch);
    }
    let named = store.keys(import.key.as_deref(), &import.also)?;
    let unwrap = |owner, key: &_| store.unwrap(owner, key);
    let key = Key { wrapping: named.wrapping(), unwrap: &unwrap };
    import_copy::import(&catalog, &events, wanted, content, Some(key), watch)
}

/// Makes a volume whose lowest layer is the image's own file, which is the store's afterwards.
/// Reports a `createVolume` event.
///
/// # Errors
/// `NoSpace` if the file system has too little for what is going to be encrypted in the background; `Usage`
/// for what is no raw image in a file of its own on the store's file system; `Busy` if somebody has
/// it open; as [`super::create::create`]. The file is as it was then.
pub fn in_place(store: &Store, import: &Import) -> Result<Metadata> {
    let take = || {
        let Input::Path(path) = &import.input else {
            return Err(Error::new(
                Kind::Usage,
                "only a file can become a layer where it lies; leave out --in-place",
            ));
        };
        let image = Image::open(path, import.format, BackingFiles::Refuse)?;
        let size = image.size();
        let offered = image.into_raw()?;
        let wanted = wanted(import, size)?;
        let candidate = Candidate::new(&store.catalog(), offered)?;
        import.budget.check(&store.catalog(), candidate.need()?)?;
        let named = store.keys(import.key.as_deref(), &import.also)?;
        let unwrap = |owner, key: &_| store.unwrap(owner, key);
        let key = Key { wrapping: named.wrapping(), unwrap: &unwrap };
        import_in_place::import(&store.catalog(), &store.events(), &wanted, &candidate, key)
    };
    take().context(|| attempt(import))
}

fn attempt(import: &Import) -> String {
    format!("import {}", import.input)
}

fn wanted(import: &Import, len: u64) -> Result<Wanted> {
    let sector_size = import.sector_size.unwrap_or_default();
    let least = size_of(len, sector_size);
    let size = import.size.unwrap_or(least);
    if size < least {
        let message = format!("the image is a disk of {len} bytes; the volume has to have {least} at least");
        return Err(Error::new(Kind::Usage, message));
    }
    let geometry = Geometry::new(size, sector_size)?;
    if import.size.is_none() && size != len {
        log::warn!("the image has {len} bytes; the volume has {size}, whole sectors, with zeros at its end");
    }
    let (name, tags) = (import.name.clone(), import.tags.clone());
    Ok(Wanted { geometry, name, tags, preallocate: import.preallocate, device: None })
}
