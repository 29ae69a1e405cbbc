//! What this host knows of a place: notes in the configuration folder, which lie beside the root
//! key and not in the place.
//!
//! | file | |
//! |---|---|
//! | `<config>/places/<place>/url` | the place's URL, of which `<place>` is a digest |
//! | `<config>/places/<place>/id` | the place's id, as it was when this host used the place first |
//! | `<config>/places/<place>/host` | a number of this host's own, for its leases there |
//! | `<config>/places/<place>/snapshots/<id>` | the number and the SHA-256 of the newest manifest that it has seen |
//! | `<config>/places/<place>/said/<id>` | that the place may have this host's word: a volume has come, as that snapshot here |
//! | `<config>/places/<place>/pushes/<id>` | locked while this host pushes that snapshot |
//! | `<config>/places/<place>/stores/<store>` | the id by which backups of that store are known there; `<store>` is a digest of its path. Locked while it is backed up there |
//!
//! A manifest with a lower number than its mark was put back, and one that has a mark and is not there was
//! taken away, or is not listed.

use super::{PlaceId, corrupt};
use crate::base::root::{Root, create_dir_durable, files, replace_file};
use crate::base::{Context, Error, Kind, Result};
use crate::catalog::SnapshotId;
use crate::place::PlaceUrl;
use nix::fcntl::{Flock, FlockArg, OFlag};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// More than a note has, in bytes.
const MAX: u64 = 8 << 10;
/// How often a file is locked anew that was removed just now.
const TRIES: u32 = 16;

/// What this host knows of one place.
pub(crate) struct Marks {
    folder: PathBuf,
    url: String,
}

/// What is known of a manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mark {
    /// Its number.
    pub(crate) number: u64,
    /// The SHA-256 of its bytes.
    pub(crate) digest: [u8; 32],
}

/// How a manifest that was found compares with what this host knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// This host has not seen one of this snapshot there.
    Unknown,
    /// The manifest is the newest that this host has seen.
    Newest,
    /// The manifest is newer than what this host has seen.
    Newer,
    /// This host has seen a newer one, with this number.
    PutBack(u64),
    /// This host has seen another one with the same number.
    Another,
}

impl Mark {
    /// How this manifest compares with what is `known`.
    pub(crate) fn against(&self, known: Option<Mark>) -> Standing {
        match known {
            None => Standing::Unknown,
            Some(known) if known.number > self.number => Standing::PutBack(known.number),
            Some(known) if known.number < self.number => Standing::Newer,
            Some(known) if known.digest == self.digest => Standing::Newest,
            Some(_) => Standing::Another,
        }
    }
}

impl Standing {
    /// # Errors
    /// `Corrupt` for a manifest that was put back, or is another one.
    pub(crate) fn check(self, snapshot: SnapshotId) -> Result<()> {
        let advice = "the place shows an older state, or somebody has changed it; if that is as it should \
                      be, push the snapshot again";
        match self {
            Standing::Unknown | Standing::Newest | Standing::Newer => Ok(()),
            Standing::PutBack(number) => Err(corrupt(format!(
                "{snapshot}: its manifest is older than number {number}, which this host has seen there: \
                 {advice}"
            ))),
            Standing::Another => Err(corrupt(format!(
                "{snapshot}: its manifest is not the one of this number that this host has seen there: \
                 {advice}"
            ))),
        }
    }
}

impl Marks {
    /// What is known of the place at `url`.
    ///
    /// # Errors
    /// `Usage` where nothing says where the configuration folder is.
    pub(crate) fn of(url: &PlaceUrl) -> Result<Self> {
        let url = url.to_string();
        let digest = hex::encode(Sha256::digest(url.as_bytes()));
        Ok(Marks { folder: Root::config_dir()?.join("places").join(&digest[..16]), url })
    }

    /// Looks whether the place is the one that this host knows at that URL; with `note`, notes one
    /// that it does not know yet.
    ///
    /// # Errors
    /// `Corrupt` for another one.
    pub(crate) fn check_place(&self, id: PlaceId, note: bool) -> Result<()> {
        match self.read("id")? {
            Some(known) if known.trim_end() == id.to_string() => Ok(()),
            Some(known) => Err(corrupt(format!(
                "{} is another place ({id}) than the one that this host has used there ({}): somebody has \
                 emptied or replaced it. If that is as it should be, remove {}",
                self.url,
                known.trim_end(),
                self.folder.display()
            ))),
            None if note => {
                create_dir_durable(&self.folder)?;
                replace_file(&self.folder.join("url"), self.url.as_bytes())?;
                replace_file(&self.folder.join("id"), format!("{id}\n").as_bytes())
            }
            None => Ok(()),
        }
    }

    /// The id of the place that this host knows at that URL; none if it knows none.
    pub(crate) fn place(&self) -> Result<Option<PlaceId>> {
        Ok(self.read("id")?.and_then(|text| text.trim_end().parse().ok()).map(PlaceId))
    }

