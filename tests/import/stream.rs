//! Standard output in place of a file.

use crate::common::patience::{limit, wait_for};
use crate::common::process::wait_within;
use crate::rig::Rig;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::process::{Child, Output, Stdio};

const LEN: usize = 8 << 20;

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
