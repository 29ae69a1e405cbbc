//! What clients of the control socket can ask a host process for, and what is done for each.

use crate::base::space::Reserve;
use crate::base::wire::Lines;
use crate::base::{Error, Kind, Result};
use crate::catalog::lock::LockFile;
use crate::catalog::metadata::VolumeName;
use crate::catalog::rekey::WrittenNewKey;
use crate::catalog::rewrap::{Rewrapped, SlotChange};
use crate::catalog::snapshot::{Label, Wanted};
use crate::catalog::{LayerId, SnapshotId};
use crate::crypt::secret_mem::SecretFd;
use crate::host::control::conversation::{Conversation, Frozen};
use crate::host::control::moved::MoveDown;
use crate::host::control::{Answer, Request};
use crate::host::stats::Stats;
use crate::host::status::Status;
use crate::vhost::gate::Told;
use crate::vhost::queue::qos::Limits;
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// Notes a data key that was wrapped anew.
pub(super) type RewrapOrder = Box<dyn Fn(&Rewrapped) -> Result<()> + Send>;

/// Notes that a data key has one slot more, or less.
pub(super) type SlotOrder = Box<dyn Fn(&SlotChange) -> Result<()> + Send>;

/// Makes a snapshot, in turns with the client.
pub(super) type SnapshotOrder = Box<dyn Fn(Wanted, &mut Conversation<'_>) -> Result<Frozen> + Send>;

/// Gives the volume another data key, which came in secret memory, and a new top layer of this id, in turns
/// with the client; returns how long the queues stood still.
pub(super) type RekeyOrder =
    Box<dyn Fn(WrittenNewKey, LayerId, SecretFd, &mut Conversation<'_>) -> Result<Duration> + Send>;

/// Has another process take over, which speaks this version of what is said then, and has brought secret
/// memory for the data keys.
pub(super) type UpgradeOrder = Box<dyn Fn(u32, SecretFd, &UnixStream) -> Result<()> + Send>;

/// Takes part in a move of data between two frozen layers.
pub(super) type MoveOrder = Box<dyn Fn(&MoveDown, &mut Conversation<'_>) -> Result<()> + Send>;

/// Takes layers that hold nothing out of the chain.
pub(super) type LetGoOrder = Box<dyn Fn(&[LayerId]) -> Result<()> + Send>;

/// Makes the volume so many bytes large, and tells the VMM.
pub(super) type ResizeOrder = Box<dyn Fn(u64) -> Result<Told> + Send>;

/// What clients can ask for.
pub struct Orders {
    /// What is done at once, whatever else is going on.
    pub at_once: AtOnce,
    /// What is done in turns.
    pub in_turns: InTurns,
}

/// What is done at once. None of it waits for anything.
pub struct AtOnce {
    /// The open file that has the volume's lock, if any has: what proves to root who this process is.
    pub lock: LockFile,
    /// End the attachment. Does not wait for that.
    pub detach: Box<dyn Fn() + Send>,
    /// Tell what is counted.
    pub stats: Box<dyn Fn() -> Stats + Send>,
}

/// What is done in turns: while one is carried out, others wait.
pub struct InTurns {
    /// Tell how the volume is attached.
    pub status: Box<dyn Fn() -> Status + Send>,
    /// Put other limits in force.
    pub throttle: Box<dyn Fn(Limits) + Send>,
    /// Put another limit on what is copied up in force, in bytes a second; 0: none.
    pub hydrate_rate: Box<dyn Fn(u64) + Send>,
    /// Have what is copied up leave so much of the file system free.
    pub space_reserve: Box<dyn Fn(Reserve) + Send>,
    /// Note how a data key is wrapped now.
    pub rewrap: RewrapOrder,
    /// Note that a data key has one slot more, or less.
    pub change_slot: SlotOrder,
    /// Make the volume larger.
    pub resize: ResizeOrder,
    /// Make a snapshot.
    pub snapshot: SnapshotOrder,
    /// Give the volume another data key.
    pub rekey: RekeyOrder,
    /// Copy up everything below the top; returns whether there is anything.
    pub flatten: Box<dyn Fn() -> Result<bool> + Send>,
    /// The record of a snapshot is written.
    pub noted: Box<dyn Fn(SnapshotId) + Send>,
    /// Take part in a move of data between two frozen layers, in turns with the client.
    pub move_down: MoveOrder,
    /// Take layers that hold nothing out of the chain.
    pub let_go: LetGoOrder,
    /// Have another process take over.
    pub upgrade: UpgradeOrder,
    /// Copy nothing up any more; returns whether anything was to be.
    pub cancel_flatten: Box<dyn Fn() -> Result<bool> + Send>,
    /// Note the volume's name, or that it has none.
    pub rename: Box<dyn Fn(Option<VolumeName>) -> Result<()> + Send>,
}

impl InTurns {
    /// Does what a client wants to have done, who goes on talking by `client`; what came with the request is
    /// in `lines`. Returns what to answer.
    pub(super) fn serve(&self, client: &UnixStream, lines: &mut Lines, request: Request) -> Result<Answer> {
        match request {
            Request::Status {} => Ok(Answer::Status((self.status)())),
            Request::Throttle { iops, throughput, burst_ms } => {
                let limits = Limits { iops, throughput, burst: Duration::from_millis(burst_ms) };
                log::info!("a client sets {limits:?}");
                (self.throttle)(limits);
                Ok(Answer::Throttled)
            }
            Request::HydrateRate { rate } => {
                log::info!("a client has at most {rate} bytes a second copied up (0: any number)");
                (self.hydrate_rate)(rate);
                Ok(Answer::Throttled)
            }
            Request::SpaceReserve { reserve } => {
                log::info!("a client has {reserve} bytes of the file system left free by what is copied up");
                (self.space_reserve)(Reserve::of(reserve));
                Ok(Answer::Throttled)
            }
            Request::Rewrap(new) => {
                let done = (self.rewrap)(&new);
                done.inspect(|()| log::info!("data key {new} is wrapped anew")).map(|()| Answer::Rewrapped)
            }
            Request::ChangeSlot(change) => {
                let done = (self.change_slot)(&change);
                done.inspect(|()| log::info!("{change}")).map(|()| Answer::SlotChanged)
            }
            Request::Resize { size } => {
                log::info!("a client makes the volume {size} bytes large");
                (self.resize)(size).map(Answer::Resized)
            }
            Request::Snapshot { id, layer, description, tags } => {
                log::info!("a client makes a snapshot");
                let label = Label::new(description, *tags);
                let conversation = Conversation::with(client);
                let wanted = label.map(|label| Wanted { id, layer, label });
                let made = wanted.and_then(|wanted| (self.snapshot)(wanted, &mut conversation?));
                made.map(Answer::Frozen)
            }
            Request::Rekey { layer, key } => {
                log::info!("a client gives the volume another data key");
                let dek = lines
                    .take_descriptor()
                    .ok_or_else(|| Error::new(Kind::Usage, "no data key came with it"));
                let conversation = Conversation::with(client);
                let done = dek.and_then(SecretFd::from_fd);
                let done = done.and_then(|dek| (self.rekey)(*key, layer, dek, &mut conversation?));
                done.map(|pause| Answer::Rekeyed { pause_us: pause.as_micros() as u64 })
            }
            Request::Flatten {} => {
                log::info!("a client has the volume flattened");
                (self.flatten)().map(|is_any| Answer::Flattening { is_any })
            }
            Request::Noted { snapshot } => {
                (self.noted)(snapshot);
                Ok(Answer::Noted)
            }
            Request::MoveDown(wanted) => {
                log::debug!("a client moves data: {wanted:?}");
                let conversation = Conversation::with(client);
                let done = conversation.and_then(|mut it| (self.move_down)(&wanted, &mut it));
                done.map(|()| Answer::Moved)
            }
            Request::LetGo { layers } => {
                log::info!("a client takes {} layers out of the chain, which hold nothing", layers.len());
                (self.let_go)(&layers).map(|()| Answer::LetGone)
            }
            Request::CancelFlatten {} => {
                log::info!("a client has the volume not flattened any more");
                (self.cancel_flatten)().map(|is_any| Answer::Flattening { is_any })
            }
            Request::Upgrade { protocol } => {
                log::info!("a client has another process take over");
                let secret = lines
                    .take_descriptor()
                    .ok_or_else(|| Error::new(Kind::Usage, "no memory for the data keys came with it"));
                let done = secret.and_then(SecretFd::from_fd).and_then(|secret| {
                    client.set_nonblocking(false)?;
                    (self.upgrade)(protocol, secret, client)
                });
                done.inspect_err(|e| log::warn!("no other process has taken over: {e}"))
                    .map(|()| Answer::Left)
            }
            Request::Rename { name } => {
                log::info!("a client renames the volume");
                (self.rename)(name).map(|()| Answer::Renamed)
            }
            Request::Detach {} | Request::ShowLock {} | Request::Stats {} => {
                unreachable!("these are answered at once")
            }
        }
    }
}
