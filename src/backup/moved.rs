//! Whether a volume that was sent by a place has come: an object that whoever is first writes, and that
//! nobody replaces. Whoever receives the volume says so in it, proved by its data key; whoever sends it calls
//! it off. So both never have it.
//!
//! The object of the first snapshot, which is made while the volume is used, is a hint: that a host takes it
//! ahead, and that it has.

use super::object;
use crate::catalog::SnapshotId;
use crate::crypt::BackupKeys;
use crate::place::ObjectName;
use subtle::ConstantTimeEq;

/// The longest such object, in bytes.
pub(crate) const MAX: usize = 1 << 10;
/// What the object says of a volume that was called off.
pub(crate) const WITHDRAWN: &[u8] = b"sealblk move 1 withdrawn\n";
/// What the object of the first snapshot of a volume says while another host takes that ahead.
pub(crate) const COMING: &[u8] = b"sealblk move 1 coming\n";
/// And when that host has it.
pub(crate) const AHEAD: &[u8] = b"sealblk move 1 ahead\n";
/// How it begins when it has come.
const RECEIVED: &str = "sealblk move 1 received ";
/// What the MAC is over begins so, so that it is no MAC of anything else.
const DOMAIN: &str = "sealblk backup received 1\0";

/// The object for the last snapshot of a volume that is sent, or for the first one.
pub(crate) fn moved_of(snapshot: SnapshotId) -> ObjectName {
    object(&format!("moves/{snapshot}"))
}

/// What the object says when the volume has come, to a host that has pulled it as `pulled`; `keys` are those
/// of the snapshot's top layer.
pub(crate) fn received(snapshot: SnapshotId, pulled: SnapshotId, keys: &BackupKeys) -> Vec<u8> {
    let mac = keys.manifest_mac(format!("{DOMAIN}{snapshot} {pulled}").as_bytes());
    format!("{RECEIVED}{pulled} {}\n", hex::encode(mac)).into_bytes()
}

/// Whether somebody who has the data key says that the volume has come.
pub(crate) fn is_received(bytes: &[u8], snapshot: SnapshotId, keys: &BackupKeys) -> bool {
    let text = std::str::from_utf8(bytes).ok().and_then(|text| text.strip_prefix(RECEIVED));
    let pulled = text.and_then(|text| text.split(' ').next()?.parse().ok());
    pulled.is_some_and(|pulled| bytes.ct_eq(&received(snapshot, pulled, keys)).into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypt::Dek;
    use crate::crypt::secret_mem::SecretMem;

    fn keys(first: u8) -> BackupKeys {
        let dek = Dek::from_bytes(&(0..64).map(|n| first.wrapping_add(n)).collect::<Vec<u8>>()).unwrap();
        let mut mem = SecretMem::new(BackupKeys::LEN).unwrap();
        dek.write_backup_keys("vol-0123456789abcdef0", mem.as_mut_slice());
        BackupKeys::from_secret(mem).unwrap()
    }

    #[test]
    fn only_who_has_the_data_key_says_that_a_volume_has_come() {
        let (keys, others) = (keys(1), keys(2));
        let (last, pulled) = (SnapshotId::random(), SnapshotId::random());
        let said = received(last, pulled, &keys);
        assert!(said.len() <= MAX && is_received(&said, last, &keys));
        assert_ne!(said, received(last, SnapshotId::random(), &keys), "another host");
        assert!(!is_received(&said, SnapshotId::random(), &keys));
        assert!(!is_received(&said, last, &others));
        for bad in [WITHDRAWN, b"", &said[..said.len() - 1], &[&said[..], b"x"].concat()] {
            assert!(!is_received(bad, last, &keys));
        }
        let mut edited = said.clone();
        edited[RECEIVED.len() + 6] ^= 1;
        assert!(!is_received(&edited, last, &keys));
    }
}
