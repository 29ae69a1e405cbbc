//! A store, and a folder of images beside it.

use crate::common::attach::{open, read};
use crate::common::content::Reader;
use crate::common::disk::pattern;
use crate::common::store::Store;
use serde_json::Value;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

/// An empty store, and images.
pub struct Rig {
    pub store: Store,
}

impl Rig {
    pub fn new() -> Self {
        Rig { store: Store::new() }
    }

    /// Where the images lie.
    pub fn folder(&self) -> PathBuf {
        self.store.root().parent().expect("it lies in a folder").to_owned()
    }

    pub fn path(&self, name: &str) -> String {
        self.folder().join(name).display().to_string()
    }

    /// A raw image of so many bytes with data at its beginning, in the middle and at its
    /// end; returns what it holds.
    pub fn raw(&self, name: &str, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        for (seed, at, part) in [(1, 0, 300_000), (2, len / 2 + 512, 70_000), (3, len - 5000, 5000)] {
            data[at..at + part].copy_from_slice(&pattern(seed, part));
        }
        let file = File::create(self.folder().join(name)).expect("make an image");
        file.set_len(len as u64).expect("give it its length");
        for (n, block) in data.chunks(4096).enumerate().filter(|(_, block)| block.iter().any(|b| *b != 0)) {
            file.write_all_at(block, n as u64 * 4096).expect("write the image");
        }
        data
    }

    /// Imports, successfully; returns what is known of the volume.
    #[track_caller]
    pub fn import(&self, arguments: &[&str]) -> Value {
        let arguments = [&["volume", "import", "--json"], arguments].concat();
        serde_json::from_str(&self.store.ok(&arguments)).expect("JSON")
    }

    /// Runs a command that must fail with this exit code; returns what it said.
    #[track_caller]
    pub fn refuse(&self, code: i32, arguments: &[&str]) -> String {
        let Output { status, stdout, stderr } = self.store.run(arguments);
        let said = String::from_utf8(stderr).expect("UTF-8");
        assert_eq!((status.code(), stdout.len()), (Some(code), 0), "{arguments:?}: {said}");
        said
    }

    /// Runs a command whose standard input is a pipe with these bytes.
    pub fn run_with(&self, input: &[u8], arguments: &[&str]) -> Output {
        let mut command = self.store.command();
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("start sealblk");
        let mut pipe = child.stdin.take().expect("a pipe");
        std::thread::scope(|scope| {
            // Whoever refuses does not read to the end.
            scope.spawn(move || drop(pipe.write_all(input)));
            child.wait_with_output().expect("it is a child")
        })
    }

    /// The same for a command that must fail with this exit code; returns what it said.
    #[track_caller]
    pub fn refuse_with(&self, input: &[u8], code: i32, arguments: &[&str]) -> String {
        let Output { status, stdout, stderr } = self.run_with(input, arguments);
        let said = String::from_utf8(stderr).expect("UTF-8");
        assert_eq!((status.code(), stdout.len()), (Some(code), 0), "{arguments:?}: {said}");
        said
    }

    /// Whether the volume holds exactly this and then zeros, by the files and the data keys.
    #[track_caller]
    pub fn assert_holds(&self, volume: &str, data: &[u8]) {
        let reader = Reader::new(&self.store.root(), self.store.config());
        let content = reader.volume_content(&reader.volume(volume));
        let (there, rest) = content.split_at(data.len());
        assert!(there == data, "{volume} does not hold its image");
        assert!(rest.iter().all(|b| *b == 0), "{volume} holds more than its image");
    }

    /// Whether a guest finds exactly this in the volume, and then zeros.
    #[track_caller]
    pub fn assert_guest_finds(&self, volume: &str, data: &[u8]) {
        let host = self.store.attach(volume, &[]);
        let mut session = open(host.socket());
        let shown: Value =
            serde_json::from_str(&self.store.ok(&["volume", "show", volume, "--json"])).expect("JSON");
        let size = shown["size"].as_u64().expect("it has a size") as usize;
        let mut content = Vec::new();
        while content.len() < size {
            let len = (size - content.len()).min(128 << 10);
            content.extend(read(&mut session.rings[0], content.len() as u64 / 512, len));
        }
        assert!(content[..data.len()] == *data, "a guest finds something else in {volume}");
        assert!(content[data.len()..].iter().all(|b| *b == 0));
        drop(session);
        host.detach();
    }

    /// Nothing of a volume is left but what the next command clears away.
    #[track_caller]
    pub fn assert_nothing_is_left(&self) {
        self.store.ok(&["gc"]);
        for folder in ["volumes", "layers"] {
            assert_eq!(files(&self.store.root().join(folder)), Vec::<PathBuf>::new());
        }
    }

    /// The store's events with this name.
    pub fn events(&self, name: &str) -> Vec<Value> {
        let text = self.store.ok(&["events", "--json"]);
        let events = text.lines().map(|line| serde_json::from_str::<Value>(line).expect("an event"));
        events.filter(|event| event["detail"]["event"] == name).collect()
    }
}

/// The files in a folder, sorted; none if it is not there.
pub fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.expect("list").path()).collect();
    files.sort();
    files
}

/// Runs one of QEMU's tools, which must succeed.
#[track_caller]
pub fn qemu(tool: &str, arguments: &[&str]) {
    let output = Command::new(tool).args(arguments).output();
    let output = output.unwrap_or_else(|e| panic!("{tool}, of Debian's qemu-utils, is needed: {e}"));
    assert!(output.status.success(), "{tool} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A qemu-io that has a raw image open for writing until this is dropped.
pub struct QemuIo(Child);

impl QemuIo {
    pub fn on(image: &str) -> Self {
        let mut qemu_io = Command::new("qemu-io");
        qemu_io.args(["-f", "raw", image]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = qemu_io.spawn().expect("qemu-io, of Debian's qemu-utils, is needed");
        child.stdin.as_mut().expect("a pipe").write_all(b"length\n").expect("it runs");
        let mut answer = String::new();
        let mut stdout = BufReader::new(child.stdout.take().expect("a pipe"));
        while !answer.contains("8 MiB") {
            answer.clear();
            assert_ne!(stdout.read_line(&mut answer).expect("UTF-8"), 0, "qemu-io ended");
        }
        QemuIo(child)
    }
}

impl Drop for QemuIo {
    fn drop(&mut self) {
        // It ends when it is told no more.
        drop(self.0.stdin.take());
        self.0.wait().expect("it is a child");
    }
}

/// Writes bytes into a file that is there.
pub fn overwrite(path: impl AsRef<Path>, at: u64, bytes: &[u8]) {
    let file = OpenOptions::new().write(true).open(path).expect("open an image");
    file.write_all_at(bytes, at).expect("write into it");
}
