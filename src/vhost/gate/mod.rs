//! The gate between a VMM's socket and the vhost-user crate.
//!
//! Every message passes here, one at a time: it is read whole, checked, and either answered here or handed
//! on; its answer comes back before the next is read. What is malformed or unsafe ends the connection before
//! the crate sees it. The gate assumes nothing of the VMM, and knows nothing of rings beyond their numbers.

mod channel;
mod event;
mod expected;
mod memory;
mod message;
mod state;
mod transcript;

pub use channel::{Channel, Told};
pub use transcript::Said;

use crate::base::error::attempted;
use crate::base::wait::until_readable;
use crate::vhost::boundary::{Boundary, Next};
use crate::vhost::dirty::Bitmap;
use crate::vhost::queue::inflight::{Description, Inflight};
use crate::vhost::vring::Rings;
use event::check_event;
use expected::{Expected, has_answer};
use memory::MemoryTable;
use message::{Message, invalid, no_room};
use state::Transfer;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use vhost::vhost_user::message::{FrontendReq as Req, VhostUserProtocolFeatures as Protocol};

/// VHOST_F_LOG_ALL among the virtio features: guest memory that we write is to be logged.
const LOG_ALL: u64 = 1 << 26;
/// VHOST_VRING_F_LOG among the flags of SET_VRING_ADDR: the used ring is to be logged.
const LOG_USED: u32 = 1;
/// What the gate serves by itself.
const OURS: Protocol = Protocol::INFLIGHT_SHMFD
    .union(Protocol::BACKEND_REQ)
    .union(Protocol::LOG_SHMFD)
    .union(Protocol::DEVICE_STATE);

/// The VMM's message said more or less than it may; or the socket failed.
type Result<T> = io::Result<T>;

/// Limits that the gate enforces for the device behind it.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Queues of the device.
    pub queues: u64,
    /// Most entries of a ring.
    pub queue_size: u32,
    /// Most memory regions at a time.
    pub memory_regions: u16,
}

/// One connection.
pub struct Gate {
    vmm: UnixStream,
    inner: UnixStream,
    limits: Limits,
    /// Virtio features that the crate offers.
    features: u64,
    /// Those that the VMM acknowledged, since the device was reset.
    features_acked: Option<u64>,
    /// Protocol features that we offer, and those that the VMM acknowledged.
    offered: u64,
    acked: u64,
    memory: MemoryTable,
    transfer: Transfer,
    rings: Arc<Rings>,
    channel: Arc<Channel>,
}

impl Gate {
    /// A gate between the VMM on one socket and the crate on the other. Agrees with the crate on everything
    /// it offers, so that from then on every message gets an answer. What the gate serves itself goes to
    /// `rings` and, where the VMM gives a channel to speak to it, to `channel`.
    pub fn new(
        vmm: UnixStream,
        inner: UnixStream,
        limits: Limits,
        rings: Arc<Rings>,
        channel: Arc<Channel>,
    ) -> Result<Self> {
        let memory = MemoryTable::of_at_most(limits.memory_regions.into());
        let transfer = Transfer::default();
        let mut gate = Gate {
            vmm,
            inner,
            limits,
            features: 0,
            features_acked: None,
            offered: 0,
            acked: 0,
            memory,
            transfer,
            rings,
            channel,
        };
        gate.features = gate.ask_u64(Req::GET_FEATURES)?;
        let inner = gate.ask_u64(Req::GET_PROTOCOL_FEATURES)?;
        let all = Message::request(Req::SET_PROTOCOL_FEATURES as u32, inner.to_ne_bytes().to_vec());
        accepted(&gate.forward(all)?)?;
        gate.offered = inner | OURS.bits();
        gate.features |= LOG_ALL;
        Ok(gate)
    }

    /// Passes messages until the VMM closes the connection, a message is refused, or another process has the
    /// session. Between two messages it does what was left at the `boundary`.
    pub fn run(&mut self, boundary: &Boundary) -> Result<Next> {
        loop {
            if self.wait(boundary)? == Next::Successor {
                return Ok(Next::Successor);
            }
            let Some(message) = Message::receive(&self.vmm)? else { return Ok(Next::ThisProcess) };
            let (request, wants_ack) = (message.request, message.needs_reply());
            let own_answer = Req::try_from(request).is_ok_and(has_answer);
            let ack = wants_ack && !own_answer && self.acked & Protocol::REPLY_ACK.bits() != 0;
            match self.hear(message) {
                Ok(Some(reply)) => reply.send(&self.vmm)?,
                Ok(None) if ack => Message::reply_u64(request, 0).send(&self.vmm)?,
                Ok(None) => {}
                Err(e) => {
                    if ack {
                        // It is refused in any case; whether the VMM hears why is a courtesy.
                        let _ = Message::reply_u64(request, 1).send(&self.vmm);
                    }
                    return Err(e);
                }
            }
        }
    }

