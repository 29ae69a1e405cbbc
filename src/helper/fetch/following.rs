//! A fetcher, as the host process has it, and those that follow one that has ended too early.
//!
//! While there is none, nothing comes: reads that need what is not here wait, as where the place is away. The
//! next one is started at once, and after that ever more seldom, at least once a minute. It is told what was
//! asked for and has not come. Where there can be no other, reads of what is not here fail.

use super::starter::{Problem, Starter};
use super::{Ask, Begin, COMMAND, Keys, MAX_LINE, Said};
use crate::backing::coming::{self, Coming};
use crate::base::root::Root;
use crate::base::sync::Locked;
use crate::base::wire::{self, Lines};
use crate::base::{Context, Error, Kind, Result, printable};
use crate::catalog::VolumeId;
use crate::events::{Event, EventLog};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How long a fetcher may take to prove what is to come, and to look for holes.
const TIME: Duration = Duration::from_secs(300);
/// How often it is looked whether reads have waited for too long, while any wait.
const LOOK: Duration = Duration::from_millis(200);
/// How long it takes until another fetcher is started where the one before it has ended
/// soon: at first, and at most.
const AGAIN: Duration = Duration::from_secs(1);
const AGAIN_MAX: Duration = Duration::from_secs(60);
/// How often events say that one has ended, at most.
const TELL: Duration = Duration::from_secs(600);

/// A fetcher that is ready.
pub struct Fetcher {
    way: Way,
    following: Following,
}

/// The way to a fetcher.
struct Way {
    socket: UnixStream,
    lines: Lines,
}

/// What another fetcher takes.
struct Following {
    starter: Starter,
    volume: VolumeId,
    keys: Keys,
    hearing: Hearing,
}

/// What hears what a fetcher says.
struct Hearing(Vec<Arc<Coming>>);

impl Fetcher {
    /// Starts a fetcher for the volume. What it has to say for people goes to `log`, if that is not this
    /// process's standard error. Its source need not be there.
    ///
    /// # Errors
    /// What keeps it from being started; `Corrupt` if what is said to be to come is not what whoever has the
    /// data keys wrote.
    pub fn start(root: &Root, volume: VolumeId, keys: Keys, log: Option<BorrowedFd<'_>>) -> Result<Self> {
        let starter = Starter::start(root, log)?;
        let coming = keys.layers.iter().map(|layer| coming::of(layer.id.as_bytes(), layer.size)).collect();
        let following = Following { starter, volume, keys, hearing: Hearing(coming) };
        match following.start() {
            Ok(way) => Ok(Fetcher { way, following }),
            Err(Problem::Failed(e) | Problem::Gone(e)) => Err(e),
        }
    }

    /// Goes on by threads of their own: this process may be confined by now. What keeps blocks from coming is
    /// reported to `events`.
    ///
    /// # Errors
    /// If there can be no thread.
    pub fn go_on(self, events: EventLog) -> io::Result<()> {
        let Fetcher { mut way, following } = self;
        let all = following.hearing.0.clone();
        let asking = Arc::new(Mutex::new(way.socket.try_clone()?));
        let (asks, to_ask) = channel();
        let (waits, to_watch) = channel();
        for (layer, coming) in all.iter().enumerate() {
            let (asks, waits) = (asks.clone(), waits.clone());
            // The threads live as long as this process.
            coming.begin(Box::new(move |block| match block {
                Some(block) => drop(asks.send(Ask::Block { layer, block })),
                None => drop(waits.send(())),
            }));
        }
        let to = asking.clone();
        let ask = move || {
            // What a fetcher that has ended was asked for, the next one is.
            to_ask.into_iter().for_each(|ask: Ask| drop(wire::say(&to.locked(), &ask)));
        };
        std::thread::Builder::new().name("coming-asks".into()).spawn(ask)?;
        std::thread::Builder::new().name("coming-waits".into()).spawn(move || watch(&to_watch, &all))?;
        let hear = move || {
            let mut ends = Ends { events, volume: following.volume, told: None, after: Duration::ZERO };
            loop {
                let begun = Instant::now();
                let why = following.hearing.hear_all(&mut way);
                if following.hearing.is_over() {
                    return coming::set_away(None);
                }
                ends.tell(&why, begun);
                way = match following.start_again(&mut ends) {
                    Ok(next) => next,
                    Err(e) => return following.give_up(&e, &ends),
                };
                if let Ok(socket) = way.socket.try_clone() {
                    *asking.locked() = socket;
                }
                following.hearing.0.iter().for_each(|it| it.ask_again());
                ends.over();
            }
        };
        std::thread::Builder::new().name("coming".into()).spawn(hear)?;
        Ok(())
    }
}

/// Sees to it that reads do not wait too long. A volume for which nobody waits has nobody woken.
fn watch(waits: &Receiver<()>, all: &[Arc<Coming>]) {
    while let Ok(()) = waits.recv() {
        let mut is_awaited = true;
        while is_awaited {
            std::thread::sleep(LOOK);
            while let Ok(()) = waits.try_recv() {}
            is_awaited = all.iter().filter(|it| it.tick()).count() > 0;
        }
    }
}

