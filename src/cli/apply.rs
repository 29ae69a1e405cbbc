//! `sealblk apply`: makes the store's volumes what a file says they are.
#![forbid(unsafe_code)]

use crate::base::plural::counted;
use crate::base::{Context, Error, Kind, Result, size};
use crate::catalog::VolumeId;
use crate::catalog::attach_settings::AttachSettings;
use crate::cli::budget::SpaceArgs;
use crate::cli::volume::{attach_json, kept_words};
use crate::cli::{Env, input, output};
use crate::ops::apply::{self, Change, Plan, Planned, Wanted};
use serde_json::{Value, json};
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
  also-keys = [\"alias/far\"]   # further KMS keys that wrap its data key; without it the settings'
  sector-size = 4096          # 512 if left out
  snapshot = \"nightly\"        # made from this; id or tag Name
  own-data-key = true         # with a snapshot: what it writes is under a data key of its own
  unencrypted = true          # not encrypted
  tags = { env = \"prod\" }     # exactly these; left out: whatever there is
  iops = 3000                 # as \"sealblk volume modify\" keeps them; left out: whatever is kept
  throughput = \"125MiB\"
  burst = 1                   # seconds
  serial = \"db-01\"
  queues = 4

What is missing is made, what is smaller is made larger, attached or not, tags are set, and limits are kept and put in force.
Applied again, it changes nothing. A volume that the file does not name is left alone, and none is ever deleted. What cannot be changed (a smaller
size, another key, sector size, snapshot or encryption) is refused before anything is done.")]
pub struct ApplyArgs {
    /// The file; - for standard input.
    file: PathBuf,
    /// Only print what would be done.
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    space: SpaceArgs,
}

/// Applies a file, or prints what that would do.
pub fn run(env: &Env, args: &ApplyArgs) -> Result<()> {
    let attempt = || format!("apply {}", args.file.display());
    let wanted = apply::parse(&read(&args.file).context(attempt)?).context(attempt)?;
    let store = env.store()?;
    if args.dry_run {
        let plan = Plan::make(&store, &wanted).context(attempt)?;
        return print(env, &plan, &[], true);
    }
    let (plan, ids) = apply::apply(&store, &wanted, args.space.budget(&store)).context(attempt)?;
    print(env, &plan, &ids, false)
}

fn read(path: &Path) -> Result<String> {
    String::from_utf8(input::read(path, MAX_LEN)?).map_err(|e| Error::of(Kind::Usage, e))
}

fn print(env: &Env, plan: &Plan, ids: &[VolumeId], dry_run: bool) -> Result<()> {
    if env.json {
        let changes = plan.changes().iter().enumerate().map(|(n, planned)| {
            let mut value = json_of(planned);
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
    let mut rows: Vec<Vec<String>> = plan.changes().iter().map(row).collect();
    rows.extend(
        plan.unchanged().iter().map(|name| vec!["=".into(), name.clone(), "is as it shall be".into()]),
    );
    let summary = match (plan.changes().len(), dry_run) {
        (0, _) => "nothing to do\n".to_string(),
        (n, true) => format!("{} would be made\n", counted(n, "change", "changes")),
        (n, false) => format!("{} made\n", counted(n, "change was", "changes were")),
    };
    output::print(&(output::table(&rows) + &summary)).map(drop)
}

/// A size, as a plan shows it.
fn shown(bytes: u64) -> String {
    size::human(bytes)
}

/// The change as a row of a table.
fn row(planned: &Planned) -> Vec<String> {
    let (sign, what) = match &planned.change {
        Change::Create(volume) => ("+", describe(volume)),
        Change::Grow { from, to, .. } => ("~", format!("grow from {} to {}", shown(*from), shown(*to))),
        Change::Tag { tags, .. } if tags.is_empty() => ("~", "take all tags away".into()),
        Change::Tag { tags, .. } => {
            let tags: Vec<String> = tags.iter().map(|(key, value)| format!("{key}={value}")).collect();
            ("~", format!("tag {}", tags.join(" ")))
        }
        Change::Modify { settings, .. } => ("~", format!("keep for its attaches: {}", kept_words(settings))),
    };
    vec![sign.into(), planned.name.clone(), what]
}

/// The change in JSON.
fn json_of(planned: &Planned) -> Value {
    match &planned.change {
        Change::Create(volume) => json!({
            "name": planned.name, "action": "create", "size": volume.size, "key": volume.key,
            "sector_size": volume.sector_size, "snapshot": volume.snapshot,
            "encrypted": !volume.unencrypted, "tags": volume.tags,
            "attach": attach_json(&volume.attach_settings(&AttachSettings::default())),
        }),
        Change::Grow { id, from, to } => {
            json!({"name": planned.name, "action": "grow", "id": id, "from": from, "to": to})
        }
        Change::Tag { id, tags } => {
            json!({"name": planned.name, "action": "tag", "id": id, "tags": tags})
        }
        Change::Modify { id, settings } => {
            json!({"name": planned.name, "action": "modify", "id": id, "attach": attach_json(settings)})
        }
    }
}

fn describe(volume: &Wanted) -> String {
    let mut text = "create".to_string();
    if let Some(size) = volume.size {
        text += &format!(", {}", shown(size));
    }
    if let Some(snapshot) = &volume.snapshot {
        text += &format!(", from {snapshot}");
    }
    match (&volume.key, volume.unencrypted) {
        (Some(key), _) => text += &format!(", under {key}"),
        (None, true) => text += ", not encrypted",
        (None, false) => {}
    }
    text
}
