//! What the helper does, with two KMSs of different root keys.

use super::*;
use crate::catalog::VolumeId;
use crate::kms::embedded::Embedded;
use crate::kms::embedded::clock::SystemClock;

struct Two {
    _folder: tempfile::TempDir,
    one: Embedded,
    other: Embedded,
    context: EncryptionContext,
    old: WrappedKey,
}

impl Two {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let kms = |name: &str| {
            let path = folder.path().join(name);
            let kms = Embedded::at(
                path.join("kms"),
                path.join("config"),
                Box::new(SystemClock),
                crate::base::hardened::harden().unwrap(),
            );
            kms.create_key("", Some("alias/a")).unwrap();
            kms.create_key("", Some("alias/b")).unwrap();
            kms
        };
        let (one, other) = (kms("one"), kms("other"));
        let context = encryption_context(VolumeId::random());
        let old = one.generate_wrapped("alias/a", Dek::LEN, &context).unwrap();
        Two { _folder: folder, one, other, context, old }
    }

    fn within<'a>(&'a self, key: &'a str) -> Job<'a> {
        Job {
            from: None,
            to: &self.one,
            old: &self.old,
            key,
            context: &self.context,
            to_context: &self.context,
        }
    }

    fn across<'a>(&'a self, key: &'a str) -> Job<'a> {
        Job { from: Some(&self.one), to: &self.other, ..self.within(key) }
    }

    fn check(&self) -> [u8; 16] {
        check_value(&self.one.decrypt(&self.old, &self.context).unwrap()).unwrap()
    }
}

#[test]
fn the_data_key_stays_the_same_within_a_kms_and_across() {
    let two = Two::new();
    let plain = two.one.decrypt(&two.old, &two.context).unwrap();
    for key in ["alias/a", "alias/b"] {
        for (job, kms) in [(two.within(key), &two.one), (two.across(key), &two.other)] {
            let new = job.wrap().unwrap();
            assert_ne!(new.blob, two.old.blob);
            assert_eq!(new.key_id, kms.describe(key).unwrap().key_id);
            assert!(*kms.decrypt(&new, &two.context).unwrap() == *plain);
            job.prove(&new, Some(&two.check())).unwrap();
            job.prove(&new, None).unwrap();
        }
    }
}

#[test]
fn another_data_key_is_no_proof() {
    let two = Two::new();
    let fresh = two.one.generate_wrapped("alias/b", Dek::LEN, &two.context).unwrap();
    let check = two.check();
    for check in [Some(&check[..]), None] {
        let e = two.within("alias/b").prove(&fresh, check).unwrap_err().error;
        assert_eq!(e.kind(), Kind::Corrupt);
        assert!(e.to_string().contains("nothing was changed"), "{e}");
    }
}

#[test]
fn what_does_not_unwrap_is_no_proof() {
    let two = Two::new();
    let job = two.within("alias/b");
    let good = job.wrap().unwrap();
    let elsewhere = encryption_context(VolumeId::random());
    let foreign = two.one.rewrap(&two.old, &two.context, "alias/b", &elsewhere).unwrap();
    let mut broken = good.clone();
    *broken.blob.last_mut().unwrap() ^= 1;
    let short = WrappedKey::from(two.one.encrypt("alias/b", &[7; 32], &two.context).unwrap());
    for bad in [foreign, broken, short] {
        let e = job.prove(&bad, Some(&two.check())).unwrap_err().error;
        assert!(e.to_string().contains("does not unwrap; the old one stays in place"), "{e}");
    }
    two.one.disable("alias/b").unwrap();
    let e = job.prove(&good, Some(&two.check())).unwrap_err().error;
    assert_eq!(e.kind(), Kind::KmsRefused);
}

/// The advice is for the key that is in the way.
#[test]
fn a_refusal_names_the_key_that_it_is_about() {
    let two = Two::new();
    two.one.disable("alias/a").unwrap();
    let old = format!("\"sealblk key enable {}\"", two.old.key_id);
    for job in [two.within("alias/b"), two.across("alias/b")] {
        let e = job.wrap().unwrap_err().error;
        assert_eq!(e.kind(), Kind::KmsRefused);
        assert!(e.to_string().contains(&old), "{e}");
    }
    two.one.enable("alias/a").unwrap();
    for kms in [&two.one, &two.other] {
        kms.disable("alias/b").unwrap();
    }
    for job in [two.within("alias/b"), two.across("alias/b")] {
        let e = job.wrap().unwrap_err().error;
        assert!(e.to_string().contains("\"sealblk key enable alias/b\""), "{e}");
    }
}
