//! Replays every input that was kept for the fuzz targets (`fuzz/corpus/<target>/`) through the same code
//! that the fuzzer drives (`ci/fuzz`), so that what fuzzing once found stays found.

#[path = "../../fuzz/src/lib.rs"]
mod fuzz;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// Runs a target over its inputs, an empty one and every input's beginnings among them.
fn replay(target: &str, run: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut files: Vec<_> = folder.read_dir().expect("a corpus").map(|f| f.expect("a file").path()).collect();
    files.sort();
    assert!(!files.is_empty(), "no inputs are kept in {}", folder.display());
    for file in files {
        let input = std::fs::read(&file).expect("an input");
        for len in [input.len(), input.len() / 2, 0] {
            let outcome = catch_unwind(AssertUnwindSafe(|| run(&input[..len])));
            assert!(outcome.is_ok(), "the first {len} bytes of {}", file.display());
        }
    }
}

macro_rules! replayed {
    ($($target:ident)*) => {
        $(#[test]
        fn $target() {
            replay(stringify!($target), fuzz::$target::run);
        })*

        /// A corpus or a target that nobody replays would be forgotten.
        #[test]
        fn every_target_is_replayed() {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/fuzz_targets");
            let name = |f: std::io::Result<std::fs::DirEntry>| f.expect("a file").path().with_extension("");
            let mut there: Vec<_> = folder.read_dir().expect("targets").map(name).collect();
            let mut replayed: Vec<_> = [$(stringify!($target)),*].map(|target| folder.join(target)).into();
            there.sort();
            replayed.sort();
            assert_eq!(there, replayed);
        }
    };
}

replayed! {
    audit_log config_space gate image key_ref kms_blob kms_log kms_records ledger_entry nbd_replies place region_message request session sigv4 slot_change snapshot_record token_answer volume_metadata wanted wire
}
