//! `sealblk volume rewrap`: the same data key, wrapped by another KMS key.

use crate::base::{Error, Kind, Result};
use crate::catalog::metadata::KeyRecord;
use crate::catalog::{Catalog, Entry, Metadata, VolumeId};
use crate::cli::{Env, output};
use crate::kms::{self, KeyRef};
use crate::ops::rewrap::{self, Change};
use clap::Args;
use serde_json::{Value, json};

/// What `volume rewrap` takes.
#[derive(Args)]
#[command(after_help = "\
Examples:
  sealblk volume rewrap db --key alias/new    afterwards the old KMS key may be disabled
  sealblk volume rewrap db                    by the newest version of the same KMS key
  sealblk volume rewrap --all --from alias/old --key alias/new

Data is not touched, and it works while the volume is attached. The new wrapped key takes the old one's place once it has
proved to unwrap to the same data key. Copies of volume.json elsewhere still hold the old one.")]
pub struct RewrapArgs {
    /// The volume: its id, the first digits of its id, or its name.
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    volume: Option<String>,
    /// The KMS key to wrap by, by id, ARN or alias [default: the one that wraps it now].
    #[arg(long, value_name = "KEYREF")]
    key: Option<String>,
    /// All encrypted volumes of the store.
    #[arg(long)]
    all: bool,
    /// Only the data keys that this KMS key wraps.
    #[arg(long, value_name = "KEYREF")]
    from: Option<String>,
}

/// Which data keys are wrapped anew, and by what.
struct Wish {
    to: Option<KeyRef>,
    /// Provider and canonical id.
    from: Option<(String, String)>,
}

impl Wish {
    fn new(env: &Env, args: &RewrapArgs) -> Result<Self> {
        let locality = env.settings()?.locality;
        let parse = |text: &String| KeyRef::parse(text, &locality).map_err(|e| e.with_advice(text));
        let to = args.key.as_ref().map(parse).transpose()?;
        let from = args.from.as_ref().map(|text| canonical(env, &parse(text)?)).transpose()?;
        Ok(Wish { to, from })
    }

    /// The KMS key that shall wrap it; none if it stays as it is.
    fn target(&self, key: &KeyRecord) -> Option<KeyRef> {
        let wanted = self
            .from
            .as_ref()
            .is_none_or(|(provider, arn)| (provider, arn) == (&key.provider, &key.wrapped.key_id));
        if !wanted {
            return None;
        }
        // A provider of another version has no name here; its key is left to that version.
        self.to.clone().or_else(|| KeyRef::of_provider(&key.provider, &key.wrapped.key_id))
    }

    fn concerns(&self, metadata: &Metadata) -> bool {
        metadata.keys().iter().any(|key| self.target(key).is_some())
    }
}

fn canonical(env: &Env, key: &KeyRef) -> Result<(String, String)> {
    let provider = kms::open_provider(env.hardened, &env.root, key.provider.as_str())?;
    let described = provider.describe(&key.key).map_err(|e| e.with_advice(&key.key))?;
    Ok((key.provider.as_str().into(), described.key_id))
}

/// Wraps the data keys of one volume, or of all.
pub fn run(env: &Env, args: &RewrapArgs) -> Result<()> {
    let (catalog, wish) = (env.catalog(), Wish::new(env, args)?);
    match &args.volume {
        Some(reference) => one(env, &catalog, &wish, reference),
        None => all(env, &catalog, &wish),
    }
}

fn one(env: &Env, catalog: &Catalog, wish: &Wish, reference: &str) -> Result<()> {
    let metadata = catalog.load(catalog.resolve(reference)?)?;
    let id = metadata.id();
    if metadata.keys().is_empty() {
        let message = format!("rewrap {id}: it is not encrypted, so there is no key to wrap");
        return Err(Error::new(Kind::Usage, message));
    }
    if !wish.concerns(&metadata) {
        let by: Vec<_> =
            metadata.keys().iter().map(|k| format!("{}:{}", k.provider, k.wrapped.key_id)).collect();
        let message =
            format!("rewrap {id}: its data keys are wrapped by {}, which is not asked for", by.join(", "));
        return Err(Error::new(Kind::Usage, message));
    }
    let changes = rewrapped(catalog, wish, id)?;
    match env.json {
        true => output::print_json(&json!({"id": id, "rewrapped": changes})),
        false => output::print(&text(id, &changes)).map(drop),
    }
}

fn rewrapped(catalog: &Catalog, wish: &Wish, id: VolumeId) -> Result<Vec<Change>> {
    rewrap::rewrap(catalog, id, |key| wish.target(key)).map_err(|e| e.context(format!("rewrap {id}")))
}

/// One volume that fails does not keep the others from theirs.
fn all(env: &Env, catalog: &Catalog, wish: &Wish) -> Result<()> {
    let (mut values, mut failed): (Vec<Value>, Vec<Error>) = Default::default();
    let entries = catalog.list()?;
    let mut done = 0;
    for Entry { id, metadata } in entries {
        let result = match metadata {
            Ok(metadata) if !wish.concerns(&metadata) => continue,
            Ok(_) => rewrapped(catalog, wish, id),
            Err(e) => Err(e),
        };
        match result {
            Ok(changes) => {
                done += 1;
                values.push(json!({"id": id, "rewrapped": changes}));
                if !env.json {
                    output::print(&text(id, &changes))?;
                }
            }
            Err(e) => {
                values.push(json!({"id": id, "error": {"kind": e.kind().name(), "message": e.to_string()}}));
                failed.push(e);
            }
        }
    }
    if env.json {
        output::print_json(&values)?;
    }
    let Some(first) = failed.first() else { return Ok(()) };
    let rest: Vec<String> = failed.iter().map(ToString::to_string).collect();
    let message = format!("{done} volumes done, {} not: {}", failed.len(), rest.join("; "));
    Err(Error::new(first.kind(), message))
}

fn text(id: VolumeId, changes: &[Change]) -> String {
    let line = |c: &Change| format!("{id}: data key {} is wrapped by {} (was {})\n", c.slot, c.to, c.from);
    changes.iter().map(line).collect()
}
