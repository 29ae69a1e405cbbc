//! An attached volume is one process's alone.

use crate::common::attach::{Place, listens, open, read, write};
use crate::common::disk::pattern;
use crate::common::patience::{limit, wait_for};
use crate::common::process::{tie_to_test, tool, wait_within};
use crate::common::tree::Tree;
use sealblk::catalog::lock::{Holder, Purpose, VolumeLock};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

/// Runs one of QEMU's programs, the system's or that of `./ci/setup`, on the layer; whether it
/// succeeded, and what it said.
fn qemu(program: &str, arguments: &[&str], layer: &Path, more: &[&str]) -> (bool, String) {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let is_installed = std::env::split_paths(&path).any(|folder| folder.join(program).is_file());
    let mut command = if is_installed { Command::new(program) } else { tool(program) };
    let output = command.args(arguments).arg(layer).args(more).output().expect("start a tool");
    let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    (output.status.success(), text.concat())
}

#[test]
fn a_second_attach_is_refused_and_told_who_has_it() {
    let place = Place::new(&[]);
    let host = place.attach(&[]);
    let mut session = open(&place.socket());
    write(&mut session.rings[0], 0, &pattern(1, 4096));
    let tree = Tree::of(&place);
    let elsewhere = place.folder().join("second.sock");
    for (socket, more) in [(&elsewhere, &[][..]), (&elsewhere, &["--read-only"]), (&place.socket(), &[])] {
        let mut command = place.store.command();
        command.args(["attach", "t", "--socket-path"]).arg(socket).args(more);
        let said = place.run(command, vec![]);
        assert_eq!(said.code, 4, "{said:?}");
        let words = format!("{} is attached by process {} (since ", place.id(), host.pid());
        assert!(said.err.contains(&words), "{said:?}");
        assert!(said.err.contains(&format!("socket {})", place.socket().display())), "{said:?}");
        assert!(said.err.contains(&format!("\"sealblk detach {}\" ends that", place.id())), "{said:?}");
    }
    assert!(!elsewhere.exists());
    tree.assert_unchanged(&place, "a second attach", 0);
    let shown: Value = serde_json::from_str(&place.store.ok(&["volume", "show", "t", "--json"])).unwrap();
    assert_eq!(
        (&shown["state"], &shown["attached_by"]["pid"]),
        (&"in-use".into(), &host.pid().as_raw().into())
    );
    assert!(read(&mut session.rings[0], 0, 4096) == pattern(1, 4096), "the first goes on");
    host.end();
    place.attach(&[]).end();
}

#[test]
fn two_readers_are_still_two() {
    let place = Place::new(&[]);
    let host = place.attach(&["--read-only"]);
    let mut command = place.store.command();
    command.args(["attach", "t", "--read-only", "--socket-path"]).arg(place.folder().join("second.sock"));
    assert_eq!(place.run(command, vec![]).code, 4);
    host.end();
}

#[test]
fn qemu_tools_are_refused_the_layer_while_it_is_attached() {
    let place = Place::new(&[]);
    let host = place.attach(&[]);
    let mut session = open(&place.socket());
    write(&mut session.rings[0], 0, &pattern(1, 4096));
    let layer = place.layer();
    let tree = Tree::of(&place);
    let copy = place.folder().join("copy").display().to_string();
    let cases: [(&str, &[&str], &[&str]); 5] = [
        ("qemu-img", &["map", "-f", "raw"], &[]),
        ("qemu-img", &["convert", "-f", "raw"], &[&copy]),
        ("qemu-img", &["resize", "-f", "raw"], &["16M"]),
        ("qemu-io", &["-f", "raw", "-r", "-c", "read 0 512"], &[]),
        ("qemu-io", &["-f", "raw", "-c", "write 0 512"], &[]),
    ];
    for (program, arguments, more) in cases {
        let (worked, said) = qemu(program, arguments, &layer, more);
        assert!(!worked && said.contains("lock"), "{program} {arguments:?}: {said}");
    }
    assert!(!Path::new(&copy).exists());
    tree.assert_unchanged(&place, "a tool of QEMU's", 0);
    assert!(read(&mut session.rings[0], 0, 4096) == pattern(1, 4096));
    host.end();
    for (program, arguments, more) in cases {
        let (worked, said) = qemu(program, arguments, &layer, more);
        assert!(worked, "{program} {arguments:?} after the detach: {said}");
    }
}

