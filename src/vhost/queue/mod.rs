//! The thread that serves one queue, from attach to detach, and how others reach it.
//!
//! It alone touches its ring, its requests and its io_uring (`serve`); others send commands through a mailbox
//! that one event descriptor announces, and wait for the answer.

pub mod counters;
mod flushes;
mod in_order;
pub mod inflight;
mod interrupt;
pub mod poll;
pub mod qos;
mod request;
pub mod ring;
mod serve;
mod sync;

#[cfg(test)]
mod fake;
#[cfg(all(test, feature = "model"))]
mod model;
#[cfg(all(test, not(feature = "model")))]
mod tests;

use crate::disk::Disk;
use crate::vhost::dirty::GuestMemory;
use crate::vhost::queue::counters::Counters;
use crate::vhost::queue::inflight::InflightQueue;
use crate::vhost::queue::qos::Qos;
use crate::vhost::queue::ring::{Position, Ring};
use serve::Server;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use sync::{Condvar, Mutex, MutexGuard, Receiver, SyncSender, sync_channel};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Operations that a ring may have with the disk at a time, even if it is small: a request may take several.
const MIN_DEPTH: u16 = 128;
/// How long a thread may take to answer before it is interrupted if it is signalling the VMM.
const INTERRUPT_AFTER: Duration = Duration::from_secs(1);

/// How the operator wants queues to be served.
#[derive(Clone, Default)]
pub struct Tuning {
    /// How long a thread may look for work before it sleeps; zero: not at all.
    pub poll: Duration,
    /// Used entries in the order in which chains were taken. It costs waiting for the slowest, and saves
    /// requests in flight from being lost in a crash where a front-end does without INFLIGHT but restores the
    /// available index from the used one, as QEMU does.
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
    Sync,
    /// Serve the ring in this memory, which has all that there was before.
    GiveMemory(Arc<GuestMemory>),
    /// Have another disk, or none, for the rings to come.
    Hold(Option<Arc<Disk>>),
    Stop,
    /// Drain the ring, and answer where it stands; then obey nothing but the next one, and
    /// what ends the ring.
    Halt,
    /// Go on with a ring that is halted.
    GoOn,
    /// Begin nothing more, and answer when no operation is in flight; then obey nothing but the next two.
    Pause,
    /// In a pause: get ready to go on with another disk.
    Prepare(Arc<Disk>),
    /// Go on, with the disk that was prepared, if that is said.
    Resume {
        switch: bool,
    },
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
    /// Whether the thread is signalling the VMM at this moment.
    signalling: AtomicBool,
}

impl Mailbox {
    fn new() -> io::Result<Arc<Self>> {
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let commands = Mutex::new(Some(VecDeque::new()));
        let signalling = AtomicBool::new(false);
        Ok(Arc::new(Mailbox { commands, filled: Condvar::new(), wake, signalling }))
    }

