//! Whether bytes are all zero, as what was never written is.

/// Whether all bytes are zero; quick to say no, since ciphertext hardly ever begins with eight zero bytes,
/// and quick to say yes, a word at a time.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<8>();
    let word = |bytes: &[u8; 8]| u64::from_ne_bytes(*bytes);
    words.first().is_none_or(|first| word(first) == 0)
        && words.iter().fold(0, |all, w| all | word(w)) == 0
        && rest.iter().all(|&byte| byte == 0)
}