#[test]
fn readers_may_read_a_layer_that_is_attached_read_only() {
    let place = Place::new(&[]);
    let host = place.attach(&["--read-only"]);
    let (worked, said) = qemu("qemu-io", &["-f", "raw", "-r", "-c", "read 0 512"], &place.layer(), &[]);
    assert!(worked, "{said}");
    let (worked, said) = qemu("qemu-io", &["-f", "raw", "-c", "write 0 512"], &place.layer(), &[]);
    assert!(!worked && said.contains("lock"), "{said}");
    host.end();
}

#[test]
fn an_attached_volume_is_not_deleted() {
    let place = Place::new(&[]);
    let host = place.attach(&[]);
    let tree = Tree::of(&place);
    let output = place.store.run(&["volume", "delete", "t"]);
    let said = crate::common::store::said(&output);
    assert_eq!(output.status.code(), Some(4), "{said}");
    assert!(said.contains(&format!("is attached by process {}", host.pid())), "{said}");
    tree.assert_unchanged(&place, "a refused delete", 0);
    assert!(listens(&place.socket()));
    host.end();
    place.store.ok(&["volume", "delete", "t"]);
}

/// Of commands on one volume, each takes its turn.
#[test]
fn commands_at_one_time_are_done_one_after_the_other() {
    let place = Place::new(&[]);
    place.attach(&[]).end();
    let commands: [&[&str]; 9] = [
        &["snapshot", "create", "t"],
        &["volume", "resize", "t", "16MiB"],
        &["volume", "rewrap", "t", "--key", "alias/aws/ebs"],
        &["volume", "rekey", "t"],
        &["volume", "flatten", "t"],
        &["volume", "tag", "t", "a=b"],
        &["snapshot", "create", "t"],
        &["volume", "rekey", "t"],
        &["volume", "flatten", "t"],
    ];
    for (arguments, (code, said)) in commands.iter().zip(place.store.together(&commands)) {
        assert_eq!(code, 0, "{arguments:?}: {said}");
    }
    let volume = place.metadata();
    // A layer that holds nothing leaves the chain when the next command opens the volume.
    assert!(volume.size() == 16 << 20 && (2..=5).contains(&volume.layers().len()), "{volume:?}");
    place.attach(&[]).end();
}

/// Has the volume as a command does that makes a snapshot, until somebody who wants it has said in a log in
/// `folder` that it waits.
fn until_somebody_waits(place: &Place, folder: &Path) -> impl FnOnce() + Send + use<> {
    let holder = Holder::this_process(Purpose::Snapshot, None).unwrap();
    let lock = VolumeLock::acquire(&place.volume_folder(), place.metadata().id(), &holder).unwrap();
    let folder = folder.to_owned();
    move || {
        wait_for("somebody says that it waits", || {
            let logs = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
            let logs = logs.filter(|path| path.extension().is_some_and(|e| e == "log"));
            let said = logs.map(|log| fs::read_to_string(log).unwrap()).collect::<String>();
            if said.contains("is being made a snapshot of") && said.contains("waited for") {
                Ok(())
            } else {
                Err(said)
            }
        });
        drop(lock);
    }
}

#[test]
fn a_command_that_has_the_volume_for_a_moment_is_waited_for() {
    let place = Place::new(&[]);
    // An attach; its log is in the test's own folder.
    let lets_go = until_somebody_waits(&place, &place.folder());
    let host = std::thread::scope(|threads| {
        threads.spawn(lets_go);
        place.attach(&[])
    });
    host.end();
    let logs = tempfile::tempdir().unwrap();
    for arguments in [&["snapshot", "create", "t"][..], &["volume", "resize", "t", "16MiB"]] {
        let lets_go = until_somebody_waits(&place, logs.path());
        let log = fs::File::create(logs.path().join("it.log")).unwrap();
        let mut command = place.store.command();
        command.args(arguments).stdout(Stdio::null()).stderr(log);
        tie_to_test(&mut command, vec![]);
        let mut child = command.spawn().unwrap();
        lets_go();
        assert!(wait_within(&mut child, limit()).unwrap().success(), "{arguments:?}");
    }
}
