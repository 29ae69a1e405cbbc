//! The keeper of an image: a process that has the right to one image of a cluster, and starts the servers for
//! it; and how others use it.
//!
//! It loads nothing of Ceph's, and moves no data. It is confined before it is told to open anything: it
//! reaches the files that librbd needs, and starts no program. A server is a child of it, without an exec,
//! and is confined further. So a confined host process, which can start nothing, has its image served again.
//!
//! What a server says of itself is a claim: it has librbd, which speaks to a network.

use super::image::Pool;
use super::serve::serve;
use super::tenure::{self, Claim, Refusal, Seen, Tenure};
use crate::backing::nbd::dial::{self, How, Lost, Right};
use crate::backing::nbd::{Address, Image, Terms};
use crate::base::hardened::Hardened;
use crate::base::root::Root;
use crate::base::sync::Locked;
use crate::base::wire::{self, Lines};
use crate::base::{Context, Error, Kind, Result, Timestamp, child, log_fields, printable};
use crate::catalog::lock::{Holder, Purpose};
use crate::sandbox::{self, Access, Rule, stranger};
use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, getppid};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Child;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// The hidden subcommand.
pub const COMMAND: &str = "serve-rbd";
/// The longest line in bytes.
const MAX_LINE: usize = 64 << 10;
/// How long a server may take until it serves.
const TIME: Duration = Duration::from_secs(40);
/// What the keeper may take besides.
const MARGIN: Duration = Duration::from_secs(15);
/// How long a server may take to end that nobody asks any more.
const AT_END: Duration = Duration::from_secs(25);

static BREAK_LOCK: AtomicBool = AtomicBool::new(false);
/// Whether this process is about to be confined, and starts no more keepers.
static HAS_ALL: AtomicBool = AtomicBool::new(false);

/// From now on, this process takes images also from those who still give signs of life.
pub fn set_break_lock(it: bool) {
    BREAK_LOCK.store(it, Ordering::Relaxed);
}

/// What a keeper is for.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Begin {
    image: String,
    write: bool,
}

/// A server is wanted.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Wanted {
    tenure: Tenure,
    again: bool,
    break_lock: bool,
    make: Option<u64>,
}

/// What a server says to its keeper, and what the keeper says to whoever has started it.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
enum Answer {
    /// The keeper is confined.
    Ready,
    /// The address of the server's client, before it takes a lock.
    Client(String),
    /// What is to be seen of this process?
    LookAt(Holder),
    /// The image is served; the connection comes with this.
    Serves(Terms),
    Failed(Problem, String),
    Lost(String),
}

/// As [`Kind`], as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Problem {
    Busy,
    Usage,
    NotFound,
    Unsupported,
    Other,
}

impl Answer {
    fn of(e: &Error) -> Answer {
        let problem = match e.kind() {
            Kind::Busy => Problem::Busy,
            Kind::Usage => Problem::Usage,
            Kind::NotFound => Problem::NotFound,
            Kind::Unsupported => Problem::Unsupported,
            _ => Problem::Other,
        };
        Answer::Failed(problem, e.to_string())
    }
}

// ---- whoever uses it ----

/// A keeper that was started.
struct Keeper {
    socket: UnixStream,
    child: Child,
    lines: Lines,
    /// This process, which may not look at itself once it is confined.
    holder: Holder,
    /// Of the last server that was wanted.
    tenure: Option<Tenure>,
    is_broken: bool,
}

/// One for each image and what it is used for.
type Keepers = BTreeMap<(Image, Right), Arc<Mutex<Keeper>>>;

/// The keepers of this process.
static KEEPERS: Mutex<Keepers> = Mutex::new(Keepers::new());

/// From now on, this process can open RBD images: with keepers that it starts when they are needed, as long
/// as it can start processes.
pub fn open_images() {
    dial::open_images_by(Box::new(|image, how| {
        let keeper = keeper_of(image, how.right)?;
        keeper.locked().serve(image, how)
    }));
}

/// Starts the keepers of these images already, and lets go of all others, the top of a volume first: a
/// confined process can start none. What a keeper has to say goes to nobody: it tells all by its answers.
///
/// # Errors
/// What keeps one from being started.
pub fn start(exports: &[(Address, Right)]) -> Result<()> {
    let is_wanted = |image: &Image, right: Right| {
        exports.iter().any(|(address, wanted)| address.image() == Some(image) && *wanted == right)
    };
    KEEPERS.locked().retain(|(image, right), _| is_wanted(image, *right));
    for (image, right) in exports.iter().filter_map(|(address, right)| Some((address.image()?, *right))) {
        keeper_of(image, right)?;
    }
    HAS_ALL.store(true, Ordering::Relaxed);
    Ok(())
}

