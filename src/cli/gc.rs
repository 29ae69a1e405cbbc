//! `sealblk gc`: what interrupted commands, and hands, left in a store.
#![forbid(unsafe_code)]

use super::{Env, output, size};
use crate::error::Result;
use crate::volume::gc::LeftOver;
use serde_json::{Value, json};

/// What `gc` takes.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sealblk gc --dry-run
  sealblk gc --json

Removes layers that no volume and no snapshot names, temporary files, and what interrupted commands left. What somebody is
just making or using stays. While a record cannot be read, no layer is removed: it might be its.")]
pub struct Args {
    /// Only say what would be removed.
    #[arg(long)]
    dry_run: bool,
}

/// Finds what is left over, and removes it.
pub fn run(env: &Env, args: &Args) -> Result<()> {
    let catalog = env.catalog();
    // A store that does not exist is not made by looking.
    let found = match env.root.path().exists() {
        true if args.dry_run => catalog.left_overs()?,
        true => catalog.collect()?,
        false => Vec::new(),
    };
    if env.json {
        let left_overs: Vec<Value> = found.iter().map(description).collect();
        return output::print_json(&json!({"dry_run": args.dry_run, "left_overs": left_overs}));
    }
    let mut rows = vec![["WHAT", "BYTES", "PATH"].map(String::from).to_vec()];
    rows.extend(found.iter().map(|left| {
        vec![left.what.name().to_string(), size::human(left.bytes), left.path.display().to_string()]
    }));
    output::print(&output::table(&rows)).map(drop)
}

fn description(left: &LeftOver) -> Value {
    json!({"what": left.what.name(), "path": left.path.display().to_string(), "bytes": left.bytes})
}
