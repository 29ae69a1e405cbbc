//! `sealblk snapshot create`, of one volume or of several at one point in time, attached or not.
#![forbid(unsafe_code)]

use super::description;
use crate::base::{Error, Kind, Result};
use crate::catalog::snapshot::Label;
use crate::catalog::tags::Tags;
use crate::catalog::{Catalog, VolumeId};
use crate::cli::filter::{self, Filter, Tag};
use crate::cli::{Env, output, volume};
use crate::ops::snapshot::{self, Made};
use serde_json::{Value, json};

/// What `snapshot create` takes.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sealblk snapshot create db
  sealblk snapshot create db --name nightly --description 'before the upgrade' --tag env=prod
  sealblk snapshot create --all-of tag:vm=web

It holds what was flushed before, and possibly what was not. Prints the new snapshot's id, and on standard error how long an
attached volume's queues stood still. With --all-of, the snapshots of all the volumes are of one moment, in which none of them
had a request in flight; if one cannot be made, none is.")]
pub struct CreateArgs {
    /// The volume: its id, the first digits of its id, or its name.
    #[arg(required_unless_present = "all_of", conflicts_with = "all_of")]
    volume: Option<String>,
    /// All volumes of which this is so, as `volume list --filter` takes it; may be given several times.
    #[arg(long, value_name = "NAME=VALUE")]
    all_of: Vec<Filter>,
    /// What it is for, in at most 255 characters.
    #[arg(long, default_value = "", hide_default_value = true)]
    description: String,
    /// A name, the same as --tag Name=NAME: to be used in place of the id while no other snapshot has it.
    #[arg(long)]
    name: Option<String>,
    /// A tag; may be given several times.
    #[arg(long, value_name = "KEY=VALUE")]
    tag: Vec<Tag>,
}

/// Makes the snapshots.
pub(super) fn run(env: &Env, args: CreateArgs) -> Result<()> {
    let (store, catalog) = (env.store()?, env.catalog());
    let label = label(&args)?;
    let volumes = match &args.volume {
        Some(reference) => vec![catalog.resolve(reference)?],
        None => all_of(&catalog, &args.all_of)?,
    };
    let volumes: Vec<_> = volumes.into_iter().map(|id| (id, label.clone())).collect();
    let made = snapshot::create(&store, &volumes)?;
    print(env, &catalog, &made, args.volume.is_some())
}

fn label(args: &CreateArgs) -> Result<Label> {
    let mut tags = Tags::default();
    filter::set(&mut tags, &args.tag)?;
    if let Some(name) = &args.name {
        tags.set("Name", name)?;
    }
    Label::new(args.description.clone(), tags)
}

fn all_of(catalog: &Catalog, filters: &[Filter]) -> Result<Vec<VolumeId>> {
    filter::check(filters, &volume::FILTERS)?;
    let mut volumes = Vec::new();
    for entry in catalog.list()? {
        if volume::is_wanted(catalog, &entry, filters)? {
            volumes.push(entry.id);
        }
    }
    match volumes.is_empty() {
        false => Ok(volumes),
        true => Err(Error::new(
            Kind::NotFound,
            "there is no such volume; \"sealblk volume list\" shows which there are",
        )),
    }
}

fn print(env: &Env, catalog: &Catalog, made: &[Made], one: bool) -> Result<()> {
    if env.json {
        let value = |m: &Made| {
            let mut value = description(catalog, &m.snapshot);
            value["pause_us"] = json!(m.pause.map(|pause| pause.as_micros() as u64));
            value
        };
        let mut values: Vec<Value> = made.iter().map(value).collect();
        return match one {
            true => output::print_json(&values.remove(0)),
            false => output::print_json(&values),
        };
    }
    for m in made {
        if let Some(pause) = m.pause {
            output::tell(&format!("{}: its queues stood still for {pause:.1?}", m.snapshot.volume()));
        }
        match one {
            true => output::print(&format!("{}\n", m.snapshot.id()))?,
            false => output::print(&format!("{}  {}\n", m.snapshot.id(), m.snapshot.volume()))?,
        };
    }
    Ok(())
}
