//! What is noted of grants, in `grants/` in the configuration folder, a file each: written before the
//! grant is made, removed once it is retired. Not under the store's root: what lies there is whoever's who
//! can write the ciphertext.
//!
//! Earlier versions kept their notes in `<root>/grants/`. Those are never read ([`warn_of_old`]).

use crate::audit::mark::folder_hash;
use crate::base::root::{Root, create_dir_durable, files, replace_file, sync_dir};
use crate::base::{Context, Error, Kind, Result, Timestamp};
use crate::catalog::VolumeId;
use crate::config::Settings;
use crate::kms::patience::Patience;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// The version of what is written.
const VERSION: u32 = 2;
/// The longest note in bytes.
const MAX_LEN: u64 = 16 << 10;

/// A grant that is to be made, or was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Note {
    version: u32,
    /// Tells it from the volume's others.
    pub id: Uuid,
    /// Stands for the root folder of the volume's store: several stores may have one configuration folder.
    store: String,
    /// The volume whose context it is good for.
    pub volume: VolumeId,
    /// Whose key it is.
    pub provider: String,
    /// The key's ARN.
    pub key_id: String,
    /// The principal that it is for.
    pub grantee: String,
    /// Since when it is noted.
    pub since: Timestamp,
    /// The grant's id, once the KMS has told it.
    pub grant: Option<String>,
}

impl Note {
    /// The note of a grant that is to be made for an attach of a volume of the store at `root`.
    pub fn new(root: &Root, volume: VolumeId, provider: &str, key_id: &str, grantee: &str) -> Self {
        let (provider, key_id) = (provider.to_owned(), key_id.to_owned());
        let (id, since, grantee) = (Uuid::new_v4(), Timestamp::now(), grantee.to_owned());
        let store = store_of(root);
        Note { version: VERSION, id, store, volume, provider, key_id, grantee, since, grant: None }
    }

    /// The grant's name at the KMS: the same request by the same name is the same grant.
    pub fn name(&self) -> String {
        format!("sealblk/{}/{}", self.volume, self.id)
    }

    /// Whether the grant that `other` is to have is this one's, and nobody knows whether it was made.
    pub fn could_be(&self, other: &Note) -> bool {
        let same = (&self.volume, &self.provider, &self.key_id, &self.grantee)
            == (&other.volume, &other.provider, &other.key_id, &other.grantee);
        same && self.grant.is_none()
    }

    fn path(&self, folder: &Path) -> PathBuf {
        folder.join(format!("{}.{}.json", self.volume, self.id))
    }
}

/// The notes of one configuration folder.
#[derive(Clone, Debug)]
pub struct Notes {
    folder: PathBuf,
    /// Whose notes are meant.
    store: String,
}

impl Notes {
    /// The notes of the store at `root`, in [`Root::config_dir`].
    pub fn of(root: &Root) -> Result<Self> {
        Ok(Self::at(&Root::config_dir()?, root))
    }

    /// The notes of the store at `root`, in `config`.
    pub fn at(config: &Path, root: &Root) -> Self {
        Notes { folder: config.join("grants"), store: store_of(root) }
    }

    /// Writes a note down, durably, in place of what it said before.
    pub fn write(&self, note: &Note) -> Result<()> {
        create_dir_durable(&self.folder)?;
        let text = serde_json::to_vec_pretty(note).map_err(|e| Error::of(Kind::Other, e))?;
        replace_file(&note.path(&self.folder), &text)
    }

    /// Removes a note; one that somebody else has removed is as good.
    pub fn remove(&self, note: &Note) -> Result<()> {
        let path = note.path(&self.folder);
        files::remove_if_there(&path).context(|| format!("remove {}", path.display()))?;
        sync_dir(&self.folder)
    }

    /// All notes of the store, by volume. What cannot be read is logged and left.
    pub fn list(&self) -> Result<Vec<Note>> {
        let mut notes = Vec::new();
        for name in files::names_if_there(&self.folder)? {
            let path = self.folder.join(name);
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            match read(&path) {
                Ok(note) => notes.push(note),
                // Retired meanwhile.
                Err(e) if e.kind() == Kind::NotFound => {}
                Err(e) => log::warn!("{}: {e}; it is left as it is", path.display()),
            }
        }
        notes.retain(|note| note.store == self.store);
        notes.sort_by_key(|note| (note.volume, note.id));
        Ok(notes)
    }

    /// The notes of one volume.
    pub fn of_volume(&self, volume: VolumeId) -> Result<Vec<Note>> {
        let mut notes = self.list()?;
        notes.retain(|note| note.volume == volume);
        Ok(notes)
    }
}

