//! Two layers that lie next to one another in every chain become one: what one of them has is moved to the
//! other, and the first holds nothing then. An empty layer costs nothing, and leaves its chain when the next
//! who can seal the record takes it out.
//!
//! Nobody may read a layer that data moves away from without knowing where to. So:
//!
//! - **Down**, from the upper layer to the lower one. What the upper one has, nobody reads in the lower one:
//!   it is copied, and made durable, whoever reads the two meanwhile. Before it is taken out of the upper
//!   one, every host process that serves the two notes in its layer map where the lower one has something
//!   now, and lets go of its image locks; then QEMU's locks tell whether anybody else reads them.
//! - **Up**, from the lower layer to the upper one, a little at a time. The upper one is what everybody reads
//!   first, and half a sector would be taken for a whole one: both are locked, so that nobody reads them.
//!
//! A cut of the power leaves some of it in both, which is the same to read. An empty layer never gets data
//! again: so whoever finds one empty may rely on it.

use super::layer::{LayerFile, WINDOW, WINDOW_SECTORS};
use crate::base::zeros::is_zero;
use crate::base::{Error, Kind, Result};
use crate::catalog::chains::{Chain, Link, Secret};
use crate::catalog::metadata::LayerRecord;
use crate::catalog::{Catalog, LayerId, VolumeId};
use crate::crypt::xts::Engine;
use crate::disk::Cipher;
use crate::host::control::moved::Moving;
use crate::image::lock::{Access, ImageLock};
use crate::virtio::SECTOR_SIZE;
use crate::volume::layers::mask;
use std::collections::HashSet;
use std::ops::Range;

const SECTOR: usize = SECTOR_SIZE as usize;
/// How much is moved down together, in bytes: so much is there twice meanwhile.
const DOWN: u64 = 256 << 20;
/// How much is moved up together, in bytes: so long nobody can open the two.
const UP: u64 = 16 << 20;
/// How many times more than up it may be to move down, where only that can be done while somebody reads.
const DEARER: u64 = 8;

/// Two layers that lie next to one another wherever one of them is named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pair {
    pub(super) upper: Link,
    pub(super) lower: Link,
    /// The volumes that have them.
    pub(super) volumes: Vec<VolumeId>,
}

/// The pairs in these chains, of which at least one layer is one of `of`. What is `empty` is
/// as if it were not there.
pub(super) fn pairs(chains: &[Chain], empty: &HashSet<LayerId>, of: impl Fn(LayerId) -> bool) -> Vec<Pair> {
    let full: Vec<Vec<Link>> = chains
        .iter()
        .map(|chain| chain.links.iter().filter(|link| !empty.contains(&link.id)).copied().collect())
        .collect();
    let mut found: Vec<Pair> = Vec::new();
    for (upper, lower) in full.iter().flat_map(|links| links.windows(2).map(|two| (two[0], two[1]))) {
        let is_new = !found.iter().any(|pair| (pair.upper.id, pair.lower.id) == (upper.id, lower.id));
        // One record at least knows that their bytes mean the same.
        if !is_new || !(of(upper.id) || of(lower.id)) || alike(&upper, &lower) != Some(true) {
            continue;
        }
        let mut volumes = Vec::new();
        let everywhere = chains.iter().zip(&full).all(|(chain, links)| {
            let of_these = |link: &Link| link.id == upper.id || link.id == lower.id;
            if !links.iter().any(of_these) {
                return true;
            }
            volumes.extend(chain.volume);
            let is_frozen = !(chain.is_written && chain.links.first().is_some_and(of_these));
            let two = links.windows(2).find(|two| (two[0].id, two[1].id) == (upper.id, lower.id));
            let is_so = two.is_some_and(|two| alike(&two[0], &two[1]) != Some(false));
            is_frozen && is_so && !chain.is_hydrating
        });
        if everywhere {
            found.push(Pair { upper, lower, volumes });
        }
    }
    found
}

/// Whether bytes of the one can be made bytes of the other without a key; none if the record does not know:
/// nobody has had its data keys in hands yet.
fn alike(upper: &Link, lower: &Link) -> Option<bool> {
    let secrets = match (upper.secret, lower.secret) {
        (Secret::Unproved, Secret::Unproved) => None,
        (Secret::Key(a), Secret::Key(b)) => Some(a == b),
        (Secret::Mask, Secret::Mask | Secret::Plain) => Some(true),
        _ => Some(false),
    };
    if upper.unit == lower.unit { secrets } else { Some(false) }
}

/// Which way data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    Down,
    Up,
    /// In no way now: it would be much more than when nobody reads the two.
    Later,
}

/// Which way moves less, and how many bytes.
pub(super) fn cheaper(
    upper: &LayerFile,
    lower: &LayerFile,
    is_served: bool,
    is_pressing: bool,
) -> Result<(Way, u64)> {
    let (down, up) = (upper.data_bytes()?, lower.data_bytes()?);
    // Nothing may lie beyond the lower one's end.
    let fits = upper.next_data(lower.size)?.is_none();
    Ok(match (is_served, fits) {
        (false, true) if down <= up => (Way::Down, down),
        (false, _) => (Way::Up, up),
        (true, true) if is_pressing || down <= up.saturating_mul(DEARER) => (Way::Down, down),
        (true, _) => (Way::Later, 0),
    })
}

