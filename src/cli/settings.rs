//! `sealblk settings`: what holds for the whole store, with EBS's rules.
#![forbid(unsafe_code)]

use crate::base::{Error, Result};
use crate::cli::{Env, output};
use crate::config::{DEFAULT_KEY, Settings, edit};
use crate::kms::KeyRef;
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

/// Runs one of the commands; each prints the settings as they are then.
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
    };
    show(env, &settings)
}

/// Fails unless volumes can be made with `key` now. The alias of the key that is made at first use may mean none yet.
fn check(env: &Env, key: &str) -> Result<()> {
    let unchanged = |e: Error| e.context(format!("make {key} the default key"));
    let reference = KeyRef::of_operator(key, &env.settings()?.locality).map_err(unchanged)?;
    let is_default = reference.key == DEFAULT_KEY;
    env.store()?.key_of(reference)?.check_usable(is_default).map_err(unchanged)
}

fn show(env: &Env, settings: &Settings) -> Result<()> {
    let file = env.root.settings();
    if env.json {
        return output::print_json(&json!({
            "file": file.display().to_string(),
            "default_key": settings.default_key,
            "encrypt_by_default": settings.encrypt_by_default,
            "region": settings.locality.region,
            "account": settings.locality.account,
        }));
    }
    let on_off = if settings.encrypt_by_default { "on" } else { "off" };
    let rows = [
        ("default-key", settings.default_key.as_str()),
        ("encrypt-by-default", on_off),
        ("region", &settings.locality.region),
        ("account", &settings.locality.account),
    ];
    let from = if file.exists() { "" } else { " (not there: these are the defaults)" };
    let rows: Vec<_> = rows.iter().map(|(name, value)| vec![name.to_string(), value.to_string()]).collect();
    output::print(&format!("{}{from}\n\n{}", file.display(), output::table(&rows))).map(drop)
}
