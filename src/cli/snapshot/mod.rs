//! `sealblk snapshot`: make, list, show, tag, rewrap and delete snapshots, and have them in places outside.
#![forbid(unsafe_code)]

mod copy;
mod create;
mod outside;

use crate::base::{Context, Error, Kind, Result, size};
use crate::catalog::Catalog;
use crate::catalog::snapshot::{Entry, Snapshot};
use crate::catalog::tags::Tags;
use crate::cli::filter::{self, Filter, Tag};
use crate::cli::place::PlaceArgs;
use crate::cli::sort::{Place, SortArgs};
use crate::cli::volume::{export, show};
use crate::cli::{Env, output, rewrap, slots, space};
use crate::ops::delete;
use crate::ops::export::What;
use crate::ops::usage;
use serde_json::{Value, json};

/// The commands.
#[derive(clap::Subcommand)]
pub enum Command {
    /// Make a snapshot of a volume, which takes the same short time whatever the volume's size.
    Create(create::CreateArgs),
    /// List the snapshots, or those of a place outside.
    #[command(
        visible_alias = "ls",
        after_help = "\
Examples:
  sealblk snapshot list --json
  sealblk snapshot list --sort created --reverse
  sealblk snapshot list --filter volume-id=vol-0123456789abcdef0 --filter tag:Name=nightly
  sealblk snapshot list s3://bucket/prefix

What a place outside says is not proved by this: \"known\" is what this host has pushed, pulled or verified there, \"claimed\" is
what it has not seen, and \"missing\" what it has seen and is not listed. \"snapshot verify\" proves it."
    )]
    List(ListArgs),
    /// Show one snapshot.
    #[command(after_help = "Example:\n  sealblk snapshot show snap-0a1b")]
    Show(OneSnapshot),
    /// Copy a snapshot.
    Copy(copy::CopyArgs),
    /// Bring a snapshot to a place outside, as ciphertext: a folder or an object store.
    Push(outside::PushArgs),
    /// Make a snapshot of what a place outside has.
    Pull(outside::PullArgs),
    /// Have everything come now of a snapshot that was pulled with --lazy.
    Complete(outside::CompleteArgs),
    /// Read the snapshots of a place outside back, and prove every block.
    Verify(outside::VerifyArgs),
    /// Remove snapshots from a place outside.
    Remove(outside::RemoveArgs),
    /// Write what a snapshot holds into a file, in the clear.
    Export(ExportArgs),
    /// The KMS keys that wrap a snapshot's data keys, any of which gives them: add, remove, list.
    #[command(subcommand, after_help = "Example:\n  sealblk snapshot key add snap-0a1b --key alias/spare")]
    Key(slots::SnapshotCommand),
    /// Wrap the data keys of a snapshot by another KMS key.
    Rewrap(rewrap::RewrapSnapshotArgs),
    /// Delete a snapshot, and give back the space that it alone needed.
    #[command(
        visible_alias = "rm",
        after_help = "\
Examples:
  sealblk snapshot delete snap-0a1b
  sealblk snapshot delete snap-0a1b --later

What other snapshots and volumes need of it stays. What layers above have as well, wherever its layers are used, is given
back; layers that nothing tells apart any more are merged, in the direction that moves less. Volumes stay attached
meanwhile. It may be interrupted at any moment: the snapshot is deleted first, and \"sealblk gc\" goes on with the
rest."
    )]
    Delete(DeleteArgs),
    /// Give a snapshot tags.
    #[command(after_help = "Example:\n  sealblk snapshot tag snap-0a1b Name=nightly")]
    Tag(TagArgs),
    /// Take tags away from a snapshot.
    #[command(after_help = "Example:\n  sealblk snapshot untag snap-0a1b env")]
    Untag(UntagArgs),
}

