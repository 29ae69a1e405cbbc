//! `sealblk kms`: the embedded KMS as a server, its root key, and who may ask it.

use crate::base::hardened::Hardened;
use crate::base::root::{parent_of, sync_dir};
use crate::base::{Context, Error, Kind, Result};
use crate::cli::key::date;
use crate::cli::key_stores::{PinentryArgs, StoreCommand, TokenArgs};
use crate::cli::output::{print, print_json, table};
use crate::cli::{Env, input, key_stores};
use crate::crypt::wiping_allocator;
use crate::events::read::Want;
#[cfg(feature = "kms-server")]
use crate::host::notify::Notifier;
use crate::kms::embedded::Embedded;
use crate::kms::embedded::principals::{PrincipalMetadata, SecretKey};
use crate::kms::embedded::root_key::passphrase::{self, Passphrase};
use crate::kms::embedded::root_key::{self, Place};
#[cfg(feature = "kms-server")]
use crate::kms::server::{self, Address, tls::Files};
use crate::ops::keys;
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
#[cfg(feature = "kms-server")]
use std::sync::Arc;

/// More than a copy of a root key has, in bytes.
const MAX_COPY: u64 = 4096;

/// What can be done with the embedded KMS itself.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Answer AWS KMS's protocol, in the foreground: boto3, the AWS CLI and every AWS SDK understand it.
    #[command(after_help = "Example:\n  sealblk kms serve --listen 127.0.0.1:8600\n  \
                            AWS_ENDPOINT_URL_KMS=http://127.0.0.1:8600 aws kms list-keys")]
    Serve(ServeArgs),
    /// Make the store of the embedded KMS now; the first key would make it, too.
    ///
    /// With a passphrase its root key is of no use to whoever copies the file. Whoever needs the key is asked
    /// at the terminal, or gets the passphrase by SEALBLK_PASSPHRASE_FD=N, a descriptor to read it from, or
    /// as the systemd credential sealblk-kms-passphrase.
    #[command(after_help = "Example:\n  sealblk kms init --passphrase")]
    Init(InitArgs),
    /// Show where the KMS lies, and where its root key is.
    #[command(after_help = "Example:\n  sealblk kms show")]
    Show,
    /// Make a copy of the root key for bad days, under a passphrase.
    ///
    /// Whoever has the store's folder and the root key can read what is encrypted here; whoever has lost the
    /// root key never can. A copy belongs where neither the store nor its backups are: on paper, in a safe.
    /// The copy is two lines of text.
    #[command(after_help = "Examples:\n  sealblk kms backup /media/usb/kms-root-key\n  \
                            sealblk kms backup - | qrencode -o root-key.png")]
    Backup(BackupArgs),
    /// Put the root key back from a copy, where it is missing.
    ///
    /// The store's folder is restored before. The root key stays under the copy's passphrase, which whoever
    /// needs a key is asked for; "sealblk kms passphrase remove" takes it off.
    #[command(after_help = "Example:\n  sealblk kms restore /media/usb/kms-root-key")]
    Restore(RestoreArgs),
    /// Put the root key under a passphrase, under another one, or under none.
    #[command(subcommand, after_help = "Example:\n  sealblk kms passphrase set")]
    Passphrase(PassphraseCommand),
    /// Have a token of an HSM wrap the root key, or take it out again.
    #[command(
        subcommand,
        after_help = "Example:\n  sealblk kms root-key wrap --pkcs11 /usr/lib/softhsm/libsofthsm2.so --token \
                      volumes"
    )]
    RootKey(RootKeyCommand),
    /// Keep keys in HSMs: make a token a key store, connect it, disconnect it.
    #[command(
        subcommand,
        after_help = "Example:\n  sealblk kms store add --pkcs11 /usr/lib/softhsm/libsofthsm2.so --token \
                      volumes"
    )]
    Store(StoreCommand),
    /// Make, show and delete those who may ask the server.
    #[command(subcommand, after_help = "Example:\n  sealblk kms principal create host-1")]
    Principal(PrincipalCommand),
}

