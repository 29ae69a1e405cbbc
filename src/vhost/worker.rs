//! The thread that serves one queue, from the first attach to detach.
//!
//! It alone touches its ring, its requests and its io_uring; others reach it through a [`Mailbox`] that one
//! event descriptor announces. One turn of its loop takes what is available, hands it to the store, waits for
//! the first thing to happen, finishes what is done, and publishes the used ring once.

use super::dirty::mark_dirty;
use super::ring::{Position, Ring};
use crate::store::{Buffer, Event, Wait};
use crate::virtio::{Op, Parsed, Segment, Status};
use crate::volume::io::{Disk, DiskQueue, GuestData};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// What wakes the thread beside completions.
const WAKE: u32 = 0;
const KICK: u32 = 1;
/// Chains taken in one turn, so that commands and completions are not kept waiting by a driver that never
/// stops.
const BATCH: usize = 64;

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
}

enum Command {
    Start(Box<Setup>),
    SetCall(Option<File>),
    Stop,
    Exit,
}

type Reply = SyncSender<Option<Position>>;

/// Where commands wait for the thread.
struct Mailbox {
    commands: Mutex<VecDeque<(Command, Reply)>>,
    wake: EventFd,
}

/// The others' side of a worker. Dropping it stops the ring and ends the thread.
pub struct Worker {
    mailbox: Arc<Mailbox>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts the thread for queue `index`. `died` is called with the reason should it ever end by itself.
    pub fn spawn(
        index: usize,
        disk: Arc<Disk>,
        depth: u16,
        died: impl FnOnce(String) + Send + 'static,
    ) -> io::Result<Self> {
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let mailbox = Arc::new(Mailbox { commands: Mutex::default(), wake });
        let (ready, started) = sync_channel(1);
        let inbox = mailbox.clone();
        let run = move || {
            // The io_uring belongs to the thread that makes it.
            let queue = match disk.open_queue(depth) {
                Ok(queue) => {
                    let _ = ready.send(Ok(()));
                    queue
                }
                Err(e) => {
                    let _ = ready.send(Err(e));
                    return;
                }
            };
            let serve = std::panic::AssertUnwindSafe(|| Server::new(inbox, queue, depth).run());
            match std::panic::catch_unwind(serve) {
                Ok(Ok(())) => {}
                Ok(Err(e)) => died(format!("queue {index}: {e}")),
                Err(_) => died(format!("queue {index}: its thread panicked")),
            }
        };
        let thread = std::thread::Builder::new().name(format!("queue-{index}")).spawn(run)?;
        started.recv().map_err(|_| io::Error::other("the queue's thread ended at once"))??;
        Ok(Worker { mailbox, thread: Some(thread) })
    }

    /// Serves a ring. Any earlier one must have been stopped.
    pub fn start(&self, setup: Setup) {
        self.call(Command::Start(Box::new(setup)));
    }

    /// Drains and forgets the ring; answers where it stands, or `None` if there was none.
    pub fn stop(&self) -> Option<Position> {
        self.call(Command::Stop)
    }

    /// Replaces the call descriptor of the running ring, and signals the new one once.
    pub fn set_call(&self, call: Option<File>) {
        self.call(Command::SetCall(call));
    }

