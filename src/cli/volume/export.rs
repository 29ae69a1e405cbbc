//! `sealblk volume export` and `sealblk snapshot export`.
#![forbid(unsafe_code)]

use crate::base::{Result, size};
use crate::cli::Env;
use crate::cli::budget::SpaceArgs;
use crate::cli::output;
use crate::cli::progress::Progress;
use crate::image::Format;
use crate::ops::export::{self, Target, What};
use serde_json::json;
use std::path::PathBuf;

/// What `volume export` takes.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sealblk volume export db /mnt/usb/db.img
  sealblk volume export db /dev/vg/db --force
  sealblk volume export db - | zstd > db.img.zst

The file holds the data in the clear: see where it goes. It takes the volume's data keys from the KMS, and the
audit log says so before anything is written. A file has its name when all of it is there. A device must be
large enough, and nobody may use it; what it has beyond the volume's size stays. Standard output gets all of
the disk, zeros included; the command fails if whoever reads goes away, and says nothing else there, with
--json either. An attached volume is exported by way of a snapshot: sealblk snapshot export.")]
pub struct ExportArgs {
    /// The volume, which nobody has attached: its id, the first digits of its id, or its name.
    volume: String,
    #[command(flatten)]
    to: To,
}

/// Where an export goes.
#[derive(clap::Args)]
pub(crate) struct To {
    /// The file to be made, readable by its owner alone; or a block device; or "-" for standard output.
    file: PathBuf,
    /// How it is written: raw. A file is sparse.
    #[arg(long, default_value = "raw", value_parser = parse_format)]
    format: Format,
    /// Replace a file of that name, or overwrite the device.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    space: SpaceArgs,
}

/// Exports a volume.
pub(crate) fn run(env: &Env, args: &ExportArgs) -> Result<()> {
    export(env, What::Volume(env.catalog().resolve(&args.volume)?), &args.to)
}

/// Exports a volume or a snapshot.
pub(crate) fn export(env: &Env, what: What, to: &To) -> Result<()> {
    let mut progress = Progress::new()?;
    let is_stream = to.file.as_os_str() == "-";
    let target = match is_stream {
        true => Target::StandardOutput,
        false => Target::Path { path: &to.file, replace: to.force },
    };
    let store = env.store()?;
    let budget = to.space.budget(&store);
    let bytes = export::export(&store, what, target, budget, &mut |done, total| progress.at(done, total))?;
    drop(progress);
    let (file, format) = (to.file.display(), to.format);
    if is_stream {
        // It has the data, and nothing else.
        output::tell(&format!("standard output: {} in the clear", size::human(bytes)));
        return Ok(());
    }
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
