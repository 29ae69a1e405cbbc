//! A PIN from a pinentry: a program that asks whoever sits there, in a window or at a terminal, and answers
//! by the Assuan protocol, a line at a time.
//!
//! The program is whoever asks for the PIN, so it is trusted with that, and with nothing else: it gets no
//! credentials, and what it answers is a claim, bounded in length, number and time. The PIN is decoded where
//! it is wiped, and is in no message.
#![forbid(unsafe_code)]

use crate::base::child::keep_descriptors_back;
use crate::base::printable;
use crate::hsm::Pin;
use crate::kms::KmsError;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::ttyname;
use std::ffi::{OsStr, OsString};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use zeroize::Zeroizing;

/// Names the program for whoever has no option for it: helper processes, and attaches.
pub const VARIABLE: &str = "SEALBLK_PINENTRY";
/// How long somebody may take, and what the program is told of that.
const TIME: Duration = Duration::from_secs(120);
/// For the program, which says by itself that the time is over.
const LATER: Duration = Duration::from_secs(10);
/// The longest line of the protocol, in bytes, with its end.
const LINE_MAX: usize = 1002;
/// More lines than a program has to say.
const LINES_MAX: usize = 64;
/// How long the end of the program is waited for, once it is told to.
const AT_END: Duration = Duration::from_secs(1);
/// The longest words of the program's that are repeated, characters.
const WORDS_MAX: usize = 200;
/// What leads a program to the terminal or the screen of the one who asks, and names his language.
const VARIABLES: [&str; 12] = [
    "PATH",
    "HOME",
    "LANG",
    "LANGUAGE",
    "LC_ALL",
    "LC_CTYPE",
    "LC_MESSAGES",
    "TERM",
    "DISPLAY",
    "WAYLAND_DISPLAY",
    "XAUTHORITY",
    "XDG_RUNTIME_DIR",
];
/// Numbers of errors, as libgpg-error has them.
const TIMED_OUT: u32 = 62;
const CANCELED: [u32; 2] = [99, 198];

static CHOSEN: OnceLock<OsString> = OnceLock::new();

/// Has this program asked for every PIN from now on, whatever else could give one.
pub fn choose(program: &Path) {
    CHOSEN.get_or_init(|| program.as_os_str().to_owned());
}

/// The program that the command line has named.
pub(super) fn chosen() -> Option<OsString> {
    CHOSEN.get().cloned()
}

/// The program that the environment names.
pub(super) fn named() -> Option<OsString> {
    std::env::var_os(VARIABLE).filter(|program| !program.is_empty())
}

/// Has `program` ask for the PIN of the token of what is called so.
///
/// # Errors
/// `AccessDenied` if whoever was asked gave none; `Validation` for a program that is no pinentry.
pub(super) fn ask(program: &OsStr, what: &str) -> Result<Pin, KmsError> {
    ask_within(program, what, TIME + LATER)
}

fn ask_within(program: &OsStr, what: &str, time: Duration) -> Result<Pin, KmsError> {
    let until = Instant::now() + time;
    let mut talk = Talk::begin(program, until)?;
    talk.expect_ok("greets")?;
    for option in options() {
        // A program that does not know one goes without it.
        talk.say(&format!("OPTION {option}"))?;
        talk.answer()?;
    }
    let questions = [
        format!("SETTIMEOUT {}", TIME.as_secs()),
        "SETTITLE sealblk".to_owned(),
        format!("SETDESC {}", escaped(&format!("sealblk needs the PIN for {what}."))),
        "SETPROMPT PIN:".to_owned(),
    ];
    for question in questions {
        talk.say(&question)?;
        talk.answer()?;
    }
    talk.say("GETPIN")?;
    let pin = match talk.answer()? {
        Answer::Ok(data) => data,
        Answer::Err(number, words) => return Err(talk.refused(number, &words)),
    };
    // It may be gone already.
    let _ = talk.say("BYE");
    Pin::copy_of(&pin).map_err(|e| talk.strange(&e.to_string()))
}

