//! `sealblk volume rekey` and `sealblk volume flatten`.
#![forbid(unsafe_code)]

use super::create::take;
use super::show;
use crate::base::plural::counted;
use crate::base::{Error, Kind, Result, size};
use crate::catalog::VolumeId;
use crate::cli::budget::SpaceArgs;
use crate::cli::meter::Meter;
use crate::cli::slots::AlsoArgs;
use crate::cli::{Env, output};
use crate::ops::device::Candidate;
use crate::ops::flatten::Pace;
use crate::ops::move_to::{self, Target};
use crate::ops::need::Budget;
use crate::ops::rekey::{self, Rekeyed};
use crate::ops::{Store, flatten};
use std::path::PathBuf;
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

What was written since is under the new data key, so a re-keying cannot be taken back; and until everything was copied, the
volume needs both keys, so it cannot be left half done for good. \"throttle\" with \"--hydrate-rate 1\" has the copy stand still.

What is going to be copied has to fit: it is refused where the file system has not so much space beyond the reserve (exit
code 8). A copy that comes to the reserve waits, and goes on by itself when there is space. With --follow, what nothing
else needs is given back behind the copy, every GiB and whenever it waits, and no more than 64 MiB of that has to fit. Without
--follow, \"sealblk gc\" gives it back at any time: the process that copies cannot know what others need.

To change only the KMS key that wraps the data key, which is done at once, see \"volume rewrap\".")]
pub struct RekeyArgs {
    /// The volume: its id, the first digits of its id, or its name.
    volume: String,
    /// The KMS key that wraps the new data key, by id, ARN or alias [default: those that wrap the old one].
    #[arg(long, value_name = "KEYREF")]
    key: Option<String>,
    #[command(flatten)]
    also: AlsoArgs,
    /// The block device or NBD export (unix:/PATH) that what is encrypted anew shall lie on. The volume has
    /// to be detached for that moment.
    #[arg(long, value_name = "DEVICE")]
    onto: Option<PathBuf>,
    /// With --onto: make the device zeros first: whatever it holds is lost.
    #[arg(long, requires = "onto")]
    wipe: bool,
    /// Is refused: says why, and what can be done.
    #[arg(long, hide = true)]
    cancel: bool,
    #[command(flatten)]
    following: FollowArgs,
}

impl RekeyArgs {
    /// Whether this is there for a store in a pool.
    pub(super) fn is_for_pools(&self) -> bool {
        self.onto.is_none()
    }
}

/// What `volume move` takes.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sealblk volume move db --to /dev/vg/db --wipe --follow
  sealblk volume move db --to rbd:rbd/db --follow
  sealblk volume move db --to file

Puts an empty top layer there, which takes what is written from now on, and has everything else copied into it: in the
background while the volume is attached (see \"attach --hydrate-rate\"); with --follow on a volume that nobody has
attached, by this command. When that is done, what lay elsewhere goes, unless a snapshot needs it; a device that the
volume lay on is free then. Whatever interrupts it, it goes on at the next attach. The volume has to be detached for
the moment in which it gets its new top, and not for the copying. Id, name and keys stay what they are.")]
pub struct MoveArgs {
    /// The volume: its id, the first digits of its id, or its name.
    volume: String,
    /// Where: a block device, an NBD export (unix:/PATH), an RBD image (rbd:POOL/IMAGE, which is made if it
    /// is not there), or \"file\" for a file of the store.
    #[arg(long, value_name = "DEVICE|file")]
    to: PathBuf,
    /// Make the device zeros first: whatever it holds is lost.
    #[arg(long)]
    wipe: bool,
    #[command(flatten)]
    following: FollowArgs,
}

/// What `volume flatten` takes.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sealblk volume flatten db --follow
  sealblk volume flatten clone       in the background, while it is attached
  sealblk volume flatten clone --cancel

What lower layers hold, which the volume shares with snapshots, is copied into its own layer: in the background while it is
attached (see \"attach --hydrate-rate\"); with --follow on a volume that nobody has attached, by this command. Whatever
interrupts it, it goes on at the next attach. Where the file system has too little space for it beyond the reserve, it is
refused (exit code 8). A copy that comes to the reserve waits, and goes on by itself when there is space.

--cancel takes it back: the layers stay in the volume's chain, and what was copied until then stays in its own layer, which
takes space until it is flattened after all. Not of a volume that is being re-keyed or encrypted: it cannot be left so.")]
pub struct FlattenArgs {
    /// The volume: its id, the first digits of its id, or its name.
    volume: String,
    /// Do not flatten it any more: its layers stay as they are, and what was copied stays in its own.
    #[arg(long, conflicts_with = "follow")]
    cancel: bool,
    #[command(flatten)]
    following: FollowArgs,
}

#[derive(clap::Args)]
struct FollowArgs {
    /// Return when everything is done, and show on a terminal how far it has come. A volume that nobody has
    /// attached is kept from being attached meanwhile.
    #[arg(long)]
    follow: bool,
    /// With --follow, of a volume that nobody has attached: bytes a second; 0: no limit.
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = size::parse, requires = "follow")]
    rate: u64,
    #[command(flatten)]
    space: SpaceArgs,
}

