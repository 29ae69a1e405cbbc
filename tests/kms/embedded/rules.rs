//! AWS's rules, and where the files lie.

use crate::embedded::Place;
use crate::suite::{self, Admin, Subject};
use sealblk::kms::{KeyState, KmsError};
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

#[test]
fn the_embedded_kms_passes_the_provider_suite() {
    let place = Place::new();
    let kms = place.open();
    // Records name its keys by ARNs of the place where it was said to be then.
    let elsewhere = None;
    let grantee = kms.locality().root_arn();
    suite::run(&Subject { provider: &kms, admin: &kms, grantee, elsewhere }, "");
}

#[test]
fn keys_and_aliases_have_awss_rules() {
    let place = Place::new();
    let kms = place.open();
    assert_eq!(kms.keys().unwrap(), vec![]);
    assert!(!place.data().exists(), "looking makes nothing");
    let key = kms.create_key("d", Some("alias/one")).unwrap();
    let other = Admin::create_key(&kms);
    let arn = "arn:aws:kms:us-east-1:000000000000:alias/one";
    let taken = KmsError::AlreadyExists(format!("An alias with the name {arn} already exists"));
    assert_eq!(kms.create_alias("alias/one", &other), Err(taken.clone()));
    assert_eq!(kms.create_key("", Some("alias/one")), Err(taken));
    assert_eq!(kms.keys().unwrap().len(), 2, "neither key nor alias");
    for name in ["alias/aws/x", "alias/aws/ebs"] {
        let reserved =
            |done: Result<(), KmsError>| done.unwrap_err().type_name() == "InvalidAliasNameException";
        assert!(reserved(kms.create_alias(name, &other)) && reserved(kms.delete_alias(name)), "{name}");
    }
    for name in ["one", "alias/", "alias/a b"] {
        assert!(matches!(kms.create_alias(name, &other), Err(KmsError::Validation(_))), "{name}");
        assert!(matches!(kms.delete_alias(name), Err(KmsError::Validation(_))), "{name}");
    }
    assert!(matches!(kms.create_key(&"x".repeat(8193), None), Err(KmsError::Validation(_))));
    for days in [6, 31] {
        assert!(matches!(kms.schedule_deletion(&other, days), Err(KmsError::Validation(_))));
    }
    // Away from a dying key an alias may move, towards one it may not.
    kms.schedule_deletion(&key.arn, 30).unwrap();
    kms.update_alias("alias/one", &other).unwrap();
    assert!(matches!(kms.update_alias("alias/one", &key.arn), Err(KmsError::PendingDeletion(_))));
    kms.delete_alias("alias/one").unwrap();
    assert_eq!(kms.aliases().unwrap(), vec![]);
    let again = place.open().key(&key.arn).unwrap();
    assert_eq!((again.state, again.description.as_str()), (KeyState::PendingDeletion, "d"));
}

#[test]
fn files_are_closed_to_others_and_the_root_key_lies_elsewhere() {
    let place = Place::new();
    Admin::create_key(&place.open());
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    for dir in [place.data(), place.config()] {
        assert_eq!(mode(&dir), 0o700);
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            assert_eq!(mode(&path), 0o600, "{}", path.display());
        }
    }
    let names: BTreeSet<_> = fs::read_dir(place.data()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["lock", "log"].map(Into::into).into());
}

#[test]
fn without_its_own_private_root_key_a_store_is_worthless() {
    let place = Place::new();
    let arn = Admin::create_key(&place.open());
    let (path, good) = (place.root_key(), fs::read(place.root_key()).unwrap());
    let refused = |words: &str| {
        let error = place.open().key(&arn).unwrap_err().to_string();
        assert!(error.contains(words) && error.contains(path.to_str().unwrap()), "{error}");
    };
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    refused("may be read or changed by others (mode 0640)");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(&path, "sealblk-kms-root-key-1:00").unwrap();
    refused("is not a KMS root key");
    let mut wrong = good.clone();
    let digit = wrong.len() - 2;
    wrong[digit] = if wrong[digit] == b'0' { b'1' } else { b'0' };
    fs::write(&path, &wrong).unwrap();
    refused("is not the one this store was made with");
    fs::remove_file(&path).unwrap();
    refused("is missing");
    assert!(place.open().create_key("", None).is_err(), "no new root key for an old store");
    fs::write(&path, &good).unwrap();
    assert!(place.open().key(&arn).is_err(), "written with the umask's mode");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    assert_eq!(place.open().key(&arn).unwrap().state, KeyState::Enabled);
}