/// Arguments of `kms init`.
#[derive(Debug, Args)]
pub struct InitArgs {
    /// Keep the root key under a passphrase.
    #[arg(long)]
    passphrase: bool,
    #[command(flatten)]
    new: NewPassphraseArgs,
}

/// Arguments of `kms backup`.
#[derive(Debug, Args)]
pub struct BackupArgs {
    /// The file to write, which is not there yet; - is standard output.
    file: PathBuf,
    #[command(flatten)]
    new: NewPassphraseArgs,
}

/// Arguments of `kms restore`.
#[derive(Debug, Args)]
pub struct RestoreArgs {
    /// The copy; - is standard input.
    file: PathBuf,
}

/// What can be done with the passphrase.
#[derive(Debug, Subcommand)]
pub enum PassphraseCommand {
    /// Put the root key under a passphrase, or under another one. Nothing is encrypted anew.
    #[command(after_help = "Example:\n  sealblk kms passphrase set")]
    Set(NewPassphraseArgs),
    /// Keep the root key without a passphrase, for whoever can read its file.
    #[command(after_help = "Example:\n  sealblk kms passphrase remove")]
    Remove,
}

/// What can be done with the root key and a token.
#[derive(Debug, Subcommand)]
pub enum RootKeyCommand {
    /// Wrap the root key by a key that the token makes for it and never gives out. Nothing is encrypted anew.
    ///
    /// Whoever opens the KMS needs the token and its PIN from then on: by the descriptor that SEALBLK_PIN_FD
    /// names, by the systemd credential sealblk-pin-root-key, by a pinentry, or at the terminal. Make a copy
    /// first ("sealblk kms backup"): without the token, nothing else opens the KMS.
    #[command(
        after_help = "Example:\n  sealblk kms root-key wrap --pkcs11 /usr/lib/softhsm/libsofthsm2.so --token \
                      volumes"
    )]
    Wrap(WrapArgs),
    /// Keep the root key without the token, for whoever can read its file. The token's key stays there.
    #[command(after_help = "Example:\n  sealblk kms root-key unwrap")]
    Unwrap,
}

/// Arguments of `kms root-key wrap`.
#[derive(Debug, Args)]
pub struct WrapArgs {
    #[command(flatten)]
    token: TokenArgs,
    #[command(flatten)]
    pinentry: PinentryArgs,
}

/// A new passphrase.
#[derive(Debug, Args)]
pub struct NewPassphraseArgs {
    /// Read the new passphrase from this descriptor, up to the end of the line [default: ask
    /// at the terminal, twice].
    #[arg(long, value_name = "N")]
    new_passphrase_fd: Option<i32>,
}

impl NewPassphraseArgs {
    fn get(&self, hardened: Hardened) -> Result<Passphrase> {
        Ok(match self.new_passphrase_fd {
            Some(number) => Passphrase::from_descriptor(number, hardened)?,
            None => passphrase::new_at_terminal(hardened)?,
        })
    }
}

/// Arguments of `kms serve`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    #[command(flatten)]
    place: PlaceArgs,
    /// Serve by TLS with the certificate in this file, PEM, with those between it and what clients trust. It
    /// and the key are read again at SIGHUP.
    #[arg(long, value_name = "FILE", requires = "tls_key", conflicts_with = "socket_path")]
    tls_cert: Option<PathBuf>,
    /// The certificate's private key, PEM.
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
}

/// Where to listen.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct PlaceArgs {
    /// Listen on this address, without TLS a loopback one; port 0 is any that is free.
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Option<SocketAddr>,
    /// Listen on this Unix socket.
    #[arg(long, value_name = "PATH")]
    socket_path: Option<PathBuf>,
}