    /// The number of this host's own in the place, which is made with its first use.
    pub(crate) fn host(&self) -> Result<Uuid> {
        if let Some(host) = self.read("host")?.and_then(|text| text.trim_end().parse().ok()) {
            return Ok(host);
        }
        create_dir_durable(&self.folder)?;
        let host = Uuid::new_v4();
        replace_file(&self.folder.join("host"), format!("{host}\n").as_bytes())?;
        Ok(host)
    }

    /// What is known of a snapshot's manifest.
    ///
    /// # Errors
    /// `Corrupt` for a note that is damaged.
    pub(crate) fn known(&self, snapshot: SnapshotId) -> Result<Option<Mark>> {
        let name = format!("snapshots/{snapshot}");
        let Some(text) = self.read(&name)? else { return Ok(None) };
        let parse = || {
            let (number, digits) = text.trim_end().split_once(' ')?;
            let mut digest = [0; 32];
            hex::decode_to_slice(digits, &mut digest).ok()?;
            Some(Mark { number: number.parse().ok()?, digest })
        };
        let damaged = || corrupt(format!("{} is damaged; remove it", self.folder.join(&name).display()));
        parse().map(Some).ok_or_else(damaged)
    }

    /// Notes a manifest that this host has written or proved.
    pub(crate) fn note(&self, snapshot: SnapshotId, mark: Mark) -> Result<()> {
        let folder = self.folder.join("snapshots");
        create_dir_durable(&folder)?;
        let text = format!("{:020} {}\n", mark.number, hex::encode(mark.digest));
        replace_file(&folder.join(snapshot.to_string()), text.as_bytes())
    }

    /// Forgets a snapshot that was removed from the place. Returns whether it was known.
    pub(crate) fn forget(&self, snapshot: SnapshotId) -> Result<bool> {
        match files::remove(&self.folder.join("snapshots").join(snapshot.to_string())) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
            Err(e) => Err(e).context(|| format!("forget {snapshot}")),
        }
    }

    /// Every snapshot that this host has seen there and not removed since, sorted.
    pub(crate) fn all(&self) -> Result<Vec<SnapshotId>> {
        let names = files::names_if_there(&self.folder.join("snapshots"))?;
        let mut ids: Vec<SnapshotId> = names.iter().filter_map(|name| name.to_str()?.parse().ok()).collect();
        ids.sort_unstable();
        Ok(ids)
    }

    /// Notes, durably, that the place may have from now on this host's word that a volume has come: it was
    /// pulled as the snapshot `pulled`.
    pub(crate) fn note_said(&self, pulled: SnapshotId) -> Result<()> {
        let folder = self.folder.join("said");
        create_dir_durable(&folder)?;
        replace_file(&folder.join(pulled.to_string()), b"")
    }

    /// Whether the place may have that word.
    pub(crate) fn is_said(&self, pulled: SnapshotId) -> bool {
        files::exists(&self.folder.join("said").join(pulled.to_string()))
    }

    /// Forgets that, when the volume was made.
    pub(crate) fn forget_said(&self, pulled: SnapshotId) -> Result<()> {
        match files::remove(&self.folder.join("said").join(pulled.to_string())) {
            Err(e) if e.kind() != ErrorKind::NotFound => Err(e).context(|| format!("forget {pulled}")),
            _ => Ok(()),
        }
    }

    /// Keeps other pushes of the same snapshot to the same place, by this host, away until it is dropped.
    ///
    /// # Errors
    /// `Busy` if there is one.
    pub(crate) fn lock(&self, snapshot: SnapshotId) -> Result<Flock<File>> {
        let folder = self.folder.join("pushes");
        create_dir_durable(&folder)?;
        let path = folder.join(snapshot.to_string());
        let attempt = || path.display().to_string();
        let busy = || Error::new(Kind::Busy, format!("{snapshot} is being pushed to {} already", self.url));
        for _ in 0..TRIES {
            let held = lock_file(&path, busy)?;
            // Whoever had it may have removed the file just now.
            if files::is_at(&held, &path).context(attempt)? {
                return Ok(held);
            }
        }
        Err(busy())
    }

    /// The id by which backups of the store at `root` are known there, which is made with the first one; and
    /// a lock that keeps other backups of that store to that place away.
    ///
    /// # Errors
    /// `Busy` if there is one at this moment.
    pub(crate) fn store(&self, root: &Root) -> Result<(Uuid, Flock<File>)> {
        create_dir_durable(&self.folder.join("stores"))?;
        let digest = hex::encode(Sha256::digest(root.path().as_os_str().as_encoded_bytes()));
        let name = format!("stores/{}", &digest[..16]);
        let store = root.path().display();
        let busy = || Error::new(Kind::Busy, format!("{store} is being backed up to {} already", self.url));
        // A lock of its own, since the note is replaced.
        let held = lock_file(&self.folder.join(format!("{name}.lock")), busy)?;
        if let Some(id) = self.read(&name)?.and_then(|text| text.trim_end().parse().ok()) {
            return Ok((id, held));
        }
        let id = Uuid::new_v4();
        replace_file(&self.folder.join(&name), format!("{id}\n").as_bytes())?;
        Ok((id, held))
    }

    /// Removes the file by which a push was locked, whose lock is `held`.
    pub(crate) fn unlock(&self, snapshot: SnapshotId, held: Flock<File>) {
        let path = self.folder.join("pushes").join(snapshot.to_string());
        let _ = files::remove_name_of(&held, &path);
    }

    fn read(&self, name: &str) -> Result<Option<String>> {
        let path = self.folder.join(name);
        match files::read(&path, MAX) {
            Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e).context(|| format!("read {}", path.display())),
        }
    }
}

