//! `sealblk snapshot copy`.
#![forbid(unsafe_code)]

use crate::base::{Result, Timestamp};
use crate::catalog::snapshot::Label;
use crate::catalog::tags::Tags;
use crate::catalog::{Catalog, Snapshot};
use crate::cli::filter::{self, Tag};
use crate::cli::meter::Meter;
use crate::cli::provider::{self, NamedKey};
use crate::cli::snapshot::{description, tell_that_unproved};
use crate::cli::{Env, output, size};
use crate::events::{Event, EventLog};
use crate::kms::Failure;
use crate::ops::clone::{Keys, is_key_of};
use crate::ops::copy::full::Copying;
use crate::ops::{copy, flatten};

/// What `snapshot copy` takes.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sealblk snapshot copy snap-0a1b --description 'to keep'

  sealblk snapshot copy nightly --key alias/other

The copy has the same data key, which the KMS wraps for the copy's own id, and shares the data. Under another KMS key, and of
a snapshot that is not encrypted, everything is copied under a new data key: that takes a while, and, if it is interrupted, the
same command goes on with it, until \"sealblk gc\" clears away what there is. Prints the copy's id.")]
pub struct CopyArgs {
    /// The snapshot: its id, the first digits of its id, or its tag Name.
    snapshot: String,
    /// The KMS key, by id, ARN or alias [default: the snapshot's].
    #[arg(long, value_name = "KEYREF")]
    key: Option<String>,
    /// Where everything is copied: bytes a second; 0: no limit.
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = size::parse)]
    rate: u64,
    /// What it is for, in at most 255 characters [default: the snapshot's].
    #[arg(long)]
    description: Option<String>,
    /// A tag of the copy, which has none of the snapshot's; may be given several times.
    #[arg(long, value_name = "KEY=VALUE")]
    tag: Vec<Tag>,
}

/// Copies a snapshot.
pub fn run(env: &Env, args: CopyArgs) -> Result<()> {
    let (catalog, settings) = (env.catalog(), env.settings()?);
    let source = catalog.load_snapshot(catalog.resolve_snapshot(&args.snapshot)?)?;
    let mut tags = Tags::default();
    filter::set(&mut tags, &args.tag)?;
    let label = Label::new(args.description.unwrap_or_else(|| source.label().description.clone()), tags)?;
    let (open_provider, unwrap) = (provider::open(env), provider::unwrap(env));
    let keys = Keys { open_provider: &open_provider, unwrap: &unwrap };
    let key = args.key.as_ref().map(|key| NamedKey::open(env, &settings, Some(key))).transpose()?;
    let other = match &key {
        Some(key) if !is_key_of(&key.wrapping(), &source).map_err(|failure| failure.error)? => Some(key),
        _ => None,
    };
    let made = match other {
        None => copy::copy(&catalog, &env.events(&settings), &source, label, keys)?,
        Some(key) => {
            if !source.is_encrypted() {
                tell_that_unproved(&source);
            }
            full(&catalog, &env.events(&settings), &source, label, key, keys, args.rate)?
        }
    };
    match env.json {
        true => output::print_json(&description(&catalog, &made)),
        false => output::print(&format!("{}\n", made.id())).map(drop),
    }
}

/// Copies everything under another data key, and reports it as an event.
fn full(
    catalog: &Catalog,
    events: &EventLog,
    source: &Snapshot,
    label: Label,
    key: &NamedKey,
    keys: Keys<'_>,
    rate: u64,
) -> Result<Snapshot> {
    let started = Timestamp::now();
    let copy = || -> Result<Snapshot, Failure> {
        let copying = Copying::begin(catalog, source, label, &key.wrapping(), keys)?;
        let mut meter = Meter::new();
        let filled =
            flatten::fill_copy(catalog, source, &copying, rate, &mut |progress| meter.show(progress));
        meter.clear();
        filled?;
        Ok(copying.commit(catalog)?)
    };
    let made = copy();
    let result = made.as_ref().map(Snapshot::id).map_err(|failure| failure.cause.clone());
    events.record(&Event::copy_snapshot(source.id(), source.volume(), result, started, false));
    made.map_err(|failure| failure.error.context(format!("copy {}", source.id())))
}
