//! Serving a ring: one turn of the loop takes what is available, hands it to the disk, waits for the first
//! thing to happen, finishes what is done, and publishes the used ring once.

mod requests;

use crate::base::{Error, Kind};
use crate::disk::cipher_time::Measured;
use crate::disk::{Disk, DiskQueue, Event};
use crate::reactor::{Reactor, Wait, Watched, Woken};
use crate::vhost::queue::counters::{Counters, Tally};
use crate::vhost::queue::flushes::Flushes;
use crate::vhost::queue::in_order::InOrder;
use crate::vhost::queue::poll::BusyPoll;
use crate::vhost::queue::qos::Qos;
use crate::vhost::queue::request::Request;
use crate::vhost::queue::{Command, Mailbox, Reply, Setup, Tuning, depth, not_paused};
use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Chains taken in one turn, so that commands and completions are not kept waiting by a driver that never
/// stops.
const BATCH: usize = 64;
/// Answers that the driver is shown before the turn is over, so that it can go on while the rest is served.
const SHOW: u16 = 8;
/// Bytes that are delivered to the guest before the turn is over, or little more: then the driver is shown
/// them, and the device gets what the driver asks for next. A device that is done with several large requests
/// at once would stand idle while all of them are decrypted.
const DELIVER: usize = 128 << 10;
/// The tag of the disk's flush, which is nobody's in particular. No slot has it: see [`requests::tag`].
const FLUSH: u64 = u64::MAX;

/// A ring being served, by the thread that owns everything here.
pub(super) struct Server {
    mailbox: Arc<Mailbox>,
    /// What this thread waits with.
    reactor: Rc<dyn Reactor>,
    io: DiskQueue,
    /// Commands and kicks wake the thread.
    command: Watched,
    kick: Watched,
    setup: Setup,
    requests: Vec<Request>,
    free: Vec<u16>,
    /// Requests that wait for buffers or for room in the disk's queue, oldest first.
    stalled: VecDeque<u16>,
    /// Reads that were taken back from the disk, where they waited for what may take long: their tags and
    /// lengths.
    postponed: VecDeque<(u64, usize)>,
    /// Heads that an earlier back-end took and did not answer, oldest first.
    resubmit: VecDeque<u16>,
    /// Heads in flight, one bit each.
    heads: Vec<u64>,
    /// Where answers wait for older ones, if they shall go out in order.
    in_order: Option<InOrder>,
    flushes: Flushes,
    /// Looking for work before sleeping: the second one where the driver was just
    /// answered, and may have more soon.
    polls: [BusyPoll; 2],
    /// Whether the driver was answered since there was nothing to do last.
    answered: bool,
    qos: Arc<Qos>,
    tally: Tally,
    /// The oldest stalled request may not begin before this time is over.
    throttled: Option<Duration>,
    /// The driver broke the rules: nothing more is taken until the ring is set up again.
    broken: bool,
    /// Who waits for nothing to be in flight.
    pausing: Option<Reply>,
    /// Who waits for the ring to be drained, whether it only halts then, and whether the thread ends then.
    draining: Option<Reply>,
    halts: bool,
    exit: bool,
}

impl Server {
    pub(super) fn new(
        (mailbox, counters): (Arc<Mailbox>, Arc<Counters>),
        (reactor, io): (Rc<dyn Reactor>, DiskQueue),
        mut setup: Setup,
        tuning: &Tuning,
    ) -> Self {
        // An interrupt that died with an earlier back-end would never come again.
        mailbox.signal(setup.call.as_ref());
        let size = setup.ring.size();
        let mut resubmit = Vec::new();
        if let Some(inflight) = &mut setup.inflight {
            resubmit = inflight.recover(setup.ring.position().next_used);
            setup.ring.skip_in_flight(resubmit.len() as u16);
            if !resubmit.is_empty() {
                log::info!(
                    "{} requests were in flight in an earlier back-end: serving them again",
                    resubmit.len()
                );
            }
        }
        Server {
            command: Watched::new(&reactor, mailbox.wake.as_raw_fd()),
            kick: Watched::new(&reactor, setup.kick.as_raw_fd()),
            mailbox,
            reactor,
            io,
            requests: (0..size).map(|_| Request::new()).collect(),
            free: (0..size).rev().collect(),
            stalled: VecDeque::new(),
            postponed: VecDeque::new(),
            resubmit: resubmit.into(),
            heads: vec![0; usize::from(size).div_ceil(64)],
            in_order: tuning.in_order.then(|| InOrder::new(size)),
            flushes: Flushes::default(),
            polls: std::array::from_fn(|_| BusyPoll::new(tuning.poll)),
            answered: false,
            qos: tuning.qos.clone(),
            tally: Tally::new(counters, size),
            throttled: None,
            broken: false,
            setup,
            pausing: None,
            draining: None,
            halts: false,
            exit: false,
        }
    }

