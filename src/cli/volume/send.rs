//! `sealblk volume send` and `volume receive`: a volume moves to another host, by a place that both reach.
#![forbid(unsafe_code)]

use crate::base::{Error, Result, size};
use crate::catalog::Catalog;
use crate::cli::budget::SpaceArgs;
use crate::cli::place::{LimitArgs, PlaceArgs};
use crate::cli::progress::Progress;
use crate::cli::{Env, output};
use crate::ops::backup::receive::{self, WantedReceive};
use crate::ops::backup::send::{self, WantedSend};
use serde_json::json;
use std::time::Duration;

/// What `volume send` takes.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sealblk volume send db s3://bucket/moves
  ssh other sealblk volume receive s3://bucket/moves db

The place, which both hosts reach, gets ciphertext, as by \"snapshot push\". Most of the volume goes there while it is used. Then it is
detached, the rest goes there, and it is waited for the other host, on which \"volume receive\" may wait already. When that has said that
it has the volume, proved by the volume's data key, it is deleted here. Until then it stays here as it was, and nobody can attach it; if
the other host does not take it in time, or this command is interrupted, it is called off, and cannot be taken any more.

The KMS has to let both hosts use the volume's key. Snapshots of the volume stay here. Prints how long the volume stood still.")]
pub struct SendArgs {
    /// The volume: its id, the first digits of its id, or its name.
    volume: String,
    /// The place: file:///FOLDER or s3://BUCKET/PREFIX.
    place: String,
    /// Keep it here as well. It is another volume then, with the same data.
    #[arg(long)]
    keep: bool,
    #[command(flatten)]
    wait: WaitArgs,
    #[command(flatten)]
    how: PlaceArgs,
    #[command(flatten)]
    limit: LimitArgs,
}

/// What `volume receive` takes.
#[derive(clap::Args)]
#[command(after_help = "\
Example:
  sealblk volume receive s3://bucket/moves db

Waits for a volume that another host sends by the place (\"volume send\"), and takes it: every block is proved before it is written,
the other host is told, and the volume is made, with an id of its own and the name, tags and limits that it had. Interrupted, the same
command goes on, unless the other host has called it off.")]
pub struct ReceiveArgs {
    /// The place: file:///FOLDER or s3://BUCKET/PREFIX.
    place: String,
    /// The volume, by the name or the id that it has there [default: the only one that is sent].
    volume: Option<String>,
    /// The KMS key that wraps its data keys from now on, by id, ARN or alias [default: the ones that wrap
    /// them there].
    #[arg(long, value_name = "KEYREF")]
    key: Option<String>,
    #[command(flatten)]
    wait: WaitArgs,
    #[command(flatten)]
    how: PlaceArgs,
    #[command(flatten)]
    limit: LimitArgs,
    #[command(flatten)]
    space: SpaceArgs,
}

/// How long it is waited for the other host.
#[derive(clap::Args)]
struct WaitArgs {
    /// So many seconds it is waited for the other host.
    #[arg(long, value_name = "SECONDS", default_value = "3600")]
    wait: u64,
}

impl WaitArgs {
    fn patience(&self) -> Duration {
        Duration::from_secs(self.wait)
    }
}

/// Sends a volume.
pub(super) fn send(env: &Env, args: &SendArgs) -> Result<()> {
    let target = args.how.whole_target(&args.place, args.limit.rate(), "leave that out")?;
    let (store, catalog): (_, Catalog) = (env.store()?, env.catalog());
    let id = catalog.resolve(&args.volume)?;
    let wanted = WantedSend { keep: args.keep, patience: args.wait.patience() };
    let mut progress = Progress::new()?;
    let ended = |e: Error| e.reworded("it was interrupted; the volume is here");
    let watch = &mut |done, total| progress.at(done, total).map_err(ended);
    let sent = send::send(&store, id, &target, wanted, &mut |stage| output::tell(stage), watch)?;
    drop(progress);
    if env.json {
        return output::print_json(&json!({
            "id": id,
            "snapshot": sent.snapshot,
            "sent_before": sent.before,
            "sent_after": sent.after,
            "downtime_ms": sent.downtime.as_millis() as u64,
            "kept": args.keep,
        }));
    }
    let state = if args.keep { "and stays here as well" } else { "and is deleted here" };
    output::print(&format!(
        "{id} is on the other host {state}; it stood still for {:.1} s ({} were sent before, {} meanwhile)\n",
        sent.downtime.as_secs_f64(),
        size::about(sent.before),
        size::about(sent.after)
    ))
    .map(drop)
}

/// Receives a volume.
pub(super) fn receive(env: &Env, args: &ReceiveArgs) -> Result<()> {
    let target = args.how.whole_target(&args.place, args.limit.rate(), "leave that out")?;
    let store = env.store()?;
    let wanted = WantedReceive {
        volume: args.volume.clone(),
        key: args.key.clone(),
        budget: args.space.budget(&store),
        patience: args.wait.patience(),
    };
    let mut progress = Progress::new()?;
    let ended = |e: Error| e.reworded("it was interrupted; the same command goes on where it came to");
    let watch = &mut |done, total| progress.at(done, total).map_err(ended);
    let received = receive::receive(&store, &target, &wanted, watch)?;
    drop(progress);
    if env.json {
        return output::print_json(&json!({
            "id": received.made.volume,
            "name": received.name,
            "size": received.made.size,
            "snapshot": received.snapshot,
            "volume_was": received.volume,
        }));
    }
    output::print(&format!("{}\n", received.made.volume)).map(drop)
}