/// The notes that earlier versions left in the store at `root`. Nothing that stands in them is looked at.
///
/// # Errors
/// Those of the file system.
pub fn old(root: &Root) -> Result<Vec<PathBuf>> {
    let folder = root.grants();
    let names = files::names_if_there(&folder)?.into_iter();
    let mut found: Vec<PathBuf> = names.map(|name| folder.join(name)).collect();
    found.retain(|path| path.extension().is_some_and(|extension| extension == "json"));
    found.sort_unstable();
    Ok(found)
}

/// Says so if there are any.
pub fn warn_of_old(root: &Root) {
    if old(root).is_ok_and(|found| !found.is_empty()) {
        log::warn!(
            "{}: notes of grants are not read there any more, since whoever can write the store could have \
             written them; \"sealblk gc\" removes them. Grants that an earlier version left are called \
             sealblk/vol-...: look for them at the KMS (\"aws kms list-retirable-grants\")",
            root.grants().display()
        );
    }
}

/// The settings' patience, but no more than `most`.
pub(super) fn patience(root: &Root, most: Patience) -> Patience {
    // Settings that cannot be read are reported by whoever needs them more.
    Settings::load(root).map_or(most, |settings| Patience(settings.kms_patience.min(most.0)))
}

/// What stands for the store at `root` in a note.
fn store_of(root: &Root) -> String {
    hex::encode(folder_hash(root.path()))
}

fn read(path: &Path) -> Result<Note> {
    let text = files::read(path, MAX_LEN)?;
    let note: Note = serde_json::from_slice(&text).map_err(|e| Error::of(Kind::Corrupt, e))?;
    if note.version != VERSION {
        return Err(Error::new(Kind::Corrupt, format!("version {} is not known here", note.version)));
    }
    Ok(note)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "arn:aws:kms:us-east-1:1:key/1";
    const WHO: &str = "arn:aws:iam::1:root";

    fn place() -> (tempfile::TempDir, Root, Notes) {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(dir.path().join("root"));
        let notes = Notes::at(&dir.path().join("config"), &root);
        (dir, root, notes)
    }

    #[test]
    fn notes_are_kept_changed_and_removed() {
        let (_dir, root, notes) = place();
        assert_eq!(notes.list().unwrap(), []);
        let mut note = Note::new(&root, VolumeId::random(), "aws", KEY, WHO);
        let other = Note::new(&root, VolumeId::random(), "aws", KEY, WHO);
        notes.write(&note).unwrap();
        notes.write(&other).unwrap();
        assert!(note.could_be(&Note { id: Uuid::new_v4(), ..note.clone() }) && !note.could_be(&other));
        note.grant = Some("1234".into());
        notes.write(&note).unwrap();
        assert!(!note.could_be(&note));
        assert_eq!(notes.of_volume(note.volume).unwrap(), std::slice::from_ref(&note));
        assert_eq!(notes.list().unwrap().len(), 2);
        notes.remove(&note).unwrap();
        notes.remove(&note).unwrap();
        assert_eq!(notes.list().unwrap(), [other]);
    }

    #[test]
    fn what_is_not_a_note_stays_and_hides_no_other() {
        let (_dir, root, notes) = place();
        let note = Note::new(&root, VolumeId::random(), "aws", KEY, WHO);
        notes.write(&note).unwrap();
        let newer = Note { version: 3, id: Uuid::new_v4(), ..note.clone() };
        std::fs::write(newer.path(&notes.folder), serde_json::to_vec(&newer).unwrap()).unwrap();
        std::fs::write(notes.folder.join("torn.json"), "{").unwrap();
        assert_eq!(notes.list().unwrap(), [note]);
        assert_eq!(std::fs::read_dir(&notes.folder).unwrap().count(), 3);
    }

    #[test]
    fn the_notes_of_another_store_in_the_same_folder_are_none_of_this_stores_affair() {
        let (dir, root, notes) = place();
        let elsewhere = Root::new(dir.path().join("elsewhere"));
        notes.write(&Note::new(&elsewhere, VolumeId::random(), "aws", KEY, WHO)).unwrap();
        let ours = Note::new(&root, VolumeId::random(), "aws", KEY, WHO);
        notes.write(&ours).unwrap();
        assert_eq!(notes.list().unwrap(), [ours]);
    }

    #[test]
    fn a_name_is_one_that_kms_takes() {
        let (_dir, root, _) = place();
        let name = Note::new(&root, VolumeId::random(), "aws", "key", "arn").name();
        assert!(name.len() <= 256 && name.bytes().all(|b| b.is_ascii_alphanumeric() || b":/_-".contains(&b)));
    }
}
