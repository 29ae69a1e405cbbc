//! What a store must hold after a power cut: what somebody was told, and what may or may
//! not have happened since.

use std::collections::{BTreeMap, BTreeSet};

/// Bytes of a sector, as guests flush them.
pub const SECTOR: usize = 512;
/// The seed of a sector of zeros.
pub const ZEROS: u64 = 0;

/// Whether something is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Presence {
    /// It was acknowledged.
    Must,
    /// Its removal was asked for and not acknowledged.
    May,
    /// Its removal was acknowledged.
    MustNot,
}

/// What each sector of a volume may hold: seeds of [`sector`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Content {
    sectors: Vec<Vec<u64>>,
    /// How many of the last ones may not be there: the volume is being made larger.
    more: usize,
}

/// A volume that somebody was told of.
#[derive(Clone, Debug, Hash)]
pub struct Volume {
    /// Whether it is there.
    pub presence: Presence,
    /// What it holds.
    pub content: Content,
    /// The ids of the KMS keys of which one wraps its data key; none: whichever.
    pub wrapped_by: BTreeSet<String>,
    /// What "volume show" may say at some places of its JSON.
    pub shows: BTreeMap<&'static str, BTreeSet<String>>,
}

impl Volume {
    /// One that is there and holds this.
    pub fn with(content: Content) -> Self {
        Volume { presence: Presence::Must, content, wrapped_by: BTreeSet::new(), shows: BTreeMap::new() }
    }
}

/// All of it.
#[derive(Clone, Debug, Default, Hash)]
pub struct Expect {
    /// Volumes by id.
    pub volumes: BTreeMap<String, Volume>,
    /// What the volume holds that is being made, or whose making failed, if there is one.
    pub being_made: Option<Content>,
    /// What the disk image holds that is becoming a volume, if there is one: it is there by its
    /// name, or as that volume.
    pub image: Option<Content>,
    /// Snapshots by id; the content is that of a volume made from it.
    pub snapshots: BTreeMap<String, Volume>,
    /// What the snapshots hold that are being made, by what they are made of.
    pub snapshots_being_made: BTreeMap<String, Content>,
    /// The KMS keys by id, and the states that each may be in.
    pub keys: BTreeMap<String, BTreeSet<String>>,
    /// Whether there may be a key that nobody was told of yet.
    pub key_being_made: bool,
    /// Whether there may be the key that a volume is made under by default.
    pub default_key: bool,
    /// Settings that lay in the store: whether their move was promised, if there were any.
    pub settings_moved: Option<bool>,
    /// Events that must be in the log: the event and the volume or snapshot in its resources or detail.
    pub events: Vec<(String, String)>,
}

impl Content {
    /// So many sectors of zeros.
    pub fn zeros(sectors: usize) -> Self {
        Content { sectors: vec![vec![ZEROS]; sectors], more: 0 }
    }

    /// Its sectors.
    pub fn sectors(&self) -> usize {
        self.sectors.len()
    }

    /// From now on, these sectors, from the first on, may also hold this.
    pub fn may_become(&mut self, first: usize, seeds: &[u64]) {
        for (sector, seed) in self.sectors[first..].iter_mut().zip(seeds) {
            // The newest stands last.
            sector.retain(|s| s != seed);
            sector.push(*seed);
        }
    }

    /// From now on, every sector holds what was written to it last.
    pub fn flush(&mut self) {
        for sector in &mut self.sectors {
            sector.drain(..sector.len() - 1);
        }
    }

    /// From now on there may be so many sectors, the last of which hold zeros.
    pub fn may_grow(&mut self, sectors: usize) {
        self.more = sectors - self.sectors.len();
        self.sectors.resize(sectors, vec![ZEROS]);
    }

    /// From now on those sectors are there.
    pub fn has_grown(&mut self) {
        self.more = 0;
    }

    /// What was written last.
    pub fn newest(&self) -> Self {
        let mut newest = self.clone();
        newest.flush();
        newest
    }

