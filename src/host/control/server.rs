//! The host process's end of the control socket: one thread that waits for all clients at once, so that none
//! that is slow, silent or stuck keeps another waiting.

use crate::base::root::files;
use crate::base::space::Reserve;
use crate::base::sync::Locked;
use crate::base::wire::{self, Lines};
use crate::base::{Context, Error, Kind, Result};
use crate::catalog::lock::LockFile;
use crate::catalog::metadata::VolumeName;
use crate::catalog::rekey::WrittenNewKey;
use crate::catalog::rewrap::Rewrapped;
use crate::catalog::snapshot::{Label, Wanted};
use crate::catalog::{LayerId, SnapshotId};
use crate::crypt::secret_mem::SecretFd;
use crate::host::control::conversation::{Conversation, Frozen};
use crate::host::control::moved::MoveDown;
use crate::host::control::{Answer, FILE, INCOMING_FILE, MAX_LINE, PATIENCE, Request, Status};
use crate::host::socket::{self, SocketName};
use crate::host::stats::Stats;
use crate::vhost::gate::Told;
use crate::vhost::listener::{SHORTAGE, is_shortage};
use crate::vhost::queue::qos::Limits;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{getsockopt, sockopt};
use nix::unistd::geteuid;
use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Clients heard at a time; the oldest makes way for one more.
const MAX_CALLERS: usize = 32;
/// How long a client may still take once everything is over.
const LAST_PATIENCE: Duration = Duration::from_millis(500);

/// Notes a data key that was wrapped anew.
pub(super) type RewrapOrder = Box<dyn Fn(&Rewrapped) -> Result<()> + Send>;

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

