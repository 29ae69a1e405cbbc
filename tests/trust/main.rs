//! Played from outside against the real program: whoever can write the store, and a host process that is
//! somebody else's by now. Neither has anything done for it that is not its own.

mod audit;
#[path = "../common/mod.rs"]
mod common;
mod files;
mod host_process;
mod import;
mod impostor;
mod keys;
mod ledger;
mod namespaces;
mod owners;
mod pending;
mod printed;
mod records;
mod settings;
mod upgrade;

use common::attach;
use common::patience::limit;
use common::process::{self, wait_within};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

/// The names in a folder.
fn names(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// Changes a record as whoever can write it.
fn edit(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    change(&mut value);
    fs::write(path, serde_json::to_vec_pretty(&value).unwrap()).unwrap();
}

/// Runs a command, which must end; returns its exit code and what it said on both streams.
#[track_caller]
fn ends(mut command: Command) -> (i32, String) {
    let folder = tempfile::tempdir().unwrap();
    let said = folder.path().join("said");
    let output = fs::File::create(&said).unwrap();
    command.stdin(Stdio::null()).stdout(output.try_clone().unwrap()).stderr(output);
    process::tie_to_test(&mut command, vec![]);
    let mut child = command.spawn().unwrap();
    let ended = wait_within(&mut child, limit());
    let _ = child.kill();
    let text = String::from_utf8_lossy(&fs::read(&said).unwrap()).into_owned();
    let status = ended.unwrap_or_else(|e| panic!("{command:?} does not end: {e}: {text}"));
    (status.code().unwrap_or_else(|| panic!("{status}: {text}")), text)
}

/// Runs `sealblk` with these arguments in the store of `place`.
#[track_caller]
fn run(place: &attach::Place, arguments: &[&str]) -> (i32, String) {
    let mut command = place.store.command();
    command.args(arguments);
    ends(command)
}

/// Runs a command that must be refused with this exit code and these words.
#[track_caller]
fn refused(place: &attach::Place, arguments: &[&str], code: i32, words: &str) -> String {
    let (found, said) = run(place, arguments);
    assert_eq!(found, code, "{arguments:?}: {said}");
    assert!(said.contains(words), "{arguments:?}: {said}");
    said
}
