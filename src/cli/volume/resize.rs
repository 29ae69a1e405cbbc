//! `sealblk volume resize`.
#![forbid(unsafe_code)]

use super::output;
use super::show::description;
use crate::attach::sandbox;
use crate::cli::{Env, provider, size};
use crate::error::Result;
use crate::volume::resize;

/// What `volume resize` takes.
#[derive(clap::Args)]
#[command(after_help = "\
Example:
  sealblk volume resize db 40GiB

A volume can be made larger, not smaller. Detach it first. The guest's file system is made larger in the guest.")]
pub struct ResizeArgs {
    /// The volume: its id, the first digits of its id, or its name.
    volume: String,
    /// Its new size, as `volume create --size` takes it.
    #[arg(value_parser = size::parse)]
    size: u64,
}

/// Makes a volume larger.
pub fn run(env: &Env, args: &ResizeArgs) -> Result<()> {
    let (catalog, settings) = (env.catalog(), env.settings()?);
    let id = catalog.resolve(&args.volume)?;
    // This process sees the data keys, to seal the new size.
    sandbox::harden()?;
    let unwrap = provider::unwrap(env);
    let resized = resize::grow(&catalog, &env.events(&settings), id, args.size, &unwrap)?;
    match env.json {
        true => output::print_json(&description(&catalog, &resized)?),
        false => output::print(&format!("{id} has {}\n", size::human(resized.size()))).map(drop),
    }
}
