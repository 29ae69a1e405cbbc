//! Which engine encrypts: chosen by what the CPU has, or by the operator.
#![forbid(unsafe_code)]

use super::portable::Portable;
use super::{DataUnit, SectorCipher};
use crate::crypt::Dek;
use crate::error::{Error, Kind, Result};
use std::fmt;
use std::str::FromStr;

/// An implementation of the cipher. All give the same bytes; they differ in speed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Engine {
    /// The fastest that this CPU can run.
    #[default]
    Auto,
    /// Safe Rust over the `aes` crate: runs everywhere.
    Portable,
    /// AVX-512 with VAES and VPCLMULQDQ (x86-64: Intel since Ice Lake, AMD since Zen 4).
    Vaes512,
}

impl Engine {
    /// The engines that this CPU can run, fastest first; without `Auto`.
    pub fn available() -> Vec<Engine> {
        [Engine::Vaes512, Engine::Portable].into_iter().filter(|e| e.runs_here()).collect()
    }

    /// Its name, as in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Engine::Auto => "auto",
            Engine::Portable => "portable",
            Engine::Vaes512 => "vaes512",
        }
    }

    fn runs_here(self) -> bool {
        match self {
            Engine::Auto | Engine::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Engine::Vaes512 => super::vaes512::available(),
            #[cfg(not(target_arch = "x86_64"))]
            Engine::Vaes512 => false,
        }
    }
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Engine {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let all = [Engine::Auto, Engine::Portable, Engine::Vaes512];
        all.into_iter().find(|e| e.name() == name).ok_or_else(|| {
            Error::new(Kind::Usage, format!("no cipher engine \"{name}\"; there are auto, portable, vaes512"))
        })
    }
}

/// A cipher under `dek` with data units of `unit`.
///
/// # Errors
/// `Unsupported` when this CPU cannot run `engine`, or when the memory for the round keys cannot be locked.
pub fn new_cipher(engine: Engine, dek: &Dek, unit: DataUnit) -> Result<Box<dyn SectorCipher>> {
    match engine {
        Engine::Auto => new_cipher(Engine::available()[0], dek, unit),
        Engine::Portable => Ok(Box::new(Portable::new(dek, unit)?)),
        Engine::Vaes512 => vaes512(dek, unit)?.ok_or_else(lacking),
    }
}

/// The VAES engine, or `None` where the CPU lacks its instructions.
#[cfg(target_arch = "x86_64")]
fn vaes512(dek: &Dek, unit: DataUnit) -> Result<Option<Box<dyn SectorCipher>>> {
    Ok(super::vaes512::Vaes512::new(dek, unit)?.map(|cipher| Box::new(cipher) as Box<dyn SectorCipher>))
}

#[cfg(not(target_arch = "x86_64"))]
fn vaes512(_: &Dek, _: DataUnit) -> Result<Option<Box<dyn SectorCipher>>> {
    Ok(None)
}

fn lacking() -> Error {
    Error::new(
        Kind::Unsupported,
        "this CPU cannot run the cipher engine vaes512 (it needs AVX-512 F and BW, VAES and VPCLMULQDQ); use auto or portable",
    )
}
