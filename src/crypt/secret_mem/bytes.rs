//! A key of a fixed length in secret memory.

use crate::base::Result;
use crate::crypt::secret_mem::SecretMem;

/// `N` bytes in secret memory, wiped at drop. It can be neither cloned nor printed.
pub struct SecretBytes<const N: usize>(SecretMem);

impl<const N: usize> SecretBytes<N> {
    /// Bytes that `fill` writes, where they are; it finds zeros.
    ///
    /// # Errors
    /// As [`SecretMem::new`], and those of `fill`.
    pub fn filled<E: From<crate::base::Error>>(
        fill: impl FnOnce(&mut [u8; N]) -> std::result::Result<(), E>,
    ) -> std::result::Result<Self, E> {
        let mut bytes = SecretBytes(SecretMem::new(N)?);
        fill(bytes.0.as_mut_slice().try_into().expect("it has this length"))?;
        Ok(bytes)
    }

    /// A copy of bytes that stay their owner's to wipe.
    ///
    /// # Errors
    /// As [`SecretMem::new`].
    pub fn copy_of(bytes: &[u8; N]) -> Result<Self> {
        Self::filled(|new| {
            new.copy_from_slice(bytes);
            Ok(())
        })
    }

    /// The bytes.
    pub fn as_array(&self) -> &[u8; N] {
        self.0.as_slice().try_into().expect("it has this length")
    }
}
