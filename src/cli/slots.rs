//! The KMS keys that wrap data keys: `volume key` and `snapshot key`, `--also-key`, and
//! what a KMS says of one.
#![forbid(unsafe_code)]

use crate::base::{Error, Kind, Result};
use crate::catalog::metadata::KeyRecord;
use crate::cli::{Env, output};
use crate::helper::slots::asked as order_of;
use crate::kms::{self, KeyState, KmsKey};
use crate::ops::also_keys::AlsoKeys;
use crate::ops::slots::{self, Changed, Whose};
use clap::{Args, Subcommand};
use serde_json::{Value, json};

/// Which KMS keys wrap a new data key besides.
#[derive(Args)]
pub(super) struct AlsoArgs {
    /// Another KMS key that wraps the data key as well, by id, ARN or alias; may be given several times. Any
    /// of them gives the data key [default: the settings' also-keys].
    #[arg(long, value_name = "KEYREF")]
    also_key: Vec<String>,
    /// Have no other KMS key wrap it, whatever the settings say.
    #[arg(long, conflicts_with = "also_key")]
    no_also_keys: bool,
}

impl AlsoArgs {
    /// What was said.
    pub(super) fn wanted(&self) -> AlsoKeys {
        match self.no_also_keys || !self.also_key.is_empty() {
            true => AlsoKeys::These(self.also_key.clone()),
            false => AlsoKeys::Usual,
        }
    }
}

/// What `volume key` can do.
#[derive(Subcommand)]
pub enum VolumeCommand {
    /// Have another KMS key wrap the volume's data keys as well.
    #[command(after_help = "\
Examples:
  sealblk volume key add db --key aws:arn:aws:kms:eu-west-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab
  sealblk volume key add db --key alias/spare

Data is not touched, and it works while the volume is attached. One KMS key that wraps the data keys already has to be
usable. The new wrapped copy is noted once it has proved to unwrap to the same data key. From then on an attach needs one
of them: it asks in the order of the settings' key-order, and the next one where a KMS is not reached or refuses.")]
    Add(VolumeChange),
    /// Have a KMS key no longer wrap the volume's data keys.
    #[command(
        visible_alias = "rm",
        after_help = "\
Examples:
  sealblk volume key remove db --key alias/spare

Refused unless every data key was seen to come by a KMS key that is left. Copies of the record elsewhere keep what the
key wrapped: what matters is that the KMS key is disabled or deleted."
    )]
    Remove(VolumeChange),
    /// List the KMS keys that wrap the volume's data keys, in the order in which an attach asks them.
    #[command(visible_alias = "ls", after_help = "Example:\n  sealblk volume key list db --check-key")]
    List(VolumeList),
}

/// What `volume key add` and `volume key remove` take.
#[derive(Args)]
pub struct VolumeChange {
    /// The volume: its id, the first digits of its id, or its name.
    volume: String,
    /// The KMS key, by id, ARN or alias; may be given several times.
    #[arg(long, value_name = "KEYREF", required = true)]
    key: Vec<String>,
}

/// What `volume key list` takes.
#[derive(Args)]
pub struct VolumeList {
    /// The volume: its id, the first digits of its id, or its name.
    volume: String,
    /// Ask each KMS now what state its key is in.
    #[arg(long)]
    check_key: bool,
}

/// What `snapshot key` can do.
#[derive(Subcommand)]
pub enum SnapshotCommand {
    /// Have another KMS key wrap the snapshot's data keys as well.
    #[command(after_help = "\
Example:
  sealblk snapshot key add snap-0a1b --key alias/spare

Data is not touched. What is made from the snapshot has the new KMS key as well; what was made before has its own.")]
    Add(SnapshotChange),
    /// Have a KMS key no longer wrap the snapshot's data keys.
    #[command(
        visible_alias = "rm",
        after_help = "\
Example:
  sealblk snapshot key remove snap-0a1b --key alias/spare

Refused unless every data key was seen to come by a KMS key that is left."
    )]
    Remove(SnapshotChange),
    /// List the KMS keys that wrap the snapshot's data keys.
    #[command(
        visible_alias = "ls",
        after_help = "Example:\n  sealblk snapshot key list snap-0a1b --check-key"
    )]
    List(SnapshotList),
}