    /// Serves until the ring is stopped; returns whether the thread shall end then. `disk` is the one that it
    /// serves, and becomes another if a pause brings one.
    pub(super) fn run(mut self, disk: &mut Arc<Disk>) -> io::Result<bool> {
        loop {
            if self.takes_back() {
                self.postponed.extend(self.io.take_back());
            } else if self.halts {
                self.refuse_halt();
            } else if self.draining.is_some() {
                self.io.stop_waiting();
            }
            if let Some(reply) = self.pausing.take_if(|_| self.io.in_flight() == 0) {
                self.pause(reply, disk);
            }
            if !self.takes_back() {
                self.restart_postponed();
            }
            if self.pausing.is_none() {
                self.restart_stalled();
            }
            let more = self.take_available()?;
            self.begin_flush();
            self.publish();
            let drained = self.free.len() == self.requests.len() || self.leaves_the_rest();
            let drained = drained && (self.resubmit.is_empty() || self.broken);
            // First the pause, which somebody waits for as well.
            let drained = drained && self.pausing.is_none();
            let still = self.pausing.is_some() && self.io.in_flight() == 0;
            if let Some(mut reply) = self.draining.take_if(|_| drained) {
                let position = self.setup.ring.position();
                if std::mem::take(&mut self.halts) {
                    let _ = reply.send(Ok(Some(position)));
                    let (command, next) = self.mailbox.wait_halted();
                    if matches!(command, Command::GoOn) {
                        let _ = next.send(Ok(None));
                        self.tally.waited();
                        continue;
                    }
                    self.exit = matches!(command, Command::Exit);
                    reply = next;
                }
                let exit = self.exit;
                // The guest's memory and the buffers go before anybody hears that they are free.
                drop(self);
                let _ = reply.send(Ok(Some(position)));
                return Ok(exit);
            }
            self.note_turn();
            if more || still || self.has_delivered() {
                self.tally.settle();
                self.io.wait(Wait::Poll)?;
                self.tally.waited();
            } else {
                self.sleep()?;
            }
            while let Some(event) = self.io.next_event() {
                self.handle(event)?;
                self.show();
                // A pause begins when nothing is in flight, and then no event may be left.
                if self.has_delivered() && self.pausing.is_none() {
                    break;
                }
            }
            self.publish();
        }
    }

    /// Whether reads are taken back that wait for what may take long: in a pause, and where whoever goes on
    /// with the ring finds them noted as in flight.
    fn takes_back(&self) -> bool {
        let leaves = self.draining.is_some() && self.halts && self.setup.inflight.is_some();
        self.pausing.is_some() || leaves
    }

    /// Goes on with a ring that is to halt, if that takes a place to come back first: whoever goes on with it
    /// would not know of the reads that wait.
    fn refuse_halt(&mut self) {
        if !self.io.waits_in_vain() {
            return;
        }
        self.halts = false;
        if let Some(reply) = self.draining.take() {
            let why = "reads of the guest's wait for a place that is away, and its VMM keeps no record of \
                       what is in flight; try again when the place is back, or they have failed";
            let _ = reply.send(Err(io::Error::other(Error::new(Kind::Busy, why))));
        }
    }

    /// Whether everything that was taken and is not answered waits for what may take long, and is left to
    /// whoever goes on with the ring.
    fn leaves_the_rest(&self) -> bool {
        if !self.takes_back() || self.io.in_flight() > 0 || !self.stalled.is_empty() {
            return false;
        }
        let mut slots: Vec<u16> = self.postponed.iter().map(|(tag, _)| *tag as u16).collect();
        slots.sort_unstable();
        slots.dedup();
        slots.len() == self.requests.len() - self.free.len()
    }

