//! `sealblk volume rekey` and `sealblk volume flatten`.
#![forbid(unsafe_code)]

use crate::base::{Error, Kind, Result};
use crate::catalog::lock::{Held, Holder, Purpose};
use crate::catalog::rekey::{NewKey, check_encrypted};
use crate::catalog::{Catalog, Metadata, VolumeId};
use crate::cli::provider::{self, NamedKey};
use crate::cli::volume::follow::follow;
use crate::cli::volume::show;
use crate::cli::{Env, output, size};
use crate::crypt::Dek;
use crate::crypt::secret_mem::SecretFd;
use crate::events::Event;
use crate::helper::unwrap;
use crate::host::changes::hydrate::kms_key;
use crate::host::control::{self, conversation};
use crate::kms::patience::Patience;
use crate::kms::{Failure, KeyRef};
use crate::ops::rekey;
use std::time::Duration;

/// What `volume rekey` takes.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sealblk volume rekey db
  sealblk volume rekey db --key alias/new --follow

What is written from now on is under the new data key. What was written before is encrypted anew in the background, while
the volume is attached (see \"attach --hydrate-rate\"); with --follow on a volume that nobody has attached, by this command.
When that is done the old data key is gone from the volume, and its KMS key is not needed any more. Whatever interrupts it,
it goes on at the next attach. Snapshots keep the data key that they have. \"volume show\" says how far it has come.

To change only the KMS key that wraps the data key, which is done at once, see \"volume rewrap\".")]
pub struct RekeyArgs {
    /// The volume: its id, the first digits of its id, or its name.
    volume: String,
    /// The KMS key that wraps the new data key, by id, ARN or alias [default: the one that wraps the old one].
    #[arg(long, value_name = "KEYREF")]
    key: Option<String>,
    #[command(flatten)]
    following: FollowArgs,
}

/// What `volume flatten` takes.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sealblk volume flatten db --follow
  sealblk volume flatten clone       in the background, while it is attached

What lower layers hold, which the volume shares with snapshots, is copied into its own layer: in the background while it is
attached (see \"attach --hydrate-rate\"); with --follow on a volume that nobody has attached, by this command. Whatever
interrupts it, it goes on at the next attach.")]
pub struct FlattenArgs {
    /// The volume: its id, the first digits of its id, or its name.
    volume: String,
    #[command(flatten)]
    following: FollowArgs,
}

#[derive(clap::Args)]
struct FollowArgs {
    /// Return when everything is done, and show on a terminal how far it has come. A volume that nobody has attached is
    /// kept from being attached meanwhile.
    #[arg(long)]
    follow: bool,
    /// With --follow, of a volume that nobody has attached: bytes a second; 0: no limit.
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = size::parse, requires = "follow")]
    rate: u64,
}

/// Gives a volume a new data key.
pub fn rekey(env: &Env, args: &RekeyArgs) -> Result<()> {
    let catalog = env.catalog();
    let metadata = catalog.load(catalog.resolve(&args.volume)?)?;
    let id = metadata.id();
    let attempt = |e: Error| e.context(format!("re-key {id}"));
    check_encrypted(&metadata).map_err(attempt)?;
    let key = named_key(env, args, &metadata).map_err(attempt)?;
    let events = env.events(&env.settings()?);
    let done = key.wrapping().generate(id).map(NewKey::new).and_then(|new| {
        let pause = give(env, &catalog, id, new.clone())?;
        Ok((new, pause))
    });
    let (new, pause) = done.map_err(|Failure { cause, error }| {
        events.record(&Event::hydrate_failed(id, None, cause));
        attempt(error)
    })?;
    if pause.is_none() {
        // Otherwise its host process has said so.
        events.record(&Event::hydrate_volume(id, Some(&new.record().wrapped.key_id), "hydrating"));
    }
    say_pause(env, id, pause);
    finish(env, &catalog, id, &args.following, &format!("{id} has a new data key, wrapped by {new}"))
}

