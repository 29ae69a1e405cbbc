//! `sealblk key`: the keys and aliases of the embedded KMS.

#[cfg_attr(not(feature = "kms-server"), path = "no_regions.rs")]
mod regions;
mod shown;

use crate::base::root::Root;
use crate::base::{Context, Error, Kind, Result};
use crate::cli::{Env, output};
use crate::crypt::wiping_allocator;
use crate::kms::embedded::Embedded;
use crate::kms::embedded::admin::{KeyMetadata, NewKey};
use crate::kms::embedded::blob::Material;
use crate::kms::key_ref::{ALIAS_PREFIX, KeyRef, ProviderName, id_text};
use crate::kms::{KmsError, KmsKey};
use crate::ops::keys::{self, Needs};
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use shown::{alias_json, describe, key_json, list, list_aliases};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

pub(super) use shown::date;

/// What can be done with keys.
///
/// KEY is a key id or a unique beginning of one, a key ARN, an alias name or an alias ARN.
#[derive(Debug, Subcommand)]
pub enum KeyCommand {
    /// Make a key.
    #[command(
        after_help = "Example:\n  sealblk key create --description \"disks of team a\" --alias alias/team-a"
    )]
    Create(Create),
    /// List all keys.
    #[command(visible_alias = "ls", after_help = "Example:\n  sealblk key list --json")]
    List,
    /// Show a key, its state and its aliases.
    #[command(after_help = "Example:\n  sealblk key show alias/aws/ebs")]
    Show(KeyArgument),
    /// Switch a key on.
    #[command(after_help = "Example:\n  sealblk key enable alias/team-a")]
    Enable(KeyArgument),
    /// Switch a key off: what is attached goes on, the next attach is refused.
    #[command(after_help = "Example:\n  sealblk key disable alias/team-a")]
    Disable(Disable),
    /// Delete a key after a waiting window; every volume under it is lost then.
    #[command(after_help = "Example:\n  sealblk key schedule-deletion 1234abcd --days 14")]
    ScheduleDeletion(ScheduleDeletion),
    /// Keep a key that waits for deletion; it is disabled afterwards.
    #[command(after_help = "Example:\n  sealblk key cancel-deletion 1234abcd && sealblk key enable 1234abcd")]
    CancelDeletion(KeyArgument),
    /// Import the material of a key that was made with --external: 32 bytes, of your own keeping.
    ///
    /// The KMS takes the same material again at any time, and no other. Into a multi-Region key it is
    /// imported in each region, first in that of the primary key.
    #[command(
        after_help = "Example:\n  head -c 32 /dev/random > material\n  sealblk key import alias/own --from \
                      material"
    )]
    Import(Import),
    /// Forget the imported material of a key, which decrypts nothing until the same is imported again.
    #[command(after_help = "Example:\n  sealblk key delete-material alias/own")]
    DeleteMaterial(Disable),
    /// Give a multi-Region key a replica in another region.
    ///
    /// The key's material goes to the KMS of that region, wrapped for it, unless it was imported;
    /// [[kms-region]] in the settings says where that is (docs/kms-server.md). What was interrupted goes on
    /// when the same is asked again.
    #[command(after_help = "Example:\n  sealblk key replicate alias/team-a --region eu-west-1")]
    Replicate(Replicate),
    /// Make the replica in another region the primary key, which alone is rotated and replicated.
    #[command(after_help = "Example:\n  sealblk key primary alias/team-a --region eu-west-1")]
    Primary(InRegion),
    /// Bring all replicas what has changed of their primary keys here; "kms serve" does so by itself.
    #[command(after_help = "Example:\n  sealblk key synchronize")]
    Synchronize,
    /// Have a primary key forget its replica in a region that is lost for good.
    ///
    /// Rotation and deletion wait for every replica. The replica is not deleted by this; if its KMS comes
    /// back, it decrypts what it could decrypt before, and gets nothing new.
    #[command(after_help = "Example:\n  sealblk key forget-replica alias/team-a --region eu-west-1 --yes")]
    ForgetReplica(ForgetReplica),
    /// Names for keys.
    #[command(subcommand, after_help = "Example:\n  sealblk key alias create alias/team-a 1234abcd")]
    Alias(AliasCommand),
}

