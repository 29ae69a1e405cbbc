//! A token as other processes use it: questions to the process that has its PKCS#11 module, which is started
//! when it is needed, and started again when it or the token was lost.

use crate::base::root::Root;
use crate::base::sync::Locked;
use crate::base::{Error, Kind, Result, child, wire};
use crate::crypt::{SecretFd, SecretMem};
use crate::hsm::message::{Answer, MAX_LINE, Place, Problem, Question, Refusal, TEXT_MAX};
use crate::hsm::module::COMMAND;
use crate::sandbox::stranger;
use std::fmt::Display;
use std::io::{self, ErrorKind, Read};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::Child;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};
use zeroize::{Zeroize, Zeroizing};

/// How long the end of a process that was killed is waited for.
const AT_END: Duration = Duration::from_secs(1);

/// The PIN of a token's user, in secret memory; copies are the same memory. Has no Debug.
#[derive(Clone)]
pub struct Pin(Arc<SecretMem>);

impl Pin {
    /// The longest PIN, in bytes.
    pub const MAX: usize = 255;

    /// A copy of bytes that stay their owner's to wipe.
    ///
    /// # Errors
    /// `Usage` for no bytes, or too many; those of secret memory.
    pub fn copy_of(bytes: &[u8]) -> Result<Self> {
        if bytes.is_empty() || bytes.len() > Self::MAX {
            return Err(Error::new(Kind::Usage, format!("a PIN has 1 to {} bytes", Self::MAX)));
        }
        let mut memory = SecretMem::new(bytes.len())?;
        memory.as_mut_slice().copy_from_slice(bytes);
        Ok(Pin(Arc::new(memory)))
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        self.0.as_slice()
    }
}

/// A token, and the PIN that opens it. Its process has one question at a time; who asks
/// while it is busy waits.
pub struct Token {
    place: Place,
    pin: Pin,
    state: Mutex<State>,
    is_free: Condvar,
}

#[derive(Default)]
struct State {
    is_busy: bool,
    process: Option<Process>,
}

/// What a token has answered. Has no Debug.
pub struct Reply {
    /// The answer.
    pub answer: Answer,
    /// What lay in the memory with it.
    pub secret: Zeroizing<Vec<u8>>,
}

impl Token {
    /// The token there. No process is started before something is asked.
    pub fn new(place: Place, pin: Pin) -> Self {
        Token { place, pin, state: Mutex::default(), is_free: Condvar::new() }
    }

    /// Where it is.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Asks it, with these secret bytes, within this time.
    ///
    /// # Errors
    /// Its refusal; `Lost` for one that does not answer.
    pub fn ask(
        &self,
        question: &Question,
        secret: &[u8],
        time: Duration,
    ) -> std::result::Result<Reply, Refusal> {
        let until = Instant::now() + time;
        let late = || lost(format!("{} did not answer within {} s", self.place, time.as_secs_f32().ceil()));
        let mut turn = self.turn(until).ok_or_else(late)?;
        let was_there = turn.process.is_some();
        loop {
            let process = match turn.process.take() {
                Some(process) => process,
                None => Process::start(&self.place, &self.pin, until).map_err(|e| e.unwrap_or_else(late))?,
            };
            let process = turn.process.insert(process);
            let refusal = match process.ask(question, secret, until) {
                Ok(Reply { answer: Answer::Refused(refusal), .. }) => refusal,
                Ok(reply) => return Ok(reply),
                Err(broken) => broken.unwrap_or_else(late),
            };
            if refusal.problem != Problem::Lost {
                return Err(refusal);
            }
            // Whoever lost the token does not find it again. A new process may, if this one was no new one.
            turn.process = None;
            if !was_there || turn.is_second || Instant::now() >= until {
                return Err(refusal);
            }
            log::info!("{}: {refusal}; a new session is begun", self.place);
            turn.is_second = true;
        }
    }

    /// Waits until nobody else asks.
    fn turn(&self, until: Instant) -> Option<Turn<'_>> {
        let mut state = self.state.locked();
        while state.is_busy {
            let left = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())?;
            state = self.is_free.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        state.is_busy = true;
        Some(Turn { token: self, process: state.process.take(), is_second: false })
    }
}

