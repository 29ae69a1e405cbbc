//! Uses every kernel, so that the compiler keeps them.
#![allow(dead_code, unused_imports, missing_docs, reason = "the files are the whole crate's")]

#[path = "../../src/crypt/mod.rs"]
mod crypt;
#[path = "../../src/base/error.rs"]
mod error;
#[path = "../../src/base/prefetch.rs"]
mod prefetch;
mod base {
    pub use crate::error::{Context, Error, Kind, Result};
    pub(crate) use crate::prefetch;
    /// What an error may be made of.
    pub mod root {
        pub mod files {
            #[derive(Debug, thiserror::Error)]
            #[error("here is no file")]
            pub struct Strange;
        }
    }
}

use crypt::xts::{Engine, new_cipher};
use crypt::{Dek, SectorSize};
use vm_memory::VolatileSlice;

fn main() -> base::Result<()> {
    let dek = Dek::from_bytes(&std::array::from_fn::<u8, 64, _>(|i| i as u8))?;
    let (mut data, mut guest) = (vec![1; 1 << 16], vec![0; 1 << 16]);
    for unit in [SectorSize::B512, SectorSize::B4096] {
        for engine in Engine::available() {
            let cipher = new_cipher(engine, &dek, unit)?;
            cipher.encrypt_in_place(&mut data, 8);
            cipher.decrypt_in_place(&mut data, 16);
            let (from, to) = (VolatileSlice::from(&mut data[..]), VolatileSlice::from(&mut guest[..]));
            cipher.decrypt_written(from, to, 8);
        }
    }
    std::hint::black_box((data, guest));
    Ok(())
}
