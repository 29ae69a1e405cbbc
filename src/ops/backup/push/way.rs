//! How blocks and pages get to the place: what may have changed is read, and what the base has not is put.

use super::Push;
use super::base::Base;
use crate::backup::block::BLOCK;
use crate::backup::manifest::{self, PageEntry, Plane};
use crate::backup::page::{Page, RUN};
use crate::backup::{BLOCKS, ContentName, PAGES};
use crate::base::{Kind, Result};
use crate::disk::transfer::Watch;
use crate::helper::carry::UnderWay;
use crate::ops::backup::Session;
use crate::ops::backup::leases::Held;
use crate::ops::backup::source::{self, Source};
use crate::place::Put;
use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;

/// Objects on their way at a time.
const WINDOW: usize = 12;

/// How the blocks and pages get there.
pub(super) struct Way<'a> {
    push: &'a Push<'a>,
    base: Option<Base>,
    /// Whether an earlier push of the same snapshot was cut off: what is there is not brought again.
    looks_first: bool,
    under_way: VecDeque<UnderWay>,
    pub(super) put_blocks: u64,
    pub(super) put_bytes: u64,
}

impl<'a> Way<'a> {
    pub(super) fn new(push: &'a Push<'a>, base: Option<Base>, looks_first: bool) -> Self {
        Way { push, base, looks_first, under_way: VecDeque::new(), put_blocks: 0, put_bytes: 0 }
    }

    /// Brings everything that the place has not; returns the pages of each plane.
    pub(super) fn bring_all(
        &mut self,
        session: &mut Session,
        lease: &mut Held,
        watch: Watch<'_>,
    ) -> Result<Vec<Plane>> {
        let Push { store, snapshot, planes, .. } = self.push;
        let catalog = store.catalog();
        let size = snapshot.geometry().size();
        let changed = match &self.base {
            Some(base) => base.changed.clone(),
            None => source::blocks_with_data(&catalog, snapshot.layers())?.0,
        };
        let mut source = Source::open(&catalog, snapshot.layers(), planes, size)?;
        let end = manifest::blocks_of(size);
        let blocks = changed.iter().map(|run| run.end.min(end).saturating_sub(run.start)).sum::<u64>();
        let total = blocks * BLOCK as u64;
        let mut progress = Progress { done: 0, total, watch };
        let mut pages = vec![Plane::default(); planes.keys.len()];
        for number in self.page_numbers(&changed) {
            let run = u64::from(number) * RUN..(u64::from(number) + 1) * RUN;
            let changed = within(&changed, &run);
            let made = self.page(session, lease, &mut source, number, &changed, &mut progress)?;
            for (plane, entry) in pages.iter_mut().zip(made) {
                plane.pages.extend(entry.map(|entry| (number, entry)));
            }
        }
        while let Some(next) = self.under_way.pop_front() {
            session.carrier.done(next)?;
        }
        progress.tell()?;
        Ok(pages)
    }

    /// The pages that the snapshot may have.
    fn page_numbers(&self, changed: &[Range<u64>]) -> BTreeSet<u32> {
        let of_run = |run: &Range<u64>| run.start / RUN..run.end.div_ceil(RUN);
        let mut numbers: BTreeSet<u32> =
            changed.iter().flat_map(of_run).filter_map(|n| u32::try_from(n).ok()).collect();
        numbers.extend(self.base.iter().flat_map(|base| &base.pages).flat_map(|plane| plane.pages.keys()));
        // A snapshot that is shorter than its base has not all of them.
        let size = self.push.snapshot.geometry().size();
        numbers.retain(|&n| u64::from(n) * RUN < manifest::blocks_of(size));
        numbers
    }

