//! `sealblk volume resize`.
#![forbid(unsafe_code)]

use crate::base::Result;
use crate::catalog::lock::{Held, Holder, Purpose};
use crate::catalog::{Metadata, VolumeId};
use crate::cli::volume::output;
use crate::cli::volume::show::description;
use crate::cli::{Env, provider, size};
use crate::host::control;
use crate::kms::Failure;
use crate::ops::resize;
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
pub fn run(env: &Env, args: &ResizeArgs) -> Result<()> {
    let catalog = env.catalog();
    let id = catalog.resolve(&args.volume)?;
    let (resized, told) = resize(env, id, args.size)?;
    if env.json {
        let mut value = description(&catalog, &resized)?;
        value["vmm"] = json!(told);
        return output::print_json(&value);
    }
    output::print(&format!("{id} has {}\n", size::human(resized.size())))?;
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

/// Makes a volume larger. Answers what is known of it then and, of an attached one that was smaller, who was told.
pub fn resize(env: &Env, id: VolumeId, size: u64) -> Result<(Metadata, Option<Told>)> {
    let (catalog, settings) = (env.catalog(), env.settings()?);
    let unwrap = provider::unwrap(env);
    let mut told = None;
    let resized = resize::grow(&catalog, &env.events(&settings), id, size, || match catalog.held(id)? {
        Held::By(Holder { purpose: Purpose::Attach, .. }) => {
            told = Some(control::resize(&catalog, id, size)?);
            Ok::<_, Failure>(())
        }
        _ => resize::detached(&catalog, id, size, &unwrap),
    })?;
    Ok((resized, told))
}
