//! The process that has a PKCS#11 module: its whole life.
//!
//! It sees the PIN and, since a Decrypt has to give it out, data keys. It has nothing else of the KMS: no
//! root key, no log, no credentials, no descriptor of the process that started it. It is confined before the
//! module is loaded, and what the module prints goes nowhere. It ends when nobody asks any more.

use crate::base::hardened::Hardened;
use crate::base::wire::{self, Lines};
use crate::base::{Context, Error, Kind, Result, child};
use crate::crypt::{SecretFd, SecretMem, wiping_allocator};
use crate::hsm::message::{Answer, MAX_LINE, Place, Problem, Question, Refusal};
use crate::sandbox::{self, Rule, stranger};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

/// The hidden subcommand.
pub const COMMAND: &str = "pkcs11";

/// What has the token; without the feature `pkcs11`, nothing is one.
trait Module {
    fn answer(
        &mut self,
        question: &Question,
        secret: &[u8],
    ) -> std::result::Result<(Answer, Option<Secret>), Refusal>;
}

/// Plaintext or random bytes on their way into the memory.
pub(super) type Secret = zeroize::Zeroizing<Vec<u8>>;

/// The process's side: its whole life.
///
/// # Errors
/// Only when the other side could not even be told.
pub fn help(_: Hardened) -> Result<()> {
    wiping_allocator::wipe_from_now_on();
    let socket = child::begin()?;
    // The thread that has started this process may end before the process does. Nobody at the other end of
    // the socket ends this one too.
    child::outlive_parent()?;
    let mut lines = Lines::of_at_most(MAX_LINE);
    let attempt = || "take a question: this command is started by sealblk alone";
    let line = lines.next(&socket).context(attempt)?.unwrap_or_default();
    let question = parse(&line).map_err(|e| e.context(attempt()))?;
    let fd = lines.take_descriptor().ok_or_else(|| Error::new(Kind::Usage, "no memory came with it"))?;
    let mut memory = SecretFd::from_fd(fd)?.map()?;
    let Question::Begin { place, pin } = question else {
        return Err(Error::new(Kind::Usage, "it has to begin").context(attempt()));
    };
    let begun = begin(&socket, &place, &mut memory, pin);
    let (mut module, answer) = match begun {
        Ok(module) => (Some(module), Answer::Done),
        Err(refusal) => (None, Answer::Refused(refusal)),
    };
    wire::say(&socket, &answer)?;
    while let Some(module) = &mut module {
        let Some(line) = lines.next(&socket)? else { break };
        let question = parse(&line)?;
        wire::say(&socket, &done(module.as_mut(), &question, &mut memory))?;
    }
    // Whoever asked wipes the memory, which may be in use again.
    memory.hand_over();
    Ok(())
}

fn parse(line: &[u8]) -> Result<Question> {
    serde_json::from_slice(line).map_err(|e| Error::of(Kind::Usage, e))
}

fn done(module: &mut dyn Module, question: &Question, memory: &mut SecretMem) -> Answer {
    let Some(secret) = memory.as_slice().get(..question.secret_len()) else {
        return Answer::Refused(Refusal::new(Problem::Unsuitable, "more than fits into the memory"));
    };
    match module.answer(question, secret) {
        Ok((answer, None)) => answer,
        Ok((_, Some(secret))) => match memory.as_mut_slice().get_mut(..secret.len()) {
            Some(room) => {
                room.copy_from_slice(&secret);
                Answer::Filled(secret.len())
            }
            None => Answer::Refused(Refusal::new(Problem::Unsuitable, "more than fits into the memory")),
        },
        Err(refusal) => Answer::Refused(refusal),
    }
}

