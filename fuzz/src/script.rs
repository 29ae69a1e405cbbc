//! What a VMM may send: messages of a right shape and of none, with descriptors that
//! belong to them or do not.

use super::input::Input;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;
use std::io::{self, ErrorKind, PipeReader, PipeWriter, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use vmm_sys_util::eventfd::{EFD_SEMAPHORE, EventFd};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Bytes in the memory file that the VMM gives.
const MEMORY: u64 = 0x10_000;
const PAGE: u64 = 0x1000;
/// Most messages of one connection: their number is not what breaks anything.
const MESSAGES: usize = 40;

/// Sends the whole script and closes the sending side, then our descriptors. Answers the number of messages.
pub fn send_all(socket: &UnixStream, input: &mut Input, files: Files) -> usize {
    socket.set_nonblocking(true).expect("a socket");
    let sent = (0..MESSAGES).take_while(|_| !input.is_empty() && send(socket, input, &files)).count();
    socket.set_nonblocking(false).expect("a socket");
    socket.shutdown(Shutdown::Write).expect("connected");
    sent
}

/// What a VMM may send along. Every file but the memory is shared by all messages of a run.
pub struct Files {
    memory: File,
    event: EventFd,
    pipe: PipeWriter,
    plain: File,
}

/// Tells whether every copy of the pipe's writing end is closed.
pub struct Closed(PipeReader);

impl Closed {
    /// Whether it is so.
    pub fn all(mut self) -> bool {
        matches!(self.0.read(&mut [0]), Ok(0))
    }
}

impl Files {
    /// A memory file with `image` at its beginning, and one of each other kind.
    pub fn new(image: &[u8]) -> (Self, Closed) {
        let memory = memfd_create(c"guest", MFdFlags::MFD_ALLOW_SEALING).expect("a memory file");
        let memory = File::from(memory);
        memory.set_len(MEMORY).expect("room");
        memory.write_all_at(image, 0).expect("room");
        let (reader, pipe) = io::pipe().expect("a pipe");
        fcntl(&reader, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).expect("a pipe");
        let event = EventFd::new(EFD_SEMAPHORE).expect("an event descriptor");
        let plain = File::open("/dev/null").expect("/dev/null");
        (Files { memory, event, pipe, plain }, Closed(reader))
    }

    /// As many as `count` of a kind, the last one of another where `kind` says so.
    fn some(&self, kind: u8, count: usize) -> Vec<RawFd> {
        let all =
            [self.memory.as_raw_fd(), self.event.as_raw_fd(), self.pipe.as_raw_fd(), self.plain.as_raw_fd()];
        let mut fds = vec![all[usize::from(kind & 3)]; count];
        if let Some(last) = fds.last_mut().filter(|_| kind & 4 != 0) {
            *last = all[usize::from(kind >> 3 & 3)];
        }
        fds
    }
}

/// Sends one message, most often one of a right shape. Answers whether there was room for it.
fn send(socket: &UnixStream, input: &mut Input, files: &Files) -> bool {
    let shape = input.u8();
    let flags = if shape & 0x80 == 0 { 1 } else { 9 };
    let (bytes, fds) = match shape & 7 {
        0 => {
            let fds = files.some(input.u8(), usize::from(input.u8()));
            let len = usize::from(input.u8());
            (input.bytes(len).to_vec(), fds)
        }
        1 | 2 => {
            let (request, fds) = (u32::from(input.u8()), files.some(input.u8(), usize::from(input.u8() % 3)));
            let len = usize::from(input.u8());
            (message(request, flags, input.bytes(len)), fds)
        }
        3 => {
            let count = input.u8() % 9;
            let mut body = [u32::from(count).to_ne_bytes(), [0; 4]].concat();
            (0..count).for_each(|_| body.extend(region(input)));
            (message(5, flags, &body), files.some(input.u8() & !3, usize::from(count ^ (shape >> 3 & 1))))
        }
        4 => {
            let body = [vec![0; 8], region(input)].concat();
            let request = if shape & 0x40 == 0 { 37 } else { 38 };
            (message(request, flags, &body), files.some(input.u8() & !3, 1))
        }
        5 => {
            let request = [8, 10, 11, 18][usize::from(shape >> 3 & 3)];
            let words = [u32::from(input.u8()), input.u32()].map(u32::to_ne_bytes);
            (message(request, flags, words.as_flattened()), vec![])
        }
        6 => {
            let request = 12 + u32::from(shape >> 3 & 3) % 3;
            let (word, kind) = (u64::from(input.u16()), input.u8());
            (
                message(request, flags, &word.to_ne_bytes()),
                files.some(kind ^ 1, usize::from(word & 0x100 == 0)),
            )
        }
        _ if shape & 0x10 == 0 => {
            let request = if shape & 8 == 0 { 2 } else { 16 };
            (message(request, flags, &input.u64().to_ne_bytes()), vec![])
        }
        _ if shape & 0x20 != 0 => {
            // The in-flight region: its size, its place in the memory file, its queues and their entries.
            let mut body = u64::from(input.u16()).to_ne_bytes().to_vec();
            body.extend((u64::from(input.u8()) * PAGE).to_ne_bytes());
            body.extend(u16::from(input.u8()).to_ne_bytes());
            body.extend(input.u16().to_ne_bytes());
            let (request, fds) = if shape & 8 == 0 { (31, 0) } else { (32, 1) };
            (message(request, flags, &body), files.some(input.u8() & !3, fds))
        }
        _ => {
            // Descriptor table, used ring, available ring, in units of 64 bytes.
            let queue = [u32::from(input.u8()), 0].map(u32::to_ne_bytes);
            let places: [u64; 3] = std::array::from_fn(|_| u64::from(input.u16()) * 64);
            let words = places.into_iter().chain([0]).flat_map(u64::to_ne_bytes);
            let body: Vec<u8> = queue.as_flattened().iter().copied().chain(words).collect();
            (message(9, flags, &body), vec![])
        }
    };
    let sent = if fds.is_empty() {
        (&*socket).write(&bytes).map_err(|e| e.kind())
    } else {
        socket.send_with_fds(&[&bytes[..]], &fds).map_err(|e| io::Error::from(e).kind())
    };
    match sent {
        Ok(n) => n == bytes.len(),
        // Too many descriptors for the kernel are sent by nobody.
        Err(ErrorKind::InvalidInput) => true,
        Err(_) => false,
    }
}

/// A memory region, its numbers small and round, or anything.
fn region(input: &mut Input) -> Vec<u8> {
    let kind = input.u8();
    let mut number = |wild: u8| {
        if kind & wild == 0 { u64::from(input.u8()) * PAGE } else { input.u64() }
    };
    [number(1), number(2), number(4), number(8)].map(u64::to_ne_bytes).concat()
}

fn message(request: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let header = [request, flags, body.len() as u32].map(u32::to_ne_bytes);
    [header.as_flattened(), body].concat()
}

/// Reads what came back: whole answers and nothing else. Answers how many.
pub fn answers(socket: &UnixStream) -> usize {
    let mut all = Vec::new();
    match (&*socket).read_to_end(&mut all) {
        Ok(_) => {}
        // The gate left with messages unread.
        Err(e) => assert_eq!(e.kind(), ErrorKind::ConnectionReset),
    }
    let (mut rest, mut count) = (&all[..], 0);
    while let Some((header, behind)) = rest.split_first_chunk::<12>() {
        let word = |i: usize| u32::from_ne_bytes(header[4 * i..4 * i + 4].try_into().expect("4 bytes"));
        assert_eq!(word(1), 1 | 4, "version and reply");
        rest = behind.get(word(2) as usize..).expect("a whole answer");
        count += 1;
    }
    assert!(rest.is_empty());
    count
}
