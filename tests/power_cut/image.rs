//! One state in which a power cut may leave the disk: chosen out of a [`Model`], told apart from
//! others, and put into a folder.

use super::model::{self, Model, Node, SECTOR, Sector};
use super::random::Random;
use super::trace::{Ino, Kind};
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions, Permissions};
use std::hash::{Hash, Hasher};
use std::io;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

/// How much of what is not durable is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Share {
    /// Nothing.
    None,
    /// Everything.
    All,
    /// For each file and folder by chance nothing, everything, or any part.
    Chance,
}

/// Which state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Of files' bytes and lengths.
    pub data: Share,
    /// Of folders' entries.
    pub names: Share,
}

impl Choice {
    /// What every cut is tried with: killed, nothing, and only either.
    pub const EXTREMES: [Choice; 4] = [
        Choice { data: Share::All, names: Share::All },
        Choice { data: Share::None, names: Share::None },
        Choice { data: Share::None, names: Share::All },
        Choice { data: Share::All, names: Share::None },
    ];
    /// By chance.
    pub const CHANCE: Choice = Choice { data: Share::Chance, names: Share::Chance };
}

/// A file, folder or socket.
#[derive(Clone, Debug, Hash)]
struct Part {
    /// Its number in the order of paths: two names of one file have the same.
    number: usize,
    kind: Kind,
    mode: u32,
    len: u64,
    sectors: BTreeMap<u64, Sector>,
}

/// What is where, by path; a folder comes before what is in it.
#[derive(Clone, Debug, Hash)]
pub struct Image(BTreeMap<String, Part>);

impl Image {
    /// A state that the cut may leave.
    pub fn choose(model: &Model, choice: Choice, random: &mut Random) -> Self {
        let (mut image, mut seen) = (Image(BTreeMap::new()), BTreeMap::new());
        image.add_folder(model, model.top(), "", choice, random, &mut seen);
        image
    }

    fn add_folder(
        &mut self,
        model: &Model,
        folder: Ino,
        path: &str,
        choice: Choice,
        random: &mut Random,
        seen: &mut BTreeMap<Ino, Part>,
    ) {
        for (name, ino) in entries(model.node(folder), choice.names, random) {
            let path = if path.is_empty() { name } else { format!("{path}/{name}") };
            let node = model.node(ino);
            let number = seen.len();
            let part = seen.entry(ino).or_insert_with(|| part(node, number, choice.data, random)).clone();
            self.0.insert(path.clone(), part);
            if node.kind == Kind::Folder {
                self.add_folder(model, ino, &path, choice, random, seen);
            }
        }
    }

    /// What tells it from others.
    pub fn fingerprint(&self) -> u64 {
        let mut hasher = std::hash::DefaultHasher::new();
        self.hash(&mut hasher);
        hasher.finish()
    }

    /// Makes it in an empty folder.
    pub fn write(&self, top: &Path) -> io::Result<()> {
        let mut first_names = BTreeMap::new();
        for (path, part) in &self.0 {
            let path = top.join(path);
            match part.kind {
                Kind::Folder => fs::create_dir(&path)?,
                Kind::Socket => drop(std::os::unix::net::UnixListener::bind(&path)?),
                Kind::File => match first_names.get(&part.number) {
                    Some(first) => fs::hard_link(first, &path)?,
                    None => part.write(&path)?,
                },
            }
            fs::set_permissions(&path, Permissions::from_mode(part.mode))?;
            first_names.insert(part.number, path);
        }
        Ok(())
    }

    /// Every path with its length.
    pub fn listing(&self) -> String {
        let line = |(path, part): (&String, &Part)| format!("  {path} {:?} {}\n", part.kind, part.len);
        self.0.iter().map(line).collect()
    }
}

impl Part {
    fn write(&self, path: &Path) -> io::Result<()> {
        let file: File = OpenOptions::new().write(true).create_new(true).open(path)?;
        file.set_len(self.len)?;
        for (number, sector) in &self.sectors {
            let begin = number * SECTOR;
            if let Some(bytes) = sector.as_ref().filter(|_| begin < self.len) {
                file.write_all_at(&bytes[..SECTOR.min(self.len - begin) as usize], begin)?;
            }
        }
        Ok(())
    }
}

fn resolve(share: Share, random: &mut Random) -> Share {
    match share {
        Share::Chance => [Share::None, Share::All, Share::Chance][random.below(3)],
        share => share,
    }
}

/// One of these; the first is the durable one.
fn pick<T: Clone>(versions: &[T], share: Share, random: &mut Random) -> T {
    let last = versions.len() - 1;
    let index = match share {
        Share::None => 0,
        Share::All => last,
        Share::Chance => random.below(versions.len()),
    };
    versions[index].clone()
}

fn part(node: &Node, number: usize, share: Share, random: &mut Random) -> Part {
    let (of_len, of_sectors) = (resolve(share, random), resolve(share, random));
    let mut sectors = node.sectors.clone();
    for number in node.pending.keys() {
        sectors.insert(*number, pick(&node.versions(*number), of_sectors, random));
    }
    sectors.retain(|_, sector| sector.is_some());
    let len = pick(&node.lens, of_len, random);
    Part { number, kind: node.kind, mode: pick(&node.modes, of_len, random), len, sectors }
}

/// A folder's entries: each change is there only if all earlier ones of the same names are.
fn entries(folder: &Node, share: Share, random: &mut Random) -> BTreeMap<String, Ino> {
    let share = resolve(share, random);
    let mut entries = folder.entries.clone();
    let mut lost: Vec<&str> = Vec::new();
    for change in &folder.changes {
        let possible = change.iter().all(|(name, _)| !lost.contains(&name.as_str()));
        let there = match share {
            Share::None => false,
            Share::All => true,
            Share::Chance => random.below(2) == 0,
        };
        if possible && there {
            model::make(&mut entries, change);
        } else {
            lost.extend(change.iter().map(|(name, _)| name.as_str()));
        }
    }
    entries
}