fn keeper_of(image: &Image, right: Right) -> io::Result<Arc<Mutex<Keeper>>> {
    let mut keepers = KEEPERS.locked();
    let key = (image.clone(), right);
    if let Some(keeper) = keepers.get(&key).filter(|keeper| !keeper.locked().is_broken) {
        return Ok(keeper.clone());
    }
    if HAS_ALL.load(Ordering::Relaxed) {
        let message = format!("the {COMMAND} helper of {} has ended; attach the volume again", image.shown());
        return Err(io::Error::new(ErrorKind::BrokenPipe, message));
    }
    let keeper = Keeper::start(image, right).map_err(io_error)?;
    let keeper = Arc::new(Mutex::new(keeper));
    keepers.insert(key, keeper.clone());
    Ok(keeper)
}

fn io_error(e: Error) -> io::Error {
    io::Error::new(io_kind(e.kind()), e)
}

fn io_kind(kind: Kind) -> ErrorKind {
    match kind {
        Kind::Busy => ErrorKind::ResourceBusy,
        Kind::NotFound => ErrorKind::NotFound,
        Kind::Unsupported => ErrorKind::Unsupported,
        Kind::Usage => ErrorKind::InvalidInput,
        _ => ErrorKind::Other,
    }
}

impl Keeper {
    fn start(image: &Image, right: Right) -> Result<Keeper> {
        let (socket, child) = child::spawn_with(&Root::new("/"), None, COMMAND, stranger::keep_back)?;
        let attempt = || format!("start the {COMMAND} helper for {image}");
        socket.set_read_timeout(Some(TIME + MARGIN)).context(attempt)?;
        let begin = Begin { image: image.to_string(), write: right == Right::Write };
        wire::say(&socket, &begin).context(attempt)?;
        let lines = Lines::of_at_most(MAX_LINE);
        let holder = Holder::this_process(Purpose::Attach, None)?;
        let mut keeper = Keeper { socket, child, lines, holder, tenure: None, is_broken: false };
        match keeper.hear().context(attempt)? {
            Answer::Ready => Ok(keeper),
            Answer::Failed(_, why) => Err(Error::new(Kind::Other, why).context(attempt())),
            _ => Err(Error::new(Kind::Other, "it answers strangely").context(attempt())),
        }
    }

    fn hear(&mut self) -> io::Result<Answer> {
        let gone = || io::Error::new(ErrorKind::BrokenPipe, format!("the {COMMAND} helper has ended"));
        let heard = self.lines.next(&self.socket).and_then(|line| line.ok_or_else(gone));
        let heard = heard.and_then(|line| Ok(serde_json::from_slice(&line)?));
        // What it says from now on could be the answer to something else.
        self.is_broken |= heard.is_err();
        heard
    }

    /// Has the image served.
    fn serve(&mut self, image: &Image, how: How) -> io::Result<(UnixStream, Terms)> {
        let tenure = match self.tenure.take().filter(|_| how.again) {
            Some(tenure) => tenure,
            None => {
                let holder = Holder { since: Timestamp::now(), ..self.holder.clone() };
                Tenure::new(holder, log_fields::volume().map(str::to_owned))
            }
        };
        let break_lock = BREAK_LOCK.load(Ordering::Relaxed);
        let wanted = Wanted { tenure: tenure.clone(), again: how.again, break_lock, make: how.make };
        self.tenure = Some(tenure);
        wire::say(&self.socket, &wanted).inspect_err(|_| self.is_broken = true)?;
        match self.hear()? {
            Answer::Serves(terms) => match self.lines.take_descriptor() {
                Some(connection) => Ok((UnixStream::from(connection), terms)),
                None => Err(io::Error::other("no connection came with the answer")),
            },
            Answer::Failed(problem, why) => {
                let why = printable::line(&why).into_owned();
                let kind = match problem {
                    Problem::Busy => Kind::Busy,
                    Problem::Usage => Kind::Usage,
                    Problem::NotFound => Kind::NotFound,
                    Problem::Unsupported => Kind::Unsupported,
                    Problem::Other => Kind::Other,
                };
                Err(io_error(Error::new(kind, why).context(format!("open {}", image.shown()))))
            }
            Answer::Lost(why) => Err(io::Error::other(Lost(printable::line(&why).into_owned()))),
            _ => Err(io::Error::other("the keeper answers strangely")),
        }
    }
}

