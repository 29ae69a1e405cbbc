//! The header of a block device that holds a layer: whose it is, and a copy of the volume's record, with
//! which another host can take the volume in.
//!
//! The header is there twice, in two slots, and the one with the higher number counts. A slot is written
//! while the other one is whole: a cut leaves the header that was, or the one that was to be.

use crate::backing::device;
use crate::backing::medium::Medium;
use crate::base::{Context, Error, Kind, Result};
use crate::catalog::metadata::{Metadata, written};
use crate::catalog::{LayerId, VolumeId};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::fmt;
use std::ops::Range;
use uuid::Uuid;

/// What each slot begins with.
const MAGIC: &[u8; 16] = b"sealblk device 1";
/// Where the slots begin.
const SLOTS: [u64; 2] = [0, 512 << 10];
/// Bytes of a slot.
const SLOT_LEN: usize = 512 << 10;
/// Bytes before the text: the magic number, the number, the length, the digest.
const TEXT: usize = 16 + 8 + 4 + 32;
/// Bytes that are read first.
const FIRST: usize = 4096;
const FORMAT: u32 = 1;

/// A random number that the store and the device have in common: it says that the store has taken the
/// device, and that no other store has since.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Token(u128);

impl Token {
    /// A new one.
    pub(crate) fn random() -> Self {
        Token(Uuid::new_v4().as_u128())
    }

    pub(super) fn parse(text: &str) -> Result<Self> {
        let number = u128::from_str_radix(text, 16).ok().map(Token);
        number.filter(|token| token.text() == text).ok_or_else(|| {
            Error::new(Kind::Corrupt, format!("{text:?} is no token of a device: 32 hexadecimal digits"))
        })
    }

    fn text(self) -> String {
        self.to_string()
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// What a device says of itself. It is a claim: whoever can write the device has written it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Header {
    /// Which layer lies on the device.
    pub(crate) layer: LayerId,
    /// Which store has it.
    pub(crate) token: Token,
    /// Whether the layer is no volume's top any more, and others may share it.
    pub(crate) frozen: bool,
    /// The volume's record, as it was when it was written last and the layer was its top.
    pub(super) record: Value,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    format: u32,
    layer: LayerId,
    token: String,
    frozen: bool,
    record: Value,
}

/// A header as it was found.
pub(super) struct Found {
    pub(super) header: Header,
    number: u64,
    slot: usize,
}

impl Header {
    /// That of a device which holds the top layer of `volume`.
    pub(crate) fn of_top(volume: &Metadata, token: Token) -> Result<Self> {
        let record = written::read(&volume.to_json())?;
        Ok(Header { layer: volume.top().id, token, frozen: false, record })
    }

    /// Reads it.
    ///
    /// # Errors
    /// `Corrupt` for one that begins like a header and is none that is whole; those of the device.
    pub(crate) fn read(device: &dyn Medium) -> Result<Option<Self>> {
        Ok(Found::read(device)?.map(|found| found.header))
    }

    /// The volume that the device is of, by its record.
    ///
    /// # Errors
    /// `Corrupt` for what is no record of a volume.
    pub(crate) fn volume(&self) -> Result<Metadata> {
        let bytes = written::to_json(&self.record);
        Metadata::from_json(&bytes).context(|| "read the volume's record in the device's header")
    }

    /// The volume's id, for messages.
    pub(crate) fn volume_id(&self) -> Option<VolumeId> {
        self.record.get("id")?.as_str()?.parse().ok()
    }

    /// Writes it, durably, after what was `found` there, if anything was. Of the two slots that is written
    /// first which does not count. The other one follows, so that no copy of a wrapped key stays that the
    /// record does not have any more.
    ///
    /// # Errors
    /// `Unsupported` for a record that is too long for it; those of the device.
    pub(super) fn write(&self, device: &dyn Medium, found: Option<&Found>) -> Result<()> {
        let (number, last) = found.map_or((0, 1), |found| (found.number, found.slot));
        for (n, slot) in [1 - last, last].into_iter().enumerate() {
            let number = number.checked_add(n as u64 + 1).ok_or_else(|| damaged("its number has no next"))?;
            device::write_pages(device, SLOTS[slot], &self.encode(number)?)?;
            device.sync()?;
        }
        Ok(())
    }

