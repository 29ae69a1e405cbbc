//! Disk images that volumes are made from: raw files, block devices, qcow2. They are only read.
//!
//! An image may be a stranger's. Its header is judged whole before anything else of it is used ([`header`]),
//! nothing that it names is opened unless that was asked for, and what it says is nowhere trusted with memory
//! or time beyond the image's own size. Knows no volume and no key.

mod foreign;
#[cfg_attr(not(feature = "qcow2"), allow(dead_code, reason = "only the beginning of an image is looked at"))]
mod header;
pub mod lock;
#[cfg_attr(not(feature = "qcow2"), path = "no_qcow2.rs")]
mod qcow2;
pub mod stream;
mod writers;

use crate::base::root::offered::Offered;
use crate::base::{Context, Error, Kind, Result};
use crate::image::lock::{Access, ImageLock};
use foreign::Foreign;
use nix::errno::Errno;
use nix::unistd::{Whence, lseek64};
use qcow2::Qcow2;
use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// How an image's bytes are to be understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The disk's bytes, and nothing else.
    Raw,
    /// QEMU's, versions 2 and 3.
    Qcow2,
}

impl Format {
    /// Its name, as QEMU calls it.
    pub fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Format::Raw, Format::Qcow2].into_iter().find(|format| format.name() == text).ok_or_else(|| {
            format!(
                "{text:?} is none of raw, qcow2; \"qemu-img convert -O qcow2\" makes the latter of \
                 many others"
            )
        })
    }
}

/// What is done about the files that an image says it is based on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackingFiles {
    /// The image is refused.
    Refuse,
    /// The files are read, and those that they are based on.
    Read,
}

/// An image, open for reading. QEMU and its tools are kept from writing to it.
pub struct Image {
    source: Source,
    size: u64,
    /// Without symbolic links.
    path: PathBuf,
    /// The files that it is made of.
    held: Vec<Held>,
}

enum Source {
    Raw(File),
    Qcow2(Qcow2),
}

/// A file of an image, which QEMU and its tools see as in use.
struct Held {
    lock: ImageLock,
    path: PathBuf,
    /// How it was when it was opened: its length, and when it was changed last.
    before: (u64, i64, i64),
}

impl Held {
    fn new(file: &File, path: &Path) -> Result<Self> {
        let lock = ImageLock::of(file, path, Access::Read)?;
        Ok(Held { lock, path: path.to_owned(), before: state_of(file)? })
    }
}

fn state_of(file: &File) -> Result<(u64, i64, i64)> {
    let found = file.metadata()?;
    Ok((found.len(), found.mtime(), found.mtime_nsec()))
}

impl Image {
    /// Opens the image at `path`. Without a `format`, it is one of [`format_of`].
    ///
    /// # Errors
    /// `Busy` if QEMU has it open for writing; `Usage` where the format cannot be told, or where
    /// an image is based on others and `backing` refuses; `Unsupported` or `Corrupt` for a qcow2
    /// image that cannot be read.
    pub fn open(path: &Path, format: Option<Format>, backing: BackingFiles) -> Result<Self> {
        let attempt = || format!("open {}", path.display());
        let offered = Offered::open(path).context(attempt)?;
        Self::of(offered, format, backing).context(attempt)
    }

    /// The image that was offered. Without a `format`, it is one of [`format_of`].
    ///
    /// # Errors
    /// As for [`Image::open`].
    pub fn of(image: Offered, format: Option<Format>, backing: BackingFiles) -> Result<Self> {
        let Offered { file, path } = image;
        let held = Held::new(&file, &path)?;
        let ends = Ends::of(&file)?;
        let format = match format {
            None => format_of(&path, &ends)?,
            // More use than what a reader of qcow2 says of it.
            Some(Format::Qcow2) if !ends.is_qcow2() => match ends.foreign() {
                Some(foreign) => return Err(Error::new(Kind::Usage, foreign.advice(&path))),
                None => Format::Qcow2,
            },
            Some(format) => format,
        };
        let image = match format {
            Format::Raw => {
                let size = length(&file)?;
                Image { source: Source::Raw(file), size, path, held: vec![held] }
            }
            Format::Qcow2 => {
                let (qcow2, held) = Qcow2::open(&path, file, held, backing)?;
                Image { size: qcow2.size(), source: Source::Qcow2(qcow2), path, held }
            }
        };
        if image.size == 0 {
            return Err(Error::new(Kind::Usage, "it is empty"));
        }
        Ok(image)
    }

    /// The file of a raw image, with its path, which is not locked any more.
    ///
    /// # Errors
    /// `Usage` for any other image.
    pub fn into_raw(self) -> Result<Offered> {
        match self.source {
            Source::Raw(file) => Ok(Offered { file, path: self.path }),
            Source::Qcow2(_) => {
                Err(Error::new(Kind::Usage, "only a raw image can be taken in place, and it is qcow2"))
            }
        }
    }

    /// Looks whether anybody has one of its files open for writing.
    ///
    /// # Errors
    /// `Busy` if somebody has. Where that cannot be told, it is no error.
    pub fn check_at_rest(&self) -> Result<()> {
        for Held { lock, path, .. } in &self.held {
            if !lock.check_nobody_writes(path)? {
                log::info!("whether anybody writes to {} cannot be told", path.display());
            }
        }
        Ok(())
    }

