//! What the confined host process reaches in the file system, from the moment in which it
//! is ready to its end.
//!
//! | path | what for | may |
//! |---|---|---|
//! | `volumes/vol-…/` | `volume.json` is read and replaced, the control socket's name removed | own |
//! | `layers/<uuid>.img`, the top | each queue opens it again when its ring starts | write, or read if attached read-only |
//! | `layers/<uuid>.img`, those below | likewise | read |
//! | the folder of the VMM's socket | its name is removed at the end | remove |
//!
//! The audit log and its mark (`audit.jsonl`, `audit-….plain`) are written at the end through descriptors
//! that are open since the first record.
//!
//! A line of this table is a line of [`rules`]. What is not there needs no rule if a descriptor of it came in
//! time, by opening it before or from a control client: Landlock asks at opening. A rule for a whole shared
//! folder, such as `layers/`, would let a taken-over process at every other volume's files; rather let a
//! client pass what it has made.

use crate::catalog::{Catalog, Metadata};
use crate::host::Options;
use crate::sandbox::{Access, Rule};
use std::path::Path;

/// The rules for an attach of the volume of which `metadata` was checked, and whose socket is at
/// `socket`, if it has a name. The file is not read again: who has the volume until a hand-over
/// could have changed it since.
pub(super) fn rules(
    catalog: &Catalog,
    metadata: &Metadata,
    options: &Options,
    socket: Option<&Path>,
) -> Vec<Rule> {
    let mut rules = vec![Rule::new(catalog.folder(metadata.id()), Access::Own)];
    rules.extend(metadata.layers().iter().enumerate().map(|(number, layer)| {
        let frozen = options.read_only || number > 0;
        Rule::new(catalog.layer_path(layer.id), if frozen { Access::Read } else { Access::Write })
    }));
    // Landlock knows no single names: a folder of its own for each socket is best.
    rules.extend(socket.and_then(Path::parent).map(|folder| Rule::new(folder, Access::Remove)));
    rules
}
