//! The data encryption key of a volume.

/// A volume's 64-byte data encryption key (AES-256-XTS: two AES-256 keys).
pub struct Dek;
