//! `sealblk kms`: the embedded KMS as a server, and who may ask it.

use super::output::{print, print_json, table};
use super::{Env, key::date};
use crate::error::Result;
use crate::kms::embedded::Embedded;
use crate::kms::embedded::principals::{PrincipalMetadata, SecretKey};
use crate::kms::server::{self, Address};
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::path::PathBuf;

/// What can be done with the embedded KMS itself.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Answer AWS KMS's protocol, in the foreground: boto3, the AWS CLI and every AWS SDK understand it.
    #[command(after_help = "Example:\n  sealblk kms serve --listen 127.0.0.1:8600\n  \
                            AWS_ENDPOINT_URL_KMS=http://127.0.0.1:8600 aws kms list-keys")]
    Serve(ServeArgs),
    /// Make, show and delete those who may ask the server.
    #[command(subcommand, after_help = "Example:\n  sealblk kms principal create host-1")]
    Principal(PrincipalCommand),
}

/// Where to listen.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct ServeArgs {
    /// Listen on this loopback address; port 0 is any that is free.
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
    #[command(after_help = "Example:\n  sealblk kms principal list")]
    List,
    /// Delete a principal, its access key and the grants that were made for it.
    #[command(after_help = "Example:\n  sealblk kms principal delete host-1")]
    Delete(NameArg),
}

/// Arguments of `kms principal create`.
#[derive(Debug, Args)]
pub struct CreateArgs {
    #[command(flatten)]
    name: NameArg,
    /// Let it do everything.
    #[arg(long)]
    admin: bool,
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
    let kms = Embedded::open(&env.root)?;
    match command {
        Command::Serve(args) => serve(env, kms, args),
        Command::Principal(PrincipalCommand::Create(args)) => {
            let (made, secret) = kms.create_principal(&args.name.name, args.admin)?;
            created(env, &made, &secret)
        }
        Command::Principal(PrincipalCommand::List) => list(env, &kms.principals()?),
        Command::Principal(PrincipalCommand::Delete(NameArg { name })) => {
            kms.delete_principal(&name)?;
            match env.json {
                true => print_json(&json!({ "Name": name })),
                false => print(&format!("{name} deleted\n")).map(drop),
            }
        }
    }
}

fn serve(env: &Env, kms: Embedded, args: ServeArgs) -> Result<()> {
    let address = match (args.listen, args.socket_path) {
        (Some(address), _) => Address::Tcp(address),
        (None, Some(path)) => Address::Unix(path),
        (None, None) => unreachable!("clap asks for one of them"),
    };
    server::serve(kms, &address, |url| match env.json {
        true => print_json(&json!({ "Url": url })),
        false => print(&format!("listening on {url}\n")).map(drop),
    })
}

fn created(env: &Env, made: &PrincipalMetadata, secret: &SecretKey) -> Result<()> {
    if env.json {
        let mut shown = principal_json(made);
        shown["SecretAccessKey"] = secret.as_str().into();
        return print_json(&shown);
    }
    print(&format!(
        "{}\n\nAWS_ACCESS_KEY_ID={}\nAWS_SECRET_ACCESS_KEY={}\n\nThe secret is not shown again.\n",
        made.arn,
        made.access_key,
        secret.as_str()
    ))
    .map(drop)
}

fn list(env: &Env, principals: &[PrincipalMetadata]) -> Result<()> {
    if env.json {
        let all: Vec<Value> = principals.iter().map(principal_json).collect();
        return print_json(&json!({ "Principals": all }));
    }
    let mut rows = vec![["NAME", "ACCESS KEY", "MAY", "CREATED", "ARN"].map(String::from).to_vec()];
    rows.extend(principals.iter().map(|p| {
        let may = if p.admin { "everything" } else { "what grants allow" };
        vec![p.name.clone(), p.access_key.clone(), may.into(), date(p.created), p.arn.clone()]
    }));
    print(&table(&rows)).map(drop)
}

fn principal_json(principal: &PrincipalMetadata) -> Value {
    json!({
        "Name": principal.name,
        "Arn": principal.arn,
        "Admin": principal.admin,
        "AccessKeyId": principal.access_key,
        "CreationDate": date(principal.created),
    })
}
