//! `sealblk volume`: make, list, show, tag, rewrap and delete volumes.
#![forbid(unsafe_code)]

mod adopt;
pub(super) mod create;
pub(super) mod export;
mod import;
mod list;
mod modify;
mod rekey;
pub(super) mod resize;
mod send;
pub(super) mod show;
mod tag;

pub(super) use list::{FILTERS, chosen, is_wanted};
pub(super) use show::{attach_json, kept_words};

use crate::base::Result;
use crate::cli::space;
use crate::cli::{Env, rewrap, slots};
use crate::ops::delete;

/// The commands.
#[derive(clap::Subcommand)]
pub enum Command {
    /// Make a volume, empty or from a snapshot.
    Create(Box<create::CreateArgs>),
    /// Make a volume from a raw or qcow2 disk image.
    Import(import::ImportArgs),
    /// Write what a volume holds into a file, in the clear.
    Export(export::ExportArgs),
    /// Take a volume in that lies on a block device, from another host or another store.
    Adopt(adopt::AdoptArgs),
    /// List the volumes.
    #[command(
        visible_alias = "ls",
        after_help = "\
Examples:
  sealblk volume list --json
  sealblk volume list --sort size --reverse
  sealblk volume list --rates
  sealblk volume list --filter tag:Name=db --filter status=available

ON DISK is what a volume's layers take: those that nothing else names, and those that it shares with snapshots and other
volumes. The last line holds the sizes of all volumes, which they may come to take, against the file system: where that is
less, they are overcommitted. In JSON these are space and file_system. Where \"sealblk watch\" runs, KEY is what the KMS has
said last of the volume's keys; where limits are kept with a volume, LIMITS are these. With --rates, R/S and W/S are \
requests a second, READ/S and WRITTEN/S bytes a second, of attached volumes whose process answers."
    )]
    List(list::ListArgs),
    /// Show one volume: what it is, who has it attached, and what its next attach needs.
    Show(show::ShowArgs),
    /// The KMS keys that wrap a volume's data keys, any of which gives them: add, remove, list.
    #[command(subcommand, after_help = "Example:\n  sealblk volume key add db --key alias/spare")]
    Key(slots::VolumeCommand),
    /// Wrap a volume's data key by another KMS key, or by the newest version of the same one.
    Rewrap(rewrap::RewrapArgs),
    /// Give a volume a new data key, attached or not, and encrypt everything anew under it.
    Rekey(rekey::RekeyArgs),
    /// Move a volume onto a block device, or into a file, while it is in use.
    Move(rekey::MoveArgs),
    /// Make a volume's layers one, attached or not: it needs no snapshot's data any more then.
    Flatten(rekey::FlattenArgs),
    /// Send a volume to another host by a place that both reach, and delete it here when it has come.
    Send(send::SendArgs),
    /// Receive a volume that another host sends by a place.
    Receive(send::ReceiveArgs),
    /// Delete a volume and its data, unless it is attached.
    #[command(
        visible_alias = "rm",
        after_help = "\
Examples:
  sealblk volume delete db
  sealblk volume delete db --shred --json > receipt.json

Without its data key a volume's data is noise. --shred overwrites every wrapped copy of the data key in the store before
it removes it, and prints a receipt: what was destroyed, and what is outside its reach. Whoever kept a copy of
volume.json and can ask the KMS can still read a copy of the data: the receipt names the KMS key, and whether anything
else needs it."
    )]
    Delete(DeleteArgs),
    /// Make a volume larger.
    Resize(resize::ResizeArgs),
    /// Change limits, serial, queues and tags, which are kept with the volume.
    Modify(modify::ModifyArgs),
    /// Give a volume another name, attached or not.
    Rename(modify::RenameArgs),
    /// Give a volume tags.
    #[command(after_help = "Example:\n  sealblk volume tag db Name=db env=prod")]
    Tag(tag::TagArgs),
    /// Take tags away from a volume.
    #[command(after_help = "Example:\n  sealblk volume untag db env")]
    Untag(tag::UntagArgs),
}

impl Command {
    /// Whether it is there for a store in a pool.
    pub(super) fn is_for_pools(&self) -> bool {
        match self {
            Command::Create(args) => args.is_for_pools(),
            Command::List(_) | Command::Show(_) => true,
            Command::Export(_) | Command::Key(_) | Command::Rewrap(_) => true,
            Command::Modify(_) | Command::Rename(_) | Command::Tag(_) | Command::Untag(_) => true,
            Command::Rekey(args) => args.is_for_pools(),
            Command::Flatten(_) | Command::Resize(_) => true,
            // What lies in a cluster is overwritten nowhere.
            Command::Delete(args) => !args.shred && !args.unreadable,
            Command::Import(_)
            | Command::Adopt(_)
            | Command::Move(_)
            | Command::Send(_)
            | Command::Receive(_) => false,
        }
    }
}

/// What `volume delete` takes.
#[derive(clap::Args)]
pub struct DeleteArgs {
    #[command(flatten)]
    volume: OneVolume,
    /// Overwrite every wrapped copy of its data key, and print a receipt.
    #[arg(long, conflicts_with = "unreadable")]
    shred: bool,
    /// Give up a volume whose record cannot be read; it is named by its whole id. "sealblk gc" removes those
    /// of its layers that nothing else names.
    #[arg(long)]
    unreadable: bool,
    #[command(flatten)]
    giving: space::GivingArgs,
}

/// A command on one volume.
#[derive(clap::Args)]
pub struct OneVolume {
    /// The volume: its id, the first digits of its id, or its name.
    volume: String,
}

/// Runs one of the commands.
pub fn run(env: &Env, command: Command) -> Result<()> {
    match command {
        Command::Create(args) => create::run(env, &args),
        Command::Import(args) => import::run(env, &args),
        Command::Export(args) => export::run(env, &args),
        Command::Adopt(args) => adopt::run(env, &args),
        Command::List(args) => list::list(env, &args),
        Command::Show(args) => show::show(env, &args),
        Command::Key(command) => slots::volume(env, command),
        Command::Rewrap(args) => rewrap::volume(env, &args),
        Command::Rekey(args) => rekey::rekey(env, &args),
        Command::Move(args) => rekey::move_to(env, &args),
        Command::Flatten(args) => rekey::flatten(env, &args),
        Command::Send(args) => send::send(env, &args),
        Command::Receive(args) => send::receive(env, &args),
        Command::Delete(args) => delete(env, &args),
        Command::Resize(args) => resize::run(env, &args),
        Command::Modify(args) => modify::modify(env, &args),
        Command::Rename(args) => modify::rename(env, &args),
        Command::Tag(args) => tag::tag(env, &args),
        Command::Untag(args) => tag::untag(env, &args),
    }
}

fn delete(env: &Env, args: &DeleteArgs) -> Result<()> {
    let (store, id) = (env.store()?, env.catalog().resolve(&args.volume.volume)?);
    if args.shred {
        let receipt = delete::shred(&store.catalog(), &store.events(), id)?;
        return crate::cli::receipt::print(env, &receipt);
    }
    if args.unreadable {
        delete::delete_unreadable(&store.catalog(), &store.events(), id)?;
        return space::report_deleted(env, &id, None);
    }
    let layers = delete::delete(&store.catalog(), &store.events(), id)?;
    space::give_back_of_deleted(env, &store, &id, &layers, &args.giving)
}
