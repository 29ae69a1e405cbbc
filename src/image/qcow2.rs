//! Reading qcow2 images, by the library `imago`, which is given no way to open anything by itself.
//!
//! The files of a chain are opened here, one after the other, if that was asked for at all;
//! each header is judged first.
#![forbid(unsafe_code)]

use crate::base::{Context, Error, Kind, Result};
use crate::image::header::{Backing, Header, LONGEST};
use crate::image::{BackingFiles, Format, Held, foreign, length};
use imago::file::File as ImageFile;
use imago::qcow2::Qcow2 as Qcow2File;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, Mapping, Storage, StorageOpenOptions};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// The most files that a disk may be made of.
const MAX_FILES: usize = 32;

type Access = FormatAccess<ImageFile>;

/// A disk in a qcow2 image, perhaps based on others.
pub(super) struct Qcow2 {
    access: Access,
}

/// One file of a chain.
struct Link {
    file: File,
    format: Format,
}

impl Qcow2 {
    /// Opens the disk whose image is `file`, at `path`; returns it with what holds all of its files.
    pub(super) fn open(
        path: &Path,
        file: File,
        held: Held,
        backing: BackingFiles,
    ) -> Result<(Self, Vec<Held>)> {
        let mut all = vec![held];
        let mut links = Vec::new();
        let mut next = Some((path.to_owned(), Link { file, format: Format::Qcow2 }));
        while let Some((path, link)) = next.take() {
            if links.len() == MAX_FILES {
                let message = format!("it is based on more than {MAX_FILES} files");
                return Err(Error::new(Kind::Unsupported, message));
            }
            if link.format == Format::Qcow2
                && let Some(named) = header(&link.file, &path)?.backing
            {
                let (below, format) = allowed(&path, &named, backing)?;
                let (file, held) =
                    crate::image::open(&below).context(|| format!("its backing file {}", below.display()))?;
                all.push(held);
                next = Some((below, Link { file, format }));
            }
            links.push(link);
        }
        Ok((Qcow2 { access: chain(links)? }, all))
    }

    pub(super) fn size(&self) -> u64 {
        self.access.size()
    }

    pub(super) fn next_data(&self, from: u64) -> Result<Option<Range<u64>>> {
        let mut at = from;
        while at < self.size() {
            let (mapping, len) = self.access.get_mapping(at, self.size() - at)?;
            match mapping {
                // The library takes care that there is no endless row of nothing, but that
                // is not written down.
                _ if len == 0 => return Ok(None),
                Mapping::Zero { .. } => at += len,
                Mapping::Raw { storage, offset, .. } => {
                    check_is_there(storage, offset, len)?;
                    return Ok(Some(at..at + len));
                }
                _ => return Ok(Some(at..at + len)),
            }
        }
        Ok(None)
    }

    pub(super) fn read(&self, at: u64, into: &mut [u8]) -> Result<()> {
        Ok(self.access.read(into, at)?)
    }
}

/// The library reads zeros beyond a file's end: of a file that was cut off, data would be missing silently.
fn check_is_there(storage: &ImageFile, offset: u64, len: u64) -> Result<()> {
    let size = storage.size()?;
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => {
            let message = format!("data is to be at byte {offset}, but the file has {size}: it was cut off");
            Err(Error::new(Kind::Corrupt, message))
        }
    }
}

fn header(file: &File, path: &Path) -> Result<Header> {
    let len = length(file)?;
    let mut bytes = vec![0; len.min(LONGEST) as usize];
    file.read_exact_at(&mut bytes, 0)?;
    Header::parse(&bytes, len, path)
}

/// The file that the image at `path` is based on, if it may be read.
fn allowed(path: &Path, named: &Backing, backing: BackingFiles) -> Result<(PathBuf, Format)> {
    let name = &named.file;
    let usage = |message: String| Err(Error::new(Kind::Usage, message));
    if backing == BackingFiles::Refuse {
        return usage(format!(
            "it is based on another file, {name:?}; if you know that file and want it to be read, say \
             --backing-files, or make the image one with \"{}\"",
            foreign::command("qemu-img convert -f qcow2 -O qcow2 {in} {out}.qcow2", path)
        ));
    }
    if name.split('/').next().is_some_and(|first| first.contains(':')) || name.contains('\0') {
        return usage(format!("it is based on {name:?}, which is not a file's path"));
    }
    let format = match named.format.as_deref() {
        Some("qcow2") => Format::Qcow2,
        Some("raw") => Format::Raw,
        Some(other) => {
            return usage(format!(
                "it is based on {name:?} of format {other:?}, which is not read; make the image one with \
                 \"{}\"",
                foreign::command("qemu-img convert -f qcow2 -O qcow2 {in} {out}.qcow2", path)
            ));
        }
        None => {
            return usage(format!(
                "it is based on {name:?} and does not say of which format that is; write it down with \
                 \"{}\", where FORMAT is raw or qcow2",
                foreign::command("qemu-img rebase -u -f qcow2 -F FORMAT -b {base} {in}", path)
                    .replace("{base}", &foreign::shell_word(name))
            ));
        }
    };
    Ok((path.parent().unwrap_or(Path::new("")).join(name), format))
}

/// The disk that these files are together, the first one on top.
fn chain(links: Vec<Link>) -> Result<Access> {
    let mut below: Option<Access> = None;
    for link in links.into_iter().rev() {
        let storage = ImageFile::from_open_file(link.file, StorageOpenOptions::new())?;
        let gate = DenyImplicitOpenGate::default();
        below = Some(match link.format {
            Format::Raw => FormatAccess::new(Raw::builder(storage).open(gate)?),
            Format::Qcow2 => {
                let builder = Qcow2File::<ImageFile, Access>::builder(storage);
                FormatAccess::new(builder.backing(below.take()).data_file(None).open(gate)?)
            }
        });
    }
    below.ok_or_else(|| Error::new(Kind::Other, "a chain of no files"))
}
