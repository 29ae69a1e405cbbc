//! `sealblk volume import`.
#![forbid(unsafe_code)]

use crate::base::{Error, Kind, Result};
use crate::catalog::metadata::{Geometry, SectorSize, VolumeName};
use crate::catalog::tags::Tags;
use crate::catalog::{Catalog, Metadata};
use crate::cli::filter::{self, Tag};
use crate::cli::progress::Progress;
use crate::cli::provider::{self, NamedKey};
use crate::cli::volume::create::{check_may_be_unencrypted, parse_sector_size};
use crate::cli::volume::output;
use crate::cli::volume::show::description;
use crate::cli::{Env, size};
use crate::config::Settings;
use crate::image::{BackingFiles, Format, Image};
use crate::ops::create::Wanted;
use crate::ops::import::{self, Key};
use crate::ops::import_in_place::Candidate;
use std::path::PathBuf;

/// What `volume import` takes.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sealblk volume import debian.qcow2 --name web
  sealblk volume import /dev/vg/db --format raw --key alias/prod --size 40GiB
  sealblk volume import big.img --in-place --name big

The volume is there when all of the image is in it; interrupted, nothing is left. Zeros take no space. Prints its id.

Without --format, a file is raw if it begins like no other known format, and qcow2 if it begins so and is called .qcow2;
anything else is refused: the guest of a raw disk can write a qcow2 header into it. Files that a qcow2 image is based on
are read only with --backing-files: it could name any file that you may read.

--in-place takes no time and no space: the raw image itself, which must lie on the store's file system, becomes the
volume's lowest layer, and its own name goes. What the guest writes is encrypted from the beginning; the rest is encrypted
in the background while the volume is attached. The image's old blocks are not overwritten on the medium: who must not
leave plaintext there needs another medium, or one that was encrypted before.")]
pub struct ImportArgs {
    /// The image: a file or block device, yours or root's. It is only read, but for --in-place.
    file: PathBuf,
    /// What it is: raw or qcow2.
    #[arg(long)]
    format: Option<Format>,
    /// Read the files that a qcow2 image says it is based on.
    #[arg(long)]
    backing_files: bool,
    /// The volume's size, not smaller than the image's [default: the image's, whole sectors].
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    size: Option<u64>,
    /// Bytes in a sector, of the guest's disk and of the cipher: 512 or 4096 [default: 512].
    #[arg(long, value_name = "BYTES", value_parser = parse_sector_size)]
    sector_size: Option<SectorSize>,
    /// The KMS key, by id, ARN or alias [default: the settings' default-key, else alias/aws/ebs].
    #[arg(long, value_name = "KEYREF", conflicts_with = "unencrypted")]
    key: Option<String>,
    /// Do not encrypt it. That never changes in the volume's life.
    #[arg(long)]
    unencrypted: bool,
    /// A name, to be used in place of the id.
    #[arg(long)]
    name: Option<VolumeName>,
    /// A tag; may be given several times.
    #[arg(long, value_name = "KEY=VALUE")]
    tag: Vec<Tag>,
    /// Set the whole size aside in the file system now.
    #[arg(long)]
    preallocate: bool,
    /// Do not copy a raw image, but take the file itself.
    #[arg(long, conflicts_with_all = ["unencrypted", "backing_files"])]
    in_place: bool,
}

/// Makes a volume from an image.
pub fn run(env: &Env, args: &ImportArgs) -> Result<()> {
    let (settings, catalog) = (env.settings()?, env.catalog());
    if args.unencrypted {
        check_may_be_unencrypted(env, &settings)?;
    }
    let import = if args.in_place { in_place } else { copied };
    let made = import(env, &settings, &catalog, args)
        .map_err(|e| e.context(format!("import {}", args.file.display())))?;
    match env.json {
        true => output::print_json(&description(&catalog, &made)?),
        false => output::print(&format!("{}\n", made.id())).map(drop),
    }
}

fn copied(env: &Env, settings: &Settings, catalog: &Catalog, args: &ImportArgs) -> Result<Metadata> {
    let backing = if args.backing_files { BackingFiles::Read } else { BackingFiles::Refuse };
    let image = Image::open(&args.file, args.format, backing)?;
    let wanted = wanted(args, image.size())?;
    let events = env.events(settings);
    let mut progress = Progress::new()?;
    let mut watch = |done, total| progress.at(done, total);
    if args.unencrypted {
        return import::import(catalog, &events, &wanted, &image, None, &mut watch);
    }
    let named = NamedKey::open(env, settings, args.key.as_deref())?;
    let unwrap = provider::unwrap(env);
    let key = Key { wrapping: named.wrapping(), unwrap: &unwrap };
    import::import(catalog, &events, &wanted, &image, Some(key), &mut watch)
}

fn in_place(env: &Env, settings: &Settings, catalog: &Catalog, args: &ImportArgs) -> Result<Metadata> {
    let image = Image::open(&args.file, args.format, BackingFiles::Refuse)?;
    let size = image.size();
    let offered = image.into_raw()?;
    let wanted = wanted(args, size)?;
    let candidate = Candidate::new(catalog, offered)?;
    let named = NamedKey::open(env, settings, args.key.as_deref())?;
    let unwrap = provider::unwrap(env);
    let key = Key { wrapping: named.wrapping(), unwrap: &unwrap };
    crate::ops::import_in_place::import(catalog, &env.events(settings), &wanted, &candidate, key)
}

fn wanted(args: &ImportArgs, len: u64) -> Result<Wanted> {
    let sector_size = args.sector_size.unwrap_or_default();
    let least = import::size_of(len, sector_size);
    let size = args.size.unwrap_or(least);
    if size < least {
        let message = format!("the image is a disk of {len} bytes; the volume has to have {least} at least");
        return Err(Error::new(Kind::Usage, message));
    }
    let geometry = Geometry::new(size, sector_size)?;
    if args.size.is_none() && size != len {
        log::warn!("the image has {len} bytes; the volume has {size}, whole sectors, with zeros at its end");
    }
    let mut tags = Tags::default();
    filter::set(&mut tags, &args.tag)?;
    Ok(Wanted { geometry, name: args.name.clone(), tags, preallocate: args.preallocate })
}
