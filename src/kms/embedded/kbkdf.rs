//! The key derivation of NIST SP 800-108r1 section 4.1: counter mode, HMAC-SHA-256, 32-bit counter before the
//! fixed input.

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use zeroize::Zeroizing;

/// Fills `out` (at most 8160 bytes here: a 32-bit counter would allow more) from `key`.
///
/// The fixed input is Label ‖ 0x00 ‖ Context ‖ [L]₃₂ with L the output's length in bits.
pub(super) fn derive(key: &[u8], label: &[u8], context: &[u8], out: &mut [u8]) {
    let bits = (out.len() as u32) * 8;
    counter_mode(key, &[label, &[0], context, &bits.to_be_bytes()], out);
}

fn counter_mode(key: &[u8], fixed_input: &[&[u8]], out: &mut [u8]) {
    for (block, i) in out.chunks_mut(32).zip(1u32..) {
        let mut mac = <Hmac<Sha256> as KeyInit>::new_from_slice(key).expect("HMAC takes a key of any length");
        mac.update(&i.to_be_bytes());
        for part in fixed_input {
            mac.update(part);
        }
        let output = Zeroizing::new(<[u8; 32]>::from(mac.finalize().into_bytes()));
        block.copy_from_slice(&output[..block.len()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // NIST CAVP, KDF in counter mode: PRF=HMAC_SHA256, CTRLOCATION=BEFORE_FIXED,
    // RLEN=32_BITS, L=128, COUNT=0.
    #[test]
    fn agrees_with_nist_cavp() {
        let key = hex::decode("dd1d91b7d90b2bd3138533ce92b272fbf8a369316aefe242e659cc0ae238afe0").unwrap();
        let fixed = hex::decode(
            "01322b96b30acd197979444e468e1c5c6859bf1b1cf951b7e725303e237e46b864a145fab25e517b08f8683d0315bb2911d80a0e8aba17f3b413faac",
        )
        .unwrap();
        let mut out = [0; 16];
        counter_mode(&key, &[&fixed], &mut out);
        assert_eq!(hex::encode(out), "10621342bfb0fd40046c0e29f2cfdbf0");
    }

    #[test]
    fn counts_on_for_a_second_block_and_binds_the_length() {
        let (mut short, mut long) = ([0; 32], [0; 44]);
        derive(b"key", b"label", b"context", &mut short);
        derive(b"key", b"label", b"context", &mut long);
        assert_ne!(short, long[..32]);
        assert_ne!(long[..12], long[32..]);
    }
}
