//! Commands that are killed before each of the system calls by which they change files: nothing is lost,
//! nothing is half there, and nothing is left over that `gc` does not find.

use crate::common::killed::{End, killed_before};
use crate::common::rig::Rig;
use crate::common::store::Store;
use std::path::Path;
use std::process::{Command, Stdio};

/// A store that is put back to what it was before each trial.
struct Trials {
    rig: Rig,
}

impl Trials {
    fn new(arguments: &[&str], prepare: impl FnOnce(&Rig)) -> Self {
        let rig = Rig::new(arguments);
        prepare(&rig);
        copy(rig.place.store.root().parent().expect("it lies in a folder"), &saved(&rig.place.store));
        Trials { rig }
    }

    /// Runs `arguments` once for each step at which they can be killed, and `check` afterwards. A step later
    /// than the last must let it succeed.
    fn each_step(&self, arguments: &[&str], check: impl Fn(&Rig, usize)) {
        for step in 0.. {
            assert!(step < 200, "it never ends");
            let mut command = self.rig.place.store.command();
            command.args(arguments).stdout(Stdio::null()).stderr(Stdio::null());
            let end = killed_before(&mut command, step);
            check(&self.rig, step);
            self.assert_tidy(step);
            if end != End::Killed {
                assert_eq!((end, step > 3), (End::Exited(0), true), "step {step}");
                return;
            }
            self.put_back();
        }
    }

    /// Whatever was left over, `gc` removes all of it and nothing else.
    fn assert_tidy(&self, step: usize) {
        let store = &self.rig.place.store;
        store.ok(&["gc"]);
        assert_eq!(self.rig.json(&["gc", "--dry-run"])["left_overs"], serde_json::json!([]), "step {step}");
        self.rig.assert_layers_are_named();
        for volume in self.rig.reader().catalog().ids().expect("list the volumes") {
            let folder = store.root().join("volumes").join(volume.to_string());
            let files = crate::common::rig::files(&folder);
            let known = |p: &std::path::PathBuf| p.ends_with("lock") || p.ends_with("volume.json");
            assert!(files.iter().all(known), "step {step}: {files:?}");
        }
    }

    fn put_back(&self) {
        let (store, saved) = (&self.rig.place.store, saved(&self.rig.place.store));
        // An unencrypted volume needs no KMS, nor its folder.
        for folder in [store.root(), store.config()].iter().filter(|folder| folder.exists()) {
            std::fs::remove_dir_all(folder).expect("remove what the trial left");
            copy(&saved.join(folder.file_name().expect("it has a name")), folder);
        }
    }
}

impl Drop for Trials {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(saved(&self.rig.place.store));
    }
}

fn saved(store: &Store) -> std::path::PathBuf {
    store.root().parent().expect("it lies in a folder").with_extension("saved")
}

fn copy(from: &Path, to: &Path) {
    let status = Command::new("cp").args(["--archive", "--sparse=always"]).args([from, to]).status();
    assert!(status.expect("run cp").success());
}

#[track_caller]
fn assert_whole(rig: &Rig, volume: &str, step: usize) {
    let reader = rig.reader();
    assert!(reader.volume_content(&reader.volume(volume)) == rig.data, "step {step}");
}

/// Every snapshot that is there holds what the volume held.
#[track_caller]
fn assert_snapshots_whole(rig: &Rig, step: usize) -> usize {
    let reader = rig.reader();
    let snapshots = reader.catalog().snapshots().expect("list");
    for entry in &snapshots {
        let snapshot = entry.snapshot.as_ref().unwrap_or_else(|e| panic!("step {step}: {e}"));
        assert!(reader.snapshot_content(snapshot) == rig.data, "step {step}");
    }
    snapshots.len()
}

#[test]
fn a_snapshot_that_is_killed_is_there_or_not_and_loses_nothing() {
    for arguments in [&[][..], &["--unencrypted"]] {
        let trials = Trials::new(arguments, |_| ());
        trials.each_step(&["snapshot", "create", "t"], |rig, step| {
            assert_whole(rig, "t", step);
            assert!(assert_snapshots_whole(rig, step) <= 1);
            // The next one takes the volume as it is, and so does an attach.
            rig.place.store.ok(&["snapshot", "create", "t"]);
            assert!(assert_snapshots_whole(rig, step) >= 1);
            assert_whole(rig, "t", step);
        });
    }
}

#[test]
fn a_clone_that_is_killed_is_there_or_not_and_its_snapshot_stays_whole() {
    let trials = Trials::new(&[], |rig| drop(rig.id(&["snapshot", "create", "t", "--name", "s"])));
    trials.each_step(&["volume", "create", "--snapshot", "s", "--name", "c"], |rig, step| {
        assert_whole(rig, "t", step);
        assert_eq!(assert_snapshots_whole(rig, step), 1);
        let made = rig.reader().catalog().list().expect("list").len() == 2;
        if !made {
            rig.place.store.ok(&["volume", "create", "--snapshot", "s", "--name", "c"]);
        }
        assert_whole(rig, "c", step);
    });
}

#[test]
fn a_volume_whose_resizing_is_killed_has_its_old_size_or_its_new_one() {
    for arguments in [&[][..], &["--unencrypted"]] {
        let trials = Trials::new(arguments, |rig| drop(rig.id(&["snapshot", "create", "t"])));
        trials.each_step(&["volume", "resize", "t", "10MiB"], |rig, step| {
            rig.place.store.ok(&["gc"]);
            let reader = rig.reader();
            let volume = reader.volume("t");
            reader.catalog().check_layers(&volume).unwrap_or_else(|e| panic!("step {step}: {e}"));
            let mut expected = rig.data.clone();
            expected.resize(volume.size() as usize, 0);
            assert!([8 << 20, 10 << 20].contains(&volume.size()), "step {step}");
            assert!(reader.volume_content(&volume) == expected, "step {step}");
            rig.place.store.ok(&["volume", "resize", "t", "10MiB"]);
        });
    }
}

#[test]
fn a_deletion_that_is_killed_takes_nothing_else_along() {
    let prepare = |rig: &Rig| {
        rig.place.store.ok(&["snapshot", "create", "t", "--name", "s"]);
        rig.place.store.ok(&["volume", "create", "--snapshot", "s", "--name", "c"]);
    };
    let trials = Trials::new(&[], prepare);
    trials.each_step(&["snapshot", "delete", "s"], |rig, step| {
        assert!(assert_snapshots_whole(rig, step) <= 1);
        assert_whole(rig, "t", step);
        assert_whole(rig, "c", step);
    });
    let trials = Trials::new(&[], prepare);
    trials.each_step(&["volume", "delete", "t"], |rig, step| {
        assert_eq!(assert_snapshots_whole(rig, step), 1);
        assert_whole(rig, "c", step);
        if rig.reader().catalog().list().expect("list").len() == 2 {
            assert_whole(rig, "t", step);
        }
    });
}
