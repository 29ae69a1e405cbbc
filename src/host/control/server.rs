//! The host process's end of the control socket. One thread waits for all clients at once, so that
//! none that is slow, silent or stuck keeps another waiting, and tells what needs no waiting for.
//! Another thread does what clients want to have done, one after the other: a change may take as long
//! as a disk or a client takes.

use crate::base::root::files;
use crate::base::sync::Locked;
use crate::base::wire::{self, Lines};
use crate::base::{Context, Error, Kind, Result};
use crate::host::control::orders::{AtOnce, InTurns, Orders};
use crate::host::control::{Answer, FILE, INCOMING_FILE, MAX_LINE, PATIENCE, Request};
use crate::host::socket::{self, SocketName};
use crate::vhost::listener::{SHORTAGE, is_shortage};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{getsockopt, sockopt};
use nix::unistd::geteuid;
use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Clients heard at a time; the oldest makes way for one more.
const MAX_CALLERS: usize = 32;
/// Requests that wait for their turn; one more is refused.
const MAX_WAITING: usize = 32;
/// How long a client may still take once everything is over.
const LAST_PATIENCE: Duration = Duration::from_millis(500);

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
    /// Whether another process takes over, or has.
    leaves: AtomicBool,
    /// That one of these has changed.
    news: EventFd,
}

impl End {
    fn tell_news(&self) {
        // An event counter has room for one.
        let _ = self.news.write(1);
    }
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
        let end = Arc::new(End { answer: OnceLock::new(), leaves: AtomicBool::new(false), news });
        let Orders { at_once, in_turns } = orders;
        let (turns, waiting) = sync_channel(MAX_WAITING);
        let changer = Changer { orders: in_turns, end: end.clone() };
        let changes = std::thread::Builder::new().name("changes".into()).spawn(move || changer.run(&waiting));
        let server = Server {
            listener: self.listener,
            orders: at_once,
            turns,
            end: end.clone(),
            callers: Vec::new(),
            later: Vec::new(),
            detaching: Vec::new(),
        };
        let changes = changes.context(|| "start the thread of changes")?;
        let run = move || {
            server.run();
            // Nobody asks for anything any more; what was asked for before is answered.
            if changes.join().is_err() {
                log::error!("the thread of changes panicked");
            }
        };
        let thread = std::thread::Builder::new().name("control".into()).spawn(run);
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
        self.end.tell_news();
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
    orders: AtOnce,
    /// To the thread that does the rest.
    turns: SyncSender<(Caller, Request)>,
    end: Arc<End>,
    /// Oldest first.
    callers: Vec<Caller>,
    /// Clients that asked for the detach while another process takes over: whose it is then is not known yet.
    later: Vec<UnixStream>,
    /// Clients that asked for the detach.
    detaching: Vec<UnixStream>,
}

impl Server {
    fn run(mut self) {
        loop {
            // Before it is looked at what is new.
            let _ = self.end.news.read();
            // Before clients are taken in: those that come later find no name to connect to.
            let end = self.end.answer.get().cloned();
            if let Err(e) = self.accept_all() {
                return log::error!("the control socket: {e}; signals still work");
            }
            self.hear_all();
            if !self.end.leaves.load(Ordering::Acquire) {
                std::mem::take(&mut self.later).into_iter().for_each(|client| self.detach(client));
            }
            let ended = end.is_some();
            if let Some(answer) = end {
                let gone = Error::new(Kind::Busy, "another process has taken it over just now; try again");
                self.later.drain(..).for_each(|client| tell(&client, &Answer::failed(&gone)));
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
            Ok(Request::Detach {}) if self.end.leaves.load(Ordering::Acquire) => {
                return self.later.push(caller.stream);
            }
            Ok(Request::Detach {}) => return self.detach(caller.stream),
            Ok(_) if self.end.answer.get().is_some() => Err(detached()),
            Ok(Request::ShowLock {}) => match self.show_lock(&caller.stream) {
                Ok(()) => {
                    caller.until = Instant::now() + PATIENCE;
                    return self.callers.push(caller);
                }
                Err(e) => Err(e),
            },
            Ok(Request::Stats {}) => Ok(Answer::Stats(Box::new((self.orders.stats)()))),
            Ok(request) => match self.turns.try_send((caller, request)) {
                Ok(()) => return,
                Err(TrySendError::Full((refused, _))) => {
                    caller = refused;
                    Err(Error::new(
                        Kind::Busy,
                        "too many others wait for what they have asked for; try again",
                    ))
                }
                Err(TrySendError::Disconnected((refused, _))) => {
                    caller = refused;
                    Err(Error::new(Kind::Other, "the thread of changes is gone; detach the volume"))
                }
            },
            Err(e) => Err(e),
        };
        tell(&caller.stream, &answer.unwrap_or_else(|e| Answer::failed(&e)));
    }

    fn detach(&mut self, client: UnixStream) {
        log::info!("a client asks for the detach");
        (self.orders.detach)();
        // Told with all the others.
        self.detaching.push(client);
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

/// Does what clients want to have done, one after the other.
struct Changer {
    orders: InTurns,
    end: Arc<End>,
}

impl Changer {
    /// Until nobody can ask any more.
    fn run(self, waiting: &Receiver<(Caller, Request)>) {
        while let Ok((mut caller, request)) = waiting.recv() {
            let is_upgrade = matches!(request, Request::Upgrade { .. });
            if is_upgrade {
                self.end.leaves.store(true, Ordering::Release);
            }
            let answer = match self.end.answer.get() {
                Some(_) => Err(detached()),
                None => self.orders.serve(&caller.stream, &mut caller.lines, request),
            };
            if is_upgrade && answer.is_err() {
                self.end.leaves.store(false, Ordering::Release);
                self.end.tell_news();
            }
            tell(&caller.stream, &answer.unwrap_or_else(|e| Answer::failed(&e)));
        }
    }
}

fn detached() -> Error {
    Error::new(Kind::NotFound, "it was detached just now")
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
