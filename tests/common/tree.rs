//! Everything that lies in a store, to tell afterwards whether an attempt has changed any of it.

use super::attach::Place;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

#[derive(PartialEq, Eq)]
struct Entry {
    mode: u32,
    inode: u64,
    /// Seconds and nanoseconds.
    modified: (i64, i64),
    links: u64,
    content: Vec<u8>,
}

/// The root and the configuration folder, as they were at one moment. Whose lock it is does not count: the
/// lock files' contents say who tried last, and mean nothing.
pub struct Tree {
    entries: BTreeMap<PathBuf, Entry>,
    events: Vec<u8>,
    /// The audit log; how far it reaches is noted beside the root key.
    audit: Vec<u8>,
}

impl Tree {
    /// How it is now.
    pub fn of(place: &Place) -> Self {
        let mut entries = BTreeMap::new();
        let mut todo = vec![place.store.root(), place.store.config()];
        while let Some(path) = todo.pop() {
            if !fs::symlink_metadata(&path).is_ok_and(|m| m.is_dir()) {
                entries.extend(entry(&path).map(|e| (path, e)));
                continue;
            }
            let names = fs::read_dir(&path).expect("list a folder");
            todo.extend(names.map(|n| n.expect("list a folder").path()));
            entries.extend(entry(&path).map(|e| (path, e)));
        }
        let mut log =
            |name: &str| entries.remove(&place.store.root().join(name)).map_or(Vec::new(), |e| e.content);
        let (events, audit) = (log("events.jsonl"), log("audit.jsonl"));
        entries.retain(|path, _| !is_mark(path));
        for (path, entry) in &mut entries {
            if path.ends_with("lock") && path.starts_with(place.store.root().join("volumes")) {
                (entry.modified, entry.content) = ((0, 0), Vec::new());
            }
        }
        Tree { entries, events, audit }
    }

    /// Nothing is otherwise, except for events that were added, so many, and audit records.
    #[track_caller]
    pub fn assert_unchanged(&self, place: &Place, what: &str, new_events: usize) {
        let now = Tree::of(place);
        let differs = |path: &&PathBuf| self.entries.get(*path) != now.entries.get(*path);
        let all = self.entries.keys().chain(now.entries.keys());
        let changed: Vec<&PathBuf> = all.filter(differs).collect();
        assert!(changed.is_empty(), "{what} has changed {changed:?}");
        assert!(now.audit.starts_with(&self.audit), "{what}: audit records are only added");
        let added = now.events.strip_prefix(&self.events[..]).expect("events are only added");
        let lines = added.iter().filter(|b| **b == b'\n').count();
        assert_eq!(lines, new_events, "{what}: {}", String::from_utf8_lossy(added));
    }
}

fn is_mark(path: &Path) -> bool {
    path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with("audit-"))
}

/// None for what has gone meanwhile.
fn entry(path: &Path) -> Option<Entry> {
    let metadata = fs::symlink_metadata(path).ok()?;
    let content = if metadata.is_file() { fs::read(path).expect("read a file") } else { Vec::new() };
    Some(Entry {
        mode: metadata.mode(),
        inode: metadata.ino(),
        modified: (metadata.mtime(), metadata.mtime_nsec()),
        links: metadata.nlink(),
        content,
    })
}