/// Where the program finds whoever is to be asked, as gpg tells it.
fn options() -> Vec<String> {
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let of_stream = |fd: BorrowedFd<'_>| ttyname(fd).ok().and_then(|path| path.to_str().map(str::to_owned));
    let terminal = variable("GPG_TTY")
        .or_else(|| of_stream(io::stdin().as_fd()))
        .or_else(|| of_stream(io::stdout().as_fd()))
        .or_else(|| of_stream(io::stderr().as_fd()));
    let language = ["LC_ALL", "LC_CTYPE", "LANG"].into_iter().find_map(variable);
    let options = [
        ("ttyname", terminal),
        ("ttytype", variable("TERM")),
        ("lc-ctype", language),
        ("display", variable("DISPLAY")),
        ("wayland-display", variable("WAYLAND_DISPLAY")),
    ];
    let options = options.into_iter().filter_map(|(name, value)| Some(format!("{name}={}", value?)));
    // What does not fit a line is no terminal.
    options.filter(|it| it.len() < LINE_MAX / 2 && !it.chars().any(char::is_control)).collect()
}

enum Answer {
    /// It was done; with what it has said, decoded.
    Ok(Zeroizing<Vec<u8>>),
    /// It was not: a number, and words that can be printed.
    Err(u32, String),
}

/// A program that is being talked to. Ended when dropped.
struct Talk {
    program: String,
    child: Child,
    to: ChildStdin,
    from: ChildStdout,
    until: Instant,
    lines: usize,
    /// What has come, and is no whole line yet.
    read: Zeroizing<Vec<u8>>,
}

impl Talk {
    fn begin(program: &OsStr, until: Instant) -> Result<Self, KmsError> {
        let name = printable::line(&program.to_string_lossy()).into_owned();
        let attempt = |e: &io::Error| KmsError::Validation(format!("start the pinentry {name}: {e}"));
        let mut command = Command::new(program);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).env_clear();
        for name in VARIABLES {
            if let Some(value) = std::env::var_os(name) {
                command.env(name, value);
            }
        }
        keep_descriptors_back(&mut command);
        let mut child = command.spawn().map_err(|e| attempt(&e))?;
        let (Some(to), Some(from)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(attempt(&ErrorKind::BrokenPipe.into()));
        };
        // The room is there from the start: growing would leave a copy behind.
        let read = Zeroizing::new(Vec::with_capacity(LINE_MAX));
        Ok(Talk { program: name, child, to, from, until, lines: 0, read })
    }

    /// Few and short lines: a pipe has room for all of them.
    fn say(&mut self, line: &str) -> Result<(), KmsError> {
        self.to.write_all(format!("{line}\n").as_bytes()).map_err(|e| self.gone(&e.to_string()))
    }

    fn expect_ok(&mut self, what: &str) -> Result<(), KmsError> {
        match self.answer()? {
            Answer::Ok(_) => Ok(()),
            Answer::Err(_, words) => Err(self.strange(&format!("it {what} with an error: {words}"))),
        }
    }

    fn answer(&mut self) -> Result<Answer, KmsError> {
        let mut data = Zeroizing::new(Vec::with_capacity(LINE_MAX));
        loop {
            self.lines += 1;
            if self.lines > LINES_MAX {
                return Err(self.strange("it says more than a pinentry has to say"));
            }
            let line = self.line()?;
            let (word, rest) = match line.iter().position(|byte| *byte == b' ') {
                Some(at) => (&line[..at], &line[at + 1..]),
                None => (&line[..], &line[line.len()..]),
            };
            match word {
                b"OK" => return Ok(Answer::Ok(data)),
                b"ERR" => {
                    let (number, words) =
                        error_of(rest).ok_or_else(|| self.strange("its error has no number"))?;
                    return Ok(Answer::Err(number, words));
                }
                b"D" => decode(rest, &mut data).map_err(|why| self.strange(why))?,
                b"S" => {}
                _ if line.is_empty() || line.starts_with(b"#") => {}
                // What was said may be a PIN.
                _ => return Err(self.strange("it says what no pinentry says")),
            }
        }
    }

    /// The next line, without its end.
    fn line(&mut self) -> Result<Zeroizing<Vec<u8>>, KmsError> {
        loop {
            if let Some(at) = self.read.iter().position(|byte| *byte == b'\n') {
                let line = Zeroizing::new(self.read[..at].to_vec());
                let rest = Zeroizing::new(self.read[at + 1..].to_vec());
                self.read.clear();
                self.read.extend_from_slice(&rest);
                return Ok(line);
            }
            if self.read.len() >= LINE_MAX {
                return Err(self.strange("one of its lines is too long"));
            }
            self.wait()?;
            let mut part = Zeroizing::new([0; LINE_MAX]);
            let room = LINE_MAX - self.read.len();
            match self.from.read(&mut part[..room]) {
                Ok(0) => return Err(self.gone("it has ended")),
                Ok(count) => self.read.extend_from_slice(&part[..count]),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(self.gone(&e.to_string())),
            }
        }
    }

    /// Waits until something has come, or the end.
    fn wait(&mut self) -> Result<(), KmsError> {
        loop {
            let left = self.until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self.refused(TIMED_OUT, ""));
            }
            let time = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(self.from.as_fd(), PollFlags::POLLIN)], time) {
                Ok(0) | Err(nix::errno::Errno::EINTR) => {}
                Ok(_) => return Ok(()),
                Err(e) => return Err(self.gone(e.desc())),
            }
        }
    }

    fn refused(&self, number: u32, words: &str) -> KmsError {
        let why = match number {
            TIMED_OUT => "nobody gave one in time".to_owned(),
            number if CANCELED.contains(&number) => "it was cancelled".to_owned(),
            number => format!("error {number}: {words}"),
        };
        KmsError::AccessDenied(format!("the pinentry {} gave no PIN: {why}", self.program))
    }

    fn strange(&self, why: &str) -> KmsError {
        KmsError::Validation(format!("the pinentry {} gave no PIN: {why}", self.program))
    }

    fn gone(&mut self, why: &str) -> KmsError {
        let ended = self.end().map_or_else(String::new, |status| format!(" ({status})"));
        KmsError::Validation(format!(
            "the pinentry {} is gone before it gave a PIN: {why}{ended}",
            self.program
        ))
    }

    /// Waits a moment for the end of the program; how it ended, if it did.
    fn end(&mut self) -> Option<std::process::ExitStatus> {
        let until = Instant::now() + AT_END;
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return Some(status),
                Ok(None) if Instant::now() < until => std::thread::sleep(Duration::from_millis(1)),
                _ => return None,
            }
        }
    }
}