/// Locks the file at `path`, which is made if it is not there; `busy` is said where somebody has it.
pub(crate) fn lock_file(path: &Path, busy: impl Fn() -> Error) -> Result<Flock<File>> {
    let attempt = || path.display().to_string();
    let file = files::open_with(path, OFlag::O_WRONLY | OFlag::O_CREAT).context(attempt)?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, e)| match e {
        nix::Error::EWOULDBLOCK => busy(),
        e => Error::from(e).context(attempt()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn marks() -> (tempfile::TempDir, Marks) {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().canonicalize().unwrap().join("places/x");
        (dir, Marks { folder, url: "file:///x".into() })
    }

    #[test]
    fn a_manifest_is_held_against_what_was_seen() {
        let (_dir, marks) = marks();
        let (id, mark) = (SnapshotId::random(), |number, byte| Mark { number, digest: [byte; 32] });
        assert_eq!(mark(1, 1).against(marks.known(id).unwrap()), Standing::Unknown);
        marks.note(id, mark(2, 1)).unwrap();
        let standing = |it: Mark| it.against(marks.known(id).unwrap());
        assert_eq!(standing(mark(1, 1)), Standing::PutBack(2));
        assert_eq!(standing(mark(2, 1)), Standing::Newest);
        assert_eq!(standing(mark(2, 2)), Standing::Another);
        assert_eq!(standing(mark(3, 2)), Standing::Newer);
        for bad in [Standing::PutBack(2), Standing::Another] {
            assert_eq!(bad.check(id).unwrap_err().kind(), Kind::Corrupt);
        }
        assert_eq!(marks.all().unwrap(), [id]);
        assert!(marks.forget(id).unwrap() && !marks.forget(id).unwrap());
        assert_eq!(marks.all().unwrap(), []);
    }

    #[test]
    fn a_word_that_was_given_is_noted_until_it_is_forgotten() {
        let (_dir, marks) = marks();
        let (id, other) = (SnapshotId::random(), SnapshotId::random());
        assert!(!marks.is_said(id));
        marks.note_said(id).unwrap();
        assert!(marks.is_said(id) && !marks.is_said(other));
        marks.forget_said(id).unwrap();
        marks.forget_said(id).unwrap();
        assert!(!marks.is_said(id));
    }

    #[test]
    fn a_place_is_the_one_that_it_was() {
        let (_dir, marks) = marks();
        let (one, other) = (PlaceId::random(), PlaceId::random());
        marks.check_place(one, false).unwrap();
        assert_eq!(marks.place().unwrap(), None);
        marks.check_place(other, true).unwrap();
        assert_eq!(marks.place().unwrap(), Some(other));
        marks.check_place(other, false).unwrap();
        assert_eq!(marks.check_place(one, true).unwrap_err().kind(), Kind::Corrupt);
        assert_eq!(marks.host().unwrap(), marks.host().unwrap());
    }

    #[test]
    fn a_store_keeps_its_id_and_is_backed_up_once_at_a_time() {
        let (_dir, marks) = marks();
        let (one, other) = (Root::new("/one"), Root::new("/other"));
        let (id, held) = marks.store(&one).unwrap();
        assert_eq!(marks.store(&one).unwrap_err().kind(), Kind::Busy);
        assert_ne!(marks.store(&other).unwrap().0, id);
        drop(held);
        assert_eq!(marks.store(&one).unwrap().0, id);
    }

    #[test]
    fn one_push_of_a_snapshot_at_a_time() {
        let (_dir, marks) = marks();
        let id = SnapshotId::random();
        let held = marks.lock(id).unwrap();
        assert_eq!(marks.lock(id).unwrap_err().kind(), Kind::Busy);
        let _other = marks.lock(SnapshotId::random()).unwrap();
        marks.unlock(id, held);
        marks.lock(id).unwrap();
    }
}
