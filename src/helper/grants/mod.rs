//! Grants of attached volumes: each attach has its own, good for its volume's context alone, and ends it.
//!
//! The [`keeper`] process makes the grant before the key is unwrapped and retires it when the host process lets go of
//! its socket, however that comes about. What is being made is noted on disk first ([`notes`]), so that whatever a power
//! cut or a KMS out of reach leaves behind is retired by the next attach of the volume, or by `sealblk gc`.

pub mod keeper;
pub mod notes;

pub use keeper::Keeper;
pub use notes::Note;

use crate::base::Result;
use crate::base::root::Root;
use crate::catalog::Catalog;
use crate::catalog::lock::{Held, Purpose};
use crate::catalog::metadata::encryption_context;
use crate::kms::patience::Patience;
use crate::kms::{self, Grant, GrantRequest, KeyProvider, KmsError};
use std::time::Duration;

/// How long retiring may be tried: a detach waits for it, and what is left is retired later.
pub const RETIRING: Patience = Patience(Duration::from_secs(5));

/// Retires what a note is about, and removes the note. A grant that is gone already is as good.
///
/// # Errors
/// The KMS's; the note stays then.
pub fn retire(root: &Root, note: &Note) -> Result<()> {
    let patience = notes::patience(root, RETIRING);
    let provider = kms::open_patient_provider(root, &note.provider, Some(patience))?;
    let retired = find(&*provider, note).and_then(|grant| provider.retire_grant(&grant));
    settle(root, note, retired)
}

/// The grant of a note. Where nobody knows whether it was made, the same request again finds it, or makes it.
fn find(provider: &dyn KeyProvider, note: &Note) -> Result<Grant, KmsError> {
    match &note.grant {
        Some(id) => Ok(Grant { key_id: note.key_id.clone(), id: id.clone(), token: None }),
        None => create(provider, note),
    }
}

fn create(provider: &dyn KeyProvider, note: &Note) -> Result<Grant, KmsError> {
    provider.create_grant(&GrantRequest {
        key: &note.key_id,
        grantee: &note.grantee,
        context: &encryption_context(note.volume),
        name: &note.name(),
    })
}

fn settle(root: &Root, note: &Note, retired: Result<(), KmsError>) -> Result<()> {
    match retired {
        Ok(()) | Err(KmsError::NotFound(_)) => notes::remove(root, note),
        Err(e) => Err(e.with_advice_of(&note.provider, &note.key_id)),
    }
}

/// The notes of grants whose attach is over.
///
/// # Errors
/// Those of the file system. A note that cannot be read is logged and left where it is.
pub fn stale(catalog: &Catalog) -> Result<Vec<Note>> {
    // The notes first, then who has the volumes: an attach holds its volume from before it notes until after it has
    // ended, so that whose volume is free by now has ended.
    let mut stale = notes::list(catalog.root())?;
    let mut problem = Ok(());
    stale.retain(|note| match catalog.held(note.volume) {
        Ok(Held::Free) => true,
        Ok(Held::By(holder)) => holder.purpose != Purpose::Attach,
        Ok(Held::Unknown) => false,
        Err(e) => {
            problem = Err(e);
            false
        }
    });
    problem.map(|()| stale)
}
