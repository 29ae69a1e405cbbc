//! `sealblk volume adopt`.
#![forbid(unsafe_code)]

use super::show::description;
use crate::base::Result;
use crate::catalog::metadata::VolumeName;
use crate::cli::{Env, output};
use crate::helper::rbd;
use crate::ops::adopt::{self, Adopt};
use std::path::PathBuf;

/// What `volume adopt` takes.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sealblk volume adopt /dev/disk/by-id/nvme-X
  sealblk volume adopt /dev/vg/db --name db2
  sealblk volume adopt rbd:rbd/db

Takes a volume in that \"volume create --device\", \"--nbd\" or \"--rbd\" has made, on this host or on another one: everything that it takes is in
the device's header, except for the KMS that unwraps its data key. That KMS has to give the data key, and the data key has
to prove the record. From then on the store that had the volume is refused the device. Detach the volume there first: this
host cannot see whether another one writes to the device at this moment. Of an RBD image, it sees that, and is refused. A header that was put back shows an earlier state
of the volume's record, which nothing on the device can tell.

Interrupted and given again, it goes on. Prints the volume's id, which stays what it was.")]
pub struct AdoptArgs {
    /// The block device, the NBD export (unix:/PATH) or the RBD image (rbd:POOL/IMAGE).
    device: PathBuf,
    /// Take an RBD image from a host that still gives signs of life: Ceph does nothing for that one any more.
    #[arg(long)]
    break_lock: bool,
    /// The volume's name in this store [default: the name that it has].
    #[arg(long)]
    name: Option<VolumeName>,
    /// Take a volume that is not encrypted, of which nothing proves what it is.
    #[arg(long)]
    unencrypted: bool,
}

/// Takes a volume in.
pub(super) fn run(env: &Env, args: &AdoptArgs) -> Result<()> {
    rbd::set_break_lock(args.break_lock);
    let wanted = Adopt { device: &args.device, name: args.name.clone(), unencrypted: args.unencrypted };
    let volume = adopt::adopt(&env.store()?, &wanted)?;
    match env.json {
        true => output::print_json(&description(&env.catalog(), &volume)?),
        false => output::print(&format!("{}\n", volume.id())).map(drop),
    }
}
