//! `sealblk apply`: makes the store's volumes what a file says they are.
#![forbid(unsafe_code)]

mod file;
mod plan;

use crate::base::root::{create_dir_durable, files};
use crate::base::{Context, Error, Kind, Result, locks};
use crate::catalog::VolumeId;
use crate::cli::filter::Tag;
use crate::cli::volume::create::{self, CreateArgs};
use crate::cli::volume::resize;
use crate::cli::{Env, output, size};
use crate::config::Settings;
use nix::fcntl::{Flock, OFlag};
use plan::{Change, Plan, Planned};
use serde_json::{Value, json};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// The longest file in bytes.
const MAX_LEN: u64 = 4 << 20;

/// What `apply` takes.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sealblk apply volumes.toml --dry-run
  sealblk apply volumes.toml

A file in TOML (or JSON, of the same names):
  [[volume]]
  name = \"db\"                 # which volume it is; the rest is what it shall be
  size = \"20GiB\"              # or a number of bytes; may be left out with a snapshot
  key = \"alias/prod\"          # KMS key; without it the settings' default
  sector-size = 4096          # 512 if left out
  snapshot = \"nightly\"        # made from this; id or tag Name
  unencrypted = true          # not encrypted
  tags = { env = \"prod\" }     # exactly these; left out: whatever there is

What is missing is made, what is smaller is made larger, attached or not, and tags are set. Applied again, it changes
nothing. A volume that the file does not name is left alone, and none is ever deleted. What cannot be changed (a smaller
size, another key, sector size, snapshot or encryption) is refused before anything is done.")]
pub struct ApplyArgs {
    /// The file; - for standard input.
    file: PathBuf,
    /// Only print what would be done.
    #[arg(long)]
    dry_run: bool,
}

/// Applies a file, or prints what that would do.
pub fn run(env: &Env, args: &ApplyArgs) -> Result<()> {
    let attempt = || format!("apply {}", args.file.display());
    let wanted = file::parse(&read(&args.file).context(attempt)?).context(attempt)?;
    let settings = env.settings()?;
    if args.dry_run {
        let plan = Plan::make(env, &settings, &wanted).context(attempt)?;
        return print(env, &plan, &[], true);
    }
    // Of two at once, the second finds what the first has done.
    let _lock = lock(env)?;
    let plan = Plan::make(env, &settings, &wanted).context(attempt)?;
    let ids = carry_out(env, &settings, &plan).context(attempt)?;
    print(env, &plan, &ids, false)
}

fn read(path: &Path) -> Result<String> {
    let mut text = String::new();
    let mut read = |from: &mut dyn Read| from.take(MAX_LEN + 1).read_to_string(&mut text);
    match path.to_str() {
        Some("-") => read(&mut std::io::stdin().lock())?,
        _ => read(&mut File::open(path)?)?,
    };
    match text.len() as u64 > MAX_LEN {
        true => Err(Error::new(Kind::Usage, format!("it is longer than {MAX_LEN} bytes"))),
        false => Ok(text),
    }
}

fn lock(env: &Env) -> Result<Flock<File>> {
    create_dir_durable(env.root.path())?;
    let path = env.root.path().join("apply.lock");
    let attempt = || format!("lock {}", path.display());
    let file = files::open_with(&path, OFlag::O_WRONLY | OFlag::O_CREAT);
    locks::lock_whole(file.context(attempt)?).context(attempt)
}

/// Does what is planned, in the file's order; answers the id of each change's volume.
fn carry_out(env: &Env, settings: &Settings, plan: &Plan) -> Result<Vec<VolumeId>> {
    let mut ids = Vec::new();
    let changes = plan.changes();
    for (done, planned) in changes.iter().enumerate() {
        let result = change(env, settings, planned);
        ids.push(result.map_err(|e| match done {
            0 => e.context(&planned.name),
            n => e.context(format!("{n} of {} changes are done, then {}", changes.len(), planned.name)),
        })?);
    }
    Ok(ids)
}

fn change(env: &Env, settings: &Settings, planned: &Planned) -> Result<VolumeId> {
    match &planned.change {
        Change::Create(volume) => {
            let args = CreateArgs {
                size: volume.size,
                snapshot: volume.snapshot.clone(),
                sector_size: volume.sector_size,
                key: volume.key.clone(),
                unencrypted: volume.unencrypted,
                name: Some(volume.name.clone()),
                tag: volume.tags.iter().flat_map(|tags| tags.iter()).map(Tag::of).collect(),
                preallocate: false,
            };
            create::create(env, settings, &args).map(|made| made.id())
        }
        Change::Grow { id, to, .. } => resize::resize(env, *id, *to).map(|_| *id),
        Change::Tag { id, tags } => {
            env.catalog().change_tags(*id, |now| {
                *now = tags.clone();
                Ok(())
            })?;
            Ok(*id)
        }
    }
}

fn print(env: &Env, plan: &Plan, ids: &[VolumeId], dry_run: bool) -> Result<()> {
    if env.json {
        let changes = plan.changes().iter().enumerate().map(|(n, planned)| {
            let mut value = planned.json();
            if let Some(id) = ids.get(n) {
                value["id"] = json!(id);
            }
            value
        });
        return output::print_json(&json!({
            "dry_run": dry_run,
            "changes": changes.collect::<Vec<Value>>(),
            "unchanged": plan.unchanged(),
        }));
    }
    let mut rows: Vec<Vec<String>> = plan.changes().iter().map(Planned::row).collect();
    rows.extend(
        plan.unchanged().iter().map(|name| vec!["=".into(), name.clone(), "is as it shall be".into()]),
    );
    let summary = match (plan.changes().len(), dry_run) {
        (0, _) => "nothing to do\n".to_string(),
        (n, true) => format!("{n} changes would be made\n"),
        (n, false) => format!("{n} changes were made\n"),
    };
    output::print(&(output::table(&rows) + &summary)).map(drop)
}

/// A size, as a plan shows it.
fn shown(bytes: u64) -> String {
    size::human(bytes)
}