/// Arguments of `key create`.
#[derive(Debug, Args)]
pub struct Create {
    /// What the key is for, in your words.
    #[arg(long, value_name = "TEXT", default_value = "")]
    description: String,
    /// A name for the key; "alias/" is put before it if it is not there.
    #[arg(long, value_name = "NAME")]
    alias: Option<String>,
    /// Make the key in the token of this custom key store, by its name or id, which it never leaves.
    #[arg(long, value_name = "NAME")]
    key_store: Option<String>,
    /// Make a multi-Region key, which can be replicated into other regions under the same id.
    #[arg(long, conflicts_with = "key_store")]
    multi_region: bool,
    /// Make it without material, which is imported afterwards ("key import").
    #[arg(long, conflicts_with = "key_store")]
    external: bool,
}

/// Arguments of `key import`.
#[derive(Debug, Args)]
pub struct Import {
    #[command(flatten)]
    key: KeyArgument,
    /// The file with the 32 bytes, "-" for standard input.
    #[arg(long, value_name = "FILE")]
    from: PathBuf,
    /// Forget the material after so many days, 365 at most [default: never].
    #[arg(long, value_name = "DAYS")]
    days: Option<u32>,
}

/// A key and another region.
#[derive(Debug, Args)]
pub struct InRegion {
    #[command(flatten)]
    key: KeyArgument,
    /// The other region.
    #[arg(long, value_name = "REGION")]
    region: String,
}

/// Arguments of `key replicate`.
#[derive(Debug, Args)]
pub struct Replicate {
    #[command(flatten)]
    there: InRegion,
    /// What the replica is for, in your words.
    #[arg(long, value_name = "TEXT", default_value = "")]
    description: String,
}

/// Arguments of `key forget-replica`.
#[derive(Debug, Args)]
pub struct ForgetReplica {
    #[command(flatten)]
    there: InRegion,
    /// Yes, the region is lost for good.
    #[arg(long, required = true)]
    yes: bool,
}

/// The key that a command is about.
#[derive(Debug, Args)]
pub struct KeyArgument {
    /// Key id or a unique beginning of one, key ARN, alias name or alias ARN
    #[arg(value_name = "KEY")]
    key: String,
}

/// Arguments of `key disable`.
#[derive(Debug, Args)]
pub struct Disable {
    #[command(flatten)]
    key: KeyArgument,
    /// Do it though attached volumes need the key: they go on, and their next attach is refused.
    #[arg(long)]
    yes: bool,
}

/// Arguments of `key schedule-deletion`.
#[derive(Debug, Args)]
pub struct ScheduleDeletion {
    #[command(flatten)]
    key: KeyArgument,
    /// How long the deletion can be cancelled, 7 to 30.
    #[arg(long, value_name = "DAYS", default_value_t = 30)]
    days: u32,
    /// Do it though attached volumes need the key: they go on, and their next attach is refused.
    #[arg(long)]
    yes: bool,
}

/// What can be done with aliases.
#[derive(Debug, Subcommand)]
pub enum AliasCommand {
    /// Make a name for a key.
    #[command(after_help = "Example:\n  sealblk key alias create alias/team-a 1234abcd")]
    Create(AliasTarget),
    /// Point a name at another key; volumes keep the key they were made with.
    #[command(after_help = "Example:\n  sealblk key alias update alias/team-a 5678abcd")]
    Update(AliasTarget),
    /// Remove a name; the key stays.
    #[command(visible_alias = "rm", after_help = "Example:\n  sealblk key alias delete alias/team-a")]
    Delete(AliasArgument),
    /// List all names.
    #[command(visible_alias = "ls", after_help = "Example:\n  sealblk key alias list")]
    List,
}

/// The alias that a command is about.
#[derive(Debug, Args)]
pub struct AliasArgument {
    /// The name; "alias/" is put before it if it is not there.
    #[arg(value_name = "ALIAS")]
    alias: String,
}

/// An alias and the key it is to mean.
#[derive(Debug, Args)]
pub struct AliasTarget {
    #[command(flatten)]
    alias: AliasArgument,
    #[command(flatten)]
    key: KeyArgument,
}

/// Runs one `sealblk key` command.
pub fn run(env: &Env, command: KeyCommand) -> Result<()> {
    // Key material that goes to another region, and the secret that signs, pass buffers of
    // other people's code.
    wiping_allocator::wipe_from_now_on();
    let kms = keys::embedded(&env.root, env.hardened)?;
    // Of another KMS key that wraps the same data key.
    let mut asked: BTreeMap<KmsKey, bool> = BTreeMap::new();
    let mut is_usable = |key: &KmsKey| {
        let ask = || env.store().is_ok_and(|store| keys::is_usable_now(&store, key));
        *asked.entry(key.clone()).or_insert_with(ask)
    };
    let (text, json) = answer(&env.root, &kms, command, &mut is_usable)?;
    let text = if env.json { format!("{json:#}\n") } else { text };
    output::print(&text).map(drop)
}

