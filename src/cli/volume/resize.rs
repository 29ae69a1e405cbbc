//! `sealblk volume resize`.
#![forbid(unsafe_code)]

use super::show::description;
use crate::base::{Result, size};
use crate::cli::{Env, output};
use crate::ops::resize::{self, Resized};
use crate::vhost::gate::Told;
use serde_json::json;

/// What `volume resize` takes.
#[derive(clap::Args)]
#[command(after_help = "\
Example:
  sealblk volume resize db 40GiB

A volume can be made larger, not smaller, while it is attached, too: the guest then sees a larger disk at once if its VMM takes
the message (QEMU does), and otherwise when the VMM connects the next time. The file system on it is made larger in the
guest, by resize2fs or xfs_growfs.")]
pub struct ResizeArgs {
    /// The volume: its id, the first digits of its id, or its name.
    volume: String,
    /// Its new size, as `volume create --size` takes it.
    #[arg(value_parser = size::parse)]
    size: u64,
}

/// Makes a volume larger.
pub(crate) fn run(env: &Env, args: &ResizeArgs) -> Result<()> {
    let catalog = env.catalog();
    let id = catalog.resolve(&args.volume)?;
    let Resized { volume, told } = resize::resize(&env.store()?, id, args.size)?;
    if env.json {
        let mut value = description(&catalog, &volume)?;
        value["vmm"] = json!(told);
        return output::print_json(&value);
    }
    output::print(&format!("{id} has {}\n", size::human(volume.size())))?;
    if let Some(told) = told {
        output::tell(match told {
            Told::Confirmed => "the VMM was told, and has taken note",
            Told::Sent => "the VMM was told; it does not say what it made of it",
            Told::Refused => {
                "the VMM says that it cannot act on it: the guest sees it when the disk is plugged anew"
            }
            Told::Nobody => "no VMM could be told: the next to connect sees it",
        });
    }
    Ok(())
}
