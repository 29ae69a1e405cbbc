//! The rest of a snapshot that was pulled lazily: blocks that somebody waits for at once, and all
//! others behind that, at a rate.
//!
//! A fetcher serves an attach ([`process`]), or a command ([`super::complete`]). It has the keys by
//! which blocks are proved, and no network. What is to come is proved first, by its MAC. A block is
//! proved before it is written; one that lies there is proved before anybody is told of it, whoever
//! wrote it, and brought again if it is not right. So nothing has to be kept about what has come: the
//! layer's file says it. A process that was killed, or a cut of the power, leaves at worst a block in
//! part, which does not prove right.
//!
//! Several fetchers may be at one layer, those of clones that are attached together. They write the same
//! bytes to the same places, and no hole where something is to come: what one of them has proved stays right.
//! When all of a layer has proved right, it is made durable, and gets its name ([`Catalog::has_come`]).

mod layer;
mod process;
mod sources;

pub(super) use layer::Layer;
pub(crate) use process::help;

use super::into::{Into, There};
use super::{check_name, missing};
use crate::backup::block::{self, BLOCK};
use crate::backup::{BLOCKS, PlaceId};
use crate::base::sync::Locked;
use crate::base::wire::{self, Lines};
use crate::base::{Context, Error, Kind, Result};
use crate::catalog::store_locks::RecordsLock;
use crate::catalog::{Catalog, VolumeId};
use crate::events::{Event, EventLog};
use crate::helper::carry::Carriers;
use crate::helper::fetch::{Ask, Said};
use crate::ops::brake::Brake;
use sources::{Sources, check_place};
use std::collections::{HashSet, VecDeque};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread::{ThreadId, current};
use std::time::{Duration, Instant};

const _: () = assert!(BLOCK as u64 == crate::backing::coming::BLOCK, "what is waited for is what comes");

/// Blocks that are asked for together.
const BATCH: usize = 8;
/// How long a source that is away is left alone, where somebody waits; and where nobody does.
const AGAIN: Duration = Duration::from_millis(300);
const AGAIN_BEHIND: Duration = Duration::from_secs(5);
/// How long a place may take for a block before it counts as away. It is waited for nevertheless: the carrier
/// asks an object store again for much longer.
const SLOW: Duration = Duration::from_secs(5);
/// How often events say that it waits, at most.
const TELL: Duration = Duration::from_secs(600);
/// How often whoever waits looks whether that is still needed.
const LOOK: Duration = Duration::from_millis(200);
/// How long after it all blocks are tried again that were not as they should be.
const REFUSED_AGAIN: Duration = Duration::from_secs(60);

/// What keeps blocks from coming.
pub(super) enum Problem {
    /// Nothing comes at the moment, of any block.
    Away(Error),
    /// Blocks that are not as they should be, how many, and what is wrong with the first.
    Refused(usize, Error),
}

/// One block that is wanted: the layer's place, and the block's number among those that are to come.
type Wanted = (usize, usize);

/// What is asked for: each block once, however often it is asked for.
#[derive(Default)]
struct Asks {
    queue: VecDeque<Wanted>,
    known: HashSet<Wanted>,
}

impl Asks {
    fn add(&mut self, wanted: Wanted) {
        if self.known.insert(wanted) {
            self.queue.push_back(wanted);
        }
    }

    fn add_first(&mut self, wanted: Wanted) {
        if self.known.insert(wanted) {
            self.queue.push_front(wanted);
        }
    }

    /// The next one, of the layer `at` if one is given.
    fn next(&mut self, at: Option<usize>) -> Option<Wanted> {
        let wanted = self.queue.pop_front_if(|(of, _)| at.is_none_or(|at| *of == at))?;
        self.known.remove(&wanted);
        Some(wanted)
    }
}

/// Who is told how far it has come, of how many blocks, and what keeps blocks from coming.
type Each<'a> = &'a mut dyn FnMut(u64, u64, Option<Problem>) -> Result<()>;

/// The work of a fetcher, as all of its threads see it.
pub(super) struct Fetching<'a> {
    catalog: &'a Catalog,
    carriers: &'a Carriers,
    /// None for those that have come.
    layers: Vec<Option<Layer>>,
    /// Who is told, if somebody is.
    host: Option<Mutex<&'a UnixStream>>,
    report: Report<'a>,
    asks: Mutex<Asks>,
    asked: Condvar,
    away: Mutex<Away>,
    come: AtomicU64,
    /// Blocks that were said to be wrong or missing.
    refused: Mutex<HashSet<Wanted>>,
    /// Since when each thread that waits for a place has waited.
    waits: Mutex<Vec<(ThreadId, Instant)>>,
}