    /// Waits for the VMM's next message, or its end.
    fn wait(&mut self, boundary: &Boundary) -> Result<Next> {
        loop {
            let [said, left] = until_readable([self.vmm.as_fd(), boundary.event()])?;
            if left && boundary.reach(Some(self)) == Next::Successor {
                return Ok(Next::Successor);
            }
            if said {
                return Ok(Next::ThisProcess);
            }
        }
    }

    /// Passes one message; an error says which request it was about.
    fn hear(&mut self, message: Message) -> Result<Option<Message>> {
        let name = request_name(message.request);
        self.pass(message).map_err(|e| attempted(name, e))
    }

    /// Checks one message and returns what goes back, if its kind has an answer of its own.
    fn pass(&mut self, mut message: Message) -> Result<Option<Message>> {
        if message.is_reply() {
            return Err(invalid("a reply that nobody asked for".into()));
        }
        let code = message.request;
        let Ok(request) = Req::try_from(code) else {
            return Err(invalid(format!("unknown request {code}")));
        };
        let expected = Expected::of(request).ok_or_else(|| invalid("not offered".into()))?;
        expected.check(&message, self.acked, &self.limits)?;
        match request {
            Req::GET_FEATURES => return Ok(Some(Message::reply_u64(code, self.features))),
            // A front-end that re-adds a device on its connection claims it again, and
            // gives all its memory anew.
            Req::SET_OWNER => {
                while let Some(body) = self.memory.take() {
                    accepted(&self.forward(Message::request(Req::REM_MEM_REG as u32, body))?)?;
                }
                return Ok(None);
            }
            // Deprecated. Back-ends are to ignore it; the crate would forget what was agreed.
            Req::RESET_OWNER => return Ok(None),
            Req::GET_PROTOCOL_FEATURES => return Ok(Some(Message::reply_u64(code, self.offered))),
            // The crate would answer with a number that this process may not have descriptors for.
            Req::GET_MAX_MEM_SLOTS => {
                return Ok(Some(Message::reply_u64(code, self.limits.memory_regions.into())));
            }
            Req::SET_PROTOCOL_FEATURES => {
                self.acked = subset(&message, self.offered)?;
                return Ok(None);
            }
            Req::GET_INFLIGHT_FD => return self.give_inflight(&message).map(Some),
            Req::SET_INFLIGHT_FD => {
                self.take_inflight(message)?;
                return Ok(None);
            }
            Req::SET_FEATURES => return self.set_features(message).map(|()| None),
            Req::SET_LOG_BASE => return self.set_log_base(message).map(Some),
            Req::SET_VRING_ADDR => return self.set_addresses(message).map(|()| None),
            Req::SET_BACKEND_REQ_FD => {
                let socket = message.fds.pop().ok_or_else(|| invalid("no descriptor".into()))?;
                self.channel.open(socket, self.acked & Protocol::REPLY_ACK.bits() != 0)?;
                return Ok(None);
            }
            Req::SET_DEVICE_STATE_FD => {
                let running = self.rings.any_runs();
                return Ok(Some(Message::reply_u64(code, self.transfer.begin(&mut message, running))));
            }
            Req::CHECK_DEVICE_STATE => {
                return Ok(Some(Message::reply_u64(code, self.transfer.check())));
            }
            Req::SET_MEM_TABLE => {
                self.memory.set(&message)?;
                self.check_log()?;
            }
            Req::ADD_MEM_REG => {
                self.memory.add(&message)?;
                self.check_log()?;
            }
            Req::REM_MEM_REG => {
                self.memory.remove(&message)?;
                // Old front-ends send a descriptor along, which is to be closed unused.
                message.fds.clear();
            }
            Req::SET_VRING_NUM => {
                let size = message.u32_at(4).unwrap_or(0);
                if !size.is_power_of_two() || size > self.limits.queue_size {
                    return Err(invalid(format!(
                        "{size} entries; a power of two up to {}",
                        self.limits.queue_size
                    )));
                }
            }
            Req::SET_VRING_BASE => {
                let base = message.u32_at(4).unwrap_or(0);
                if base > u32::from(u16::MAX) {
                    return Err(invalid(format!("{base} is no index of a split ring")));
                }
            }
            Req::SET_VRING_KICK | Req::SET_VRING_CALL | Req::SET_VRING_ERR => check_event(&message)?,
            Req::RESET_DEVICE => self.features_acked = None,
            _ => {}
        }
        let answer = self.forward(message)?;
        if has_answer(request) {
            return Ok(Some(answer));
        }
        accepted(&answer).map(|()| None)
    }

