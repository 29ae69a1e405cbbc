//! `sealblk volume create`.
#![forbid(unsafe_code)]

use crate::backing::nbd::{Address, Image};
use crate::base::{Error, Kind, Result, size};
use crate::catalog::metadata::VolumeName;
use crate::catalog::tags::Tags;
use crate::cli::budget::SpaceArgs;
use crate::cli::filter::{self, Tag};
use crate::cli::progress::Progress;
use crate::cli::slots::AlsoArgs;
use crate::cli::snapshot::tell_that_unproved;
use crate::cli::volume::show::description;
use crate::cli::{Env, output};
use crate::crypt::SectorSize;
use crate::ops::Store;
use crate::ops::create::{self, NewVolume};
use crate::ops::device::Candidate;
use std::path::PathBuf;
use std::sync::Arc;

/// What `volume create` takes.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sealblk volume create --size 20GiB --name db
  sealblk volume create --size 100GiB --key alias/prod --sector-size 4096
  sealblk volume create --size 20GiB --key alias/near --also-key aws:alias/far
  sealblk volume create --snapshot snap-0a1b --size 40GiB
  sealblk volume create --snapshot snap-0a1b --own-data-key
  sealblk volume create --device /dev/disk/by-id/nvme-X --name fast
  sealblk volume create --device /dev/vg/db --wipe --name db
  sealblk volume create --nbd unix:/run/db.sock --name db
  sealblk volume create --rbd rbd/db --size 20GiB --name db

The data key is made and wrapped by the KMS key; nobody sees it. With --also-key other KMS keys wrap it as well, and any
of them gives it: a KMS that is down stops no attach. Prints the new volume's id. A volume from a
snapshot is there at once, whatever its size. Under the snapshot's KMS key it has the same data key; with
--own-data-key, or clone-data-key = \"own\" in the settings, what it writes is under one of its own, which no
other volume made from that snapshot has. With another --key it gets one of its own as well, and what the
snapshot holds is encrypted anew in the background while the volume is attached.

With --device the volume, or the top layer of one from a snapshot, lies on a block device and not in a file. It has to
be zeros, every byte of it, and is read to see that; --wipe makes it zeros. A device that is in use is refused in any
case. The first MiB holds a header, which makes the device complete in itself; docs/storage.md tells more.

With --nbd it lies behind an NBD server (nbdkit, qemu-nbd, …) on this host, in the same way. Nothing keeps others
from what is behind the server: this store has to be the only one that uses it.

With --rbd it lies in an RBD image of a Ceph cluster, which is made if it is not there, with 1 MiB more than --size for
the header; one that is there has to be zeros. One host at a time can write it, which Ceph sees to. docs/ceph.md tells
what the cluster has to be, and what becomes of a host that is cut off.")]
pub struct CreateArgs {
    /// Its size: a whole number and B, KiB, MiB, GiB, TiB, PiB (powers of 1024) or KB, MB, GB, TB, PB
    /// [default: what the device has room for, or the snapshot's].
    #[arg(long, value_name = "SIZE", value_parser = size::parse, required_unless_present_any = ["snapshot", "device", "nbd", "rbd"])]
    size: Option<u64>,
    /// Make it from this snapshot: its id, the first digits of its id, or its tag Name.
    #[arg(long, value_name = "SNAPSHOT")]
    snapshot: Option<String>,
    /// Bytes in a sector, of the guest's disk and of the cipher: 512 or 4096 [default: the snapshot's; 4096
    /// on a device with blocks of so many; else 512].
    #[arg(long, value_name = "BYTES", value_parser = parse_sector_size)]
    sector_size: Option<SectorSize>,
    /// The KMS key, by id, ARN or alias [default: the snapshot's, else the settings'
    /// default-key, else alias/aws/ebs].
    #[arg(long, value_name = "KEYREF", conflicts_with = "unencrypted")]
    key: Option<String>,
    #[command(flatten)]
    also: AlsoArgs,
    /// Of a volume from a snapshot: encrypt what it writes under a data key of its own, and not the
    /// snapshot's.
    #[arg(long, requires = "snapshot", conflicts_with = "unencrypted")]
    own_data_key: bool,
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
    /// The block device that it lies on, all of which is taken: a logical volume, a partition, a disk. Best
    /// by a name that lasts, as those in /dev/disk/by-id.
    #[arg(long, value_name = "DEVICE", conflicts_with = "preallocate")]
    device: Option<PathBuf>,
    /// The export of an NBD server that it lies on, all of which is taken: unix:/PATH[?export=NAME], or
    /// nbd+unix:///NAME?socket=/PATH.
    #[arg(long, value_name = "ADDRESS", conflicts_with_all = ["preallocate", "device"])]
    nbd: Option<Address>,
    /// The RBD image that it lies in, all of which is taken: POOL[/NAMESPACE]/IMAGE. With ?id=ID as another
    /// user of the cluster than sealblk; with conf=/PATH and keyring=/PATH by other files than those in
    /// /etc/ceph (?id=ID&conf=/PATH&keyring=/PATH).
    #[arg(long, value_name = "IMAGE", value_parser = Image::named, conflicts_with_all = ["preallocate", "device", "nbd"])]
    rbd: Option<Image>,
    /// Make the device, export or image zeros first: whatever it holds is lost. Interrupted and
    /// given again, it goes on.
    #[arg(long)]
    wipe: bool,
    #[command(flatten)]
    space: SpaceArgs,
}

