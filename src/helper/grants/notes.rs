//! What is noted of grants, in `<root>/grants/`, a file each: written before the grant is made, removed once it is
//! retired. Not in the volume's folder, which a deletion takes away with all that is in it.

use crate::base::root::{Root, create_dir_durable, replace_file, sync_dir};
use crate::base::{Context, Error, Kind, Result, Timestamp};
use crate::catalog::VolumeId;
use crate::config::Settings;
use crate::kms::patience::Patience;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// The version of what is written.
const VERSION: u32 = 1;
/// The longest note in bytes.
const MAX_LEN: u64 = 16 << 10;

/// A grant that is to be made, or was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Note {
    version: u32,
    /// Tells it from the volume's others.
    pub id: Uuid,
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
    /// The note of a grant that is to be made.
    pub fn new(volume: VolumeId, provider: &str, key_id: &str, grantee: &str) -> Self {
        let (provider, key_id) = (provider.to_owned(), key_id.to_owned());
        let (id, since, grantee) = (Uuid::new_v4(), Timestamp::now(), grantee.to_owned());
        Note { version: VERSION, id, volume, provider, key_id, grantee, since, grant: None }
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

    fn path(&self, root: &Root) -> PathBuf {
        root.grants().join(format!("{}.{}.json", self.volume, self.id))
    }
}

/// Writes a note down, durably, in place of what it said before.
pub fn write(root: &Root, note: &Note) -> Result<()> {
    create_dir_durable(&root.grants())?;
    let text = serde_json::to_vec_pretty(note).map_err(|e| Error::new(Kind::Other, e.to_string()))?;
    replace_file(&note.path(root), &text)
}

/// Removes a note; one that somebody else has removed is as good.
pub fn remove(root: &Root, note: &Note) -> Result<()> {
    let path = note.path(root);
    match std::fs::remove_file(&path) {
        Err(e) if e.kind() != ErrorKind::NotFound => {
            Err(Error::from(e).context(format!("remove {}", path.display())))
        }
        _ => sync_dir(&root.grants()),
    }
}

/// All notes, by volume. What cannot be read is logged and left.
pub fn list(root: &Root) -> Result<Vec<Note>> {
    let folder = root.grants();
    let attempt = || format!("list {}", folder.display());
    let entries = match std::fs::read_dir(&folder) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.context(attempt)?,
    };
    let mut notes = Vec::new();
    for entry in entries {
        let path = entry.context(attempt)?.path();
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
    notes.sort_by_key(|note| (note.volume, note.id));
    Ok(notes)
}

/// The notes of one volume.
pub fn of_volume(root: &Root, volume: VolumeId) -> Result<Vec<Note>> {
    let mut notes = list(root)?;
    notes.retain(|note| note.volume == volume);
    Ok(notes)
}

/// The settings' patience, but no more than `most`.
pub(super) fn patience(root: &Root, most: Patience) -> Patience {
    // Settings that cannot be read are reported by whoever needs them more.
    Settings::load(root).map_or(most, |settings| Patience(settings.kms_patience.min(most.0)))
}

fn read(path: &Path) -> Result<Note> {
    let mut text = Vec::new();
    File::open(path)?.take(MAX_LEN).read_to_end(&mut text)?;
    let note: Note = serde_json::from_slice(&text).map_err(|e| Error::new(Kind::Corrupt, e.to_string()))?;
    if note.version != VERSION {
        return Err(Error::new(Kind::Corrupt, format!("version {} is not known here", note.version)));
    }
    Ok(note)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_are_kept_changed_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(dir.path());
        assert_eq!(list(&root).unwrap(), []);
        let mut note =
            Note::new(VolumeId::random(), "aws", "arn:aws:kms:us-east-1:1:key/1", "arn:aws:iam::1:root");
        let other =
            Note::new(VolumeId::random(), "aws", "arn:aws:kms:us-east-1:1:key/1", "arn:aws:iam::1:root");
        write(&root, &note).unwrap();
        write(&root, &other).unwrap();
        assert!(note.could_be(&Note { id: Uuid::new_v4(), ..note.clone() }) && !note.could_be(&other));
        note.grant = Some("1234".into());
        write(&root, &note).unwrap();
        assert!(!note.could_be(&note));
        assert_eq!(of_volume(&root, note.volume).unwrap(), std::slice::from_ref(&note));
        assert_eq!(list(&root).unwrap().len(), 2);
        remove(&root, &note).unwrap();
        remove(&root, &note).unwrap();
        assert_eq!(list(&root).unwrap(), [other]);
    }

    #[test]
    fn what_is_not_a_note_stays_and_hides_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(dir.path());
        let note = Note::new(VolumeId::random(), "aws", "key", "arn");
        write(&root, &note).unwrap();
        let newer = Note { version: 2, id: Uuid::new_v4(), ..note.clone() };
        std::fs::write(newer.path(&root), serde_json::to_vec(&newer).unwrap()).unwrap();
        std::fs::write(root.grants().join("torn.json"), "{").unwrap();
        assert_eq!(list(&root).unwrap(), [note]);
        assert_eq!(std::fs::read_dir(root.grants()).unwrap().count(), 3);
    }

    #[test]
    fn a_name_is_one_that_kms_takes() {
        let name = Note::new(VolumeId::random(), "aws", "key", "arn").name();
        assert!(name.len() <= 256 && name.bytes().all(|b| b.is_ascii_alphanumeric() || b":/_-".contains(&b)));
    }
}
