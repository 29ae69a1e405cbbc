//! The command line: one file a noun. A command takes its arguments and an [`Env`], prints what it has to say
//! on standard output and returns an error or nothing.
//!
//! With `--json` standard output has one JSON value (for `events`, and reports that go on: one a line), and
//! an error is one object on standard error, `{"error":{"kind":"not-found","message":"…"}}`. Standard output
//! has nothing but results, so that a pipe never sees half a result followed by an error. The exit code
//! tells the kind of error ([`crate::base::error::Kind`]). Arguments that make no sense at all are clap's,
//! in plain text, exit code 2.

pub mod apply;
pub mod attach;
pub mod audit;
mod budget;
pub mod doctor;
pub mod events;
pub mod filter;
pub mod gc;
pub mod key;
pub mod kms;
mod log;
mod meter;
pub mod metrics;
pub mod output;
pub mod progress;
mod receipt;
mod rewrap;
pub mod settings;
pub mod snapshot;
mod space;
pub mod stats;
pub mod store;
pub mod top;
pub mod upgrade;
pub mod volume;

use crate::audit as audit_log;
use crate::base::hardened::{Hardened, harden, harden_children};
use crate::base::root::Root;
use crate::base::root::owners::Owners;
use crate::base::{Context, Error, Result, printable};
use crate::catalog::Catalog;
use crate::config::Settings;
use crate::ops::Store;
use clap::{ArgMatches, CommandFactory, FromArgMatches, Parser, Subcommand};
use serde_json::json;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

/// What every command gets beside its own arguments.
pub struct Env {
    /// Where the store lies.
    pub root: Root,
    /// `--json`: one JSON value on standard output instead of text.
    pub json: bool,
    /// For what asks for the proof.
    pub hardened: Hardened,
}

impl Env {
    /// The store, for the use cases.
    ///
    /// # Errors
    /// `Usage` for settings that cannot be understood.
    pub fn store(&self) -> Result<Store> {
        Store::open(&self.root, self.hardened)
    }

    /// The store's settings.
    pub fn settings(&self) -> Result<Settings> {
        Settings::load(&self.root)
    }

    /// The store's volumes.
    pub fn catalog(&self) -> Catalog {
        Catalog::with_ledger(&self.root)
    }
}

/// Encrypted disks for virtual machines, with a key for each volume and a KMS that wraps it.
#[derive(Parser)]
#[command(version, propagate_version = true, after_help = EXAMPLE, max_term_width = 110)]
struct Cli {
    /// Where the store lies [default: /var/lib/sealblk for root, else sealblk in the XDG data folder].
    #[arg(long, global = true, help_heading = GENERAL, env = "SEALBLK_ROOT", value_name = "DIR", hide_env_values = true)]
    root: Option<PathBuf>,

    /// Print JSON instead of text.
    #[arg(long, global = true, help_heading = GENERAL)]
    json: bool,

    /// Say more on standard error; twice: still more. RUST_LOG, where it is set, decides instead.
    #[arg(short, long, global = true, help_heading = GENERAL, action = clap::ArgAction::Count)]
    verbose: u8,

    #[command(subcommand)]
    command: Command,
}

const GENERAL: &str = "General options";

const EXAMPLE: &str = "\
Example:
  sealblk volume create --size 20GiB --name db
  sealblk attach db --socket-path /run/db.sock";

#[derive(Subcommand)]
enum Command {
    /// Make, show and delete volumes.
    #[command(subcommand, after_help = "Example:\n  sealblk volume create --size 20GiB --name db")]
    Volume(volume::Command),
    /// Make, show, copy and delete snapshots of volumes.
    #[command(subcommand, after_help = "Example:\n  sealblk snapshot create db --description nightly")]
    Snapshot(snapshot::Command),
    /// Make the volumes what a file says they are.
    Apply(apply::ApplyArgs),
    /// Serve a volume to VMMs, in the foreground, until it is detached.
    Attach(attach::AttachArgs),
    /// End the attachment of a volume: drain, flush, wipe the key.
    Detach(attach::DetachArgs),
    /// Have this binary take attached volumes over from the processes that serve them; guests notice nothing.
    Upgrade(upgrade::UpgradeArgs),
    /// Make, show and switch the keys of the embedded KMS.
    #[command(subcommand, after_help = "Example:\n  sealblk key disable alias/aws/ebs")]
    Key(key::KeyCommand),
    /// Serve the embedded KMS to others, and say who they are.
    #[command(subcommand, after_help = "Example:\n  sealblk kms serve --listen 127.0.0.1:8600")]
    Kms(kms::Command),
    /// Limit the requests and bytes a second of an attached volume.
    Throttle(attach::ThrottleArgs),
    /// Show what attached volumes do: rates, latencies, errors.
    Stats(stats::StatsArgs),
    /// Show what attached volumes do on a terminal, live.
    Top(top::TopArgs),
    /// Metrics of all volumes for Prometheus.
    Metrics(metrics::MetricsArgs),
    /// Show and change the settings of the store.
    #[command(subcommand, after_help = "Example:\n  sealblk settings encrypt-by-default on")]
    Settings(settings::Command),
    /// Show what happened to volumes.
    Events(events::Args),
    /// Show who used which key when, and check that the record of it is whole.
    #[command(subcommand, after_help = "Example:\n  sealblk audit show --since 24h\n  sealblk audit verify")]
    Audit(audit::Command),
    /// Hold records against what commands have made of them, and accept what differs.
    #[command(subcommand, after_help = "Example:\n  sealblk store check")]
    Store(store::Command),
    /// Clear away what interrupted commands left, and grants of attaches that did not end well.
    Gc(gc::Args),
    /// Look at what this machine has of what attached volumes want.
    #[command(after_help = "Example:\n  sealblk doctor")]
    Doctor,
    /// Unwrap a data key for the process that started this one.
    #[command(hide = true)]
    Unwrap,
    /// Wrap a data key anew for the process that started this one.
    #[command(hide = true)]
    RewrapKey,
    /// Make the grants of an attach for the process that started this one, and retire them after it.
    #[command(hide = true)]
    KeepGrants,
    /// Serve a volume from now on, for the command "upgrade" that started this process.
    #[command(hide = true)]
    TakeOver(upgrade::TakeOverArgs),
}