/// Confines this process, loads the module and logs in.
fn begin(
    socket: &UnixStream,
    place: &Place,
    memory: &mut SecretMem,
    pin: usize,
) -> std::result::Result<Box<dyn Module>, Refusal> {
    let failed = |e: Error| Refusal::new(Problem::NoModule, format!("{place}: {e}"));
    // The log may go by a descriptor, whose number is the module's from here on.
    log::set_max_level(log::LevelFilter::Off);
    debug_assert_eq!(socket.as_raw_fd(), libc::STDIN_FILENO);
    // The memory is mapped, and its descriptor closed.
    stranger::keep_standard_streams().map_err(failed)?;
    if !place.module.is_absolute() || !place.module.is_file() {
        let words = format!("there is no PKCS#11 module {}", place.module.display());
        return Err(Refusal::new(Problem::NoModule, words));
    }
    sandbox::confine_module(&reach(place), place.network).map_err(failed)?;
    end_with_the_other_side(socket).map_err(failed)?;
    stranger::be_silent().map_err(failed)?;
    let pin = memory.as_mut_slice().get_mut(..pin);
    let pin = pin.ok_or_else(|| Refusal::new(Problem::WrongPin, "the PIN is too long"))?;
    load(place, pin)
}

#[cfg(feature = "pkcs11")]
fn load(place: &Place, pin: &mut [u8]) -> std::result::Result<Box<dyn Module>, Refusal> {
    Ok(Box::new(super::token::Session::begin(place, pin)?))
}

#[cfg(not(feature = "pkcs11"))]
fn load(_: &Place, _: &mut [u8]) -> std::result::Result<Box<dyn Module>, Refusal> {
    let words = "keys in HSMs are used by the feature pkcs11, without which this sealblk was built";
    Err(Refusal::new(Problem::NotBuilt, words))
}

#[cfg(feature = "pkcs11")]
impl Module for super::token::Session {
    fn answer(
        &mut self,
        question: &Question,
        secret: &[u8],
    ) -> std::result::Result<(Answer, Option<Secret>), Refusal> {
        super::token::Session::answer(self, question, secret)
    }
}

/// Ends this process when nobody is at the other end of its socket, whatever the module is doing.
fn end_with_the_other_side(socket: &UnixStream) -> Result<()> {
    let attempt = || "watch the socket";
    let socket = socket.try_clone().context(attempt)?;
    let watch = move || {
        let mut fds = [PollFd::new(socket.as_fd(), PollFlags::empty())];
        // Interrupted, it looks again.
        while !fds[0].revents().is_some_and(|found| found.contains(PollFlags::POLLHUP)) {
            let _ = poll(&mut fds, PollTimeout::NONE);
        }
        signal_hook::low_level::exit(0);
    };
    std::thread::Builder::new().name("watch".into()).spawn(watch).context(attempt)?;
    Ok(())
}

/// The files that the module may reach.
fn reach(place: &Place) -> Vec<Rule> {
    let own = place.paths.iter().cloned().chain(softhsm_tokens(&place.module)).map(|path| (path, true));
    let folder = place.module.parent().map(Path::to_owned);
    let read = stranger::of_libraries(place.network).into_iter();
    let read = read.chain(folder).chain(softhsm_configuration(&place.module));
    // A folder of the module's own comes first: what is made there belongs to whoever owns that.
    let all = own.chain(read.map(|path| (path, false))).chain([(PathBuf::from("/dev/null"), true)]);
    stranger::rules(all)
}

/// Where SoftHSM's settings are.
fn softhsm_configuration(module: &Path) -> Option<PathBuf> {
    let name = module.file_name()?.to_str()?;
    let is_softhsm = name.starts_with("libsofthsm");
    let named = std::env::var_os("SOFTHSM2_CONF").map(PathBuf::from);
    let of_user =
        || std::env::var_os("HOME").map(|home| Path::new(&home).join(".config/softhsm2/softhsm2.conf"));
    let all = named.into_iter().chain(of_user()).chain([PathBuf::from("/etc/softhsm/softhsm2.conf")]);
    all.into_iter().find(|path| is_softhsm && path.is_file())
}

/// The folder of SoftHSM's tokens, as its settings say.
fn softhsm_tokens(module: &Path) -> Option<PathBuf> {
    let text = std::fs::read_to_string(softhsm_configuration(module)?).ok()?;
    let of_line = |line: &str| {
        let (name, value) = line.split_once('=')?;
        (name.trim() == "directories.tokendir").then(|| PathBuf::from(value.trim()))
    };
    text.lines().find_map(of_line)
}