/// The right to ask, and the process while one has it.
struct Turn<'a> {
    token: &'a Token,
    process: Option<Process>,
    is_second: bool,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut state = self.token.state.locked();
        *state = State { is_busy: false, process: self.process.take() };
        self.token.is_free.notify_one();
    }
}

/// The process that has the module, logged in to the token. Ended when dropped.
struct Process {
    socket: UnixStream,
    child: Child,
    memory: SecretMem,
}

/// None where the time is over.
type Broken = Option<Refusal>;

impl Process {
    fn start(place: &Place, pin: &Pin, until: Instant) -> std::result::Result<Self, Broken> {
        let attempt = |e: &dyn Display| Some(lost(format!("start a process for {place}: {e}")));
        let secret = SecretFd::create(TEXT_MAX).map_err(|e| attempt(&e))?;
        let shared = secret.as_fd().try_clone_to_owned().map_err(|e| attempt(&e))?;
        let memory = secret.map().map_err(|e| attempt(&e))?;
        let (socket, child) = child::spawn_with(&Root::new("/"), None, COMMAND, stranger::keep_back)
            .map_err(|e| attempt(&e))?;
        let mut process = Process { socket, child, memory };
        let question = Question::Begin { place: place.clone(), pin: pin.bytes().len() };
        process.memory.as_mut_slice()[..pin.bytes().len()].copy_from_slice(pin.bytes());
        let said = process.wait_no_longer_than(until).and_then(|()| {
            wire::say_with(&process.socket, &question, shared.as_fd()).map_err(|e| process.broken(&e))
        });
        said?;
        match process.answer(&question, until)?.answer {
            Answer::Refused(refusal) => Err(Some(refusal)),
            _ => Ok(process),
        }
    }

    fn ask(
        &mut self,
        question: &Question,
        secret: &[u8],
        until: Instant,
    ) -> std::result::Result<Reply, Broken> {
        debug_assert_eq!(question.secret_len(), secret.len());
        let Some(room) = self.memory.as_mut_slice().get_mut(..secret.len()) else {
            return Err(Some(Refusal::new(Problem::Unsuitable, "the plaintext is too long for a token")));
        };
        room.copy_from_slice(secret);
        self.wait_no_longer_than(until)?;
        wire::say(&self.socket, question).map_err(|e| self.broken(&e))?;
        self.answer(question, until)
    }

    /// Waits for the answer. The memory is empty afterwards.
    fn answer(&mut self, question: &Question, until: Instant) -> std::result::Result<Reply, Broken> {
        let line = hear(&self.socket, until).map_err(|e| self.broken(&e))?;
        let answer = Answer::parse(question, &line);
        let len = if let Answer::Filled(len) = answer { len } else { 0 };
        let memory = self.memory.as_mut_slice();
        // What the other process still writes there is in no copy.
        let secret = Zeroizing::new(memory[..len].to_vec());
        memory.zeroize();
        Ok(Reply { answer, secret })
    }

    fn wait_no_longer_than(&self, until: Instant) -> std::result::Result<(), Broken> {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(None);
        }
        self.socket.set_write_timeout(Some(left)).map_err(|e| Some(lost(e.to_string())))
    }

    fn broken(&self, e: &io::Error) -> Broken {
        match e.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => None,
            _ => Some(lost(format!("the process that has the PKCS#11 module is gone ({e})"))),
        }
    }
}

impl Drop for Process {
    /// A process that a driver holds in the kernel does not end by being killed; it is not waited for.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let until = Instant::now() + AT_END;
        while matches!(self.child.try_wait(), Ok(None)) {
            if Instant::now() >= until {
                log::warn!("the process {} that has a PKCS#11 module does not end", self.child.id());
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn lost(words: String) -> Refusal {
    Refusal::new(Problem::Lost, words)
}

/// Waits for a line, however slowly it comes, no longer than that.
fn hear(mut socket: &UnixStream, until: Instant) -> io::Result<Vec<u8>> {
    let (mut line, mut part) = (Vec::new(), [0; 4096]);
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        socket.set_read_timeout(Some(left))?;
        match socket.read(&mut part) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(count) => line.extend_from_slice(&part[..count]),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
        if line.last() == Some(&b'\n') || line.len() > MAX_LINE {
            return Ok(line);
        }
    }
}