/// What can be done with principals.
#[derive(Debug, Subcommand)]
pub enum PrincipalCommand {
    /// Make a principal and its access key, and show the secret this once.
    ///
    /// The principal "root" may do everything, one made with --admin too; others what grants let them do.
    #[command(after_help = "Example:\n  sealblk kms principal create root")]
    Create(CreateArgs),
    /// List all principals.
    #[command(visible_alias = "ls", after_help = "Example:\n  sealblk kms principal list")]
    List,
    /// Delete a principal, its access key and the grants that were made for it.
    #[command(visible_alias = "rm", after_help = "Example:\n  sealblk kms principal delete host-1")]
    Delete(NameArg),
    /// Give a principal a second access key, and show the secret this once: first replace the old key
    /// wherever it is used, then delete it.
    #[command(after_help = "Example:\n  sealblk kms principal create-key host-1")]
    CreateKey(NameArg),
    /// Delete one of the two access keys of a principal.
    #[command(after_help = "Example:\n  sealblk kms principal delete-key host-1 AKIA…")]
    DeleteKey(DeleteKeyArgs),
}

/// Arguments of `kms principal delete-key`.
#[derive(Debug, Args)]
pub struct DeleteKeyArgs {
    #[command(flatten)]
    name: NameArg,
    /// The id of the access key.
    #[arg(value_name = "ACCESS_KEY")]
    access_key: String,
}

/// Arguments of `kms principal create`.
#[derive(Debug, Args)]
pub struct CreateArgs {
    #[command(flatten)]
    name: NameArg,
    /// Let it do everything.
    #[arg(long)]
    admin: bool,
    /// It is the KMS of this region: let it bring multi-Region keys that have their primary key there, and do
    /// nothing else. What is printed is what the "credentials" of [[kms-region]] are there.
    #[arg(long, value_name = "REGION", conflicts_with = "admin")]
    peer: Option<String>,
}

/// A principal.
#[derive(Debug, Args)]
pub struct NameArg {
    /// The principal's name: 1 to 64 letters, digits and +=,.@_-
    #[arg(value_name = "NAME")]
    name: String,
}

/// Runs one `sealblk kms` command.
pub fn run(env: &Env, command: Command) -> Result<()> {
    // Data keys, passphrases and the secrets of principals pass buffers of other people's code.
    wiping_allocator::wipe_from_now_on();
    let kms = keys::embedded(&env.root, env.hardened)?;
    match command {
        Command::Show => show(env, &kms),
        Command::Backup(args) => backup(env, &kms, &args),
        Command::Restore(args) => restore(env, &kms, &args),
        Command::Serve(args) => serve(env, kms, args),
        Command::Init(args) => {
            let wanted = args.passphrase || args.new.new_passphrase_fd.is_some();
            let passphrase = if wanted { Some(args.new.get(env.hardened)?) } else { None };
            kms.init(passphrase.as_ref())?;
            root_key_is(env, wanted, "the KMS store is made")
        }
        Command::Passphrase(PassphraseCommand::Set(new)) => {
            // The old one first, as everywhere.
            kms.unlock()?;
            kms.protect_root_key(Some(&new.get(env.hardened)?))?;
            root_key_is(env, true, "the passphrase is set")
        }
        Command::Passphrase(PassphraseCommand::Remove) => {
            kms.protect_root_key(None)?;
            root_key_is(env, false, "the passphrase is removed")
        }
        Command::RootKey(RootKeyCommand::Wrap(args)) => {
            key_stores::check_built()?;
            let place = args.token.place()?;
            // The old one first, as everywhere.
            kms.unlock()?;
            args.pinentry.choose();
            kms.wrap_root_key(place, passphrase::pin(None, "the KMS root key", env.hardened)?)?;
            root_key_is_wrapped(env, true, "the root key is wrapped by the token")
        }
        Command::RootKey(RootKeyCommand::Unwrap) => {
            let (_, place) = kms.root_key_place()?;
            if !matches!(place, Place::InHsm(_)) {
                return Err(Error::new(Kind::Usage, "the root key is not wrapped by an HSM"));
            }
            kms.protect_root_key(None)?;
            root_key_is_wrapped(env, false, "the root key is in its file again")
        }
        Command::Store(command) => key_stores::run(env, &kms, command),
        Command::Principal(PrincipalCommand::Create(args)) => {
            let name = &args.name.name;
            let (made, secret) = match &args.peer {
                Some(region) => kms.create_peer(name, region)?,
                None => kms.create_principal(name, args.admin)?,
            };
            created(env, &made, &secret)
        }
        Command::Principal(PrincipalCommand::CreateKey(NameArg { name })) => {
            let (access_key, secret) = kms.create_access_key(&name)?;
            key_created(env, &name, &access_key, &secret)
        }
        Command::Principal(PrincipalCommand::DeleteKey(args)) => {
            kms.delete_access_key(&args.name.name, &args.access_key)?;
            match env.json {
                true => print_json(&json!({ "name": args.name.name, "access_key_id": args.access_key })),
                false => print(&format!("{} deleted\n", args.access_key)).map(drop),
            }
        }
        Command::Principal(PrincipalCommand::List) => list(env, &kms.principals()?),
        Command::Principal(PrincipalCommand::Delete(NameArg { name })) => {
            kms.delete_principal(&name)?;
            match env.json {
                true => print_json(&json!({ "name": name })),
                false => print(&format!("{name} deleted\n")).map(drop),
            }
        }
    }
}

