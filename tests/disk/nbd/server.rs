//! Servers of others, and a store with a volume behind one.

use crate::common::attach::{Host, Place};
use crate::common::frontend::load::Random;
use crate::common::frontend::{Options, Session};
use crate::common::patience::wait_for;
use crate::common::process::{repository, tie_to_test, tool};
use crate::common::store::{Store, sockets};
use crate::devices::rig::Rig;
use crate::host_disks::rig::Writer;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use tempfile::TempDir;

/// A file that a server serves, in a folder of its own.
pub struct Exported {
    folder: TempDir,
}

impl Exported {
    /// One of zeros.
    pub fn zeros(len: u64) -> Self {
        let exported = Exported { folder: tempfile::tempdir().expect("make a temporary folder") };
        exported.file().set_len(len).expect("make it longer");
        exported
    }

    pub fn path(&self) -> PathBuf {
        self.folder.path().join("disk")
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("nbd.sock")
    }

    /// What `--nbd` takes.
    pub fn address(&self) -> String {
        format!("unix:{}", self.socket().display())
    }

    pub fn file(&self) -> File {
        let mut how = File::options();
        how.read(true).write(true).create(true).truncate(false).open(self.path()).expect("open the file")
    }

    pub fn content(&self) -> Vec<u8> {
        std::fs::read(self.path()).expect("read the file")
    }

    pub fn overwrite(&self, at: u64, bytes: &[u8]) {
        self.file().write_all_at(bytes, at).expect("write into the file");
    }

    pub fn allocated(&self) -> u64 {
        self.file().metadata().expect("look at the file").blocks() * 512
    }

    /// nbdkit serves it, with these filters and their arguments.
    #[track_caller]
    pub fn by_nbdkit(&self, filters: &[&str], arguments: &[&str]) -> Server {
        let mut command = nbdkit();
        command.arg("-f").arg("-U").arg(self.socket());
        command.args(filters.iter().map(|filter| format!("--filter={}", module("filters", filter))));
        command.arg(module("plugins", "file")).arg(format!("file={}", self.path().display()));
        command.args(arguments);
        Server::start(command, &self.socket())
    }

    /// qemu-nbd serves it, to any number of clients.
    #[track_caller]
    pub fn by_qemu(&self) -> Server {
        let mut command = tool("qemu-nbd");
        command.args([
            "--persistent",
            "--shared=0",
            "--format=raw",
            "--discard=unmap",
            "--detect-zeroes=off",
        ]);
        command.arg("--socket").arg(self.socket()).arg(self.path());
        Server::start(command, &self.socket())
    }
}

/// nbdkit out of the packages that `./ci/setup` unpacked, with the libraries that it came with.
fn nbdkit() -> Command {
    let tree = tree();
    let mut command = Command::new(tree.join("usr/bin/nbdkit"));
    let folders = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"].map(|folder| tree.join(folder));
    command.env("LD_LIBRARY_PATH", std::env::join_paths(folders).expect("no colon"));
    command
}

fn module(kind: &str, name: &str) -> String {
    let kind_of = kind.strip_suffix('s').expect("plugins or filters");
    let path = format!("usr/lib/x86_64-linux-gnu/nbdkit/{kind}/nbdkit-{name}-{kind_of}.so");
    tree().join(path).to_str().expect("UTF-8").to_owned()
}

fn tree() -> PathBuf {
    let cache = std::env::var_os("SEALBLK_CACHE").map(PathBuf::from);
    cache.unwrap_or_else(|| repository().join("target/ci")).join("nbdkit")
}

/// A server that runs. Killed at drop.
pub struct Server {
    child: Child,
}

impl Server {
    #[track_caller]
    fn start(mut command: Command, socket: &Path) -> Self {
        // A killed one leaves it.
        let _ = std::fs::remove_file(socket);
        command.stdin(Stdio::null());
        tie_to_test(&mut command, vec![]);
        let server = Server { child: command.spawn().expect("start the server; ./ci/setup gets it") };
        wait_for("the server listens", || UnixStream::connect(socket).map(drop));
        server
    }

    /// Ends it as a crash would.
    pub fn crash(mut self) {
        self.kill();
    }

    fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A store with the volume `t`, of 8 MiB, behind the server at this address.
pub fn rig(address: &str, arguments: &[&str]) -> Rig {
    Rig { place: Place::of(Store::new(), &[&["--nbd", address], arguments].concat()) }
}

/// Attaches a volume with these arguments and connects to it, with two rings: a guest that finds this data.
#[track_caller]
pub fn attach(rig: &Rig, sector: usize, data: Vec<u8>, arguments: &[&str]) -> (Host, Writer) {
    let socket = sockets(&rig.place.folder()).join("t.socket");
    let mut command = rig.store().command();
    command.args(["attach", "t", "--queues", "2", "--socket-path"]).arg(&socket).args(arguments);
    let host = rig.place.start(command, vec![]);
    let session = Session::open(&socket, &Options { queues: 2, ..Options::default() });
    let random = Random::new(data.len() as u64 + 1);
    (host, Writer { session: session.expect("it serves a front-end"), data, random, sector })
}

/// What a volume or snapshot that nobody has attached holds, by an export.
#[track_caller]
pub fn content(rig: &Rig, kind: &str, name: &str) -> Vec<u8> {
    let out = rig.place.folder().join("exported.img");
    let _ = std::fs::remove_file(&out);
    rig.store().ok(&[kind, "export", name, out.to_str().expect("UTF-8")]);
    std::fs::read(&out).expect("read what was exported")
}