/// The answer to a command, for people and for programs.
fn answer(
    root: &Root,
    kms: &Embedded,
    command: KeyCommand,
    is_usable: &mut dyn FnMut(&KmsKey) -> bool,
) -> Result<(String, Value)> {
    let tells_who_needs_it = matches!(
        command,
        KeyCommand::Show(_)
            | KeyCommand::Disable(_)
            | KeyCommand::ScheduleDeletion(_)
            | KeyCommand::DeleteMaterial(_)
    );
    let key = |argument: &KeyArgument| resolve(kms, &argument.key);
    let mut key_unless_needed = |argument: &KeyArgument, yes: bool| {
        let key = key(argument)?;
        if !yes {
            refuse_if_attached(root, &kms.key(&key)?.arn, is_usable)?;
        }
        Ok::<_, Error>(key)
    };
    let metadata = match command {
        KeyCommand::List => {
            let mut keys = kms.keys()?;
            keys.sort_by_cached_key(|key| (key.aliases.is_empty(), key.aliases.first().cloned(), key.id));
            return Ok(list(&keys));
        }
        KeyCommand::Alias(command) => return alias(kms, command),
        KeyCommand::Synchronize => return regions::synchronize(kms),
        KeyCommand::Create(c) => {
            let alias = c.alias.map(whole_alias);
            kms.create(&NewKey {
                description: &c.description,
                alias: alias.as_deref(),
                key_store: c.key_store.as_deref(),
                multi_region: c.multi_region,
                external: c.external,
                ..NewKey::default()
            })?
        }
        KeyCommand::Show(argument) => kms.key(&key(&argument)?)?,
        KeyCommand::Enable(argument) => kms.enable(&key(&argument)?)?,
        KeyCommand::Disable(d) => kms.disable(&key_unless_needed(&d.key, d.yes)?)?,
        KeyCommand::ScheduleDeletion(s) => {
            kms.schedule_deletion(&key_unless_needed(&s.key, s.yes)?, s.days)?
        }
        KeyCommand::CancelDeletion(argument) => kms.cancel_deletion(&key(&argument)?)?,
        KeyCommand::Import(args) => {
            let key = key(&args.key)?;
            kms.import_material(&key, &material(&args.from)?, args.days)?;
            tell_replicas(kms, &key)?;
            kms.key(&key)?
        }
        KeyCommand::DeleteMaterial(d) => {
            let key = key_unless_needed(&d.key, d.yes)?;
            kms.delete_material(&key)?;
            kms.key(&key)?
        }
        KeyCommand::Replicate(args) => {
            let key = key(&args.there.key)?;
            regions::replicate(kms, &key, &args.there.region, args.description)?;
            kms.key(&key)?
        }
        KeyCommand::Primary(args) => {
            let key = key(&args.key)?;
            regions::update_primary(kms, &key, &args.region)?;
            kms.key(&key)?
        }
        KeyCommand::ForgetReplica(args) => {
            let key = key(&args.there.key)?;
            kms.forget_replica(&key, &args.there.region)?;
            kms.key(&key)?
        }
    };
    let (mut text, mut value) = (describe(&metadata), key_json(&metadata));
    if tells_who_needs_it {
        let needs = keys::who_needs(root, &metadata.arn, is_usable)?;
        text.push_str(&needs_text(&needs));
        value["needed_by"] = json!({
            "volumes": needs.volumes.iter().map(|it| it.id).collect::<Vec<_>>(),
            "attached": needs.volumes.iter().filter(|it| it.is_attached).map(|it| it.id).collect::<Vec<_>>(),
            "snapshots": needs.snapshots.iter().map(|(id, _)| id).collect::<Vec<_>>(),
            "without_another_key": needs.without_another(),
        });
    }
    Ok((text, value))
}

/// Brings the replicas of a key what they are to know of its material; a region that is
/// away hears of it later.
fn tell_replicas(kms: &Embedded, key: &str) -> Result<()> {
    if kms.key(key)?.multi_region.is_some_and(|it| !it.behind.is_empty())
        && let Err(e) = regions::synchronize(kms)
    {
        log::warn!("no other region can import the material until it has heard of this: {e}");
    }
    Ok(())
}