fn show(env: &Env, kms: &Embedded) -> Result<()> {
    let (store, place) = kms.root_key_place()?;
    let folder = env.root.kms();
    let (path, kept, words) = match &place {
        Place::File(path) => (path, "file", "in the clear, for whoever can read the file"),
        Place::UnderPassphrase(path) => (path, "passphrase", "under a passphrase"),
        Place::InHsm(path) => (path, "hsm", "wrapped by an HSM"),
        Place::Credential(path) => (path, "credential", "a systemd credential"),
        Place::Missing(path) => (path, "missing", "MISSING: put it back from a backup"),
    };
    if env.json {
        let root_key = json!({ "path": path.display().to_string(), "kept": kept });
        return print_json(&json!({
            "store": store,
            "folder": folder.display().to_string(),
            "root_key": root_key,
        }));
    }
    let rows = [
        ["KMS:", &store.to_string()],
        ["Folder:", &folder.display().to_string()],
        ["Root key:", &format!("{} ({words})", path.display())],
    ];
    print(&table(&rows.map(|row| row.map(String::from).to_vec()))).map(drop)
}

fn backup(env: &Env, kms: &Embedded, args: &BackupArgs) -> Result<()> {
    let to_file = args.file != Path::new("-");
    if to_file && args.file.symlink_metadata().is_ok() {
        let message = format!("there is something at {} already; choose another name", args.file.display());
        return Err(Error::new(Kind::Busy, message));
    }
    // The old one first, as everywhere.
    kms.unlock()?;
    let copy = kms.back_up_root_key(&args.new.get(env.hardened)?)?;
    if !to_file {
        // A reader that has gone away has no copy.
        return match print(&copy)? {
            Want::More => Ok(kms.note_root_key_copied()?),
            Want::Enough => Ok(()),
        };
    }
    root_key::write(&args.file, copy.as_bytes()).context(|| format!("write {}", args.file.display()))?;
    sync_dir(parent_of(&args.file))?;
    kms.note_root_key_copied()?;
    let file = args.file.display().to_string();
    match env.json {
        true => print_json(&json!({ "file": file })),
        false => print(&format!(
            "{file} is a copy of the root key, under the passphrase. Keep it where neither the store nor its \
             backups are\n"
        ))
        .map(drop),
    }
}

fn restore(env: &Env, kms: &Embedded, args: &RestoreArgs) -> Result<()> {
    let copy = input::read(&args.file, MAX_COPY).context(|| format!("read {}", args.file.display()))?;
    let path = kms.restore_root_key(&copy)?.display().to_string();
    match env.json {
        true => print_json(&json!({ "root_key": path })),
        false => {
            print(&format!("{path} is the root key again, under the passphrase of the copy\n")).map(drop)
        }
    }
}

