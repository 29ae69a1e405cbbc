//! Passphrases, and how a process gets one: from a descriptor that it was started with, from a
//! systemd credential, or from whoever sits at its terminal. Never from an argument or the
//! environment, which others can see.
//!
//! All three reach the helper that unwraps a volume's key as well: it inherits the descriptor, the folder of
//! credentials and the terminal from the host process, which itself asks for nothing.

use crate::base::hardened::Hardened;
use crate::base::sync::Locked;
use crate::crypt::SecretMem;
use crate::hsm::Pin;
use crate::kms::KmsError;
use crate::kms::embedded::plain::failed;
use crate::kms::embedded::root_key::pinentry;
use nix::errno::Errno;
use nix::fcntl::{SpliceFFlags, splice};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::termios::{LocalFlags, SetArg, Termios, tcgetattr, tcsetattr};
use nix::unistd::{Whence, lseek};
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use zeroize::Zeroizing;

/// Names the number of a descriptor that a passphrase can be read from.
pub const DESCRIPTOR: &str = "SEALBLK_PASSPHRASE_FD";
/// Names the number of a descriptor that the PIN of an HSM can be read from.
pub const PIN_DESCRIPTOR: &str = "SEALBLK_PIN_FD";
/// The name of the credential that holds one.
const CREDENTIAL: &str = "sealblk-kms-passphrase";
/// Bytes of the longest one.
const MAX: usize = 1024;
/// How often somebody at a terminal may be wrong.
const TRIES: u32 = 3;

/// What a pipe has given: it gives it once.
static GIVEN: Mutex<Option<Passphrase>> = Mutex::new(None);
/// As [`GIVEN`], of the pipe with a PIN.
static GIVEN_PIN: Mutex<Option<Pin>> = Mutex::new(None);

/// A passphrase, in secret memory. Has no Debug.
pub struct Passphrase(SecretMem);

impl Passphrase {
    /// The bytes up to the first end of line.
    pub fn new(bytes: &[u8]) -> Result<Self, KmsError> {
        let line = bytes.split(|byte| *byte == b'\n').next().unwrap_or_default();
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if line.is_empty() || line.len() > MAX {
            return Err(KmsError::Validation(format!(
                "a passphrase has 1 to {MAX} bytes, and ends with the line"
            )));
        }
        let mut memory = SecretMem::new(line.len()).map_err(|e| KmsError::Internal(e.to_string()))?;
        memory.as_mut_slice().copy_from_slice(line);
        Ok(Passphrase(memory))
    }

    /// Reads one from an open descriptor.
    pub fn from_descriptor(number: RawFd, hardened: Hardened) -> Result<Self, KmsError> {
        Self::new(&line_of_descriptor(number, "a passphrase", hardened)?)
    }

    /// Whether both are the same bytes.
    pub fn is(&self, other: &Passphrase) -> bool {
        crate::kms::embedded::keys::same(self.bytes(), other.bytes())
    }

    pub(super) fn bytes(&self) -> &[u8] {
        self.0.as_slice()
    }
}

/// Reads a line from an open descriptor that this process was started with.
fn line_of_descriptor(number: RawFd, what: &str, _: Hardened) -> Result<Zeroizing<Vec<u8>>, KmsError> {
    let attempt = |e: &dyn std::fmt::Display| {
        KmsError::Validation(format!("read {what} from descriptor {number}: {e}"))
    };
    if (0..=libc::STDERR_FILENO).contains(&number) || !is_open(number) {
        return Err(attempt(&"it must be one that this process was started with, and no standard stream"));
    }
    // SAFETY: it is open, and whoever started us gave it to us for this. It is borrowed for as long as
    // it takes to make a copy.
    let copy = unsafe { BorrowedFd::borrow_raw(number) }.try_clone_to_owned();
    let mut file = File::from(copy.map_err(|e| attempt(&e))?);
    // A file is read from its beginning by whoever needs it; a pipe gives what it has to the first.
    match file.rewind() {
        Err(e) if e.raw_os_error() != Some(libc::ESPIPE) => return Err(attempt(&e)),
        _ => {}
    }
    read_line(file).map_err(|e| attempt(&e))
}

/// A custom key store, as whoever is asked for its PIN is told.
pub fn of_key_store(name: &str) -> String {
    format!("the key store \"{name}\"")
}