/// Whether nothing comes at the moment.
#[derive(Default)]
struct Away {
    is_so: bool,
    /// Whether there is an event of it.
    is_told: bool,
    /// When there was the last one.
    told: Option<Instant>,
    /// When something has come last.
    come: Option<Instant>,
}

/// Where events go.
pub(super) struct Report<'a> {
    pub(super) events: &'a EventLog,
    pub(super) volume: VolumeId,
}

impl<'a> Fetching<'a> {
    pub(super) fn new(
        catalog: &'a Catalog,
        carriers: &'a Carriers,
        layers: Vec<Option<Layer>>,
        report: Report<'a>,
    ) -> Self {
        Fetching {
            catalog,
            carriers,
            layers,
            host: None,
            report,
            asks: Mutex::default(),
            asked: Condvar::new(),
            away: Mutex::default(),
            come: AtomicU64::new(0),
            refused: Mutex::default(),
            waits: Mutex::default(),
        }
    }

    fn say(&self, said: &Said) {
        if let Some(host) = &self.host
            && wire::say(*host.locked(), said).is_err()
        {
            // Nobody needs this process any more.
            std::process::exit(0);
        }
    }

    fn event(&self, result: &'static str, cause: String) {
        self.report.events.record(&Event::pull_rest(self.report.volume, result, cause));
    }

    /// Nothing comes at the moment.
    fn note_away(&self, e: &Error) {
        let mut away = self.away.locked();
        if std::mem::replace(&mut away.is_so, true) {
            return;
        }
        log::warn!("what is still to come of {} waits: {e}", self.report.volume);
        self.say(&Said::Away { why: e.to_string() });
        away.is_told = away.told.is_none_or(|told| told.elapsed() > TELL);
        if away.is_told {
            away.told = Some(Instant::now());
            self.event("waiting", e.to_string());
        }
    }

    /// Something has come.
    fn note_back(&self) {
        let mut away = self.away.locked();
        away.come = Some(Instant::now());
        if std::mem::replace(&mut away.is_so, false) {
            log::info!("what is still to come of {} goes on", self.report.volume);
            self.say(&Said::Back);
            if away.is_told {
                self.event("pulling", String::new());
            }
        }
    }

    fn tell_here(&self, layer: &Layer, at: usize, n: usize) {
        if layer.note_here(n) {
            self.come.fetch_add(1, Ordering::Relaxed);
        }
        self.say(&Said::Here { layer: at, first: layer.number(n), count: 1 });
    }

    /// Brings these blocks, of one layer, and tells of each. Some may be there.
    fn bring(
        &self,
        sources: &mut Sources,
        at: usize,
        wanted: &[usize],
        brake: Option<&mut Brake>,
    ) -> Result<(), Problem> {
        let Some(layer) = &self.layers[at] else { return Ok(()) };
        let away = |e: Error| Problem::Away(e.context(format!("layer {}", layer.record.id)));
        let mut into = layer.writer().map_err(away)?;
        let mut missing = Vec::new();
        for &n in wanted.iter().filter(|n| !layer.is_here(**n)) {
            let (number, name) = layer.to_come.blocks[n];
            match into.look(number, name, &layer.keys).map_err(away)? {
                There::This => self.tell_here(layer, at, n),
                there => missing.push((n, there)),
            }
        }
        if missing.is_empty() {
            return Ok(());
        }
        let brought = self.bring_missing(sources, (layer, at), &mut into, &missing, brake);
        if let Err(Problem::Away(_)) = &brought {
            // Whatever is wrong with the way there, another one may be right.
            sources.forget(&layer.target);
        }
        brought
    }

