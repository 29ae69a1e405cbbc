//! Another host, by a connection that somebody else has made, "ssh" say: two streams, one for each way.
//!
//! The host that sends a volume asks for objects of a place ([`relay`]); the host that receives the volume
//! has the place, a folder of its own ([`server`]). Both begin with [`HELLO`]. Then requests go one way and
//! their answers the other, as between a carrier and whoever started it ([`super::carry`]). Whoever is at the
//! other end is a stranger: each end reads what he says in a process of its own, which has no key, no
//! network, and no file but the place's.
#![forbid(unsafe_code)]

pub mod relay;
pub mod server;

use crate::base::child;
use crate::base::root::Root;
use crate::base::wire::{self, Lines};
use crate::base::{Context, Error, Kind, Result};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::Child;
use std::time::Duration;

/// What both ends say first. The number is the version of what they say afterwards.
const HELLO: &[u8; 16] = b"sealblk place 1\n";
/// The longest line between one end's process and whoever started it, in bytes.
const MAX_LINE: usize = 64 << 10;
/// How often whoever waits for the other host is asked whether to go on waiting.
const LOOK: Duration = Duration::from_millis(200);

/// Whether one end's process has come so far that it can be used.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Said {
    Ready,
    /// The name of the error's kind, and its words.
    Failed(String, String),
}

/// Whoever waits for the other host is asked again and again, whether to go on waiting: its error ends that.
pub(crate) type Wait<'a> = &'a mut dyn FnMut() -> Result<()>;

/// One end's process, for whoever started it. It ends when this is dropped.
struct Running {
    socket: UnixStream,
    child: Child,
}

impl Running {
    /// Starts the process, with what it is told and the descriptors that it needs. Returns when the other end
    /// has said its first words: whoever makes the connection may have to ask for a passphrase before that.
    fn start(
        root: &Root,
        command: &str,
        begin: &impl Serialize,
        descriptors: &[BorrowedFd<'_>],
        wait: Wait<'_>,
    ) -> Result<Self> {
        let (socket, child) = child::spawn(root, command)?;
        let running = Running { socket, child };
        let attempt = || format!("tell the process \"{command}\" what to do");
        running.socket.set_read_timeout(Some(LOOK))?;
        wire::say_with_all(&running.socket, begin, descriptors).context(attempt)?;
        let mut lines = Lines::of_at_most(MAX_LINE);
        let line = loop {
            match lines.next(&running.socket) {
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => wait()?,
                line => break line.context(attempt)?,
            }
        };
        let line =
            line.ok_or_else(|| Error::new(Kind::Other, format!("the process \"{command}\" is gone")))?;
        match serde_json::from_slice(&line).map_err(|e| Error::of(Kind::Other, e))? {
            Said::Ready => Ok(running),
            Said::Failed(kind, words) => Err(Error::new(Kind::from_name(&kind), words)),
        }
    }

    /// Whether the process is there: it ends with the connection.
    fn is_there(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The process's side of the beginning: what it is told, and the descriptors that came with that.
fn begin<T: DeserializeOwned, const N: usize>() -> Result<(UnixStream, T, [OwnedFd; N])> {
    let socket = child::begin()?;
    let attempt = || "take a request: this command is started by \"sealblk volume send\" and its kin alone";
    let none = || Error::new(Kind::Usage, "there is none").context(attempt());
    let mut lines = Lines::of_at_most(MAX_LINE).with_descriptors();
    let line = lines.next(&socket).context(attempt)?.ok_or_else(none)?;
    let begin = serde_json::from_slice(&line).map_err(|e| Error::of(Kind::Usage, e).context(attempt()))?;
    let mut descriptors = Vec::new();
    while let Some(descriptor) = lines.take_descriptor() {
        descriptors.push(descriptor);
    }
    Ok((socket, begin, <[OwnedFd; N]>::try_from(descriptors).map_err(|_| none())?))
}

/// Says whether this process has come so far. Returns whether it has.
fn say(socket: &UnixStream, done: &Result<()>) -> Result<bool> {
    let said = match done {
        Ok(()) => Said::Ready,
        Err(e) => Said::Failed(e.kind().name().to_owned(), e.to_string().chars().take(4000).collect()),
    };
    wire::say(socket, &said).context(|| "say whether the other host can be heard")?;
    Ok(done.is_ok())
}

/// Says the first words, and hears those of the other end.
///
/// # Errors
/// `Other` for whoever is no sealblk of this version; those of the streams.
fn greet(mut from: impl Read, mut to: impl Write) -> Result<()> {
    let attempt = || "greet the other host";
    // One that has ended may have said why not.
    let told = to.write_all(HELLO);
    let mut words = Vec::new();
    while words.len() < HELLO.len() {
        let mut part = [0; HELLO.len()];
        let room = HELLO.len() - words.len();
        match from.read(&mut part[..room]) {
            Ok(0) => break,
            Ok(count) => words.extend_from_slice(&part[..count]),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e).context(attempt),
        }
    }
    if words == HELLO {
        return told.context(attempt);
    }
    let message = match words.strip_prefix(&HELLO[..HELLO.len() - 2]) {
        _ if words.is_empty() => "it has ended the connection before it said anything".to_owned(),
        Some(_) => "its sealblk is of a version that speaks otherwise; use the same version there".to_owned(),
        None => format!(
            "{:?} comes from there, and that is not sealblk: nothing but \"sealblk volume receive -\" may \
             write to that stream, no greeting and no profile of a shell",
            String::from_utf8_lossy(&words)
        ),
    };
    Err(Error::new(Kind::Other, message).context(attempt()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_no_sealblk_of_this_version_is_named() {
        let mut said = Vec::new();
        greet(&HELLO[..], &mut said).unwrap();
        assert_eq!(said, HELLO);
        for (words, told) in [
            (&b""[..], "before it said anything"),
            (b"sealblk place 2\n", "of a version"),
            (b"Last login: Mon Jan  5", "\"Last login: Mon \""),
            (b"sealblk", "\"sealblk\""),
        ] {
            let e = greet(words, &mut Vec::new()).unwrap_err().to_string();
            assert!(e.contains(told), "{e}");
        }
    }
}