    fn call(&self, command: Command) -> Option<Position> {
        let (reply, answer) = sync_channel(1);
        self.mailbox.commands.lock().unwrap_or_else(PoisonError::into_inner).push_back((command, reply));
        if let Err(e) = self.mailbox.wake.write(1) {
            log::error!("waking a queue's thread: {e}");
        }
        // An error means that the thread is gone, which was reported by `died`.
        answer.recv().ok().flatten()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.call(Command::Exit);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("a queue's thread ended with a panic");
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
    failed: bool,
}

/// A ring being served.
struct Active {
    setup: Setup,
    /// Heads in flight, one bit each.
    heads: Vec<u64>,
    /// The driver broke the rules: nothing more is taken until the ring is set up again.
    broken: bool,
}

/// The thread's own state.
struct Server {
    mailbox: Arc<Mailbox>,
    io: DiskQueue,
    active: Option<Active>,
    requests: Vec<Request>,
    free: Vec<u16>,
    /// Requests that wait for buffers or for room in the store's queue, oldest first.
    stalled: VecDeque<u16>,
    /// Who waits for the ring to be drained, and whether the thread ends then.
    draining: Option<Reply>,
    exit: bool,
}

impl Server {
    fn new(mailbox: Arc<Mailbox>, mut io: DiskQueue, depth: u16) -> Self {
        io.watch(WAKE, mailbox.wake.as_raw_fd());
        let request = || Request {
            head: 0,
            status: GuestAddress(0),
            written: 0,
            op: Op::Flush,
            segments: Vec::new(),
            data_len: 0,
            started: 0,
            pieces: 0,
            failed: false,
        };
        Server {
            mailbox,
            io,
            active: None,
            requests: (0..depth).map(|_| request()).collect(),
            free: (0..depth).rev().collect(),
            stalled: VecDeque::new(),
            draining: None,
            exit: false,
        }
    }

    fn run(mut self) -> io::Result<()> {
        loop {
            self.restart_stalled();
            let more = self.take_available();
            self.publish();
            if self.finish_drain() {
                return Ok(());
            }
            let wait = if more || self.kicks_pending() { Wait::Poll } else { Wait::Event };
            self.io.wait(wait)?;
            while let Some(event) = self.io.next_event() {
                self.handle(event);
            }
            self.publish();
        }
    }

    fn idle(&self) -> bool {
        self.free.len() == self.requests.len()
    }

    /// Before sleeping: asks for a kick, unless a chain is there by now. Answers whether one is.
    fn kicks_pending(&mut self) -> bool {
        match &mut self.active {
            // With requests stalled or no slot left, completions are what must come first.
            Some(active) if !active.broken && self.stalled.is_empty() && !self.free.is_empty() => {
                self.draining.is_none() && active.setup.ring.enable_kicks()
            }
            _ => false,
        }
    }

    /// Takes chains until there is none, something is short, or the batch is full. Answers whether to come
    /// back at once.
    fn take_available(&mut self) -> bool {
        let Some(active) = &mut self.active else { return false };
        if self.draining.is_some() || active.broken {
            return false;
        }
        active.setup.ring.disable_kicks();
        for _ in 0..BATCH {
            if !self.stalled.is_empty() {
                return false;
            }
            let (Some(active), Some(&slot)) = (&mut self.active, self.free.last()) else { return false };
            let request = &mut self.requests[usize::from(slot)];
            match active.setup.ring.pop(self.io.disk().geometry(), &mut request.segments) {
                Ok(None) => return false,
                Ok(Some((head, parsed))) if active.claim(head) => match parsed {
                    Some(parsed) => self.begin(slot, head, parsed),
                    None => {
                        active.release(head);
                        active.setup.ring.add_used(head, 0);
                    }
                },
                Ok(Some((head, _))) => {
                    return active.break_ring(&format!("chain {head} is in flight already"));
                }
                Err(e) => return active.break_ring(&e.to_string()),
            }
        }
        true
    }

