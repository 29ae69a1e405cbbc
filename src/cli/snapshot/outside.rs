//! `sealblk snapshot push`, `pull`, `verify` and `remove`, and `snapshot list` of a place.
#![forbid(unsafe_code)]

use super::description;
use crate::base::plural::counted;
use crate::base::{Error, Kind, Result, size};
use crate::catalog::snapshot::Snapshot;
use crate::catalog::{SnapshotId, VolumeId};
use crate::cli::budget::SpaceArgs;
use crate::cli::place::{KeepArgs, LimitArgs, PlaceArgs};
use crate::cli::progress::Progress;
use crate::cli::slots::key_json;
use crate::cli::{Env, output};
use crate::ops::backup::complete::{self, Of};
use crate::ops::backup::list::{self, Said};
use crate::ops::backup::pull::{self, Ahead, Wanted};
use crate::ops::backup::push;
use crate::ops::backup::remove::{self, What};
use crate::ops::backup::verify::{self, One};
use serde_json::{Value, json};

/// What `snapshot push` takes.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sealblk snapshot push snap-0a1b file:///mnt/backup
  sealblk snapshot push nightly s3://bucket/prefix --limit 20MiB
  sealblk snapshot push nightly s3://bucket --endpoint https://s3.example:9000

The place gets ciphertext, as it lies here, and the wrapped data keys: nothing is decrypted, and whoever has the place has
no key. The snapshot is there when everything is there. What the place has already does not travel: of an earlier snapshot
of the same volume that is there and still here, only what has changed since is read and sent. Interrupted, the same command
goes on. The volume may be attached meanwhile.

The KMS is asked to unwrap the data key, by which the objects in the place are named and proved. What restores the snapshot
is the place and that KMS: the embedded KMS's own store and root key are not pushed. See docs/backup.md.

A folder must be there: it is not made, so that nothing is written where a medium is not mounted. Prints the snapshot's URL.")]
pub struct PushArgs {
    /// The snapshot: its id, the first digits of its id, or its tag Name.
    snapshot: String,
    /// The place: file:///FOLDER, s3://BUCKET/PREFIX, az:// or gs://.
    place: String,
    #[command(flatten)]
    how: PlaceArgs,
    #[command(flatten)]
    limit: LimitArgs,
}

/// What `snapshot pull` takes.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sealblk snapshot pull file:///mnt/backup/snap-0123456789abcdef0
  sealblk snapshot pull s3://bucket/prefix/snap-0123456789abcdef0 --name restored --key alias/here
  sealblk volume create --snapshot restored --name db
  sealblk snapshot pull s3://bucket/prefix/snap-0123456789abcdef0 --lazy --limit 50MiB

What comes is proved, block by block, before it is written: what is not as somebody wrote it who had the data key is
refused, and nothing is left of it. The snapshot is another one here, with an id of its own, for which the KMS wraps the data
keys anew: the KMS that wraps them in the place has to be reached from here, and to let this host use the key. --key has another
key of the same KMS wrap them from then on, or a key of another KMS that takes data keys.

With --lazy it is there at once, and a volume made of it can be attached at once, and be snapshotted and cloned. Blocks come as
guests read them, each proved before it is used, and all others behind that; \"snapshot complete\" has them come now. Until
everything is there, the place is needed, and commands that read all of the snapshot (push, copy, export) refuse.

Interrupted, the same command goes on with what there is, until \"sealblk gc\" clears that away. Prints the new snapshot's
id.")]
pub struct PullArgs {
    /// The place, and the snapshot in it: URL/snap-…; of a place with one snapshot, the place is enough.
    place: String,
    /// A name, the same as a tag Name: to be used in place of the id while no other snapshot has it.
    #[arg(long)]
    name: Option<String>,
    /// The KMS key that wraps the data keys from now on, by id, ARN or alias [default: the one that
    /// wraps them in the place].
    #[arg(long, value_name = "KEYREF")]
    key: Option<String>,
    /// Have the snapshot at once: what it holds comes when it is read, by volumes made of it that are
    /// attached, and behind that, at no more than --limit.
    #[arg(long)]
    lazy: bool,
    #[command(flatten)]
    how: PlaceArgs,
    #[command(flatten)]
    limit: LimitArgs,
    #[command(flatten)]
    space: SpaceArgs,
}

