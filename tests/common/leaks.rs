//! Looking for a data key where it must not be: in a process's memory as root sees it, in
//! files, in what is printed.

use super::patience::wait_for;
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Bytes of a piece of the key. Round keys 0 and 1 of AES-256 are the key itself, so that pieces of this size
/// find an expanded key as well, and half a key.
const PIECE: usize = 16;
/// Bytes that are read at a time.
const STEP: usize = 1 << 20;

/// What to look for.
pub struct Needles {
    /// What each is, and its bytes.
    all: Vec<(String, Vec<u8>)>,
    /// Whether a needle begins with these two bytes.
    begins: Vec<bool>,
}

impl Needles {
    /// The data key in pieces: as it is, in hexadecimal, in base64 and in decimal numbers.
    pub fn of_key(key: &[u8]) -> Self {
        assert_eq!(key.len(), 64);
        Self::of_secrets(&[("the data key", key)])
    }

    /// Looks for any secrets, each of whole pieces and with a name.
    pub fn of_secrets(secrets: &[(&str, &[u8])]) -> Self {
        let mut all = Vec::new();
        let pieces = secrets.iter().flat_map(|(name, secret)| {
            assert!(secret.len().is_multiple_of(PIECE) && !secret.is_empty(), "{name}");
            secret.chunks(PIECE).enumerate().map(move |(n, piece)| (name, n, piece))
        });
        for (name, n, piece) in pieces {
            let mut add =
                |how: &str, bytes: Vec<u8>| all.push((format!("piece {n} of {name}, {how}"), bytes));
            add("as it is", piece.to_vec());
            // What HMAC begins with.
            add("as HMAC's inner key", piece.iter().map(|byte| byte ^ 0x36).collect());
            add("as HMAC's outer key", piece.iter().map(|byte| byte ^ 0x5c).collect());
            add("backwards", piece.iter().rev().copied().collect());
            add("in hexadecimal", hex::encode(piece).into());
            add("in HEXADECIMAL", hex::encode_upper(piece).into());
            for separator in [",", ", "] {
                let numbers: Vec<String> = piece.iter().map(u8::to_string).collect();
                add("in numbers", numbers.join(separator).into());
            }
            // Base64 depends on where in a group of three a byte falls; 12 bytes are 16 whole characters.
            for shift in 0..3 {
                add("in base64", STANDARD.encode(&piece[shift..shift + 12]).into());
                add("in base64 for URLs", URL_SAFE.encode(&piece[shift..shift + 12]).into());
            }
        }
        Self::new(all)
    }

    /// The key in one piece, as a KMS unwraps it. No key schedule has that.
    pub fn of_raw_key(key: &[u8]) -> Self {
        assert_eq!(key.len(), 64);
        Self::new(vec![("the data key in one piece".to_owned(), key.to_vec())])
    }

    /// Words that are there: whoever does not find them is not looking.
    pub fn words(words: &str) -> Self {
        Self::new(vec![(words.to_owned(), words.into())])
    }

    fn new(all: Vec<(String, Vec<u8>)>) -> Self {
        let mut begins = vec![false; 1 << 16];
        all.iter()
            .for_each(|(_, bytes)| begins[usize::from(u16::from_le_bytes([bytes[0], bytes[1]]))] = true);
        Needles { all, begins }
    }

    fn longest(&self) -> usize {
        self.all.iter().map(|(_, bytes)| bytes.len()).max().unwrap_or(0)
    }

    /// What is found in `hay`, and where.
    pub fn find(&self, hay: &[u8]) -> Vec<(&str, usize)> {
        let mut found = Vec::new();
        for at in 0..hay.len().saturating_sub(1) {
            if !self.begins[usize::from(u16::from_le_bytes([hay[at], hay[at + 1]]))] {
                continue;
            }
            let here = self.all.iter().filter(|(_, bytes)| hay[at..].starts_with(bytes));
            found.extend(here.map(|(what, _)| (what.as_str(), at)));
        }
        found
    }

    /// What is found in any file below `folder`, sockets and the like left out.
    pub fn find_in_files(&self, folder: &Path) -> Vec<String> {
        let mut found = Vec::new();
        let mut todo = vec![folder.to_owned()];
        while let Some(path) = todo.pop() {
            let kind = fs::symlink_metadata(&path).expect("look at a file").file_type();
            if kind.is_dir() {
                todo.extend(
                    fs::read_dir(&path).expect("list a folder").map(|e| e.expect("list a folder").path()),
                );
            }
            if kind.is_file() {
                let bytes = fs::read(&path).expect("read a file");
                found.extend(
                    self.find(&bytes).iter().map(|(what, at)| format!("{what}: {path:?}, byte {at}")),
                );
            }
            let name = path.as_os_str().as_encoded_bytes();
            found.extend(self.find(name).iter().map(|(what, _)| format!("{what}: the name {path:?}")));
        }
        found
    }
}