    /// Makes memory in which chains in flight are noted, and gives it to the front-end to keep.
    fn give_inflight(&self, message: &Message) -> Result<Message> {
        let asked = self.inflight_of(message)?;
        let given = Description::new(asked.queues, asked.queue_size);
        let mut body = given.size.to_ne_bytes().to_vec();
        body.extend(given.offset.to_ne_bytes());
        body.extend(given.queues.to_ne_bytes());
        body.extend(given.queue_size.to_ne_bytes());
        body.resize(message.body.len(), 0);
        let fds = vec![given.create()?];
        Ok(Message { fds, ..Message::reply(message.request, body) })
    }

    /// Takes such memory back, perhaps from a session with a process that is dead.
    fn take_inflight(&self, mut message: Message) -> Result<()> {
        let description = self.inflight_of(&message)?;
        match message.fds.pop() {
            Some(fd) => self.rings.set_inflight(Inflight::map(description, fd)?),
            None => return Err(invalid("no descriptor".into())),
        }
        Ok(())
    }

    /// The crate never hears of logging: it would not stop it again, nor log what is added later.
    fn set_features(&mut self, mut message: Message) -> Result<()> {
        let features = subset(&message, self.features)?;
        message.body = (features & !LOG_ALL).to_ne_bytes().to_vec();
        accepted(&self.forward(message)?)?;
        self.features_acked = Some(features);
        self.rings.log().set_wanted(features & LOG_ALL != 0);
        self.rings.settle()
    }

    /// Takes the bitmap of pages that we write. The answer has the message's own body.
    fn set_log_base(&self, mut message: Message) -> Result<Message> {
        let (Some(size), Some(offset)) = (message.u64_at(0), message.u64_at(8)) else {
            return Err(invalid("cut short".into()));
        };
        let fd = message.fds.pop().ok_or_else(|| invalid("no descriptor".into()))?;
        let bitmap = Bitmap::map(fd, offset, size)?;
        if !bitmap.covers(self.memory.end()) {
            return Err(invalid(format!("the log of {size} bytes does not cover all memory")));
        }
        self.rings.log().set_bitmap(bitmap);
        self.rings.settle()?;
        Ok(Message::reply(message.request, message.body))
    }

    /// Every address of the guest's must have its bit.
    fn check_log(&self) -> Result<()> {
        if self.rings.log().covers(self.memory.end()) {
            return Ok(());
        }
        Err(invalid("the dirty log does not cover this memory".into()))
    }

    /// The addresses of a ring, and whether and where its used ring is logged.
    fn set_addresses(&mut self, message: Message) -> Result<()> {
        let (Some(queue), Some(flags), Some(log)) =
            (message.u32_at(0), message.u32_at(4), message.u64_at(32))
        else {
            return Err(invalid("cut short".into()));
        };
        if flags & !LOG_USED != 0 {
            return Err(invalid(format!("flags {flags:#x}")));
        }
        let logged = (flags & LOG_USED != 0).then_some(log);
        if logged.is_some_and(|log| log >= self.memory.end()) {
            return Err(invalid(format!("the used ring's log address {log:#x} is not in guest memory")));
        }
        accepted(&self.forward(message)?)?;
        self.rings.log_used(queue as usize, logged);
        self.rings.settle()
    }

    fn inflight_of(&self, message: &Message) -> Result<Description> {
        // Some have the structure with padding at its end, some without.
        if ![20, 24].contains(&message.body.len()) {
            return Err(invalid(format!("a body of {} bytes", message.body.len())));
        }
        let word = message.u32_at(16).unwrap_or(0);
        let (queues, queue_size) = if cfg!(target_endian = "little") {
            (word as u16, (word >> 16) as u16)
        } else {
            ((word >> 16) as u16, word as u16)
        };
        let (Some(size), Some(offset)) = (message.u64_at(0), message.u64_at(8)) else {
            return Err(invalid("cut short".into()));
        };
        let fits = u64::from(queues) <= self.limits.queues && u32::from(queue_size) <= self.limits.queue_size;
        if queues == 0 || !queue_size.is_power_of_two() || !fits {
            return Err(invalid(format!("{queues} queues of {queue_size} entries")));
        }
        Ok(Description { size, offset, queues, queue_size })
    }