/// A merge that is under way.
pub(super) struct Merge<'a> {
    pub(super) catalog: &'a Catalog,
    pub(super) pair: &'a Pair,
    pub(super) upper: &'a LayerFile,
    pub(super) lower: &'a LayerFile,
    /// Those of the pair's volumes that are attached.
    pub(super) served: &'a [VolumeId],
}

impl Merge<'_> {
    /// Moves all that the upper layer has into the lower one. `tell` is told of bytes that were moved,
    /// and ends it with an error.
    ///
    /// # Errors
    /// `Busy` if somebody else reads the two: what was moved by then is moved.
    pub(super) fn down(&self, tell: &mut dyn FnMut(u64) -> Result<()>) -> Result<()> {
        let copy = Copy::between(&self.pair.upper, &self.pair.lower)?;
        let mut from = 0;
        while let Some(run) = next_run(self.upper, from, DOWN)? {
            copy.all(self.upper, self.lower, &run, false, tell)?;
            self.lower.sync()?;
            self.unread(&run, || self.upper.punch(run.clone()))?;
            from = run.end;
        }
        Ok(())
    }

    /// Moves all that the lower layer has, and the upper one has not, into the upper one; `tell` as for
    /// [`Merge::down`].
    ///
    /// # Errors
    /// As for [`Merge::down`].
    pub(super) fn up(&self, tell: &mut dyn FnMut(u64) -> Result<()>) -> Result<()> {
        let copy = Copy::between(&self.pair.lower, &self.pair.upper)?;
        let mut from = 0;
        while let Some(run) = next_run(self.lower, from, UP)? {
            let locks = self.lock()?;
            let mut moved = 0;
            copy.all(self.lower, self.upper, &run, true, &mut |bytes| {
                moved += bytes;
                Ok(())
            })?;
            self.upper.sync()?;
            self.lower.punch(run.clone())?;
            drop(locks);
            tell(moved)?;
            from = run.end;
        }
        Ok(())
    }

    /// Has `change` done while nobody reads the two who does not know of these bytes.
    fn unread(&self, bytes: &Range<u64>, change: impl FnOnce() -> Result<()>) -> Result<()> {
        let mut told = Vec::new();
        for &volume in self.served {
            let (upper, lower) = (self.upper.id, self.lower.id);
            told.push(Moving::tell(self.catalog, volume, upper, lower, bytes.clone())?);
        }
        let done = self.lock().and_then(|locks| change().map(|()| drop(locks)));
        // They lock the two again.
        told.into_iter().try_for_each(Moving::end).and(done)
    }

    fn lock(&self) -> Result<[ImageLock; 2]> {
        let lock =
            |layer: &LayerFile| ImageLock::acquire(&self.catalog.layer_path(layer.id), Access::ReadWrite);
        Ok([lock(self.upper)?, lock(self.lower)?])
    }
}

/// From the next byte at or after `from` that may be something, as far as `most` bytes of
/// data go, in whole windows.
fn next_run(layer: &LayerFile, from: u64, most: u64) -> Result<Option<Range<u64>>> {
    let Some(first) = layer.next_data(from)? else { return Ok(None) };
    let start = first.start - first.start % WINDOW;
    let (mut end, mut bytes) = (start, 0);
    while bytes < most {
        let Some(data) = layer.next_data(end)? else { break };
        let at = data.start - data.start % WINDOW;
        end = at + WINDOW;
        bytes += WINDOW;
    }
    Ok(Some(start..end.min(layer.size)))
}

/// How bytes of one layer become bytes of another.
struct Copy {
    from: Cipher,
    to: Cipher,
    unit: usize,
}

impl Copy {
    fn between(from: &Link, to: &Link) -> Result<Self> {
        let cipher = |link: &Link| match link.secret {
            Secret::Mask => {
                let layer = LayerRecord { id: link.id, key: None, masked: true, size: link.size };
                mask(&layer, Engine::Auto, link.unit)
            }
            // Under one key, a sector is the same bytes in every layer.
            Secret::Key(_) | Secret::Plain => Ok(None),
            Secret::Unproved => Err(Error::new(Kind::Other, "nobody knows its data key")),
        };
        Ok(Copy { from: cipher(from)?, to: cipher(to)?, unit: from.unit.bytes() as usize })
    }