/// What `snapshot complete` takes.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sealblk snapshot complete restored
  sealblk snapshot complete vol-0a1b

What is still to come of a snapshot that was pulled with --lazy comes now; what is there is proved once more. Volumes that are
made of it may be attached meanwhile. A place that is away is not waited for. Interrupted, the same command goes on. When it
has ended, the place is not needed any more.")]
pub struct CompleteArgs {
    /// The snapshot: its id, the first digits of its id, or its tag Name; or a volume that was made of it.
    #[arg(value_name = "SNAPSHOT")]
    reference: String,
    #[command(flatten)]
    limit: LimitArgs,
}

/// What `snapshot verify` takes.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sealblk snapshot verify file:///mnt/backup
  sealblk snapshot verify s3://bucket/prefix/snap-0123456789abcdef0

Everything is read back: each manifest is proved by its MAC, and each page and block by its name, under keys that follow from
the data key, which the KMS is asked to unwrap. Nothing is decrypted. A manifest that is older than what this host has seen
there, one that was written for another place, and a snapshot that is not listed any more are found as well. The exit code is
7 if anything is wrong.")]
pub struct VerifyArgs {
    /// The place, or one snapshot in it: URL/snap-….
    place: String,
    #[command(flatten)]
    how: PlaceArgs,
    #[command(flatten)]
    limit: LimitArgs,
}

/// What `snapshot remove` takes.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sealblk snapshot remove file:///mnt/backup/snap-0123456789abcdef0
  sealblk snapshot remove s3://bucket/prefix --keep-daily 7 --keep-weekly 4 --keep-monthly 12 --dry-run
  sealblk snapshot remove s3://bucket/prefix

The snapshots are gone first; then goes what no snapshot needs any more. Without snapshots and --keep options, only that.
While some host pushes to the place, nothing is swept, and the next removal makes up for it; a push that was cut off counts
for a day. No KMS is asked.

With --keep options, the snapshots of each volume are looked at for themselves: of the last so many days (weeks, months,
years) that have one, the newest stays, and the last so many stay; the others go. Times are UTC. Snapshots of this store stay
as they are: \"snapshot delete\" deletes those.")]
pub struct RemoveArgs {
    /// The place, or one snapshot in it: URL/snap-….
    place: String,
    /// Snapshots that go, by their ids.
    #[arg(value_name = "SNAPSHOT")]
    snapshots: Vec<SnapshotId>,
    #[command(flatten)]
    keep: KeepArgs,
    /// With --keep options: only of this volume, by its id.
    #[arg(long, value_name = "VOLUME")]
    volume: Option<VolumeId>,
    /// Only say what would be removed.
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    how: PlaceArgs,
}

/// Pushes a snapshot.
pub(super) fn push(env: &Env, args: &PushArgs) -> Result<()> {
    let instead = "leave that out: the snapshot keeps its own";
    let target = args.how.whole_target(&args.place, args.limit.rate(), instead)?;
    let (store, catalog) = (env.store()?, env.catalog());
    let id = catalog.resolve_snapshot(&args.snapshot)?;
    let mut progress = Progress::new()?;
    let pushed =
        push::push(&store, id, &target, &mut |done, total| progress.at(done, total).map_err(goes_on))?;
    drop(progress);
    if env.json {
        return output::print_json(&json!({
            "snapshot": pushed.snapshot,
            "url": pushed.url,
            "blocks": pushed.blocks,
            "put_blocks": pushed.put_blocks,
            "put_bytes": pushed.put_bytes,
            "base": pushed.base,
            "was_there": pushed.was_there,
        }));
    }
    output::tell(&match (pushed.was_there, pushed.base) {
        (true, _) => format!("{id} was there already"),
        (false, None) => format!("{id}: {} sent", size::about(pushed.put_bytes)),
        (false, Some(base)) => {
            format!("{id}: {} sent, what has changed since {base}", size::about(pushed.put_bytes))
        }
    });
    output::print(&format!("{}\n", pushed.url)).map(drop)
}

/// What one is told whose push or pull was interrupted by a signal.
fn goes_on(e: Error) -> Error {
    e.reworded("it was interrupted; the same command goes on where it came to")
}

