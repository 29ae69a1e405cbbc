//! Re-keying a volume.

use crate::base::{Context, Result};
use crate::catalog::freeze::{Freeze, Maker};
use crate::catalog::layer_file::make_layer;
use crate::catalog::lock::Purpose;
use crate::catalog::metadata::KeyOwner;
use crate::catalog::rekey::{NewKey, check_encrypted};
use crate::catalog::{Catalog, Metadata, VolumeId};
use crate::kms::Failure;
use crate::volume::open::{Taken, Unwrap};

/// Gives a volume that nobody has attached another data key: a new top layer under it, and all below marked to be copied
/// up. Answers what is known of the volume then.
///
/// # Errors
/// `Busy`, naming the process that has it; `Usage` for a volume without encryption; `Corrupt` for one that an attach would
/// refuse; the KMS's; those of the file system.
pub fn rekey(catalog: &Catalog, id: VolumeId, key: NewKey, unwrap: Unwrap<'_>) -> Result<Metadata, Failure> {
    let Taken { lock, opened } = &mut Taken::take(catalog, id, Purpose::Hydrate, unwrap)?;
    let (metadata, top) = (&mut opened.metadata, opened.layers[0].store.file());
    check_encrypted(metadata)?;
    let dek = unwrap(KeyOwner::Volume(id), &key.0)?;
    let seal_key = dek.seal_key(&id.to_string())?;
    let freeze = Freeze::begin(catalog, lock, metadata, Maker::Command)?;
    let path = catalog.layer_path(freeze.new_top().id);
    let ready = make_layer(&path, freeze.new_top().size, false)
        .and_then(|()| top.sync_data().context(|| "sync the top layer"));
    if let Err(e) = ready {
        freeze.cancel(catalog, lock);
        return Err(e.into());
    }
    freeze.commit_rekeyed(catalog, lock, metadata, key.checked(&dek), &seal_key)?;
    catalog.mark_frozen(&metadata.layers()[1..]);
    Ok(metadata.clone())
}
