//! What a disk may hold: for every file and folder what is certainly on it, and what was done since, in
//! versions of which a power cut keeps any.
//!
//! The rules are POSIX's at its word, which is stricter than ext4 and XFS are in practice:
//! - Only fsync and fdatasync of a file make its bytes and its length durable, those of that file alone.
//!   (ext4 in its default mode writes a file's data before a rename over another file, and its journal keeps
//!   the order of all metadata.)
//! - A file's fsync says nothing of its name: that takes an fsync of the folder. (ext4 and XFS make a new
//!   file's name durable with it.) A folder's fsync says nothing of what its files hold.
//! - Without a sync, each 512-byte sector of a file is in any of the versions that it had since; so is its
//!   length, and so are the folder's entries; all independently. (File systems extend a length after the
//!   data, and keep the entries' order.)
//! - A sector is written whole or not. A rename is done or not; what it replaces is never missing. One
//!   entry's changes are kept in their order.

use super::trace::{Ino, Kind, Op};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Bytes of a sector.
pub const SECTOR: u64 = 512;
/// A sector's bytes; `None`: zeros.
pub type Sector = Option<Arc<[u8; SECTOR as usize]>>;

/// Changes of entries that are made together: a name, and what it leads to from then on.
pub type Change = Vec<(String, Option<Ino>)>;

/// A file or a folder.
#[derive(Clone)]
pub struct Node {
    /// Which of them.
    pub kind: Kind,
    /// A durable mode, and later ones.
    pub modes: Vec<u32>,
    /// The durable length, and later ones.
    pub lens: Vec<u64>,
    /// The durable sectors; one that is absent is zero.
    pub sectors: BTreeMap<u64, Sector>,
    /// Later versions of sectors.
    pub pending: BTreeMap<u64, Vec<Sector>>,
    /// A folder's durable entries.
    pub entries: BTreeMap<String, Ino>,
    /// Later changes of them.
    pub changes: Vec<Change>,
}

/// The disk.
#[derive(Clone)]
pub struct Model {
    top: Ino,
    nodes: BTreeMap<Ino, Node>,
}

impl Model {
    /// An empty folder, which is there.
    pub fn new(top: Ino) -> Self {
        Model { top, nodes: BTreeMap::from([(top, Node::new(Kind::Folder, 0o700))]) }
    }

    /// The folder that everything is in.
    pub fn top(&self) -> Ino {
        self.top
    }

    /// A file or folder that was made.
    pub fn node(&self, ino: Ino) -> &Node {
        &self.nodes[&ino]
    }

    /// The path of a file as the program sees it now; `?` if it has none.
    pub fn path(&self, ino: Ino) -> String {
        fn search(model: &Model, folder: Ino, wanted: Ino, path: &str) -> Option<String> {
            model.nodes[&folder].current_entries().into_iter().find_map(|(name, ino)| {
                let path = if path.is_empty() { name } else { format!("{path}/{name}") };
                let below =
                    || (model.nodes[&ino].kind == Kind::Folder).then(|| search(model, ino, wanted, &path));
                if ino == wanted { Some(path.clone()) } else { below().flatten() }
            })
        }
        if ino == self.top { ".".into() } else { search(self, self.top, ino, "").unwrap_or("?".into()) }
    }

    /// Does what was done.
    pub fn apply(&mut self, op: &Op) {
        if let Op::Make { ino, kind, mode, .. } = op {
            self.nodes.insert(*ino, Node::new(*kind, *mode));
        }
        let node = self.nodes.get_mut(&op.subject()).expect("it was made before it was used");
        match op {
            Op::Make { name, ino, .. } | Op::Link { name, ino, .. } => {
                node.changes.push(vec![(name.clone(), Some(*ino))]);
            }
            Op::Remove { name, .. } => node.changes.push(vec![(name.clone(), None)]),
            Op::Rename { from, to, .. } => {
                let moved = node.current_entries().get(from).copied();
                // One that a mutant no longer makes cannot be moved either.
                if let Some(ino) = moved {
                    node.changes.push(vec![(to.clone(), Some(ino)), (from.clone(), None)]);
                }
            }
            Op::Write { offset, data, durable, .. } => node.write(*offset, data, *durable),
            Op::SetLen { len, .. } => node.set_len(*len),
            Op::Zero { offset, len, .. } => node.zero(*offset, offset + len),
            Op::Mode { mode, .. } => node.modes.push(*mode),
            Op::Sync { all, .. } => node.sync(*all),
        }
    }
}

impl Node {
    fn new(kind: Kind, mode: u32) -> Self {
        Node {
            kind,
            modes: vec![mode],
            lens: vec![0],
            sectors: BTreeMap::new(),
            pending: BTreeMap::new(),
            entries: BTreeMap::new(),
            changes: Vec::new(),
        }
    }

    fn len(&self) -> u64 {
        self.lens[self.lens.len() - 1]
    }