    /// Whether enough was delivered for this turn. There may be events that were not taken.
    fn has_delivered(&self) -> bool {
        self.io.delivered() >= DELIVER
    }

    /// Notes what is only of interest once a turn.
    fn note_turn(&mut self) {
        self.tally.note_depth();
        if let Some(Measured { samples, bytes, time }) = self.io.take_cipher_time() {
            self.tally.cipher(samples, bytes, time);
        }
    }

    /// Stands still. Nothing is in flight, and all events were taken; requests that are
    /// not finished go on later.
    fn pause(&mut self, reply: Reply, disk: &mut Arc<Disk>) {
        let _ = reply.send(Ok(None));
        let depth = depth(&self.setup.ring);
        if let Some((next, io)) = self.mailbox.pause(|disk| disk.open_queue_by(&self.reactor, depth)) {
            self.io = io;
            *disk = next;
        }
        self.tally.pause_ends();
    }

    /// Submits what there is and waits for something to do, looking for it a while before sleeping.
    fn sleep(&mut self) -> io::Result<()> {
        // The one look at the clock before a wait: what polling needs to know, and latencies do.
        let begun = Instant::now();
        self.tally.clock(begun);
        self.tally.waited();
        if let Some(wait) = self.throttled.take() {
            self.tally.sleeps();
            // Not for long: the limits may change meanwhile.
            return self.io.wait(Wait::Until(wait.min(Duration::from_millis(100))));
        }
        let may_take = self.may_take();
        let which = usize::from(std::mem::take(&mut self.answered));
        let (poll, io, ring) = (&mut self.polls[which], &mut self.io, &self.setup.ring);
        let mut now = begun;
        if poll.is_on() {
            io.wait(Wait::Poll)?;
            let found;
            (found, now) = poll.poll(begun, || io.is_ready() || (may_take && ring.has_available()));
            self.tally.polled(found);
            if found {
                self.tally.clock(now);
                return io.wait(Wait::Poll);
            }
        }
        if self.kick_missed() {
            return self.io.wait(Wait::Poll);
        }
        self.tally.sleeps();
        let (slept, woken) = self.polls[which].sleep(now, || self.io.wait(Wait::Event));
        if let Some(woken) = woken {
            self.tally.clock(woken);
        }
        slept
    }

    /// Whether chains may be taken: with requests stalled or no slot left, completions must come first.
    fn may_take(&self) -> bool {
        // What an earlier back-end took is in flight, also before it is begun again: a drain waits for it.
        let wanted = self.draining.is_none() || !self.resubmit.is_empty();
        !self.broken && wanted && self.pausing.is_none() && self.stalled.is_empty() && !self.free.is_empty()
    }

    /// Before sleeping: asks for a kick, unless a chain is there by now. Returns whether one is.
    fn kick_missed(&mut self) -> bool {
        self.may_take() && self.setup.ring.enable_kicks()
    }

    /// Takes a chain, if there is one that may be taken.
    fn take_one(&mut self) -> Option<u16> {
        if !self.may_take() {
            return None;
        }
        let head = match self.resubmit.pop_front() {
            Some(head) => head,
            None => self.setup.ring.pop().unwrap_or_else(|e| {
                self.break_ring(&e.to_string());
                None
            })?,
        };
        if !self.claim(head) {
            self.break_ring(&format!("chain {head} is in flight already"));
            return None;
        }
        if let Some(in_order) = &mut self.in_order {
            in_order.taken(head);
        }
        Some(head)
    }

    /// Hands a request over that was begun.
    fn serve(&mut self, slot: u16) -> io::Result<()> {
        self.advance(slot);
        // What the disk did on the spot is finished while it is in the cache, and a driver
        // that looks sees it soon.
        while !self.has_delivered()
            && let Some(event) = self.io.next_event()
        {
            self.handle(event)?;
        }
        self.show();
        Ok(())
    }