impl Drop for Talk {
    /// One that was told to end sets the terminal back by itself, if it is let.
    fn drop(&mut self) {
        let _ = self.to.write_all(b"BYE\n");
        if self.end().is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// The number of an error, without where it came from, and its words.
fn error_of(rest: &[u8]) -> Option<(u32, String)> {
    let text = String::from_utf8_lossy(rest);
    let (number, words) = text.split_once(' ').unwrap_or((&text, ""));
    let words: String = words.chars().filter(|c| !c.is_control()).take(WORDS_MAX).collect();
    Some((number.parse::<u32>().ok()? & 0xffff, words))
}

/// Adds what stands percent-encoded in a line of data.
fn decode(mut text: &[u8], to: &mut Zeroizing<Vec<u8>>) -> Result<(), &'static str> {
    while let Some((&first, rest)) = text.split_first() {
        // The room that is there is not left.
        if to.len() >= LINE_MAX {
            return Err("what it gave is too long");
        }
        text = match (first, rest) {
            (b'%', [high, low, rest @ ..]) => {
                let digit = |byte: u8| char::from(byte).to_digit(16);
                let (Some(high), Some(low)) = (digit(*high), digit(*low)) else {
                    return Err("what it gave is not encoded right");
                };
                to.push((high * 16 + low) as u8);
                rest
            }
            (b'%', _) => return Err("what it gave is not encoded right"),
            _ => {
                to.push(first);
                rest
            }
        };
    }
    Ok(())
}

/// Text as an argument of the protocol.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '%' => escaped.push_str("%25"),
            '\n' => escaped.push_str("%0A"),
            c if c.is_control() => escaped.push('?'),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;