    fn bring_missing(
        &self,
        sources: &mut Sources,
        (layer, at): (&Layer, usize),
        into: &mut Into,
        missing_blocks: &[(usize, There)],
        mut brake: Option<&mut Brake>,
    ) -> Result<(), Problem> {
        let place = PlaceId(layer.to_come.head.place);
        let waiting = Waiting::begin(self);
        let away = |e: Error| Problem::Away(e.context(&layer.target.url));
        let carrier = sources.to(self.carriers, &layer.target, place).map_err(away)?;
        let mut under_way = Vec::new();
        for &(n, there) in missing_blocks {
            let (_, name) = layer.to_come.blocks[n];
            under_way.push((n, there, carrier.begin_get(&name.object(BLOCKS), block::MAX).map_err(away)?));
        }
        let mut refused: Option<(usize, Error)> = None;
        for (n, there, under_way) in under_way {
            let (number, name) = layer.to_come.blocks[n];
            let object = carrier.got(under_way).map_err(away)?;
            let proved = match object {
                None => {
                    check_place(carrier, place).map_err(away)?;
                    Err(missing(name, BLOCKS))
                }
                Some(object) => check_name(name, &object, &layer.keys, BLOCKS).map(|()| object),
            };
            match proved {
                Ok(object) => {
                    let written = match there {
                        There::Nothing => into.write(number, &object),
                        There::This | There::Another => into.write_over(number, &object),
                    };
                    written
                        .map_err(|e| Problem::Away(e.context(format!("write layer {}", layer.record.id))))?;
                    self.tell_here(layer, at, n);
                    self.note_back();
                    waiting.has_come();
                    if let Some(brake) = &mut brake {
                        // Others may bring all that is left meanwhile.
                        brake.wait_unless(object.len() as u64, LOOK, || {
                            waiting.has_come();
                            layer.is_all_here()
                        });
                    }
                }
                Err(e) => {
                    self.refuse(layer, at, n, &e);
                    let count = refused.as_ref().map_or(0, |(count, _)| *count) + 1;
                    refused = Some((count, refused.map_or(e, |(_, first)| first)));
                }
            }
        }
        refused.map_or(Ok(()), |(count, e)| Err(Problem::Refused(count, e)))
    }

    fn refuse(&self, layer: &Layer, at: usize, n: usize, e: &Error) {
        // A guest can read it again and again.
        if self.refused.locked().insert((at, n)) {
            log::error!("{}: {e}", layer.target.url);
        }
        self.say(&Said::Refused { layer: at, block: layer.number(n), why: e.to_string() });
    }

    /// Brings all that is missing, at most so fast as each layer is to come. `each` is told of what keeps
    /// blocks from coming, and is asked between blocks whether to go on, with what has come and what comes in
    /// all. Returns when all layers are whole. Blocks that are not as they should be keep no other from
    /// coming: when those have come, `each` is told, and they are tried again.
    ///
    /// # Errors
    /// What `each` says; those of the file system.
    pub(super) fn bring_all(&self, each: Each<'_>) -> Result<()> {
        let total = self.layers.iter().flatten().map(|layer| layer.count() as u64).sum();
        let mut sources = Sources::default();
        let mut left: Vec<usize> = (0..self.layers.len()).filter(|&at| self.layers[at].is_some()).collect();
        while !left.is_empty() {
            let mut refused: Option<(usize, Error)> = None;
            for at in std::mem::take(&mut left) {
                let Some(layer) = &self.layers[at] else { continue };
                if let Some((count, e)) = self.bring_layer(&mut sources, (layer, at), total, each)? {
                    let before = refused.as_ref().map_or(0, |(count, _)| *count);
                    refused = Some((before + count, refused.map_or(e, |(_, first)| first)));
                }
                match layer.is_all_here() {
                    true => self.end_layer(layer, at)?,
                    false => left.push(at),
                }
            }
            if let Some((count, e)) = refused.filter(|_| !left.is_empty()) {
                each(self.come.load(Ordering::Relaxed), total, Some(Problem::Refused(count, e)))?;
            }
        }
        each(total, total, None)?;
        self.event("completed", String::new());
        Ok(())
    }

