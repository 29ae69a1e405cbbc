//! The server of an image: the child of a keeper that has librbd, and answers one connection by NBD.
//!
//! It begins after the handshake: what would be agreed on is known, and goes by the keeper. Requests are
//! handed to librbd as they come, and answered in the order in which they end. They come from the host
//! process, which a guest may have broken into: each is held against the image's size before anything is made
//! of it, and what is under way has a bound.
//!
//! The process ends at once, and answers nothing any more, when the image's lock is not its own: Ceph says so
//! of an operation, or when it is asked, which is every second. It ends in peace when whoever asks takes
//! leave: then the tenure is taken away and the lock released, before the connection is closed. Where another
//! process goes on, the tenure stays, without a client. If the other side is only gone, the tenure stays as
//! it is.

use super::image::{Ends, Image, Operation};
use super::tenure::{self, Tenure};
use crate::backing::nbd::protocol::*;
use crate::base::sync::Locked;
use std::collections::VecDeque;
use std::io::{self, BufReader, ErrorKind, IoSlice, Read, Write};
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Requests under way at most: as many as the engine has, and one for each that is a flush after a write.
const UNDER_WAY_MAX: usize = 512;
/// Bytes of a request that brings or wants some.
const PAYLOAD_MAX: u32 = 4 << 20;
/// Answers that are sent at once.
const AT_ONCE: usize = 32;
/// How often Ceph is asked whether the lock is ours.
const LOOK: Duration = Duration::from_secs(1);
/// How long it may be unknown whether the lock is ours. No operation waits as long.
const UNKNOWN_MAX: Duration = Duration::from_secs(600);

/// How the process ends.
#[derive(Clone, Copy)]
enum Exit {
    Well = 0,
    Broken = 1,
    /// The lock is another's.
    Lost = 3,
}

/// Ends the process, at once: nothing is answered any more.
fn exit(how: Exit) -> ! {
    // SAFETY: it runs nothing of this process; what librbd has under way is Ceph's to refuse.
    unsafe { libc::_exit(how as i32) }
}

/// What all threads have.
struct Shared {
    image: Image,
    answers: Sender<Answer>,
    under_way: Mutex<usize>,
    is_over: Condvar,
}

/// What goes back for a request.
struct Answer {
    head: Vec<u8>,
    bytes: Vec<u8>,
}

/// A request under way.
struct Request {
    shared: Arc<Shared>,
    cookie: u64,
    kind: Kind,
    offset: u64,
    bytes: Vec<u8>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    /// Nothing comes back, once a flush has followed, if one is to.
    Plain {
        then_flush: bool,
    },
}

/// A request's head.
struct Head {
    flags: u16,
    kind: u16,
    cookie: u64,
    bytes: Range<u64>,
    len: u32,
}

/// How the other side has taken leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leave {
    /// It is only gone.
    Gone,
    InPeace,
    /// Another process goes on.
    Lending,
}

/// Serves the image to `socket`, to the end of the process; for writing, under this tenure.
pub(super) fn serve(image: Image, socket: UnixStream, tenure: Option<Tenure>) -> ! {
    let writes = tenure.is_some();
    let (answers, from) = channel();
    let shared = Arc::new(Shared { image, answers, under_way: Mutex::new(0), is_over: Condvar::new() });
    let begun = socket.try_clone().and_then(|socket| {
        thread("answers", move || send(&socket, &from))?;
        if writes {
            let shared = shared.clone();
            thread("lock", move || watch(&shared.image))?;
        }
        let (maps, asked) = channel();
        let of_maps = shared.clone();
        thread("maps", move || tell_maps(&of_maps, &asked))?;
        Ok(maps)
    });
    let Ok(maps) = begun else { exit(Exit::Broken) };
    let leave = take(&shared, &socket, &maps, writes).unwrap_or(Leave::Gone);
    shared.drain();
    if let Some(tenure) = tenure {
        match leave {
            Leave::InPeace => tenure::leave(&shared.image),
            Leave::Lending => tenure::lend(&shared.image, tenure),
            Leave::Gone => drop(shared.image.unlock()),
        }
    }
    shared.image.close();
    exit(if leave == Leave::Gone { Exit::Broken } else { Exit::Well })
}