    /// Whether these bytes fit.
    pub fn allows(&self, bytes: &[u8]) -> Result<(), String> {
        let (most, least) = (self.sectors.len(), self.sectors.len() - self.more);
        if ![most, least].contains(&(bytes.len() / SECTOR)) {
            return Err(format!("it has {} bytes instead of {}", bytes.len(), SECTOR * most));
        }
        for (number, (found, seeds)) in bytes.chunks(SECTOR).zip(&self.sectors).enumerate() {
            if !seeds.iter().any(|&seed| found == sector(number, seed)) {
                let what = if found.iter().all(|&b| b == 0) { "zeros" } else { "something else" };
                return Err(format!("sector {number} holds {what} instead of one of the patterns {seeds:?}"));
            }
        }
        Ok(())
    }
}

/// The 512 bytes that a seed means at a sector: so that one in another's place is noticed.
pub fn sector(number: usize, seed: u64) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    if seed != ZEROS {
        let mut numbers = super::random::Random::new(seed.wrapping_mul(1 << 32).wrapping_add(number as u64));
        bytes.chunks_mut(8).for_each(|part| part.copy_from_slice(&numbers.next().to_le_bytes()));
    }
    bytes
}

impl Expect {
    /// A volume is being made that will hold this.
    pub fn making(&mut self, content: Content) {
        self.being_made = Some(content);
    }

    /// It was made, and this is its id.
    pub fn made(&mut self, id: &str) {
        let content = self.being_made.take().expect("a volume is being made");
        self.volumes.insert(id.into(), Volume::with(content));
        self.events.push(("createVolume".into(), id.into()));
    }

    /// A volume's content, to be changed.
    pub fn content(&mut self, id: &str) -> &mut Content {
        &mut self.volumes.get_mut(id).expect("the volume was made").content
    }

    /// A volume comes to be so.
    pub fn volume(&mut self, id: &str, presence: Presence) {
        self.volumes.get_mut(id).expect("the volume was made").presence = presence;
    }

    /// A volume's data key may be wrapped by this KMS key, too, or is by this one alone.
    pub fn wrapped_by(&mut self, id: &str, key: &str, alone: bool) {
        let keys = &mut self.volumes.get_mut(id).expect("the volume was made").wrapped_by;
        keys.retain(|_| !alone);
        keys.insert(key.into());
    }

    /// A volume may show this at a place, too, or shows this alone.
    pub fn shows(&mut self, id: &str, place: &'static str, what: &str, alone: bool) {
        let shown = self.volumes.get_mut(id).expect("the volume was made").shows.entry(place).or_default();
        shown.retain(|_| !alone);
        shown.insert(what.into());
    }

    /// A snapshot comes to be so.
    pub fn snapshot(&mut self, id: &str, presence: Presence) {
        self.snapshots.get_mut(id).expect("the snapshot was made").presence = presence;
    }

    /// A key may be in this state, too.
    pub fn key_may_be(&mut self, id: &str, state: &str) {
        self.keys.entry(id.into()).or_default().insert(state.into());
    }

    /// A key is in this state.
    pub fn key_is(&mut self, id: &str, state: &str) {
        self.keys.insert(id.into(), BTreeSet::from([state.into()]));
    }

    /// Whether a volume's data key can be unwrapped for certain: no KMS key was ever switched off.
    pub fn all_keys_are_enabled(&self) -> bool {
        self.keys.values().all(|states| states.iter().all(|state| state == "Enabled"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_written_since_the_last_flush_may_be_missing() {
        let mut content = Content::zeros(2);
        content.may_become(0, &[1, 1]);
        content.flush();
        content.may_become(1, &[2]);
        let bytes = |a, b| [sector(0, a), sector(1, b)].concat();
        assert!(content.allows(&bytes(1, 1)).is_ok() && content.allows(&bytes(1, 2)).is_ok());
        for wrong in [bytes(0, 1), bytes(1, 0), bytes(2, 2), vec![0; 512]] {
            assert!(content.allows(&wrong).is_err());
        }
        assert!(content.allows(&[sector(1, 1), sector(1, 1)].concat()).is_err(), "of another place");
    }
}