/// Pulls a snapshot.
pub(super) fn pull(env: &Env, args: &PullArgs) -> Result<()> {
    let (target, named) = args.how.target(&args.place, args.limit.rate())?;
    let store = env.store()?;
    let wanted = Wanted {
        ahead: Ahead::No,
        key: args.key.clone(),
        name: args.name.clone(),
        tags: Vec::new(),
        budget: args.space.budget(&store),
        lazy: args.lazy,
    };
    let mut progress = Progress::new()?;
    let watch = &mut |done, total| progress.at(done, total).map_err(goes_on);
    let pulled = pull::pull(&store, named, &target, &wanted, watch)?;
    drop(progress);
    match env.json {
        true => output::print_json(&description(&env.catalog(), &pulled)),
        false => output::print(&format!("{}\n", pulled.id())).map(drop),
    }
}

/// Completes a snapshot, or the layers of a volume.
pub(super) fn complete(env: &Env, args: &CompleteArgs) -> Result<()> {
    let (store, catalog) = (env.store()?, env.catalog());
    let of = match catalog.resolve_snapshot(&args.reference) {
        Ok(id) => Of::Snapshot(id),
        Err(e) if e.kind() == Kind::NotFound => match catalog.resolve(&args.reference) {
            Ok(id) => Of::Volume(id),
            Err(other) if other.kind() == Kind::NotFound => return Err(e),
            Err(other) => return Err(other),
        },
        Err(e) => return Err(e),
    };
    let id = match of {
        Of::Snapshot(id) => id.to_string(),
        Of::Volume(id) => id.to_string(),
    };
    let mut progress = Progress::new()?;
    let watch = &mut |done, total| progress.at(done, total).map_err(goes_on);
    let done = complete::complete(&store, of, args.limit.rate(), watch)?;
    drop(progress);
    if env.json {
        return output::print_json(&json!({"id": id, "was_complete": !done}));
    }
    output::tell(&match done {
        true => format!("{id} is complete: its place is not needed any more"),
        false => format!("{id} was complete already"),
    });
    Ok(())
}

/// Verifies a place.
pub(super) fn verify(env: &Env, args: &VerifyArgs) -> Result<()> {
    let (target, named) = args.how.target(&args.place, args.limit.rate())?;
    let mut progress = Progress::new()?;
    let ended = |e: Error| e.reworded("it was interrupted");
    let watch = &mut |done, total| progress.at(done, total).map_err(ended);
    let verified = verify::verify(&env.store()?, named, &target, watch)?;
    drop(progress);
    if env.json {
        let of =
            |one: &One| json!({"id": one.id, "blocks": one.blocks, "problem": problem(one.problem.as_ref())});
        output::print_json(&json!({
            "url": target.url.to_string(),
            "snapshots": verified.snapshots.iter().map(of).collect::<Vec<Value>>(),
            "missing": verified.missing,
        }))?;
    } else {
        let mut rows = vec![["SNAPSHOT", "BLOCKS", "STATE"].map(String::from).to_vec()];
        for one in &verified.snapshots {
            let state = one.problem.as_ref().map_or("good".to_owned(), ToString::to_string);
            rows.push(vec![one.id.to_string(), one.blocks.to_string(), state]);
        }
        rows.extend(verified.missing.iter().map(|id| vec![id.to_string(), "-".into(), "missing".into()]));
        output::print(&output::table(&rows))?;
    }
    match verified.problem() {
        None => Ok(()),
        Some(e) => Err(e.context(format!("verify {}", target.url))),
    }
}