/// One mapping of a process.
struct Mapping {
    range: std::ops::Range<u64>,
    name: String,
    readable: bool,
    /// Locked and left out of dumps: where keys may be.
    secret: bool,
}

fn mappings(pid: Pid) -> Vec<Mapping> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).expect("read the mappings");
    let mut all: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            let has = |flag| flags.split_whitespace().any(|f| f == flag);
            all.last_mut().expect("a mapping begins before its flags").secret = has("lo") && has("dd");
        } else if let Some((from, to)) = words[0].split_once('-') {
            let number = |text| u64::from_str_radix(text, 16).expect("an address");
            all.push(Mapping {
                range: number(from)..number(to),
                name: words[5..].join(" "),
                readable: words[1].starts_with('r'),
                secret: false,
            });
        }
    }
    all
}

/// What was seen of a process's memory.
pub struct Seen {
    /// Needles outside the secret mappings: what, and where.
    pub found: Vec<String>,
    /// Bytes looked through.
    pub bytes: u64,
    /// How many mappings may hold keys.
    pub secret: usize,
    /// Needles in those mappings, as far as root can read them.
    pub in_secret: Vec<String>,
    /// How many of those mappings not even root can read.
    pub unreadable: usize,
}

/// Looks through all memory of a process that root can read; what it finds in the mappings that are made for
/// keys stands by itself. The process must stand still.
pub fn look_through(pid: Pid, needles: &Needles) -> Seen {
    let memory = File::open(format!("/proc/{pid}/mem")).expect("root may read memory");
    let (found, in_secret) = (Vec::new(), Vec::new());
    let mut seen = Seen { found, bytes: 0, secret: 0, in_secret, unreadable: 0 };
    for mapping in mappings(pid) {
        if mapping.secret {
            seen.secret += 1;
            let mut bytes = vec![0; (mapping.range.end - mapping.range.start) as usize];
            match memory.read_exact_at(&mut bytes, mapping.range.start) {
                Ok(()) => {
                    let here = needles.find(&bytes);
                    seen.in_secret.extend(here.iter().map(|(what, _)| format!("{what}: {}", mapping.name)));
                }
                Err(_) => seen.unreadable += 1,
            }
            continue;
        }
        // The kernel's own pages cannot be read this way, nor what the process itself cannot read.
        if mapping.readable && !["[vvar]", "[vvar_vclock]", "[vsyscall]"].contains(&mapping.name.as_str()) {
            look_through_one(&memory, &mapping, needles, &mut seen);
        }
    }
    seen
}

fn look_through_one(memory: &File, mapping: &Mapping, needles: &Needles, seen: &mut Seen) {
    let overlap = needles.longest() as u64;
    let mut buffer = vec![0; STEP];
    let mut at = mapping.range.start;
    while at < mapping.range.end {
        let step = (mapping.range.end - at).min(STEP as u64) as usize;
        let bytes = &mut buffer[..step];
        // A mapping can reach beyond the end of its file: nothing is there.
        if memory.read_exact_at(bytes, at).is_err() {
            let backed = mapping.name.starts_with('/');
            assert!(backed, "{:#x} of {:x?} {} cannot be read", at, mapping.range, mapping.name);
            return;
        }
        seen.bytes += step as u64;
        for (what, offset) in needles.find(bytes) {
            let place = at + offset as u64;
            seen.found.push(format!("{what}: {place:#x} in {:x?} {}", mapping.range, mapping.name));
        }
        if step < STEP {
            return;
        }
        at += step as u64 - overlap;
    }
}

/// A process that has no memory for keys has none of these, but `known`: whoever does not find what is there
/// is not looking. It stands still meanwhile.
#[track_caller]
pub fn assert_has_none(pid: Pid, needles: &Needles, known: &str) {
    kill(pid, Signal::SIGSTOP).expect("it runs");
    wait_for("the process stands still", || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("it is there");
        if stat.contains(") T ") { Ok(()) } else { Err(stat) }
    });
    let (seen, control) = (look_through(pid, needles), look_through(pid, &Needles::words(known)));
    kill(pid, Signal::SIGCONT).expect("it is there");
    assert!(seen.found.is_empty() && seen.secret == 0, "{:#?}", seen.found);
    assert!(seen.bytes > 1 << 20 && !control.found.is_empty(), "{} bytes: {known}", seen.bytes);
}
