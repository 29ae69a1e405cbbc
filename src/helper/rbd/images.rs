//! The images that this process uses, each by way of a keeper that it has started.
//!
//! A confined process can start none. So it has two: the one that it asks, and a spare one that this has
//! made. When the first has died, the spare goes on, and makes another.
#![forbid(unsafe_code)]

use super::talk::{AT_END, Answer, Begin, COMMAND, MAX_LINE, Order, TIME, Wanted};
use super::tenure::{Tenure, Way};
use crate::backing::nbd::dial::{self, How, Lost, Right};
use crate::backing::nbd::{Address, Image, Terms};
use crate::base::root::Root;
use crate::base::sync::Locked;
use crate::base::wire::{self, Lines};
use crate::base::{Context, Error, Kind, Result, Timestamp, child, log_fields, printable};
use crate::catalog::lock::{Holder, Purpose};
use crate::sandbox::stranger;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use uuid::Uuid;

/// What the keeper may take beside its server.
const MARGIN: Duration = Duration::from_secs(15);

static BREAK_LOCK: AtomicBool = AtomicBool::new(false);
/// Whether this process is about to be confined, and starts no more keepers.
static HAS_ALL: AtomicBool = AtomicBool::new(false);
/// Tenures of the process that has had its images until now.
static INHERITED: Mutex<BTreeMap<Image, Uuid>> = Mutex::new(BTreeMap::new());

/// From now on, this process takes images also from those who still give signs of life.
pub fn set_break_lock(it: bool) {
    BREAK_LOCK.store(it, Ordering::Relaxed);
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
        let keeper = keeper_of(image, right)?;
        keeper.locked().have_spare().context(|| format!("start another {COMMAND} helper for {image}"))?;
    }
    HAS_ALL.store(true, Ordering::Relaxed);
    Ok(())
}

/// The images that this process has for writing, and its tenures there: for whoever goes on for it.
pub fn tenures() -> Vec<(Image, Uuid)> {
    let keepers = KEEPERS.locked();
    let written = keepers.iter().filter(|((_, right), _)| *right == Right::Write);
    written.filter_map(|((image, _), keeper)| Some((image.clone(), keeper.locked().tenure()?))).collect()
}

/// These images are opened for writing as a part of those tenures, the first time: whoever has them until
/// then lends them.
pub fn inherit(tenures: impl IntoIterator<Item = (Image, Uuid)>) {
    INHERITED.locked().extend(tenures);
}

