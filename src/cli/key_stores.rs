//! `sealblk kms store`: custom key stores, which are tokens of HSMs.

use crate::base::{Error, Kind, Result};
use crate::cli::Env;
use crate::cli::key::date;
use crate::cli::output::{print, print_json, table};
use crate::hsm::Place;
use crate::kms::KmsError;
use crate::kms::embedded::Embedded;
use crate::kms::embedded::key_stores::{KeyStoreChanges, KeyStoreMetadata, NewKeyStore};
use crate::kms::embedded::records::Connection;
use crate::kms::embedded::root_key::{passphrase, pinentry};
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use std::path::PathBuf;

/// What can be done with custom key stores.
#[derive(Debug, Subcommand)]
pub enum StoreCommand {
    /// Make a token of an HSM a key store, and connect it. "sealblk key create --key-store NAME" then makes
    /// keys there, which never leave the token.
    ///
    /// The token's PIN comes from the descriptor that SEALBLK_PIN_FD names, from the systemd credential
    /// sealblk-pin-ID, from a pinentry, or from the terminal; whoever needs a key needs it too, unless it is
    /// kept.
    #[command(
        after_help = "Example:\n  sealblk kms store add --pkcs11 /usr/lib/softhsm/libsofthsm2.so --token \
                      volumes"
    )]
    Add(AddArgs),
    /// List the key stores.
    #[command(visible_alias = "ls", after_help = "Example:\n  sealblk kms store list")]
    List,
    /// Let the keys of a key store be used, once its token was logged in to.
    #[command(after_help = "Example:\n  sealblk kms store connect volumes")]
    Connect(ConnectArgs),
    /// Let no key of a key store be used until it is connected again. What is attached goes on.
    #[command(after_help = "Example:\n  sealblk kms store disconnect volumes")]
    Disconnect(NameArg),
    /// Change the name, the PIN that is kept, or the place of the token of a key store that is disconnected.
    #[command(after_help = "Example:\n  sealblk kms store update volumes --new-name disks")]
    Update(UpdateArgs),
    /// Remove a key store that is disconnected and has no keys. The token stays as it is.
    #[command(visible_alias = "rm", after_help = "Example:\n  sealblk kms store remove volumes")]
    Remove(NameArg),
}

/// Who asks for a PIN.
#[derive(Debug, Args)]
pub struct PinentryArgs {
    /// Have this program ask for the token's PIN, in a window or at a terminal, as GnuPG has it [default
    /// without a name: pinentry]. SEALBLK_PINENTRY names one for every command.
    #[arg(long, value_name = "PROGRAM", num_args = 0..=1, require_equals = true, default_missing_value = "pinentry")]
    pinentry: Option<PathBuf>,
}

impl PinentryArgs {
    /// Whether there is one, which is asked from now on.
    pub(super) fn choose(&self) -> bool {
        self.pinentry.as_deref().map(pinentry::choose).is_some()
    }
}

/// Where a token is.
#[derive(Debug, Args)]
pub struct TokenArgs {
    /// The vendor's PKCS#11 module. A confined process of its own loads it.
    #[arg(long, value_name = "MODULE")]
    pkcs11: PathBuf,
    /// The token's label.
    #[arg(long, value_name = "LABEL")]
    token: String,
    #[command(flatten)]
    reach: ReachArgs,
}

/// What a module may reach.
#[derive(Debug, Args)]
pub struct ReachArgs {
    /// A file, folder or device that the module reads and writes, by its absolute path; may be given several
    /// times. What SoftHSM needs is known.
    #[arg(long = "path", value_name = "PATH")]
    paths: Vec<PathBuf>,
    /// Let the module reach its token by the network, or by a socket of this machine.
    #[arg(long)]
    network: bool,
}

