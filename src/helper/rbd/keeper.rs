//! The keeper of an image: a process that has the right to one image of a cluster, and starts the servers for
//! it.
//!
//! It loads nothing of Ceph's, and moves no data. It is confined before it is told to open anything: it
//! reaches the files that librbd needs, and starts no program. A server is a child of it, without an exec,
//! and is confined further. So a confined host process, which can start nothing, has its image served again.
//! In the same way it makes another keeper, which is confined as it is, for when it dies itself.
//!
//! What a server says of itself is a claim: it has librbd, which speaks to a network.

use super::image::Pool;
use super::serve::serve;
use super::talk::{AT_END, Answer, Begin, MAX_LINE, Order, Problem, TIME, Wanted};
use super::tenure::{self, Claim, Refusal, Seen};
use crate::backing::nbd::{Image, Terms};
use crate::base::hardened::Hardened;
use crate::base::wire::{self, Lines};
use crate::base::{Context, Error, Result, child};
use crate::catalog::lock::Holder;
use crate::sandbox::{self, Access, Rule, stranger};
use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, getppid};
use serde::de::DeserializeOwned;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// The keeper's side: the whole life of the process.
///
/// # Errors
/// Only when the other side could not even be told.
pub fn help(_: Hardened) -> Result<()> {
    let Begun { socket, lines, request, image, rules } = begin(MAX_LINE, |it: &Begin| &it.image)?;
    // What the kernel says of processes is for the keeper alone.
    let own: Vec<Rule> = rules.iter().cloned().chain([Rule::new("/proc", Access::ReadTree)]).collect();
    if let Err(e) = sandbox::confine_keeper(&own) {
        wire::say(&socket, &Answer::of(&e))?;
        return Ok(());
    }
    wire::say(&socket, &Answer::Ready)?;
    Servers { image, write: request.write, rules, now: None, ended: Vec::new() }.keep(&socket, lines)
}

/// A process that has been told which image it is for.
pub(super) struct Begun<R> {
    pub(super) socket: UnixStream,
    pub(super) lines: Lines,
    /// What it was told.
    pub(super) request: R,
    pub(super) image: Image,
    /// The files that it is to be left with.
    pub(super) rules: Vec<Rule>,
}

/// Begins a process that is for one image, or for the pool that `image_of` the first line names by one. It
/// says nothing more but by its socket.
///
/// # Errors
/// For a first line that is none, of at most `max` bytes.
pub(super) fn begin<R: DeserializeOwned>(max: usize, image_of: fn(&R) -> &str) -> Result<Begun<R>> {
    let socket = child::begin()?;
    // The thread that has started this process may end before the process does. Nobody at the other end of
    // the socket ends this one.
    child::outlive_parent()?;
    let attempt = || "take a request: this command is started by sealblk alone";
    let mut lines = Lines::of_at_most(max);
    let line = lines.next(&socket).context(attempt)?.unwrap_or_default();
    let request: R = serde_json::from_slice(&line).map_err(io::Error::from).context(attempt)?;
    let image = Image::named(image_of(&request))?;
    let rules = reach(&image);
    // The log may go by a descriptor, whose number is another's from here on.
    log::set_max_level(log::LevelFilter::Off);
    stranger::keep_standard_streams()?;
    Ok(Begun { socket, lines, request, image, rules })
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
    /// Does what is asked for, until nobody asks any more.
    fn keep(mut self, socket: &UnixStream, mut lines: Lines) -> Result<()> {
        while let Some(line) = lines.next(socket)? {
            match serde_json::from_slice(&line).map_err(io::Error::from)? {
                Order::Serve(wanted) => {
                    self.end(Duration::from_secs(5));
                    match self.start(socket, *wanted) {
                        Ok((terms, connection)) => {
                            wire::say_with(socket, &Answer::Serves(terms), connection.as_fd())?;
                        }
                        Err(answer) => wire::say(socket, &answer)?,
                    }
                }
                Order::Spare => match self.make_spare(socket) {
                    Ok(spare) => wire::say_with(socket, &Answer::Spare, spare.as_fd())?,
                    Err(e) => wire::say(socket, &Answer::of(&e.into()))?,
                },
            }
        }
        self.end(AT_END);
        Ok(())
    }

    /// Makes another keeper, which is asked by what is returned. It serves nothing yet.
    fn make_spare(&self, socket: &UnixStream) -> io::Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        // SAFETY: this process has one thread, so the child has all that there is, and may go on as any
        // process.
        match unsafe { fork() }? {
            ForkResult::Parent { .. } => Ok(ours),
            ForkResult::Child => {
                drop(ours);
                close_of_parent(socket);
                let Servers { image, write, rules, ended, .. } = self;
                let (image, rules, ended) = (image.clone(), rules.clone(), ended.clone());
                let spare = Servers { image, write: *write, rules, now: None, ended };
                let _ = spare.keep(&theirs, Lines::of_at_most(MAX_LINE));
                end()
            }
        }
    }

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
        let Wanted { tenure, way, break_lock, make } = wanted;
        let claim = Claim { tenure, way, break_lock, ended: self.ended.clone() };
        // SAFETY: this process has one thread, so the child has all that there is, and may
        // go on as any process.
        match unsafe { fork() }.map_err(|e| failed(e.into()))? {
            ForkResult::Child => {
                drop((connection, ours));
                close_of_parent(socket);
                self.be_server(claim, make, &theirs, served)
            }
            ForkResult::Parent { child } => {
                drop((theirs, served));
                self.now = Some(Running { pid: child, client: None });
                let answer = self.hear(&ours);
                match answer {
                    Answer::Serves(terms) => Ok((terms, connection.into())),
                    other => {
                        // It closes the image: others would wait for a watcher that is gone.
                        self.end(Duration::from_secs(5));
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
        let tenure = self.write.then(|| claim.tenure.clone());
        let answer = if getppid() == parent { self.open(claim, make, keeper) } else { return_nothing() };
        match answer {
            Ok((image, terms)) => {
                if wire::say(keeper, &Answer::Serves(terms)).is_err() {
                    end();
                }
                serve(image, served, tenure)
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

/// Closes a child's copy of the socket by which its parent is asked, and which nobody in the child reads.
fn close_of_parent(socket: &UnixStream) {
    let _ = nix::unistd::close(socket.as_raw_fd());
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
fn reach(image: &Image) -> Vec<Rule> {
    let read = [image.conf(), image.keyring()];
    let devices = [PathBuf::from("/dev/null")];
    let read = stranger::of_libraries(true).into_iter().chain(read).map(|path| (path, false));
    stranger::rules(read.chain(devices.map(|path| (path, true))))
}
