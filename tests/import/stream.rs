//! Standard input and standard output in place of files.

use crate::common::loop_disk::BareDisk;
use crate::common::patience::{limit, wait_for};
use crate::common::process::wait_within;
use crate::rig::{Rig, files};
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::process::{Child, Output, Stdio};

const LEN: usize = 8 << 20;

#[test]
fn a_pipe_with_a_raw_image_is_imported() {
    for (len, size, arguments) in [
        (LEN, LEN, &[][..]),
        (LEN + 100, LEN + 4096, &["--sector-size", "4096"]),
        (LEN + 512, LEN + 512, &["--unencrypted", "--format", "raw"]),
    ] {
        let rig = Rig::new();
        let data = rig.raw("disk.img", len);
        let import = ["volume", "import", "-", "--name", "v", "--json", "--size", &size.to_string()];
        let Output { status, stdout, stderr } = rig.run_with(&data, &[&import[..], arguments].concat());
        assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
        let made: serde_json::Value = serde_json::from_slice(&stdout).unwrap();
        assert_eq!(made["size"], size);
        rig.assert_holds("v", &data);
        rig.assert_guest_finds("v", &data);
        let blocks: u64 = files(&rig.store.root().join("layers"))
            .iter()
            .map(|layer| fs::metadata(layer).unwrap().blocks() * 512)
            .sum();
        assert!(blocks < 1 << 20, "zeros take no space: {blocks} bytes");
    }
}

#[test]
fn a_pipe_that_has_not_the_size_that_was_said_is_refused() {
    let rig = Rig::new();
    let data = rig.raw("disk.img", LEN);
    for (size, words) in [
        (Some("9MiB"), "ended after 8388608 bytes of 9437184"),
        (Some("8388100"), "8388608 at least"),
        (Some("7MiB"), "more than the volume's 7340032 bytes"),
        (None, "say how long it is going to be: --size"),
    ] {
        let size = size.map_or(vec![], |size| vec!["--size", size]);
        let said = rig.refuse_with(&data, 2, &[&["volume", "import", "-"], &size[..]].concat());
        assert!(said.contains(words), "{said}");
    }
    let said = rig.refuse_with(b"", 2, &["volume", "import", "-", "--size", "1MiB"]);
    assert!(said.contains("ended after 0 bytes"), "{said}");
    rig.assert_nothing_is_left();
}

