//! An NBD server of the test's own. When it is killed it loses what was not flushed, as a machine does whose
//! power is cut; and it lies if it is told to.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use tempfile::TempDir;

pub const READ: u16 = 0;
pub const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
pub const FLUSH: u16 = 3;
const WRITE_ZEROES: u16 = 6;

const SIMPLE: u32 = 0x6744_6698;
const STRUCTURED: u32 = 0x668e_33ef;

/// A request as it came.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    pub kind: u16,
    pub cookie: u64,
    pub offset: u64,
    pub len: u32,
}

/// What is sent in place of the answer to a request, if it is one that this is about; nothing closes the
/// connection.
pub type Lie = Box<dyn FnMut(&Request) -> Option<Vec<u8>> + Send>;

struct State {
    durable: Vec<u8>,
    now: Vec<u8>,
    connections: Vec<UnixStream>,
    lie: Option<Lie>,
    structured: bool,
}

pub struct Fake {
    folder: TempDir,
    state: Arc<Mutex<State>>,
    listens: Mutex<Option<(UnixListener, JoinHandle<()>)>>,
}

impl Fake {
    /// One that serves zeros, with structured replies if that is said.
    pub fn zeros(len: usize, structured: bool) -> Self {
        let (durable, now) = (vec![0; len], vec![0; len]);
        let state = State { durable, now, connections: Vec::new(), lie: None, structured };
        let folder = tempfile::tempdir().expect("make a temporary folder");
        let fake = Fake { folder, state: Arc::new(Mutex::new(state)), listens: Mutex::new(None) };
        fake.start();
        fake
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("nbd.sock")
    }

    pub fn address(&self) -> String {
        format!("unix:{}", self.socket().display())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }

    /// What would be there after a cut of the power.
    pub fn durable(&self) -> Vec<u8> {
        self.state().durable.clone()
    }

    /// From now on, it lies.
    pub fn lies(&self, lie: impl FnMut(&Request) -> Option<Vec<u8>> + Send + 'static) {
        self.state().lie = Some(Box::new(lie));
    }

    /// It is honest again.
    pub fn is_honest(&self) {
        self.state().lie = None;
    }

    /// Starts it again.
    pub fn start(&self) {
        let listener = UnixListener::bind(self.socket()).expect("bind the server's socket");
        let (accepts, state) = (listener.try_clone().expect("dup"), self.state.clone());
        let accept = move || {
            while let Ok((connection, _)) = accepts.accept() {
                let state = state.clone();
                locked(&state).connections.push(connection.try_clone().expect("dup"));
                // It ends with its connection.
                std::thread::spawn(move || drop(serve(connection, &state)));
            }
        };
        *self.listens.lock().unwrap() = Some((listener, std::thread::spawn(accept)));
    }

    /// It is gone, and what was not flushed with it.
    pub fn crash(&self) {
        self.stop();
        let mut state = self.state();
        state.now = state.durable.clone();
    }