    /// The versions that a sector may be in, the durable one first.
    pub fn versions(&self, sector: u64) -> Vec<Sector> {
        let durable = self.sectors.get(&sector).cloned().flatten();
        std::iter::once(durable).chain(self.pending.get(&sector).into_iter().flatten().cloned()).collect()
    }

    /// The entries that the program sees.
    pub fn current_entries(&self) -> BTreeMap<String, Ino> {
        let mut entries = self.entries.clone();
        self.changes.iter().for_each(|change| make(&mut entries, change));
        entries
    }

    fn current(&self, sector: u64) -> Sector {
        let last = self.pending.get(&sector).and_then(|versions| versions.last());
        last.or_else(|| self.sectors.get(&sector)).cloned().flatten()
    }

    /// Changes the bytes from `begin` to `end`, sector by sector, by `f(place in the range, bytes)`.
    fn change(&mut self, begin: u64, end: u64, mut f: impl FnMut(u64, &mut [u8])) {
        for sector in begin / SECTOR..end.div_ceil(SECTOR) {
            let (from, to) = (begin.max(sector * SECTOR), end.min((sector + 1) * SECTOR));
            let mut bytes = self.current(sector).map_or([0; SECTOR as usize], |s| *s);
            f(from - begin, &mut bytes[(from - sector * SECTOR) as usize..(to - sector * SECTOR) as usize]);
            let new = bytes.iter().any(|&b| b != 0).then(|| Arc::new(bytes));
            self.pending.entry(sector).or_default().push(new);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8], durable: bool) {
        let end = offset + data.len() as u64;
        self.change(offset, end, |at, bytes| {
            let at = at as usize;
            bytes.copy_from_slice(&data[at..at + bytes.len()]);
        });
        if end > self.len() {
            self.lens.push(end);
        }
        if durable {
            for sector in offset / SECTOR..end.div_ceil(SECTOR) {
                self.settle(sector);
            }
            self.lens = vec![self.len()];
        }
    }

    fn set_len(&mut self, len: u64) {
        let before = self.len();
        if len < before {
            self.zero(len, before);
        }
        self.lens.push(len);
    }

    fn zero(&mut self, begin: u64, end: u64) {
        self.change(begin, end.min(self.len()).max(begin), |_, bytes| bytes.fill(0));
    }

    fn settle(&mut self, sector: u64) {
        let now = self.current(sector);
        self.pending.remove(&sector);
        self.sectors.insert(sector, now);
    }

    fn sync(&mut self, all: bool) {
        let pending: Vec<u64> = self.pending.keys().copied().collect();
        pending.into_iter().for_each(|sector| self.settle(sector));
        self.lens = vec![self.len()];
        self.entries = self.current_entries();
        self.changes.clear();
        if all {
            self.modes = vec![self.modes[self.modes.len() - 1]];
        }
    }
}

/// Makes a change.
pub fn make(entries: &mut BTreeMap<String, Ino>, change: &Change) {
    for (name, ino) in change {
        match ino {
            Some(ino) => entries.insert(name.clone(), *ino),
            None => entries.remove(name),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sync_leaves_one_version() {
        let mut model = Model::new(1);
        let make = Op::Make { folder: 1, name: "a".into(), ino: 2, kind: Kind::File, mode: 0o600 };
        let write = |offset, byte| Op::Write { ino: 2, offset, data: vec![byte; 600], durable: false };
        [make, write(0, 1), write(512, 2)].iter().for_each(|op| model.apply(op));
        let file = model.node(2);
        assert_eq!((file.versions(0).len(), file.versions(1).len(), file.versions(2).len()), (2, 3, 2));
        assert_eq!(file.lens, [0, 600, 1112]);
        model.apply(&Op::Sync { ino: 2, all: false });
        assert_eq!((model.node(2).versions(1).len(), &model.node(2).lens[..]), (1, &[1112][..]));
        assert!(model.node(1).entries.is_empty(), "its name is the folder's");
        model.apply(&Op::Sync { ino: 1, all: true });
        assert_eq!(model.node(1).entries["a"], 2);
    }

    #[test]
    fn what_is_cut_off_is_zero_when_the_file_grows_again() {
        let mut model = Model::new(1);
        let make = Op::Make { folder: 1, name: "a".into(), ino: 2, kind: Kind::File, mode: 0o600 };
        let ops = [
            make,
            Op::Write { ino: 2, offset: 0, data: vec![7; 1024], durable: true },
            Op::SetLen { ino: 2, len: 10 },
            Op::SetLen { ino: 2, len: 1024 },
            Op::Sync { ino: 2, all: true },
        ];
        ops.iter().for_each(|op| model.apply(op));
        let first = model.node(2).versions(0).remove(0).expect("its first bytes are left");
        assert_eq!((first[..10] == [7; 10], first[10..] == [0; 502]), (true, true));
        assert_eq!(model.node(2).versions(1), [None]);
    }
}
