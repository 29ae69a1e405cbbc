//! QEMU's own tools and our locks keep off each other's files.

use sealblk::base::Kind;
use sealblk::image::lock::{Access, ImageLock};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Output, Stdio};

const LEN: u64 = 1 << 20;

fn image() -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(LEN).unwrap();
    file
}

/// `qemu-img COMMAND -f raw IMAGE ARGUMENTS…`
fn qemu_img(command: &str, file: &Path, arguments: &[&str]) -> Output {
    let mut qemu_img = Command::new("qemu-img");
    qemu_img.args([command, "-f", "raw"]).arg(file).args(arguments);
    qemu_img.output().expect("qemu-img, of Debian's qemu-utils, is needed")
}

/// A qemu-io that has the image open, from the answer to its first command until it is dropped.
struct QemuIo {
    child: Child,
    stdin: Option<ChildStdin>,
}

impl QemuIo {
    fn open(options: &[&str], file: &Path) -> Self {
        let mut command = Command::new("qemu-io");
        command.args(["-f", "raw"]).args(options).arg(file);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("qemu-io, of Debian's qemu-utils, is needed");
        let mut stdin = child.stdin.take();
        stdin.as_mut().unwrap().write_all(b"length\n").unwrap();
        let mut answer = String::new();
        let mut stdout = BufReader::new(child.stdout.as_mut().unwrap());
        while !answer.contains("1 MiB") {
            answer.clear();
            assert_ne!(stdout.read_line(&mut answer).unwrap(), 0, "qemu-io ended");
        }
        QemuIo { child, stdin }
    }
}

impl Drop for QemuIo {
    fn drop(&mut self) {
        // The end of its input ends it.
        self.stdin.take();
        let mut rest = String::new();
        let _ = self.child.stdout.as_mut().unwrap().read_to_string(&mut rest);
        let _ = self.child.wait();
    }
}

/// All that look at the data or change the file; `info` does neither with a raw image, and takes no lock.
#[test]
fn qemu_img_is_refused_while_a_layer_is_written() {
    let file = image();
    let lock = ImageLock::acquire(file.path(), Access::ReadWrite).unwrap();
    let elsewhere = file.path().with_extension("copy").display().to_string();
    let commands: [(&str, &[&str]); 3] = [("map", &[]), ("convert", &[&elsewhere]), ("resize", &["2M"])];
    for (command, arguments) in commands {
        let output = qemu_img(command, file.path(), arguments);
        let said = String::from_utf8_lossy(&output.stderr).to_string();
        assert!(!output.status.success() && said.contains("lock"), "{command}: {said}");
    }
    assert_eq!(file.as_file().metadata().unwrap().len(), LEN);
    assert!(!Path::new(&elsewhere).exists());
    drop(lock);
    assert!(qemu_img("map", file.path(), &[]).status.success());
}

#[test]
fn readers_share_a_layer_and_writers_do_not() {
    let file = image();
    let lock = ImageLock::acquire(file.path(), Access::Read).unwrap();
    assert!(qemu_img("map", file.path(), &[]).status.success());
    assert!(!qemu_img("resize", file.path(), &["2M"]).status.success());
    drop(lock);
    assert!(qemu_img("resize", file.path(), &["2M"]).status.success());
}

#[test]
fn a_file_that_qemu_has_open_is_refused() {
    let file = image();
    let writer = QemuIo::open(&[], file.path());
    for access in [Access::Read, Access::ReadWrite] {
        let e = ImageLock::acquire(file.path(), access).unwrap_err();
        assert_eq!(e.kind(), Kind::Busy);
        assert!(e.to_string().contains("is open in QEMU"), "{e}");
    }
    drop(writer);
    let reader = QemuIo::open(&["-r"], file.path());
    assert!(ImageLock::acquire(file.path(), Access::Read).is_ok());
    assert_eq!(ImageLock::acquire(file.path(), Access::ReadWrite).unwrap_err().kind(), Kind::Busy);
    drop(reader);
    assert!(ImageLock::acquire(file.path(), Access::ReadWrite).is_ok());
}

#[test]
fn a_refused_attempt_leaves_no_lock_behind() {
    let file = image();
    let writer = QemuIo::open(&[], file.path());
    assert!(ImageLock::acquire(file.path(), Access::ReadWrite).is_err());
    drop(writer);
    assert!(qemu_img("resize", file.path(), &["2M"]).status.success());
}
