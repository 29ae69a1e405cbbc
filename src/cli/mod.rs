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
pub mod backup;
mod budget;
pub mod completions;
pub mod doctor;
pub mod events;
pub mod filter;
pub mod gc;
mod help;
mod input;
mod interval;
pub mod key;
pub mod key_stores;
pub mod kms;
mod log;
mod meter;
pub mod metrics;
pub mod output;
mod place;
pub mod progress;
mod receipt;
pub mod restore;
mod rewrap;
pub mod settings;
mod slots;
pub mod snapshot;
mod sort;
mod space;
pub mod stats;
pub mod store;
pub mod top;
pub mod upgrade;
pub mod volume;
pub mod watch;

use crate::audit as audit_log;
use crate::base::hardened::{Hardened, harden, harden_children};
use crate::base::root::Root;
use crate::base::root::owners::Owners;
use crate::base::{Context, Error, Kind, Result, printable};
use crate::catalog::Catalog;
use crate::config::Settings;
use crate::helper::rbd::records;
use crate::ops::Store;
use clap::error::ErrorKind;
use clap::{ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand};
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
#[command(name = "sealblk", version, propagate_version = true, after_help = EXAMPLE, max_term_width = 110)]
struct Cli {
    #[command(flatten)]
    general: General,

    #[command(subcommand)]
    command: Command,
}

/// What every command takes.
#[derive(Args)]
struct General {
    /// Where the store lies: volumes, snapshots and wrapped keys [default: /var/lib/sealblk for root, else
    /// sealblk in the XDG data folder] [env: SEALBLK_ROOT]. Or ceph:POOL[/NAMESPACE], for one that several
    /// hosts share, with ?id=ID&conf=/PATH&keyring=/PATH&state=/FOLDER as far as they are not the usual ones.
    #[arg(long, global = true, help_heading = GENERAL, value_name = "DIR")]
    root: Option<PathBuf>,

    /// Where the root keys and the settings lie, of every store that is used with this folder [default:
    /// /etc/sealblk for root, else sealblk in the XDG configuration folder] [env: SEALBLK_CONFIG_DIR].
    #[arg(long, global = true, help_heading = GENERAL, value_name = "DIR")]
    config_dir: Option<PathBuf>,

    /// Print JSON instead of text.
    #[arg(long, global = true, help_heading = GENERAL)]
    json: bool,

    /// How the log on standard error is written: "json" is an object a line; "journal" goes to systemd's
    /// journal, with the volume, the queue and the VMM's connection as fields [default: text] [env:
    /// SEALBLK_LOG_FORMAT].
    #[arg(long, global = true, help_heading = GENERAL, value_enum, value_name = "FORMAT")]
    log_format: Option<log::Format>,

    /// Say more on standard error; twice: still more. RUST_LOG, where it is set, decides instead.
    #[arg(short, long, global = true, help_heading = GENERAL, action = clap::ArgAction::Count)]
    verbose: u8,
}

/// What this program is started as by itself. It has a parser of its own, so that neither help nor an error
/// tells users of it.
#[derive(Parser)]
#[command(name = "sealblk", disable_help_subcommand = true)]
struct Helper {
    #[command(flatten)]
    general: General,

    #[command(subcommand)]
    command: HelperCommand,
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
    /// Back volumes up to a place outside, as ciphertext: a folder or an object store.
    Backup(backup::BackupArgs),
    /// Make the volumes again that a place outside has backups of, or try whether that can be done.
    Restore(restore::RestoreArgs),
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
    /// Watch the KMS keys of all volumes, and tell when one cannot be used any more.
    Watch(watch::Args),
    /// Hold records against what commands have made of them, and accept what differs.
    #[command(subcommand, after_help = "Example:\n  sealblk store check")]
    Store(store::Command),
    /// Clear away what interrupted commands left, and grants of attaches that did not end well.
    Gc(gc::Args),
    /// Look at what this machine has of what attached volumes want.
    #[command(after_help = "Example:\n  sealblk doctor")]
    Doctor,
    /// Print the script by which a shell completes this program's commands.
    Completions(completions::Args),
}

