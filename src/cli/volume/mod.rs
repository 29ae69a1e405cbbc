//! `sealblk volume`: make, list, show, tag, rewrap and delete volumes.
#![forbid(unsafe_code)]

pub(super) mod create;
pub(super) mod export;
mod import;
mod modify;
mod rekey;
pub(super) mod resize;
mod show;
mod tag;

pub(super) use show::{attach_json, kept_words};

use crate::base::{Result, size};
use crate::catalog::metadata::KeyRecord;
use crate::catalog::{Catalog, Entry, VolumeId};
use crate::cli::filter::{self, Filter};
use crate::cli::sort::{Place, SortArgs};
use crate::cli::space;
use crate::cli::{Env, output, rewrap};
use crate::ops::delete;
use crate::ops::modify as kept;
use crate::ops::usage::{Overview, Usage};
use crate::ops::watch::{self, KeyName, Known};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// The commands.
#[derive(clap::Subcommand)]
pub enum Command {
    /// Make a volume, empty or from a snapshot.
    Create(create::CreateArgs),
    /// Make a volume from a raw or qcow2 disk image.
    Import(import::ImportArgs),
    /// Write what a volume holds into a file, in the clear.
    Export(export::ExportArgs),
    /// List the volumes.
    #[command(
        visible_alias = "ls",
        after_help = "\
Examples:
  sealblk volume list --json
  sealblk volume list --sort size --reverse
  sealblk volume list --filter tag:Name=db --filter status=available

ON DISK is what a volume's layers take: those that nothing else names, and those that it shares with snapshots and other
volumes. The last line holds the sizes of all volumes, which they may come to take, against the file system: where that is
less, they are overcommitted. In JSON these are space and file_system. Where \"sealblk watch\" runs, KEY is what the KMS has
said last of the volume's keys; where limits are kept with a volume, LIMITS are these."
    )]
    List(ListArgs),
    /// Show one volume: what it is, who has it attached, and what its next attach needs.
    Show(show::ShowArgs),
    /// Wrap a volume's data key by another KMS key, or by the newest version of the same one.
    Rewrap(rewrap::RewrapArgs),
    /// Give a volume a new data key, attached or not, and encrypt everything anew under it.
    Rekey(rekey::RekeyArgs),
    /// Make a volume's layers one, attached or not: it needs no snapshot's data any more then.
    Flatten(rekey::FlattenArgs),
    /// Delete a volume and its data, unless it is attached.
    #[command(
        visible_alias = "rm",
        after_help = "\
Examples:
  sealblk volume delete db
  sealblk volume delete db --shred --json > receipt.json

Without its data key a volume's data is noise. --shred overwrites every wrapped copy of the data key in the store before
it removes it, and prints a receipt: what was destroyed, and what is outside its reach. Whoever kept a copy of
volume.json and can ask the KMS can still read a copy of the data: the receipt names the KMS key, and whether anything
else needs it."
    )]
    Delete(DeleteArgs),
    /// Make a volume larger.
    Resize(resize::ResizeArgs),
    /// Change limits, serial, queues and tags, which are kept with the volume.
    Modify(modify::ModifyArgs),
    /// Give a volume another name, attached or not.
    Rename(modify::RenameArgs),
    /// Give a volume tags.
    #[command(after_help = "Example:\n  sealblk volume tag db Name=db env=prod")]
    Tag(tag::TagArgs),
    /// Take tags away from a volume.
    #[command(after_help = "Example:\n  sealblk volume untag db env")]
    Untag(tag::UntagArgs),
}

/// What `volume list` takes.
#[derive(clap::Args)]
pub struct ListArgs {
    /// Only volumes of which this is so: id, name, status, encrypted, snapshot-id, tag-key, or tag:KEY. Of
    /// filters with one name any must be so, of others all.
    #[arg(long, value_name = "NAME=VALUE")]
    filter: Vec<Filter>,
    #[command(flatten)]
    sort: SortArgs,
}

/// What `volume delete` takes.
#[derive(clap::Args)]
pub struct DeleteArgs {
    #[command(flatten)]
    volume: OneVolume,
    /// Overwrite every wrapped copy of its data key, and print a receipt.
    #[arg(long, conflicts_with = "unreadable")]
    shred: bool,
    /// Give up a volume whose record cannot be read; it is named by its whole id. "sealblk gc" removes those
    /// of its layers that nothing else names.
    #[arg(long)]
    unreadable: bool,
    #[command(flatten)]
    giving: space::GivingArgs,
}

