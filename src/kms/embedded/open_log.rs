//! One log file as far as it has been read: its place in the chain, and the state that its records add up to.
//!
//! Its caller holds the store's lock whenever it reads or writes the file.

use crate::base::hardened::Hardened;
use crate::base::root::files;
use crate::base::spare;
use crate::kms::KmsError;
use crate::kms::embedded::keys::{LogKeys, RootKey};
use crate::kms::embedded::log::{BODY_MAX, HEADER_LEN, Header, Next, Position, encode_record, next_record};
use crate::kms::embedded::plain::failed;
use crate::kms::embedded::records::{Change, Transaction};
use crate::kms::embedded::state::State;
use crate::kms::embedded::{anchor, root_key};
use nix::fcntl::OFlag;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// A log that is longer was not written by this program, which rewrites it long before.
const LOG_MAX: u64 = 1 << 30;
/// How many changes go into one record of a rewritten log.
const CHANGES_IN_RECORD: usize = 64;

/// A log file and what it says.
pub struct OpenLog {
    path: PathBuf,
    file: File,
    header: Header,
    keys: LogKeys,
    /// Where the last good record ends.
    end: u64,
    /// The MACs of this file's records: the one of record `header.base.seq + 1` first.
    chains: Vec<[u8; 32]>,
    state: State,
    torn: bool,
}

impl OpenLog {
    /// Opens the log at `path`, fetches its root key from `config` and reads it all;
    /// `None` if there is no log.
    pub fn load(path: &Path, config: &Path, hardened: Hardened) -> Result<Option<Self>, KmsError> {
        let file = match files::open(path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(|e| failed("read the KMS store", path, &e))?,
        };
        let start = first_bytes_of(&file).map_err(|e| failed("read", path, &e))?;
        let header = Header::parse(&start).map_err(|e| at(path, e))?;
        let keys = LogKeys::derive(&root_key::load(config, header.store, hardened)?, header.store)?;
        if !Header::is_authentic(&start, &keys) {
            return Err(KmsError::Corrupt(format!(
                "{}: the root key {} is not the one this store was made with, or the store's header is \
                 damaged",
                path.display(),
                root_key::path(config, header.store).display()
            )));
        }
        let mut log = OpenLog {
            path: path.to_owned(),
            file,
            header,
            keys,
            end: HEADER_LEN as u64,
            chains: Vec::new(),
            state: State::default(),
            torn: false,
        };
        log.catch_up()?;
        Ok(Some(log))
    }

    /// The id of the KMS whose log is at `path`, if its header says one; nothing vouches for it.
    pub fn id_at(path: &Path) -> Option<Uuid> {
        let start = files::open(path).and_then(|file| first_bytes_of(&file)).ok()?;
        Header::parse(&start).ok().map(|header| header.store)
    }

    /// A log without records, for the store that `root` was just made for.
    pub fn first_bytes(header: &Header, root: &RootKey) -> Result<Vec<u8>, KmsError> {
        Ok(header.encode(&LogKeys::derive(root, header.store)?))
    }

    /// Whether the file at the log's path is still this one, and has not become shorter.
    pub fn is_current(&self) -> bool {
        match (self.file.metadata(), self.path.symlink_metadata()) {
            (Ok(mine), Ok(theirs)) => files::is_same(&mine, &theirs) && theirs.len() >= self.end,
            _ => false,
        }
    }

    /// Reads what others have appended.
    pub fn catch_up(&mut self) -> Result<(), KmsError> {
        let bytes = self.read_from_end().map_err(|e| failed("read the KMS store", &self.path, &e))?;
        let mut rest = &bytes[..];
        self.torn = false;
        loop {
            let before = self.position();
            match next_record(&before, rest, self.end, &self.keys).map_err(|e| at(&self.path, e))? {
                Next::End => return Ok(()),
                Next::Torn => {
                    self.torn = true;
                    return Ok(());
                }
                Next::Record { body, after, len } => {
                    let transaction = Transaction::decode(after.seq, body).map_err(|e| at(&self.path, e))?;
                    self.accept(transaction, after, len);
                    rest = &rest[len..];
                }
            }
        }
    }

    /// The id of the KMS.
    pub fn id(&self) -> Uuid {
        self.header.store
    }

    /// What the records add up to.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// The store's keys.
    pub fn keys(&self) -> &LogKeys {
        &self.keys
    }

    /// The place of the last record.
    pub fn position(&self) -> Position {
        let seq = self.header.base.seq + self.chains.len() as u64;
        self.chains.last().map_or(self.header.base, |chain| Position { seq, chain: *chain })
    }

    /// Compares the log with the anchor in `config`; returns whether the log is ahead of it. Corrupt if the
    /// log lacks what was answered.
    pub fn is_ahead_of_anchor(&self, config: &Path) -> Result<bool, KmsError> {
        let Some(anchor) = anchor::read(config, self.header.store, &self.keys)? else {
            return Ok(true);
        };
        let position = self.position();
        let here = match anchor.seq.checked_sub(self.header.base.seq) {
            // Compacted away; the base is authentic and lies behind the anchor.
            None => None,
            Some(0) => Some(self.header.base.chain),
            Some(n) => match self.chains.get(n as usize - 1) {
                Some(chain) => Some(*chain),
                None => return Err(self.older_than(&anchor, &position, config)),
            },
        };
        if here.is_some_and(|chain| chain != anchor.chain) {
            return Err(self.older_than(&anchor, &position, config));
        }
        Ok(position.seq > anchor.seq)
    }