/// The 32 bytes that a file holds, or standard input, read to where they stay.
fn material(file: &Path) -> Result<Material> {
    let read = || {
        let file = if file == Path::new("-") { Path::new("/dev/stdin") } else { file };
        let mut file = File::open(file)?;
        let material = Material::filled(|bytes| {
            file.read_exact(bytes).map_err(|e| match e.kind() {
                ErrorKind::UnexpectedEof => KmsError::Validation("it has less than 32 bytes".into()),
                _ => KmsError::Internal(e.to_string()),
            })
        })?;
        match file.read(&mut [0])? {
            0 => Ok(material),
            _ => Err(Error::new(Kind::Usage, "it has more than 32 bytes")),
        }
    };
    read().context(|| format!("read key material from {}", file.display()))
}

/// # Errors
/// `Busy`, naming them and what else needs the key, if attached volumes need it, and have no other KMS key.
fn refuse_if_attached(root: &Root, arn: &str, is_usable: &mut dyn FnMut(&KmsKey) -> bool) -> Result<()> {
    let needs = keys::who_needs(root, arn, is_usable)?;
    let attached =
        || needs.volumes.iter().filter(|it| it.is_attached && !it.has_another).map(|it| it.id.to_string());
    if attached().next().is_none() {
        return Ok(());
    }
    let attached_ids: Vec<String> = attached().collect();
    let others: Vec<String> =
        needs.without_another().into_iter().filter(|id| !attached_ids.contains(id)).collect();
    let others = if others.is_empty() { String::new() } else { format!("; so do {}", others.join(", ")) };
    let message = format!(
        "{arn} is needed by what is attached: {}{others}. What is attached goes on, and its next attach is \
         refused; --yes does it all the same",
        attached().collect::<Vec<_>>().join(", ")
    );
    Err(Error::new(Kind::Busy, message))
}

/// A key that something needs is no matter of its own: without it, that is not opened any more.
fn needs_text(needs: &Needs) -> String {
    let attached = |is: bool| if is { " (attached: it goes on until it is detached)" } else { "" };
    let other = |has: bool| if has { ", which has another key that can be used" } else { "" };
    let volumes = needs
        .volumes
        .iter()
        .map(|it| format!("needed by {}{}{}\n", it.id, other(it.has_another), attached(it.is_attached)));
    volumes
        .chain(needs.snapshots.iter().map(|(id, has)| format!("needed by {id}{}\n", other(*has))))
        .collect()
}

fn alias(kms: &Embedded, command: AliasCommand) -> Result<(String, Value)> {
    let name = match command {
        AliasCommand::List => return Ok(list_aliases(&kms.aliases()?)),
        AliasCommand::Create(target) => {
            let name = whole_alias(target.alias.alias);
            kms.create_alias(&name, &resolve(kms, &target.key.key)?)?;
            name
        }
        AliasCommand::Update(target) => {
            let name = whole_alias(target.alias.alias);
            kms.update_alias(&name, &resolve(kms, &target.key.key)?)?;
            name
        }
        AliasCommand::Delete(argument) => {
            let name = whole_alias(argument.alias);
            kms.delete_alias(&name)?;
            return Ok((format!("{name} deleted\n"), json!({ "alias": name })));
        }
    };
    let all = kms.aliases()?;
    // It was there a moment ago; who deleted it since has the last word.
    let alias = all.iter().find(|a| a.name == name);
    let text = alias.map_or(String::new(), |a| format!("{} -> {}\n", a.name, id_text(a.key)));
    Ok((text, alias.map_or(Value::Null, alias_json)))
}

/// The key argument that `text` means: beside what the KMS takes, a unique beginning of a key id.
fn resolve(kms: &Embedded, text: &str) -> Result<String> {
    let prefix = text.strip_prefix("embedded:").unwrap_or(text);
    let digits = prefix.strip_prefix("mrk-").unwrap_or(prefix);
    let is_prefix =
        (1..36).contains(&prefix.len()) && digits.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-');
    if is_prefix {
        return unique(&kms.keys()?, &prefix.to_ascii_lowercase());
    }
    // Here an ARN of this place is the embedded KMS's, whoever else has such ones.
    if kms.locality().parse(text).is_ok() {
        return Ok(text.to_owned());
    }
    let reference = KeyRef::parse(text, kms.locality())?;
    match reference.provider {
        ProviderName::Embedded => Ok(reference.key),
        ProviderName::Aws => Err(Error::new(
            Kind::Unsupported,
            format!(
                "{text} is a key of AWS KMS: manage it there (aws kms …); \"sealblk key\" is for the \
                 embedded KMS"
            ),
        )),
    }
}

