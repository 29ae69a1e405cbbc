//! Grants of attached volumes: each attach has its own, good for its volume's context alone, and ends it.
//!
//! The [`keeper`] process makes the grant before the key is unwrapped and retires it when the host process
//! lets go of its socket, however that comes about. What is being made is noted on disk first ([`notes`]),
//! so that whatever a power cut or a KMS out of reach leaves behind is retired by the next attach of the
//! volume, or by `sealblk gc`.
//!
//! A grant is only ever made for the attach that is under way, for the principal that the settings name. The
//! notes lie beside the KMS's root key: whoever can write the store, which lies with the ciphertext, could
//! otherwise have a grant made for himself, or another one's retired.

pub mod keeper;
pub mod notes;

pub use keeper::{Granting, Keeper};
pub use notes::{Note, Notes};

use crate::base::hardened::harden;
use crate::base::root::Root;
use crate::base::{Error, Kind, Result, Timestamp};
use crate::catalog::Catalog;
use crate::catalog::lock::{Held, Purpose};
use crate::catalog::metadata::encryption_context;
use crate::kms::patience::Patience;
use crate::kms::{self, Grant, GrantRequest, KeyProvider, KmsError, ListedGrant};
use std::time::Duration;

/// How long retiring may be tried: a detach waits for it, and what is left is retired later.
pub const RETIRING: Patience = Patience(Duration::from_secs(5));

/// How long a grant may take until the whole KMS knows it: AWS speaks of five minutes.
const SETTLING: Duration = Duration::from_secs(10 * 60);

/// Retires what a note is about, and removes the note. A grant that is gone already is as good.
///
/// # Errors
/// The KMS's; `Busy` for a grant that the KMS does not know and may know in a few minutes.
/// The note stays then.
pub fn retire(root: &Root, note: &Note) -> Result<()> {
    let patience = notes::patience(root, RETIRING);
    let provider = kms::open_patient_provider(harden()?, root, &note.provider, Some(patience))?;
    let retired = match find(&*provider, note) {
        Ok(Some(grant)) => provider.retire_grant(&grant),
        Ok(None) if note.since > Timestamp::ago(SETTLING) => {
            let message =
                "the KMS knows no such grant, and may know it in a few minutes; \"sealblk gc\" asks again";
            return Err(Error::new(Kind::Busy, message));
        }
        Ok(None) => Ok(()),
        Err(e) => Err(e),
    };
    settle(root, note, retired)
}

/// The grant of a note. Where nobody knows whether it was made, the KMS is asked: a grant
/// is never made to find it.
fn find(provider: &dyn KeyProvider, note: &Note) -> Result<Option<Grant>, KmsError> {
    let grant = |id: String| Grant { key_id: note.key_id.clone(), id, token: None };
    if let Some(id) = &note.grant {
        return Ok(Some(grant(id.clone())));
    }
    let is_it = |listed: &ListedGrant| listed.name.as_deref() == Some(&note.name());
    let mut listed = provider.grants_for(&note.key_id, &note.grantee)?.into_iter();
    Ok(listed.find(is_it).map(|listed| grant(listed.id)))
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
        Ok(()) | Err(KmsError::NotFound(_)) => Notes::of(root)?.remove(note),
        Err(e) => Err(e.with_advice_of(&note.provider, &note.key_id)),
    }
}

/// The notes of grants whose attach is over.
///
/// # Errors
/// Those of the file system. A note that cannot be read is logged and left where it is.
pub fn stale(catalog: &Catalog) -> Result<Vec<Note>> {
    // The notes first, then who has the volumes: an attach holds its volume from before it notes until after
    // it has ended, so that whose volume is free by now has ended.
    let mut stale = Notes::of(catalog.root())?.list()?;
    let mut problem = Ok(());
    stale.retain(|note| match catalog.held(note.volume) {
        Ok(Held::Free) => true,
        // A grant of this host's is no other host's.
        Ok(Held::Elsewhere(_)) => true,
        Ok(Held::By(holder)) => holder.purpose != Purpose::Attach,
        Ok(Held::Unknown) => false,
        Err(e) => {
            problem = Err(e);
            false
        }
    });
    problem.map(|()| stale)
}