    fn older_than(&self, anchor: &Position, position: &Position, config: &Path) -> KmsError {
        KmsError::Corrupt(format!(
            "{}: the KMS store was cut short, or an older copy was put in its place: it ends at record {}, \
             but record {} was answered. If you restored a backup on purpose, remove {} to accept the older \
             store (keys that were disabled since are enabled again)",
            self.path.display(),
            position.seq,
            anchor.seq,
            anchor::path(config, self.header.store).display()
        ))
    }

    /// Moves the anchor in `config` to the last record, which must be durable.
    pub fn anchor(&self, config: &Path) -> Result<(), KmsError> {
        anchor::write(config, self.header.store, &self.position(), &self.keys)
    }

    /// Makes durable what was read: whoever wrote it may have been killed before doing so.
    pub fn sync(&self) -> Result<(), KmsError> {
        self.file.sync_data().map_err(|e| failed("sync the KMS store", &self.path, &e))
    }

    /// Cuts off a record that was never finished.
    pub fn cut_torn_end(&mut self) -> Result<(), KmsError> {
        if !self.torn {
            return Ok(());
        }
        let seq = self.position().seq + 1;
        let cut = |file: &File| -> std::io::Result<u64> {
            let cut = file.metadata()?.len() - self.end;
            file.set_len(self.end)?;
            file.sync_all()?;
            Ok(cut)
        };
        let bytes = self.writable().and_then(|f| cut(&f)).map_err(|e| failed("repair", &self.path, &e))?;
        log::warn!(
            "{}: record {seq} was never finished (a crash or a power cut): cut off its {bytes} bytes",
            self.path.display()
        );
        self.torn = false;
        Ok(())
    }

    /// Appends a record, durable when this returns. On failure the log is as before, or
    /// ends in a torn record.
    pub fn append(&mut self, transaction: Transaction) -> Result<(), KmsError> {
        let body = transaction.encode()?;
        if body.len() > BODY_MAX {
            return Err(KmsError::Internal("a record of the KMS store would be longer than 16 MiB".into()));
        }
        let (bytes, after) = encode_record(&self.position(), &body, &self.keys);
        let file = self.writable().map_err(|e| failed("change the KMS store", &self.path, &e))?;
        let write = || file.write_all_at(&bytes, self.end).and_then(|()| file.sync_data());
        if let Err(e) = spare::with(write) {
            // What cannot be taken back now is cut off by the next who opens the log: it was not answered.
            let _ = file.set_len(self.end).and_then(|()| file.sync_all());
            return Err(failed("change the KMS store", &self.path, &e));
        }
        self.accept(transaction, after, bytes.len());
        Ok(())
    }

    /// Whether the log is due to be rewritten: because it holds material of deleted keys, or because most of
    /// its records are outdated.
    pub fn wants_rewriting(&self) -> bool {
        self.state.holds_deleted() || self.chains.len() > 1000 + 4 * self.state.len()
    }

    /// The bytes of a log with only what lives, which goes on where this one ends.
    pub fn rewritten(&self) -> Result<Vec<u8>, KmsError> {
        let mut place = self.position();
        let mut bytes = Header { store: self.header.store, base: place }.encode(&self.keys);
        let live = self.state.live();
        let mut append = |changes: &[Change]| {
            let body = Transaction { time: self.state.time(), changes: changes.to_vec() }.encode()?;
            let (record, after) = encode_record(&place, &body, &self.keys);
            bytes.extend_from_slice(&record);
            place = after;
            Ok(())
        };
        // The first record keeps the time even if nothing lives.
        append(&[])?;
        live.chunks(CHANGES_IN_RECORD).try_for_each(append)?;
        Ok(bytes)
    }

    fn accept(&mut self, transaction: Transaction, after: Position, len: usize) {
        self.state.apply(transaction);
        self.chains.push(after.chain);
        self.end += len as u64;
    }

    fn read_from_end(&mut self) -> std::io::Result<Vec<u8>> {
        if self.file.metadata()?.len() > LOG_MAX {
            return Err(std::io::Error::other(
                "the file is longer than 1 GiB, so it is not a KMS store's log",
            ));
        }
        let mut bytes = Vec::new();
        self.file.seek(SeekFrom::Start(self.end))?;
        (&self.file).take(LOG_MAX).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn writable(&self) -> std::io::Result<File> {
        files::open_with(&self.path, OFlag::O_WRONLY)
    }
}

/// Puts the file's path before the message of a damaged store.
fn first_bytes_of(file: &File) -> std::io::Result<Vec<u8>> {
    let mut start = Vec::with_capacity(HEADER_LEN);
    file.take(HEADER_LEN as u64).read_to_end(&mut start)?;
    Ok(start)
}

fn at(path: &Path, e: KmsError) -> KmsError {
    match e {
        KmsError::Corrupt(message) => KmsError::Corrupt(format!("{}: {message}", path.display())),
        e => e,
    }
}