#[derive(Subcommand)]
enum HelperCommand {
    /// Unwrap a data key for the process that started this one.
    Unwrap,
    /// Wrap a data key anew for the process that started this one.
    RewrapKey,
    /// Bring ciphertext to a place outside, and back, for the process that started this one.
    Carry,
    /// Start carriers for the process that started this one.
    StartCarriers,
    /// Start fetchers for the process that started this one.
    StartFetchers,
    /// Bring what is still to come of layers for the process that started this one.
    Fetch,
    /// Do a step of a backup or restore for the process that started this one.
    BackupStep,
    /// Pass on what processes of this host ask of another one.
    Relay,
    /// Have another host bring objects into a folder of this one.
    ServePlace,
    /// Load a PKCS#11 module for the process that started this one.
    Pkcs11,
    /// Make the grants of an attach for the process that started this one, and retire them after it.
    KeepGrants,
    /// Connect to NBD servers for the process that started this one.
    DialNbd,
    /// Serve an RBD image to the process that started this one.
    ServeRbd,
    /// Reach the records of a store in a pool for the process that started this one.
    ServeRecords,
    /// Serve a volume from now on, for the command "upgrade" that started this process.
    TakeOver(upgrade::TakeOverArgs),
}

/// What this program was started for.
enum Task {
    /// By a user.
    User(Box<Command>),
    /// By itself.
    Helper(HelperCommand),
}

impl Task {
    /// Whether a user has started it, and `is` says yes to the command.
    fn is_of_user(&self, is: impl FnOnce(&Command) -> bool) -> bool {
        matches!(self, Task::User(command) if is(command))
    }

    /// Whether it can be done in a store in a pool.
    ///
    /// # Errors
    /// `Unsupported` where that is not there yet.
    fn check_is_for_pools(&self) -> Result<()> {
        match self {
            Task::User(command) if !command.is_for_pools() => Err(Error::new(
                Kind::Unsupported,
                "this command is not there yet for a store in a pool (docs/ceph.md has those that are)",
            )),
            _ => Ok(()),
        }
    }

    fn run(self, env: &Env) -> Result<()> {
        match self {
            Task::User(command) => command.run(env),
            Task::Helper(HelperCommand::Unwrap) => attach::unwrap(env),
            Task::Helper(HelperCommand::RewrapKey) => crate::helper::rewrap::help(env.hardened, &env.root),
            Task::Helper(HelperCommand::Carry) => crate::helper::carry::help(env.hardened, &env.root),
            Task::Helper(HelperCommand::StartCarriers) => {
                crate::helper::carry::help_starting(env.hardened, &env.root)
            }
            Task::Helper(HelperCommand::StartFetchers) => {
                crate::helper::fetch::starter::help(env.hardened, &env.root)
            }
            Task::Helper(HelperCommand::Fetch) => crate::ops::backup::fetch::help(&env.store()?),
            Task::Helper(HelperCommand::Relay) => {
                crate::helper::other_host::relay::help(env.hardened, &env.root)
            }
            Task::Helper(HelperCommand::ServePlace) => {
                crate::helper::other_host::server::help(env.hardened, &env.root)
            }
            Task::Helper(HelperCommand::BackupStep) => crate::ops::backup::worker::help(&env.store()?),
            Task::Helper(HelperCommand::Pkcs11) => crate::hsm::module::help(env.hardened),
            Task::Helper(HelperCommand::KeepGrants) => attach::keep_grants(env),
            Task::Helper(HelperCommand::DialNbd) => crate::helper::dial::help(env.hardened),
            Task::Helper(HelperCommand::ServeRbd) => crate::helper::rbd::help(env.hardened),
            Task::Helper(HelperCommand::ServeRecords) => crate::helper::rbd::records::help(env.hardened),
            Task::Helper(HelperCommand::TakeOver(args)) => upgrade::take_over(env, &args),
        }
    }
}

impl Command {
    /// Whether it is there for a store in a pool.
    fn is_for_pools(&self) -> bool {
        match self {
            Command::Volume(command) => command.is_for_pools(),
            Command::Snapshot(command) => command.is_for_pools(),
            Command::Attach(args) => args.is_for_pools(),
            Command::Detach(_)
            | Command::Throttle(_)
            | Command::Stats(_)
            | Command::Top(_)
            | Command::Metrics(_)
            | Command::Key(_)
            | Command::Kms(_)
            | Command::Settings(_)
            | Command::Events(_)
            | Command::Audit(_)
            | Command::Doctor
            | Command::Completions(_) => true,
            Command::Backup(_)
            | Command::Restore(_)
            | Command::Apply(_)
            | Command::Upgrade(_)
            | Command::Watch(_)
            | Command::Store(_)
            | Command::Gc(_) => false,
        }
    }

