//! `sealblk events`: what happened to volumes, and who is told.
#![forbid(unsafe_code)]

use crate::base::plural::counted;
use crate::base::{Context, Error, Kind, Result};
use crate::cli::{Env, output};
use crate::config;
use crate::events::deliver::{self, Outcome};
use crate::events::read::{EventReader, Recorded};
use crate::host::notify::Notifier;
use serde_json::{Value, json};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

/// What `events` takes.
#[derive(clap::Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "\
Examples:
  sealblk events
  sealblk events --follow --json
  sealblk events deliver --follow

With --json each event is printed as it was recorded, one a line, in EventBridge's shape."
)]
pub struct Args {
    /// Wait for further events, until Ctrl-C.
    #[arg(long, short)]
    follow: bool,

    #[command(subcommand)]
    command: Option<Command>,
}

/// What else can be done with events.
#[derive(clap::Subcommand)]
enum Command {
    /// Deliver events to the event sinks of the settings.
    #[command(after_help = "\
Examples:
  sealblk events deliver --follow        as a service: sealblk-events.service
  sealblk events deliver                 from a timer: what is there now; exit code 1 if a sink did not take all

In sealblk.toml:
  [[event-sink]]
  name = \"pager\"
  command = [\"/usr/local/bin/page\", \"storage\"]  # one run an event: JSON on its standard input, exit code 0 takes it

  [[event-sink]]
  name = \"collector\"
  url = \"http://127.0.0.1:8088/events\"           # one POST an event: 2xx takes it
  timeout = 10                                   # seconds; 30 if nothing is said

Each sink gets each event at least once, in order; one that is down gets them when it is back, and holds up no other. An
event that comes again has the same \"id\" (SEALBLK_EVENT_ID, Idempotency-Key).")]
    Deliver(DeliverArgs),
}

/// What `events deliver` takes.
#[derive(clap::Args)]
struct DeliverArgs {
    /// Go on as events happen, and try again what a sink did not take, until Ctrl-C.
    #[arg(long, short)]
    follow: bool,
    /// Deliver to sinks that are new only what happens from now on, not what is in the log already.
    #[arg(long)]
    from_now: bool,
}

/// Prints the store's events, oldest first, or delivers them.
pub fn run(env: &Env, args: &Args) -> Result<()> {
    if let Some(Command::Deliver(args)) = &args.command {
        return deliver(env, args);
    }
    let print = |recorded: &Recorded| match env.json {
        true => output::print(&format!("{}\n", recorded.text)),
        false => output::print(&line(&recorded.event)),
    };
    let mut reader = EventReader::new(&env.root);
    if !args.follow {
        return reader.read(print).map(drop);
    }
    reader.follow(stop_on_signals()?.as_fd(), print)
}

/// Becomes readable at SIGINT or SIGTERM.
pub(super) fn stop_on_signals() -> Result<UnixStream> {
    let (stop, signalled) = UnixStream::pair().context(|| "make a socket pair")?;
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        let signalled = signalled.try_clone().context(|| "copy a file descriptor")?;
        signal_hook::low_level::pipe::register(signal, signalled).context(|| "watch for Ctrl-C")?;
    }
    Ok(stop)
}

fn deliver(env: &Env, args: &DeliverArgs) -> Result<()> {
    let sinks = env.settings()?.event_sinks;
    if sinks.is_empty() {
        let message = format!("{} names no [[event-sink]]", config::shown_file().display());
        return Err(Error::new(Kind::Usage, message));
    }
    let outcomes = match args.follow {
        true => {
            let stop = stop_on_signals()?;
            Notifier::connect().ready();
            deliver::follow(&env.root, &sinks, args.from_now, stop.as_fd())
        }
        false => deliver::deliver_once(&env.root, &sinks, args.from_now),
    };
    report(env, &outcomes)?;
    // The first one's kind; each was named above, or in the log.
    let failed = outcomes.into_iter().filter_map(|outcome| outcome.result.err());
    failed.reduce(|first, next| Error::new(first.kind(), format!("{first}; {next}"))).map_or(Ok(()), Err)
}

fn report(env: &Env, outcomes: &[Outcome]) -> Result<()> {
    if env.json {
        let outcome = |outcome: &Outcome| {
            let problem = outcome.result.as_ref().err().map(ToString::to_string);
            json!({"sink": outcome.sink, "delivered": outcome.delivered, "problem": problem})
        };
        return output::print_json(&outcomes.iter().map(outcome).collect::<Vec<_>>());
    }
    let events = |outcome: &Outcome| counted(outcome.delivered, "event", "events");
    let line = |outcome: &Outcome| format!("{}: {} delivered\n", outcome.sink, events(outcome));
    output::print(&outcomes.iter().map(line).collect::<String>()).map(drop)
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

    #[test]
    fn a_line_has_what_a_person_looks_for() {
        let event = json!({
            "time": "2026-01-31T23:59:59Z",
            "resources": ["arn:aws:ec2:us-east-1:000000000000:volume/vol-0", "arn:aws:kms:us-east-1:0:key/1"],
            "detail": {"event": "attachVolume", "result": "failed", "cause": "it is\n\u{1b}[2J disabled."},
        });
        assert_eq!(
            line(&event),
            "2026-01-31T23:59:59Z  attachVolume  failed  vol-0 arn:aws:kms:us-east-1:0:key/1  it is[2J \
             disabled.\n"
        );
        assert_eq!(line(&json!({})), "-  -  -  \n");
    }
}
