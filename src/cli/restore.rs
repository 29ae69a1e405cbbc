//! `sealblk restore`: volumes come back out of the backups that a place has.
#![forbid(unsafe_code)]

use super::backup::error_json;
use crate::base::{Context, Error, Result, Timestamp, size};
use crate::cli::budget::SpaceArgs;
use crate::cli::place::{LimitArgs, PlaceArgs};
use crate::cli::progress::Progress;
use crate::cli::{Env, input, output};
use crate::ops::backup::restore::{self, OneRestored, Restored, WantedRestore};
use serde_json::{Value, json};
use std::path::PathBuf;
use uuid::Uuid;

/// More than a copy of a root key has, in bytes.
const MAX_COPY: u64 = 4096;

/// What `restore` takes.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sealblk restore s3://bucket/prefix
  sealblk restore file:///mnt/backup --root-key /media/usb/kms-root-key
  sealblk restore file:///mnt/backup --volume db --at 2026-01-31T23:59:59Z
  sealblk restore s3://bucket/prefix --drill --root-key /media/usb/kms-root-key

Of each volume that \"sealblk backup\" has brought there, the newest backup comes back: another volume, with an id of its own, and with
the name, the tags and the limits that it had. Everything is proved before it is used. Volumes that were backed up at one moment come
back as of one moment. A volume whose name is taken here is reported, and stops no other. Interrupted, the same command goes on; what it
has restored before, it leaves as it is.

On an empty host, the embedded KMS is put back as well, out of its log in the place; its root key has to be where it was, or comes out of
the copy that \"sealblk kms backup\" made. A KMS that is elsewhere has to be reached from here.

With --drill all of that is tried, one volume after the other, in a store that is made for it below this one and removed afterwards: as
on an empty host, with nothing of this one's but the settings, and without --root-key its root key.")]
pub struct RestoreArgs {
    /// The place: file:///FOLDER, s3://BUCKET/PREFIX, az:// or gs://.
    place: String,
    /// Only this volume, by the name or the id that it had; may be given several times.
    #[arg(long, value_name = "VOLUME")]
    volume: Vec<String>,
    /// As they were at this time, or at the last backup before it, like 2026-01-31T23:59:59Z.
    #[arg(long, value_name = "TIME", value_parser = time)]
    at: Option<Timestamp>,
    /// Of a place with backups of several stores: which one's, by its id.
    #[arg(long, value_name = "STORE")]
    store: Option<Uuid>,
    /// The KMS key that wraps the data keys from now on, by id, ARN or alias [default: the ones that wrap
    /// them in the place].
    #[arg(long, value_name = "KEYREF", conflicts_with = "drill")]
    key: Option<String>,
    /// A copy of the root key of the embedded KMS, as "sealblk kms backup" makes it; its
    /// passphrase is asked for.
    #[arg(long, value_name = "FILE")]
    root_key: Option<PathBuf>,
    /// Only try it, and leave nothing.
    #[arg(long)]
    drill: bool,
    #[command(flatten)]
    how: PlaceArgs,
    #[command(flatten)]
    limit: LimitArgs,
    #[command(flatten)]
    space: SpaceArgs,
}

fn time(text: &str) -> Result<Timestamp, String> {
    text.to_owned().try_into()
}

/// Restores the volumes.
pub fn run(env: &Env, args: &RestoreArgs) -> Result<()> {
    let instead = "\"sealblk snapshot pull\" takes that";
    let target = args.how.whole_target(&args.place, args.limit.rate(), instead)?;
    let store = env.store()?;
    let copy = |file: &PathBuf| input::read(file, MAX_COPY).context(|| format!("read {}", file.display()));
    let wanted = WantedRestore {
        store: args.store,
        volumes: args.volume.clone(),
        at: args.at,
        key: args.key.clone(),
        root_key: args.root_key.as_ref().map(copy).transpose()?,
        budget: args.space.budget(&store),
        drill: args.drill,
    };
    let mut progress = Progress::new()?;
    let ended = match args.drill {
        true => "it was interrupted",
        false => "it was interrupted; the same command goes on where it came to",
    };
    let watch = &mut |_: &_, done, total| progress.at(done, total).map_err(|e: Error| e.reworded(ended));
    let done = restore::restore(&store, &target, &wanted, watch)?;
    drop(progress);
    for one in &done.volumes {
        let (name, chosen) = (one.chosen.shown(), &one.chosen);
        if chosen.is_torn {
            log::warn!(
                "{name} comes back as of {}: others that were backed up at that moment are not in the place",
                chosen.created
            );
        } else if chosen.passed_over > 0 {
            log::warn!(
                "{name} comes back as of {}: of what is newer, others of that moment are not in the place",
                chosen.created
            );
        }
    }
    match env.json {
        true => output::print_json(&json(&target.url.to_string(), &done, args.drill))?,
        false => output::print(&table(&done, args.drill)).map(drop)?,
    }
    done.problem().map_or(Ok(()), Err)
}

fn table(done: &Restored, drill: bool) -> String {
    let mut rows = vec![["NAME", "VOLUME", "SIZE", "AS OF", "STATE"].map(String::from).to_vec()];
    for one in &done.volumes {
        let none = || "-".to_owned();
        let (id, bytes, state) = match &one.outcome {
            Ok(made) if drill => (none(), size::human(made.size), "can be restored".to_owned()),
            Ok(made) => {
                let state = if made.was_there { "was there already" } else { "restored" };
                (made.volume.to_string(), size::human(made.size), state.to_owned())
            }
            Err(e) => (none(), none(), format!("failed: {e}")),
        };
        rows.push(vec![one.chosen.shown(), id, bytes, one.chosen.created.to_string(), state]);
    }
    output::table(&rows)
}

fn json(url: &str, done: &Restored, drill: bool) -> Value {
    let of = |one: &OneRestored| {
        let made = one.outcome.as_ref().ok();
        json!({
            "name": one.chosen.name,
            "id": made.filter(|_| !drill).map(|made| made.volume),
            "size": made.map(|made| made.size),
            "was_there": made.map(|made| made.was_there),
            "snapshot": one.chosen.snapshot,
            "volume_was": one.chosen.volume,
            "as_of": one.chosen.created,
            "newer_passed_over": one.chosen.passed_over,
            "is_torn": one.chosen.is_torn,
            "error": one.outcome.as_ref().err().map(error_json),
        })
    };
    json!({
        "url": url,
        "store": done.store.to_string(),
        "drill": drill,
        "volumes": done.volumes.iter().map(of).collect::<Vec<Value>>(),
    })
}
