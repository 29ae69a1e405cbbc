//! Imports that are killed before each of the system calls by which they change files, and
//! that are interrupted.

use crate::common::killed::{End, interrupted_before, killed_before};
use crate::rig::{Rig, files};
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::Stdio;

const LEN: usize = 2 << 20;

/// Kills `arguments` at each step; `check` looks at what is left, and is told whether the volume is there.
fn at_each_step(arguments: &[&str], check: impl Fn(&Rig, &[u8], bool)) {
    for step in 0.. {
        assert!(step < 200, "it never ends");
        let rig = Rig::new();
        let data = rig.raw("disk.img", LEN);
        // The KMS's own steps are not of interest here.
        rig.store.ok(&["key", "create", "--alias", "alias/k"]);
        let mut command = rig.store.command();
        command.args(["volume", "import", &rig.path("disk.img"), "--name", "v"]).args(arguments);
        let end = killed_before(command.stdout(Stdio::null()).stderr(Stdio::null()), step);
        let volumes = files(&rig.store.root().join("volumes"));
        let is_there = volumes.iter().any(|volume| volume.join("volume.json").exists());
        check(&rig, &data, is_there);
        if end != End::Killed {
            assert_eq!((end, is_there, step > 3), (End::Exited(0), true, true), "step {step}");
            return;
        }
    }
}

#[test]
fn an_import_that_is_killed_is_whole_or_not_there() {
    for arguments in [&["--key", "alias/k"][..], &["--unencrypted"]] {
        at_each_step(arguments, |rig, data, is_there| {
            if is_there {
                rig.assert_holds("v", data);
                rig.assert_guest_finds("v", data);
                rig.store.ok(&["volume", "delete", "v"]);
            }
            assert!(fs::read(rig.path("disk.img")).unwrap() == *data);
            rig.assert_nothing_is_left();
            rig.import(&[&[&*rig.path("disk.img"), "--name", "v"], arguments].concat());
            rig.assert_holds("v", data);
        });
    }
}

#[test]
fn an_import_that_is_interrupted_is_whole_or_leaves_nothing() {
    let rig = Rig::new();
    let data = rig.raw("disk.img", 1 << 20);
    rig.store.ok(&["key", "create", "--alias", "alias/k"]);
    let mut interrupted = 0;
    for step in 0.. {
        assert!(step < 200, "it never ends");
        let mut command = rig.store.command();
        command.args(["volume", "import", &rig.path("disk.img"), "--name", "v", "--key", "alias/k"]);
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        let Some(output) = interrupted_before(&mut command, step) else { break };
        if output.status.success() {
            rig.assert_holds("v", &data);
            rig.store.ok(&["volume", "delete", "v"]);
        } else {
            let said = String::from_utf8(output.stderr).unwrap();
            interrupted += u32::from(said.contains("it was interrupted; nothing of it is left"));
            assert!(
                output.status.signal() == Some(15) || output.status.code() == Some(1),
                "step {step}: {said}"
            );
        }
        for folder in ["volumes", "layers"] {
            assert_eq!(files(&rig.store.root().join(folder)), Vec::<PathBuf>::new(), "step {step}");
        }
    }
    assert!(interrupted > 0, "it was interrupted by the signal itself");
    rig.assert_holds("v", &data);
}
