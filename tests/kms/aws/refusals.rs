//! An attach by the AWS provider: what works, and what the KMS says when it does not.

use crate::aws::site::Site;
use crate::common::attach::{open, read, write};
use crate::common::disk::pattern;
use crate::suite::Admin;
use getrandom::SysRng;
use rsa::pkcs8::DecodePublicKey;
use rsa::rand_core::UnwrapErr;
use rsa::{Oaep, PublicKey};
use sealblk::kms::embedded::Embedded;
use sealblk::kms::embedded::admin::NewKey;
use sealblk::kms::embedded::import::WrappingKeySpec;
use sha2::Sha256;
use std::fs;

#[test]
fn a_volume_lives_under_a_key_of_a_kms_elsewhere() {
    let site = Site::new("");
    site.kms.admin().create_alias("alias/disks", &site.key).unwrap();
    let place = &site.place;
    place.store.ok(&["volume", "create", "--size", "1MiB", "--name", "o", "--key", "aws:alias/disks"]);
    let metadata = place.metadata();
    assert_eq!((metadata.keys()[0].first().provider.as_str(), place.key()), ("aws", site.key.clone()));
    let other = place.catalog().load(place.catalog().resolve("o").unwrap()).unwrap();
    assert_eq!(other.keys()[0].first().wrapped.key_id, site.key, "the ARN, not the alias");
    assert!(!place.store.root().join("kms").exists(), "the host has no KMS of its own");

    let host = place.attach(&[]);
    let mut session = open(&place.socket());
    write(&mut session.rings[0], 8, &pattern(1, 65536));
    // As with EBS, a key that is disabled matters to the next attach alone.
    Admin::disable(&site.kms.admin(), &site.key).unwrap();
    assert!(read(&mut session.rings[0], 8, 65536) == pattern(1, 65536));
    drop(session);
    host.end();
    site.refused(5, &format!("{} is disabled.", site.key));
    Admin::enable(&site.kms.admin(), &site.key).unwrap();
    let host = place.attach(&[]);
    let mut session = open(&place.socket());
    assert!(read(&mut session.rings[0], 8, 65536) == pattern(1, 65536));
    drop(session);
    place.store.ok(&["detach", "t"]);
    host.ends_well();
}

#[test]
fn each_state_of_the_key_is_told_in_the_kmss_words_with_aws_s_commands() {
    let site = Site::new("");
    let (kms, key) = (site.kms.admin(), &site.key);
    Admin::disable(&kms, key).unwrap();
    let said = site.refused(5, &format!("{key} is disabled."));
    assert!(said.contains(&format!("aws kms enable-key --key-id {key}")), "{said}");
    Admin::schedule_deletion(&kms, key).unwrap();
    let said = site.refused(5, &format!("{key} is pending deletion."));
    assert!(said.contains(&format!("aws kms cancel-key-deletion --key-id {key}")), "{said}");
    Admin::cancel_deletion(&kms, key).unwrap();
    Admin::enable(&kms, key).unwrap();
    site.place.attach(&[]).end();
    // What is left of a key that was deleted is its ARN in the volume's metadata.
    let absent = Admin::absent_key(&kms);
    let metadata = site.place.volume_json();
    let text = fs::read_to_string(&metadata).unwrap().replace(key.as_str(), &absent);
    fs::write(&metadata, text).unwrap();
    site.place.store.accept();
    site.refused(3, &format!("Key '{absent}' does not exist"));
}

fn external(kms: &Embedded) -> String {
    let key = kms.create(&NewKey { external: true, ..NewKey::default() }).unwrap().arn;
    let given = kms.import_parameters(&key, WrappingKeySpec::Rsa2048).unwrap();
    let public = PublicKey::from_public_key_der(&given.public_key).unwrap();
    let wrapped = public.encrypt(&mut UnwrapErr(SysRng), Oaep::<Sha256>::new(), &[7; 32]).unwrap();
    kms.import(&key, &given.token, &wrapped, None).unwrap();
    key
}

#[test]
fn a_key_whose_material_was_taken_away_is_pending_import() {
    let site = Site::under("", external);
    site.place.attach(&[]).end();
    site.kms.admin().delete_material(&site.key).unwrap();
    let said = site.refused(5, &format!("{} is pending import.", site.key));
    assert!(said.contains("import its key material again"), "{said}");
}

/// Replaces the wrapped key in the volume's metadata.
fn put_blob(site: &Site, of: &str) {
    let (catalog, path) = (site.place.catalog(), site.place.volume_json());
    let other = catalog.folder(catalog.resolve(of).unwrap()).join("volume.json");
    let blob = |text: &str| {
        let json: serde_json::Value = serde_json::from_str(text).unwrap();
        json["keys"][0]["wrapped"].as_str().expect("the wrapped key").to_owned()
    };
    let (ours, theirs) = (fs::read_to_string(&path).unwrap(), fs::read_to_string(other).unwrap());
    fs::write(&path, ours.replace(&blob(&ours), &blob(&theirs))).unwrap();
    site.place.store.accept();
}

#[test]
fn another_volumes_wrapped_key_is_refused_by_its_context_and_another_keys_by_its_key() {
    let site = Site::new("");
    let before = fs::read(site.place.volume_json()).unwrap();
    let key = format!("aws:{}", site.key);
    site.place.store.ok(&["volume", "create", "--size", "1MiB", "--name", "same-key", "--key", &key]);
    put_blob(&site, "same-key");
    let said = site.refused(5, "InvalidCiphertextException");
    assert!(said.contains("was made for another volume"), "{said}");
    fs::write(site.place.volume_json(), before).unwrap();
    let other = format!("aws:{}", Admin::create_key(&site.kms.admin()));
    site.place.store.ok(&["volume", "create", "--size", "1MiB", "--name", "other-key", "--key", &other]);
    put_blob(&site, "other-key");
    let message = "The key ID in the request does not identify a CMK that can perform this operation.";
    site.refused(5, message);
}

#[test]
fn a_principal_without_permission_is_told_so() {
    let site = Site::new("");
    let host = site.kms.principal("host");
    site.place.store.set_environment(host.environment(&site.kms.url));
    let cause = format!(
        "User: {} is not authorized to perform: kms:Decrypt on resource: {} because no grant allows the \
         kms:Decrypt action",
        host.arn, site.key
    );
    let said = site.refused(5, &cause);
    assert!(said.contains("docs/kms.md"), "{said}");
}
