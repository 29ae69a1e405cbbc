//! What is said of space that is given back, by whatever command does it.
#![forbid(unsafe_code)]

use crate::base::plural::counted;
use crate::base::{Context, Result, size};
use crate::catalog::LayerId;
use crate::cli::progress::Progress;
use crate::cli::{Env, output};
use crate::ops::Store;
use crate::ops::space::{self, Given};
use crate::ops::usage::OfLayer;
use serde_json::{Value, json};
use std::fmt::Display;

/// How space is given back after a deletion.
#[derive(clap::Args)]
pub(super) struct GivingArgs {
    /// Delete at once, and leave it to "sealblk gc" to give back what others do not need,
    /// and to merge layers.
    #[arg(long, conflicts_with = "rate")]
    later: bool,
    #[command(flatten)]
    rate: RateArgs,
}

/// How fast layers are merged.
#[derive(clap::Args)]
pub(super) struct RateArgs {
    /// Bytes a second that merging layers may move; 0: no limit.
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = size::parse)]
    rate: u64,
}

/// Gives back what nobody needs of the layers of what was deleted, and says so.
///
/// # Errors
/// What keeps it from being given back: it is deleted all the same, and the error says so.
pub(super) fn give_back_of_deleted(
    env: &Env,
    store: &Store,
    deleted: &dyn Display,
    layers: &[LayerId],
    how: &GivingArgs,
) -> Result<()> {
    if how.later {
        return report_deleted(env, deleted, None);
    }
    let given = give_back(store, Some(layers), &how.rate).context(|| {
        format!(
            "{deleted} is deleted, but not all that it alone needed is given back; \"sealblk gc\" goes on"
        )
    })?;
    report_deleted(env, deleted, Some(given))
}

/// Gives back what nobody needs, with progress on a terminal.
///
/// # Errors
/// As [`space::give_back`]; if a signal came.
pub(super) fn give_back(store: &Store, of: Option<&[LayerId]>, rate: &RateArgs) -> Result<Given> {
    let mut progress = Progress::new()?;
    space::give_back(store, of, rate.rate, &mut |_, done, total| progress.at(done, total))
}

/// How many bytes could be given back without moving any.
///
/// # Errors
/// As [`space::look`]; if a signal came.
pub(super) fn look(store: &Store) -> Result<u64> {
    let mut progress = Progress::new()?;
    space::look(store, &mut |_, done, total| progress.at(done, total))
}

/// Says that something is deleted, and what that has given back.
///
/// # Errors
/// Those of standard output.
pub(super) fn report_deleted(env: &Env, deleted: &dyn Display, given: Option<Given>) -> Result<()> {
    if env.json {
        let mut said = json!({"id": deleted.to_string(), "state": "deleted"});
        if let Some(given) = given {
            said["space"] = json(&given);
        }
        return output::print_json(&said);
    }
    let given = given.map_or(String::new(), |given| words(&given));
    output::print(&format!("{deleted} deleted{given}\n")).map(drop)
}

/// Most whose ids are shown, of those who need a layer as well; JSON has all.
const SHOWN_MAX: usize = 4;

/// What a layer takes, and who needs it, for people.
pub(super) fn layer_words(layer: &OfLayer) -> String {
    let takes = match layer.on_device {
        Some(len) => format!("{} of a block device", size::about(len)),
        None => format!("{} on disk", size::about(layer.on_disk)),
    };
    let (shown, more) = layer.shared_with.split_at(layer.shared_with.len().min(SHOWN_MAX));
    match (shown, more.len()) {
        ([], _) => format!("{takes}, which nothing else needs"),
        (shown, 0) => format!("{takes}, shared with {}", shown.join(", ")),
        (shown, more) => format!("{takes}, shared with {}, and {more} more", shown.join(", ")),
    }
}

/// Adds what each layer takes, and who needs it, to the description of what has the layers.
pub(super) fn add_layers(value: &mut Value, layers: &[OfLayer]) {
    for (n, layer) in layers.iter().enumerate() {
        value["layers"][n]["on_disk"] = json!(layer.on_disk);
        value["layers"][n]["on_device"] = json!(layer.on_device.is_some());
        value["layers"][n]["shared_with"] = json!(layer.shared_with);
    }
}

/// What was given back, to follow after a word.
pub(super) fn words(given: &Given) -> String {
    if given.is_busy {
        return "; another command is giving space back".into();
    }
    if given.has_no_holes {
        return "; its file system makes no holes, so what layers hold that nothing needs takes space until \
                the layers go"
            .into();
    }
    let mut parts = Vec::new();
    if given.bytes > 0 {
        parts.push(format!("{} given back", size::about(given.bytes)));
    }
    match given.merged {
        0 => {}
        n => parts.push(format!(
            "{} merged ({} moved)",
            counted(n, "layer", "layers"),
            size::about(given.moved)
        )),
    }
    if given.later > 0 {
        parts.push(format!("{} left to be merged later, by \"sealblk gc\"", given.later));
    }
    parts.iter().map(|part| format!("; {part}")).collect()
}

/// What was given back, for programs.
pub(super) fn json(given: &Given) -> Value {
    json!({
        "given_back": given.bytes,
        "moved": given.moved,
        "merged_layers": given.merged,
        "left_for_later": given.later,
        "is_busy": given.is_busy,
        "has_no_holes": given.has_no_holes,
    })
}
