//! Keys whose material comes from outside.

use crate::embedded::hands::{DAY, Hands};
use crate::embedded::{Place, volume};
use getrandom::SysRng;
use rsa::pkcs8::DecodePublicKey;
use rsa::rand_core::UnwrapErr;
use rsa::{Oaep, PublicKey};
use sealblk::kms::embedded::Embedded;
use sealblk::kms::embedded::admin::NewKey;
use sealblk::kms::embedded::import::{ImportParameters, WrappingKeySpec};
use sealblk::kms::{KeyState, KmsError};
use sha2::Sha256;
use std::fs;

fn external(kms: &Embedded) -> String {
    kms.create(&NewKey { external: true, ..NewKey::default() }).unwrap().arn
}

fn parameters(kms: &Embedded, key: &str) -> ImportParameters {
    kms.import_parameters(key, WrappingKeySpec::Rsa2048).unwrap()
}

pub(super) fn wrap(parameters: &ImportParameters, material: &[u8]) -> Vec<u8> {
    let public = PublicKey::from_public_key_der(&parameters.public_key).unwrap();
    public.encrypt(&mut UnwrapErr(SysRng), Oaep::<Sha256>::new(), material).unwrap()
}

#[test]
fn only_the_material_that_a_key_had_can_be_imported_again_and_then_opens_what_it_sealed() {
    let place = Place::new();
    let kms = place.open();
    let key = external(&kms);
    let pending = KmsError::PendingImport(format!("{key} is pending import."));
    assert_eq!(kms.encrypt(&key, b"x", &volume("v")), Err(pending.clone()));
    assert_eq!(kms.enable(&key).map(drop), Err(pending.clone()));
    assert_eq!(kms.disable(&key).map(drop), Err(pending.clone()));
    let unsupported = format!("{key} origin is EXTERNAL which is not valid for this operation.");
    assert_eq!(kms.rotate_on_demand(&key), Err(KmsError::Unsupported(unsupported.clone())));
    assert_eq!(kms.rotation_status(&key), Err(KmsError::Unsupported(unsupported)));

    let given = parameters(&kms, &key);
    let imported = kms.import(&key, &given.token, &wrap(&given, &[7; 32]), None).unwrap();
    assert_eq!(imported.key, key);
    let sealed = kms.encrypt(&key, b"x", &volume("v")).unwrap();
    assert_eq!(sealed.material, imported.material);

    let before = fs::metadata(place.log()).unwrap().len();
    assert_eq!(kms.delete_material(&key).unwrap(), (key.clone(), Some(imported.material.clone())));
    assert!(fs::metadata(place.log()).unwrap().len() < before, "rewritten without the material");
    assert_eq!(kms.delete_material(&key).unwrap(), (key.clone(), None));
    assert_eq!(kms.open_blob(None, &sealed.blob, &volume("v")).err(), Some(pending));

    let again = place.open();
    let other = again.import(&key, &given.token, &wrap(&given, &[8; 32]), None).unwrap_err();
    assert_eq!(other.type_name(), "IncorrectKeyMaterialException");
    assert_eq!(again.import(&key, &given.token, &wrap(&given, &[7; 32]), None).unwrap(), imported);
    assert_eq!(*again.open_blob(None, &sealed.blob, &volume("v")).unwrap().plaintext, b"x".to_vec());
}

#[test]
fn tokens_and_wrapped_material_must_be_right() {
    let (place, clock) = (Place::new(), Hands::new());
    let kms = place.open_at(clock.clone());
    let (key, other) = (external(&kms), external(&kms));
    let given = parameters(&kms, &key);
    let good = wrap(&given, &[7; 32]);
    let refused = |key: &str, token: &[u8], wrapped: &[u8]| {
        kms.import(key, token, wrapped, None).unwrap_err().type_name()
    };
    assert_eq!(refused(&other, &given.token, &good), "InvalidImportTokenException");
    assert_eq!(refused(&key, b"token", &good), "InvalidImportTokenException");
    let mut changed = given.token.clone();
    changed[20] ^= 1;
    assert_eq!(refused(&key, &changed, &good), "InvalidImportTokenException");
    assert_eq!(refused(&key, &given.token, b"material"), "InvalidCiphertextException");
    assert_eq!(refused(&key, &given.token, &wrap(&given, &[7; 31])), "IncorrectKeyMaterialException");
    let now = 20_000 * DAY;
    for at in [now, now + 366 * DAY] {
        let error = kms.import(&key, &given.token, &good, Some(at)).unwrap_err();
        assert!(matches!(error, KmsError::Validation(_)));
    }
    clock.pass(DAY);
    assert_eq!(refused(&key, &given.token, &good), "ExpiredImportTokenException");
    let own = kms.create_key("", None).unwrap().arn;
    let error = kms.import_parameters(&own, WrappingKeySpec::Rsa2048).unwrap_err();
    assert_eq!(
        error,
        KmsError::Unsupported(format!("{own} origin is AWS_KMS which is not valid for this operation."))
    );
}

#[test]
fn material_that_has_expired_is_forgotten() {
    let (place, clock) = (Place::new(), Hands::new());
    let kms = place.open_at(clock.clone());
    let key = external(&kms);
    let given = parameters(&kms, &key);
    let expires = given.valid_to + DAY;
    kms.import(&key, &given.token, &wrap(&given, &[7; 32]), Some(expires)).unwrap();
    let sealed = kms.encrypt(&key, b"x", &volume("v")).unwrap();
    assert_eq!(kms.key(&key).unwrap().expires, Some(expires));
    clock.pass(2 * DAY - 1);
    assert!(kms.open_blob(None, &sealed.blob, &volume("v")).is_ok());
    clock.pass(1);
    let pending = KmsError::PendingImport(format!("{key} is pending import."));
    assert_eq!(kms.open_blob(None, &sealed.blob, &volume("v")).err(), Some(pending));
    let described = kms.key(&key).unwrap();
    assert_eq!(
        (described.state, described.expires, described.material),
        (KeyState::PendingImport, None, None)
    );
    clock.jump(-DAY);
    assert_eq!(place.open_at(clock).key(&key).unwrap().state, KeyState::PendingImport, "gone for good");
}