    /// Brings what has changed in one run of blocks; returns the page of each plane.
    fn page(
        &mut self,
        session: &mut Session,
        lease: &mut Held,
        source: &mut Source,
        number: u32,
        changed: &[Range<u64>],
        progress: &mut Progress<'_>,
    ) -> Result<Vec<Option<PageEntry>>> {
        let base = self.base_pages(number);
        if changed.is_empty() {
            return Ok(base);
        }
        let (first, size) = (u64::from(number) * RUN, self.push.snapshot.geometry().size());
        let end = manifest::blocks_of(size).min(first + RUN);
        let whole = first..end;
        let (mut pages, all) = match self.fetch(session, &base)? {
            Some(mut known) => {
                // What lies beyond the end of a snapshot that is shorter.
                known.iter_mut().for_each(|page| page.0.retain(|&n, _| first + u64::from(n) < end));
                (known, changed)
            }
            None if self.base.is_none() => (self.no_pages(), changed),
            None => (self.no_pages(), std::slice::from_ref(&whole)),
        };
        for block in all.iter().cloned().flatten().filter(|block| *block < end) {
            lease.renew(session)?;
            let objects = source.block(block)?;
            let at = (block - first) as u16;
            for ((page, keys), object) in pages.iter_mut().zip(&self.push.keys).zip(objects) {
                let Some(object) = object else {
                    page.0.remove(&at);
                    continue;
                };
                let name = ContentName::of(keys.name(&object));
                if page.0.insert(at, name) != Some(name) {
                    self.put_blocks += u64::from(self.put(session, name, BLOCKS, &object)?);
                }
            }
            progress.done += BLOCK as u64;
            progress.tell()?;
        }
        let mut entries = Vec::new();
        for ((page, keys), known) in pages.iter().zip(&self.push.keys).zip(base) {
            let Some(bytes) = page.encode() else {
                entries.push(None);
                continue;
            };
            let name = ContentName::of(keys.name(&bytes));
            if known.is_none_or(|known| known.name != name) {
                self.put(session, name, PAGES, &bytes)?;
            }
            entries.push(Some(PageEntry { name, blocks: page.0.len() as u32 }));
        }
        Ok(entries)
    }

    fn no_pages(&self) -> Vec<Page> {
        vec![Page::default(); self.push.keys.len()]
    }

    fn base_pages(&self, number: u32) -> Vec<Option<PageEntry>> {
        match &self.base {
            Some(base) => base.pages.iter().map(|plane| plane.pages.get(&number).copied()).collect(),
            None => vec![None; self.push.keys.len()],
        }
    }

    /// The pages that the base has, proved; none if there is no base, or if one of them is not what it is
    /// named for: then all of the run is read and brought.
    fn fetch(&self, session: &mut Session, base: &[Option<PageEntry>]) -> Result<Option<Vec<Page>>> {
        if self.base.is_none() {
            return Ok(None);
        }
        let mut pages = Vec::new();
        for (entry, keys) in base.iter().zip(&self.push.keys) {
            let Some(entry) = entry else {
                pages.push(Page::default());
                continue;
            };
            match session.page(entry.name, keys) {
                Ok(Some(page)) => pages.push(page),
                Ok(None) => {
                    log::warn!("{} is missing: what it was about is brought anew", entry.name.object(PAGES));
                    return Ok(None);
                }
                Err(e) if e.kind() == Kind::Corrupt => {
                    log::warn!("{e}: what it was about is brought anew");
                    return Ok(None);
                }
                Err(e) => return Err(e),
            }
        }
        Ok(Some(pages))
    }

    /// Begins to put an object, unless it is there; returns whether it is put.
    fn put(&mut self, session: &mut Session, name: ContentName, folder: &str, bytes: &[u8]) -> Result<bool> {
        let object = name.object(folder);
        if self.looks_first && session.carrier.exists(&object)? {
            return Ok(false);
        }
        if self.under_way.len() >= WINDOW
            && let Some(first) = self.under_way.pop_front()
        {
            session.carrier.done(first)?;
        }
        session.brake.wait(bytes.len() as u64);
        // One that has the name has the same bytes, or is damaged.
        self.under_way.push_back(session.carrier.begin_put(&object, bytes, Put::Replace)?);
        self.put_bytes += bytes.len() as u64;
        Ok(true)
    }
}

/// How far it has come, in bytes that were looked at.
struct Progress<'a> {
    done: u64,
    total: u64,
    watch: Watch<'a>,
}

impl Progress<'_> {
    fn tell(&mut self) -> Result<()> {
        (self.watch)(self.done, self.total.max(self.done))
    }
}

/// What of these runs lies in one, as runs.
fn within(runs: &[Range<u64>], one: &Range<u64>) -> Vec<Range<u64>> {
    let first = runs.partition_point(|run| run.end <= one.start);
    let there = runs[first..].iter().take_while(|run| run.start < one.end);
    there.map(|run| run.start.max(one.start)..run.end.min(one.end)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_cut_where_a_page_ends() {
        let runs = [0..3, 10..20, 30..31];
        assert_eq!(within(&runs, &(0..8)), vec![0..3]);
        assert_eq!(within(&runs, &(2..12)), [2..3, 10..12]);
        assert_eq!(within(&runs, &(12..16)), vec![12..16]);
        assert_eq!(within(&runs, &(20..30)), []);
    }
}
