//! What a copy is going to need, known before it begins; and what it leaves free while it goes on.
//!
//! The need is what is asked of the file systems: the bytes that the layers' files, or an image, may
//! hold data in (`SEEK_DATA`), where the file that is copied into has none yet. So it is an upper
//! bound: what is allocated may be zeros, which take no space, and a file system may compress. Who
//! knows that goes on all the same.
#![forbid(unsafe_code)]

use crate::backing::file::next_data_of;
use crate::base::root::{Root, files};
use crate::base::space::{Reserve, Shortage, Space};
use crate::base::{Context, Error, Kind, Result, size};
use crate::catalog::layout::LayerRecord;
use crate::catalog::{Catalog, VolumeId};
use crate::disk::transfer::CHUNK;
use crate::ops::{space, usage};
use nix::fcntl::OFlag;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How often a copy that waits asks how much space there is: nothing tells.
const LOOK: Duration = Duration::from_millis(200);

/// How much there has to be room for, in bytes, of what is given back behind a copy: the copy waits again and
/// again where that is less, and gets on slowly.
const BEHIND: u64 = 64 << 20;

/// What a copy may use of a file system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Budget {
    /// What it leaves free.
    pub reserve: Reserve,
    /// Whether it begins also where there may be too little.
    pub unchecked: bool,
    /// Whether somebody [follows](crate::ops::flatten::follow) it, and gives back behind it what nothing else
    /// needs.
    pub gives_back: bool,
}

impl Budget {
    /// Looks whether a copy of so many bytes into the store fits.
    ///
    /// # Errors
    /// `NoSpace`, with the numbers.
    pub(super) fn check(self, catalog: &Catalog, need: u64) -> Result<()> {
        self.check_at(&place(catalog.root()), need)
    }

    /// Looks whether a copy of what these layers of the volume `id` hold into `top` fits, or into
    /// a new layer: of layers that nothing else names no more than [`BEHIND`] is there twice
    /// where space is given back.
    ///
    /// # Errors
    /// As for [`Budget::check`]; those of the file system.
    pub(super) fn check_layers(
        self,
        catalog: &Catalog,
        id: VolumeId,
        layers: &[LayerRecord],
        top: Option<&LayerRecord>,
    ) -> Result<()> {
        if let Some(top) = top
            && catalog.is_on_a_device(top.id)?
        {
            // It has the room that it needs.
            return Ok(());
        }
        let need = of_layers(catalog, layers, top)?;
        if !self.gives_back || need == 0 || !space::can_have_holes(catalog, layers.iter().map(|it| it.id))? {
            return self.check(catalog, need);
        }
        let others = usage::of_layers(catalog, &id, layers)?;
        let shared = layers.iter().zip(others).filter(|(_, layer)| !layer.shared_with.is_empty());
        let shared: Vec<LayerRecord> = shared.map(|(layer, _)| *layer).collect();
        let stays = of_layers(catalog, &shared, top)?;
        self.check(catalog, stays.saturating_add(need.saturating_sub(stays).min(BEHIND)))
    }

    /// As [`Budget::check`], for the file system at `path`.
    ///
    /// # Errors
    /// As for that.
    pub(super) fn check_at(self, path: &Path, need: u64) -> Result<()> {
        if self.unchecked || need == 0 {
            return Ok(());
        }
        let space = Space::at(path)?;
        match space.and_then(|space| Shortage::of(&space, self.reserve, need)) {
            None => Ok(()),
            Some(short) => Err(Error::new(Kind::NoSpace, refusal(path, need, short))),
        }
    }
}

/// Where layers lie, which may be on a file system of their own; before there is any,
/// where they are going to.
pub(super) fn place(root: &Root) -> PathBuf {
    let layers = root.layers();
    layers.ancestors().find(|path| files::exists(path)).unwrap_or(root.path()).to_owned()
}

/// Has a copy that goes through this process's hands wait where there is too little space.
pub(super) struct Gate<'a> {
    path: &'a Path,
    reserve: Reserve,
    is_told: bool,
}

impl<'a> Gate<'a> {
    /// For a copy onto the file system at `path`.
    pub(super) fn new(path: &'a Path, reserve: Reserve) -> Self {
        Gate { path, reserve, is_told: false }
    }

    /// Returns when there is space for the next chunk. `goes_on` is asked again and again whether to wait on.
    ///
    /// # Errors
    /// What `goes_on` says; those of the file system.
    pub(super) fn wait(&mut self, goes_on: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        loop {
            let space = Space::at(self.path)?;
            let Some(short) = space.and_then(|space| Shortage::of(&space, self.reserve, CHUNK as u64)) else {
                return Ok(());
            };
            if !std::mem::replace(&mut self.is_told, true) {
                log::warn!("the copy waits: {short}");
            }
            goes_on()?;
            std::thread::sleep(LOOK);
        }
    }
}

fn refusal(path: &Path, need: u64, Shortage { free, reserve }: Shortage) -> String {
    format!(
        "this copies up to {need} bytes ({}), and the file system of {} has {free} bytes free, of which a \
         copy leaves {reserve} (space-reserve): {} are lacking. Make room; or say --skip-space-check, if the \
         file system compresses, or is going to grow: a copy that has no space waits for it",
        size::about(need),
        path.display(),
        size::about(reserve.saturating_add(need).saturating_sub(free)),
    )
}