fn thread(name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new().name(name.into()).spawn(run).map(drop)
}

/// Takes requests until there are no more. Returns how the other side has taken leave.
fn take(shared: &Arc<Shared>, socket: &UnixStream, maps: &Sender<Head>, writes: bool) -> io::Result<Leave> {
    let mut from = BufReader::with_capacity(256 << 10, socket);
    loop {
        let head = Head::read(&mut from)?;
        if head.kind == CMD_DISC {
            return Ok(if head.flags & FLAG_LEND == 0 { Leave::InPeace } else { Leave::Lending });
        }
        let mut bytes = Vec::new();
        if head.kind == CMD_WRITE {
            if head.len > PAYLOAD_MAX {
                return Err(ErrorKind::InvalidData.into());
            }
            bytes.resize(head.len as usize, 0);
            from.read_exact(&mut bytes)?;
        }
        shared.wait_for_room();
        if let Err(error) = head.check(shared.image.size(), writes) {
            shared.refuse(head.cookie, error);
            continue;
        }
        if head.kind == CMD_BLOCK_STATUS {
            maps.send(head).map_err(|_| ErrorKind::BrokenPipe)?;
            continue;
        }
        begin(shared, &head, bytes);
    }
}

/// Hands a request to librbd.
fn begin(shared: &Arc<Shared>, head: &Head, mut bytes: Vec<u8>) {
    let offset = head.bytes.start;
    let then_flush = head.flags & FLAG_FUA != 0;
    let (kind, operation) = match head.kind {
        CMD_READ => {
            bytes.resize(head.len as usize, 0);
            (Kind::Read, Operation::Read { offset })
        }
        CMD_WRITE => (Kind::Plain { then_flush }, Operation::Write { offset }),
        CMD_WRITE_ZEROES => {
            let keep_space = head.flags & FLAG_NO_HOLE != 0;
            (Kind::Plain { then_flush }, Operation::Zero { offset, len: head.len.into(), keep_space })
        }
        // Others were refused.
        _ => (Kind::Plain { then_flush: false }, Operation::Flush),
    };
    let request = Request { shared: shared.clone(), cookie: head.cookie, kind, offset, bytes };
    shared.image.begin(operation, Box::new(request));
}

impl Head {
    fn read(from: &mut impl Read) -> io::Result<Head> {
        let mut head = [0; REQUEST_LEN];
        from.read_exact(&mut head)?;
        let word = |at: usize| u32::from_be_bytes(std::array::from_fn(|n| head[at + n]));
        let long = |at: usize| u64::from(word(at)) << 32 | u64::from(word(at + 4));
        if word(0) != REQUEST {
            return Err(ErrorKind::InvalidData.into());
        }
        let (offset, len) = (long(16), word(24));
        let bytes = offset..offset.saturating_add(len.into());
        Ok(Head { flags: (word(4) >> 16) as u16, kind: word(4) as u16, cookie: long(8), bytes, len })
    }

    /// # Errors
    /// The number of the error, for a request that is not done.
    fn check(&self, size: u64, writes: bool) -> Result<(), u32> {
        let is_inside = self.len > 0
            && self.bytes.end <= size
            && self.bytes.end - self.bytes.start == u64::from(self.len);
        match self.kind {
            CMD_FLUSH => Ok(()),
            CMD_WRITE | CMD_WRITE_ZEROES if !writes => Err(EPERM),
            CMD_READ | CMD_WRITE if self.len > PAYLOAD_MAX => Err(EINVAL),
            CMD_READ | CMD_WRITE | CMD_WRITE_ZEROES | CMD_BLOCK_STATUS if is_inside => Ok(()),
            _ => Err(EINVAL),
        }
    }
}

