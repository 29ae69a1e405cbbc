//! The thread that serves one queue, from attach to detach.
//!
//! It alone touches its ring, its requests and its io_uring; others reach it through a [`Mailbox`] that one
//! event descriptor announces. One turn of its loop takes what is available, hands it to the store, waits for
//! the first thing to happen, finishes what is done, and publishes the used ring once.

use super::dirty::mark_dirty;
use super::inflight::InflightQueue;
use super::poll::BusyPoll;
use super::qos::Qos;
use super::ring::{Position, Ring};
use crate::store::{Buffer, Event, Wait};
use crate::virtio::{Op, Segment, Status};
use crate::volume::io::{Disk, DiskQueue, GuestData};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// What wakes the thread beside completions.
const WAKE: u32 = 0;
const KICK: u32 = 1;
/// Chains taken in one turn, so that commands and completions are not kept waiting by a driver that never
/// stops.
const BATCH: usize = 64;
/// Operations that a ring may have with the store at a time, even if it is small: a request may take several.
const MIN_DEPTH: u16 = 128;

/// How the operator wants queues to be served.
#[derive(Clone, Default)]
pub struct Tuning {
    /// How long a thread may look for work before it sleeps; zero: not at all.
    pub poll: Duration,
    /// Used entries in the order in which chains were taken. It costs waiting for the slowest, and saves requests in
    /// flight from being lost in a crash where a front-end does without INFLIGHT but restores the available index
    /// from the used one, as QEMU does.
    pub in_order: bool,
    /// The CPU that a thread is bound to.
    pub cpu: Option<usize>,
    /// The volume's limits.
    pub qos: Arc<Qos>,
}

/// A ring to serve, with the descriptors that belong to it.
pub struct Setup {
    /// The ring.
    pub ring: Ring,
    /// The driver announces chains here.
    pub kick: File,
    /// We announce used entries here.
    pub call: Option<File>,
    /// We announce a broken ring here.
    pub err: Option<File>,
    /// Whether writes must be durable at completion; changes while the ring runs.
    pub write_through: Arc<AtomicBool>,
    /// Where chains in flight are noted for whoever comes after us.
    pub inflight: Option<InflightQueue>,
}

enum Command {
    Start(Box<Setup>),
    SetCall(Option<File>),
    Stop,
    Exit,
}

type Answer = io::Result<Option<Position>>;
type Reply = SyncSender<Answer>;

/// Where commands wait for the thread. An idle thread waits on the condition, a serving one on the event.
struct Mailbox {
    /// `None` once the thread is gone.
    commands: Mutex<Option<VecDeque<(Command, Reply)>>>,
    filled: Condvar,
    wake: EventFd,
}

impl Mailbox {
    fn post(&self, command: Command) -> Answer {
        let gone = || io::Error::other("the queue's thread is gone");
        let (reply, answer) = sync_channel(1);
        self.commands().as_mut().ok_or_else(gone)?.push_back((command, reply));
        self.filled.notify_one();
        self.wake.write(1)?;
        answer.recv().unwrap_or_else(|_| Err(gone()))
    }

    fn take(&self) -> Option<(Command, Reply)> {
        self.commands().as_mut()?.pop_front()
    }

    /// Takes no more commands; whoever waits for an answer hears that there will be none.
    fn close(&self) {
        *self.commands() = None;
    }