/// What `snapshot list` takes.
#[derive(clap::Args)]
pub struct ListArgs {
    /// A place outside: file:///FOLDER, s3://BUCKET/PREFIX, az:// or gs:// [default: this store].
    #[arg(value_name = "PLACE", conflicts_with_all = ["filter", "sort", "reverse"])]
    place: Option<String>,
    #[command(flatten)]
    how: PlaceArgs,
    /// Only snapshots of which this is so: id, volume-id, status, encrypted, description, tag-key, or
    /// tag:KEY. Of filters with one name any must be so, of others all.
    #[arg(long, value_name = "NAME=VALUE")]
    filter: Vec<Filter>,
    #[command(flatten)]
    sort: SortArgs,
}

/// A command on one snapshot.
#[derive(clap::Args)]
pub struct OneSnapshot {
    /// The snapshot: its id, the first digits of its id, or its tag Name.
    snapshot: String,
}

/// What `snapshot delete` takes.
#[derive(clap::Args)]
pub struct DeleteArgs {
    #[command(flatten)]
    snapshot: OneSnapshot,
    /// Give up a snapshot whose record cannot be read; it is named by its whole id. "sealblk gc" removes
    /// those of its layers that nothing else names.
    #[arg(long, conflicts_with_all = ["later", "rate"])]
    unreadable: bool,
    #[command(flatten)]
    giving: space::GivingArgs,
}

/// What `snapshot export` takes.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sealblk snapshot export snap-0a1b /mnt/usb/db.img
  sealblk snapshot export snap-0a1b - | zstd > db.img.zst

The file holds the data in the clear: see where it goes. It takes the snapshot's data keys from the KMS, and the audit log
says so before anything is written. Where it can go, and how, is the same as for \"sealblk volume export\".")]
pub struct ExportArgs {
    /// The snapshot: its id, the first digits of its id, or its tag Name.
    snapshot: String,
    #[command(flatten)]
    to: export::To,
}

/// What `snapshot tag` takes.
#[derive(clap::Args)]
pub struct TagArgs {
    /// The snapshot: its id, the first digits of its id, or its tag Name.
    snapshot: String,
    /// The tags; those that are there get another value.
    #[arg(value_name = "KEY=VALUE", required = true)]
    tags: Vec<Tag>,
}

/// What `snapshot untag` takes.
#[derive(clap::Args)]
pub struct UntagArgs {
    /// The snapshot: its id, the first digits of its id, or its tag Name.
    snapshot: String,
    /// The tags' keys.
    #[arg(value_name = "KEY", required = true)]
    keys: Vec<String>,
}

impl Command {
    /// Whether it is there for a store in a pool.
    pub(super) fn is_for_pools(&self) -> bool {
        match self {
            Command::Create(_) | Command::List(_) | Command::Show(_) => true,
            Command::Delete(_) | Command::Tag(_) | Command::Untag(_) => true,
            Command::Export(_) | Command::Key(_) | Command::Rewrap(_) => true,
            Command::Copy(_)
            | Command::Push(_)
            | Command::Pull(_)
            | Command::Complete(_)
            | Command::Verify(_)
            | Command::Remove(_) => false,
        }
    }
}

/// Runs one of the commands.
pub fn run(env: &Env, command: Command) -> Result<()> {
    match command {
        Command::Create(args) => create::run(env, args),
        Command::Copy(args) => copy::run(env, args),
        Command::Push(args) => outside::push(env, &args),
        Command::Pull(args) => outside::pull(env, &args),
        Command::Complete(args) => outside::complete(env, &args),
        Command::Verify(args) => outside::verify(env, &args),
        Command::Remove(args) => outside::remove(env, &args),
        Command::List(args) => list(env, &args),
        Command::Show(args) => show(env, &args.snapshot),
        Command::Export(args) => {
            let id = env.catalog().resolve_snapshot(&args.snapshot)?;
            export::export(env, What::Snapshot(id), &args.to)
        }
        Command::Key(command) => slots::snapshot(env, command),
        Command::Rewrap(args) => rewrap::snapshot(env, &args),
        Command::Delete(args) => remove(env, &args),
        Command::Tag(args) => retag(env, &args.snapshot, |tags| filter::set(tags, &args.tags)),
        Command::Untag(args) => retag(env, &args.snapshot, |tags| filter::remove(tags, &args.keys)),
    }
}