/// The PIN of the token of what is called so: from the descriptor that [`PIN_DESCRIPTOR`] names, from the
/// systemd credential `sealblk-pin-` and the id, if there is one, from the pinentry that the environment
/// names, or from whoever sits at the terminal. A pinentry of the command line comes before all of them. A
/// wrong PIN is not asked for again: a token counts, and locks itself.
pub fn pin(id: Option<&str>, what: &str, hardened: Hardened) -> Result<Pin, KmsError> {
    let made = |line: &[u8]| {
        let line = line.split(|byte| matches!(byte, b'\n' | b'\r')).next().unwrap_or_default();
        Pin::copy_of(line).map_err(|e| KmsError::Validation(e.to_string()))
    };
    if let Some(program) = pinentry::chosen() {
        return pinentry::ask(&program, what);
    }
    if let Some(number) = named_descriptor(PIN_DESCRIPTOR)? {
        let mut given = GIVEN_PIN.locked();
        return Ok(match &mut *given {
            Some(given) => given,
            none => none.insert(made(&line_of_descriptor(number, "a PIN", hardened)?)?),
        }
        .clone());
    }
    let named = id.map(|id| format!("sealblk-pin-{id}"));
    if let Some(named) = &named
        && let Some((_, text)) = credential(named, Pin::MAX as u64 + 2)?
    {
        return made(&text);
    }
    if let Some(program) = pinentry::named() {
        return pinentry::ask(&program, what);
    }
    let named = named.map_or_else(String::new, |named| format!(", or as the systemd credential {named}"));
    let or_else = |e: &std::io::Error| {
        format!(
            "{what} needs the PIN of its token, and there is no terminal to ask for it \
             ({e}): give it by {PIN_DESCRIPTOR}=N, a descriptor to read it from{named}, or by {}=PROGRAM, a \
             pinentry that asks for it",
            pinentry::VARIABLE
        )
    };
    made(&line_at_terminal(&format!("PIN for {what}: "), or_else)?)
}

/// The descriptors that a passphrase and a PIN may be read from, for a process that lives on and must
/// not keep them, but has helpers that need them. What is in a pipe is put into a memory file for
/// them, by the kernel alone.
///
/// To be called before anything opens a descriptor that could have its number.
pub fn inherited_descriptors() -> Result<Vec<OwnedFd>, KmsError> {
    let mut names = vec![DESCRIPTOR, PIN_DESCRIPTOR];
    if named_descriptor(DESCRIPTOR)? == named_descriptor(PIN_DESCRIPTOR)? {
        names.pop();
    }
    let found: Vec<Option<OwnedFd>> = names.into_iter().map(inherited).collect::<Result<_, _>>()?;
    Ok(found.into_iter().flatten().collect())
}

fn inherited(variable: &str) -> Result<Option<OwnedFd>, KmsError> {
    let Some(number) = named_descriptor(variable)? else { return Ok(None) };
    if number <= libc::STDERR_FILENO || !is_open(number) {
        // Whoever needs it says so.
        return Ok(None);
    }
    // SAFETY: it is open, and was made by whoever started us, for this use alone; nothing else
    // in this process owns it.
    let descriptor = unsafe { OwnedFd::from_raw_fd(number) };
    for_many(&descriptor).map_err(|e| {
        KmsError::Validation(format!("read the secret of {variable} from descriptor {number}: {}", e.desc()))
    })?;
    Ok(Some(descriptor))
}

fn for_many(descriptor: &OwnedFd) -> Result<(), Errno> {
    if lseek(descriptor, 0, Whence::SeekCur) != Err(Errno::ESPIPE) {
        return Ok(());
    }
    let file = memfd_create("sealblk-passphrase", MFdFlags::MFD_CLOEXEC)?;
    let mut left = MAX + 2;
    while left > 0 {
        match splice(descriptor, None, &file, None, left, SpliceFFlags::empty()) {
            Ok(0) => break,
            Ok(moved) => left -= moved.min(left),
            Err(Errno::EINTR) => {}
            Err(e) => return Err(e),
        }
    }
    // SAFETY: both are open and ours; the pipe's number means the file from here on, which helpers inherit.
    match unsafe { libc::dup2(file.as_raw_fd(), descriptor.as_raw_fd()) } {
        -1 => Err(Errno::last()),
        _ => Ok(()),
    }
}

fn is_open(number: RawFd) -> bool {
    // SAFETY: F_GETFD only asks whether the descriptor is open.
    (unsafe { libc::fcntl(number, libc::F_GETFD) }) >= 0
}

fn named_descriptor(variable: &str) -> Result<Option<RawFd>, KmsError> {
    let Some(text) = std::env::var_os(variable).filter(|text| !text.is_empty()) else { return Ok(None) };
    let number = text.to_str().and_then(|text| text.parse().ok());
    number.map(Some).ok_or_else(|| KmsError::Validation(format!("{variable} is not a number")))
}