impl Shared {
    fn count(&self) -> std::sync::MutexGuard<'_, usize> {
        self.under_way.locked()
    }

    fn wait_for_room(&self) {
        let count = self.is_over.wait_while(self.count(), |count| *count >= UNDER_WAY_MAX);
        *count.unwrap_or_else(PoisonError::into_inner) += 1;
    }

    /// Waits until nothing is under way. Each operation has an end, at the latest when its time is over.
    fn drain(&self) {
        drop(self.is_over.wait_while(self.count(), |count| *count > 0));
    }

    fn answer(&self, answer: Answer) {
        // Where nobody sends any more, the process is about to end.
        let _ = self.answers.send(answer);
        *self.count() -= 1;
        self.is_over.notify_all();
    }

    fn refuse(&self, cookie: u64, error: u32) {
        self.answer(Answer { head: simple(cookie, error), bytes: Vec::new() });
    }
}

impl Ends for Request {
    fn ended(mut self: Box<Self>, result: i64) {
        let (cookie, shared) = (self.cookie, self.shared.clone());
        if result < 0 {
            return shared.refuse(cookie, error_of(result));
        }
        match self.kind {
            Kind::Plain { then_flush: true } => {
                self.kind = Kind::Plain { then_flush: false };
                shared.image.begin(Operation::Flush, self);
            }
            Kind::Plain { .. } => shared.refuse(cookie, 0),
            Kind::Read => {
                let head = chunk(CHUNK_OFFSET_DATA, cookie, 8 + self.bytes.len(), &self.offset.to_be_bytes());
                shared.answer(Answer { head, bytes: std::mem::take(&mut self.bytes) });
            }
        }
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

/// The number of the protocol for an error of Ceph's. Ends the process where the lock is another's.
fn error_of(result: i64) -> u32 {
    match i32::try_from(-result).unwrap_or(libc::EIO) {
        // On the blocklist; without the lock.
        libc::ESHUTDOWN | libc::EROFS => exit(Exit::Lost),
        libc::ENOSPC | libc::EDQUOT => ENOSPC,
        libc::ETIMEDOUT => ETIMEDOUT,
        _ => EIO,
    }
}

/// Looks whether the lock is ours.
fn watch(image: &Image) {
    let mut known = Instant::now();
    loop {
        std::thread::sleep(LOOK);
        match image.has_lock() {
            Ok(true) => known = Instant::now(),
            Ok(false) => exit(Exit::Lost),
            Err(e) if matches!(e.raw_os_error(), Some(libc::ESHUTDOWN | libc::EROFS)) => exit(Exit::Lost),
            Err(_) if known.elapsed() < UNKNOWN_MAX => {}
            Err(_) => exit(Exit::Broken),
        }
    }
}

/// Answers questions where something may be: one at a time, since librbd does it so.
fn tell_maps(shared: &Shared, asked: &Receiver<Head>) {
    for head in asked {
        match shared.image.runs(head.bytes.clone()) {
            Ok(runs) => {
                let mut body = IMAGE_MAP.to_be_bytes().to_vec();
                for (len, state) in map_of(&head.bytes, &runs) {
                    body.extend(len.to_be_bytes());
                    body.extend(state.to_be_bytes());
                }
                let head = chunk(CHUNK_BLOCK_STATUS, head.cookie, body.len(), &[]);
                shared.answer(Answer { head, bytes: body });
            }
            Err(e) => shared.refuse(head.cookie, error_of(-i64::from(e.raw_os_error().unwrap_or(libc::EIO)))),
        }
    }
}

/// The lengths of runs that make up `bytes`, and whether each is zeros.
fn map_of(bytes: &Range<u64>, runs: &[Range<u64>]) -> Vec<(u32, u32)> {
    let (mut at, mut map) = (bytes.start, Vec::new());
    // At most as long as what was asked about.
    let mut push = |len: u64, state| {
        if len > 0 {
            map.push((len as u32, state))
        }
    };
    for run in runs {
        let (start, end) = (run.start.clamp(at, bytes.end), run.end.clamp(at, bytes.end));
        push(start - at, STATE_ZERO);
        push(end - start, 0);
        at = end;
    }
    push(bytes.end - at, STATE_ZERO);
    map
}

fn simple(cookie: u64, error: u32) -> Vec<u8> {
    let mut head = SIMPLE_REPLY.to_be_bytes().to_vec();
    head.extend(error.to_be_bytes());
    head.extend(cookie.to_be_bytes());
    head
}

/// The head of a chunk of `len` bytes that is all of a reply, and what of it comes first.
fn chunk(kind: u16, cookie: u64, len: usize, first: &[u8]) -> Vec<u8> {
    let mut head = STRUCTURED_REPLY.to_be_bytes().to_vec();
    head.extend(CHUNK_DONE.to_be_bytes());
    head.extend(kind.to_be_bytes());
    head.extend(cookie.to_be_bytes());
    head.extend((len as u32).to_be_bytes());
    head.extend(first);
    head
}

/// Sends answers as they come.
fn send(mut socket: &UnixStream, answers: &Receiver<Answer>) {
    let mut ready = VecDeque::new();
    while let Ok(first) = answers.recv() {
        ready.push_back(first);
        ready.extend(answers.try_iter().take(AT_ONCE - 1));
        let parts = ready.iter().flat_map(|answer| [&answer.head[..], &answer.bytes]);
        let mut parts: Vec<IoSlice<'_>> = parts.filter(|part| !part.is_empty()).map(IoSlice::new).collect();
        let mut parts = &mut parts[..];
        while !parts.is_empty() {
            match socket.write_vectored(parts) {
                Ok(count) => IoSlice::advance_slices(&mut parts, count),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                // Whoever asked is gone, which the other thread sees as well.
                Err(_) => return,
            }
        }
        ready.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_outside_of_the_runs_is_zeros() {
        assert_eq!(map_of(&(10..20), &[]), [(10, STATE_ZERO)]);
        assert_eq!(map_of(&(10..20), &[5..15, 15..25]), [(5, 0), (5, 0)]);
        assert_eq!(map_of(&(10..20), &[0..12, 14..30]), [(2, 0), (2, STATE_ZERO), (6, 0)]);
        // Whatever is told, the lengths are those of what was asked about.
        assert_eq!(map_of(&(10..20), &[15..17, 12..16, 40..50]), [(5, STATE_ZERO), (2, 0), (3, STATE_ZERO)]);
    }

    #[test]
    fn requests_are_held_against_the_image() {
        let head = |kind, offset, len| Head::read(&mut &request(0, kind, 7, offset, len)[..]).unwrap();
        let check = |kind, offset, len| head(kind, offset, len).check(1 << 20, true);
        assert_eq!(head(CMD_READ, 5, 6).cookie, 7);
        assert_eq!(check(CMD_READ, (1 << 20) - 512, 512), Ok(()));
        assert_eq!(check(CMD_READ, (1 << 20) - 511, 512), Err(EINVAL));
        assert_eq!(check(CMD_READ, u64::MAX, 512), Err(EINVAL));
        assert_eq!(check(CMD_WRITE_ZEROES, 0, 0), Err(EINVAL));
        assert_eq!(check(CMD_FLUSH, 0, 0), Ok(()));
        assert_eq!(check(4, 0, 512), Err(EINVAL));
        assert_eq!(head(CMD_WRITE, 0, 512).check(1 << 20, false), Err(EPERM));
        assert_eq!(head(CMD_READ, 0, PAYLOAD_MAX + 1).check(u64::MAX, true), Err(EINVAL));
        let mut strange = request(0, CMD_READ, 7, 0, 512);
        strange[0] = 0;
        assert!(Head::read(&mut &strange[..]).is_err());
    }
}
