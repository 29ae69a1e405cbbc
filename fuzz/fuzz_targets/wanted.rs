#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| sealblk_fuzz::wanted::run(data));
