#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| sealblk_fuzz::snapshot_record::run(data));
