//! `sealblk watch`: hears of KMS keys that cannot be used any more, before the next attach does.
#![forbid(unsafe_code)]

use crate::base::{Context, Result};
use crate::cli::events::stop_on_signals;
use crate::cli::{Env, output};
use crate::host::notify::Notifier;
use crate::ops::watch::{self, Changed};
use clap::value_parser;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::{Value, json};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// What `watch` takes.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sealblk watch                     as a service: sealblk-watch.service
  sealblk watch --once --json       from a timer

It asks the KMS in what state the keys of all volumes are (DescribeKey), those of attached volumes first, five
keys a second at most. Where an answer is not what it was, it prints that and records a \"watchKey\" event: the key
cannot be used, waits for deletion, the KMS is not reached, or it can be used again. \"sealblk volume list\" shows
what was answered last. Running guests need no key; their next attach does.")]
pub struct Args {
    /// How many seconds lie between the beginnings of two rounds.
    #[arg(long, value_name = "SECONDS", default_value_t = 300, value_parser = value_parser!(u64).range(10..=86_400))]
    interval: u64,
    /// Ask once, and end.
    #[arg(long, conflicts_with = "interval")]
    once: bool,
}

/// Watches the keys until it is told to end.
///
/// # Errors
/// Those of the first round. What later rounds meet is logged, and the next one tries again.
pub fn run(env: &Env, args: &Args) -> Result<()> {
    let stop = stop_on_signals()?;
    let manager = Notifier::connect();
    let mut is_first = true;
    loop {
        let begun = Instant::now();
        // Settings and records as they are now.
        let asked = env
            .store()
            .and_then(|store| watch::round(&store, &mut |gap| !is_told_to_stop(&stop, gap).unwrap_or(true)));
        match asked {
            Ok(changed) => print(env, &changed)?,
            Err(e) if is_first => return Err(e),
            Err(e) => log::error!("the keys are not all asked for: {e}"),
        }
        if args.once {
            return Ok(());
        }
        if is_first {
            manager.ready();
        }
        is_first = false;
        let left = Duration::from_secs(args.interval).saturating_sub(begun.elapsed());
        if is_told_to_stop(&stop, left)? {
            manager.stopping(false);
            return Ok(());
        }
    }
}

/// Waits so long, or until a signal says that it is to end.
fn is_told_to_stop(stop: &impl AsFd, time: Duration) -> Result<bool> {
    let until = Instant::now() + time;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        // A part of a millisecond more, or it would not wait for that.
        let timeout = PollTimeout::try_from(left + Duration::from_micros(999)).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(stop.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) if Instant::now() >= until => return Ok(false),
            Ok(0) | Err(nix::Error::EINTR) => {}
            found => return found.map(|_| true).context(|| "wait for a signal"),
        }
    }
}

fn print(env: &Env, changed: &[Changed]) -> Result<()> {
    for it in changed {
        let Changed { now, volumes, without_another } = it;
        let attached: Vec<_> = volumes.iter().filter(|(_, is)| *is).map(|(id, _)| id).collect();
        if env.json {
            let mut value = json!(now);
            value["volumes"] = volumes.iter().map(|(id, _)| json!(id)).collect::<Vec<Value>>().into();
            value["attached"] = json!(attached);
            value["without_another_key"] = json!(without_another);
            // One a line: whoever reads takes each as it comes.
            output::print(&format!("{value}\n"))?;
            continue;
        }
        let deletion = now.deletion.map_or(String::new(), |at| format!(", to be deleted at {at}"));
        let why = now.message.as_ref().map_or(String::new(), |message| format!(" ({message})"));
        let others = it.others().map_or(String::new(), |others| format!("; {others}"));
        output::print(&format!(
            "{}  {}: {} is {}{deletion}{why}; {} of its volumes attached, {} in \
             all{others}\n",
            now.checked,
            now.key.provider,
            now.key.key_id,
            now.state.words(),
            attached.len(),
            volumes.len(),
        ))?;
    }
    Ok(())
}
