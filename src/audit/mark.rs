//! Marks: how far the audit log reached, noted where one who can write the log's folder does not reach.
//!
//! A log alone cannot show that its end was cut off. Beside the KMS's root key, in the configuration folder,
//! two files of one sector each say which record was written last: `audit-<log>.signed` by whoever has the
//! audit key, with a MAC, and `audit-<log>.plain` by whoever has not. A mark is overwritten in place, so that
//! a process that is confined after its start can keep it open.

use crate::audit::line::{AuditKey, Position, digits};
use crate::base::root::{create_dir_durable, files};
use crate::base::spare;
use nix::fcntl::OFlag;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use subtle::ConstantTimeEq;
use uuid::Uuid;

/// Bytes of a mark: one sector, which a disk writes whole or not at all.
pub const MARK_LEN: usize = 512;
/// More than a mark has: what is longer is none.
pub(super) const READ_MAX: u64 = 4096;
const MAGIC: &str = "sealblk-audit-mark-1";
const NO_MAC: &str = "-";

/// How many records a mark without a MAC may be ahead of everything else that tells how far the log reached:
/// more than are ever lost with the end of a log.
pub const STEP: u64 = 1 << 20;

/// Whether record `seq` can be one of the next after `known`.
pub fn is_near(seq: u64, known: u64) -> bool {
    seq <= known.saturating_add(STEP)
}

/// Who writes a mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Whoever has the audit key.
    Signed,
    /// Whoever has not.
    Plain,
}

/// How far a log reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    /// The log.
    pub log: Uuid,
    /// Its last record, as far as the mark's writer knows.
    pub position: Position,
    /// SHA-256 of the path of the folder that the log lies in.
    pub folder: [u8; 32],
}

impl Mark {
    /// The mark's bytes, with a MAC if there is a key.
    pub fn encode(&self, key: Option<&AuditKey>) -> [u8; MARK_LEN] {
        let covered = self.covered();
        let mac = key.map_or(NO_MAC.into(), |key| hex::encode(key.mac("mark", covered.as_bytes())));
        let text = format!("{covered} {mac}");
        let mut bytes = [b' '; MARK_LEN];
        bytes[..text.len()].copy_from_slice(text.as_bytes());
        bytes[MARK_LEN - 1] = b'\n';
        bytes
    }

    /// Reads a mark's bytes, and its MAC if it has one; `None` if they are no mark.
    pub fn parse(bytes: &[u8]) -> Option<(Self, Option<[u8; 32]>)> {
        let text = std::str::from_utf8(bytes.first_chunk::<MARK_LEN>()?).ok()?;
        let parts: Vec<&str> = text.trim_ascii_end().split(' ').collect();
        let [MAGIC, log, seq, chain, folder, mac] = parts[..] else { return None };
        let position = Position { seq: seq.parse().ok()?, chain: digits(chain)? };
        let mark = Mark { log: log.parse().ok()?, position, folder: digits(folder)? };
        let mac = if mac == NO_MAC { None } else { Some(digits(mac)?) };
        Some((mark, mac))
    }

    /// Whether `key` has made `mac` for this mark.
    pub fn is_authentic(&self, mac: &[u8; 32], key: &AuditKey) -> bool {
        key.mac("mark", self.covered().as_bytes()).ct_eq(mac).into()
    }

    fn covered(&self) -> String {
        let Mark { log, position: Position { seq, chain }, folder } = self;
        format!("{MAGIC} {log} {seq} {} {}", hex::encode(chain), hex::encode(folder))
    }
}

/// Where a log's mark lies.
pub fn path(config: &Path, log: Uuid, kind: Kind) -> PathBuf {
    let extension = match kind {
        Kind::Signed => "signed",
        Kind::Plain => "plain",
    };
    config.join(format!("audit-{log}.{extension}"))
}

/// Whether this is where a mark without a MAC lies.
pub fn is_plain(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "plain")
}

/// What stands for a folder in a mark.
pub fn folder_hash(folder: &Path) -> [u8; 32] {
    let whole = std::fs::canonicalize(folder).unwrap_or_else(|_| folder.to_owned());
    Sha256::digest(whole.as_os_str().as_bytes()).into()
}

/// The mark that reaches furthest of those that were made for a log in `folder`, whichever log it was.
pub fn of_folder(config: &Path, folder: &Path) -> Option<Mark> {
    let hash = folder_hash(folder);
    let names = files::names(config).ok()?.into_iter().map(|name| config.join(name));
    let is_mark = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.starts_with("audit-") && (name.ends_with(".signed") || name.ends_with(".plain"))
    };
    // Whoever can write a mark cannot choose its file's name.
    let is_own = |path: &Path, mark: &Mark| {
        [Kind::Signed, Kind::Plain].iter().any(|&kind| self::path(config, mark.log, kind) == path)
    };
    let marks = names.filter(is_mark).filter_map(|path| {
        let (mark, _) = Mark::parse(&files::read(&path, READ_MAX).ok()?)?;
        is_own(&path, &mark).then_some(mark)
    });
    marks.filter(|mark| mark.folder == hash).max_by_key(|mark| mark.position.seq)
}