fn root_key_is(env: &Env, under_passphrase: bool, done: &str) -> Result<()> {
    match env.json {
        true => print_json(&json!({ "root_key_under_passphrase": under_passphrase })),
        false => print(&format!("{done}\n")).map(drop),
    }
}

fn root_key_is_wrapped(env: &Env, by_hsm: bool, done: &str) -> Result<()> {
    match env.json {
        true => print_json(&json!({ "root_key_wrapped_by_hsm": by_hsm })),
        false => print(&format!("{done}\n")).map(drop),
    }
}

#[cfg(not(feature = "kms-server"))]
fn serve(_: &Env, _: Embedded, _: ServeArgs) -> Result<()> {
    let message = "a KMS is served by the feature kms-server, without which this sealblk was built";
    Err(Error::new(Kind::Unsupported, message))
}

#[cfg(feature = "kms-server")]
fn serve(env: &Env, kms: Embedded, args: ServeArgs) -> Result<()> {
    let address = match (args.place.listen, args.place.socket_path) {
        (Some(address), _) => Address::Tcp(address),
        (None, Some(path)) => Address::Unix(path),
        (None, None) => unreachable!("clap asks for one of them"),
    };
    kms.unlock()?;
    // Who has no certificate has nothing to read again, and does not end by being told to.
    let again = signal_hook::flag::register(signal_hook::consts::SIGHUP, Arc::default());
    again.context(|| "wait for SIGHUP")?;
    let tls = args.tls_cert.zip(args.tls_key).map(|(certificate, key)| Files { certificate, key });
    server::serve(kms, &address, tls, |url| {
        match env.json {
            true => print_json(&json!({ "url": url })),
            false => print(&format!("listening on {url}\n")).map(drop),
        }?;
        Notifier::connect().ready();
        Ok(())
    })
}

fn created(env: &Env, made: &PrincipalMetadata, secret: &SecretKey) -> Result<()> {
    if env.json {
        let mut shown = principal_json(made);
        shown["secret_access_key"] = secret.as_str().into();
        return print_json(&shown);
    }
    print(&format!("{}\n\n{}", made.arn, access_key_text(&made.access_keys[0], secret))).map(drop)
}

fn key_created(env: &Env, name: &str, access_key: &str, secret: &SecretKey) -> Result<()> {
    match env.json {
        true => print_json(
            &json!({ "name": name, "access_key_id": access_key, "secret_access_key": secret.as_str() }),
        ),
        false => print(&access_key_text(access_key, secret)).map(drop),
    }
}

fn access_key_text(access_key: &str, secret: &SecretKey) -> String {
    let secret = secret.as_str();
    format!(
        "AWS_ACCESS_KEY_ID={access_key}\nAWS_SECRET_ACCESS_KEY={secret}\n\nThe secret is not shown again.\n"
    )
}

fn list(env: &Env, principals: &[PrincipalMetadata]) -> Result<()> {
    if env.json {
        let all: Vec<Value> = principals.iter().map(principal_json).collect();
        return print_json(&json!({ "principals": all }));
    }
    let mut rows = vec![["NAME", "ACCESS KEYS", "MAY", "CREATED", "ARN"].map(String::from).to_vec()];
    rows.extend(principals.iter().map(|p| {
        let may = match &p.peer {
            Some(region) => format!("bring keys of {region}"),
            None if p.admin => "everything".into(),
            None => "what grants allow".into(),
        };
        vec![p.name.clone(), p.access_keys.join(" "), may, date(p.created), p.arn.clone()]
    }));
    print(&table(&rows)).map(drop)
}

fn principal_json(principal: &PrincipalMetadata) -> Value {
    let mut shown = json!({
        "name": principal.name,
        "arn": principal.arn,
        "admin": principal.admin,
        "access_key_id": principal.access_keys[0],
        "access_key_ids": principal.access_keys,
        "created": date(principal.created),
    });
    if let Some(region) = &principal.peer {
        shown["peer"] = region.as_str().into();
    }
    shown
}
