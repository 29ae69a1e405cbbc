//! A snapshot's record: one that lies in the store, and one that a host process proposes.

use sealblk::base::Kind;
use sealblk::catalog::snapshot::Wanted;
use sealblk::catalog::{LayerId, Metadata, Snapshot};

/// A volume's record as a command knows it, a zero byte, and the record that its host process proposes.
pub fn run(data: &[u8]) {
    let mut parts = data.splitn(2, |byte| *byte == 0);
    let (before, record) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let snapshot = match Snapshot::from_json(record) {
        Ok(snapshot) => snapshot,
        Err(e) => return assert_eq!(e.kind(), Kind::Corrupt),
    };
    // What is read is written so that it is read alike.
    assert_eq!(Snapshot::from_json(&snapshot.to_json()).expect("reads what it writes"), snapshot);
    let Ok(before) = Metadata::from_json(before) else { return };
    let wanted = Wanted { id: snapshot.id(), layer: LayerId::random(), label: snapshot.label().clone() };
    let other = Wanted { id: sealblk::catalog::SnapshotId::random(), ..wanted.clone() };
    assert!(snapshot.clone().accept(&before, &other).is_err(), "the command has chosen another id");
    match snapshot.accept(&before, &wanted) {
        Err(e) => assert_eq!(e.kind(), Kind::Corrupt),
        Ok(accepted) => {
            assert_eq!(accepted.volume(), before.id());
            assert_eq!(accepted.geometry(), before.geometry());
            let is_known = |layer: &_| before.layers().iter().any(|known| known == layer);
            assert!(accepted.layers().len() <= before.layers().len());
            assert!(accepted.copy_of().is_none());
            // With fewer layers, there may be fewer keys, and other numbers for them.
            let all_there = accepted.layers().len() == before.layers().len();
            assert!(!all_there || accepted.layers().iter().all(is_known));
            assert!(accepted.keys().iter().all(|key| before.keys().contains(key)));
        }
    }
}
