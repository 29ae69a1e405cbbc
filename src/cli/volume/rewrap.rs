//! `sealblk volume rewrap`: the same data key, wrapped by another KMS key.

use crate::base::{Error, Result};
use crate::catalog::{Entry, VolumeId};
use crate::cli::{Env, output};
use crate::ops::Store;
use crate::ops::rewrap::{self, Change, Wish};
use clap::Args;
use serde_json::{Value, json};

/// What `volume rewrap` takes.
#[derive(Args)]
#[command(after_help = "\
Examples:
  sealblk volume rewrap db --key alias/new    afterwards the old KMS key may be disabled
  sealblk volume rewrap db                    by the newest version of the same KMS key
  sealblk volume rewrap --all --from alias/old --key alias/new

Data is not touched, and it works while the volume is attached. The new wrapped key takes the old one's place once it has
proved to unwrap to the same data key. Copies of volume.json elsewhere still hold the old one.")]
pub struct RewrapArgs {
    /// The volume: its id, the first digits of its id, or its name.
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    volume: Option<String>,
    /// The KMS key to wrap by, by id, ARN or alias [default: the one that wraps it now].
    #[arg(long, value_name = "KEYREF")]
    key: Option<String>,
    /// All encrypted volumes of the store.
    #[arg(long)]
    all: bool,
    /// Only the data keys that this KMS key wraps.
    #[arg(long, value_name = "KEYREF")]
    from: Option<String>,
}

/// Wraps the data keys of one volume, or of all.
pub(super) fn run(env: &Env, args: &RewrapArgs) -> Result<()> {
    let store = env.store()?;
    let wish = Wish::new(&store, args.key.as_deref(), args.from.as_deref())?;
    match &args.volume {
        Some(reference) => one(env, &store, &wish, reference),
        None => all(env, &store, &wish),
    }
}

fn one(env: &Env, store: &Store, wish: &Wish, reference: &str) -> Result<()> {
    let id = store.catalog().resolve(reference)?;
    let changes = rewrap::rewrap(store, id, wish)?;
    match env.json {
        true => output::print_json(&json!({"id": id, "rewrapped": changes})),
        false => output::print(&text(id, &changes)).map(drop),
    }
}

/// One volume that fails does not keep the others from theirs.
fn all(env: &Env, store: &Store, wish: &Wish) -> Result<()> {
    let (mut values, mut failed): (Vec<Value>, Vec<Error>) = Default::default();
    let entries = store.catalog().list()?;
    let mut done = 0;
    for Entry { id, metadata, .. } in entries {
        let result = match metadata {
            Ok(metadata) if !wish.concerns(&metadata) => continue,
            Ok(_) => rewrap::rewrap(store, id, wish),
            Err(e) => Err(e),
        };
        match result {
            Ok(changes) => {
                done += 1;
                values.push(json!({"id": id, "rewrapped": changes}));
                if !env.json {
                    output::print(&text(id, &changes))?;
                }
            }
            Err(e) => {
                values.push(json!({"id": id, "error": {"kind": e.kind().name(), "message": e.to_string()}}));
                failed.push(e);
            }
        }
    }
    if env.json {
        output::print_json(&values)?;
    }
    let Some(first) = failed.first() else { return Ok(()) };
    let rest: Vec<String> = failed.iter().map(ToString::to_string).collect();
    let message = format!("{done} volumes done, {} not: {}", failed.len(), rest.join("; "));
    Err(Error::new(first.kind(), message))
}

fn text(id: VolumeId, changes: &[Change]) -> String {
    let line = |c: &Change| format!("{id}: data key {} is wrapped by {} (was {})\n", c.slot, c.to, c.from);
    changes.iter().map(line).collect()
}