fn unique(keys: &[KeyMetadata], prefix: &str) -> Result<String> {
    let ids: Vec<String> = keys.iter().map(|k| id_text(k.id)).filter(|id| id.starts_with(prefix)).collect();
    match &ids[..] {
        [id] => Ok(id.clone()),
        [] => Err(Error::new(Kind::NotFound, format!("no key's id begins with {prefix}"))),
        many => {
            let message = format!("{} keys begin with {prefix}: {}", many.len(), many.join(", "));
            Err(Error::new(Kind::Usage, message))
        }
    }
}

fn whole_alias(name: String) -> String {
    if name.starts_with(ALIAS_PREFIX) { name } else { format!("{ALIAS_PREFIX}{name}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::hardened::harden;
    use crate::kms::embedded::clock::SystemClock;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(subcommand)]
        command: KeyCommand,
    }

    struct Shell {
        kms: Embedded,
        dir: tempfile::TempDir,
    }

    impl Shell {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let kms = Embedded::at(
                dir.path().join("kms"),
                dir.path().join("config"),
                Box::new(SystemClock),
                harden().unwrap(),
            );
            Shell { kms, dir }
        }

        fn run(&self, line: &str) -> Result<(String, Value)> {
            let words = std::iter::once("key").chain(line.split(' '));
            let command = Cli::try_parse_from(words).unwrap().command;
            answer(&Root::new(self.dir.path()), &self.kms, command, &mut |_| false)
        }

        fn json(&self, line: &str) -> Value {
            self.run(line).unwrap().1
        }
    }

    #[test]
    fn a_key_goes_through_its_life() {
        let shell = Shell::new();
        assert_eq!(shell.json("list"), json!({ "keys": [] }));
        let made = shell.json("create --description disks --alias team-a");
        assert_eq!(made["aliases"], json!(["alias/team-a"]));
        let id = made["key_id"].as_str().unwrap();
        let arn = made["arn"].as_str().unwrap();
        for name in [id, arn, &id[..8], "alias/team-a", "arn:aws:kms:us-east-1:000000000000:alias/team-a"] {
            let mut shown = shell.json(&format!("show {name}"));
            let needed_by = shown.as_object_mut().unwrap().remove("needed_by");
            let nobody = json!({ "volumes": [], "attached": [], "snapshots": [], "without_another_key": [] });
            assert_eq!(needed_by, Some(nobody));
            assert_eq!(shown, made, "{name}");
        }
        assert_eq!(shell.json("disable alias/team-a")["state"], "Disabled");
        assert_eq!(shell.json("enable alias/team-a")["state"], "Enabled");
        let dying = shell.json(&format!("schedule-deletion {id} --days 7"));
        assert_eq!(dying["state"], "PendingDeletion");
        assert!(dying["deletion"].as_str().unwrap().ends_with('Z'));
        assert_eq!(shell.run(&format!("enable {id}")).unwrap_err().kind(), Kind::KmsRefused);
        assert_eq!(shell.json(&format!("cancel-deletion {id}"))["state"], "Disabled");
    }

    #[test]
    fn aliases_are_made_moved_listed_and_deleted() {
        let shell = Shell::new();
        let one = shell.json("create")["key_id"].as_str().unwrap().to_owned();
        let two = shell.json("create")["key_id"].as_str().unwrap().to_owned();
        assert_eq!(shell.json(&format!("alias create x {one}"))["key_id"], one);
        assert_eq!(shell.json(&format!("alias update alias/x {two}"))["key_id"], two);
        assert_eq!(shell.json("alias list")["aliases"][0]["alias"], "alias/x");
        assert_eq!(shell.json("alias delete x"), json!({ "alias": "alias/x" }));
        assert_eq!(shell.run("alias delete x").unwrap_err().kind(), Kind::NotFound);
        assert_eq!(
            shell.run(&format!("alias create alias/aws/x {one}")).unwrap_err().kind(),
            Kind::Usage,
            "reserved"
        );
    }

    #[test]
    fn beginnings_of_ids_must_be_unique() {
        let shell = Shell::new();
        for _ in 0..17 {
            shell.json("create");
        }
        let ids: Vec<String> = shell.kms.keys().unwrap().iter().map(|k| k.id.to_string()).collect();
        let first = |id: &String| id[..1].to_owned();
        let twice = ids.iter().find(|id| ids.iter().filter(|o| first(o) == first(id)).count() > 1).unwrap();
        assert_eq!(shell.run(&format!("show {}", first(twice))).unwrap_err().kind(), Kind::Usage);
        assert_eq!(shell.json(&format!("show {}", &ids[0][..20]))["key_id"], ids[0]);
        assert_eq!(shell.run("show aws:alias/x").unwrap_err().kind(), Kind::Unsupported);
    }
}
