//! An entry of the ledger as bytes: one line of JSON, and a line with its MAC.

use super::{Facts, VolumeFacts};
use hmac::{Hmac, KeyInit, Mac};
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use subtle::ConstantTimeEq;

/// Bytes of the store's key.
pub const KEY_LEN: usize = 32;
/// What the MAC of an entry begins with, so that it is no MAC of anything else.
const DOMAIN: &[u8] = b"sealblk ledger entry 1\0";

/// What an entry says.
pub(super) struct Entry<F> {
    pub(super) number: u64,
    pub(super) accepted: Vec<F>,
}

/// An entry as it is written.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written<T> {
    format: u32,
    number: u64,
    accepted: Vec<T>,
}

impl<F: Facts> Entry<F> {
    /// The entry of `id`, with its MAC.
    pub(super) fn to_bytes(&self, id: &str, key: &[u8; KEY_LEN]) -> Vec<u8> {
        let accepted = self.accepted.iter().map(F::to_written).collect();
        let written = Written { format: self.format(), number: self.number, accepted };
        signed(serde_json::to_vec(&written).expect("strings, numbers and maps of strings"), id, key)
    }

    /// The entry that these bytes are; `None` for what was not written with this key for this id.
    pub(super) fn parse(bytes: &[u8], id: &str, key: &[u8; KEY_LEN]) -> Option<Self> {
        let lines = bytes.strip_suffix(b"\n")?;
        let (body, tag) = lines.split_at(lines.iter().rposition(|&b| b == b'\n')?);
        let tag = hex::decode(&tag[1..]).ok()?;
        if !bool::from(mac(key, id, body).as_slice().ct_eq(&tag)) {
            return None;
        }
        Self::of_body(body, id)
    }

    /// What these bytes say as an entry of this id, whoever wrote them.
    pub(super) fn claim(bytes: &[u8], id: &str) -> Option<Self> {
        Self::of_body(bytes.split(|&b| b == b'\n').next()?, id)
    }

    fn of_body(body: &[u8], id: &str) -> Option<Self> {
        let written: Written<F::Written> = serde_json::from_slice(body).ok()?;
        let accepted = written.accepted.into_iter().map(|facts| F::from_written(facts, id));
        let entry = Entry { number: written.number, accepted: accepted.collect::<Result<_, _>>().ok()? };
        (written.format == entry.format()).then_some(entry)
    }

    /// The version that says all that is in it.
    fn format(&self) -> u32 {
        self.accepted.iter().map(F::format).max().unwrap_or(1)
    }
}

/// A line of JSON with the line that follows it: its MAC, as an entry of `id`.
pub fn signed(mut body: Vec<u8>, id: &str, key: &[u8; KEY_LEN]) -> Vec<u8> {
    let mac = hex::encode(mac(key, id, &body));
    body.extend(format!("\n{mac}\n").bytes());
    body
}

/// What these bytes say as the entry of the volume `id`, written anew; `None` for what is no such entry.
pub fn of_volume(bytes: &[u8], id: &str, key: &[u8; KEY_LEN]) -> Option<Vec<u8>> {
    Some(Entry::<VolumeFacts>::parse(bytes, id, key)?.to_bytes(id, key))
}

/// The MAC of an entry. The id has its length before it, so that no two entries have the same bytes.
fn mac(key: &[u8; KEY_LEN], id: &str, body: &[u8]) -> [u8; 32] {
    let mut mac = <Hmac<Sha256> as KeyInit>::new_from_slice(key).expect("HMAC takes a key of any length");
    mac.update(DOMAIN);
    mac.update(&(id.len() as u64).to_le_bytes());
    mac.update(id.as_bytes());
    mac.update(body);
    mac.finalize().into_bytes().into()
}
