//! Wrapped keys: any bytes, and what was sealed with something changed.

use super::input::Input;
use sealblk::kms::embedded::blob::{Blob, HEADER_LEN, Material, PLAINTEXT_MAX, TAG_LEN, open, seal};
use sealblk::kms::{EncryptionContext, KmsError};
use std::collections::BTreeMap;
use std::sync::LazyLock;
use uuid::Uuid;

static MATERIAL: LazyLock<Material> = LazyLock::new(|| Material::copy_of(&[7; 32]).expect("locked memory"));

/// Any blob; or a plaintext and two contexts, sealed under the first and opened under the second, with
/// one byte changed or none.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let material = &*MATERIAL;
    if input.coin() {
        return any(material, input.rest());
    }
    let (sealed_for, opened_for) = (context(&mut input), context(&mut input));
    let (at, change) = (usize::from(input.u16()), input.u8());
    let plaintext = input.bytes(PLAINTEXT_MAX);
    if plaintext.is_empty() {
        return;
    }
    let (key, version) = (Uuid::from_u128(1), Uuid::from_u128(2));
    let mut bytes = seal(material, key, version, plaintext, &sealed_for).expect("sealed");
    assert_eq!(bytes.len(), HEADER_LEN + plaintext.len() + TAG_LEN);
    let at = at % bytes.len();
    bytes[at] ^= change;
    let opened = Blob::parse(&bytes).and_then(|blob| open(material, &blob, &opened_for));
    if change == 0 && sealed_for == opened_for {
        assert_eq!(*opened.expect("opens where it was sealed"), plaintext);
    } else {
        assert_eq!(opened, Err(KmsError::InvalidCiphertext));
    }
}

fn any(material: &Material, bytes: &[u8]) {
    match Blob::parse(bytes) {
        Ok(blob) => {
            assert!((HEADER_LEN + 1 + TAG_LEN..=HEADER_LEN + PLAINTEXT_MAX + TAG_LEN).contains(&bytes.len()));
            assert_eq!(bytes[5..21], *blob.key.as_bytes());
            assert_eq!(bytes[21..37], *blob.version.as_bytes());
            match open(material, &blob, &EncryptionContext::default()) {
                // Whoever sees every comparison learns the tag that is expected.
                Ok(plaintext) => assert_eq!(plaintext.len(), bytes.len() - HEADER_LEN - TAG_LEN),
                Err(e) => assert_eq!(e, KmsError::InvalidCiphertext),
            }
        }
        Err(e) => assert_eq!(e, KmsError::InvalidCiphertext),
    }
}

/// Up to three pairs of up to three characters: enough to be split differently.
fn context(input: &mut Input) -> EncryptionContext {
    let mut text = |len: u8| String::from_utf8_lossy(input.bytes(usize::from(len))).into_owned();
    let lengths = text(1).bytes().next().unwrap_or(0);
    let pairs = (0..lengths & 3).map(|_| (text(lengths >> 2 & 3), text(lengths >> 4 & 3)));
    EncryptionContext::from(pairs.collect::<BTreeMap<_, _>>())
}