/// Arguments of `kms store add`.
#[derive(Debug, Args)]
pub struct AddArgs {
    /// The key store's name [default: the token's label].
    #[arg(value_name = "NAME")]
    name: Option<String>,
    #[command(flatten)]
    token: TokenArgs,
    #[command(flatten)]
    pinentry: PinentryArgs,
    /// Keep the PIN in the KMS's log, sealed under the root key, so that nobody else has to give it.
    #[arg(long)]
    keep_pin: bool,
}

/// Arguments of `kms store update`.
#[derive(Debug, Args)]
#[group(id = "change", required = true, multiple = true, args = ["new_name", "keep_pin", "pkcs11"])]
pub struct UpdateArgs {
    #[command(flatten)]
    name: NameArg,
    /// Another name.
    #[arg(long, value_name = "NAME")]
    new_name: Option<String>,
    /// Keep another PIN, which comes as for "add".
    #[arg(long)]
    keep_pin: bool,
    /// Another PKCS#11 module by which the token is reached.
    #[arg(long, value_name = "MODULE", requires = "token")]
    pkcs11: Option<PathBuf>,
    /// The label of a token that has the same keys.
    #[arg(long, value_name = "LABEL", requires = "pkcs11")]
    token: Option<String>,
    #[command(flatten)]
    reach: ReachArgs,
    #[command(flatten)]
    pinentry: PinentryArgs,
}

/// Arguments of `kms store connect`.
#[derive(Debug, Args)]
pub struct ConnectArgs {
    #[command(flatten)]
    name: NameArg,
    #[command(flatten)]
    pinentry: PinentryArgs,
}

/// A key store.
#[derive(Debug, Args)]
pub struct NameArg {
    /// The key store's name or id.
    #[arg(value_name = "NAME")]
    name: String,
}

/// Runs one `sealblk kms store` command.
pub(super) fn run(env: &Env, kms: &Embedded, command: StoreCommand) -> Result<()> {
    match command {
        StoreCommand::Add(args) => check_built().and_then(|()| add(env, kms, args)),
        StoreCommand::List => list(env, &kms.key_stores()?),
        StoreCommand::Connect(ConnectArgs { name: NameArg { name }, pinentry }) => {
            // Whoever has it asked for does not mean the one that is kept.
            let asked = pinentry
                .choose()
                .then(|| passphrase::pin(None, &passphrase::of_key_store(&name), env.hardened));
            let pin = asked.transpose()?;
            // What has failed is disconnected first, as on the wire.
            if kms.key_store(&name)?.connection.error_code().is_some() {
                kms.disconnect_key_store(&name)?;
            }
            kms.connect_key_store(&name, pin)?;
            tell(env, &kms.key_store(&name)?, "connected")
        }
        StoreCommand::Disconnect(NameArg { name }) => {
            kms.disconnect_key_store(&name)?;
            tell(env, &kms.key_store(&name)?, "disconnected")
        }
        StoreCommand::Update(args) => update(env, kms, args),
        StoreCommand::Remove(NameArg { name }) => {
            let store = kms.key_store(&name)?;
            kms.delete_key_store(&store.id)?;
            match env.json {
                true => print_json(&json!({ "id": store.id, "name": store.name })),
                false => print(&format!("{} removed\n", store.name)).map(drop),
            }
        }
    }
}

/// # Errors
/// `Unsupported` where this program has no PKCS#11.
pub(super) fn check_built() -> Result<()> {
    if cfg!(feature = "pkcs11") {
        return Ok(());
    }
    let message = "keys in HSMs are used by the feature pkcs11, without which this sealblk was built";
    Err(Error::new(Kind::Unsupported, message))
}