fn keeper_of(image: &Image, right: Right) -> io::Result<Arc<Mutex<Keeper>>> {
    let mut keepers = KEEPERS.locked();
    let key = (image.clone(), right);
    if let Some(keeper) = keepers.get(&key).filter(|keeper| !keeper.locked().is_over()) {
        return Ok(keeper.clone());
    }
    if HAS_ALL.load(Ordering::Relaxed) {
        let message = format!(
            "the {COMMAND} helpers of {} have ended; attach the volume \
                               again",
            image.shown()
        );
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

/// What serves an image to this process.
struct Keeper {
    asked: Line,
    spare: Option<Line>,
    /// The first one, of which this process is the parent.
    child: Child,
    /// This process, which may not look at itself once it is confined.
    holder: Holder,
    /// Of the last server that was wanted.
    tenure: Option<Tenure>,
}

/// A keeper's process, as it is reached.
struct Line {
    socket: UnixStream,
    lines: Lines,
    is_broken: bool,
}

impl Keeper {
    fn start(image: &Image, right: Right) -> Result<Keeper> {
        let (socket, child) = child::spawn_lasting(&Root::new("/"), COMMAND, |program| {
            stranger::keep_back(program);
            // It says nothing there, and somebody may wait until nobody can any more.
            program.stderr(Stdio::null());
        })?;
        let attempt = || format!("start the {COMMAND} helper for {image}");
        let mut asked = Line::new(socket).context(attempt)?;
        let begin = Begin { image: image.to_string(), write: right == Right::Write };
        let holder = Holder::this_process(Purpose::Attach, None)?;
        match asked.ask(&begin).context(attempt)? {
            Answer::Ready => Ok(Keeper { asked, spare: None, child, holder, tenure: None }),
            Answer::Failed(_, why) => Err(Error::new(Kind::Other, why).context(attempt())),
            _ => Err(Error::new(Kind::Other, "it answers strangely").context(attempt())),
        }
    }

    /// Whether nobody is left that could serve the image.
    fn is_over(&self) -> bool {
        self.asked.is_broken && self.spare.is_none()
    }

    fn tenure(&self) -> Option<Uuid> {
        self.tenure.as_ref().map(Tenure::number)
    }

    /// Has another keeper ready, unless one is.
    fn have_spare(&mut self) -> io::Result<()> {
        if self.spare.as_ref().is_some_and(|spare| !spare.has_ended()) {
            return Ok(());
        }
        self.spare = None;
        match self.asked.ask(&Order::Spare)? {
            Answer::Spare => self.spare = Some(Line::new(self.asked.descriptor()?.into())?),
            Answer::Failed(_, why) => return Err(io::Error::other(printable::line(&why).into_owned())),
            _ => return Err(io::Error::other("the keeper answers strangely")),
        }
        Ok(())
    }

    /// Has the image served.
    fn serve(&mut self, image: &Image, how: How) -> io::Result<(UnixStream, Terms)> {
        let (tenure, way) = self.claim(image, how);
        let break_lock = BREAK_LOCK.load(Ordering::Relaxed);
        let order =
            Order::Serve(Box::new(Wanted { tenure: tenure.clone(), way, break_lock, make: how.make }));
        self.tenure = Some(tenure);
        let mut answer = self.asked.ask(&order);
        if self.asked.is_broken
            && let Some(spare) = self.spare.take()
        {
            log::warn!("{}: what keeps it for this process has ended; another one goes on", image.shown());
            self.asked = spare;
            answer = self.asked.ask(&order);
        }
        let served = answer.and_then(|answer| self.served(image, answer));
        if HAS_ALL.load(Ordering::Relaxed)
            && !self.is_over()
            && let Err(e) = self.have_spare()
        {
            log::warn!("{}: no other {COMMAND} helper is ready: {e}", image.shown());
        }
        served
    }

    /// As whose the image is opened.
    fn claim(&mut self, image: &Image, how: How) -> (Tenure, Way) {
        let volume = || log_fields::volume().map(str::to_owned);
        let holder = Holder { since: Timestamp::now(), ..self.holder.clone() };
        match self.tenure.take().filter(|_| how.again) {
            Some(tenure) => (tenure, Way::Again),
            None if how.right == Right::Read => (Tenure::new(holder, volume()), Way::New),
            None => match INHERITED.locked().remove(image) {
                Some(number) => (Tenure::of_another(number, holder, volume()), Way::Lent),
                None => (Tenure::new(holder, volume()), Way::New),
            },
        }
    }

    fn served(&mut self, image: &Image, answer: Answer) -> io::Result<(UnixStream, Terms)> {
        match answer {
            Answer::Serves(terms) => Ok((UnixStream::from(self.asked.descriptor()?), terms)),
            Answer::Failed(problem, why) => {
                let why = printable::line(&why).into_owned();
                let error = Error::new(problem.kind(), why).context(format!("open {}", image.shown()));
                Err(io_error(error))
            }
            Answer::Lost(why) => Err(io::Error::other(Lost(printable::line(&why).into_owned()))),
            _ => Err(io::Error::other("the keeper answers strangely")),
        }
    }
}

impl Line {
    fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_read_timeout(Some(TIME + MARGIN))?;
        Ok(Line { socket, lines: Lines::of_at_most(MAX_LINE), is_broken: false })
    }

    fn ask(&mut self, what: &impl serde::Serialize) -> io::Result<Answer> {
        let gone = || io::Error::new(ErrorKind::BrokenPipe, format!("the {COMMAND} helper has ended"));
        let said = wire::say(&self.socket, what);
        let heard = said.and_then(|()| self.lines.next(&self.socket)).and_then(|line| line.ok_or_else(gone));
        let heard = heard.and_then(|line| Ok(serde_json::from_slice(&line)?));
        // What it says from now on could be the answer to something else.
        self.is_broken |= heard.is_err();
        heard
    }

    fn descriptor(&mut self) -> io::Result<OwnedFd> {
        let none = || io::Error::other("no connection came with the answer");
        self.lines.take_descriptor().ok_or_else(none)
    }

    /// Whether nobody is at its other end.
    fn has_ended(&self) -> bool {
        let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::empty())];
        poll(&mut fds, PollTimeout::ZERO).is_err() || fds[0].any() != Some(false)
    }
}

impl Drop for Keeper {
    /// A keeper ends when nobody asks any more, once its server has.
    fn drop(&mut self) {
        for line in [Some(&self.asked), self.spare.as_ref()].into_iter().flatten() {
            let _ = line.socket.shutdown(Shutdown::Write);
        }
        // It closes its end by ending; it may be no child of this process's.
        let _ = self.asked.socket.set_read_timeout(Some(AT_END + MARGIN));
        let _ = (&self.asked.socket).read(&mut [0; 64]);
        let _ = self.child.wait();
    }
}
