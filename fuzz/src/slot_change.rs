//! A slot that a data key of a volume gets or loses, as a command asks the host process for it.

use sealblk::base::Kind;
use sealblk::catalog::Metadata;
use sealblk::catalog::rewrap::{Rewrapped, SlotChange};
use sealblk::catalog::slots::MAX_SLOTS;
use std::collections::BTreeSet;

/// A volume's record, a zero byte, and changes of its slots, each a line of JSON.
pub fn run(data: &[u8]) {
    let mut parts = data.splitn(2, |byte| *byte == 0);
    let Ok(mut volume) = Metadata::from_json(parts.next().unwrap_or_default()) else { return };
    for line in parts.next().unwrap_or_default().split(|byte| *byte == b'\n') {
        let before = volume.clone();
        let changed = if let Ok(change) = serde_json::from_slice::<SlotChange>(line) {
            volume.change_slot(&change)
        } else if let Ok(new) = serde_json::from_slice::<Rewrapped>(line) {
            volume.rewrap(&new)
        } else {
            continue;
        };
        if let Err(e) = changed {
            assert!(matches!(e.kind(), Kind::Usage | Kind::Busy), "{e}");
            assert_eq!(volume, before, "what is refused changes nothing");
            continue;
        }
        assert_eq!(volume.keys().len(), before.keys().len());
        assert_eq!(volume.layers(), before.layers());
        for (now, was) in volume.keys().iter().zip(before.keys()) {
            // The data key is the same, and there is a way to it.
            assert_eq!(now.check(), was.check());
            assert!((1..=MAX_SLOTS).contains(&now.slots().len()));
            assert!(now.slots().len().abs_diff(was.slots().len()) <= 1);
            let by: BTreeSet<_> = now.slots().iter().map(|slot| slot.kms_key()).collect();
            assert_eq!(by.len(), now.slots().len(), "no KMS key wraps it twice");
            let left = was.slots().iter().filter(|slot| !now.slots().contains(slot)).count();
            assert!(left <= 1, "one slot at a time");
        }
        assert_eq!(Metadata::from_json(&volume.to_json()).expect("reads what it writes"), volume);
    }
}