    fn stop(&self) {
        let Some((listener, thread)) = self.listens.lock().unwrap().take() else { return };
        std::fs::remove_file(self.socket()).expect("remove the socket");
        // SAFETY: the descriptor is open as long as the listener, which lives.
        unsafe { libc::shutdown(listener.as_raw_fd(), libc::SHUT_RDWR) };
        thread.join().expect("it accepts nobody any more");
        for connection in std::mem::take(&mut self.state().connections) {
            let _ = connection.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.stop();
    }
}

fn locked(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn serve(mut socket: UnixStream, state: &Mutex<State>) -> io::Result<()> {
    if !agree(&mut socket, state)? {
        return Ok(());
    }
    loop {
        let head: [u8; 28] = take(&mut socket)?;
        let request = Request {
            kind: u16::from_be_bytes([head[6], head[7]]),
            cookie: u64::from_be_bytes(head[8..16].try_into().unwrap()),
            offset: u64::from_be_bytes(head[16..24].try_into().unwrap()),
            len: u32::from_be_bytes(head[24..].try_into().unwrap()),
        };
        let mut payload = vec![0; if request.kind == WRITE { request.len as usize } else { 0 }];
        socket.read_exact(&mut payload)?;
        if request.kind == DISCONNECT {
            return Ok(());
        }
        // Nothing is answered after a crash that was done before it.
        let mut state = locked(state);
        if !state.connections.iter().any(|it| it.peer_addr().is_ok() && is_same(it, &socket)) {
            return Ok(());
        }
        let lie = state.lie.as_mut().and_then(|lie| lie(&request));
        let answer = match lie {
            Some(lie) => lie,
            None => state.answer(&request, &payload),
        };
        if answer.is_empty() {
            return socket.shutdown(Shutdown::Both);
        }
        socket.write_all(&answer)?;
    }
}

/// Whether both are the same connection: those that a crash has ended are not in the list.
fn is_same(one: &UnixStream, other: &UnixStream) -> bool {
    let number = |it: &UnixStream| std::fs::read_link(format!("/proc/self/fd/{}", it.as_raw_fd())).ok();
    number(one) == number(other)
}

impl State {
    fn answer(&mut self, request: &Request, payload: &[u8]) -> Vec<u8> {
        let range = request.offset as usize..request.offset as usize + request.len as usize;
        match request.kind {
            READ => {
                let bytes = self.now[range].to_vec();
                match self.structured {
                    true => data(request.cookie, request.offset, &bytes),
                    false => [simple(0, request.cookie), bytes].concat(),
                }
            }
            WRITE => {
                self.now[range].copy_from_slice(payload);
                simple(0, request.cookie)
            }
            WRITE_ZEROES => {
                self.now[range].fill(0);
                simple(0, request.cookie)
            }
            FLUSH => {
                self.durable.clone_from(&self.now);
                simple(0, request.cookie)
            }
            // EINVAL
            _ => simple(22, request.cookie),
        }
    }
}

/// A simple reply.
pub fn simple(error: u32, cookie: u64) -> Vec<u8> {
    [&SIMPLE.to_be_bytes()[..], &error.to_be_bytes(), &cookie.to_be_bytes()].concat()
}

/// A chunk of a structured reply.
pub fn chunk(flags: u16, kind: u16, cookie: u64, body: &[u8]) -> Vec<u8> {
    let head =
        [&STRUCTURED.to_be_bytes()[..], &flags.to_be_bytes(), &kind.to_be_bytes(), &cookie.to_be_bytes()];
    [&head.concat()[..], &(body.len() as u32).to_be_bytes(), body].concat()
}

/// All bytes of a read.
pub fn data(cookie: u64, offset: u64, bytes: &[u8]) -> Vec<u8> {
    chunk(1, 1, cookie, &[&offset.to_be_bytes()[..], bytes].concat())
}

/// Answers options until the export is served; no if the client goes.
fn agree(socket: &mut UnixStream, state: &Mutex<State>) -> io::Result<bool> {
    const REPLY: u64 = 0x0003_e889_0455_65a9;
    const UNSUPPORTED: u32 = (1 << 31) + 1;
    socket.write_all(b"NBDMAGICIHAVEOPT\0\x03")?;
    let _: [u8; 4] = take(socket)?;
    loop {
        let head: [u8; 16] = take(socket)?;
        let option = u32::from_be_bytes(head[8..12].try_into().unwrap());
        let mut asked = vec![0; u32::from_be_bytes(head[12..].try_into().unwrap()) as usize];
        socket.read_exact(&mut asked)?;
        let reply = |kind: u32, body: &[u8]| {
            let head = [&REPLY.to_be_bytes()[..], &option.to_be_bytes(), &kind.to_be_bytes()].concat();
            [&head[..], &(body.len() as u32).to_be_bytes(), body].concat()
        };
        let (structured, len) = {
            let state = locked(state);
            (state.structured, state.now.len() as u64)
        };
        match option {
            7 => {
                // It can flush and make zeros.
                let info = [&[0, 0][..], &len.to_be_bytes(), &(1u16 | 4 | 64).to_be_bytes()].concat();
                socket.write_all(&[reply(3, &info), reply(1, &[])].concat())?;
                return Ok(true);
            }
            8 if structured => socket.write_all(&reply(1, &[]))?,
            _ => socket.write_all(&reply(UNSUPPORTED, &[]))?,
        }
    }
}

fn take<const N: usize>(socket: &mut UnixStream) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    socket.read_exact(&mut bytes)?;
    Ok(bytes)
}
