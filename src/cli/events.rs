//! `sealblk events`: what happened to volumes.
#![forbid(unsafe_code)]

use super::{Env, output};
use crate::error::{Context, Result};
use crate::observe::events::read::{EventReader, Recorded};
use serde_json::Value;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

/// What `events` takes.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sealblk events
  sealblk events --follow --json

With --json each event is printed as it was recorded, one a line, in EventBridge's shape.")]
pub struct Args {
    /// Wait for further events, until Ctrl-C.
    #[arg(long, short)]
    follow: bool,
}

/// Prints the store's events, oldest first.
pub fn run(env: &Env, args: &Args) -> Result<()> {
    let print = |recorded: &Recorded| match env.json {
        true => output::print(&format!("{}\n", recorded.text)),
        false => output::print(&line(&recorded.event)),
    };
    let mut reader = EventReader::new(&env.root);
    if !args.follow {
        return reader.read(print).map(drop);
    }
    let (stop, signalled) = UnixStream::pair().context(|| "make a socket pair")?;
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        let signalled = signalled.try_clone().context(|| "copy a file descriptor")?;
        signal_hook::low_level::pipe::register(signal, signalled).context(|| "watch for Ctrl-C")?;
    }
    reader.follow(stop.as_fd(), print)
}

/// One event as a line of text: when, what, how it went, to whom, and why.
fn line(event: &Value) -> String {
    let text = |place: &str| event.pointer(place).and_then(Value::as_str).unwrap_or("-");
    let resources = event["resources"].as_array().map(Vec::as_slice).unwrap_or_default();
    let names: Vec<&str> = resources
        .iter()
        .filter_map(Value::as_str)
        // arn:aws:ec2:…:volume/vol-… -> vol-…; of a KMS key the whole ARN, which is what commands take.
        .map(|arn| arn.split_once(":volume/").map_or(arn, |(_, id)| id))
        .collect();
    let mut line = format!(
        "{}  {}  {}  {}",
        text("/time"),
        text("/detail/event"),
        text("/detail/result"),
        names.join(" ")
    );
    match text("/detail/cause") {
        "" | "-" => {}
        cause => line.push_str(&format!("  {cause}")),
    }
    // What a KMS says is not to move a terminal's cursor.
    line.retain(|c| !c.is_control());
    line + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_line_has_what_a_person_looks_for() {
        let event = json!({
            "time": "2026-01-31T23:59:59Z",
            "resources": ["arn:aws:ec2:us-east-1:000000000000:volume/vol-0", "arn:aws:kms:us-east-1:0:key/1"],
            "detail": {"event": "attachVolume", "result": "failed", "cause": "it is\n\u{1b}[2J disabled."},
        });
        assert_eq!(
            line(&event),
            "2026-01-31T23:59:59Z  attachVolume  failed  vol-0 arn:aws:kms:us-east-1:0:key/1  it is[2J disabled.\n"
        );
        assert_eq!(line(&json!({})), "-  -  -  \n");
    }
}