fn add(env: &Env, kms: &Embedded, args: AddArgs) -> Result<()> {
    let place = args.token.place()?;
    let name = args.name.unwrap_or_else(|| place.token.clone());
    args.pinentry.choose();
    let pin = passphrase::pin(None, &passphrase::of_key_store(&name), env.hardened)?;
    let kept = args.keep_pin.then(|| pin.clone());
    let id = kms.create_key_store(&NewKeyStore { name: &name, place, cluster: None, pin: kept })?;
    if let Err(e) = kms.connect_key_store(&id, Some(pin)) {
        // Nothing half done.
        let removed = kms.disconnect_key_store(&id).and_then(|()| kms.delete_key_store(&id));
        if let Err(e) = removed {
            log::warn!("the key store {id} was made, and cannot be removed: {e}");
        }
        return Err(of_token(e));
    }
    tell(env, &kms.key_store(&id)?, "connected")
}

fn update(env: &Env, kms: &Embedded, args: UpdateArgs) -> Result<()> {
    let name = &args.name.name;
    let place = match (args.pkcs11, args.token) {
        (Some(module), Some(token)) => Some((place(module, token, args.reach)?, None)),
        _ => None,
    };
    let id = kms.key_store(name)?.id;
    args.pinentry.choose();
    let pin = args
        .keep_pin
        .then(|| passphrase::pin(Some(&id), &passphrase::of_key_store(name), env.hardened))
        .transpose()?;
    kms.update_key_store(&id, &KeyStoreChanges { name: args.new_name.as_deref(), pin, place })?;
    tell(env, &kms.key_store(&id)?, "updated")
}

impl TokenArgs {
    /// Where it is.
    pub(super) fn place(self) -> Result<Place> {
        place(self.pkcs11, self.token, self.reach)
    }
}

fn place(module: PathBuf, token: String, reach: ReachArgs) -> Result<Place> {
    let absolute = |path: &PathBuf| std::path::absolute(path).map_err(Error::from);
    if token.is_empty() || token.len() > 32 {
        return Err(Error::new(Kind::Usage, "a token's label has 1 to 32 bytes"));
    }
    let paths = reach.paths.iter().map(absolute).collect::<Result<_>>()?;
    Ok(Place { module: absolute(&module)?, token, paths, network: reach.network })
}

fn of_token(e: KmsError) -> Error {
    Error::from(e).context("the key store was not made")
}

fn tell(env: &Env, store: &KeyStoreMetadata, done: &str) -> Result<()> {
    match env.json {
        true => print_json(&store_json(store)),
        false => print(&format!("{} ({}) {done}\n", store.name, store.id)).map(drop),
    }
}

fn list(env: &Env, stores: &[KeyStoreMetadata]) -> Result<()> {
    if env.json {
        return print_json(&json!({ "key_stores": stores.iter().map(store_json).collect::<Vec<_>>() }));
    }
    let mut rows = vec![["NAME", "ID", "STATE", "KEYS", "TOKEN", "MODULE"].map(String::from).to_vec()];
    rows.extend(stores.iter().map(|store| {
        let module = store.place.module.display().to_string();
        let keys = store.keys.to_string();
        vec![store.name.clone(), store.id.clone(), state(store), keys, store.place.token.clone(), module]
    }));
    print(&table(&rows)).map(drop)
}

fn state(store: &KeyStoreMetadata) -> String {
    let words = match store.connection {
        Connection::Connected => "connected",
        Connection::Disconnected => "disconnected",
        Connection::FailedByPin => "failed: the PIN is wrong",
        Connection::FailedByLockedPin => "failed: the PIN is locked",
        Connection::FailedByToken => "failed: there is no such token",
        Connection::Failed => "failed",
    };
    words.to_owned()
}

fn store_json(store: &KeyStoreMetadata) -> Value {
    json!({
        "id": store.id,
        "name": store.name,
        "cluster": store.cluster,
        "module": store.place.module.display().to_string(),
        "token": store.place.token,
        "paths": store.place.paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>(),
        "network": store.place.network,
        "state": store.connection.name(),
        "error": store.connection.error_code(),
        "keeps_pin": store.keeps_pin,
        "keys": store.keys,
        "created": date(store.created),
    })
}
