//! An attached volume is one process's alone.

use crate::common::attach::{Place, listens, open, read, write};
use crate::common::disk::pattern;
use crate::common::process::tool;
use crate::common::tree::Tree;
use serde_json::Value;
use std::path::Path;
use std::process::Command;

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