fn list(env: &Env, args: &ListArgs) -> Result<()> {
    match &args.place {
        Some(place) => return outside::list(env, place, &args.how),
        None if args.how.are_given() => {
            let message = "--endpoint and --region go with a place outside: s3://BUCKET/PREFIX";
            return Err(Error::new(Kind::Usage, message));
        }
        None => {}
    }
    let filters = args.filter.as_slice();
    filter::check(filters, &["id", "volume-id", "status", "encrypted", "description"])?;
    let catalog = env.catalog();
    let mut entries = catalog.snapshots()?;
    entries.retain(|entry| is_wanted(&catalog, entry, filters));
    args.sort.sort(&mut entries, |entry: &Entry| {
        let known = entry.snapshot.as_ref().ok();
        let (size, created) = (known.map(|it| it.geometry().size()), known.map(|it| it.created()));
        Place { name: entry.name(), id: entry.id, size, created }
    });
    if env.json {
        let values = entries.iter().map(|e| match &e.snapshot {
            Ok(snapshot) => description(&catalog, snapshot),
            Err(error) => json!({
                "id": e.id,
                "state": "damaged",
                "error": {"kind": error.kind().name(), "message": error.to_string()},
            }),
        });
        return output::print_json(&values.collect::<Vec<Value>>());
    }
    let head = ["ID", "NAME", "VOLUME", "SIZE", "ENCRYPTED", "STATE", "CREATED"].map(String::from);
    let mut rows = vec![head.to_vec()];
    rows.extend(entries.iter().map(|entry| row(&catalog, entry)));
    output::print(&output::table(&rows)).map(drop)
}

/// EBS knows `pending`, of a snapshot of which not everything is there yet.
fn state(catalog: &Catalog, snapshot: &Snapshot) -> &'static str {
    match catalog.coming_of(snapshot.layers()).is_empty() {
        true => "completed",
        false => "coming",
    }
}

fn is_wanted(catalog: &Catalog, entry: &Entry, filters: &[Filter]) -> bool {
    let snapshot = entry.snapshot.as_ref().ok();
    let fields = [
        ("id", Some(entry.id.to_string())),
        ("volume-id", snapshot.map(|s| s.volume().to_string())),
        ("status", Some(snapshot.map_or("damaged", |it| state(catalog, it)).to_string())),
        ("encrypted", snapshot.map(|s| s.is_encrypted().to_string())),
        ("description", snapshot.map(|s| s.label().description.clone())),
    ];
    let none = Tags::default();
    filter::matches(filters, &fields, snapshot.map_or(&none, |s| &s.label().tags))
}

fn row(catalog: &Catalog, entry: &Entry) -> Vec<String> {
    let id = entry.id.to_string();
    let none = || "-".to_string();
    match &entry.snapshot {
        Ok(snapshot) => vec![
            id,
            entry.name().map_or_else(none, String::from),
            snapshot.volume().to_string(),
            size::human(snapshot.geometry().size()),
            if snapshot.is_encrypted() { "yes" } else { "no" }.to_string(),
            state(catalog, snapshot).to_string(),
            snapshot.created().to_string(),
        ],
        Err(e) => {
            log::warn!("{e}");
            vec![id, none(), none(), none(), none(), "damaged".into(), none()]
        }
    }
}

