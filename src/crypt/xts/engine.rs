//! Which engine encrypts: chosen by what the CPU has, or by the operator.
#![forbid(unsafe_code)]

#[cfg(target_arch = "x86_64")]
use crate::base::{Error, Kind, Result};
use crate::crypt::xts::SectorCipher;
use crate::crypt::xts::portable::Portable;
use crate::crypt::xts::x86::{Width, X86};
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
}

impl Engine {
    /// The engines that this CPU can run, fastest first; without `Auto`.
    pub fn available() -> Vec<Engine> {
        let all = [Engine::Vaes512, Engine::Vaes256, Engine::AesNi, Engine::Portable];
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
        }
    }

    fn runs_here(self) -> bool {
        match self {
            Engine::Auto | Engine::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Engine::AesNi => Width::Bits128.is_available(),
            #[cfg(target_arch = "x86_64")]
            Engine::Vaes256 => Width::Bits256.is_available(),
            #[cfg(target_arch = "x86_64")]
            Engine::Vaes512 => Width::Bits512.is_available(),
            #[cfg(not(target_arch = "x86_64"))]
            Engine::AesNi | Engine::Vaes256 | Engine::Vaes512 => false,
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
        let all = [Engine::Auto, Engine::Portable, Engine::AesNi, Engine::Vaes256, Engine::Vaes512];
        all.into_iter().find(|e| e.name() == name).ok_or_else(|| {
            let names = all.map(Engine::name).join(", ");
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
        Engine::Auto => new_cipher(Engine::available()[0], dek, unit),
        Engine::Portable => Ok(Box::new(Portable::new(dek, unit)?)),
        #[cfg(target_arch = "x86_64")]
        Engine::AesNi => x86(Width::Bits128, dek, unit),
        #[cfg(target_arch = "x86_64")]
        Engine::Vaes256 => x86(Width::Bits256, dek, unit),
        #[cfg(target_arch = "x86_64")]
        Engine::Vaes512 => x86(Width::Bits512, dek, unit),
        #[cfg(not(target_arch = "x86_64"))]
        Engine::AesNi | Engine::Vaes256 | Engine::Vaes512 => Err(lacking(engine.name(), "x86-64")),
    }
}

/// The engine with registers of this width.
#[cfg(target_arch = "x86_64")]
fn x86(width: Width, dek: &Dek, unit: SectorSize) -> Result<Box<dyn SectorCipher>> {
    match X86::new(width, dek, unit)? {
        Some(cipher) => Ok(Box::new(cipher)),
        None => Err(lacking(width.engine().name(), width.needs())),
    }
}

fn lacking(engine: &str, what: &str) -> Error {
    let message =
        format!("this CPU cannot run the cipher engine {engine}, which needs {what}; use auto or portable");
    Error::new(Kind::Unsupported, message)
}
