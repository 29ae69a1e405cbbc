//! `sealblk volume rewrap` and `sealblk snapshot rewrap`: the same data key, wrapped by another KMS key.

use crate::base::plural::counted;
use crate::base::{Error, Result};
use crate::catalog::snapshot;
use crate::catalog::{self, SnapshotId};
use crate::cli::{Env, output};
use crate::ops::Store;
use crate::ops::rewrap::{self, Change, Wish};
use clap::Args;
use serde_json::{Value, json};
use std::fmt::Display;

/// What `volume rewrap` takes.
#[derive(Args)]
#[command(after_help = "\
Examples:
  sealblk volume rewrap db --key alias/new    afterwards the old KMS key may be disabled
  sealblk volume rewrap db                    by the newest version of the same KMS key
  sealblk volume rewrap --all --from alias/old --key alias/new

Data is not touched, and it works while the volume is attached. The new wrapped key takes the old one's place
once it has proved to unwrap to the same data key. Copies of the records elsewhere still hold the old one.")]
pub struct RewrapArgs {
    /// The volume: its id, the first digits of its id, or its name.
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    volume: Option<String>,
    /// All encrypted volumes and snapshots of the store.
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    keys: Keys,
}

/// What `snapshot rewrap` takes.
#[derive(Args)]
#[command(after_help = "\
Examples:
  sealblk snapshot rewrap snap-0a1b --key alias/new    afterwards the old KMS key may be disabled
  sealblk volume rewrap --all --from alias/old --key alias/new    all volumes and snapshots

Data is not touched. Volumes that were made from the snapshot have wrapped keys of their own.")]
pub struct RewrapSnapshotArgs {
    /// The snapshot: its id, the first digits of its id, or its tag Name.
    snapshot: String,
    #[command(flatten)]
    keys: Keys,
}

/// From which KMS key to which.
#[derive(Args)]
struct Keys {
    /// The KMS key to wrap by, by id, ARN or alias [default: the one that wraps it now].
    #[arg(long, value_name = "KEYREF")]
    key: Option<String>,
    /// Only the data keys that this KMS key wraps.
    #[arg(long, value_name = "KEYREF")]
    from: Option<String>,
}

impl Keys {
    fn wish(&self, store: &Store) -> Result<Wish> {
        Wish::new(store, self.key.as_deref(), self.from.as_deref())
    }
}

/// Wraps the data keys of one volume, or of everything.
pub(super) fn volume(env: &Env, args: &RewrapArgs) -> Result<()> {
    let store = env.store()?;
    let wish = args.keys.wish(&store)?;
    match &args.volume {
        Some(reference) => {
            let id = store.catalog().resolve(reference)?;
            print(env, id, &rewrap::rewrap(&store, id, &wish)?)
        }
        None => all(env, &store, &wish),
    }
}

/// Wraps the data keys of one snapshot.
pub(super) fn snapshot(env: &Env, args: &RewrapSnapshotArgs) -> Result<()> {
    let store = env.store()?;
    let wish = args.keys.wish(&store)?;
    let id: SnapshotId = store.catalog().resolve_snapshot(&args.snapshot)?;
    print(env, id, &rewrap::rewrap_snapshot(&store, id, &wish)?)
}

/// What came of a volume or a snapshot; none: it was not concerned.
type Outcome = (String, Option<Result<Vec<Change>>>);

/// One that fails does not keep the others from theirs.
fn all(env: &Env, store: &Store, wish: &Wish) -> Result<()> {
    let catalog = store.catalog();
    let volume = |entry: catalog::Entry| -> Outcome {
        let id = entry.id;
        let done = entry.metadata.map(|it| wish.concerns(it.keys()).then(|| rewrap::rewrap(store, id, wish)));
        (id.to_string(), done.unwrap_or_else(|e| Some(Err(e))))
    };
    let snapshot = |entry: snapshot::Entry| -> Outcome {
        let id = entry.id;
        let rewrap = || rewrap::rewrap_snapshot(store, id, wish);
        let done = entry.snapshot.map(|it| wish.concerns(it.keys()).then(rewrap));
        (id.to_string(), done.unwrap_or_else(|e| Some(Err(e))))
    };
    let outcomes = catalog.list()?.into_iter().map(volume);
    let outcomes = outcomes.chain(catalog.snapshots()?.into_iter().map(snapshot));
    let (mut values, mut failed): (Vec<Value>, Vec<Error>) = Default::default();
    let mut done = 0;
    for (id, outcome) in outcomes {
        match outcome {
            None => {}
            Some(Ok(changes)) => {
                done += 1;
                values.push(json!({"id": id, "rewrapped": changes}));
                if !env.json {
                    output::print(&text(&id, &changes))?;
                }
            }
            Some(Err(e)) => {
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
    let message = format!(
        "{} done, {} not: {}",
        counted(done, "volume or snapshot", "volumes and snapshots"),
        failed.len(),
        rest.join("; ")
    );
    Err(Error::new(first.kind(), message))
}

fn print(env: &Env, id: impl Display, changes: &[Change]) -> Result<()> {
    let id = id.to_string();
    match env.json {
        true => output::print_json(&json!({"id": id, "rewrapped": changes})),
        false => output::print(&text(&id, changes)).map(drop),
    }
}

fn text(id: &str, changes: &[Change]) -> String {
    let line = |c: &Change| format!("{id}: data key {} is wrapped by {} (was {})\n", c.key, c.to, c.from);
    changes.iter().map(line).collect()
}