    /// Leaves a command for the thread; the answer comes by the receiver.
    fn send(&self, command: Command) -> io::Result<Receiver<Answer>> {
        let (reply, answer) = sync_channel(1);
        self.commands().as_mut().ok_or_else(gone)?.push_back((command, reply));
        self.filled.notify_one();
        self.wake.write(1)?;
        Ok(answer)
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

    /// Waits for a command about the pause. All others stay where they are until it is over.
    fn wait_in_pause(&self) -> (Command, Reply) {
        self.wait_for(|c| matches!(c, Command::Prepare(_) | Command::Resume { .. }))
    }

    /// Waits for what becomes of a ring that is halted.
    fn wait_halted(&self) -> (Command, Reply) {
        self.wait_for(|c| matches!(c, Command::GoOn | Command::Stop | Command::Exit))
    }

    fn wait_for(&self, about: impl Fn(&Command) -> bool) -> (Command, Reply) {
        let mut commands = self.commands();
        loop {
            let list = commands.get_or_insert_default();
            let found = list.iter().position(|(command, _)| about(command));
            if let Some(command) = found.and_then(|index| list.remove(index)) {
                return command;
            }
            commands = self.filled.wait(commands).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Stands still until the end of a pause; returns what goes on, if that is not what there was. `open`
    /// makes it out of the disk.
    fn pause<T>(&self, open: impl Fn(&Arc<Disk>) -> io::Result<T>) -> Option<(Arc<Disk>, T)> {
        let mut next = None;
        loop {
            match self.wait_in_pause() {
                (Command::Prepare(disk), reply) => {
                    let opened = open(&disk).map(|opened| next = Some((disk, opened)));
                    let _ = reply.send(opened.map(|()| None));
                }
                (Command::Resume { switch }, reply) => {
                    let _ = reply.send(Ok(None));
                    return next.filter(|_| switch);
                }
                (_, reply) => drop(reply.send(Err(not_paused()))),
            }
        }
    }

    fn commands(&self) -> MutexGuard<'_, Option<VecDeque<(Command, Reply)>>> {
        // The list is whole even if somebody panicked while holding it.
        self.commands.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn gone() -> io::Error {
    io::Error::other("the queue's thread is gone")
}

/// What a thread will answer to a [`Worker::pause`], and the like.
pub struct Awaited(Receiver<Answer>);

impl Awaited {
    /// The answer.
    pub fn wait(self) -> io::Result<()> {
        self.0.recv().unwrap_or_else(|_| Err(gone())).map(drop)
    }
}

/// The others' side of a queue's thread. Dropping it stops the ring and ends the thread.
pub struct Worker {
    mailbox: Arc<Mailbox>,
    counters: Arc<Counters>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts the thread for queue `index`, with a disk or as yet without one. `died` is called
    /// with the reason if the thread fails while it serves: then requests of the guest are lost,
    /// and the process must not go on.
    pub fn spawn(
        index: usize,
        disk: impl Into<Option<Arc<Disk>>>,
        tuning: Tuning,
        died: impl FnOnce(String) + Send + 'static,
    ) -> io::Result<Self> {
        let mailbox = Mailbox::new()?;
        let (inbox, disk, counters) = (mailbox.clone(), disk.into(), Counters::new());
        interrupt::prepare()?;
        let counted = counters.clone();
        let run = move || live(index, (&inbox, &counted), disk, &tuning, died);
        let thread = std::thread::Builder::new().name(format!("queue-{index}")).spawn(run)?;
        Ok(Worker { mailbox, counters, thread: Some(thread) })
    }

    /// What the thread has done since it was started, whatever it does at this moment.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Has the thread do something, and waits for its answer. A VMM can make its call descriptor block, which
    /// is then to hold up neither a drain nor a detach: the thread is interrupted.
    fn ask(&self, command: Command) -> Answer {
        self.hear(Awaited(self.mailbox.send(command)?))
    }

    fn hear(&self, answer: Awaited) -> Answer {
        loop {
            match answer.0.recv_timeout(INTERRUPT_AFTER) {
                Ok(answer) => return answer,
                Err(RecvTimeoutError::Disconnected) => return Err(gone()),
                Err(RecvTimeoutError::Timeout) => self.free_of_vmm(),
            }
        }
    }

    /// What the thread answers. As in [`Worker::ask`], a VMM cannot hold it up.
    pub fn wait(&self, answer: Awaited) -> io::Result<()> {
        self.hear(answer).map(drop)
    }

    /// What the thread answers, if it does until `deadline`. As in [`Worker::ask`], a VMM cannot hold it up.
    pub fn wait_until(&self, answer: Awaited, deadline: Instant) -> io::Result<()> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match answer.0.recv_timeout(left.min(INTERRUPT_AFTER)) {
                Ok(answer) => return answer.map(drop),
                Err(RecvTimeoutError::Disconnected) => return Err(gone()),
                Err(RecvTimeoutError::Timeout) if left.is_zero() => {
                    let message = "operations are in flight that do not end";
                    return Err(io::Error::new(io::ErrorKind::TimedOut, message));
                }
                Err(RecvTimeoutError::Timeout) => self.free_of_vmm(),
            }
        }
    }

    /// Interrupts the thread where it waits for a VMM to take a signal.
    fn free_of_vmm(&self) {
        if let Some(thread) = &self.thread
            && self.mailbox.signalling.load(Ordering::Relaxed)
        {
            interrupt::interrupt(thread);
        }
    }

    /// Has the rings to come served from `disk`, or none at all. Forgets the disk before,
    /// which no ring may use now.
    pub fn hold(&self, disk: Option<Arc<Disk>>) -> io::Result<()> {
        self.ask(Command::Hold(disk)).map(drop)
    }

    /// Serves a ring. Any earlier one must have been stopped.
    pub fn start(&self, setup: Setup) -> io::Result<()> {
        self.ask(Command::Start(Box::new(setup))).map(drop)
    }

    /// Drains and forgets the ring; returns where it stands, or `None` if there was none.
    pub fn stop(&self) -> io::Result<Option<Position>> {
        self.ask(Command::Stop)
    }

    /// Asks the thread to drain the ring, and to stand still then; [`Worker::position`] has the answer.
    /// Requests go on with [`Worker::go_on`]; [`Worker::stop`] ends the ring as ever.
    pub fn halt(&self) -> io::Result<Awaited> {
        self.mailbox.send(Command::Halt).map(Awaited)
    }

    /// Where a ring stands that was asked to halt; `None` if there is none. As in [`Worker::ask`],
    /// a VMM cannot hold it up.
    pub fn position(&self, halted: Awaited) -> io::Result<Option<Position>> {
        self.hear(halted)
    }

    /// Has a ring that is halted go on.
    pub fn go_on(&self) -> io::Result<()> {
        self.ask(Command::GoOn).map(drop)
    }

    /// Asks the thread to begin nothing more; the answer comes when none of its operations is in
    /// flight. Requests that it has taken but not finished stay with it, and so do commands of others,
    /// until [`Worker::resume`].
    pub fn pause(&self) -> io::Result<Awaited> {
        self.mailbox.send(Command::Pause).map(Awaited)
    }

    /// Lets a thread that is paused open another disk, for [`Worker::resume`].
    pub fn prepare(&self, disk: Arc<Disk>) -> io::Result<Awaited> {
        self.mailbox.send(Command::Prepare(disk)).map(Awaited)
    }

    /// Lets a thread that was asked to pause go on; with the disk that was prepared last, if `switch`.
    pub fn resume(&self, switch: bool) -> io::Result<Awaited> {
        self.mailbox.send(Command::Resume { switch }).map(Awaited)
    }

    /// Returns when whatever the thread writes is decided by what is true now, and what it wrote before is
    /// there for everybody to see.
    pub fn sync(&self) -> io::Result<()> {
        self.ask(Command::Sync).map(drop)
    }

    /// Has the running ring served in this memory, which must have all regions that there were before, where
    /// they were. The ring need not stop for that.
    pub fn give_memory(&self, memory: Arc<GuestMemory>) -> io::Result<Awaited> {
        self.mailbox.send(Command::GiveMemory(memory)).map(Awaited)
    }

    /// Replaces the call descriptor of the running ring, and signals the new one once.
    pub fn set_call(&self, call: Option<File>) -> io::Result<()> {
        self.ask(Command::SetCall(call)).map(drop)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // A thread that is gone already was reported by `died`.
        let _ = self.ask(Command::Exit);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("a queue's thread ended with a panic");
        }
    }
}

/// The thread's life.
fn live(
    index: usize,
    (inbox, counters): (&Arc<Mailbox>, &Arc<Counters>),
    disk: Option<Arc<Disk>>,
    tuning: &Tuning,
    died: impl FnOnce(String),
) {
    if let Some(cpu) = tuning.cpu
        && let Err(e) = bind_to(cpu)
    {
        log::warn!("queue {index} cannot be bound to CPU {cpu}: {e}");
    }
    crate::reactor::ring::claim();
    let serve = || serve_rings((inbox, counters), disk, tuning);
    let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(serve));
    inbox.close();
    match ended {
        Ok(Ok(())) => {}
        Ok(Err(e)) => died(format!("queue {index}: {e}")),
        Err(_) => died(format!("queue {index}: its thread panicked")),
    }
}

