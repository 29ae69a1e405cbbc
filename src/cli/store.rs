//! `sealblk store`: whether the records of volumes and snapshots are what commands of this
//! host have made of them.
#![forbid(unsafe_code)]

use crate::base::plural::counted;
use crate::base::{Error, Kind, Result};
use crate::cli::{Env, output};
use crate::ops::accept::{self, Finding, Problem, Subject};
use clap::{Args, Subcommand};
use serde_json::{Value, json};

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
    let store = env.store()?;
    match command {
        Command::Check => {
            let found = accept::check(&store)?;
            report(env, &found, "differs")?;
            let wrong = found.iter().filter(|one| one.problem.is_some()).count();
            refuse_if(wrong > 0, || {
                let records = counted(found.len(), "record", "records");
                let verb = if wrong == 1 { "is" } else { "are" };
                format!("{wrong} of {records} {verb} not what commands of this host have made of them")
            })
        }
        Command::Accept(args) => {
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