impl Following {
    /// Starts a fetcher, and tells it what is to come. It is ready then.
    fn start(&self) -> Result<Way, Problem> {
        let socket = self.starter.next()?;
        self.begin(socket).map_err(Problem::Failed)
    }

    fn begin(&self, socket: UnixStream) -> Result<Way> {
        let attempt = || format!("tell the {COMMAND} helper what is to come");
        socket.set_read_timeout(Some(TIME))?;
        let layers = self.keys.layers.iter().map(|layer| layer.id).collect();
        let secret = self.keys.copy()?;
        wire::say_with(&socket, &Begin { volume: self.volume, layers }, secret.as_fd()).context(attempt)?;
        let mut way = Way { socket, lines: Lines::of_at_most(MAX_LINE) };
        loop {
            match way.next().context(attempt)? {
                None => return Err(Error::new(Kind::Other, "it has ended").context(attempt())),
                Some(Said::Ready) => break,
                Some(Said::Failed { kind, message }) => {
                    return Err(Error::new(Kind::from_name(&kind), printable::line(&message)));
                }
                Some(said) => self.hearing.hear(said),
            }
        }
        way.socket.set_read_timeout(None)?;
        Ok(way)
    }

    /// Another one, sooner or later.
    ///
    /// # Errors
    /// Why there will be none.
    fn start_again(&self, ends: &mut Ends) -> Result<Way> {
        loop {
            std::thread::sleep(ends.next_wait());
            match self.start() {
                Ok(way) => return Ok(way),
                Err(Problem::Gone(e)) => return Err(e),
                Err(Problem::Failed(e)) => {
                    log::error!("what is still to come of {} waits: {e}", self.volume);
                    coming::set_away(Some(e.to_string()));
                }
            }
        }
    }

    fn give_up(&self, e: &Error, ends: &Ends) {
        let message = format!(
            "no process brings what is still to come of the volume's layers any more ({e}); have \"sealblk \
             upgrade\" begin anew, or detach the volume and attach it again"
        );
        log::error!("{message}");
        coming::set_away(Some(message.clone()));
        self.hearing.0.iter().for_each(|it| it.end(&message));
        ends.event("failed", message);
    }
}

impl Way {
    fn next(&mut self) -> io::Result<Option<Said>> {
        let Some(line) = self.lines.next(&self.socket)? else { return Ok(None) };
        Ok(Some(serde_json::from_slice(&line)?))
    }
}

impl Hearing {
    /// Hears a fetcher until it ends; returns why.
    fn hear_all(&self, way: &mut Way) -> String {
        loop {
            match way.next() {
                Ok(Some(said)) => self.hear(said),
                Ok(None) => return "it has ended".to_owned(),
                Err(e) => return e.to_string(),
            }
        }
    }

    fn hear(&self, said: Said) {
        match said {
            Said::Here { layer, first, count } => {
                self.of(layer).for_each(|it| it.note_here(first..first.saturating_add(count)));
            }
            Said::Whole { layer } => self.of(layer).for_each(|it| it.note_whole()),
            Said::Gone { layer } => {
                self.of(layer).for_each(|it| it.end("the volume has no such layer any more"));
            }
            Said::Refused { layer, block, why } => {
                self.of(layer).for_each(|it| it.refuse(block, printable::line(&why).into_owned()));
            }
            Said::Away { why } => coming::set_away(Some(printable::line(&why).into_owned())),
            Said::Back => coming::set_away(None),
            Said::Ready | Said::Failed { .. } => {}
        }
    }

    fn of(&self, layer: usize) -> impl Iterator<Item = &Arc<Coming>> {
        self.0.get(layer).into_iter()
    }

    /// Whether nothing is to come any more.
    fn is_over(&self) -> bool {
        self.0.iter().all(|it| it.is_over())
    }
}

/// What is told of fetchers that end too early.
struct Ends {
    events: EventLog,
    volume: VolumeId,
    /// When there was an event of it last, and whether another is to say that it is over.
    told: Option<(Instant, bool)>,
    /// How long to wait before the next one is started.
    after: Duration,
}

impl Ends {
    fn event(&self, result: &'static str, cause: String) {
        self.events.record(&Event::pull_rest(self.volume, result, cause));
    }

    /// One that was started at `begun` has ended, which the rest waits for.
    fn tell(&mut self, why: &str, begun: Instant) {
        if begun.elapsed() > AGAIN_MAX {
            self.after = Duration::ZERO;
        }
        let message = format!("the process that brings the rest has ended ({why}); another one is started");
        log::error!("{}: {message}", self.volume);
        coming::set_away(Some(message.clone()));
        if self.told.is_none_or(|(when, _)| when.elapsed() > TELL) {
            self.told = Some((Instant::now(), true));
            self.event("waiting", message);
        }
    }

    fn next_wait(&mut self) -> Duration {
        let next = (self.after * 2).clamp(AGAIN, AGAIN_MAX);
        std::mem::replace(&mut self.after, next)
    }

    /// There is another one.
    fn over(&mut self) {
        coming::set_away(None);
        log::info!("what is still to come of {} goes on", self.volume);
        if let Some((_, is_told)) = &mut self.told
            && std::mem::take(is_told)
        {
            self.event("pulling", String::new());
        }
    }
}