/// The thread: waits for rings and serves them, one after the other. What a ring needs (an io_uring, buffers)
/// is there only while it runs, so that a queue that no driver uses costs nothing.
fn serve_rings(
    (mailbox, counters): (&Arc<Mailbox>, &Arc<Counters>),
    mut disk: Option<Arc<Disk>>,
    tuning: &Tuning,
) -> io::Result<()> {
    loop {
        let (command, reply) = mailbox.wait();
        match command {
            Command::Start(setup) => {
                let Some(disk) = &mut disk else {
                    drop(reply.send(Err(io::Error::other("another process has the volume"))));
                    continue;
                };
                let depth = depth(&setup.ring);
                let opened = disk.reactor(depth).and_then(|reactor| {
                    let queue = disk.open_queue_by(&reactor, depth)?;
                    Ok((reactor, queue))
                });
                match opened {
                    Ok(opened) => {
                        let server = Server::new((mailbox.clone(), counters.clone()), opened, *setup, tuning);
                        let _ = reply.send(Ok(None));
                        if server.run(disk)? {
                            return Ok(());
                        }
                    }
                    Err(e) => drop(reply.send(Err(e))),
                }
            }
            Command::Hold(next) => {
                disk = next;
                let _ = reply.send(Ok(None));
            }
            Command::SetCall(_)
            | Command::Sync
            | Command::GiveMemory(_)
            | Command::Halt
            | Command::GoOn
            | Command::Stop
            | Command::Resume { .. } => drop(reply.send(Ok(None))),
            Command::Prepare(_) => drop(reply.send(Err(not_paused()))),
            Command::Pause => {
                let _ = reply.send(Ok(None));
                // A ring would have had a queue.
                if let Some((next, ())) = mailbox.pause(|_| Ok(())) {
                    disk = Some(next);
                }
            }
            Command::Exit => {
                let _ = reply.send(Ok(None));
                return Ok(());
            }
        }
    }
}

fn depth(ring: &Ring) -> u16 {
    ring.size().max(MIN_DEPTH)
}

fn not_paused() -> io::Error {
    io::Error::other("the queue is not paused")
}

fn bind_to(cpu: usize) -> io::Result<()> {
    let mut set = nix::sched::CpuSet::new();
    set.set(cpu)?;
    Ok(nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set)?)
}

impl Mailbox {
    /// Signals an event descriptor of the VMM's. It may block, whatever was set when it came.
    fn signal(&self, fd: Option<&File>) {
        self.signalling.store(true, Ordering::Relaxed);
        signal(fd);
        self.signalling.store(false, Ordering::Relaxed);
    }
}

/// Signals an event descriptor. A full counter, which may make it wait until it is interrupted, means that
/// the signal is pending already.
pub(super) fn signal(fd: Option<&File>) {
    use io::ErrorKind::{Interrupted, WouldBlock};
    if let Some(mut fd) = fd
        && let Err(e) = fd.write(&1u64.to_ne_bytes())
        && ![Interrupted, WouldBlock].contains(&e.kind())
    {
        log::warn!("signalling the front-end: {e}");
    }
}