    /// Goes through what is missing of a layer once. Returns what was refused: how many blocks, and why the
    /// first one.
    fn bring_layer(
        &self,
        sources: &mut Sources,
        (layer, at): (&Layer, usize),
        total: u64,
        each: Each<'_>,
    ) -> Result<Option<(usize, Error)>> {
        let mut brake = Brake::new(layer.target.rate);
        let (mut next, mut refused) = (0, None::<(usize, Error)>);
        loop {
            let wanted = (next..layer.count()).filter(|&n| !layer.is_here(n));
            let batch: Vec<usize> = wanted.take(BATCH).collect();
            let Some(&last) = batch.last() else { return Ok(refused) };
            let mut away = None;
            match self.bring(sources, at, &batch, Some(&mut brake)) {
                Ok(()) => next = last + 1,
                Err(Problem::Refused(count, e)) => {
                    next = last + 1;
                    let before = refused.as_ref().map_or(0, |(count, _)| *count);
                    refused = Some((before + count, refused.map_or(e, |(_, first)| first)));
                }
                Err(Problem::Away(e)) => {
                    self.note_away(&e);
                    away = Some(Problem::Away(e));
                }
            }
            let was_away = away.is_some();
            each(self.come.load(Ordering::Relaxed), total, away)?;
            if was_away {
                // The time that it was away is not made up for.
                brake = Brake::new(layer.target.rate);
            }
        }
    }

    /// Everything of a layer is there.
    fn end_layer(&self, layer: &Layer, at: usize) -> Result<()> {
        layer.file.sync_data().context(|| format!("sync layer {}", layer.record.id))?;
        // Before it has its name: from then on, commands may move data into it.
        self.say(&Said::Whole { layer: at });
        let records = RecordsLock::acquire(self.catalog)?;
        let ended = self.catalog.has_come(&layer.record, &layer.file, &records);
        drop(records);
        match ended {
            // Nobody needs it any more but, perhaps, the one for whom it was brought.
            Err(e) if e.kind() == Kind::NotFound => {
                log::warn!("{e}");
                Ok(())
            }
            ended => ended.map(drop),
        }
    }

    /// Brings what is asked for, as long as this process lives.
    fn bring_what_is_asked(&self) {
        let mut sources = Sources::default();
        loop {
            let (at, batch) = self.next_asked();
            if let Err(Problem::Away(e)) = self.bring(&mut sources, at, &batch, None) {
                self.note_away(&e);
                std::thread::sleep(AGAIN);
                let mut asks = self.asks.locked();
                batch.into_iter().rev().for_each(|n| asks.add_first((at, n)));
            }
        }
    }

    /// Blocks of one layer that somebody waits for.
    fn next_asked(&self) -> (usize, Vec<usize>) {
        let mut asks = self.asks.locked();
        loop {
            if let Some((at, n)) = asks.next(None) {
                let mut batch = vec![n];
                while batch.len() < BATCH
                    && let Some((_, n)) = asks.next(Some(at))
                {
                    batch.push(n);
                }
                return (at, batch);
            }
            asks = self.asked.wait(asks).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Tells of a place that does not answer, as long as this process lives.
    fn watch(&self) {
        loop {
            std::thread::sleep(LOOK);
            let is_slow = self.waits.locked().iter().any(|(_, since)| since.elapsed() > SLOW);
            let is_still = self.away.locked().come.is_none_or(|come| come.elapsed() > SLOW);
            if is_slow && is_still {
                let message = format!("the place has not answered for {} seconds", SLOW.as_secs());
                self.note_away(&Error::new(Kind::Other, message));
            }
        }
    }

    /// Takes what is asked for, until nobody asks any more.
    fn hear(&self, lines: &mut Lines, socket: &UnixStream) {
        while let Ok(Some(line)) = lines.next(socket) {
            let Ok(Ask::Block { layer: at, block }) = serde_json::from_slice(&line) else { break };
            let Some(Some(layer)) = self.layers.get(at) else { continue };
            match layer.to_come.blocks.binary_search_by_key(&block, |(number, _)| *number) {
                Ok(n) if !layer.is_here(n) => {
                    self.asks.locked().add((at, n));
                    self.asked.notify_one();
                }
                // Nothing is to come of it, or it has come.
                _ => self.say(&Said::Here { layer: at, first: block, count: 1 }),
            }
        }
        std::process::exit(0);
    }
}

/// A thread waits for a place.
struct Waiting<'a>(&'a Mutex<Vec<(ThreadId, Instant)>>);

impl<'a> Waiting<'a> {
    fn begin(fetching: &'a Fetching<'_>) -> Self {
        fetching.waits.locked().push((current().id(), Instant::now()));
        Waiting(&fetching.waits)
    }

    /// It has got something, or does not wait for the place at the moment.
    fn has_come(&self) {
        let own = current().id();
        self.0.locked().iter_mut().filter(|(id, _)| *id == own).for_each(|it| it.1 = Instant::now());
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let own = current().id();
        self.0.locked().retain(|(id, _)| *id != own);
    }
}
