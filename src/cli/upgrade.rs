//! `sealblk upgrade`, and the hidden command of the process that it starts.

use crate::base::{Error, Kind, Result};
use crate::catalog::VolumeId;
use crate::cli::{Env, output};
use crate::host::upgrade;
use crate::ops;
use crate::ops::upgrade::Upgraded;
use clap::Args;
use serde_json::json;

/// Arguments of `upgrade`.
#[derive(Args)]
#[command(after_help = "\
Example:
  sealblk upgrade db
  sealblk upgrade --all")]
pub struct UpgradeArgs {
    /// The volume: its id, a unique beginning of it, or its name.
    #[arg(required_unless_present = "all")]
    volume: Option<String>,

    /// Every volume that is attached on this host, one after the other.
    #[arg(long, conflicts_with = "volume")]
    all: bool,
}

/// Arguments of the hidden command.
#[derive(Args)]
pub struct TakeOverArgs {
    volume: String,
}

/// Has this binary take volumes over from the processes that serve them.
pub fn run(env: &Env, args: &UpgradeArgs) -> Result<()> {
    let store = env.store()?;
    let volumes = match &args.volume {
        Some(volume) => vec![store.catalog().resolve(volume)?],
        None => ops::upgrade::attached(&store)?,
    };
    let mut done = Vec::new();
    let mut failed = Vec::new();
    for &volume in &volumes {
        match ops::upgrade::upgrade(&store, volume) {
            Ok(upgraded) => {
                if !env.json {
                    output::print(&text(&upgraded))?;
                }
                done.push(json(&upgraded));
            }
            Err(e) if !args.all => return Err(e),
            // It was detached since it was looked for.
            Err(e) if e.kind() == Kind::NotFound => log::info!("{e}"),
            Err(e) => {
                log::error!("{e}");
                failed.push((volume, e));
            }
        }
    }
    if env.json {
        let failed: Vec<_> = failed.iter().map(failure).collect();
        match args.all {
            true => output::print_json(&json!({"upgraded": done, "failed": failed}))?,
            false => output::print_json(&done[0])?,
        }
    }
    if args.all && !env.json && done.is_empty() && failed.is_empty() {
        output::print("no volume is attached on this host\n")?;
    }
    match failed.first() {
        None => Ok(()),
        Some((_, first)) => {
            let message = match failed.len() {
                1 => format!("one volume is served by the process that served it before: {first}"),
                n => format!(
                    "{n} volumes are served by the processes that served them before, the first: {first}"
                ),
            };
            Err(Error::new(first.kind(), message))
        }
    }
}

/// The hidden command: the process that is to serve the volume.
pub fn take_over(env: &Env, args: &TakeOverArgs) -> Result<()> {
    let catalog = env.catalog();
    let volume = catalog.resolve(&args.volume)?;
    upgrade::take_over(&catalog, &env.settings()?, volume, env.hardened)
}

fn text(upgraded: &Upgraded) -> String {
    let Upgraded { volume, pid, from, pause } = upgraded;
    let to = env!("CARGO_PKG_VERSION");
    let versions = if from == to { to.to_owned() } else { format!("{to}, before that {from}") };
    let pause = pause.map_or("no VMM is connected".to_owned(), |pause| {
        format!("its guest's requests stood still for {:.1} ms", pause.as_secs_f64() * 1000.0)
    });
    format!("{volume} is served by process {pid} now (version {versions}); {pause}\n")
}

fn json(upgraded: &Upgraded) -> serde_json::Value {
    json!({
        "id": upgraded.volume,
        "pid": upgraded.pid,
        "version": env!("CARGO_PKG_VERSION"),
        "version_before": upgraded.from,
        "pause_us": upgraded.pause.map(|pause| pause.as_micros() as u64),
    })
}

fn failure((volume, e): &(VolumeId, Error)) -> serde_json::Value {
    json!({"id": volume, "error": {"kind": e.kind().name(), "message": e.to_string()}})
}
