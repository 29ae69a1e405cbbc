//! `sealblk snapshot copy`.
#![forbid(unsafe_code)]

use super::{description, tell_that_unproved};
use crate::base::{Result, size};
use crate::catalog::snapshot::Label;
use crate::catalog::tags::Tags;
use crate::cli::budget::SpaceArgs;
use crate::cli::filter::{self, Tag};
use crate::cli::meter::Meter;
use crate::cli::slots::AlsoArgs;
use crate::cli::{Env, output};
use crate::ops::copy::{self, Way};
use crate::ops::flatten::Pace;

/// What `snapshot copy` takes.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sealblk snapshot copy snap-0a1b --description 'to keep'

  sealblk snapshot copy nightly --key alias/other

  sealblk snapshot copy nightly --region eu-west-1

The copy has the same data key, which each of the snapshot's KMS keys wraps for the copy's own id, and shares the data. If
--key names one of them, that one alone. With --also-key another wraps it besides, so that the copy can be used without the
first: in another region, say. Under another --key, and of a snapshot that is not encrypted, everything is copied under a new data key: that takes a while, and, if it is interrupted, the
same command goes on with it, until \"sealblk gc\" clears away what there is. Prints the copy's id.")]
pub struct CopyArgs {
    /// The snapshot: its id, the first digits of its id, or its tag Name.
    snapshot: String,
    /// The KMS key, by id, ARN or alias [default: the snapshot's].
    #[arg(long, value_name = "KEYREF")]
    key: Option<String>,
    /// A copy for this region, which needs no KMS of another: by --key, which is there, by the snapshot's
    /// multi-Region key, or by the default key there.
    #[arg(long, value_name = "REGION")]
    region: Option<String>,
    #[command(flatten)]
    also: AlsoArgs,
    /// Where everything is copied: bytes a second; 0: no limit.
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = size::parse)]
    rate: u64,
    #[command(flatten)]
    space: SpaceArgs,
    /// What it is for, in at most 255 characters [default: the snapshot's].
    #[arg(long)]
    description: Option<String>,
    /// A tag of the copy, which has none of the snapshot's; may be given several times.
    #[arg(long, value_name = "KEY=VALUE")]
    tag: Vec<Tag>,
}

/// Copies a snapshot.
pub(super) fn run(env: &Env, args: CopyArgs) -> Result<()> {
    let (store, catalog) = (env.store()?, env.catalog());
    let source = catalog.load_snapshot(catalog.resolve_snapshot(&args.snapshot)?)?;
    let mut tags = Tags::default();
    filter::set(&mut tags, &args.tag)?;
    let label = Label::new(args.description.unwrap_or_else(|| source.label().description.clone()), tags)?;
    let (key, also) = (args.key.as_deref(), args.also.wanted());
    let way = match &args.region {
        Some(region) => copy::region::way(&store, &source, region, key, &also)?,
        None => copy::way(&store, &source, key, &also)?,
    };
    if matches!(way, Way::Full(_)) && !source.is_encrypted() {
        tell_that_unproved(&source);
    }
    let budget = args.space.budget(&store);
    let pace = Pace { rate: args.rate, reserve: args.space.reserve(&store) };
    let mut meter = Meter::new();
    let made = copy::copy(&store, &source, label, &way, (pace, budget), &mut |progress| meter.show(progress));
    meter.clear();
    let made = made?;
    match env.json {
        true => output::print_json(&description(&catalog, &made)),
        false => output::print(&format!("{}\n", made.id())).map(drop),
    }
}