    fn begin(&mut self, slot: u16, head: u16, parsed: Parsed) {
        self.free.pop();
        let request = &mut self.requests[usize::from(slot)];
        request.head = head;
        request.status = parsed.status;
        request.written = parsed.writable;
        request.data_len = parsed.data_len;
        request.started = 0;
        request.pieces = 0;
        request.failed = false;
        match parsed.op {
            Ok(op) => {
                request.op = op;
                self.advance(slot);
            }
            Err(status) => self.finish(slot, status),
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
        let Some(active) = &self.active else { return };
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
                let durable = active.setup.write_through.load(Ordering::Acquire);
                let guest =
                    GuestData { mem: &**active.setup.ring.mem(), segments: &request.segments, skip: at };
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
        let Some(active) = &self.active else { return };
        let request = &self.requests[usize::from(slot)];
        let mut id = &self.io.disk().serial()[..];
        for segment in &request.segments {
            let n = id.len().min(segment.len as usize);
            // In guest memory, as `parse` checked.
            if let Err(e) = active.setup.ring.mem().write_slice(&id[..n], segment.addr) {
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
                if let Some(active) = &mut self.active {
                    active.break_ring("its kick descriptor failed");
                }
            }
        }
    }

    fn complete(&mut self, tag: u64, buffer: Option<Buffer>, result: io::Result<()>) {
        let slot = tag as u16;
        let at = (tag >> 16) * 512;
        let Some(active) = &self.active else {
            unreachable!("a ring is kept until its requests are finished");
        };
        let request = &mut self.requests[usize::from(slot)];
        let result = match (request.op, buffer) {
            (Op::Read { sector }, Some(mut buffer)) => {
                let guest =
                    GuestData { mem: &**active.setup.ring.mem(), segments: &request.segments, skip: at };
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
        let Some(active) = &mut self.active else { return };
        let request = &mut self.requests[usize::from(slot)];
        let mem = active.setup.ring.mem();
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
        active.release(request.head);
        active.setup.ring.add_used(request.head, request.written);
        self.free.push(slot);
    }

    fn publish(&mut self) {
        if let Some(active) = &mut self.active
            && active.setup.ring.publish()
        {
            signal(active.setup.call.as_ref());
        }
    }

    /// Executes what is in the mailbox.
    fn obey(&mut self) {
        let _ = self.mailbox.wake.read();
        loop {
            let next = self.mailbox.commands.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
            let Some((command, reply)) = next else { return };
            match command {
                Command::Start(setup) => {
                    self.start(*setup);
                    let _ = reply.send(None);
                }
                Command::SetCall(call) => {
                    if let Some(active) = &mut self.active {
                        active.setup.call = call;
                        signal(active.setup.call.as_ref());
                    }
                    let _ = reply.send(None);
                }
                Command::Stop => self.draining = Some(reply),
                Command::Exit => {
                    self.exit = true;
                    self.draining = Some(reply);
                }
            }
        }
    }

    fn start(&mut self, setup: Setup) {
        self.io.watch(KICK, setup.kick.as_raw_fd());
        // An interrupt that died with an earlier back-end would never come again.
        signal(setup.call.as_ref());
        let heads = vec![0; usize::from(setup.ring.size()).div_ceil(64)];
        self.active = Some(Active { setup, heads, broken: false });
    }

    /// Once nothing is in flight, answers whoever waits for that. Answers whether the thread shall end.
    fn finish_drain(&mut self) -> bool {
        if self.draining.is_none() || !self.idle() {
            return false;
        }
        let position = self.active.take().map(|active| {
            self.io.unwatch(KICK);
            active.setup.ring.position()
        });
        if let Some(reply) = self.draining.take() {
            let _ = reply.send(position);
        }
        self.exit
    }
}

impl Request {
    fn fail(&mut self, e: &io::Error) {
        if !self.failed {
            log::warn!("{:?} of {} bytes: {e}", self.op, self.data_len);
        }
        self.failed = true;
    }
}

impl Active {
    /// Marks `head` as in flight, unless it is.
    fn claim(&mut self, head: u16) -> bool {
        let (word, bit) = (usize::from(head / 64), 1u64 << (head % 64));
        let free = self.heads[word] & bit == 0;
        self.heads[word] |= bit;
        free
    }

    fn release(&mut self, head: u16) {
        self.heads[usize::from(head / 64)] &= !(1u64 << (head % 64));
    }

    /// The driver broke the rules: tells the front-end. Always answers `false`, "nothing more to take".
    fn break_ring(&mut self, why: &str) -> bool {
        log::error!("ring stopped until it is set up again: {why}");
        self.broken = true;
        signal(self.setup.err.as_ref());
        false
    }
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
