//! Giving a volume another name, or none, attached or not.
#![forbid(unsafe_code)]

use super::Store;
use super::make::check_name_is_free;
use super::reach::Reach;
use crate::base::{Context, Result};
use crate::catalog::lock::Purpose;
use crate::catalog::metadata::VolumeName;
use crate::catalog::store_locks::NamesLock;
use crate::catalog::{Metadata, VolumeId};
use crate::host::control;

/// Gives a volume this name, or none. Its id, which everything else goes by, stays.
///
/// # Errors
/// `Busy` if another volume has the name, or another command the volume; those of the file system. The volume
/// has the name that it had then.
pub fn rename(store: &Store, id: VolumeId, name: Option<VolumeName>) -> Result<Metadata> {
    let catalog = store.catalog();
    let attempt = || format!("rename {id}");
    let rename = || {
        // Held until the record says so: of two volumes that are to have one name, one comes second.
        let _names = NamesLock::acquire(&catalog)?;
        check_name_is_free(&catalog, name.as_ref(), Some(id))?;
        if catalog.load(id)?.name() == name.as_ref() {
            return Ok(());
        }
        match Reach::of(&catalog, id, Purpose::Rename)? {
            Reach::Host => control::rename(&catalog, id, name.as_ref()),
            Reach::Mine(lock) => {
                let mut renamed = catalog.load(id)?.renamed(name.clone());
                catalog.save(&lock, &mut renamed)
            }
        }
    };
    rename().context(attempt)?;
    catalog.load(id)
}