    /// Hands a message to the crate and waits for its answer.
    ///
    /// A crate that finds no room for the descriptors of a message passes over it without a word, and waits
    /// for the next one. So a question follows such a message at once: then there is always something that
    /// the crate answers, or cannot make sense of and ends at, and nobody waits for ever.
    fn forward(&mut self, message: Message) -> Result<Message> {
        let request = message.request;
        let has_fds = !message.fds.is_empty();
        if has_fds {
            check_room_for(&message.fds)?;
        }
        // Its descriptors are closed here: the crate has got its own, or will find out that it cannot.
        message.with_need_reply().send(&self.inner)?;
        if has_fds {
            Message::request(QUESTION, Vec::new()).send(&self.inner)?;
        }
        let answer = self.hear_crate()?;
        match &answer {
            Some(first) if has_fds && first.answers(QUESTION) => return Err(no_room()),
            Some(_) if has_fds => drop(self.hear_crate()?),
            _ => {}
        }
        // The crate cannot report that a ring which was to start has not started, so our own rings are asked.
        self.rings.check()?;
        match answer {
            Some(answer) if answer.answers(request) => Ok(answer),
            Some(answer) => Err(invalid(format!("answered by {}", request_name(answer.request)))),
            None => Err(invalid("refused".into())),
        }
    }

    /// The next that the crate says; `None` if it has ended, with or without having read everything.
    fn hear_crate(&self) -> Result<Option<Message>> {
        match Message::receive(&self.inner) {
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => Ok(None),
            heard => heard,
        }
    }

    fn ask_u64(&mut self, request: Req) -> Result<u64> {
        let answer = self.forward(Message::request(request as u32, Vec::new()))?;
        answer.u64_at(0).ok_or_else(|| invalid(format!("{}: short answer", request_name(request as u32))))
    }
}

/// What the crate is asked behind a message with descriptors. It changes nothing.
const QUESTION: u32 = Req::GET_FEATURES as u32;

/// Whether the crate will find room for copies of these descriptors, as far as that is known before.
fn check_room_for(fds: &[OwnedFd]) -> Result<()> {
    let copies = fds.iter().map(OwnedFd::try_clone).collect::<Result<Vec<_>>>();
    copies.map(drop).map_err(|_| no_room())
}

/// Whether an acknowledgement says yes.
fn accepted(answer: &Message) -> Result<()> {
    match answer.u64_at(0) {
        Some(0) => Ok(()),
        _ => Err(invalid("refused".into())),
    }
}

/// The message's features, if all of them were offered.
fn subset(message: &Message, offered: u64) -> Result<u64> {
    let features = message.u64_at(0).unwrap_or(u64::MAX);
    if features & !offered == 0 {
        return Ok(features);
    }
    Err(invalid(format!("features {:#x} were not offered", features & !offered)))
}

fn request_name(request: u32) -> String {
    Req::try_from(request).map_or_else(|_| format!("request {request}"), |r| format!("{r:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhost::tenure::{Serving, Tenure};
    use nix::sys::eventfd::EventFd;

    #[test]
    fn features_are_a_part_of_what_was_offered() {
        let features = |word: u64| subset(&Message::request(2, word.to_ne_bytes().to_vec()), 0b1010);
        assert_eq!(features(0b1000).unwrap(), 0b1000);
        assert_eq!(features(0).unwrap(), 0);
        assert!(features(0b1).is_err() && features(u64::MAX).is_err());
        assert!(subset(&Message::request(2, vec![0; 7]), u64::MAX - 1).is_err());
    }

    /// No ring runs here.
    struct Nobody;

    impl Tenure for Nobody {
        fn claim(&self) -> io::Result<Arc<Serving>> {
            Err(io::ErrorKind::Unsupported.into())
        }

        fn serving(&self) -> Option<Arc<Serving>> {
            None
        }

        fn rest(&self) {}

        fn guest_chose(&self, _write_through: bool) {}

        fn vmm_came(&self) {}

        fn vmm_left(&self) -> bool {
            false
        }
    }

    /// As the crate: it answers everything, but passes over messages whose descriptors it has no room for.
    fn crate_without_room(socket: &UnixStream) {
        while let Ok(Some(message)) = Message::receive(socket) {
            if message.fds.is_empty() {
                Message::reply_u64(message.request, 0).send(socket).unwrap();
            }
        }
    }

    #[test]
    fn a_message_that_the_crate_passes_over_ends_the_session() {
        let ((vmm, ours), (inner, crates)) = (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
        let limits = Limits { queues: 1, queue_size: 64, memory_regions: 8 };
        let rings = Rings::new(Arc::new(Nobody), 1, Arc::default());
        let ended = std::thread::scope(|scope| {
            scope.spawn(|| crate_without_room(&crates));
            let mut call = Message::request(Req::SET_VRING_CALL as u32, 0u64.to_ne_bytes().to_vec());
            call.fds.push(EventFd::new().unwrap().into());
            call.send(&vmm).unwrap();
            let ended = Gate::new(ours, inner, limits, rings, Arc::default())
                .and_then(|mut gate| gate.run(&Boundary::new().unwrap()));
            crates.shutdown(std::net::Shutdown::Both).unwrap();
            ended
        });
        let said = ended.unwrap_err().to_string();
        assert!(said.contains("SET_VRING_CALL: this process has no room for more descriptors"), "{said}");
    }
}
