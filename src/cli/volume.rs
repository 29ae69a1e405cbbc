//! `sealblk volume`: make, list, show, rewrap and delete volumes.
#![forbid(unsafe_code)]

mod rewrap;
mod show;

use super::{Env, output, size};
use crate::error::{Error, Kind, Result};
use crate::kms::{self, KeyRef};
use crate::volume::VolumeId;
use crate::volume::catalog::{Catalog, Entry};
use crate::volume::lifecycle::{self, Wanted, WrappingKey};
use crate::volume::metadata::{Geometry, SectorSize, VolumeName};
use serde_json::{Value, json};

/// The commands.
#[derive(clap::Subcommand)]
pub enum Command {
    /// Make a volume.
    #[command(after_help = "\
Examples:
  sealblk volume create --size 20GiB --name db
  sealblk volume create --size 100GiB --key alias/prod --sector-size 4096

The data key is made and wrapped by the KMS key; nobody sees it. Prints the new volume's id.")]
    Create(CreateArgs),
    /// List the volumes.
    #[command(after_help = "Example:\n  sealblk volume list --json")]
    List,
    /// Show one volume: what it is, who has it attached, and what its next attach needs.
    Show(show::ShowArgs),
    /// Wrap a volume's data key by another KMS key, or by the newest version of the same one.
    Rewrap(rewrap::RewrapArgs),
    /// Delete a volume and its data, unless it is attached.
    #[command(after_help = "Example:\n  sealblk volume delete db")]
    Delete(OneVolume),
}

/// What `volume create` takes.
#[derive(clap::Args)]
pub struct CreateArgs {
    /// Its size: a whole number and B, KiB, MiB, GiB, TiB, PiB (powers of 1024) or KB, MB, GB, TB, PB.
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    size: u64,
    /// Bytes in a sector, of the guest's disk and of the cipher: 512 or 4096.
    #[arg(long, value_name = "BYTES", default_value = "512", value_parser = parse_sector_size)]
    sector_size: SectorSize,
    /// The KMS key, by id, ARN or alias [default: the settings' default-key, else alias/aws/ebs].
    #[arg(long, value_name = "KEYREF", conflicts_with = "unencrypted")]
    key: Option<String>,
    /// Do not encrypt it. That never changes in the volume's life.
    #[arg(long)]
    unencrypted: bool,
    /// A name, to be used in place of the id.
    #[arg(long)]
    name: Option<VolumeName>,
    /// Set the whole size aside in the file system now.
    #[arg(long)]
    preallocate: bool,
}

/// A command on one volume.
#[derive(clap::Args)]
pub struct OneVolume {
    /// The volume: its id, the first digits of its id, or its name.
    volume: String,
}

/// Runs one of the commands.
pub fn run(env: &Env, command: Command) -> Result<()> {
    match command {
        Command::Create(args) => create(env, args),
        Command::List => list(env),
        Command::Show(args) => show::show(env, &args),
        Command::Rewrap(args) => rewrap::run(env, &args),
        Command::Delete(args) => delete(env, &args.volume),
    }
}

fn create(env: &Env, args: CreateArgs) -> Result<()> {
    let settings = env.settings()?;
    if args.unencrypted && settings.encrypt_by_default {
        let message = format!(
            "{} says encrypt-by-default: no unencrypted volume can be made; leave out --unencrypted",
            env.root.settings().display()
        );
        return Err(Error::new(Kind::Usage, message));
    }
    let geometry = Geometry::new(args.size, args.sector_size)?;
    let wanted = Wanted { geometry, name: args.name, preallocate: args.preallocate };
    let (catalog, events) = (env.catalog(), env.events(&settings));
    let made = if args.unencrypted {
        lifecycle::create(&catalog, &events, &wanted, None)?
    } else {
        let key = args.key.unwrap_or(settings.default_key.clone());
        let reference = KeyRef::parse(&key, &settings.locality()).map_err(|e| e.with_advice(&key))?;
        let provider = kms::open_provider(&env.root, reference.provider.as_str())?;
        let key = WrappingKey { provider: &*provider, key: &reference.key };
        lifecycle::create(&catalog, &events, &wanted, Some(key))?
    };
    match env.json {
        true => output::print_json(&show::description(&catalog, &made)?),
        false => output::print(&format!("{}\n", made.id())).map(drop),
    }
}

fn list(env: &Env) -> Result<()> {
    let catalog = env.catalog();
    let entries = catalog.list()?;
    if env.json {
        let values = entries.iter().map(|e| match &e.metadata {
            Ok(metadata) => show::description(&catalog, metadata),
            Err(error) => Ok(json!({
                "id": e.id,
                "state": "damaged",
                "error": {"kind": error.kind().name(), "message": error.to_string()},
            })),
        });
        return output::print_json(&values.collect::<Result<Vec<Value>>>()?);
    }
    let head = ["ID", "NAME", "SIZE", "SECTOR", "ENCRYPTED", "STATE", "CREATED"].map(String::from);
    let mut rows = vec![head.to_vec()];
    for entry in &entries {
        rows.push(row(&catalog, entry)?);
    }
    output::print(&output::table(&rows)).map(drop)
}

fn row(catalog: &Catalog, entry: &Entry) -> Result<Vec<String>> {
    let id = entry.id.to_string();
    let none = || "-".to_string();
    let metadata = match &entry.metadata {
        Ok(metadata) => metadata,
        Err(e) => {
            log::warn!("{e}");
            return Ok(vec![id, none(), none(), none(), none(), "damaged".into(), none()]);
        }
    };
    Ok(vec![
        id,
        metadata.name().map_or_else(none, ToString::to_string),
        size::human(metadata.size()),
        metadata.sector_size().bytes().to_string(),
        yes_or_no(metadata.is_encrypted()).to_string(),
        show::state(&catalog.held(entry.id)?).to_string(),
        metadata.created().to_string(),
    ])
}

fn yes_or_no(it: bool) -> &'static str {
    if it { "yes" } else { "no" }
}

fn delete(env: &Env, reference: &str) -> Result<()> {
    let (catalog, events) = (env.catalog(), env.events(&env.settings()?));
    let id: VolumeId = catalog.resolve(reference)?;
    lifecycle::delete(&catalog, &events, id)?;
    match env.json {
        true => output::print_json(&json!({"id": id, "state": "deleted"})),
        false => output::print(&format!("{id} deleted\n")).map(drop),
    }
}

fn parse_sector_size(text: &str) -> Result<SectorSize, String> {
    let bytes: u32 = text.parse().map_err(|_| "it is 512 or 4096".to_string())?;
    SectorSize::try_from(bytes)
}