    /// Copies what `from` has in these bytes to `to`: only what that has not, if so said.
    fn all(
        &self,
        from: &LayerFile,
        to: &LayerFile,
        bytes: &Range<u64>,
        only_missing: bool,
        tell: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<()> {
        let mut room = vec![0; WINDOW as usize];
        let mut there = vec![0; if only_missing { WINDOW as usize } else { 0 }];
        let mut at = bytes.start;
        while let Some(data) = from.next_data(at)?.filter(|data| data.start < bytes.end) {
            at = data.start.max(at);
            at -= at % WINDOW;
            from.read(at, &mut room)?;
            let mut wanted: Vec<bool> = room.chunks(SECTOR).map(|sector| !is_zero(sector)).collect();
            if only_missing {
                let mut has = vec![false; WINDOW_SECTORS];
                to.add_sectors(at, &mut there, &mut has)?;
                wanted.iter_mut().zip(has).for_each(|(wanted, has)| *wanted &= !has);
            }
            self.transform(&mut room, at);
            let mut written = 0;
            let mut first = 0;
            while let Some(start) = (first..WINDOW_SECTORS).find(|&i| wanted[i]) {
                first = (start..WINDOW_SECTORS).find(|&i| !wanted[i]).unwrap_or(WINDOW_SECTORS);
                to.write(at + (start * SECTOR) as u64, &room[start * SECTOR..first * SECTOR])?;
                written += ((first - start) * SECTOR) as u64;
            }
            tell(written)?;
            at += WINDOW;
        }
        Ok(())
    }

    /// The bytes of a window as the other layer has them. In data units of which a layer has only some
    /// sectors, the others come out as noise, and are not copied: XTS treats each 16 bytes by themselves.
    fn transform(&self, window: &mut [u8], at: u64) {
        debug_assert!(window.len().is_multiple_of(self.unit));
        if let Some(cipher) = &self.from {
            cipher.decrypt_in_place(window, at / SECTOR_SIZE);
        }
        if let Some(cipher) = &self.to {
            cipher.encrypt_in_place(window, at / SECTOR_SIZE);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypt::SectorSize;

    const KEY: Secret = Secret::Key([7; 16]);

    fn link(id: LayerId, secret: Secret) -> Link {
        Link { id, size: 4096, unit: SectorSize::B512, secret }
    }

    fn chain(volume: bool, links: &[Link]) -> Chain {
        let volume = volume.then(VolumeId::random);
        Chain { volume, links: links.to_vec(), is_written: volume.is_some(), is_hydrating: false }
    }

    fn found(chains: &[Chain], empty: &[LayerId]) -> Vec<(LayerId, LayerId)> {
        let empty = empty.iter().copied().collect();
        let ids = |pair: Pair| (pair.upper.id, pair.lower.id);
        pairs(chains, &empty, |_| true).into_iter().map(ids).collect()
    }

    #[test]
    fn layers_that_no_record_tells_apart_are_a_pair() {
        let [top, a, b, c] = std::array::from_fn(|_| link(LayerId::random(), KEY));
        let volume = chain(true, &[top, a, b, c]);
        assert_eq!(found(std::slice::from_ref(&volume), &[]), [(a.id, b.id), (b.id, c.id)]);
        assert_eq!(found(&[volume.clone(), chain(false, &[a, b, c])], &[]), [(a.id, b.id), (b.id, c.id)]);
        assert_eq!(found(&[volume.clone(), chain(false, &[b, c])], &[]), [(b.id, c.id)]);
        assert_eq!(found(&[volume.clone(), chain(false, &[b, c]), chain(false, &[c])], &[]), []);
        // Over what is empty.
        assert_eq!(found(std::slice::from_ref(&volume), &[b.id]), [(a.id, c.id)]);
        let [other, above] = std::array::from_fn(|_| link(LayerId::random(), KEY));
        assert_eq!(found(&[volume.clone(), chain(true, &[other, b, c])], &[]), [(b.id, c.id)]);
        assert_eq!(found(&[volume.clone(), chain(false, &[above, b, c])], &[above.id]), [(b.id, c.id)]);
        // A clone that nobody has attached does not know whether their keys are the same;
        // another record does.
        let unknown = [other, b, c].map(|link| Link { secret: Secret::Unproved, ..link });
        assert_eq!(found(&[volume.clone(), chain(true, &unknown)], &[]), [(b.id, c.id)]);
        let contrary = [other, Link { secret: Secret::Key([9; 16]), ..b }, c];
        assert_eq!(found(&[volume.clone(), chain(true, &contrary)], &[]), []);
        let copied_up = Chain { is_hydrating: true, ..volume };
        assert_eq!(found(&[copied_up], &[]), []);
    }

    #[test]
    fn layers_under_different_keys_are_none() {
        let secrets = [KEY, Secret::Key([8; 16]), Secret::Unproved, Secret::Mask, Secret::Plain];
        let mut alike = Vec::new();
        for upper in secrets {
            for lower in secrets {
                let [top, a, b] = [KEY, upper, lower].map(|secret| link(LayerId::random(), secret));
                if !found(&[chain(true, &[top, a, b])], &[]).is_empty() {
                    alike.push((upper, lower));
                }
            }
        }
        let other = Secret::Key([8; 16]);
        let expected =
            [(KEY, KEY), (other, other), (Secret::Mask, Secret::Mask), (Secret::Mask, Secret::Plain)];
        assert_eq!(alike, expected);
    }
}