/// What clients can ask for. While one is carried out, no other is heard.
pub struct Orders {
    /// The open file that has the volume's lock, if any has: what proves to root who this process is.
    pub lock: LockFile,
    /// End the attachment. Does not wait for that.
    pub detach: Box<dyn Fn() + Send>,
    /// Tell how the volume is attached.
    pub status: Box<dyn Fn() -> Status + Send>,
    /// Tell what is counted.
    pub stats: Box<dyn Fn() -> Stats + Send>,
    /// Put other limits in force.
    pub throttle: Box<dyn Fn(Limits) + Send>,
    /// Put another limit on what is copied up in force, in bytes a second; 0: none.
    pub hydrate_rate: Box<dyn Fn(u64) + Send>,
    /// Have what is copied up leave so much of the file system free.
    pub space_reserve: Box<dyn Fn(Reserve) + Send>,
    /// Note how a data key is wrapped now.
    pub rewrap: RewrapOrder,
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

/// The host process's end.
pub struct Control {
    name: Arc<Name>,
    waiting: Waiting,
}

/// The socket's name in the volume's folder, while there is one.
pub struct Name(Mutex<Option<SocketName>>);

impl Name {
    /// Gives the socket the name under which clients look for the process that has the volume. This takes the
    /// name from the process that had the volume before; only signals reach that one from then on.
    pub fn become_holders(&self) {
        if let Some(name) = &mut *self.lock()
            && let Err(e) = name.rename(FILE)
        {
            log::error!("the control socket keeps the name {INCOMING_FILE}: {e}; signals still work");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<SocketName>> {
        self.0.locked()
    }
}

/// The clients that wait for the end, whoever comes before it is told among them.
pub struct Waiting {
    end: Arc<End>,
    thread: JoinHandle<()>,
}

/// How it ended, once it has.
struct End {
    answer: OnceLock<Answer>,
    news: EventFd,
}

/// A control socket that nobody answers yet.
pub struct Bound {
    listener: UnixListener,
    name: Arc<Name>,
}

impl Bound {
    /// The socket's name.
    pub fn name(&self) -> Arc<Name> {
        self.name.clone()
    }

    /// Passes on what clients ask for.
    pub fn serve(self, orders: Orders) -> Result<Control> {
        let news = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        let end = Arc::new(End { answer: OnceLock::new(), news });
        let server = Server {
            listener: self.listener,
            orders,
            end: end.clone(),
            callers: Vec::new(),
            detaching: Vec::new(),
        };
        let thread = std::thread::Builder::new().name("control".into()).spawn(move || server.run());
        let thread = thread.context(|| "start the control thread")?;
        Ok(Control { name: self.name, waiting: Waiting { end, thread } })
    }
}

impl Control {
    /// Listens in `folder`. Only while the process has one thread. With `incoming`, clients find
    /// somebody else there as yet.
    pub fn bind(folder: &Path, incoming: bool) -> Result<Bound> {
        let file = if incoming { INCOMING_FILE } else { FILE };
        // The path of a socket is at most 107 bytes long; the store's may be longer. Seen
        // from the folder it is short.
        let (listener, name) = files::inside(folder, || socket::listen(Path::new(file)))?;
        listener.set_nonblocking(true)?;
        let owner = files::owner_of(folder)?;
        if geteuid().is_root() && !owner.is_root() {
            // Whose the volume is may ask its host process for something, as root may.
            files::give_socket(&folder.join(file), Some(owner), None, None)?;
        }
        let name = Arc::new(Name(Mutex::new(Some(name.moved_to(folder)))));
        Ok(Bound { listener, name })
    }

    /// Removes the socket's name, so that the next attach can have it, and returns who is to be told. Not
    /// if another process has the volume: it gives its own socket that name, perhaps at this moment, and what
    /// was looked at could be another's when it is removed.
    pub fn close(self, another_has: bool) -> Waiting {
        match self.name.lock().take() {
            Some(name) if another_has && name.is_called(FILE) => name.leave(),
            name => drop(name),
        }
        self.waiting
    }
}

impl Waiting {
    /// Tells everybody who asked for the detach how it went, also who asked just now.
    pub fn tell(self, result: &Result<()>) {
        let answer = result.as_ref().map_or_else(Answer::failed, |()| Answer::Detached);
        let _ = self.end.answer.set(answer);
        // An event counter has room for one.
        let _ = self.end.news.write(1);
        if self.thread.join().is_err() {
            log::error!("the control thread panicked");
        }
    }
}

/// A client that has not said everything yet.
struct Caller {
    stream: UnixStream,
    lines: Lines,
    until: Instant,
}

struct Server {
    listener: UnixListener,
    orders: Orders,
    end: Arc<End>,
    /// Oldest first.
    callers: Vec<Caller>,
    /// Clients that asked for the detach.
    detaching: Vec<UnixStream>,
}

impl Server {
    fn run(mut self) {
        loop {
            // Before clients are taken in: those that come later find no name to connect to.
            let end = self.end.answer.get().cloned();
            if let Err(e) = self.accept_all() {
                return log::error!("the control socket: {e}; signals still work");
            }
            self.hear_all();
            let ended = end.is_some();
            if let Some(answer) = end {
                self.detaching.drain(..).for_each(|client| tell(&client, &answer));
                let limit = Instant::now() + LAST_PATIENCE;
                self.callers.iter_mut().for_each(|c| c.until = c.until.min(limit));
                if self.callers.is_empty() {
                    return;
                }
            }
            if let Err(e) = self.wait(ended) {
                return log::error!("waiting for control clients: {e}; signals still work");
            }
        }
    }

    /// Waits until a client says something, one has had its time, or everything is over.
    fn wait(&self, ended: bool) -> Result<()> {
        let first = self.callers.iter().map(|c| c.until).min();
        let timeout = first.map_or(PollTimeout::NONE, |until| {
            // A millisecond more: it must be over then.
            let left = until.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        let mut fds = vec![self.listener.as_fd()];
        // Once the news is known, it would never let this wait.
        fds.extend((!ended).then(|| self.end.news.as_fd()));
        fds.extend(self.callers.iter().map(|c| c.stream.as_fd()));
        let mut fds: Vec<_> = fds.into_iter().map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::Error::EINTR) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    fn accept_all(&mut self) -> std::io::Result<()> {
        loop {
            match self.listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(true)?;
                    if self.callers.len() == MAX_CALLERS {
                        self.callers.remove(0);
                    }
                    let until = Instant::now() + PATIENCE;
                    self.callers.push(Caller { stream, lines: Lines::of_at_most(MAX_LINE), until });
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(e) if matches!(e.kind(), ErrorKind::Interrupted | ErrorKind::ConnectionAborted) => {}
                Err(e) if is_shortage(&e) => {
                    log::error!("a client of the control socket cannot be heard yet: {e}");
                    // The listener would wake this thread again at once.
                    std::thread::sleep(SHORTAGE);
                    return Ok(());
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// Carries out what was said in full, and lets go of those who took too long.
    fn hear_all(&mut self) {
        let now = Instant::now();
        for mut caller in std::mem::take(&mut self.callers) {
            match caller.hear() {
                Ok(Some(line)) => self.serve(caller, &line),
                Ok(None) if caller.until > now => self.callers.push(caller),
                Ok(None) => {
                    let e = Error::new(Kind::Usage, "the request did not come in time");
                    tell(&caller.stream, &Answer::failed(&e));
                }
                Err(e) => log::debug!("a control client: {e}"),
            }
        }
    }

    fn serve(&mut self, mut caller: Caller, line: &[u8]) {
        let request = serde_json::from_slice(line);
        let answer = match request.map_err(|e| Error::of(Kind::Usage, e)) {
            Ok(Request::Detach {}) => {
                log::info!("a client asks for the detach");
                (self.orders.detach)();
                // Told with all the others.
                return self.detaching.push(caller.stream);
            }
            Ok(_) if self.end.answer.get().is_some() => {
                Err(Error::new(Kind::NotFound, "it was detached just now"))
            }
            Ok(Request::ShowLock {}) => match self.show_lock(&caller.stream) {
                Ok(()) => {
                    caller.until = Instant::now() + PATIENCE;
                    return self.callers.push(caller);
                }
                Err(e) => Err(e),
            },
            Ok(Request::Status {}) => Ok(Answer::Status((self.orders.status)())),
            Ok(Request::Stats {}) => Ok(Answer::Stats(Box::new((self.orders.stats)()))),
            Ok(Request::Throttle { iops, throughput, burst_ms }) => {
                let limits = Limits { iops, throughput, burst: Duration::from_millis(burst_ms) };
                log::info!("a client sets {limits:?}");
                (self.orders.throttle)(limits);
                Ok(Answer::Throttled)
            }
            Ok(Request::HydrateRate { rate }) => {
                log::info!("a client has at most {rate} bytes a second copied up (0: any number)");
                (self.orders.hydrate_rate)(rate);
                Ok(Answer::Throttled)
            }
            Ok(Request::SpaceReserve { reserve }) => {
                log::info!("a client has {reserve} bytes of the file system left free by what is copied up");
                (self.orders.space_reserve)(Reserve::of(reserve));
                Ok(Answer::Throttled)
            }
            Ok(Request::Rewrap(new)) => {
                let done = (self.orders.rewrap)(&new);
                done.inspect(|()| log::info!("data key {new} is wrapped anew")).map(|()| Answer::Rewrapped)
            }
            Ok(Request::Resize { size }) => {
                log::info!("a client makes the volume {size} bytes large");
                (self.orders.resize)(size).map(Answer::Resized)
            }
            Ok(Request::Snapshot { id, layer, description, tags }) => {
                log::info!("a client makes a snapshot");
                let label = Label::new(description, *tags);
                let conversation = Conversation::with(&caller.stream);
                let wanted = label.map(|label| Wanted { id, layer, label });
                let made = wanted.and_then(|wanted| (self.orders.snapshot)(wanted, &mut conversation?));
                made.map(Answer::Frozen)
            }
            Ok(Request::Rekey { layer, key }) => {
                log::info!("a client gives the volume another data key");
                let dek = caller
                    .lines
                    .take_descriptor()
                    .ok_or_else(|| Error::new(Kind::Usage, "no data key came with it"));
                let conversation = Conversation::with(&caller.stream);
                let done = dek.and_then(SecretFd::from_fd);
                let done = done.and_then(|dek| (self.orders.rekey)(*key, layer, dek, &mut conversation?));
                done.map(|pause| Answer::Rekeyed { pause_us: pause.as_micros() as u64 })
            }
            Ok(Request::Flatten {}) => {
                log::info!("a client has the volume flattened");
                (self.orders.flatten)().map(|is_any| Answer::Flattening { is_any })
            }
            Ok(Request::Noted { snapshot }) => {
                (self.orders.noted)(snapshot);
                Ok(Answer::Noted)
            }
            Ok(Request::MoveDown(wanted)) => {
                log::debug!("a client moves data: {wanted:?}");
                let conversation = Conversation::with(&caller.stream);
                let done = conversation.and_then(|mut client| (self.orders.move_down)(&wanted, &mut client));
                done.map(|()| Answer::Moved)
            }
            Ok(Request::LetGo { layers }) => {
                log::info!("a client takes {} layers out of the chain, which hold nothing", layers.len());
                (self.orders.let_go)(&layers).map(|()| Answer::LetGone)
            }
            Ok(Request::CancelFlatten {}) => {
                log::info!("a client has the volume not flattened any more");
                (self.orders.cancel_flatten)().map(|is_any| Answer::Flattening { is_any })
            }
            Ok(Request::Upgrade { protocol }) => {
                log::info!("a client has another process take over");
                let secret = caller
                    .lines
                    .take_descriptor()
                    .ok_or_else(|| Error::new(Kind::Usage, "no memory for the data keys came with it"));
                let done = secret.and_then(SecretFd::from_fd).and_then(|secret| {
                    caller.stream.set_nonblocking(false)?;
                    (self.orders.upgrade)(protocol, secret, &caller.stream)
                });
                done.inspect_err(|e| log::warn!("no other process has taken over: {e}"))
                    .map(|()| Answer::Left)
            }
            Ok(Request::Rename { name }) => {
                log::info!("a client renames the volume");
                (self.orders.rename)(name).map(|()| Answer::Renamed)
            }
            Err(e) => Err(e),
        };
        tell(&caller.stream, &answer.unwrap_or_else(|e| Answer::failed(&e)));
    }

    /// Shows the open file that has the lock. Whoever has it can pass for this process, where that is looked
    /// for, and could let go of the lock: so it is shown to nobody but root, who can do all of that anyway.
    fn show_lock(&self, client: &UnixStream) -> Result<()> {
        if getsockopt(client, sockopt::PeerCredentials)?.uid() != 0 {
            return Err(Error::new(Kind::Usage, "the lock is shown to root alone"));
        }
        Ok(wire::say_with(client, &Answer::Lock, self.orders.lock.descriptor())?)
    }
}

impl Caller {
    /// Takes what has come, and returns the client's line once all of it is there.
    fn hear(&mut self) -> std::io::Result<Option<Vec<u8>>> {
        match self.lines.next(&self.stream) {
            Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(None),
            heard => heard.map(|line| Some(line.unwrap_or_default())),
        }
    }
}

/// Answers a client. One that has gone does not want to know, and a line fits into the
/// socket of one that has not.
fn tell(client: &UnixStream, answer: &Answer) {
    if let Err(e) = wire::say(client, answer) {
        log::debug!("a control client is not told: {e}");
    }
}