    fn run(self, env: &Env) -> Result<()> {
        match self {
            Command::Volume(command) => volume::run(env, command),
            Command::Snapshot(command) => snapshot::run(env, command),
            Command::Backup(args) => backup::run(env, &args),
            Command::Restore(args) => restore::run(env, &args),
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
            Command::Watch(args) => watch::run(env, &args),
            Command::Store(command) => store::run(env, command),
            Command::Gc(args) => gc::run(env, &args),
            Command::Doctor => doctor::run(env),
            Command::Completions(args) => completions::run(&args),
        }
    }
}

/// The whole command line, as help, completions and manual pages show it.
pub fn command() -> clap::Command {
    help::flowing(Cli::command())
}

/// Runs the command line and returns the exit code.
pub fn main() -> ExitCode {
    let hardened = harden();
    // Where a file may not become so large ("ulimit -f"), that is an error with words, and not the end of the
    // process.
    let too_large = signal_hook::flag::register(signal_hook::consts::SIGXFSZ, Arc::default());
    let (general, task) = parse(&arguments()).unwrap_or_else(|e| e.exit());
    let of_environment = || log::Format::of_environment().map_err(wrong_environment);
    let format = general.log_format.map_or_else(of_environment, Ok).unwrap_or_else(|e| e.exit());
    log::start(format, general.verbose);
    if let Err(e) = too_large {
        ::log::warn!("the limit on the size of files ends this process without a word: {e}");
    }
    let json = general.json;
    let ran = hardened.and_then(|hardened| {
        // An event sink is a program of the operator's, which may be one that gains privileges.
        if !task.is_of_user(|command| matches!(command, Command::Events(_))) {
            harden_children()?;
        }
        // The first reports what keeps all others from running; the second asks for nothing of the machine.
        // What loads a stranger's library knows no store.
        let is_strangers = |helper: &HelperCommand| {
            matches!(helper, HelperCommand::Pkcs11 | HelperCommand::ServeRbd | HelperCommand::ServeRecords)
        };
        let has_no_store = matches!(&task, Task::Helper(helper) if is_strangers(helper))
            || task.is_of_user(|command| matches!(command, Command::Doctor | Command::Completions(_)));
        let env = env(general, &task, has_no_store, hardened)?;
        if !has_no_store {
            Owners::configured()?.check_root(&env.root)?;
            env.root.keep_spare();
            crate::helper::rbd::open_images();
        }
        task.run(&env)
    });
    log::end();
    match ran {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) if !json && log::tell_error(&e) => ExitCode::from(e.kind().exit_code()),
        Err(e) => {
            report(&e, json);
            ExitCode::from(e.kind().exit_code())
        }
    }
}

fn wrong_environment(message: String) -> clap::Error {
    command().error(ErrorKind::InvalidValue, message)
}