impl Drop for Keeper {
    /// A keeper ends when nobody is at the other end of its socket, once its server has.
    fn drop(&mut self) {
        let _ = self.socket.shutdown(Shutdown::Both);
        let _ = self.child.wait();
    }
}

// ---- the keeper ----

/// The keeper's side: the whole life of the process.
///
/// # Errors
/// Only when the other side could not even be told.
pub fn help(_: Hardened) -> Result<()> {
    let socket = child::begin()?;
    // The thread that has started this process may end before the process does. Nobody at the other end of
    // the socket ends this one.
    child::outlive_parent()?;
    let attempt = || "take a request: this command is started by sealblk alone";
    let mut lines = Lines::of_at_most(MAX_LINE);
    let line = lines.next(&socket).context(attempt)?.unwrap_or_default();
    let begin: Begin = serde_json::from_slice(&line).map_err(io::Error::from).context(attempt)?;
    let image = Image::named(&begin.image)?;
    let rules = reach(&image);
    // The log may go by a descriptor, whose number is another's from here on.
    log::set_max_level(log::LevelFilter::Off);
    stranger::keep_standard_streams()?;
    // What the kernel says of processes is for the keeper alone.
    let own: Vec<Rule> = rules.iter().cloned().chain([Rule::new("/proc", Access::ReadTree)]).collect();
    if let Err(e) = sandbox::confine_keeper(&own) {
        wire::say(&socket, &Answer::of(&e))?;
        return Ok(());
    }
    wire::say(&socket, &Answer::Ready)?;
    let mut servers = Servers { image, write: begin.write, rules, now: None, ended: Vec::new() };
    while let Some(line) = lines.next(&socket)? {
        let wanted: Wanted = serde_json::from_slice(&line).map_err(io::Error::from).context(attempt)?;
        servers.end(Duration::from_secs(5));
        match servers.start(&socket, wanted) {
            Ok((terms, connection)) => {
                wire::say_with(&socket, &Answer::Serves(terms), connection.as_fd())?;
            }
            Err(answer) => wire::say(&socket, &answer)?,
        }
    }
    servers.end(AT_END);
    Ok(())
}

/// The servers of a keeper, one at a time.
struct Servers {
    image: Image,
    write: bool,
    rules: Vec<Rule>,
    now: Option<Running>,
    /// Addresses of clients of those that have ended.
    ended: Vec<String>,
}

struct Running {
    pid: Pid,
    client: Option<String>,
}