/// What `snapshot key add` and `snapshot key remove` take.
#[derive(Args)]
pub struct SnapshotChange {
    /// The snapshot: its id, the first digits of its id, or its tag Name.
    snapshot: String,
    /// The KMS key, by id, ARN or alias; may be given several times.
    #[arg(long, value_name = "KEYREF", required = true)]
    key: Vec<String>,
}

/// What `snapshot key list` takes.
#[derive(Args)]
pub struct SnapshotList {
    /// The snapshot: its id, the first digits of its id, or its tag Name.
    snapshot: String,
    /// Ask each KMS now what state its key is in.
    #[arg(long)]
    check_key: bool,
}

/// Runs `volume key`.
pub(super) fn volume(env: &Env, command: VolumeCommand) -> Result<()> {
    let find = |name: &str| env.catalog().resolve(name);
    match command {
        VolumeCommand::Add(args) => add(env, Whose::Volume(find(&args.volume)?), &args.key),
        VolumeCommand::Remove(args) => remove(env, Whose::Volume(find(&args.volume)?), &args.key),
        VolumeCommand::List(args) => {
            let metadata = env.catalog().load(find(&args.volume)?)?;
            list(env, &metadata.id().to_string(), metadata.keys(), args.check_key)
        }
    }
}

/// Runs `snapshot key`.
pub(super) fn snapshot(env: &Env, command: SnapshotCommand) -> Result<()> {
    let find = |name: &str| env.catalog().resolve_snapshot(name);
    match command {
        SnapshotCommand::Add(args) => add(env, Whose::Snapshot(find(&args.snapshot)?), &args.key),
        SnapshotCommand::Remove(args) => remove(env, Whose::Snapshot(find(&args.snapshot)?), &args.key),
        SnapshotCommand::List(args) => {
            let snapshot = env.catalog().load_snapshot(find(&args.snapshot)?)?;
            list(env, &snapshot.id().to_string(), snapshot.keys(), args.check_key)
        }
    }
}

fn add(env: &Env, whose: Whose, names: &[String]) -> Result<()> {
    let changed = slots::add(&env.store()?, whose, names)?;
    print_changed(env, whose, "added", &changed, "is wrapped by")
}

fn remove(env: &Env, whose: Whose, names: &[String]) -> Result<()> {
    let changed = slots::remove(&env.store()?, whose, names)?;
    print_changed(env, whose, "removed", &changed, "is no longer wrapped by")
}

fn print_changed(env: &Env, whose: Whose, verb: &str, changed: &[Changed], words: &str) -> Result<()> {
    let id = whose.to_string();
    if env.json {
        return output::print_json(&json!({"id": id, verb: changed}));
    }
    let line = |it: &Changed| format!("{id}: data key {} {words} {}\n", it.key, it.by);
    output::print(&changed.iter().map(line).collect::<String>()).map(drop)
}

/// Lists them in the order in which they are asked. With `check` it fails, after printing everything, if a
/// data key would come by none of them.
fn list(env: &Env, id: &str, keys: &[KeyRecord], check: bool) -> Result<()> {
    let settings = env.settings()?;
    let asked = |key: &KeyRecord| -> Vec<KmsKey> {
        order_of(key, &settings).into_iter().map(|n| key.slots()[n].kms_key()).collect()
    };
    let all: Vec<Vec<KmsKey>> = keys.iter().map(asked).collect();
    let checks: Option<Vec<Vec<Check>>> = check
        .then(|| all.iter().map(|keys| keys.iter().map(|key| Check::make(env, key)).collect()).collect());
    let of = |n: usize, m: usize| checks.as_ref().map(|checks| &checks[n][m]);
    if env.json {
        let slot = |n: usize, m: usize, key: &KmsKey| {
            let mut value = json!(key);
            if let Some(check) = of(n, m) {
                value["check"] = check.json();
            }
            value
        };
        let values = all.iter().enumerate().map(|(n, keys)| {
            let slots: Vec<Value> = keys.iter().enumerate().map(|(m, key)| slot(n, m, key)).collect();
            json!({"key": n, "slots": slots})
        });
        output::print_json(&json!({"id": id, "keys": values.collect::<Vec<Value>>()}))?;
    } else {
        let mut rows = vec![vec!["DATA KEY".to_owned(), "PROVIDER".into(), "KMS KEY".into()]];
        rows[0].extend(check.then(|| "STATE".to_owned()));
        for (n, keys) in all.iter().enumerate() {
            for (m, key) in keys.iter().enumerate() {
                let mut row = vec![n.to_string(), key.provider.clone(), key.key_id.clone()];
                row.extend(of(n, m).map(Check::words));
                rows.push(row);
            }
        }
        output::print(&output::table(&rows))?;
    }
    match checks.into_iter().flatten().find_map(Check::refusal_of) {
        Some(e) => Err(e.context(format!("a data key of {id} comes by none of its KMS keys"))),
        None => Ok(()),
    }
}