/// The filters of volumes, except for those of tags.
pub(super) const FILTERS: [&str; 5] = ["id", "name", "status", "encrypted", "snapshot-id"];

/// A command on one volume.
#[derive(clap::Args)]
pub struct OneVolume {
    /// The volume: its id, the first digits of its id, or its name.
    volume: String,
}

/// Runs one of the commands.
pub fn run(env: &Env, command: Command) -> Result<()> {
    match command {
        Command::Create(args) => create::run(env, &args),
        Command::Import(args) => import::run(env, &args),
        Command::Export(args) => export::run(env, &args),
        Command::List(args) => list(env, &args),
        Command::Show(args) => show::show(env, &args),
        Command::Rewrap(args) => rewrap::volume(env, &args),
        Command::Rekey(args) => rekey::rekey(env, &args),
        Command::Flatten(args) => rekey::flatten(env, &args),
        Command::Delete(args) => delete(env, &args),
        Command::Resize(args) => resize::run(env, &args),
        Command::Modify(args) => modify::modify(env, &args),
        Command::Rename(args) => modify::rename(env, &args),
        Command::Tag(args) => tag::tag(env, &args),
        Command::Untag(args) => tag::untag(env, &args),
    }
}

fn list(env: &Env, args: &ListArgs) -> Result<()> {
    let filters = args.filter.as_slice();
    filter::check(filters, &FILTERS)?;
    let catalog = env.catalog();
    let mut entries = catalog.list()?;
    let overview = Overview::of(&catalog, &entries)?;
    let keys = LastKnown(watch::last_known(&env.root));
    if !filters.is_empty() {
        let mut wanted = Vec::new();
        for entry in entries {
            if is_wanted(&catalog, &entry, filters)? {
                wanted.push(entry);
            }
        }
        entries = wanted;
    }
    args.sort.sort(&mut entries, |entry: &Entry| {
        let known = entry.metadata.as_ref().ok();
        let (size, created) = (known.map(|it| it.size()), known.map(|it| it.created()));
        Place { name: entry.name(), id: entry.id, size, created }
    });
    if env.json {
        let values = entries.iter().map(|e| match &e.metadata {
            Ok(metadata) => {
                let mut value = show::description(&catalog, metadata)?;
                add_space(&mut value, metadata.id(), &overview);
                // As with the column below, only where somebody has asked.
                for (n, key) in metadata.keys().iter().enumerate().filter(|_| !keys.0.is_empty()) {
                    value["keys"][n]["last_known"] = keys.json(key);
                }
                Ok(value)
            }
            Err(error) => Ok(json!({
                "id": e.id,
                "state": "damaged",
                "error": {"kind": error.kind().name(), "message": error.to_string()},
            })),
        });
        return output::print_json(&values.collect::<Result<Vec<Value>>>()?);
    }
    let head = ["ID", "NAME", "SIZE", "SECTOR", "ENCRYPTED", "STATE", "CREATED", "ON DISK"].map(String::from);
    let mut rows = vec![head.to_vec()];
    for entry in &entries {
        rows.push(row(&catalog, entry, &overview)?);
    }
    let metadata = || entries.iter().map(|entry| entry.metadata.as_ref().ok());
    // Columns that are empty in most stores are not there in these.
    if !keys.0.is_empty() {
        let cells = metadata().map(|metadata| metadata.map(|it| keys.words(it.keys())));
        add_column(&mut rows, "KEY", cells);
    }
    let limits = |id| {
        let kept = kept::limits(&catalog.attach_settings(id).ok()?);
        modify::limit_words(kept.iops, kept.throughput)
    };
    let limits: Vec<Option<String>> = metadata().map(|metadata| limits(metadata?.id())).collect();
    if limits.iter().any(Option::is_some) {
        add_column(&mut rows, "LIMITS", limits.into_iter());
    }
    output::print(&(output::table(&rows) + &sum(&overview))).map(drop)
}

/// Adds a column at the end: its head, and a cell for each row below.
fn add_column(rows: &mut [Vec<String>], head: &str, cells: impl Iterator<Item = Option<String>>) {
    let cells = cells.map(|cell| cell.unwrap_or_else(|| "-".into()));
    for (row, cell) in rows.iter_mut().zip(std::iter::once(head.to_owned()).chain(cells)) {
        row.push(cell);
    }
}

/// What KMSs have said last of keys, as "sealblk watch" has asked them.
struct LastKnown(BTreeMap<KeyName, Known>);

impl LastKnown {
    fn of(&self, key: &KeyRecord) -> Option<&Known> {
        let (provider, key_id) = (key.provider.clone(), key.wrapped.key_id.clone());
        self.0.get(&KeyName { provider, key_id })
    }