    struct Program {
        _folder: tempfile::TempDir,
        path: PathBuf,
    }

    /// A program that runs this shell script, in which `lines` says what comes.
    fn program(script: &str) -> Program {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pinentry");
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        Program { _folder: folder, path }
    }

    /// Answers OK to everything, and to GETPIN what is given.
    fn answers(answer: &str) -> Program {
        program(&format!(
            "echo OK hello\nwhile read -r word rest; do case $word in GETPIN) {answer} ;; BYE) echo OK; exit \
             ;; OPTION) echo ERR 174 unknown ;; *) echo OK ;; esac; done"
        ))
    }

    fn asked(program: &Program) -> Result<Vec<u8>, String> {
        // A file that was just written may be open in a process that another test forks at this moment.
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            match ask_within(program.path.as_os_str(), "the key store \"50% x\"", Duration::from_secs(60)) {
                Err(e) if e.to_string().contains("Text file busy") && Instant::now() < until => {}
                asked => return asked.map(|pin| pin.bytes().to_vec()).map_err(|e| e.to_string()),
            }
        }
    }

    #[test]
    fn a_pin_is_decoded_whatever_stands_around_it() {
        for (answer, pin) in [
            ("echo 'D 1234'; echo OK", &b"1234"[..]),
            (
                "echo 'S PASSWORD_FROM_CACHE'; echo '# x'; echo 'D a%25b%0a'; echo 'D c d'; echo OK done",
                b"a%b\nc d",
            ),
            ("printf 'D sl'; sleep 0.1; printf 'ow\\nO'; sleep 0.1; printf 'K\\n'", b"slow"),
        ] {
            assert_eq!(asked(&answers(answer)).unwrap(), pin, "{answer}");
        }
    }

    #[test]
    fn whoever_gives_no_pin_is_told_apart() {
        for (answer, words) in [
            ("echo 'ERR 83886179 Operation cancelled <Pinentry>'", "gave no PIN: it was cancelled"),
            ("echo 'ERR 83886142 Timeout <Pinentry>'", "gave no PIN: nobody gave one in time"),
            ("printf 'ERR 83886165 no \\033[31mtty\\n'", "gave no PIN: error 85: no [31mtty"),
            ("echo OK", "a PIN has 1 to 255 bytes"),
            ("echo ERR", "its error has no number"),
            ("echo 'INQUIRE CHECKPIN'", "it says what no pinentry says"),
            ("echo 'D %4'; echo OK", "is not encoded right"),
            ("echo 'D %zz'; echo OK", "is not encoded right"),
            ("head -c 2000 /dev/zero | tr '\\0' x", "too long"),
            (
                "i=0; while [ $i -lt 20 ]; do echo \"D $(printf %0200d 0)\"; i=$((i+1)); done; echo OK",
                "too long",
            ),
            ("while :; do echo S x; done", "more than a pinentry has to say"),
            ("exit 3", "is gone before it gave a PIN: it has ended (exit status: 3)"),
            ("kill -9 $$", "is gone before it gave a PIN: it has ended (signal: 9"),
        ] {
            let said = asked(&answers(answer)).unwrap_err();
            assert!(said.contains(words), "{answer}: {said}");
            assert!(!said.contains("xxxx"), "{said}");
        }
        let said = asked(&program("exec >&-; sleep 0.2")).unwrap_err();
        assert!(said.contains("is gone"), "{said}");
        let said = ask(OsStr::new("/nowhere/pinentry"), "x").map(drop).unwrap_err().to_string();
        assert!(said.contains("start the pinentry /nowhere/pinentry: No such file"), "{said}");
    }

    #[test]
    fn a_program_that_says_nothing_is_not_waited_for_without_end() {
        let silent = program("exec sleep 600");
        let time = Duration::from_millis(200);
        let said = ask_within(silent.path.as_os_str(), "x", time).map(drop).unwrap_err().to_string();
        assert!(said.contains("nobody gave one in time") || said.contains("busy"), "{said}");
    }

    #[test]
    fn what_is_said_to_the_program_is_one_line() {
        assert_eq!(escaped("50% of\n\u{1b}x"), "50%25 of%0A?x");
    }
}