impl Command {
    fn run(self, env: &Env) -> Result<()> {
        match self {
            Command::Volume(command) => volume::run(env, command),
            Command::Snapshot(command) => snapshot::run(env, command),
            Command::Apply(args) => apply::run(env, &args),
            Command::Attach(args) => attach::attach(env, &args),
            Command::Detach(args) => attach::detach(env, &args),
            Command::Upgrade(args) => upgrade::run(env, &args),
            Command::Key(command) => key::run(env, command),
            Command::Kms(command) => kms::run(env, command),
            Command::Throttle(args) => attach::throttle(env, &args),
            Command::Stats(args) => stats::run(env, &args),
            Command::Top(args) => top::run(env, &args),
            Command::Metrics(args) => metrics::run(env, &args),
            Command::Settings(command) => settings::run(env, command),
            Command::Events(args) => events::run(env, &args),
            Command::Audit(command) => audit::run(env, command),
            Command::Store(command) => store::run(env, command),
            Command::Gc(args) => gc::run(env, &args),
            Command::Doctor => doctor::run(env),
            Command::Unwrap => attach::unwrap(env),
            Command::RewrapKey => crate::helper::rewrap::help(env.hardened, &env.root),
            Command::KeepGrants => attach::keep_grants(env),
            Command::TakeOver(args) => upgrade::take_over(env, &args),
        }
    }
}

/// Runs the command line and returns the exit code.
pub fn main() -> ExitCode {
    let hardened = harden();
    // Where a file may not become so large ("ulimit -f"), that is an error with words, and not the end of the
    // process.
    let too_large = signal_hook::flag::register(signal_hook::consts::SIGXFSZ, Arc::default());
    let matches = Cli::command().get_matches_from(arguments());
    audit_log::name_command(&command_words(&matches));
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|e| e.exit());
    log::start(cli.verbose);
    if let Err(e) = too_large {
        ::log::warn!("the limit on the size of files ends this process without a word: {e}");
    }
    let json = cli.json;
    let ran = hardened.and_then(|hardened| {
        // An event sink is a program of the operator's, which may be one that gains privileges.
        if !matches!(cli.command, Command::Events(_)) {
            harden_children()?;
        }
        let env = env(cli.root, json, hardened)?;
        // It reports what keeps all others from running.
        if !matches!(cli.command, Command::Doctor) {
            Owners::configured()?.check_root(&env.root)?;
            env.root.keep_spare();
        }
        cli.command.run(&env)
    });
    log::end();
    match ran {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            report(&e, json);
            ExitCode::from(e.kind().exit_code())
        }
    }
}

/// The words of the command that was given, without options and values: `volume create`.
fn command_words(matches: &ArgMatches) -> String {
    let mut words = Vec::new();
    let mut next = matches.subcommand();
    while let Some((word, below)) = next {
        words.push(word);
        next = below.subcommand();
    }
    words.join(" ")
}

/// The arguments. Called as `vhost-user-sealblk`, by management software that knows back-ends by their own
/// binary (QEMU's vhost-user conventions; resources/50-sealblk.json), the program is `sealblk attach`.
fn arguments() -> Vec<OsString> {
    let mut arguments: Vec<OsString> = std::env::args_os().collect();
    let name = arguments.first().and_then(|path| Path::new(path).file_name());
    if name == Some(OsStr::new("vhost-user-sealblk")) {
        arguments.insert(1, "attach".into());
    }
    arguments
}

fn env(root: Option<PathBuf>, json: bool, hardened: Hardened) -> Result<Env> {
    let root = root.map_or_else(Root::default_path, Ok)?;
    // Sockets and messages name paths in it, which must mean the same elsewhere.
    let root = std::path::absolute(&root).context(|| root.display().to_string())?;
    Ok(Env { root: Root::new(root), json, hardened })
}

fn report(e: &Error, json: bool) {
    let text = match json {
        true => json!({"error": {"kind": e.kind().name(), "message": e.to_string()}}).to_string(),
        false => format!("sealblk: {e}"),
    };
    // Not eprintln!: it panics where standard error is closed.
    let text = format!("{}\n", printable::lines(&text));
    let _ = std::io::Write::write_all(&mut std::io::stderr(), text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_an_example() {
        fn check(command: &clap::Command, path: &str) {
            let path = format!("{path} {}", command.get_name());
            assert!(command.get_after_help().is_some_and(|h| h.to_string().contains("sealblk ")), "{path}");
            command.get_subcommands().filter(|c| !c.is_hide_set()).for_each(|c| check(c, &path));
        }
        Cli::command().debug_assert();
        check(&Cli::command(), "");
    }
}
