//! `sealblk volume send` and `volume receive`: a volume moves to another host, by a place that both reach or
//! by a connection between the two.
#![forbid(unsafe_code)]

use crate::base::{Error, Kind, Result, size};
use crate::catalog::Catalog;
use crate::cli::budget::SpaceArgs;
use crate::cli::place::{LimitArgs, PlaceArgs};
use crate::cli::progress::Progress;
use crate::cli::{Env, output};
use crate::ops::backup::other_host::{self, Way};
use crate::ops::backup::receive::{self, Received, WantedReceive};
use crate::ops::backup::send::{self, WantedSend};
use serde_json::json;
use std::time::Duration;

/// What `volume send` takes.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sealblk volume send db --to ssh:root@other
  sealblk volume send db s3://bucket/moves
  ssh other sealblk volume receive s3://bucket/moves db

With \"--to ssh:\" the volume goes to the other host by your own ssh, which starts \"sealblk volume receive -\" there. With \"-\" standard
input and output are the connection to that command, made by whatever has started this one. Otherwise the volume goes by a place that both
hosts reach.

What goes there is ciphertext, as by \"snapshot push\". Most of the volume goes while it is used. Then it is detached, the rest goes, and
it is waited for the other host, on which \"volume receive\" may wait already. When that has said that it has the volume, proved by the
volume's data key, it is deleted here. Until then it stays here as it was, and nobody can attach it; if the other host does not take it in
time, or this command is interrupted, it is called off, and cannot be taken any more.

The KMS has to let both hosts use the volume's key. Snapshots of the volume stay here. Prints how long the volume stood still.")]
pub struct SendArgs {
    /// The volume: its id, the first digits of its id, or its name.
    volume: String,
    /// The place: file:///FOLDER, s3://BUCKET/PREFIX, az:// or gs://; or "-", standard input and output.
    #[arg(required_unless_present = "to")]
    place: Option<String>,
    /// The host that gets it: ssh:HOST or ssh:USER@HOST, as ssh knows it.
    #[arg(long, value_name = "ssh:HOST", conflicts_with_all = ["place", "endpoint", "region"], value_parser = destination)]
    to: Option<String>,
    /// What ssh starts there, for the shell of that host; "sudo" before it, say.
    #[arg(long, value_name = "COMMAND", requires = "to", default_value = "sealblk volume receive -")]
    remote_command: String,
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
Examples:
  sealblk volume receive s3://bucket/moves db
  sealblk volume receive -

Waits for a volume that another host sends by the place (\"volume send\"), and takes it: every block is proved before it is written,
the other host is told, and the volume is made, with an id of its own and the name, tags and limits that it had. What is there while the
volume is still used comes ahead. Interrupted, the same command goes on, unless the other host has called it off.

With \"-\", standard input and output are the connection to the other host: \"volume send --to ssh:\" there starts this command so. What it
has to say goes to standard error then. For a time the volume takes its space twice.")]
pub struct ReceiveArgs {
    /// The place: file:///FOLDER, s3://BUCKET/PREFIX, az:// or gs://; or "-", standard input and output.
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

/// Where ssh is to go.
fn destination(text: &str) -> Result<String, String> {
    match text.strip_prefix("ssh:").filter(|host| !host.is_empty() && !host.starts_with('-')) {
        Some(host) => Ok(host.to_owned()),
        None => Err("is no host that ssh reaches: ssh:HOST and ssh:USER@HOST are".into()),
    }
}

/// Sends a volume.
pub(super) fn send(env: &Env, args: &SendArgs) -> Result<()> {
    let way = match (&args.to, args.place.as_deref()) {
        (Some(destination), _) => {
            Some(Way::Ssh { destination: destination.clone(), command: args.remote_command.clone() })
        }
        (None, Some("-")) => Some(Way::Standard),
        (None, _) => None,
    };
    let place = args.place.as_deref().unwrap_or_default();
    let target = match &way {
        Some(_) => None,
        None => Some(args.how.whole_target(place, args.limit.rate(), "leave that out")?),
    };
    let (store, catalog): (_, Catalog) = (env.store()?, env.catalog());
    let id = catalog.resolve(&args.volume)?;
    let wanted = WantedSend { keep: args.keep, patience: args.wait.patience() };
    let mut progress = Progress::new()?;
    let ended = |e: Error| e.reworded("it was interrupted; the volume is here");
    let watch = &mut |done, total| progress.at(done, total).map_err(ended);
    let tell = &mut |stage: &str| output::tell(stage);
    let sent = match (&way, &target) {
        (Some(way), _) => send::send_to(&store, id, (way, args.limit.rate()), wanted, tell, watch)?,
        (None, Some(target)) => send::send(&store, id, target, wanted, tell, watch)?,
        (None, None) => unreachable!("without a connection there is a place"),
    };
    drop(progress);
    let out = Out::beside(way == Some(Way::Standard));
    if env.json {
        return out.print_json(&json!({
            "id": id,
            "snapshot": sent.snapshot,
            "sent_before": sent.before,
            "sent_after": sent.after,
            "downtime_ms": sent.downtime.as_millis() as u64,
            "kept": args.keep,
        }));
    }
    let state = if args.keep { "and stays here as well" } else { "and is deleted here" };
    out.print(&format!(
        "{id} is on the other host {state}; it stood still for {:.1} s ({} were sent before, {} meanwhile)",
        sent.downtime.as_secs_f64(),
        size::about(sent.before),
        size::about(sent.after)
    ))
}

/// Receives a volume.
pub(super) fn receive(env: &Env, args: &ReceiveArgs) -> Result<()> {
    let is_connection = args.place == "-";
    if is_connection && (args.limit.rate() > 0 || args.how.are_given()) {
        let message = "a connection has no endpoint and no region, and whoever sends keeps to its own \
                       --limit: leave --endpoint, --region and --limit out";
        return Err(Error::new(Kind::Usage, message));
    }
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
    let received = match is_connection {
        true => other_host::receive(&store, &wanted, watch)?,
        false => {
            let target = args.how.whole_target(&args.place, args.limit.rate(), "leave that out")?;
            receive::receive(&store, &target, &wanted, watch)?
        }
    };
    drop(progress);
    let Received { made, snapshot, volume, name, came_ahead } = received;
    let out = Out::beside(is_connection);
    match env.json {
        true => out.print_json(&json!({
            "id": made.volume,
            "name": name,
            "size": made.size,
            "snapshot": snapshot,
            "volume_was": volume,
            "came_ahead": came_ahead,
        })),
        false => out.print(&made.volume.to_string()),
    }
}

/// Where results go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Out {
    Standard,
    /// Standard output is a connection.
    Error,
}

impl Out {
    fn beside(connection: bool) -> Self {
        if connection { Out::Error } else { Out::Standard }
    }

    fn print(self, line: &str) -> Result<()> {
        match self {
            Out::Standard => output::print(&format!("{line}\n")).map(drop),
            Out::Error => {
                output::tell(line);
                Ok(())
            }
        }
    }

    fn print_json(self, value: &serde_json::Value) -> Result<()> {
        match self {
            Out::Standard => output::print_json(value),
            Out::Error => {
                output::tell(&value.to_string());
                Ok(())
            }
        }
    }
}