/// What the KMS says of a key now.
pub(super) struct Check {
    /// `None` if the KMS could not be asked, or knows no such key.
    state: Option<KeyState>,
    reachable: bool,
    /// Why the key gives no data key; none if it does.
    refusal: Option<Error>,
}

impl Check {
    /// Asks.
    pub(super) fn make(env: &Env, key: &KmsKey) -> Self {
        let arn = &key.key_id;
        let described =
            kms::open_provider(env.hardened, &env.root, &key.provider).and_then(|kms| kms.describe(arn));
        let state = described.as_ref().map(|d| d.state).ok();
        let refusal = match (described, state) {
            (Err(e), _) => Some(e.with_advice_of(&key.provider, arn)),
            (_, Some(state)) => state.refusal(arn).map(|e| e.with_advice_of(&key.provider, arn)),
            (Ok(_), None) => None,
        };
        let reachable = refusal.as_ref().is_none_or(|e| e.kind() != Kind::KmsUnavailable);
        Check { state, reachable, refusal }
    }

    /// Why a data key comes by none of the KMS keys that wrap it: what these checks of them say, or the one
    /// check says; none if it comes by one.
    pub(super) fn refusal_of(checks: Vec<Check>) -> Option<Error> {
        let mut refusals: Vec<Error> =
            checks.into_iter().map(|check| check.refusal).collect::<Option<_>>()?;
        match refusals.len() {
            0 => None,
            1 => refusals.pop(),
            _ => {
                let is_later = |e: &&Error| e.kind() == Kind::KmsUnavailable;
                let kind =
                    refusals.iter().find(is_later).or(refusals.first()).map_or(Kind::Other, Error::kind);
                let all: Vec<String> = refusals.iter().map(ToString::to_string).collect();
                Some(Error::new(kind, all.join("; ")))
            }
        }
    }

    /// Whether the key gives a data key.
    pub(super) fn is_usable(&self) -> bool {
        self.refusal.is_none()
    }

    /// For people.
    pub(super) fn words(&self) -> String {
        match (&self.refusal, self.state) {
            (None, _) => "usable now".into(),
            (Some(e), None) if self.reachable => format!("not usable: {e}"),
            (Some(e), None) => format!("could not be asked: {e}"),
            (Some(e), Some(state)) => format!("{}: the next attach will be refused with: {e}", plain(state)),
        }
    }

    /// For programs.
    pub(super) fn json(&self) -> Value {
        json!({
            "reachable": self.reachable,
            "state": self.state.map(KeyState::name),
            "usable": self.refusal.is_none(),
            "message": self.refusal.as_ref().map(ToString::to_string),
        })
    }
}

fn plain(state: KeyState) -> &'static str {
    match state {
        KeyState::Enabled => "enabled",
        KeyState::Disabled => "disabled",
        KeyState::PendingDeletion => "pending deletion",
        KeyState::PendingImport => "pending import",
        KeyState::Unavailable => "unavailable",
        KeyState::PendingReplicaDeletion => "pending replica deletion",
        KeyState::Updating => "updating",
    }
}

/// A data key in JSON: its first KMS key, and all of them.
pub(super) fn key_json(key: &KeyRecord) -> Value {
    let KmsKey { provider, key_id } = key.first().kms_key();
    json!({"provider": provider, "key_id": key_id, "slots": key.kms_keys()})
}
