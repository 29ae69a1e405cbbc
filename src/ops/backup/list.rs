//! Which snapshots a place has, as the place says: nothing is proved, and no KMS is asked.

use super::{For, Session, Target, mark_of};
use crate::backup::marks::Standing;
use crate::base::Result;
use crate::catalog::SnapshotId;
use crate::catalog::snapshot::Snapshot;
use crate::ops::Store;

/// The snapshots of a place.
pub struct Listed {
    /// Those that the place lists, sorted.
    pub snapshots: Vec<Entry>,
    /// Those that this host has seen there, and that the place does not list.
    pub missing: Vec<SnapshotId>,
}

/// One snapshot, as its manifest says.
pub struct Entry {
    /// Its id.
    pub id: SnapshotId,
    /// What is said of it, or why that cannot be read or is not believed.
    pub said: Result<Said>,
}

/// What a manifest says, whoever wrote it.
pub struct Said {
    /// The snapshot, with one layer for each data key.
    pub snapshot: Snapshot,
    /// How many blocks of 512 KiB it has.
    pub blocks: u64,
    /// Whether this very manifest is the newest that this host has seen of this snapshot there.
    pub is_known: bool,
}

/// Lists the snapshots of a place.
///
/// # Errors
/// Those of reaching the place. What is wrong with a manifest is in what is returned.
pub fn list(store: &Store, target: &Target) -> Result<Listed> {
    let mut session = Session::open(store, target, For::Reading)?;
    let ids = session.snapshots()?;
    let missing = session.marks.all()?.into_iter().filter(|id| !ids.contains(id)).collect();
    let mut snapshots = Vec::new();
    for id in ids {
        let said = session.claim_of_known(id).and_then(|claim| {
            let standing = mark_of(&claim).against(session.marks.known(id)?);
            let said = claim.claimed();
            Ok(Said {
                snapshot: said.snapshot.clone(),
                blocks: said.blocks(),
                is_known: standing == Standing::Newest,
            })
        });
        snapshots.push(Entry { id, said });
    }
    Ok(Listed { snapshots, missing })
}
