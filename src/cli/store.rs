//! `sealblk store`: which stores there are, and whether the records of volumes and snapshots are what
//! commands of this host have made of them.
#![forbid(unsafe_code)]

use crate::base::plural::counted;
use crate::base::root::Root;
use crate::base::{Error, Kind, Result};
use crate::cli::{Env, output};
use crate::ops::accept::{self, Finding, Problem, Subject};
use crate::ops::stores::{self, KnownStore};
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use std::path::PathBuf;

/// The commands.
#[derive(Subcommand)]
pub enum Command {
    /// Hold every record against the ledger of what commands have made of it; exit code 7 if one differs.
    #[command(after_help = "Example:\n  sealblk store check --json")]
    Check,
    /// Accept records as they are: of a backup that was restored, or of a store that was brought here.
    #[command(after_help = "\
Examples:
  sealblk store check           what differs, and how
  sealblk store accept db       the record of the volume db is right
  sealblk store accept --all    so are all of them: a store of another host, or of an earlier version

Commands and attaches refuse a record that says something else than they have made of it: whoever can write the disk could
have changed its name, taken its encryption away or put an old one back. Look at what differs before you accept it. The audit
log tells who accepted what.")]
    Accept(AcceptArgs),
    /// List the stores that the configuration folder has keys and marks of.
    #[command(
        visible_alias = "ls",
        after_help = "\
Example:
  sealblk store list

A store's root key, the key of its ledger and its marks lie in the configuration folder, not in the store. A store that is
gone leaves them behind."
    )]
    List,
    /// Remove what the configuration folder has of a store that is gone, or has no volumes and snapshots.
    #[command(after_help = "\
Examples:
  sealblk store forget /tmp/try
  sealblk store forget /tmp/try --root-key

Without its root key, a backup of the store is worthless: look whether there is one before you say --root-key.")]
    Forget(ForgetArgs),
}

/// Arguments of `store forget`.
#[derive(Args)]
pub struct ForgetArgs {
    /// The store's folder, there or not, as "sealblk store list" shows it.
    #[arg(value_name = "DIR")]
    store: PathBuf,
    /// Remove the root key of its KMS as well: whatever is encrypted under it can never be read again.
    #[arg(long)]
    root_key: bool,
}

/// Arguments of `store accept`.
#[derive(Args)]
#[group(required = true, multiple = false)]
pub struct AcceptArgs {
    /// Volumes and snapshots, by id or by name.
    #[arg(value_name = "VOLUME|SNAPSHOT")]
    records: Vec<String>,
    /// Every record that differs.
    #[arg(long)]
    all: bool,
}

/// Runs one of the commands.
///
/// # Errors
/// `Corrupt` if `check` finds a record that differs, or if one cannot be read; those of finding records.
pub fn run(env: &Env, command: Command) -> Result<()> {
    match command {
        Command::List => list(env),
        Command::Forget(args) => forget(env, &args),
        Command::Check => {
            let found = accept::check(&env.store()?)?;
            report(env, &found, "differs")?;
            let wrong = found.iter().filter(|one| one.problem.is_some()).count();
            refuse_if(wrong > 0, || {
                let records = counted(found.len(), "record", "records");
                let verb = if wrong == 1 { "is" } else { "are" };
                format!("{wrong} of {records} {verb} not what commands of this host have made of them")
            })
        }
        Command::Accept(args) => {
            let store = env.store()?;
            let subjects: Vec<Subject> = match args.all {
                true => {
                    let found = accept::check(&store)?.into_iter();
                    found.filter(|one| one.problem.is_some()).map(|one| one.subject).collect()
                }
                false => {
                    args.records.iter().map(|name| accept::resolve(&store, name)).collect::<Result<_>>()?
                }
            };
            let found = accept::accept(&store, &subjects)?;
            report(env, &found, "accepted")?;
            let damaged = found.iter().filter(|one| is_damaged(one)).count();
            refuse_if(damaged > 0, || {
                let records = counted(damaged, "record", "records");
                format!("{records} cannot be read, and nothing of that is accepted")
            })
        }
    }
}

fn list(env: &Env) -> Result<()> {
    let (stores, keys) = stores::list()?;
    if env.json {
        let store = |it: &KnownStore| {
            json!({
                "root": it.root.display().to_string(),
                "state": it.presence.word(),
                "records": it.records,
                "root_key": it.root_key.as_ref().map(|path| path.display().to_string()),
                "made": it.made,
            })
        };
        let keys: Vec<String> = keys.iter().map(|path| path.display().to_string()).collect();
        return output::print_json(&json!({
            "stores": stores.iter().map(store).collect::<Vec<Value>>(),
            "other_root_keys": keys,
        }));
    }
    let mut rows = vec![["STORE", "STATE", "RECORDS", "MADE", "ROOT KEY"].map(String::from).to_vec()];
    let none = || "-".to_string();
    rows.extend(stores.iter().map(|it| {
        vec![
            it.root.display().to_string(),
            it.presence.word().to_string(),
            it.records.to_string(),
            it.made.map_or_else(none, |made| made.to_string()),
            it.root_key.as_ref().map_or_else(none, |path| path.display().to_string()),
        ]
    }));
    rows.extend(keys.iter().map(|path| vec!["?".into(), none(), none(), none(), path.display().to_string()]));
    output::print(&output::table(&rows)).map(drop)
}

fn forget(env: &Env, args: &ForgetArgs) -> Result<()> {
    let root = Root::new(&args.store);
    let has_root_key = stores::forget(&root, args.root_key)?;
    let root_key = match (has_root_key, args.root_key) {
        (false, _) => "none",
        (true, true) => "removed",
        (true, false) => "kept",
    };
    let path = root.path().display().to_string();
    if env.json {
        return output::print_json(&json!({"root": path, "root_key": root_key}));
    }
    let rest = if root_key == "kept" { "; its root key stays (--root-key removes it)" } else { "" };
    output::print(&format!("{path} is forgotten{rest}\n")).map(drop)
}

fn refuse_if(wrong: bool, message: impl FnOnce() -> String) -> Result<()> {
    if wrong { Err(Error::new(Kind::Corrupt, message())) } else { Ok(()) }
}

fn is_damaged(one: &Finding) -> bool {
    matches!(one.problem, Some(Problem::Damaged(_)))
}

/// One line a record; `word` is for those that differed.
fn report(env: &Env, found: &[Finding], word: &str) -> Result<()> {
    let state = |one: &Finding| match &one.problem {
        None => "ok",
        Some(Problem::Differs(_)) => word,
        Some(Problem::Damaged(_)) => "damaged",
    };
    let problem = |one: &Finding| one.problem.as_ref().map(|problem| problem.as_str().to_owned());
    if env.json {
        let record = |one: &Finding| {
            let (id, problem) = (one.subject.to_string(), problem(one));
            json!({"id": id, "name": one.name, "state": state(one), "problem": problem})
        };
        let records: Vec<Value> = found.iter().map(record).collect();
        return output::print_json(&json!({ "records": records }));
    }
    let mut rows = vec![["RECORD", "NAME", "STATE", "PROBLEM"].map(String::from).to_vec()];
    rows.extend(found.iter().map(|one| {
        let name = one.name.clone().unwrap_or_else(|| "-".into());
        vec![one.subject.to_string(), name, state(one).into(), problem(one).unwrap_or_default()]
    }));
    output::print(&output::table(&rows)).map(drop)
}