impl Servers {
    /// Sees the present server end, if there is one, which may take so long.
    fn end(&mut self, within: Duration) {
        let Some(Running { pid, client }) = self.now.take() else { return };
        let until = Instant::now() + within;
        while matches!(waitpid(pid, Some(WaitPidFlag::WNOHANG)), Ok(WaitStatus::StillAlive)) {
            if Instant::now() >= until {
                let _ = kill(pid, Signal::SIGKILL);
                let _ = waitpid(pid, None);
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        // It can do nothing any more but what is on its way to Ceph, which breaking its lock stops.
        self.ended.extend(client);
        let most = self.ended.len().saturating_sub(64);
        self.ended.drain(..most);
    }

    /// Starts a server. Returns what it is found to serve.
    fn start(
        &mut self,
        socket: &UnixStream,
        wanted: Wanted,
    ) -> std::result::Result<(Terms, OwnedFd), Answer> {
        let failed =
            |e: io::Error| Answer::of(&Error::from(e).context("start a process that serves the image"));
        let (connection, served) = UnixStream::pair().map_err(failed)?;
        let (ours, theirs) = UnixStream::pair().map_err(failed)?;
        let Wanted { tenure, again, break_lock, make } = wanted;
        let claim = Claim { tenure, again, break_lock, ended: self.ended.clone() };
        // SAFETY: this process has one thread, so the child has all that there is, and may
        // go on as any process.
        match unsafe { fork() }.map_err(|e| failed(e.into()))? {
            ForkResult::Child => {
                drop((connection, ours));
                // Standard input, which nobody in this process reads any more.
                let _ = nix::unistd::close(std::os::fd::AsRawFd::as_raw_fd(socket));
                self.be_server(claim, make, &theirs, served)
            }
            ForkResult::Parent { child } => {
                drop((theirs, served));
                self.now = Some(Running { pid: child, client: None });
                let answer = self.hear(&ours);
                match answer {
                    Answer::Serves(terms) => Ok((terms, connection.into())),
                    other => {
                        self.end(Duration::from_secs(1));
                        Err(other)
                    }
                }
            }
        }
    }

    /// Hears what the server says until it serves.
    fn hear(&mut self, server: &UnixStream) -> Answer {
        let until = Instant::now() + TIME;
        let mut lines = Lines::of_at_most(MAX_LINE);
        loop {
            let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            let line = server.set_read_timeout(Some(left)).and_then(|()| lines.next(server));
            let answer = match line {
                Ok(Some(line)) => serde_json::from_slice(&line).map_err(|e| e.to_string()),
                Ok(None) => Err(self.how_ended()),
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    Err(format!("Ceph has not answered within {TIME:?}"))
                }
                Err(e) => Err(e.to_string()),
            };
            match answer {
                Ok(Answer::Client(address)) => {
                    if let Some(now) = &mut self.now {
                        now.client = Some(address);
                    }
                }
                Ok(Answer::LookAt(holder)) => {
                    let seen = see(&holder);
                    if wire::say(server, &seen).is_err() {
                        return Answer::Failed(
                            Problem::Other,
                            "the process that has librbd has ended".into(),
                        );
                    }
                }
                Ok(answer) => return answer,
                Err(why) => return Answer::Failed(Problem::Other, why),
            }
        }
    }

    /// How the present server, which says nothing any more, has ended.
    fn how_ended(&mut self) -> String {
        let Some(Running { pid, .. }) = &self.now else { return "it was not started".into() };
        // It has closed its socket by ending.
        let how = match waitpid(*pid, None) {
            Ok(WaitStatus::Signaled(_, signal, _)) => format!(" by {signal}"),
            _ => String::new(),
        };
        format!("the process that has librbd has ended{how}")
    }

    /// The server's side, to the end of its process.
    fn be_server(&self, claim: Claim, make: Option<u64>, keeper: &UnixStream, served: UnixStream) -> ! {
        let parent = getppid();
        let _ = prctl::set_pdeathsig(Signal::SIGKILL);
        let answer = if getppid() == parent { self.open(claim, make, keeper) } else { return_nothing() };
        match answer {
            Ok((image, terms)) => {
                if wire::say(keeper, &Answer::Serves(terms)).is_err() {
                    end();
                }
                serve(image, served, self.write)
            }
            Err(answer) => {
                let _ = wire::say(keeper, &answer);
                end()
            }
        }
    }

    fn open(
        &self,
        claim: Claim,
        make: Option<u64>,
        keeper: &UnixStream,
    ) -> std::result::Result<(super::image::Image, Terms), Answer> {
        let failed = |e: Error| Answer::of(&e);
        sandbox::confine_module(&self.rules, true).map_err(failed)?;
        stranger::be_silent().map_err(failed)?;
        let pool = Pool::connect(&self.image).map_err(failed)?;
        let said = wire::say(keeper, &Answer::Client(pool.address().to_owned()));
        said.map_err(|e| failed(e.into()))?;
        let image = pool.open(&self.image, self.write, make).map_err(failed)?;
        if self.write {
            let mut lines = Lines::of_at_most(MAX_LINE);
            let mut look_at = |holder: &Holder| {
                wire::say(keeper, &Answer::LookAt(holder.clone()))?;
                let line = lines.next(keeper)?.unwrap_or_default();
                Ok(serde_json::from_slice(&line).map_err(io::Error::from)?)
            };
            tenure::take(&image, &claim, &mut look_at).map_err(|refusal| match refusal {
                Refusal::Failed(e) => {
                    image.close();
                    Answer::of(&e)
                }
                Refusal::Lost(why) => {
                    image.close();
                    Answer::Lost(why)
                }
            })?;
        }
        let terms = Terms::of_image(image.size(), !self.write);
        Ok((image, terms))
    }
}

fn return_nothing<T>() -> std::result::Result<T, Answer> {
    Err(Answer::Failed(Problem::Other, "its keeper has ended".into()))
}

fn end() -> ! {
    // SAFETY: it runs nothing of this process.
    unsafe { libc::_exit(1) }
}

/// What is to be seen of a process from here.
fn see(holder: &Holder) -> Seen {
    match (holder.has_an_id_of_here(), holder.is_seen_alive()) {
        (true, true) => Seen::Running,
        (true, false) => Seen::Ended,
        (false, _) => Seen::Nothing,
    }
}

/// The files that librbd needs.
pub(super) fn reach(image: &Image) -> Vec<Rule> {
    let read = [image.conf(), image.keyring()];
    let devices = [PathBuf::from("/dev/null")];
    let read = stranger::of_libraries(true).into_iter().chain(read).map(|path| (path, false));
    stranger::rules(read.chain(devices.map(|path| (path, true))))
}
