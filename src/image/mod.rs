//! Disk images that volumes are made from: raw files, block devices, qcow2. They are only read.
//!
//! An image may be a stranger's. Its header is judged whole before anything else of it is used ([`header`]), nothing that
//! it names is opened unless that was asked for, and what it says is nowhere trusted with memory or time beyond the
//! image's own size. Knows no volume and no key.

#[cfg_attr(not(feature = "qcow2"), allow(dead_code, reason = "only the beginning of an image is looked at"))]
mod header;
pub mod lock;
#[cfg_attr(not(feature = "qcow2"), path = "no_qcow2.rs")]
mod qcow2;

use crate::base::root::offered::Offered;
use crate::base::{Context, Error, Kind, Result};
use crate::image::lock::{Access, ImageLock};
use nix::errno::Errno;
use nix::unistd::{Whence, lseek64};
use qcow2::Qcow2;
use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
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
        [Format::Raw, Format::Qcow2]
            .into_iter()
            .find(|format| format.name() == text)
            .ok_or_else(|| format!("{text:?} is none of raw, qcow2"))
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
    _locks: Vec<ImageLock>,
}

enum Source {
    Raw(File),
    Qcow2(Qcow2),
}

/// What files of other formats begin with; some of them further on.
const OTHERS: [(&str, usize, &[u8]); 6] = [
    ("VMDK", 0, b"KDMV"),
    ("VHDX", 0, b"vhdxfile"),
    ("VHD", 0, b"conectix"),
    ("VDI", 0x40, &[0x7f, 0x10, 0xda, 0xbe]),
    ("QED", 0, b"QED\0"),
    ("LUKS", 0, b"LUKS\xba\xbe"),
];

impl Image {
    /// Opens the image at `path`. Without a `format`, it is one of [`format_of`].
    ///
    /// # Errors
    /// `Busy` if QEMU has it open for writing; `Usage` where the format cannot be told, or where an image is based on
    /// others and `backing` refuses; `Unsupported` or `Corrupt` for a qcow2 image that cannot be read.
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
        let lock = lock(&file, &path)?;
        let format = match format {
            Some(format) => format,
            None => format_of(&path, &file)?,
        };
        let image = match format {
            Format::Raw => {
                let size = length(&file)?;
                Image { source: Source::Raw(file), size, path, _locks: vec![lock] }
            }
            Format::Qcow2 => {
                let (qcow2, locks) = Qcow2::open(&path, file, lock, backing)?;
                Image { size: qcow2.size(), source: Source::Qcow2(qcow2), path, _locks: locks }
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
fn open(path: &Path) -> Result<(File, ImageLock)> {
    let Offered { file, path } = Offered::open(path)?;
    let lock = lock(&file, &path)?;
    Ok((file, lock))
}

/// Keeps QEMU from writing to a file that is open.
fn lock(file: &File, path: &Path) -> Result<ImageLock> {
    ImageLock::of(file, path, Access::Read)
}

fn length(file: &File) -> Result<u64> {
    Ok(lseek64(file, 0, Whence::SeekEnd)? as u64)
}

/// What the file at `path` is when nobody says it: raw if it begins like no image that is known, and qcow2 if it begins
/// so and is called so. The beginning alone does not decide: the guest of a raw disk can write what it likes there.
///
/// # Errors
/// `Usage` for anything else.
fn format_of(path: &Path, file: &File) -> Result<Format> {
    let mut start = Vec::new();
    std::io::Read::read_to_end(&mut std::io::Read::take(file, 512), &mut start)?;
    let begins = |at: usize, magic: &[u8]| start.get(at..).is_some_and(|rest| rest.starts_with(magic));
    let is_called_so = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("qcow2"));
    if begins(0, &header::MAGIC) {
        if is_called_so {
            return Ok(Format::Qcow2);
        }
        let message = "it begins like a qcow2 image, but is not called .qcow2: if a guest had it as a raw disk, the guest can \
                       have written that; say --format qcow2 or --format raw";
        return Err(Error::new(Kind::Usage, message));
    }
    if is_called_so {
        let message =
            "it is called .qcow2 and does not begin like it; if it is a raw image, say --format raw";
        return Err(Error::new(Kind::Usage, message));
    }
    match OTHERS.iter().find(|(_, at, magic)| begins(*at, magic)) {
        None => Ok(Format::Raw),
        Some((name, ..)) => {
            let message = format!(
                "it begins like {name}; convert it with \"qemu-img convert -O qcow2\", or say --format raw to take it \
                 byte for byte"
            );
            Err(Error::new(Kind::Usage, message))
        }
    }
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