impl FollowArgs {
    fn budget(&self, store: &Store) -> Budget {
        Budget { gives_back: self.follow, ..self.space.budget(store) }
    }
}

/// Gives a volume a new data key.
pub(super) fn rekey(env: &Env, args: &RekeyArgs) -> Result<()> {
    let (store, id) = (env.store()?, env.catalog().resolve(&args.volume)?);
    if args.cancel {
        return cancel(env, &store, id);
    }
    let (also, budget) = (args.also.wanted(), args.following.budget(&store));
    let size = env.catalog().load(id)?.size();
    let onto = args.onto.as_deref().map(|path| Candidate::open_or_make(path, Some(size))).transpose()?;
    if let Some(device) = &onto {
        device.check_size(size)?;
        take(&store, device, args.wipe)?;
    }
    let Rekeyed { new, pause } = rekey::rekey(&store, id, args.key.as_deref(), &also, budget, onto.as_ref())?;
    // Whoever follows has it for himself.
    drop(onto);
    say_pause(env, id, pause);
    finish(env, &store, id, &args.following, &format!("{id} has a new data key, wrapped by {new}"))
}

/// Moves a volume to another place.
pub(super) fn move_to(env: &Env, args: &MoveArgs) -> Result<()> {
    let (store, id) = (env.store()?, env.catalog().resolve(&args.volume)?);
    let target = match args.to.as_os_str() == "file" {
        true => Target::File,
        false => {
            let size = env.catalog().load(id)?.size();
            Target::Device(Candidate::open_or_make(&args.to, Some(size))?)
        }
    };
    move_to::check(&store, id, &target, args.following.budget(&store))?;
    match &target {
        Target::Device(device) => take(&store, device, args.wipe)?,
        Target::File if args.wipe => {
            return Err(Error::new(Kind::Usage, "a file is made; leave out --wipe"));
        }
        Target::File => {}
    }
    move_to::start(&store, id, &target)?;
    // Whoever follows has the device for himself.
    drop(target);
    finish(env, &store, id, &args.following, &format!("{id} is being moved to {}", args.to.display()))
}

/// Makes a volume's layers one.
pub(super) fn flatten(env: &Env, args: &FlattenArgs) -> Result<()> {
    let (store, id) = (env.store()?, env.catalog().resolve(&args.volume)?);
    if args.cancel {
        return cancel(env, &store, id);
    }
    let said = match flatten::flatten(&store, id, args.following.budget(&store))? {
        true => format!("{id} is being flattened"),
        false => format!("{id} has one layer: there is nothing to do"),
    };
    finish(env, &store, id, &args.following, &said)
}

/// Has nothing copied up any more, where that can be.
fn cancel(env: &Env, store: &Store, id: VolumeId) -> Result<()> {
    let was_any = flatten::cancel(store, id)?;
    if env.json {
        let catalog = &store.catalog();
        return output::print_json(&show::description(catalog, &catalog.load(id)?)?);
    }
    let said = match was_any {
        true => "is not flattened any more; what was copied stays in its own layer",
        false => "is not being flattened: there is nothing to cancel",
    };
    output::print(&format!("{id} {said}\n")).map(drop)
}

fn say_pause(env: &Env, id: VolumeId, pause: Option<Duration>) {
    if let Some(pause) = pause.filter(|_| !env.json) {
        output::tell(&format!("{id}: its queues stood still for {pause:.1?}"));
    }
}

/// Follows if that is wanted, and says what there is now.
fn finish(env: &Env, store: &Store, id: VolumeId, following: &FollowArgs, said: &str) -> Result<()> {
    let catalog = &store.catalog();
    if !env.json {
        output::print(&format!("{said}\n"))?;
    }
    let mut now = catalog.load(id)?;
    if following.follow {
        let mut meter = Meter::new();
        let pace = Pace { rate: following.rate, reserve: following.space.reserve(store) };
        let followed = flatten::follow(store, id, pace, &mut |progress| meter.show(progress));
        meter.clear();
        now = followed?;
    }
    if env.json {
        return output::print_json(&show::description(catalog, &now)?);
    }
    let rest = match (now.layout().leaving(), now.layers().len()) {
        (0, layers) if following.follow => {
            format!("everything is in {}\n", counted(layers, "layer", "layers"))
        }
        (0, _) => String::new(),
        _ => format!(
            "what lower layers hold is copied up while it is attached; \"sealblk volume show {id}\" says how \
             far that is\n"
        ),
    };
    output::print(&rest).map(drop)
}