    /// Looks whether its files are as they were when they were opened.
    ///
    /// # Errors
    /// `Busy` if one was changed, or can be changed now.
    pub fn check_unchanged(&self) -> Result<()> {
        for Held { lock, path, before } in &self.held {
            if state_of(lock.file())? != *before {
                let message = format!("{} was changed while it was copied; copy it again", path.display());
                return Err(Error::new(Kind::Busy, message));
            }
        }
        self.check_at_rest()
    }

    /// The disk's size in bytes, never 0.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// How it is understood.
    pub fn format(&self) -> Format {
        match self.source {
            Source::Raw(_) => Format::Raw,
            Source::Qcow2(_) => Format::Qcow2,
        }
    }

    /// The next bytes of the disk, at or after `from`, that may be other than zeros.
    pub fn next_data(&self, from: u64) -> Result<Option<Range<u64>>> {
        if from >= self.size {
            return Ok(None);
        }
        let found = match &self.source {
            Source::Raw(file) => next_data_of(file, from),
            Source::Qcow2(qcow2) => qcow2.next_data(from),
        };
        let found = found.context(|| format!("look for data after byte {from} of the image"))?;
        Ok(found.map(|data| data.start..data.end.min(self.size)))
    }

    /// Reads the disk's bytes from `at`; beyond its end are zeros.
    pub fn read(&self, at: u64, into: &mut [u8]) -> Result<()> {
        let there = self.size.saturating_sub(at).min(into.len() as u64) as usize;
        let (there, beyond) = into.split_at_mut(there);
        beyond.fill(0);
        let done = match &self.source {
            Source::Raw(file) => file.read_exact_at(there, at).map_err(Error::from),
            Source::Qcow2(qcow2) => qcow2.read(at, there),
        };
        done.context(|| format!("read the image at byte {at}"))
    }
}

/// Opens a file or block device for reading, and keeps QEMU from writing to it.
#[cfg(feature = "qcow2")]
fn open(path: &Path) -> Result<(File, Held)> {
    let Offered { file, path } = Offered::open(path)?;
    let held = Held::new(&file, &path)?;
    Ok((file, held))
}

fn length(file: &File) -> Result<u64> {
    Ok(lseek64(file, 0, Whence::SeekEnd)? as u64)
}

/// The first and last bytes of a file.
struct Ends {
    start: Vec<u8>,
    end: Vec<u8>,
}

impl Ends {
    fn of(file: &File) -> Result<Self> {
        let len = length(file)?;
        let bytes = |at: u64, most: usize| {
            let mut bytes = vec![0; (len - at).min(most as u64) as usize];
            file.read_exact_at(&mut bytes, at).map(|()| bytes)
        };
        let end_at = len.saturating_sub(foreign::END as u64);
        Ok(Ends { start: bytes(0, foreign::START)?, end: bytes(end_at, foreign::END)? })
    }

    fn is_qcow2(&self) -> bool {
        begins_as_qcow2(&self.start)
    }

    fn foreign(&self) -> Option<Foreign> {
        foreign::recognise(&self.start, &self.end)
    }
}

/// Whether these are the first bytes of qcow2, of a version that is called so.
fn begins_as_qcow2(start: &[u8]) -> bool {
    start.starts_with(&header::MAGIC) && start.get(4..8) != Some(&[0, 0, 0, 1])
}

/// What the file at `path` is when nobody says it: raw if it begins and ends like nothing else that is known,
/// and qcow2 if it begins so and is called so. The beginning alone does not decide: the guest of a raw disk
/// can write what it likes there.
///
/// # Errors
/// `Usage` for anything else, with the command that makes an image of it.
fn format_of(path: &Path, ends: &Ends) -> Result<Format> {
    let usage = |message: String| Err(Error::new(Kind::Usage, message));
    let is_called_so = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("qcow2"));
    if ends.is_qcow2() {
        if is_called_so {
            return Ok(Format::Qcow2);
        }
        return usage(
            "it begins like a qcow2 image, but is not called .qcow2: if a guest had it as a raw disk, the \
             guest can have written that; say --format qcow2 or --format raw"
                .into(),
        );
    }
    if let Some(foreign) = ends.foreign() {
        return usage(foreign.advice(path));
    }
    if is_called_so {
        return usage(
            "it is called .qcow2 and does not begin like it; if it is a raw image, say --format raw".into(),
        );
    }
    Ok(Format::Raw)
}

/// The next data of a file, as its file system knows it.
fn next_data_of(file: &File, from: u64) -> Result<Option<Range<u64>>> {
    let from = i64::try_from(from).map_err(|_| Error::from(Errno::EOVERFLOW))?;
    match lseek64(file, from, Whence::SeekData) {
        Ok(start) => Ok(Some(start as u64..lseek64(file, start, Whence::SeekHole)? as u64)),
        Err(Errno::ENXIO) => Ok(None),
        // Of a block device, or a file system that does not know.
        Err(Errno::EINVAL | Errno::EOPNOTSUPP) => Ok(Some(from as u64..length(file)?)),
        Err(e) => Err(e.into()),
    }
}
