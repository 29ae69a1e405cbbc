//! `sealblk volume export` and `sealblk snapshot export`.
#![forbid(unsafe_code)]

use crate::base::{Result, size};
use crate::cli::Env;
use crate::cli::progress::Progress;
use crate::cli::volume::output;
use crate::image::Format;
use crate::ops::export::{self, Target, What};
use serde_json::json;
use std::path::PathBuf;

/// What `volume export` takes.
#[derive(clap::Args)]
#[command(after_help = "\
Example:
  sealblk volume export db /mnt/usb/db.img

The file holds the data in the clear: see where it goes. It takes the volume's data keys from the KMS, and the audit log
says so before anything is written. An attached volume is exported by way of a snapshot: sealblk snapshot export.")]
pub struct ExportArgs {
    /// The volume, which nobody has attached: its id, the first digits of its id, or its name.
    volume: String,
    #[command(flatten)]
    to: To,
}

/// Where an export goes.
#[derive(clap::Args)]
pub(crate) struct To {
    /// The file to be made, readable by its owner alone.
    file: PathBuf,
    /// How it is written: raw, sparse.
    #[arg(long, default_value = "raw", value_parser = parse_format)]
    format: Format,
    /// Replace a file of that name.
    #[arg(long)]
    force: bool,
}

/// Exports a volume.
pub(crate) fn run(env: &Env, args: &ExportArgs) -> Result<()> {
    export(env, What::Volume(env.catalog().resolve(&args.volume)?), &args.to)
}

/// Exports a volume or a snapshot.
pub(crate) fn export(env: &Env, what: What, to: &To) -> Result<()> {
    let mut progress = Progress::new()?;
    let target = Target { path: &to.file, replace: to.force };
    let bytes = export::export(&env.store()?, what, target, &mut |done, total| progress.at(done, total))?;
    drop(progress);
    let (file, format) = (to.file.display(), to.format);
    match env.json {
        true => output::print_json(&json!({
            "file": file.to_string(),
            "format": format.name(),
            "size": bytes,
        })),
        false => output::print(&format!("{file}: {} in the clear\n", size::human(bytes))).map(drop),
    }
}

fn parse_format(text: &str) -> Result<Format, String> {
    match text.parse()? {
        Format::Raw => Ok(Format::Raw),
        other => Err(format!("{other} is not written; \"qemu-img convert\" makes it of a raw file")),
    }
}
