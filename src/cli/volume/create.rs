//! `sealblk volume create`.
#![forbid(unsafe_code)]

use crate::base::{Error, Kind, Result};
use crate::catalog::metadata::{Geometry, SectorSize, VolumeName};
use crate::catalog::tags::Tags;
use crate::catalog::{Metadata, Snapshot};
use crate::cli::filter::{self, Tag};
use crate::cli::provider::{self, NamedKey};
use crate::cli::snapshot::tell_that_unproved;
use crate::cli::volume::output;
use crate::cli::volume::show::description;
use crate::cli::{Env, size};
use crate::config::Settings;
use crate::ops::clone::Keys;
use crate::ops::create::{self, Wanted};

/// What `volume create` takes.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sealblk volume create --size 20GiB --name db
  sealblk volume create --size 100GiB --key alias/prod --sector-size 4096
  sealblk volume create --snapshot snap-0a1b --size 40GiB

The data key is made and wrapped by the KMS key; nobody sees it. Prints the new volume's id. A volume from a snapshot is
there at once, whatever its size. Under the snapshot's KMS key it has the same data key; with another --key it gets one of
its own, and what the snapshot holds is encrypted anew in the background while the volume is attached.")]
pub struct CreateArgs {
    /// Its size: a whole number and B, KiB, MiB, GiB, TiB, PiB (powers of 1024) or KB, MB, GB, TB, PB [default: the
    /// snapshot's].
    #[arg(long, value_name = "SIZE", value_parser = size::parse, required_unless_present = "snapshot")]
    pub(in crate::cli) size: Option<u64>,
    /// Make it from this snapshot: its id, the first digits of its id, or its tag Name.
    #[arg(long, value_name = "SNAPSHOT")]
    pub(in crate::cli) snapshot: Option<String>,
    /// Bytes in a sector, of the guest's disk and of the cipher: 512 or 4096 [default: 512, or the snapshot's].
    #[arg(long, value_name = "BYTES", value_parser = parse_sector_size)]
    pub(in crate::cli) sector_size: Option<SectorSize>,
    /// The KMS key, by id, ARN or alias [default: the snapshot's, else the settings' default-key, else alias/aws/ebs].
    #[arg(long, value_name = "KEYREF", conflicts_with = "unencrypted")]
    pub(in crate::cli) key: Option<String>,
    /// Do not encrypt it. That never changes in the volume's life.
    #[arg(long)]
    pub(in crate::cli) unencrypted: bool,
    /// A name, to be used in place of the id.
    #[arg(long)]
    pub(in crate::cli) name: Option<VolumeName>,
    /// A tag; may be given several times.
    #[arg(long, value_name = "KEY=VALUE")]
    pub(in crate::cli) tag: Vec<Tag>,
    /// Set the whole size aside in the file system now.
    #[arg(long)]
    pub(in crate::cli) preallocate: bool,
}

/// Makes a volume, and prints what it is.
pub fn run(env: &Env, args: &CreateArgs) -> Result<()> {
    let made = create(env, &env.settings()?, args)?;
    match env.json {
        true => output::print_json(&description(&env.catalog(), &made)?),
        false => output::print(&format!("{}\n", made.id())).map(drop),
    }
}

/// Makes a volume.
pub fn create(env: &Env, settings: &Settings, args: &CreateArgs) -> Result<Metadata> {
    if args.unencrypted {
        check_may_be_unencrypted(env, settings)?;
    }
    let mut tags = Tags::default();
    filter::set(&mut tags, &args.tag)?;
    match &args.snapshot {
        Some(reference) => {
            let catalog = env.catalog();
            let snapshot = catalog.load_snapshot(catalog.resolve_snapshot(reference)?)?;
            from(env, settings, args, tags, &snapshot)
        }
        None => empty(env, settings, args, tags),
    }
}

/// # Errors
/// `Usage` if the settings say that every new volume is encrypted.
pub fn check_may_be_unencrypted(env: &Env, settings: &Settings) -> Result<()> {
    if !settings.encrypt_by_default {
        return Ok(());
    }
    let message = format!(
        "{} says encrypt-by-default: no unencrypted volume can be made; leave out --unencrypted",
        env.root.settings().display()
    );
    Err(Error::new(Kind::Usage, message))
}

fn wanted(args: &CreateArgs, tags: Tags, size: u64, sector_size: SectorSize) -> Result<Wanted> {
    let geometry = Geometry::new(args.size.unwrap_or(size), args.sector_size.unwrap_or(sector_size))?;
    Ok(Wanted { geometry, name: args.name.clone(), tags, preallocate: args.preallocate })
}

fn empty(env: &Env, settings: &Settings, args: &CreateArgs, tags: Tags) -> Result<Metadata> {
    let wanted = wanted(args, tags, 0, SectorSize::default())?;
    let (catalog, events) = (env.catalog(), env.events(settings));
    if args.unencrypted {
        return create::create(&catalog, &events, &wanted, None);
    }
    let key = NamedKey::open(env, settings, args.key.as_deref())?;
    create::create(&catalog, &events, &wanted, Some(key.wrapping()))
}

fn from(
    env: &Env,
    settings: &Settings,
    args: &CreateArgs,
    tags: Tags,
    snapshot: &Snapshot,
) -> Result<Metadata> {
    if args.unencrypted && snapshot.is_encrypted() {
        let message = format!(
            "{} is encrypted, and so is every volume that is made from it; leave out --unencrypted",
            snapshot.id()
        );
        return Err(Error::new(Kind::Usage, message));
    }
    let wanted = wanted(args, tags, snapshot.geometry().size(), snapshot.geometry().sector_size())?;
    // Without a wish, an encrypted snapshot's key; an unencrypted one's only where the settings let that be.
    let has_own_key = args.key.is_some() || (settings.encrypt_by_default && !snapshot.is_encrypted());
    let key = has_own_key.then(|| NamedKey::open(env, settings, args.key.as_deref())).transpose()?;
    if key.is_some() && !snapshot.is_encrypted() {
        tell_that_unproved(snapshot);
    }
    let (open_provider, unwrap) = (provider::open(env), provider::unwrap(env));
    let keys = Keys { open_provider: &open_provider, unwrap: &unwrap };
    let key = key.as_ref().map(NamedKey::wrapping);
    crate::ops::clone::create(&env.catalog(), &env.events(settings), &wanted, snapshot, key, keys)
}

pub(super) fn parse_sector_size(text: &str) -> Result<SectorSize, String> {
    let bytes: u32 = text.parse().map_err(|_| "it is 512 or 4096".to_string())?;
    SectorSize::try_from(bytes)
}