    /// Takes chains until there is none, something is short, or the batch is full. Returns whether to come
    /// back at once.
    fn take_available(&mut self) -> io::Result<bool> {
        if self.may_take() {
            self.setup.ring.disable_kicks();
        }
        // One chain ahead of what is served: what its request needs is under way meanwhile.
        let mut ahead = None;
        let mut more = true;
        for _ in 0..BATCH {
            let Some(head) = self.take_one() else {
                more = false;
                break;
            };
            let begun = self.begin(head);
            if let Some(slot) = std::mem::replace(&mut ahead, begun) {
                self.serve(slot)?;
            }
        }
        if let Some(slot) = ahead {
            self.serve(slot)?;
        }
        Ok(more)
    }

    fn handle(&mut self, event: Event) -> io::Result<()> {
        match event {
            Event::Done { tag, buffer, result } => self.complete(tag, buffer, result),
            Event::Woken(Woken::Ready(token)) if token == *self.command => self.obey(),
            // What a kick means is found in the ring.
            Event::Woken(Woken::Ready(_)) => {}
            Event::Woken(Woken::Unwatched(token)) if token == *self.kick => {
                self.break_ring("its kick descriptor cannot be waited for");
            }
            Event::Woken(Woken::Unwatched(_)) => {
                return Err(io::Error::other("no command can be heard any more"));
            }
        }
        Ok(())
    }

    /// Lets the driver see what was answered, if it is enough for it to go on with.
    fn show(&mut self) {
        if self.setup.ring.unpublished() >= SHOW {
            self.publish();
        }
    }

    /// Lets the driver see what was answered.
    fn publish(&mut self) {
        let Some(interrupt) = self.setup.ring.publish() else { return };
        self.tally.shown();
        self.answered = true;
        if let Some(inflight) = &mut self.setup.inflight {
            inflight.published(self.setup.ring.position().next_used);
        }
        if interrupt {
            self.mailbox.signal(self.setup.call.as_ref());
        }
    }

    /// Executes what is in the mailbox.
    fn obey(&mut self) {
        // The count does not matter, and an empty counter is no error.
        let _ = self.mailbox.wake.read();
        while let Some((command, reply)) = self.mailbox.take() {
            match command {
                Command::Start(_) | Command::Hold(_) => {
                    drop(reply.send(Err(io::Error::other("a ring is running already"))))
                }
                Command::SetCall(call) => {
                    self.setup.call = call;
                    self.mailbox.signal(self.setup.call.as_ref());
                    let _ = reply.send(Ok(None));
                }
                // What was written before is in guest memory: the answer goes by way of a lock.
                Command::Sync => drop(reply.send(Ok(None))),
                Command::GiveMemory(memory) => {
                    self.setup.ring.grow_memory(memory);
                    let _ = reply.send(Ok(None));
                }
                Command::Stop => self.draining = Some(reply),
                Command::Halt => {
                    self.halts = true;
                    self.draining = Some(reply);
                }
                // Whoever asked for a halt that was not answered yet does without it.
                Command::GoOn => {
                    if std::mem::take(&mut self.halts) {
                        self.draining = None;
                    }
                    let _ = reply.send(Ok(None));
                }
                Command::Pause => {
                    self.tally.pause_begins();
                    self.pausing = Some(reply);
                }
                Command::Exit => {
                    self.exit = true;
                    self.draining = Some(reply);
                }
                Command::Prepare(_) => drop(reply.send(Err(not_paused()))),
                // Whoever asked for a pause that was not answered yet does without it.
                Command::Resume { .. } => {
                    self.pausing = None;
                    self.tally.pause_ends();
                    let _ = reply.send(Ok(None));
                }
            }
        }
    }

    /// Marks `head` as in flight, unless it is.
    fn claim(&mut self, head: u16) -> bool {
        let (word, bit) = (usize::from(head / 64), 1u64 << (head % 64));
        let free = self.heads[word] & bit == 0;
        self.heads[word] |= bit;
        free
    }

    /// The driver broke the rules: takes nothing more, and tells the front-end.
    fn break_ring(&mut self, why: &str) {
        log::error!("ring stopped until it is set up again: {why}");
        self.broken = true;
        self.mailbox.signal(self.setup.err.as_ref());
    }
}