/// Gets a passphrase and tries it with `open`, which returns `None` for a wrong one. Somebody at a terminal,
/// who sees `prompt`, may try again.
pub(super) fn ask_until<T>(
    prompt: &str,
    hardened: Hardened,
    open: impl Fn(&Passphrase) -> Result<Option<T>, KmsError>,
) -> Result<T, KmsError> {
    let wrong = |whence: &str| {
        KmsError::AccessDenied(format!(
            "the passphrase {whence} is not the one of the KMS root key, or that is damaged"
        ))
    };
    if let Some(number) = named_descriptor(DESCRIPTOR)? {
        let mut given = GIVEN.locked();
        let given = match &mut *given {
            Some(given) => given,
            none => none.insert(Passphrase::from_descriptor(number, hardened)?),
        };
        return open(given)?.ok_or_else(|| wrong(&format!("from descriptor {number}")));
    }
    if let Some((path, text)) = credential(CREDENTIAL, MAX as u64 + 2)? {
        return open(&Passphrase::new(&text)?)?.ok_or_else(|| wrong(&format!("in {}", path.display())));
    }
    for _ in 0..TRIES {
        if let Some(opened) = open(&at_terminal(prompt)?)? {
            return Ok(opened);
        }
        log::warn!("that is not the passphrase");
    }
    Err(wrong("that was given"))
}

/// A new passphrase from whoever sits at the terminal, who has to say it twice.
pub fn new_at_terminal(_: Hardened) -> Result<Passphrase, KmsError> {
    let first = at_terminal("New passphrase of the KMS root key: ")?;
    if at_terminal("The same again: ")?.is(&first) {
        return Ok(first);
    }
    Err(KmsError::Validation("the two passphrases differ; nothing was changed".into()))
}

/// A credential: where it lies, and what it says. Has no Debug.
type Credential = (PathBuf, Zeroizing<Vec<u8>>);

/// The systemd credential of that name, if this process was started with one.
pub(super) fn credential(name: &str, longest: u64) -> Result<Option<Credential>, KmsError> {
    let Some(folder) = std::env::var_os("CREDENTIALS_DIRECTORY").filter(|f| !f.is_empty()) else {
        return Ok(None);
    };
    let path = Path::new(&folder).join(name);
    let file = match File::open(&path) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(|e| failed("read the credential", &path, &e))?,
    };
    let mut text = Zeroizing::new(Vec::with_capacity(longest as usize));
    file.take(longest).read_to_end(&mut text).map_err(|e| failed("read the credential", &path, &e))?;
    Ok(Some((path, text)))
}

fn at_terminal(prompt: &str) -> Result<Passphrase, KmsError> {
    let or_else = |e: &std::io::Error| {
        format!(
            "the KMS root key is under a passphrase, and there is no terminal to ask for it ({e}): give it \
             by {DESCRIPTOR}=N, a descriptor to read it from, or as the systemd credential {CREDENTIAL}"
        )
    };
    Passphrase::new(&line_at_terminal(prompt, or_else)?)
}

/// What somebody types at the terminal, who does not see it; where there is none, an error in the words of
/// `or_else`.
fn line_at_terminal(
    prompt: &str,
    or_else: impl FnOnce(&std::io::Error) -> String,
) -> Result<Zeroizing<Vec<u8>>, KmsError> {
    let terminal = OpenOptions::new().read(true).write(true).open("/dev/tty");
    let terminal = terminal.map_err(|e| KmsError::Validation(or_else(&e)))?;
    let failed = |e: std::io::Error| KmsError::Internal(format!("ask at the terminal: {e}"));
    let quiet = Quiet::new(&terminal).map_err(|e| failed(e.into()))?;
    (&terminal).write_all(prompt.as_bytes()).map_err(failed)?;
    let line = read_line(&terminal);
    drop(quiet);
    (&terminal).write_all(b"\n").map_err(failed)?;
    line.map_err(failed)
}

/// Reads to the end of the line, byte by byte: what follows is not ours.
fn read_line(mut from: impl Read) -> std::io::Result<Zeroizing<Vec<u8>>> {
    // The room is there from the start: growing would leave a copy behind.
    let mut line = Zeroizing::new(Vec::with_capacity(MAX + 2));
    let mut byte = Zeroizing::new([0]);
    while line.len() < MAX + 2 {
        match from.read(&mut byte[..]) {
            Ok(0) => break,
            Ok(_) => line.push(byte[0]),
            Err(e) if e.kind() == ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        }
        if byte[0] == b'\n' {
            break;
        }
    }
    Ok(line)
}

/// A terminal that does not show what is typed; at drop it is as it was.
struct Quiet<'a> {
    terminal: &'a File,
    before: Termios,
}

impl<'a> Quiet<'a> {
    fn new(terminal: &'a File) -> Result<Self, Errno> {
        let before = tcgetattr(terminal)?;
        let mut quiet = before.clone();
        quiet.local_flags.remove(LocalFlags::ECHO);
        tcsetattr(terminal, SetArg::TCSAFLUSH, &quiet)?;
        Ok(Quiet { terminal, before })
    }
}

impl Drop for Quiet<'_> {
    fn drop(&mut self) {
        if let Err(e) = tcsetattr(self.terminal, SetArg::TCSAFLUSH, &self.before) {
            log::warn!("the terminal could not be set back: {e}");
        }
    }
}
