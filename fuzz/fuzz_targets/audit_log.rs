#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| sealblk_fuzz::audit_log::run(data));
