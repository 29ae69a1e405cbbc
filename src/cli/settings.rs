//! `sealblk settings`: what holds for every store that is used with this configuration folder, with EBS's
//! rules.
#![forbid(unsafe_code)]

use crate::base::{Error, Result};
use crate::cli::{Env, output};
use crate::config::{self, DEFAULT_KEY, Settings, edit, moving};
use clap::{Args, Subcommand, ValueEnum};
use serde_json::json;

/// The commands.
#[derive(Subcommand)]
pub enum Command {
    /// Show the settings.
    #[command(after_help = "Example:\n  sealblk settings show --json")]
    Show,
    /// Forbid making unencrypted volumes, or allow it. Volumes that exist stay as they are.
    #[command(after_help = "Example:\n  sealblk settings encrypt-by-default on")]
    EncryptByDefault(EncryptByDefault),
    /// Choose the KMS key of volumes that are made without --key. Volumes that exist keep theirs.
    #[command(after_help = "\
Examples:
  sealblk settings default-key alias/prod
  sealblk settings default-key --reset    alias/aws/ebs again, which is made at first use")]
    DefaultKey(DefaultKey),
    /// Move settings that an earlier version has left in the store into the configuration folder.
    #[command(after_help = "\
Examples:
  sealblk settings move --dry-run
  sealblk settings move

Whoever can write the store could have written them there: look at what they say. They hold for every store
that is used with this configuration folder.")]
    Move(Move),
}

/// Arguments of `settings move`.
#[derive(Args)]
pub struct Move {
    /// Show what would be moved, and change nothing.
    #[arg(long)]
    dry_run: bool,
}

/// Arguments of `settings encrypt-by-default`.
#[derive(Args)]
pub struct EncryptByDefault {
    /// Whether it holds.
    #[arg(value_enum)]
    state: OnOff,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum OnOff {
    /// No unencrypted volume can be made, by nobody.
    On,
    /// Unencrypted volumes can be made by --unencrypted.
    Off,
}

/// Arguments of `settings default-key`.
#[derive(Args)]
#[group(required = true, multiple = false)]
pub struct DefaultKey {
    /// The KMS key, by id, ARN or alias. It must be there and enabled.
    #[arg(value_name = "KEYREF")]
    key: Option<String>,
    /// Go back to alias/aws/ebs.
    #[arg(long)]
    reset: bool,
}

/// Runs one of the commands; each but the last prints the settings as they are then.
pub fn run(env: &Env, command: Command) -> Result<()> {
    let settings = match command {
        Command::Show => env.settings()?,
        Command::EncryptByDefault(args) => {
            edit::set(&env.root, "encrypt-by-default", Some((args.state == OnOff::On).into()))?
        }
        Command::DefaultKey(DefaultKey { key: Some(key), .. }) => {
            check(env, &key)?;
            edit::set(&env.root, "default-key", Some(key.into()))?
        }
        Command::DefaultKey(DefaultKey { key: None, .. }) => edit::set(&env.root, "default-key", None)?,
        Command::Move(args) => return move_old(env, &args),
    };
    show(env, &settings)
}

/// Shows what is moved before it is.
fn move_old(env: &Env, args: &Move) -> Result<()> {
    let old = moving::look(&env.root)?;
    let Some(old) = old else {
        return match env.json {
            true => {
                let to = config::file()?.display().to_string();
                output::print_json(&json!({"from": null, "to": to, "text": null, "moved": false}))
            }
            false => output::print("there are no settings in the store: nothing is to be moved\n").map(drop),
        };
    };
    let (from, to) = (old.from.display().to_string(), old.to.display().to_string());
    if !env.json {
        output::print(&format!("{from} says:\n\n{}\n", old.text))?;
    }
    if !args.dry_run {
        old.carry_out()?;
    }
    if env.json {
        let text = &old.text;
        return output::print_json(&json!({"from": from, "to": to, "text": text, "moved": !args.dry_run}));
    }
    let line = match (args.dry_run, old.is_there) {
        (true, false) => format!("it would be moved to {to}"),
        (true, true) => format!("{to} says the same; {from} would be removed"),
        (false, false) => {
            format!("it was moved to {to}, and holds for every store that is used with that folder")
        }
        (false, true) => format!("{to} says the same; {from} was removed"),
    };
    output::print(&format!("{line}\n")).map(drop)
}

/// Fails unless volumes can be made with `key` now. The alias of the key that is made at
/// first use may mean none yet.
fn check(env: &Env, key: &str) -> Result<()> {
    let unchanged = |e: Error| e.context(format!("make {key} the default key"));
    let store = env.store()?;
    let reference = store.reference(key).map_err(unchanged)?;
    let is_default = reference.key == DEFAULT_KEY;
    store.key_of(reference)?.check_usable(is_default).map_err(unchanged)
}

fn show(env: &Env, settings: &Settings) -> Result<()> {
    let file = config::file()?;
    let kms_keys: Option<Vec<String>> =
        settings.kms_keys.entries().map(|entries| entries.iter().map(ToString::to_string).collect());
    let key_order: Vec<String> = settings.key_order.entries().iter().map(ToString::to_string).collect();
    if env.json {
        return output::print_json(&json!({
            "file": file.display().to_string(),
            "root": settings.root,
            "default_key": settings.default_key,
            "also_keys": settings.also_keys,
            "key_order": key_order,
            "encrypt_by_default": settings.encrypt_by_default,
            "require_encrypted": settings.require_encrypted,
            "kms_keys": kms_keys,
            "clone_data_key": settings.clone_data_key.name(),
            "space_reserve": settings.space_reserve.given(),
            "region": settings.locality.region,
            "account": settings.locality.account,
        }));
    }
    let kms_keys = kms_keys.map_or_else(|| "every key".to_string(), |keys| keys.join(", "));
    let reserve = settings.space_reserve.to_string();
    let none = |names: &[String]| if names.is_empty() { "none".to_owned() } else { names.join(", ") };
    let (also_keys, key_order) = (none(&settings.also_keys), none(&key_order));
    let rows = [
        ("root", settings.root.as_deref().unwrap_or("the usual folder")),
        ("default-key", settings.default_key.as_str()),
        ("also-keys", &also_keys),
        ("key-order", &key_order),
        ("encrypt-by-default", on_off(settings.encrypt_by_default)),
        ("require-encrypted", on_off(settings.require_encrypted)),
        ("kms-keys", &kms_keys),
        ("clone-data-key", settings.clone_data_key.name()),
        ("space-reserve", &reserve),
        ("region", &settings.locality.region),
        ("account", &settings.locality.account),
    ];
    let from = if file.exists() { "" } else { " (not there: these are the defaults)" };
    let rows: Vec<_> = rows.iter().map(|(name, value)| vec![name.to_string(), value.to_string()]).collect();
    output::print(&format!("{}{from}\n\n{}", file.display(), output::table(&rows))).map(drop)
}

fn on_off(is_on: bool) -> &'static str {
    if is_on { "on" } else { "off" }
}