/// Removes snapshots from a place.
pub(super) fn remove(env: &Env, args: &RemoveArgs) -> Result<()> {
    let (target, named) = args.how.target(&args.place, 0)?;
    let keep = args.keep.keep();
    let named: Vec<SnapshotId> = named.into_iter().chain(args.snapshots.iter().copied()).collect();
    let usage = |message: &str| Err(Error::new(Kind::Usage, message));
    if keep.is_some() && !named.is_empty() {
        return usage("say which snapshots go, or how many are kept, and not both");
    }
    if args.volume.is_some() && keep.is_none() {
        return usage("--volume goes with --keep options: say how many of its snapshots are kept");
    }
    let what = What { named, keep, volume: args.volume, store: None, dry_run: args.dry_run };
    let removed = remove::remove(&env.store()?, &target, &what)?;
    if env.json {
        return output::print_json(&json!({
            "url": target.url.to_string(),
            "dry_run": args.dry_run,
            "removed": removed.removed,
            "gone": removed.gone,
            "kept": removed.kept,
            "swept_objects": removed.swept,
        }));
    }
    let word = if args.dry_run { "would be removed" } else { "removed" };
    let mut text: String = removed.removed.iter().map(|id| format!("{id}  {word}\n")).collect();
    text.extend(removed.gone.iter().map(|id| format!("{id}  was not there any more\n")));
    output::print(&text)?;
    match (args.dry_run, removed.swept) {
        (true, _) => {}
        (false, Some(0)) => output::tell("there was nothing that no snapshot needs"),
        (false, Some(count)) => {
            let objects = counted(count, "object", "objects");
            output::tell(&format!("{objects} that no snapshot needs any more removed"));
        }
        (false, None) => output::tell(
            "some host is pushing to the place, or was cut off in it less than a day ago: what no snapshot \
             needs any more stays until the next removal",
        ),
    }
    Ok(())
}

/// Lists the snapshots of a place.
pub(super) fn list(env: &Env, place: &str, how: &PlaceArgs) -> Result<()> {
    let (target, named) = how.target(place, 0)?;
    let listed = list::list(&env.store()?, &target)?;
    let wanted = |id: SnapshotId| named.is_none_or(|named| named == id);
    let entries = listed.snapshots.iter().filter(|entry| wanted(entry.id));
    let missing: Vec<SnapshotId> = listed.missing.iter().copied().filter(|id| wanted(*id)).collect();
    if env.json {
        let values = entries.map(|entry| match &entry.said {
            Ok(said) => said_json(said),
            Err(e) => json!({"id": entry.id, "state": "damaged", "problem": problem(Some(e))}),
        });
        let snapshots: Vec<Value> = values.collect();
        return output::print_json(&json!({
            "url": target.url.to_string(),
            "snapshots": snapshots,
            "missing": missing,
        }));
    }
    let head = ["ID", "NAME", "VOLUME", "SIZE", "DATA", "STATE", "CREATED"].map(String::from);
    let mut rows = vec![head.to_vec()];
    let none = || "-".to_owned();
    for entry in entries {
        rows.push(match &entry.said {
            Ok(said) => row(said),
            Err(e) => {
                log::warn!("{e}");
                vec![entry.id.to_string(), none(), none(), none(), none(), "damaged".into(), none()]
            }
        });
    }
    let missing = missing.iter().map(|id| {
        log::warn!(
            "{id}, which this host has seen there, is not listed: another host has removed it, or it \
                    is hidden"
        );
        vec![id.to_string(), none(), none(), none(), none(), "missing".into(), none()]
    });
    rows.extend(missing);
    output::print(&output::table(&rows)).map(drop)
}

fn state(said: &Said) -> &'static str {
    if said.is_known { "known" } else { "claimed" }
}

fn name_of(snapshot: &Snapshot) -> Option<&str> {
    snapshot.label().tags.get("Name")
}

fn row(said: &Said) -> Vec<String> {
    let snapshot = &said.snapshot;
    vec![
        snapshot.id().to_string(),
        name_of(snapshot).unwrap_or("-").to_owned(),
        snapshot.volume().to_string(),
        size::human(snapshot.geometry().size()),
        size::about(said.blocks.saturating_mul(512 << 10)),
        state(said).to_owned(),
        snapshot.created().to_string(),
    ]
}

fn said_json(said: &Said) -> Value {
    let snapshot = &said.snapshot;
    let keys: Vec<Value> = snapshot.keys().iter().map(key_json).collect();
    json!({
        "id": snapshot.id(),
        "description": snapshot.label().description,
        "volume_id": snapshot.volume(),
        "size": snapshot.geometry().size(),
        "sector_size": snapshot.geometry().sector_size(),
        "created": snapshot.created(),
        "tags": snapshot.label().tags,
        "keys": keys,
        "blocks": said.blocks,
        "state": state(said),
    })
}

fn problem(e: Option<&Error>) -> Value {
    e.map_or(Value::Null, |e| json!({"kind": e.kind().name(), "message": e.to_string()}))
}
