//! The processes that a process has started, by the word that each was started with.

use super::patience::wait_for;
use nix::unistd::{Pid, getpgid};
use std::fs;

/// The processes whose parent is `pid`; those that have ended and were not asked for are among them.
pub fn children(pid: Pid) -> Vec<Pid> {
    let names = fs::read_dir("/proc").expect("list the processes").map(|e| e.expect("list").file_name());
    let numbers = names.filter_map(|name| name.to_str()?.parse().ok());
    let is_child = |number: &i32| {
        // One that has ended meanwhile is none.
        let Ok(stat) = fs::read_to_string(format!("/proc/{number}/stat")) else { return false };
        let after_name = stat.rsplit_once(')').expect("a name in parentheses").1;
        after_name.split_whitespace().nth(1) == Some(pid.to_string().as_str())
    };
    numbers.filter(is_child).map(Pid::from_raw).collect()
}

/// Whether a process runs that was started with this word.
pub fn was_started_with(pid: Pid, word: &str) -> bool {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    line.split(|&byte| byte == 0).any(|it| it == word.as_bytes())
}

/// The process below `parent`, or below one of those, that was started with this word.
pub fn find_helper(parent: Pid, word: &str) -> Option<Pid> {
    let mut below = children(parent);
    while let Some(pid) = below.pop() {
        if was_started_with(pid, word) {
            return Some(pid);
        }
        below.extend(children(pid));
    }
    None
}

/// As [`find_helper`], once there is one.
#[track_caller]
pub fn helper(parent: Pid, word: &str) -> Pid {
    wait_for(&format!("a process \"{word}\""), || find_helper(parent, word).ok_or("there is none"))
}

/// What is typed at a terminal to end a process reaches none of those that it has started, of which there are
/// some: they are needed until it has ended.
#[track_caller]
pub fn assert_children_outlive_ctrl_c(pid: Pid) {
    let group = |pid| getpgid(Some(pid)).expect("it is there");
    let children = children(pid);
    assert!(!children.is_empty());
    for child in children {
        let command = fs::read(format!("/proc/{child}/cmdline")).unwrap_or_default();
        assert!(group(child) != group(pid), "{}", String::from_utf8_lossy(&command));
    }
}
