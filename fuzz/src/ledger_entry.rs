//! An entry of the ledger: one that lies in the store, and what it says where its MAC is right.

use sealblk::catalog::ledger::entry::{of_volume, signed};

const KEY: [u8; 32] = [7; 32];

/// A volume's id, a zero byte, and the JSON of an entry.
pub fn run(data: &[u8]) {
    let mut parts = data.splitn(2, |byte| *byte == 0);
    let Ok(id) = std::str::from_utf8(parts.next().unwrap_or_default()) else { return };
    let body = parts.next().unwrap_or_default();
    assert_eq!(of_volume(body, id, &KEY), None, "nobody has written this with the key");
    let entry = signed(body.to_vec(), id, &KEY);
    let Some(again) = of_volume(&entry, id, &KEY) else { return };
    // What is read is written so that it is read alike.
    assert_eq!(of_volume(&again, id, &KEY), Some(again.clone()));
    // It is of this volume, with this key, whole.
    assert_eq!(of_volume(&entry, "vol-0123456789abcdef0", &KEY).is_some(), id == "vol-0123456789abcdef0");
    assert_eq!(of_volume(&entry, id, &[8; 32]), None);
    assert_eq!(of_volume(&entry[..entry.len() - 1], id, &KEY), None);
}
