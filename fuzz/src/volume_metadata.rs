//! `volume.json`, whoever wrote it.

use sealblk::base::Kind;
use sealblk::catalog::Metadata;
use std::collections::HashSet;

/// Any file.
pub fn run(data: &[u8]) {
    let metadata = match Metadata::from_json(data) {
        Ok(metadata) => metadata,
        Err(e) => return assert_eq!(e.kind(), Kind::Corrupt),
    };
    let unit = u64::from(metadata.sector_size().bytes());
    assert!(metadata.size() > 0 && metadata.size().is_multiple_of(unit));
    assert!(metadata.size() < 1 << 63);

    let keys = metadata.keys();
    let ids: HashSet<_> = metadata.layers().iter().map(|layer| layer.id).collect();
    assert_eq!(ids.len(), metadata.layers().len());
    assert!(metadata.layers().iter().all(|layer| layer.key.is_none_or(|key| key < keys.len())));
    assert_eq!(metadata.is_encrypted(), metadata.top().key.is_some());
    assert!(metadata.is_encrypted() || keys.is_empty());
    assert!(
        keys.iter().all(|key| key.slots().iter().all(|slot| (1..=6144).contains(&slot.wrapped.blob.len())))
    );

    // What is read is written so that it is read alike.
    let again = Metadata::from_json(&metadata.to_json()).expect("reads what it writes");
    assert_eq!(again, metadata);
}