fn show(env: &Env, reference: &str) -> Result<()> {
    let catalog = env.catalog();
    let snapshot = catalog.load_snapshot(catalog.resolve_snapshot(reference)?)?;
    let layers = usage::of_layers(&catalog, &snapshot.id(), snapshot.layers())?;
    if env.json {
        let mut value = description(&catalog, &snapshot);
        space::add_layers(&mut value, &layers);
        return output::print_json(&value);
    }
    let pair = |name: &str, value: String| vec![name.to_string(), value];
    let bytes = snapshot.geometry().size();
    let mut rows = vec![
        pair("id", snapshot.id().to_string()),
        pair("description", snapshot.label().description.clone()),
        pair("volume", snapshot.volume().to_string()),
        pair("size", format!("{} ({bytes} bytes)", size::human(bytes))),
        pair("sector size", format!("{} bytes", snapshot.geometry().sector_size().bytes())),
        pair("encrypted", if snapshot.is_encrypted() { "yes" } else { "no" }.to_string()),
    ];
    rows.extend(snapshot.copy_of().map(|id| pair("copy of", id.to_string())));
    for key in snapshot.keys() {
        for (m, slot) in key.slots().iter().enumerate() {
            let name = if m == 0 { "key" } else { "also" };
            rows.push(pair(name, format!("{}: {}", slot.provider, slot.wrapped.key_id)));
        }
    }
    for (layer, usage) in snapshot.layers().iter().zip(&layers) {
        rows.push(pair("layer", catalog.shown_place(layer.id).display().to_string()));
        rows.push(pair("", space::layer_words(usage)));
    }
    let far = catalog.how_far(snapshot.layers());
    rows.extend(far.map(|far| {
        let words = show::coming_words(&far);
        pair(
            "coming",
            format!("{words}; \"sealblk snapshot complete {}\" brings the rest now", snapshot.id()),
        )
    }));
    rows.extend(snapshot.label().tags.iter().map(|(key, value)| pair("tag", format!("{key}={value}"))));
    rows.push(pair("created", snapshot.created().to_string()));
    rows.extend(catalog.check_snapshot(&snapshot).err().map(|problem| pair("problem", problem.to_string())));
    output::print(&output::table(&rows)).map(drop)
}

fn remove(env: &Env, args: &DeleteArgs) -> Result<()> {
    let catalog = env.catalog();
    let id = catalog.resolve_snapshot(&args.snapshot.snapshot)?;
    if args.unreadable {
        delete::delete_unreadable_snapshot(&catalog, id)?;
        return space::report_deleted(env, &id, None);
    }
    let store = env.store()?;
    let layers = delete::delete_snapshot(&store.catalog(), id)?;
    space::give_back_of_deleted(env, &store, &id, &layers, &args.giving)
}

fn retag(env: &Env, reference: &str, change: impl FnOnce(&mut Tags) -> Result<()>) -> Result<()> {
    let catalog = env.catalog();
    let id = catalog.resolve_snapshot(reference)?;
    let snapshot = catalog.retag_snapshot(id, change).context(|| format!("tag {id}"))?;
    let tags = &snapshot.label().tags;
    if env.json {
        return output::print_json(&json!({"id": id, "tags": tags}));
    }
    let lines: String = tags.iter().map(|(key, value)| format!("{key}={value}\n")).collect();
    output::print(&lines).map(drop)
}

/// A snapshot in JSON; nothing in it is secret, and the wrapped keys are left out all the same.
/// Tells whoever has something encrypted made of a snapshot that is not: its record has no seal.
pub(super) fn tell_that_unproved(snapshot: &Snapshot) {
    let id = snapshot.id();
    output::tell(&format!("{id} is not encrypted: nothing proves what it holds, and it is taken as it is"));
}

fn description(catalog: &Catalog, snapshot: &Snapshot) -> Value {
    let keys: Vec<Value> = snapshot.keys().iter().map(slots::key_json).collect();
    let layers = snapshot.layers().iter().map(|layer| {
        let path = catalog.shown_place(layer.id).display().to_string();
        json!({"id": layer.id, "key": layer.key, "masked": layer.masked, "size": layer.size, "path": path})
    });
    json!({
        "id": snapshot.id(),
        "description": snapshot.label().description,
        "volume_id": snapshot.volume(),
        "copy_of": snapshot.copy_of(),
        "size": snapshot.geometry().size(),
        "sector_size": snapshot.geometry().sector_size(),
        "encrypted": snapshot.is_encrypted(),
        "created": snapshot.created(),
        "state": state(catalog, snapshot),
        "coming": catalog.how_far(snapshot.layers()),
        "tags": snapshot.label().tags,
        "keys": keys,
        "layers": layers.collect::<Vec<Value>>(),
        "problem": catalog.check_snapshot(snapshot).err().map(|e| e.to_string()),
    })
}
