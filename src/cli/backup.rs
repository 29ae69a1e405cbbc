//! `sealblk backup`: volumes of the store go to a place outside.
#![forbid(unsafe_code)]

use crate::base::{Error, Kind, Result, size};
use crate::catalog::VolumeId;
use crate::cli::filter::{self, Filter};
use crate::cli::place::{KeepArgs, LimitArgs, PlaceArgs};
use crate::cli::progress::Progress;
use crate::cli::sort::SortArgs;
use crate::cli::{Env, output, volume};
use crate::ops::backup::all::{self, BackedUp, Needed, OneVolume, WantedBackup};
use serde_json::{Value, json};

/// What `backup` takes.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sealblk backup file:///mnt/backup
  sealblk backup s3://bucket/prefix --keep-daily 7 --keep-weekly 4 --keep-monthly 12
  sealblk backup s3://bucket/prefix --filter tag:backup=yes --group-by vm --limit 20MiB

Every volume of the store, or those that --filter means, gets a snapshot, which is pushed as \"snapshot push\" does: the place gets
ciphertext, and after the first time only what has changed. Volumes may be attached. With the snapshot go the volume's name, its tags
and what is kept with it, so that \"sealblk restore\" can make it again; and the log of the embedded KMS, if there is one. What is NOT
there is the root key of that KMS: without it nothing comes back. So a backup wants to know of a copy of it.

The last snapshot of each volume that is in the place stays in the store as well, for the next backup; older ones that backups have
made are deleted. Interrupted, the next backup goes on. A volume that fails is reported, and stops no other; the exit code is then not
0. With --keep options, backups of this store that do not stay by them are removed from the place afterwards. Snapshots that were
made otherwise stay, here and there.

systemd runs it once a night by sealblk-backup.timer. See docs/backup.md.")]
pub struct BackupArgs {
    /// The place: file:///FOLDER, s3://BUCKET/PREFIX, az:// or gs://.
    place: String,
    /// Only volumes of which this is so, as `volume list --filter` takes it; may be given several times.
    #[arg(long, value_name = "NAME=VALUE")]
    filter: Vec<Filter>,
    /// Volumes that have a tag of this key, with one value, are backed up at one moment; if one of them
    /// cannot be, none is.
    #[arg(long, value_name = "TAG")]
    group_by: Option<String>,
    #[command(flatten)]
    keep: KeepArgs,
    /// The root key of the embedded KMS is kept elsewhere, although "sealblk kms backup" has made no copy
    /// here.
    #[arg(long)]
    root_key_is_kept: bool,
    #[command(flatten)]
    how: PlaceArgs,
    #[command(flatten)]
    limit: LimitArgs,
}

/// Backs the volumes up.
pub fn run(env: &Env, args: &BackupArgs) -> Result<()> {
    let target = args.how.whole_target(&args.place, args.limit.rate(), "leave that out")?;
    filter::check(&args.filter, &volume::FILTERS)?;
    let catalog = env.catalog();
    // Their order is also that of what is reported.
    let chosen = volume::chosen(&catalog, catalog.list()?, &args.filter, &SortArgs::DEFAULT)?;
    let volumes: Vec<VolumeId> = chosen.iter().map(|entry| entry.id).collect();
    if volumes.is_empty() {
        let message = "there is no such volume; \"sealblk volume list\" shows which there are";
        return Err(Error::new(Kind::NotFound, message));
    }
    let wanted = WantedBackup {
        volumes,
        group_by: args.group_by.clone(),
        keep: args.keep.keep(),
        root_key_is_kept: args.root_key_is_kept,
    };
    let mut progress = Progress::new()?;
    let watch = &mut |_, done, total| {
        let ended = |e: Error| e.reworded("it was interrupted; the next backup goes on where it came to");
        progress.at(done, total).map_err(ended)
    };
    let done = all::back_up(&env.store()?, &target, &wanted, watch)?;
    drop(progress);
    match env.json {
        true => output::print_json(&json(&target.url.to_string(), &done))?,
        false => {
            output::print(&table(&done))?;
            tell_needed(&done.needed);
        }
    }
    done.problem().map_or(Ok(()), Err)
}

fn table(done: &BackedUp) -> String {
    let mut rows = vec![["VOLUME", "NAME", "SNAPSHOT", "SENT", "STATE"].map(String::from).to_vec()];
    for one in &done.volumes {
        let name = one.name.clone().unwrap_or_else(|| "-".into());
        let (snapshot, sent, state) = match &one.outcome {
            Ok(pushed) => {
                let sent = size::about(pushed.put_bytes);
                (pushed.snapshot.to_string(), sent, "backed up".to_owned())
            }
            Err(e) => ("-".into(), "-".into(), format!("failed: {e}")),
        };
        rows.push(vec![one.id.to_string(), name, snapshot, sent, state]);
    }
    let mut text = output::table(&rows);
    if let Ok(Some(removed)) = &done.removed {
        text.extend(removed.removed.iter().map(|id| format!("{id}  removed from the place\n")));
    }
    text
}

/// Says what is not in the place.
fn tell_needed(needed: &Needed) {
    output::tell("to restore, it takes beside the place:");
    for key in &needed.keys {
        output::tell(&format!("  the KMS key {} of the KMS \"{}\"", key.key_id, key.provider));
    }
    if let Some(kms) = needed.kms {
        let copy = match needed.root_key_copied {
            Some(at) => format!("a copy was made at {at}"),
            None => "of which this host knows no copy".into(),
        };
        output::tell(&format!("  the root key of the embedded KMS {kms}; {copy}"));
    }
}

fn json(url: &str, done: &BackedUp) -> Value {
    let of = |one: &OneVolume| {
        let pushed = one.outcome.as_ref().ok();
        let error = one.outcome.as_ref().err();
        json!({
            "id": one.id,
            "name": one.name,
            "snapshot": pushed.map(|it| it.snapshot),
            "url": pushed.map(|it| it.url.clone()),
            "blocks": pushed.map(|it| it.blocks),
            "put_blocks": pushed.map(|it| it.put_blocks),
            "put_bytes": pushed.map(|it| it.put_bytes),
            "base": pushed.and_then(|it| it.base),
            "tags_left_out": one.tags_left_out,
            "error": error.map(error_json),
        })
    };
    let removed = done.removed.as_ref().ok().and_then(Option::as_ref);
    let needed = &done.needed;
    let keys = needed.keys.iter().map(|key| json!({"kms": key.provider, "key": key.key_id}));
    json!({
        "url": url,
        "store": done.store.to_string(),
        "volumes": done.volumes.iter().map(of).collect::<Vec<Value>>(),
        "removed": removed.map(|it| &it.removed),
        "swept_objects": removed.and_then(|it| it.swept),
        "error": done.removed.as_ref().err().map(error_json),
        "needed": {
            "kms_keys": keys.collect::<Vec<Value>>(),
            "embedded_kms": needed.kms.map(|kms| kms.to_string()),
            "root_key": needed.root_key,
            "root_key_copied": needed.root_key_copied,
        },
    })
}

/// An error in JSON.
pub(super) fn error_json(e: &Error) -> Value {
    json!({"kind": e.kind().name(), "message": e.to_string()})
}
