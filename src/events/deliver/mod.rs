//! Delivering events to the sinks of the settings: each event at least once, in order, for
//! as long as it takes.
//!
//! The spool is `events.jsonl` itself, with a position for each sink: whoever makes an event writes one line
//! and goes on, whatever becomes of the sinks. A sink that does not take an event gets no other before; one
//! does not hold up another.

mod command;
mod http;
mod position;

use crate::base::root::Root;
use crate::base::{Error, Kind, Result, Timestamp};
use crate::config::sinks::{Sink, Target};
use crate::events::read::{Recorded, Want};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use position::Position;
use std::os::fd::BorrowedFd;
use std::time::Duration;

/// How long is waited after the first failure; twice as long after each further one.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// And at most.
const LONGEST_PAUSE: Duration = Duration::from_secs(300);

/// What a sink is still to get.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Behind {
    /// How many events.
    pub events: u64,
    /// When the oldest of them happened.
    pub oldest: Option<Timestamp>,
}

/// What the sink `name` is still to get. Whoever serves it is not disturbed.
///
/// # Errors
/// Those of reading the log, and the sink's position.
pub fn behind(root: &Root, name: &str) -> Result<Behind> {
    let mut behind = Behind::default();
    position::undelivered(root, name, |event| {
        behind.events += 1;
        let time = || event.event["time"].as_str()?.to_owned().try_into().ok();
        behind.oldest = behind.oldest.or_else(time);
    })?;
    Ok(behind)
}

/// How a sink was served.
#[derive(Debug)]
pub struct Outcome {
    /// The sink.
    pub sink: String,
    /// How many events it has taken.
    pub delivered: u64,
    /// Why it has not taken all.
    pub result: Result<()>,
}

/// Delivers what is there to each sink, all at once; the first failure ends it for that sink. Sinks that are
/// new begin with the first event, or with what happens from now on.
pub fn deliver_once(root: &Root, sinks: &[Sink], new_from_now: bool) -> Vec<Outcome> {
    each(sinks, |sink, delivered| {
        let position = Position::acquire(root, &sink.name)?;
        let mut reader = position.reader(root, new_from_now)?;
        let attempt = |event: &Recorded| match deliver(sink, event) {
            Ok(()) => {
                position.write(Some(event))?;
                *delivered += 1;
                Ok(Want::More)
            }
            Err(e) => Err(Error::new(Kind::Other, format!("event sink {:?}: {e}", sink.name))),
        };
        reader.read(attempt).map(drop)
    })
}

/// Delivers to each sink what is there and what comes, until `stop` becomes readable.
pub fn follow(root: &Root, sinks: &[Sink], new_from_now: bool, stop: BorrowedFd<'_>) -> Vec<Outcome> {
    each(sinks, |sink, delivered| {
        let mut serve = || {
            let position = Position::acquire(root, &sink.name)?;
            let mut reader = position.reader(root, new_from_now)?;
            reader.follow(stop, |event| {
                let taken = insist(sink, event, stop)?;
                if taken == Want::More {
                    position.write(Some(event))?;
                    *delivered += 1;
                }
                Ok(taken)
            })
        };
        // The others go on, so that the end may be far.
        serve().inspect_err(|e| log::error!("event sink {:?} is not served any more: {e}", sink.name))
    })
}

/// Serves each sink by a thread of its own.
fn each(sinks: &[Sink], serve: impl Fn(&Sink, &mut u64) -> Result<()> + Sync) -> Vec<Outcome> {
    std::thread::scope(|scope| {
        let serve = &serve;
        let threads: Vec<_> = sinks
            .iter()
            .map(|sink| {
                scope.spawn(move || {
                    let mut delivered = 0;
                    let result = serve(sink, &mut delivered);
                    Outcome { sink: sink.name.clone(), delivered, result }
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("delivering does not panic")).collect()
    })
}

/// Tries until the sink takes the event, or `stop` becomes readable.
fn insist(sink: &Sink, event: &Recorded, stop: BorrowedFd<'_>) -> Result<Want> {
    let mut pause = FIRST_PAUSE;
    loop {
        match deliver(sink, event) {
            Ok(()) if pause == FIRST_PAUSE => return Ok(Want::More),
            Ok(()) => {
                log::warn!("event sink {:?} takes events again", sink.name);
                return Ok(Want::More);
            }
            Err(e) => log::warn!("event sink {:?}: {e}; trying again in {} s", sink.name, pause.as_secs()),
        }
        let timeout = PollTimeout::try_from(pause).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(stop, PollFlags::POLLIN)], timeout) {
            Ok(0) | Err(nix::errno::Errno::EINTR) => {}
            Ok(_) => return Ok(Want::Enough),
            Err(e) => return Err(e.into()),
        }
        pause = (2 * pause).min(LONGEST_PAUSE);
    }
}

fn deliver(sink: &Sink, event: &Recorded) -> Result<(), String> {
    match &sink.target {
        Target::Command(command) => command::deliver(command, event, sink.timeout),
        Target::Http(url) => http::deliver(url, event, sink.timeout),
    }
}
