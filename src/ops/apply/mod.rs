//! Making the volumes of a store what a file says they are.
//!
//! What has to be done is planned first, and refused as a whole if a part of it cannot be done.
//! What is missing is made, what is smaller is made larger, tags are set; a volume that the file
//! does not name is left alone.

mod file;
mod plan;

pub use file::{Wanted, parse};
pub use plan::{Change, Plan, Planned};

use super::Store;
use super::need::Budget;
use crate::base::plural::counted;
use crate::base::root::{create_dir_durable, files};
use crate::base::{Context, Result, locks};
use crate::catalog::VolumeId;
use nix::fcntl::{Flock, OFlag};
use std::fs::File;

/// Plans what has to be done and does it, in the file's order. Returns the plan, and the
/// volume of each of its changes. What is going to be copied up may use this `budget`.
///
/// # Errors
/// As [`Plan::make`], and then nothing was done; those of the first change that failed, with
/// how many were made before.
pub fn apply(store: &Store, wanted: &[Wanted], budget: Budget) -> Result<(Plan, Vec<VolumeId>)> {
    // Of two at once, the second finds what the first has done.
    let _lock = lock(store)?;
    let plan = Plan::make(store, wanted)?;
    let mut ids = Vec::new();
    let changes = plan.changes();
    for (done, planned) in changes.iter().enumerate() {
        ids.push(planned.carry_out(store, budget).map_err(|e| match done {
            0 => e.context(&planned.name),
            n => {
                let (all, verb) = (changes.len(), if n == 1 { "is" } else { "are" });
                let all = counted(all, "change", "changes");
                e.context(format!("{n} of {all} {verb} done, then {}", planned.name))
            }
        })?);
    }
    Ok((plan, ids))
}

fn lock(store: &Store) -> Result<Flock<File>> {
    create_dir_durable(store.root().path())?;
    let path = store.root().path().join("apply.lock");
    let attempt = || format!("lock {}", path.display());
    let file = files::open_with(&path, OFlag::O_WRONLY | OFlag::O_CREAT);
    locks::lock_whole(file.context(attempt)?).context(attempt)
}