/// Both marks of a log, kept open.
#[derive(Debug)]
pub struct Marks {
    /// Of which kind the own one is.
    kind: Kind,
    own: Option<File>,
    others: Vec<(Kind, File)>,
}

impl Marks {
    /// Opens the marks of `log` for one who writes `kind`. Where the configuration folder may not be written,
    /// there is none to write, and a warning.
    pub fn open(config: &Path, log: Uuid, kind: Kind) -> std::io::Result<Self> {
        let open_to_read = |kind| Some((kind, files::open(&path(config, log, kind)).ok()?));
        let other = if kind == Kind::Signed { Kind::Plain } else { Kind::Signed };
        let others = open_to_read(other).into_iter();
        let own = path(config, log, kind);
        let open = || -> std::io::Result<File> {
            create_dir_durable(config).map_err(std::io::Error::other)?;
            files::open_with(&own, OFlag::O_RDWR | OFlag::O_CREAT)
        };
        match open() {
            Ok(file) => Ok(Marks { kind, own: Some(file), others: others.collect() }),
            Err(e) if may_not_be_written(config, &e) => {
                log::warn!(
                    "{}: {e}; if the end of the audit log is cut off, nothing there will show it",
                    own.display()
                );
                Ok(Marks { kind, own: None, others: others.chain(open_to_read(kind)).collect() })
            }
            Err(e) => Err(e),
        }
    }

    /// The one that reaches furthest, of a log whose last record is number `last`. A mark without a MAC is
    /// written by processes that a guest may have broken into: one that names a record much further on than
    /// anything else tells of was not written by us, and counts for nothing.
    pub fn furthest(&self, last: u64) -> Option<Position> {
        let known = last.max(self.signed());
        let marks = self.all().filter_map(|(kind, file)| Some((kind, read(file)?.position)));
        let counts =
            |(kind, position): &(Kind, Position)| *kind == Kind::Signed || is_near(position.seq, known);
        marks.filter(counts).map(|(_, position)| position).max_by_key(|position| position.seq)
    }

    /// The number of the last record that the mark with a MAC names; 0 without one. Only processes that are
    /// not confined write that.
    pub fn signed(&self) -> u64 {
        let signed = self.all().filter(|(kind, _)| *kind == Kind::Signed);
        signed.filter_map(|(_, file)| read(file)).map(|mark| mark.position.seq).max().unwrap_or(0)
    }

    fn all(&self) -> impl Iterator<Item = (Kind, &File)> {
        self.own
            .iter()
            .map(|file| (self.kind, file))
            .chain(self.others.iter().map(|(kind, file)| (*kind, file)))
    }

    /// Notes how far the log reaches now, durably.
    pub fn write(&self, mark: &Mark, key: Option<&AuditKey>) -> std::io::Result<()> {
        let Some(file) = &self.own else { return Ok(()) };
        spare::with(|| file.write_all_at(&mark.encode(key), 0))?;
        file.sync_data()
    }
}

fn read(file: &File) -> Option<Mark> {
    let mut bytes = [0; MARK_LEN];
    file.read_exact_at(&mut bytes, 0).ok()?;
    Mark::parse(&bytes).map(|(mark, _)| mark)
}

/// Whether somebody has decided that we shall not write there, which is no reason to stop.
fn may_not_be_written(config: &Path, e: &std::io::Error) -> bool {
    let refused = matches!(e.kind(), ErrorKind::ReadOnlyFilesystem | ErrorKind::PermissionDenied);
    // Where the folder could not even be made, the error has lost its number.
    refused || !config.is_dir()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypt::secret_mem::SecretBytes;

    fn mark() -> Mark {
        let position = Position { seq: u64::MAX, chain: [0xab; 32] };
        Mark { log: Uuid::from_u128(5), position, folder: [1; 32] }
    }

    #[test]
    fn a_mark_is_read_back_and_its_mac_is_its_own() {
        let key = |n| AuditKey::new(Uuid::from_u128(1), SecretBytes::copy_of(&[n; 32]).unwrap());
        assert_eq!(Mark::parse(&mark().encode(None)), Some((mark(), None)));
        let bytes = mark().encode(Some(&key(1)));
        let (read, mac) = Mark::parse(&bytes).unwrap();
        assert_eq!(read, mark());
        assert!(read.is_authentic(&mac.unwrap(), &key(1)) && !read.is_authentic(&mac.unwrap(), &key(2)));
        let end = bytes.trim_ascii_end().len();
        for at in 0..end {
            let mut changed = bytes;
            changed[at] ^= 1;
            let Some((read, mac)) = Mark::parse(&changed) else { continue };
            assert!(!mac.is_some_and(|mac| read.is_authentic(&mac, &key(1))), "byte {at}");
        }
    }
}