/// How many bytes have to be written into `top`, or into a new layer, when everything comes up that these
/// layers hold.
///
/// # Errors
/// Those of the file system.
pub(super) fn of_layers(catalog: &Catalog, layers: &[LayerRecord], top: Option<&LayerRecord>) -> Result<u64> {
    let mut above = top.map(|top| open(catalog, std::slice::from_ref(top))).transpose()?;
    let above = above.as_mut().and_then(|above| above.first_mut());
    Ok(bytes_of(&mut open(catalog, layers)?, above)?)
}

/// How many bytes of an open file may hold data.
///
/// # Errors
/// Those of the file system.
pub(super) fn of_file(file: &File) -> Result<u64> {
    Ok(bytes_of(&mut [Runs::of(file.try_clone()?)], None)?)
}

fn open(catalog: &Catalog, layers: &[LayerRecord]) -> Result<Vec<Runs>> {
    let open = |layer: &LayerRecord| {
        if let Some(coming) = catalog.how_far(std::slice::from_ref(layer)) {
            // It may hold something wherever more is to come.
            return Ok(Runs::all(coming.all.min(layer.size)));
        }
        let place = catalog.place(layer)?;
        if place.on_device.is_some() {
            return Ok(Runs::all(layer.size));
        }
        let file = files::open_layer(&place.path, OFlag::O_RDONLY);
        file.map(Runs::of).context(|| format!("look at {}", place.path.display()))
    };
    layers.iter().map(open).collect()
}

/// Where a file may hold data, asked from the beginning to the end.
struct Runs {
    /// None of a device, which does not tell.
    file: Option<File>,
    /// The run that was found last; none after the last one.
    found: Option<Range<u64>>,
}

impl Runs {
    fn of(file: File) -> Self {
        Runs { file: Some(file), found: Some(0..0) }
    }

    /// Of something that may hold data everywhere.
    fn all(size: u64) -> Self {
        Runs { file: None, found: Some(0..size) }
    }

    /// What is left at or after `at` of the next run that ends after it.
    fn after(&mut self, at: u64) -> std::io::Result<Option<Range<u64>>> {
        if self.found.as_ref().is_some_and(|run| run.end <= at) {
            self.found = self.file.as_ref().map(|file| next_data_of(file, at)).transpose()?.flatten();
        }
        Ok(self.found.as_ref().map(|run| run.start.max(at)..run.end))
    }
}

/// How many bytes lie in some of these files, and not in the one `above`.
fn bytes_of(files: &mut [Runs], mut above: Option<&mut Runs>) -> std::io::Result<u64> {
    let (mut at, mut bytes) = (0, 0);
    loop {
        let mut next: Option<Range<u64>> = None;
        for file in &mut *files {
            next = next.into_iter().chain(file.after(at)?).min_by_key(|run| run.start);
        }
        let Some(run) = next else { return Ok(bytes) };
        let there = match &mut above {
            Some(above) => above.after(run.start)?,
            None => None,
        };
        match there {
            Some(there) if there.start <= run.start => at = there.end,
            there => {
                at = there.map_or(run.end, |there| there.start.min(run.end));
                bytes += at - run.start;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    const BLOCK: u64 = 1 << 16;

    fn file(blocks: &[u64]) -> Runs {
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 * BLOCK).unwrap();
        for block in blocks {
            file.write_all_at(&[1; BLOCK as usize], block * BLOCK).unwrap();
        }
        Runs::of(file)
    }

    #[test]
    fn what_lies_in_several_layers_counts_once_and_what_the_top_has_not_at_all() {
        let count = |layers: &[&[u64]], above: Option<&[u64]>| {
            let mut layers: Vec<Runs> = layers.iter().map(|blocks| file(blocks)).collect();
            bytes_of(&mut layers, above.map(file).as_mut()).unwrap() / BLOCK
        };
        assert_eq!(count(&[&[]], None), 0);
        assert_eq!(count(&[&[0, 1, 63]], None), 3);
        assert_eq!(count(&[&[0, 1, 5, 6], &[1, 2, 6, 7], &[30]], None), 7);
        assert_eq!(count(&[&[0, 1, 5, 6], &[1, 2, 6, 7], &[30]], Some(&[])), 7);
        assert_eq!(count(&[&[0, 1, 5, 6], &[1, 2, 6, 7], &[30]], Some(&[1, 6, 7, 8, 30, 31])), 3);
        assert_eq!(count(&[&[4, 5, 6]], Some(&[0, 1, 2, 3, 4, 5, 6, 7])), 0);
    }

    #[test]
    fn what_does_not_fit_is_refused_with_the_numbers() {
        let folder = tempfile::tempdir().unwrap();
        let free = Space::at(folder.path()).unwrap().unwrap().free;
        let budget = Budget { reserve: Reserve::of(free * 2), ..Budget::default() };
        assert!(budget.check_at(folder.path(), 0).is_ok(), "nothing always fits");
        let e = budget.check_at(folder.path(), 4096).unwrap_err();
        assert_eq!(e.kind(), Kind::NoSpace);
        assert!(
            e.to_string().contains("4096 bytes") && e.to_string().contains(&(free * 2).to_string()),
            "{e}"
        );
        assert!(Budget { unchecked: true, ..budget }.check_at(folder.path(), 4096).is_ok());
        assert!(Budget { reserve: Reserve::NONE, ..Budget::default() }.check_at(folder.path(), 1).is_ok());
    }
}