/// What the arguments say, and the command's name in the audit log.
fn parse(arguments: &[OsString]) -> Result<(General, Task), clap::Error> {
    let mut users = command();
    let of_user = users.try_get_matches_from_mut(arguments).and_then(|matches| {
        audit_log::name_command(&command_words(&matches));
        let Cli { general, command } = Cli::from_arg_matches(&matches)?;
        Ok((general, Task::User(Box::new(command))))
    });
    let unknown = match of_user {
        Err(e) if e.kind() == ErrorKind::InvalidSubcommand => e,
        parsed => return parsed.map_err(|e| e.format(&mut users)),
    };
    let Ok(matches) = Helper::command().try_get_matches_from(arguments) else { return Err(unknown) };
    audit_log::name_command(&command_words(&matches));
    let Helper { general, command } = Helper::from_arg_matches(&matches)?;
    Ok((general, Task::Helper(command)))
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

fn env(general: General, task: &Task, has_no_store: bool, hardened: Hardened) -> Result<Env> {
    if let Some(folder) = general.config_dir {
        Root::use_config_dir(&folder)?;
    }
    let of_environment = || std::env::var_os("SEALBLK_ROOT").filter(|it| !it.is_empty()).map(PathBuf::from);
    let of_settings = || -> Result<PathBuf> {
        let usual = Root::default_path()?;
        // What asks for nothing of the machine works without settings, too.
        let said = if has_no_store || Root::config_dir().is_err() {
            None
        } else {
            Settings::load(&Root::new(&usual))?.root
        };
        Ok(said.map_or(usual, PathBuf::from))
    };
    let root = general.root.or_else(of_environment).map_or_else(of_settings, Ok)?;
    if let Some(pool) = root.to_str().filter(|text| records::is_pool(text)) {
        let root = match has_no_store {
            true => Root::new(Root::default_path()?),
            false => {
                task.check_is_for_pools()?;
                records::open(pool)?
            }
        };
        return Ok(Env { root, json: general.json, hardened });
    }
    // Sockets and messages name paths in it, which must mean the same elsewhere.
    let root = std::path::absolute(&root).context(|| root.display().to_string())?;
    Ok(Env { root: Root::new(root), json: general.json, hardened })
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

    /// Calls `check` with every command that help shows, and its words.
    fn each(command: &clap::Command, above: &str, check: &dyn Fn(&clap::Command, &str)) {
        let words = format!("{above} {}", command.get_name());
        check(command, &words);
        let below = command.get_subcommands().filter(|c| !c.is_hide_set() && c.get_name() != "help");
        below.for_each(|c| each(c, &words, check));
    }

    #[test]
    fn every_command_has_an_example() {
        command().debug_assert();
        Helper::command().debug_assert();
        each(&command(), "", &|command, words| {
            assert!(command.get_after_help().is_some_and(|h| h.to_string().contains("sealblk ")), "{words}");
        });
    }

    #[test]
    fn helpers_are_shown_nowhere_and_understood_all_the_same() {
        let arguments = |words: &str| words.split(' ').map(OsString::from).collect::<Vec<_>>();
        for (name, more) in [
            ("unwrap", ""),
            ("rewrap-key", ""),
            ("carry", ""),
            ("start-carriers", ""),
            ("start-fetchers", ""),
            ("fetch", ""),
            ("backup-step", ""),
            ("relay", ""),
            ("serve-place", ""),
            ("keep-grants", ""),
            ("dial-nbd", ""),
            ("serve-rbd", ""),
            ("serve-records", ""),
            ("pkcs11", ""),
            ("take-over", " x"),
        ] {
            let words = format!("sealblk --root /x {name}{more}");
            let (general, task) = parse(&arguments(&words)).ok().unwrap();
            assert!(matches!(task, Task::Helper(_)) && general.root == Some("/x".into()), "{name}");
            each(&command(), "", &|_, words| assert_ne!(words, format!(" sealblk {name}")));
            // One that is nearly right is not told what would be.
            let close = format!("sealblk {}{more}", &name[..name.len() - 1]);
            let close = parse(&arguments(&close)).err().unwrap();
            assert!(!close.to_string().contains(name), "{close}");
        }
    }

    #[test]
    fn whoever_says_nothing_is_helped() {
        for words in [&["sealblk"][..], &["sealblk", "volume"], &["sealblk", "kms", "principal"]] {
            let arguments: Vec<OsString> = words.iter().map(OsString::from).collect();
            let e = parse(&arguments).err().unwrap();
            assert_eq!(e.kind(), ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand, "{words:?}");
            assert_eq!(e.exit_code(), 2);
            let help = e.to_string();
            assert!(help.contains("Usage: ") && help.contains("Example"), "{help}");
        }
    }

    /// Whatever the terminal's width, a line of a paragraph is as long as it can be.
    #[test]
    fn help_is_wrapped_by_the_terminal_alone() {
        let mut whole = command().term_width(72);
        whole.build();
        each(&whole, "", &|command, words| {
            let help = command.clone().render_long_help().to_string();
            let lines: Vec<&str> = help.lines().collect();
            for pair in lines.windows(2) {
                let is_prose = |line: &str| line.starts_with(|c: char| !c.is_whitespace());
                if !is_prose(pair[0]) || !is_prose(pair[1]) {
                    continue;
                }
                let next = pair[1].split(' ').next().unwrap_or_default();
                let longer = pair[0].chars().count() + 1 + next.chars().count();
                assert!(longer > 72, "{words}: {:?} could go on with {next:?}", pair[0]);
            }
        });
    }
}