#[test]
fn a_stream_is_raw_and_nothing_else() {
    let rig = Rig::new();
    let data = rig.raw("disk.img", LEN);
    let import = ["volume", "import", "-", "--size", "8MiB"];
    let refuse = |data: &[u8], arguments: &[&str], words: &str| {
        let said = rig.refuse_with(data, 2, &[&import, arguments].concat());
        assert!(said.contains(words), "{said}");
        rig.assert_nothing_is_left();
    };
    let mut other = data.clone();
    other[..3].copy_from_slice(b"\x1f\x8b\x08");
    refuse(&other, &[], "\"gzip --decompress | sealblk volume import -");
    other[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    refuse(&other, &[], "begins like qcow2");
    other[..8].copy_from_slice(&data[..8]);
    other[LEN - 512..LEN - 504].copy_from_slice(b"conectix");
    refuse(&other, &[], "ends like a VHD");
    refuse(&data, &["--format", "qcow2"], "cannot be read from one end to the other");
    refuse(&data, &["--backing-files"], "leave out --backing-files");
    refuse(&data, &["--in-place"], "only a file");
    let arguments = [&import[..], &["--format", "raw", "--name", "v"]].concat();
    assert!(rig.run_with(&other, &arguments).status.success());
    rig.assert_holds("v", &other);
}

#[test]
fn a_file_on_standard_input_has_its_own_length_from_where_it_stands() {
    let rig = Rig::new();
    let data = rig.raw("disk.img", LEN);
    let run = |arguments: &[&str]| {
        let mut file = File::open(rig.path("disk.img")).unwrap();
        file.seek(SeekFrom::Start(4096)).unwrap();
        rig.store.command().args(["volume", "import", "-"]).args(arguments).stdin(file).output().unwrap()
    };
    assert!(run(&["--name", "v"]).status.success());
    rig.assert_holds("v", &data[4096..]);
    assert!(run(&["--name", "w", "--size", "9MiB"]).status.success());
    rig.assert_holds("w", &data[4096..]);
    assert_eq!(run(&["--size", "4MiB"]).status.code(), Some(2));
}

#[test]
fn a_named_pipe_is_opened_by_a_shell_and_not_by_its_name() {
    let rig = Rig::new();
    let data = rig.raw("disk.img", LEN);
    rig.import(&[&rig.path("disk.img"), "--name", "v"]);
    let pipe = rig.path("pipe");
    nix::unistd::mkfifo(&*pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    // Nobody has its other end, and nobody waits for that.
    for command in [&["volume", "import", &pipe][..], &["volume", "export", "v", &pipe, "--force"]] {
        let said = rig.refuse(2, command);
        assert!(said.contains("standard "), "{said}");
    }
    for name in ["/dev/stdin", "/dev/fd/0", "/proc/self/fd/0"] {
        let said = rig.refuse(2, &["volume", "import", name]);
        assert!(said.contains("is called \"-\""), "{said}");
    }
    let said = rig.refuse(2, &["volume", "export", "v", "/dev/stdout"]);
    assert!(said.contains("write to standard output (\"-\")"), "{said}");
    let made = std::thread::scope(|scope| {
        scope.spawn(|| fs::write(&pipe, &data).unwrap());
        let import = ["volume", "import", "-", "--size", "8MiB", "--name", "w"];
        rig.store.command().args(import).stdin(File::open(&pipe).unwrap()).output().unwrap()
    });
    assert!(made.status.success());
    rig.assert_holds("w", &data);
}

/// Ends a process by a signal; returns what it said.
#[track_caller]
fn interrupt(mut child: Child) -> String {
    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).expect("it runs");
    let status = wait_within(&mut child, limit()).expect("it ends");
    let mut said = String::new();
    child.stderr.take().expect("a pipe").read_to_string(&mut said).expect("UTF-8");
    assert_eq!(status.code(), Some(1), "{said}");
    said
}

#[test]
fn an_import_whose_writer_does_nothing_can_be_interrupted() {
    let rig = Rig::new();
    let data = rig.raw("disk.img", LEN);
    let mut command = rig.store.command();
    command.args(["volume", "import", "-", "--size", "8MiB"]);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut pipe = child.stdin.take().unwrap();
    std::io::Write::write_all(&mut pipe, &data[..1 << 20]).unwrap();
    // It is in the middle when there is a layer.
    wait_for("the import has begun", || match files(&rig.store.root().join("layers")).len() {
        1 => Ok(()),
        n => Err(format!("{n} layers")),
    });
    let said = interrupt(child);
    assert!(said.contains("it was interrupted; nothing of it is left"), "{said}");
    for folder in ["volumes", "layers"] {
        assert!(files(&rig.store.root().join(folder)).is_empty());
    }
}

#[test]
fn standard_output_gets_the_data_and_nothing_else() {
    let rig = Rig::new();
    let data = rig.raw("disk.img", LEN + 512);
    rig.import(&[&rig.path("disk.img"), "--name", "v"]);
    let snapshot = rig.store.ok(&["snapshot", "create", "v"]).trim().to_owned();
    for arguments in [
        &["volume", "export", "v", "-"][..],
        &["volume", "export", "v", "-", "-vv", "--json"],
        &["snapshot", "export", &snapshot, "-"],
    ] {
        let Output { status, stdout, stderr } = rig.store.run(arguments);
        let said = String::from_utf8(stderr).unwrap();
        assert!(status.success() && said.contains("in the clear"), "{said}");
        assert!(stdout == data, "{arguments:?}");
    }
    let log = fs::read_to_string(rig.store.root().join("audit.jsonl")).unwrap();
    assert_eq!(log.matches("\"file\":\"standard output (pipe:[").count(), 3, "{log}");
    assert!(!fs::exists(rig.path("-")).unwrap() && !fs::exists("-").unwrap());
}

#[test]
fn a_file_on_standard_output_has_holes_where_nothing_was() {
    let rig = Rig::new();
    let data = rig.raw("disk.img", LEN);
    rig.import(&[&rig.path("disk.img"), "--name", "v"]);
    let export = |file: File| {
        let output = rig.store.command().args(["volume", "export", "v", "-"]).stdout(file).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    let out = rig.path("out.img");
    export(File::create(&out).unwrap());
    assert!(fs::read(&out).unwrap() == data);
    assert!(fs::metadata(&out).unwrap().blocks() * 512 < 2 << 20, "it is sparse");
    fs::write(&out, "before").unwrap();
    export(File::options().append(true).open(&out).unwrap());
    assert!(fs::read(&out).unwrap() == [b"before", &data[..]].concat());
    // What was there before is no part of the disk.
    fs::write(&out, vec![0xff; LEN + 10]).unwrap();
    export(File::options().write(true).open(&out).unwrap());
    assert!(fs::read(&out).unwrap() == [&data[..], &[0xff; 10]].concat());
}

#[test]
fn an_export_whose_reader_goes_away_fails() {
    let rig = Rig::new();
    rig.raw("disk.img", LEN);
    rig.import(&[&rig.path("disk.img"), "--name", "v"]);
    let mut command = rig.store.command();
    command.args(["volume", "export", "v", "-"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut out = child.stdout.take().unwrap();
    out.read_exact(&mut [0; 10]).unwrap();
    drop(out);
    let Output { status, stderr, .. } = child.wait_with_output().unwrap();
    let said = String::from_utf8(stderr).unwrap();
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("has gone away") && said.contains("not the whole disk"), "{said}");
    let result = &rig.events("exportVolume")[0]["detail"]["result"];
    assert_eq!(result, "failed");
}

#[test]
fn an_export_whose_reader_does_nothing_can_be_interrupted() {
    let rig = Rig::new();
    rig.raw("disk.img", LEN);
    rig.import(&[&rig.path("disk.img"), "--name", "v"]);
    let mut command = rig.store.command();
    command.args(["volume", "export", "v", "-"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // There is more than a pipe holds, so it comes to a stop.
    let out = child.stdout.take().unwrap();
    wait_for("the export has begun", || {
        match poll(&mut [PollFd::new(out.as_fd(), PollFlags::POLLIN)], 0u8).unwrap() {
            1 => Ok(()),
            _ => Err("nothing in the pipe"),
        }
    });
    let said = interrupt(child);
    assert!(said.contains("it was interrupted; what standard output got is not the whole disk"), "{said}");
}

#[test]
fn terminals_and_devices_are_no_streams() {
    let rig = Rig::new();
    rig.raw("disk.img", LEN);
    rig.import(&[&rig.path("disk.img"), "--name", "v"]);
    let run = |arguments: &[&str], input: Stdio, output: Stdio| {
        let mut command = rig.store.command();
        let output = command.args(arguments).stdin(input).stdout(output).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (import, export) = (["volume", "import", "-", "--size", "8MiB"], ["volume", "export", "v", "-"]);
    let mut terminal = File::options();
    terminal.read(true).write(true).custom_flags(OFlag::O_NOCTTY.bits());
    // A pair of its own; opening the other side is what makes this one complete.
    let ours = nix::pty::posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY).unwrap();
    nix::pty::grantpt(&ours).unwrap();
    nix::pty::unlockpt(&ours).unwrap();
    let name = nix::pty::ptsname_r(&ours).unwrap();
    let side = || Stdio::from(terminal.open(&name).unwrap());
    for (code, said) in [run(&import, side(), Stdio::null()), run(&export, Stdio::null(), side())] {
        assert!(code == Some(2) && said.contains("is a terminal"), "{said}");
    }
    let Some(disk) = BareDisk::new(LEN as u64, 512) else { return };
    let mut options = File::options();
    let device = options.read(true).write(true);
    let device = || Stdio::from(device.open(&disk.device).unwrap());
    for (code, said) in [run(&import, device(), Stdio::null()), run(&export, Stdio::null(), device())] {
        assert!(code == Some(2) && said.contains("name the device itself"), "{said}");
    }
    assert!(disk.content().iter().all(|byte| *byte == 0xff));
}