    fn json(&self, key: &KeyRecord) -> Value {
        self.of(key).map_or(Value::Null, |known| {
            json!({
                "state": known.state,
                "deletion": known.deletion,
                "message": known.message,
                "since": known.since,
                "checked": known.checked,
            })
        })
    }

    /// The worst state that one of these keys is in.
    fn words(&self, keys: &[KeyRecord]) -> String {
        let known: Option<Vec<&Known>> = keys.iter().map(|key| self.of(key)).collect();
        let Some(known) = known else { return "not asked yet".into() };
        let Some(worst) = known.into_iter().max_by_key(|known| known.state) else { return "-".into() };
        let deletion = worst.deletion.map_or(String::new(), |at| format!(", {at}"));
        format!("{}{deletion}", worst.state.words())
    }
}

/// What all volumes take, and may come to take, against the file system; nothing where there is none.
fn sum(overview: &Overview) -> String {
    let Overview { sizes, used, space, .. } = overview;
    let (Some(space), true) = (space, *sizes > 0) else { return String::new() };
    let about = size::about;
    let times = *sizes as f64 / space.size as f64;
    let overcommitted = if times > 1.0 { format!("; overcommitted {times:.1} times") } else { String::new() };
    format!(
        "\n{} in all volumes, {} on disk with their snapshots; the file system has {}, {} \
         free{overcommitted}\n",
        about(*sizes),
        about(*used),
        about(space.size),
        about(space.free),
    )
}

fn add_space(value: &mut Value, id: VolumeId, overview: &Overview) {
    let usage = overview.usage(id);
    value["space"] = json!({"own": usage.own, "shared": usage.shared});
    // Nothing that changes by itself: lists are compared.
    value["file_system"] = match &overview.space {
        Some(space) => json!({"size": space.size, "volumes": overview.sizes}),
        None => Value::Null,
    };
}

/// Whether a volume is one of those that `filters` mean.
pub(super) fn is_wanted(catalog: &Catalog, entry: &Entry, filters: &[Filter]) -> Result<bool> {
    let status = match entry.metadata {
        Ok(_) => show::state(&catalog.held(entry.id)?),
        Err(_) => "damaged",
    };
    let metadata = entry.metadata.as_ref().ok();
    let fields = [
        ("id", Some(entry.id.to_string())),
        ("name", entry.name().map(String::from)),
        ("status", Some(status.to_string())),
        ("encrypted", metadata.map(|m| m.is_encrypted().to_string())),
        ("snapshot-id", metadata.and_then(|m| m.origin()).map(|o| o.snapshot.to_string())),
    ];
    // A volume whose tags cannot be read has none.
    let tags = catalog.tags(entry.id).unwrap_or_default();
    Ok(filter::matches(filters, &fields, &tags))
}

fn row(catalog: &Catalog, entry: &Entry, overview: &Overview) -> Result<Vec<String>> {
    let id = entry.id.to_string();
    let none = || "-".to_string();
    let metadata = match &entry.metadata {
        Ok(metadata) => metadata,
        Err(e) => {
            log::warn!("{e}");
            return Ok(vec![id, none(), none(), none(), none(), "damaged".into(), none(), none()]);
        }
    };
    let usage = match overview.usage(entry.id) {
        Usage { own, shared: 0 } => size::about(own),
        Usage { own, shared } => format!("{} + {} shared", size::about(own), size::about(shared)),
    };
    Ok(vec![
        id,
        metadata.name().map_or_else(none, ToString::to_string),
        size::human(metadata.size()),
        metadata.sector_size().bytes().to_string(),
        yes_or_no(metadata.is_encrypted()).to_string(),
        show::state(&catalog.held(entry.id)?).to_string(),
        metadata.created().to_string(),
        usage,
    ])
}

fn yes_or_no(it: bool) -> &'static str {
    if it { "yes" } else { "no" }
}

fn delete(env: &Env, args: &DeleteArgs) -> Result<()> {
    let (store, id) = (env.store()?, env.catalog().resolve(&args.volume.volume)?);
    if args.shred {
        let receipt = delete::shred(&store.catalog(), &store.events(), id)?;
        return crate::cli::receipt::print(env, &receipt);
    }
    if args.unreadable {
        delete::delete_unreadable(&store.catalog(), &store.events(), id)?;
        return space::report_deleted(env, &id, None);
    }
    let layers = delete::delete(&store.catalog(), &store.events(), id)?;
    space::give_back_of_deleted(env, &store, &id, &layers, &args.giving)
}