impl CreateArgs {
    /// Whether this is there for a store in a pool, where each layer has an image that is made for it.
    pub(super) fn is_for_pools(&self) -> bool {
        let is_elsewhere = self.device.is_some() || self.nbd.is_some() || self.rbd.is_some();
        !is_elsewhere && !self.wipe && !self.preallocate
    }
}

/// Makes a volume, and prints what it is.
pub(crate) fn run(env: &Env, args: &CreateArgs) -> Result<()> {
    let (store, catalog) = (env.store()?, env.catalog());
    let mut tags = Tags::default();
    filter::set(&mut tags, &args.tag)?;
    let new = NewVolume {
        size: args.size,
        sector_size: args.sector_size,
        key: args.key.clone(),
        also: args.also.wanted(),
        unencrypted: args.unencrypted,
        own_data_key: args.own_data_key,
        name: args.name.clone(),
        tags,
        preallocate: args.preallocate,
        device: None,
        budget: args.space.budget(&store),
    };
    let snapshot =
        args.snapshot.as_deref().map(|name| catalog.load_snapshot(catalog.resolve_snapshot(name)?));
    let snapshot = snapshot.transpose()?;
    let size = args.size.or(snapshot.as_ref().map(|snapshot| snapshot.geometry().size()));
    let new = NewVolume { device: device(args, size)?, ..new };
    create::check(&store, &new, snapshot.as_ref())?;
    if let Some(snapshot) = &snapshot
        && !snapshot.is_encrypted()
        && create::has_own_key(&store, &new, Some(snapshot))
    {
        tell_that_unproved(snapshot);
    }
    if let Some(device) = &new.device {
        take(&store, device, args.wipe)?;
    }
    let made = create::create(&store, &new, snapshot.as_ref())?;
    match env.json {
        true => output::print_json(&description(&catalog, &made)?),
        false => output::print(&format!("{}\n", made.id())).map(drop),
    }
}

/// The device, export or image that the volume is to lie on, for so many bytes.
fn device(args: &CreateArgs, size: Option<u64>) -> Result<Option<Arc<Candidate>>> {
    let nbd = args.nbd.as_ref().map(|address| PathBuf::from(address.to_string()));
    let rbd = args.rbd.as_ref().map(|image| PathBuf::from(image.to_string()));
    match args.device.as_ref().or(nbd.as_ref()).or(rbd.as_ref()) {
        Some(path) => Ok(Some(Arc::new(Candidate::open_or_make(path, size)?))),
        None if args.wipe => Err(Error::new(Kind::Usage, "--wipe is for --device, --nbd or --rbd")),
        None => Ok(None),
    }
}

/// Sees to it that a device is zeros, with progress on a terminal.
pub(super) fn take(store: &Store, device: &Candidate, wipe: bool) -> Result<()> {
    let mut progress = Progress::new()?;
    let stopped = if wipe { "the same command goes on with it" } else { "nothing was changed" };
    let mut watch = |done, total| {
        let at = progress.at(done, total);
        at.map_err(|_| Error::new(Kind::Other, format!("it was interrupted; {stopped}")))
    };
    let done = device.make_zeros(&store.catalog(), wipe, &mut watch);
    drop(progress);
    done?;
    if !device.name().lasts() {
        output::tell(&format!(
            "{} may have another name after the next boot, and no name that lasts was found in /dev/disk: \
             the volume is attached only while that name means this device",
            device.name().path().display()
        ));
    }
    Ok(())
}

pub(super) fn parse_sector_size(text: &str) -> Result<SectorSize, String> {
    let bytes: u32 = text.parse().map_err(|_| "it is 512 or 4096".to_string())?;
    SectorSize::try_from(bytes)
}
