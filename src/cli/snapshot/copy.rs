//! `sealblk snapshot copy`.
#![forbid(unsafe_code)]

use super::description;
use crate::cli::filter::{self, Tag};
use crate::cli::provider::{self, NamedKey};
use crate::cli::{Env, output};
use crate::error::{Error, Kind, Result};
use crate::volume::copy;
use crate::volume::from_snapshot::{self, Keys};
use crate::volume::snapshot::Label;
use crate::volume::tags::Tags;

/// What `snapshot copy` takes.
#[derive(clap::Args)]
#[command(after_help = "\
Example:
  sealblk snapshot copy snap-0a1b --description 'to keep'

The copy has the same data key, which the KMS wraps for the copy's own id, and shares the data. Prints its id.")]
pub struct CopyArgs {
    /// The snapshot: its id, the first digits of its id, or its tag Name.
    snapshot: String,
    /// The KMS key, which must be the snapshot's [default: that].
    #[arg(long, value_name = "KEYREF")]
    key: Option<String>,
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
    if let Some(key) = &args.key {
        let key = NamedKey::open(env, &settings, Some(key))?;
        if !from_snapshot::is_key_of(&key.wrapping(), &source).map_err(|failure| failure.error)? {
            let message = format!(
                "{} is under another KMS key; \"sealblk volume create --snapshot {0} --key …\" makes a volume under it, \
                 whose snapshots are under it, too",
                source.id()
            );
            return Err(Error::new(Kind::Unsupported, message));
        }
    }
    let (open_provider, unwrap) = (provider::open(env), provider::unwrap(env));
    let keys = Keys { open_provider: &open_provider, unwrap: &unwrap };
    let made = copy::copy(&catalog, &env.events(&settings), &source, label, keys)?;
    match env.json {
        true => output::print_json(&description(&catalog, &made)),
        false => output::print(&format!("{}\n", made.id())).map(drop),
    }
}