    fn wait(&self) -> (Command, Reply) {
        let mut commands = self.commands();
        loop {
            match commands.as_mut().and_then(VecDeque::pop_front) {
                Some(command) => return command,
                None => commands = self.filled.wait(commands).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    fn commands(&self) -> MutexGuard<'_, Option<VecDeque<(Command, Reply)>>> {
        // The list is whole even if somebody panicked while holding it.
        self.commands.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The others' side of a queue's thread. Dropping it stops the ring and ends the thread.
pub struct Worker {
    mailbox: Arc<Mailbox>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts the thread for queue `index`. `died` is called with the reason should it fail while it serves:
    /// then requests of the guest are lost, and nobody may go on as if nothing had happened.
    pub fn spawn(
        index: usize,
        disk: Arc<Disk>,
        tuning: Tuning,
        died: impl FnOnce(String) + Send + 'static,
    ) -> io::Result<Self> {
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let mailbox =
            Arc::new(Mailbox { commands: Mutex::new(Some(VecDeque::new())), filled: Condvar::new(), wake });
        let inbox = mailbox.clone();
        let run = move || {
            if let Some(cpu) = tuning.cpu
                && let Err(e) = bind_to(cpu)
            {
                log::warn!("queue {index} cannot be bound to CPU {cpu}: {e}");
            }
            let serve = std::panic::AssertUnwindSafe(|| serve_rings(&inbox, &disk, &tuning));
            let ended = std::panic::catch_unwind(serve);
            inbox.close();
            match ended {
                Ok(Ok(())) => {}
                Ok(Err(e)) => died(format!("queue {index}: {e}")),
                Err(_) => died(format!("queue {index}: its thread panicked")),
            }
        };
        let thread = std::thread::Builder::new().name(format!("queue-{index}")).spawn(run)?;
        Ok(Worker { mailbox, thread: Some(thread) })
    }

    /// Serves a ring. Any earlier one must have been stopped.
    pub fn start(&self, setup: Setup) -> io::Result<()> {
        self.mailbox.post(Command::Start(Box::new(setup))).map(drop)
    }

    /// Drains and forgets the ring; answers where it stands, or `None` if there was none.
    pub fn stop(&self) -> io::Result<Option<Position>> {
        self.mailbox.post(Command::Stop)
    }

    /// Replaces the call descriptor of the running ring, and signals the new one once.
    pub fn set_call(&self, call: Option<File>) -> io::Result<()> {
        self.mailbox.post(Command::SetCall(call)).map(drop)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // A thread that is gone already was reported by `died`.
        let _ = self.mailbox.post(Command::Exit);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("a queue's thread ended with a panic");
        }
    }
}

/// The thread: waits for rings and serves them, one after the other. What a ring needs (an io_uring, buffers) is
/// there only while it runs, so that a queue that no driver uses costs nothing.
fn serve_rings(mailbox: &Arc<Mailbox>, disk: &Arc<Disk>, tuning: &Tuning) -> io::Result<()> {
    loop {
        let (command, reply) = mailbox.wait();
        match command {
            Command::Start(setup) => {
                let depth = setup.ring.size().max(MIN_DEPTH);
                match disk.open_queue(depth) {
                    Ok(queue) => {
                        let server = Server::new(mailbox.clone(), queue, *setup, tuning);
                        let _ = reply.send(Ok(None));
                        if server.run()? {
                            return Ok(());
                        }
                    }
                    Err(e) => drop(reply.send(Err(e))),
                }
            }
            Command::SetCall(_) | Command::Stop => drop(reply.send(Ok(None))),
            Command::Exit => {
                let _ = reply.send(Ok(None));
                return Ok(());
            }
        }
    }
}

/// A chain that is being served.
struct Request {
    head: u16,
    status: GuestAddress,
    written: u32,
    op: Op,
    /// Its data runs.
    segments: Vec<Segment>,
    data_len: u64,
    /// Bytes handed to the store.
    started: u64,
    /// Operations the store has.
    pieces: u32,
    /// Whether the volume's limits have let it in.
    admitted: bool,
    failed: bool,
}

/// A ring being served, by the thread that owns everything here.
struct Server {
    mailbox: Arc<Mailbox>,
    io: DiskQueue,
    setup: Setup,
    requests: Vec<Request>,
    free: Vec<u16>,
    /// Requests that wait for buffers or for room in the store's queue, oldest first.
    stalled: VecDeque<u16>,
    /// Heads that an earlier back-end took and did not answer, oldest first.
    resubmit: VecDeque<u16>,
    /// Heads in flight, one bit each.
    heads: Vec<u64>,
    /// Where answers wait for older ones, if they shall go out in order.
    in_order: Option<InOrder>,
    poll: BusyPoll,
    qos: Arc<Qos>,
    /// The oldest stalled request may not begin before this time is over.
    throttled: Option<Duration>,
    /// The driver broke the rules: nothing more is taken until the ring is set up again.
    broken: bool,
    /// Who waits for the ring to be drained, and whether the thread ends then.
    draining: Option<Reply>,
    exit: bool,
}

impl Server {
    fn new(mailbox: Arc<Mailbox>, mut io: DiskQueue, mut setup: Setup, tuning: &Tuning) -> Self {
        io.watch(WAKE, mailbox.wake.as_raw_fd());
        io.watch(KICK, setup.kick.as_raw_fd());
        // An interrupt that died with an earlier back-end would never come again.
        signal(setup.call.as_ref());
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
            mailbox,
            io,
            requests: (0..size).map(|_| Request::new()).collect(),
            free: (0..size).rev().collect(),
            stalled: VecDeque::new(),
            resubmit: resubmit.into(),
            heads: vec![0; usize::from(size).div_ceil(64)],
            in_order: tuning.in_order.then(|| InOrder::new(size)),
            poll: BusyPoll::new(tuning.poll),
            qos: tuning.qos.clone(),
            throttled: None,
            broken: false,
            setup,
            draining: None,
            exit: false,
        }
    }

    /// Serves until the ring is stopped; answers whether the thread shall end then.
    fn run(mut self) -> io::Result<bool> {
        loop {
            self.restart_stalled();
            let more = self.take_available();
            self.publish();
            let drained = self.free.len() == self.requests.len() && (self.resubmit.is_empty() || self.broken);
            if let Some(reply) = self.draining.take_if(|_| drained) {
                let position = self.setup.ring.position();
                let exit = self.exit;
                // The guest's memory and the buffers go before anybody hears that they are free.
                drop(self);
                let _ = reply.send(Ok(Some(position)));
                return Ok(exit);
            }
            if more {
                self.io.wait(Wait::Poll)?;
            } else {
                self.sleep()?;
            }
            while let Some(event) = self.io.next_event() {
                self.handle(event);
            }
            self.publish();
        }
    }

    /// Submits what there is and waits for something to do, looking for it a while before sleeping.
    fn sleep(&mut self) -> io::Result<()> {
        if let Some(wait) = self.throttled.take() {
            // Not for long: the limits may change meanwhile.
            return self.io.wait(Wait::Until(wait.min(Duration::from_millis(100))));
        }
        if self.poll.is_on() {
            self.io.wait(Wait::Poll)?;
            let may_take = self.may_take();
            let (io, ring) = (&mut self.io, &self.setup.ring);
            if self.poll.poll(|| io.is_ready() || (may_take && ring.has_available())) {
                return self.io.wait(Wait::Poll);
            }
        }
        if self.kick_missed() {
            return self.io.wait(Wait::Poll);
        }
        self.poll.sleep(|| self.io.wait(Wait::Event))
    }

    /// Whether chains may be taken: with requests stalled or no slot left, completions must come first.
    fn may_take(&self) -> bool {
        // What an earlier back-end took is in flight, also before it is begun again: a drain waits for it.
        let wanted = self.draining.is_none() || !self.resubmit.is_empty();
        !self.broken && wanted && self.stalled.is_empty() && !self.free.is_empty()
    }

    /// Before sleeping: asks for a kick, unless a chain is there by now. Answers whether one is.
    fn kick_missed(&mut self) -> bool {
        self.may_take() && self.setup.ring.enable_kicks()
    }

    /// Takes chains until there is none, something is short, or the batch is full. Answers whether to come
    /// back at once.
    fn take_available(&mut self) -> bool {
        if self.may_take() {
            self.setup.ring.disable_kicks();
        }
        for _ in 0..BATCH {
            if !self.may_take() {
                return false;
            }
            let head = match self.resubmit.pop_front() {
                Some(head) => head,
                None => match self.setup.ring.pop() {
                    Ok(Some(head)) => head,
                    Ok(None) => return false,
                    Err(e) => {
                        self.break_ring(&e.to_string());
                        return false;
                    }
                },
            };
            if !self.claim(head) {
                self.break_ring(&format!("chain {head} is in flight already"));
                return false;
            }
            if let Some(in_order) = &mut self.in_order {
                in_order.taken(head);
            }
            self.begin(head);
        }
        true
    }

    /// Begins with a chain; there is a free slot.
    fn begin(&mut self, head: u16) {
        let Some(slot) = self.free.pop() else { return };
        // On record before anything has an effect.
        if let Some(inflight) = &mut self.setup.inflight {
            inflight.take(head);
        }
        let request = &mut self.requests[usize::from(slot)];
        let Some(parsed) = self.setup.ring.parse(head, self.io.disk().geometry(), &mut request.segments)
        else {
            self.free.push(slot);
            return self.answer(head, 0);
        };
        request.head = head;
        request.status = parsed.status;
        request.written = parsed.writable;
        request.data_len = parsed.data_len;
        request.started = 0;
        request.pieces = 0;
        request.admitted = false;
        request.failed = false;
        match parsed.op {
            Ok(op) => {
                request.op = op;
                self.advance(slot);
            }
            Err(status) => {
                // Nothing was moved: no data to mark.
                request.op = Op::Flush;
                self.finish(slot, status);
            }
        }
    }

    /// Goes on with requests that lacked something, oldest first.
    fn restart_stalled(&mut self) {
        while let Some(slot) = self.stalled.pop_front() {
            self.advance(slot);
            // It may have stalled again: then it is the only one at the back that is oldest.
            if self.stalled.back() == Some(&slot) {
                self.stalled.rotate_right(1);
                return;
            }
        }
    }

    /// Hands over as much of a request as there is room for.
    fn advance(&mut self, slot: u16) {
        let request = &mut self.requests[usize::from(slot)];
        // A drain does not wait for the limits.
        if !request.admitted && self.draining.is_none() && request.op != Op::Flush {
            if let Err(wait) = self.qos.admit(request.data_len) {
                self.throttled = Some(wait);
                return self.stalled.push_back(slot);
            }
            request.admitted = true;
        }
        match self.requests[usize::from(slot)].op {
            Op::Read { sector } => self.transfer(slot, sector, false),
            Op::Write { sector } => self.transfer(slot, sector, true),
            Op::GetId => self.get_id(slot),
            _ if !self.io.has_room() => self.stalled.push_back(slot),
            Op::Flush => match self.io.flush(tag(slot, 0)) {
                Ok(()) => self.requests[usize::from(slot)].pieces = 1,
                Err(_) => self.finish(slot, Status::IoErr),
            },
            Op::Discard { sector, count } => self.zero(slot, sector, count, false),
            Op::WriteZeroes { sector, count, unmap } => self.zero(slot, sector, count, !unmap),
        }
    }

    fn transfer(&mut self, slot: u16, sector: u64, write: bool) {
        let request = &mut self.requests[usize::from(slot)];
        while request.started < request.data_len && !request.failed {
            let left = request.data_len - request.started;
            let len = left.min(self.io.max_buffer() as u64) as usize;
            let Some(buffer) = self.io.alloc(len) else {
                self.stalled.push_back(slot);
                return;
            };
            let at = request.started;
            let (tag, sector) = (tag(slot, at), sector + at / 512);
            request.started += len as u64;
            if write {
                let durable = self.setup.write_through.load(Ordering::Acquire);
                let guest =
                    GuestData { mem: &**self.setup.ring.mem(), segments: &request.segments, skip: at };
                match self.io.write(tag, sector, buffer, durable, guest) {
                    Ok(()) => request.pieces += 1,
                    Err(e) => request.fail(&e),
                }
            } else {
                self.io.read(tag, sector, buffer);
                request.pieces += 1;
            }
        }
        if request.pieces == 0 {
            let status = if request.failed { Status::IoErr } else { Status::Ok };
            self.finish(slot, status);
        }
    }

    fn zero(&mut self, slot: u16, sector: u64, count: u32, keep_space: bool) {
        if count == 0 {
            return self.finish(slot, Status::Ok);
        }
        self.io.zero(tag(slot, 0), sector, u64::from(count), keep_space);
        self.requests[usize::from(slot)].pieces = 1;
    }

    fn get_id(&mut self, slot: u16) {
        let request = &self.requests[usize::from(slot)];
        let mut id = &self.io.disk().serial()[..];
        for segment in &request.segments {
            let n = id.len().min(segment.len as usize);
            // In guest memory, as `parse` checked.
            if let Err(e) = self.setup.ring.mem().write_slice(&id[..n], segment.addr) {
                log::warn!("GET_ID: {e}");
            }
            id = &id[n..];
        }
        self.finish(slot, Status::Ok);
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Done { tag, buffer, result } => self.complete(tag, buffer, result),
            Event::Ready { token: WAKE } => self.obey(),
            // What a kick means is found in the ring.
            Event::Ready { .. } => {}
            Event::Unwatched { token } => {
                log::error!(
                    "{} can no longer be waited for",
                    if token == KICK { "a kick" } else { "a command" }
                );
                self.break_ring("its kick descriptor failed");
            }
        }
    }

    fn complete(&mut self, tag: u64, buffer: Option<Buffer>, result: io::Result<()>) {
        let slot = tag as u16;
        let at = (tag >> 16) * 512;
        let request = &mut self.requests[usize::from(slot)];
        let result = match (request.op, buffer) {
            (Op::Read { sector }, Some(mut buffer)) => {
                let guest =
                    GuestData { mem: &**self.setup.ring.mem(), segments: &request.segments, skip: at };
                let done = result.and_then(|()| self.io.deliver(sector + at / 512, &mut buffer, guest));
                self.io.free(buffer);
                done
            }
            (Op::Flush, _) => self.io.flushed(result),
            (_, Some(buffer)) => {
                self.io.free(buffer);
                result
            }
            (_, None) => result,
        };
        if let Err(e) = result {
            request.fail(&e);
        }
        request.pieces -= 1;
        // What has more to hand over is in `stalled`, unless it failed there.
        if request.pieces == 0
            && (request.failed || request.started == request.data_len || !request.op.moves_data())
        {
            let status = if request.failed { Status::IoErr } else { Status::Ok };
            self.stalled.retain(|&s| s != slot);
            self.finish(slot, status);
        }
    }

    /// Answers a request: data marked, status written, used entry added.
    fn finish(&mut self, slot: u16, status: Status) {
        let request = &self.requests[usize::from(slot)];
        let mem = self.setup.ring.mem();
        if matches!(request.op, Op::Read { .. } | Op::GetId) {
            for segment in &request.segments {
                mark_dirty(mem, segment.addr, u64::from(segment.len));
            }
        }
        // In guest memory, as `parse` checked.
        if let Err(e) = mem.write_obj(status as u8, request.status) {
            log::warn!("status byte: {e}");
        }
        mark_dirty(mem, request.status, 1);
        let (head, written) = (request.head, request.written);
        self.free.push(slot);
        self.answer(head, written);
    }

    /// Answers a chain, `written` bytes of it being ours: at once, or when those before it are answered.
    fn answer(&mut self, head: u16, written: u32) {
        let Some(mut in_order) = self.in_order.take() else { return self.add_used(head, written) };
        in_order.done(head, written);
        while let Some((head, written)) = in_order.next() {
            self.add_used(head, written);
        }
        self.in_order = Some(in_order);
    }

    fn add_used(&mut self, head: u16, written: u32) {
        self.heads[usize::from(head / 64)] &= !(1u64 << (head % 64));
        self.setup.ring.add_used(head, written);
        if let Some(inflight) = &mut self.setup.inflight {
            inflight.answer(head);
        }
    }

    /// Lets the driver see what was answered.
    fn publish(&mut self) {
        let Some(interrupt) = self.setup.ring.publish() else { return };
        if let Some(inflight) = &mut self.setup.inflight {
            inflight.published(self.setup.ring.position().next_used);
        }
        if interrupt {
            signal(self.setup.call.as_ref());
        }
    }

    /// Executes what is in the mailbox.
    fn obey(&mut self) {
        // The count does not matter, and an empty counter is no error.
        let _ = self.mailbox.wake.read();
        while let Some((command, reply)) = self.mailbox.take() {
            match command {
                Command::Start(_) => drop(reply.send(Err(io::Error::other("a ring is running already")))),
                Command::SetCall(call) => {
                    self.setup.call = call;
                    signal(self.setup.call.as_ref());
                    let _ = reply.send(Ok(None));
                }
                Command::Stop => self.draining = Some(reply),
                Command::Exit => {
                    self.exit = true;
                    self.draining = Some(reply);
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
        signal(self.setup.err.as_ref());
    }
}

impl Request {
    /// A free slot.
    fn new() -> Self {
        Request {
            head: 0,
            status: GuestAddress(0),
            written: 0,
            op: Op::Flush,
            segments: Vec::new(),
            data_len: 0,
            started: 0,
            pieces: 0,
            admitted: false,
            failed: false,
        }
    }

    fn fail(&mut self, e: &io::Error) {
        if !self.failed {
            log::warn!("{:?} of {} bytes: {e}", self.op, self.data_len);
        }
        self.failed = true;
    }
}

/// Answers that wait for older ones.
struct InOrder {
    /// Heads in the order in which they were taken.
    taken: VecDeque<u16>,
    /// By head: how many bytes are ours, once it is done.
    done: Vec<Option<u32>>,
}

impl InOrder {
    fn new(size: u16) -> Self {
        InOrder { taken: VecDeque::with_capacity(size.into()), done: vec![None; size.into()] }
    }

    fn taken(&mut self, head: u16) {
        self.taken.push_back(head);
    }

    fn done(&mut self, head: u16, written: u32) {
        self.done[usize::from(head)] = Some(written);
    }

    /// The oldest chain, if it is done.
    fn next(&mut self) -> Option<(u16, u32)> {
        let &head = self.taken.front()?;
        let written = self.done[usize::from(head)].take()?;
        self.taken.pop_front();
        Some((head, written))
    }
}

fn bind_to(cpu: usize) -> io::Result<()> {
    let mut set = nix::sched::CpuSet::new();
    set.set(cpu)?;
    Ok(nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set)?)
}

/// Signals an event descriptor. A full counter means that the signal is pending already.
pub(super) fn signal(fd: Option<&File>) {
    if let Some(mut fd) = fd
        && let Err(e) = fd.write_all(&1u64.to_ne_bytes())
        && e.kind() != io::ErrorKind::WouldBlock
    {
        log::warn!("signalling the front-end: {e}");
    }
}

/// What the store gives back with a completion: the request's slot, and which part of its data it was.
fn tag(slot: u16, at: u64) -> u64 {
    u64::from(slot) | (at / 512) << 16
}
