//! `sealblk.toml`: what is written (serde) into what is meant.
