//! What the confined host process reaches in the file system, from the moment in which it
//! is ready to its end.
//!
//! | path | what for | may |
//! |---|---|---|
//! | `volumes/vol-…/` | `volume.json` is read and replaced, the control socket's name removed | own |
//! | `layers/<uuid>.img`, the top | each queue opens it again when its ring starts | write, or read if attached read-only |
//! | `layers/<uuid>.img`, those below; or `<uuid>.coming` | likewise | read |
//! | the block device of a layer that lies on one | likewise; the top's header is written | as of a file |
//! | `layers/<uuid>.device` | says which device that is; of a layer behind an NBD server, it is all there is | read |
//! | the folder of the VMM's socket, unless the store or its keys lie below | its name is removed at the end | remove |
//!
//! The audit log and its mark (`audit.jsonl`, `audit-….plain`) are written at the end through descriptors
//! that are open since the first record. `spare`, which gives its space to records on a full disk, is open
//! since the process began.
//!
//! Of a store in a pool, the process has its socket to the one that reaches the pool, and that one lets it
//! change the records of this volume alone.
//!
//! A line of this table is a line of [`rules`]. What is not there needs no rule if a descriptor of it came in
//! time, by opening it before or from a control client: Landlock asks at opening. A rule for a whole shared
//! folder, such as `layers/`, would let a taken-over process at every other volume's files; rather let a
//! client pass what it has made.

use crate::base::Result;
use crate::base::root::{Root, files};
use crate::catalog::{Catalog, Metadata};
use crate::host::Options;
use crate::sandbox::{Access, Rule};
use std::path::Path;

/// The rules for an attach of the volume of which `metadata` was checked, and whose socket's name is removed
/// at the end in the folder `removable`, if it may be ([`socket_folder`]). The file is not read again: who
/// has the volume until a hand-over could have changed it since.
pub(super) fn rules(
    catalog: &Catalog,
    metadata: &Metadata,
    options: &Options,
    removable: Option<&Path>,
) -> Result<Vec<Rule>> {
    let folder = catalog.folder(metadata.id());
    // The folder's rule would do. By this one it is found out whether the user can read the file.
    // In a pool it is no file: whoever reaches that is told what this process may see.
    let path = folder.join(crate::catalog::FILE);
    let record = (!files::is_record(&path)).then(|| Rule::new(path, Access::Read));
    let mut rules = vec![Rule::new(folder, Access::Own)];
    rules.extend(record);
    for (number, layer) in metadata.layers().iter().enumerate() {
        let frozen = options.read_only || number > 0;
        // Under another name as well, later, it is the same file.
        let (place, _) = catalog.place_or_coming(layer)?;
        // What says where an export is is no layer.
        let access = if frozen || place.behind.is_some() { Access::Read } else { Access::Write };
        rules.push(Rule::new(place.path, access));
        if place.on_device.is_some() {
            rules.push(Rule::new(catalog.device_file(layer.id), Access::Read));
        }
    }
    rules.extend(removable.map(|folder| Rule::new(folder, Access::Remove)));
    Ok(rules)
}

/// The folder of the VMM's socket, if the socket's name may be removed there at the end. Landlock knows no
/// single names: whoever may remove this one may remove every file in the folder and below it. So it is not
/// one that other volumes, or the root key, lie below; a folder of its own for each socket is best.
pub(super) fn socket_folder<'a>(
    catalog: &Catalog,
    metadata: &Metadata,
    socket: Option<&'a Path>,
) -> Option<&'a Path> {
    let folder = socket?.parent()?;
    let real = folder.canonicalize().ok()?;
    let of_store = [Some(catalog.root().path().to_owned()), Root::config_dir().ok()];
    let holds_more = of_store.into_iter().flatten().any(|guarded| {
        let guarded = guarded.canonicalize().unwrap_or(guarded);
        guarded.starts_with(&real) || real.starts_with(&guarded)
    });
    (!holds_more || real.starts_with(catalog.folder(metadata.id()))).then_some(folder)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::VolumeId;
    use crate::catalog::metadata::Geometry;

    #[test]
    fn nothing_is_removed_below_a_folder_that_holds_more_than_the_socket() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().canonicalize().unwrap();
        let metadata = Metadata::new(
            VolumeId::random(),
            None,
            Geometry::new(1 << 20, Default::default()).unwrap(),
            None,
        );
        let catalog = Catalog::new(&Root::new(top.join("store")));
        let own = catalog.folder(metadata.id());
        let folders =
            ["store/layers", "run", "store/volumes/vol-00000000000000000"].map(|name| top.join(name));
        for folder in folders.iter().chain([&own]) {
            std::fs::create_dir_all(folder).unwrap();
        }
        std::os::unix::fs::symlink(&top, top.join("run/link")).unwrap();
        let may = |folder: &Path| socket_folder(&catalog, &metadata, Some(&folder.join("x.sock"))).is_some();
        for no in [&top, &top.join("store"), &folders[0], &folders[2], &top.join("run/link"), Path::new("/")]
        {
            assert!(!may(no), "{}", no.display());
        }
        assert!(may(&folders[1]) && may(&own));
        assert_eq!(socket_folder(&catalog, &metadata, None), None);
    }
}