    fn encode(&self, number: u64) -> Result<Vec<u8>> {
        let written = Written {
            format: FORMAT,
            layer: self.layer,
            token: self.token.text(),
            frozen: self.frozen,
            record: self.record.clone(),
        };
        let text = written::to_json(&written);
        if text.len() > SLOT_LEN - TEXT {
            let message = format!(
                "the volume's record takes {} bytes, and the header of a device has room for {}",
                text.len(),
                SLOT_LEN - TEXT
            );
            return Err(Error::new(Kind::Unsupported, message));
        }
        let mut slot = Vec::with_capacity(TEXT + text.len());
        slot.extend(MAGIC);
        slot.extend(number.to_le_bytes());
        slot.extend((text.len() as u32).to_le_bytes());
        slot.extend(digest(&slot, &text));
        slot.extend(text);
        Ok(slot)
    }
}

impl Found {
    /// Reads the header that counts.
    ///
    /// # Errors
    /// As [`Header::read`].
    pub(super) fn read(device: &dyn Medium) -> Result<Option<Self>> {
        let slots = [0, 1].map(|slot| slot_of(device, slot)).into_iter().collect::<Result<Vec<_>>>()?;
        let is_ours = slots.iter().any(Option::is_some);
        let whole = slots.into_iter().flatten().flatten();
        match whole.max_by_key(|found| found.number) {
            None if is_ours => Err(damaged("neither of its two copies is whole")),
            found => Ok(found),
        }
    }
}

/// What a slot holds: nothing that begins like one; one that is not whole; or a header.
fn slot_of(device: &dyn Medium, slot: usize) -> Result<Option<Option<Found>>> {
    let first = device::read_pages(device, SLOTS[slot], FIRST).context(|| "read the device's header")?;
    if !first.starts_with(MAGIC) {
        return Ok(None);
    }
    let len = u32::from_le_bytes(first[24..28].try_into().expect("4 bytes")) as usize;
    if len > SLOT_LEN - TEXT {
        return Ok(Some(None));
    }
    let all = match (TEXT + len).next_multiple_of(FIRST) {
        FIRST => first,
        more => device::read_pages(device, SLOTS[slot], more).context(|| "read the device's header")?,
    };
    Ok(Some(parse(&all, TEXT..TEXT + len).map(|(number, header)| Found { header, number, slot })))
}

/// A slot's number and header; none if it is not whole.
fn parse(slot: &[u8], text: Range<usize>) -> Option<(u64, Header)> {
    let number = u64::from_le_bytes(slot[16..24].try_into().ok()?);
    if digest(&slot[..28], &slot[text.clone()])[..] != slot[28..TEXT] {
        return None;
    }
    let written: Written = serde_json::from_slice(&slot[text]).ok()?;
    if written.format != FORMAT {
        return None;
    }
    let token = Token::parse(&written.token).ok()?;
    let Written { layer, frozen, record, .. } = written;
    Some((number, Header { layer, token, frozen, record }))
}

fn digest(before: &[u8], text: &[u8]) -> [u8; 32] {
    let mut digest = Sha256::new();
    digest.update(before);
    digest.update(text);
    digest.finalize().into()
}

fn damaged(how: &str) -> Error {
    Error::new(Kind::Corrupt, format!("the device's header is damaged: {how}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::metadata::Geometry;
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    fn device() -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(2 << 20).unwrap();
        file
    }

    fn volume() -> Metadata {
        let geometry = Geometry::new(1 << 20, Default::default()).unwrap();
        Metadata::new(VolumeId::random(), Some("db".parse().unwrap()), geometry, None)
    }

    fn write(device: &File, header: &Header) {
        header.write(device, Found::read(device).unwrap().as_ref()).unwrap();
    }

    #[test]
    fn what_is_written_is_read_back_and_both_slots_have_it() {
        let (device, volume) = (device(), volume());
        assert_eq!(Header::read(&device).unwrap(), None);
        let header = Header::of_top(&volume, Token::random()).unwrap();
        write(&device, &header);
        assert_eq!(Header::read(&device).unwrap().as_ref(), Some(&header));
        assert_eq!(header.volume().unwrap(), volume);
        assert_eq!(header.volume_id(), Some(volume.id()));
        for slot in SLOTS {
            let other = self::device();
            let bytes = device::read_pages(&device, slot, SLOT_LEN).unwrap();
            other.write_all_at(&bytes, slot).unwrap();
            assert_eq!(Header::read(&other).unwrap().as_ref(), Some(&header), "the slot at {slot}");
        }
        let next = Header { frozen: true, ..header.clone() };
        write(&device, &next);
        assert_eq!(Header::read(&device).unwrap(), Some(next));
        let whole = device::read_pages(&device, 0, 1 << 20).unwrap();
        assert!(!String::from_utf8_lossy(&whole).contains("\"frozen\": false"), "no slot has what was");
    }

    #[test]
    fn a_cut_at_any_page_of_a_write_leaves_the_header_that_was_or_the_next() {
        let (device, volume) = (device(), volume());
        let old = Header::of_top(&volume, Token::random()).unwrap();
        write(&device, &old);
        let next = Header { token: Token::random(), ..old.clone() };
        let before = device::read_pages(&device, 0, 1 << 20).unwrap();
        write(&device, &next);
        let after = device::read_pages(&device, 0, 1 << 20).unwrap();
        // The slot that is written first is the one that does not count.
        let first = if Found::read(&device).unwrap().unwrap().slot == 0 { 1 } else { 0 };
        for torn in 0..2 {
            // The slot that is being written when the power goes has a sector of either, or noise.
            let slot = if torn == 0 { first } else { 1 - first };
            for sector in 0..FIRST / 512 {
                for noise in [false, true] {
                    let cut = self::device();
                    cut.write_all_at(&before, 0).unwrap();
                    if torn == 1 {
                        let at = SLOTS[first] as usize;
                        cut.write_all_at(&after[at..at + SLOT_LEN], SLOTS[first]).unwrap();
                    }
                    let at = SLOTS[slot] as usize + sector * 512;
                    let bytes = if noise { vec![0x5a; 512] } else { after[at..at + 512].to_vec() };
                    cut.write_all_at(&bytes, at as u64).unwrap();
                    let found = Header::read(&cut).unwrap().expect("there is one");
                    let wanted = if torn == 0 { &old } else { &next };
                    let is_whole = found == *wanted || (torn == 0 && found == next);
                    assert!(is_whole, "slot {slot}, sector {sector}, noise {noise}");
                }
            }
        }
    }

    #[test]
    fn a_header_that_is_not_whole_is_no_device_without_one() {
        let device = device();
        write(&device, &Header::of_top(&volume(), Token::random()).unwrap());
        for slot in SLOTS {
            device.write_all_at(&[0xff], slot + 100).unwrap();
        }
        assert_eq!(Header::read(&device).unwrap_err().kind(), Kind::Corrupt);
        device.write_all_at(&u32::MAX.to_le_bytes(), SLOTS[0] + 24).unwrap();
        assert_eq!(Header::read(&device).unwrap_err().kind(), Kind::Corrupt);
    }
}
