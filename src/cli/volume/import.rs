//! `sealblk volume import`.
#![forbid(unsafe_code)]

use super::create::parse_sector_size;
use super::show::description;
use crate::base::{Result, size};
use crate::catalog::metadata::VolumeName;
use crate::catalog::tags::Tags;
use crate::cli::budget::SpaceArgs;
use crate::cli::filter::{self, Tag};
use crate::cli::progress::Progress;
use crate::cli::slots::AlsoArgs;
use crate::cli::{Env, output};
use crate::crypt::SectorSize;
use crate::image::{BackingFiles, Format};
use crate::ops::import::{self, Import, Input};
use std::path::PathBuf;

/// What `volume import` takes.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sealblk volume import debian.qcow2 --name web
  sealblk volume import /dev/vg/db --format raw --key alias/prod --size 40GiB
  sealblk volume import big.img --in-place --name big
  xz --decompress --stdout db.img.xz | sealblk volume import - --size 40GiB

The volume is there when all of the image is in it; interrupted, nothing is left. Zeros take no space. Prints
its id.

Without --format, a file is raw if it begins and ends like no other known format, and qcow2 if it begins so
and is called .qcow2; anything else is refused: the guest of a raw disk can write a qcow2 header into it. What
is compressed, an archive, or another program's image (VMDK, VHD, VHDX, VDI, ...) is refused with the command
that unpacks or converts it. Files that a qcow2 image is based on are read only with --backing-files: it could
name any file that you may read.

Standard input has a raw image. That of a pipe has exactly --size bytes: if it ends sooner, its writer may
have failed, and it is refused. A named pipe is not opened by its name, since its other end may be anybody, or
never come; the shell opens one: sealblk volume import - --size SIZE < PIPE.

An image that somebody has open for writing is refused, and so is a device that is mounted. Writers on other
machines, and whoever opens it later, are not seen before the copy is done; then it is refused if it was
changed.

--in-place takes no time: the raw image itself, which must lie on the store's file system, becomes the
volume's lowest layer, and its own name goes. It takes no space at first either, but what the image holds has
to fit once more: it is copied when it is encrypted. What the guest writes is encrypted from the
beginning; the rest is encrypted in the background while the volume is attached. The image's old blocks are
not overwritten on the medium: who must not leave plaintext there needs another medium, or one that was
encrypted before.")]
pub struct ImportArgs {
    /// The image: a file or block device, yours or root's, or "-" for standard input. It is only read, except
    /// with --in-place.
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
    #[command(flatten)]
    also: AlsoArgs,
    /// Do not encrypt it. That never changes in the volume's life.
    #[arg(long, conflicts_with = "also_key")]
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
    /// Do not copy a raw image, but take the file itself, which nobody has open for writing.
    #[arg(long, conflicts_with_all = ["unencrypted", "backing_files"])]
    in_place: bool,
    #[command(flatten)]
    space: SpaceArgs,
}

/// Makes a volume from an image.
pub(super) fn run(env: &Env, args: &ImportArgs) -> Result<()> {
    let mut tags = Tags::default();
    filter::set(&mut tags, &args.tag)?;
    let store = env.store()?;
    let import = Import {
        input: match args.file.as_os_str() == "-" {
            true => Input::StandardInput,
            false => Input::Path(args.file.clone()),
        },
        format: args.format,
        backing: if args.backing_files { BackingFiles::Read } else { BackingFiles::Refuse },
        size: args.size,
        sector_size: args.sector_size,
        key: args.key.clone(),
        also: args.also.wanted(),
        unencrypted: args.unencrypted,
        name: args.name.clone(),
        tags,
        preallocate: args.preallocate,
        budget: args.space.budget(&store),
    };
    let made = if args.in_place {
        import::in_place(&store, &import)?
    } else {
        let mut progress = Progress::new()?;
        import::copied(&store, &import, &mut |done, total| progress.at(done, total))?
    };
    match env.json {
        true => output::print_json(&description(&env.catalog(), &made)?),
        false => output::print(&format!("{}\n", made.id())).map(drop),
    }
}
