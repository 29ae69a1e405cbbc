//! `sealblk volume tag` and `untag`.
#![forbid(unsafe_code)]

use crate::base::{Context, Result};
use crate::catalog::tags::Tags;
use crate::cli::Env;
use crate::cli::filter::{self, Tag};
use crate::cli::output;
use serde_json::json;

/// What `volume tag` takes.
#[derive(clap::Args)]
pub struct TagArgs {
    /// The volume: its id, the first digits of its id, or its name.
    volume: String,
    /// The tags; those that are there get another value.
    #[arg(value_name = "KEY=VALUE", required = true)]
    tags: Vec<Tag>,
}

/// What `volume untag` takes.
#[derive(clap::Args)]
pub struct UntagArgs {
    /// The volume: its id, the first digits of its id, or its name.
    volume: String,
    /// The tags' keys.
    #[arg(value_name = "KEY", required = true)]
    keys: Vec<String>,
}

/// Gives a volume tags.
pub(super) fn tag(env: &Env, args: &TagArgs) -> Result<()> {
    change(env, &args.volume, |tags| filter::set(tags, &args.tags))
}

/// Takes tags away from a volume.
pub(super) fn untag(env: &Env, args: &UntagArgs) -> Result<()> {
    change(env, &args.volume, |tags| filter::remove(tags, &args.keys))
}

fn change(env: &Env, volume: &str, change: impl FnOnce(&mut Tags) -> Result<()>) -> Result<()> {
    let catalog = env.catalog();
    let id = catalog.resolve(volume)?;
    let tags = catalog.change_tags(id, change).context(|| format!("tag {id}"))?;
    if env.json {
        return output::print_json(&json!({"id": id, "tags": tags}));
    }
    let lines: String = tags.iter().map(|(key, value)| format!("{key}={value}\n")).collect();
    output::print(&lines).map(drop)
}
