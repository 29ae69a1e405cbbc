//! Which engine encrypts: chosen by what the CPU has, or by the operator.
#![forbid(unsafe_code)]

use crate::base::{Error, Kind, Result};
use crate::crypt::xts::SectorCipher;
#[cfg(any(target_arch = "aarch64", target_arch = "x86_64"))]
use crate::crypt::xts::hardware::Hardware;
use crate::crypt::xts::portable::Portable;
use crate::crypt::{Dek, SectorSize};
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
    /// AES-NI with AVX (x86-64: Intel since Sandy Bridge, AMD since Bulldozer).
    AesNi,
    /// VAES with AVX2 (x86-64: AMD since Zen 3, Intel's Alder Lake and later without AVX-512).
    Vaes256,
    /// VAES and VPCLMULQDQ with AVX-512 (x86-64: Intel since Ice Lake, AMD since Zen 4).
    Vaes512,
    /// The AES instructions of ARMv8's cryptographic extension (64-bit ARM: AWS Graviton, Ampere Altra).
    Armv8,
}

impl Engine {
    const ALL: [Engine; 6] =
        [Engine::Auto, Engine::Portable, Engine::AesNi, Engine::Vaes256, Engine::Vaes512, Engine::Armv8];

    /// The engines that this CPU can run, fastest first; without `Auto`.
    pub fn available() -> Vec<Engine> {
        let all = [Engine::Vaes512, Engine::Vaes256, Engine::AesNi, Engine::Armv8, Engine::Portable];
        all.into_iter().filter(|e| e.runs_here()).collect()
    }

    /// Its name, as in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Engine::Auto => "auto",
            Engine::Portable => "portable",
            Engine::AesNi => "aesni",
            Engine::Vaes256 => "vaes256",
            Engine::Vaes512 => "vaes512",
            Engine::Armv8 => "armv8",
        }
    }

    /// What it needs of a CPU, in words.
    fn needs(self) -> &'static str {
        match self {
            Engine::Auto | Engine::Portable => "nothing",
            Engine::AesNi => "AES-NI and AVX (x86-64)",
            Engine::Vaes256 => "VAES and AVX2 (x86-64)",
            Engine::Vaes512 => "VAES, VPCLMULQDQ and AVX-512 F and BW (x86-64)",
            Engine::Armv8 => "the AES instructions of ARMv8 (64-bit ARM)",
        }
    }

    fn runs_here(self) -> bool {
        match self {
            Engine::Auto | Engine::Portable => true,
            #[cfg(any(target_arch = "aarch64", target_arch = "x86_64"))]
            other => Hardware::is_available(other),
            #[cfg(not(any(target_arch = "aarch64", target_arch = "x86_64")))]
            _ => false,
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
        Self::ALL.into_iter().find(|e| e.name() == name).ok_or_else(|| {
            let names = Self::ALL.map(Engine::name).join(", ");
            Error::new(Kind::Usage, format!("no cipher engine \"{name}\"; there are {names}"))
        })
    }
}

/// A cipher under `dek` with data units of `unit`.
///
/// # Errors
/// `Unsupported` when this CPU cannot run `engine`, or when the memory for the round keys cannot be locked.
pub fn new_cipher(engine: Engine, dek: &Dek, unit: SectorSize) -> Result<Box<dyn SectorCipher>> {
    match engine {
        Engine::Auto => return new_cipher(Engine::available()[0], dek, unit),
        Engine::Portable => return Ok(Box::new(Portable::new(dek, unit)?)),
        #[cfg(any(target_arch = "aarch64", target_arch = "x86_64"))]
        other => {
            if let Some(cipher) = Hardware::new(other, dek, unit)? {
                return Ok(Box::new(cipher));
            }
        }
        #[cfg(not(any(target_arch = "aarch64", target_arch = "x86_64")))]
        _ => {}
    }
    let (name, needs) = (engine.name(), engine.needs());
    let message =
        format!("this CPU cannot run the cipher engine {name}, which needs {needs}; use auto or portable");
    Err(Error::new(Kind::Unsupported, message))
}