fn named_key(env: &Env, args: &RekeyArgs, metadata: &Metadata) -> Result<NamedKey> {
    if args.key.is_some() {
        return NamedKey::open(env, &env.settings()?, args.key.as_deref());
    }
    let top = metadata.top().key.map(|n| &metadata.keys()[n]);
    let same = top.and_then(|key| KeyRef::of_provider(&key.provider, &key.wrapped.key_id));
    NamedKey::of(env, same.ok_or_else(|| Error::new(Kind::Usage, "name a KMS key with --key"))?)
}

/// Gives the volume a key that the KMS has made; answers how long its queues stood still if it is attached.
fn give(env: &Env, catalog: &Catalog, id: VolumeId, new: NewKey) -> Result<Option<Duration>, Failure> {
    if !is_attached(catalog, id)? {
        return rekey::rekey(catalog, id, new, &provider::unwrap(env)).map(|_| None);
    }
    // The helper fills this, and the host process takes it: nobody here looks into it.
    let secret = SecretFd::create(Dek::LEN)?;
    let patience = Patience(env.settings()?.kms_patience);
    let unwrapped = unwrap::unwrap_into(env.hardened, &env.root, id, new.record(), None, patience, &secret);
    unwrapped.map_err(|refusal| Failure { error: refusal.error(), cause: refusal.cause })?;
    Ok(conversation::rekey(catalog, id, &new, secret).map(Some)?)
}

/// Makes a volume's layers one.
pub fn flatten(env: &Env, args: &FlattenArgs) -> Result<()> {
    let catalog = env.catalog();
    let id = catalog.resolve(&args.volume)?;
    let attempt = |e: Error| e.context(format!("flatten {id}"));
    let before = catalog.load(id)?;
    let is_attached = is_attached(&catalog, id)?;
    let marked = match is_attached {
        true => control::flatten(&catalog, id),
        false => crate::ops::flatten::mark(&catalog, id),
    };
    if !marked.map_err(attempt)? {
        return finish(
            env,
            &catalog,
            id,
            &args.following,
            &format!("{id} has one layer: there is nothing to do"),
        );
    }
    let marked = catalog.load(id)?;
    if !is_attached && marked.layout().hydrate() != before.layout().hydrate() {
        env.events(&env.settings()?).record(&Event::hydrate_volume(id, kms_key(&marked), "hydrating"));
    }
    finish(env, &catalog, id, &args.following, &format!("{id} is being flattened"))
}

fn is_attached(catalog: &Catalog, id: VolumeId) -> Result<bool> {
    Ok(matches!(catalog.held(id)?, Held::By(Holder { purpose: Purpose::Attach, .. })))
}

fn say_pause(env: &Env, id: VolumeId, pause: Option<Duration>) {
    if let Some(pause) = pause.filter(|_| !env.json) {
        output::tell(&format!("{id}: its queues stood still for {pause:.1?}"));
    }
}

/// Follows if that is wanted, and says what there is now.
fn finish(env: &Env, catalog: &Catalog, id: VolumeId, following: &FollowArgs, said: &str) -> Result<()> {
    if !env.json {
        output::print(&format!("{said}\n"))?;
    }
    let mut now = catalog.load(id)?;
    if following.follow {
        let followed = follow(catalog, id, following.rate, env.hardened)?;
        now = followed.volume;
        if followed.done_here {
            let events = env.events(&env.settings()?);
            events.record(&Event::hydrate_volume(id, kms_key(&now), "completed"));
        }
    }
    if env.json {
        return output::print_json(&show::description(catalog, &now)?);
    }
    let rest = match (now.layout().leaving(), now.layers().len()) {
        (0, 1) if following.follow => "everything is in one layer\n".into(),
        (0, layers) if following.follow => format!("everything is in {layers} layers\n"),
        (0, _) => String::new(),
        _ => format!(
            "what lower layers hold is copied up while it is attached; \"sealblk volume show {id}\" says how far that is\n"
        ),
    };
    output::print(&rest).map(drop)
}
