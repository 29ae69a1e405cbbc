//! What the program can be built without: whoever asks for it is told which feature it is.

use crate::common::store::{Store, said};

/// The exit code for what this build or machine cannot do.
const UNSUPPORTED: i32 = 8;

/// Something that takes a feature, and whether this program has that.
#[track_caller]
fn says_what_is_missing(has: bool, feature: &str, arguments: &[&str]) {
    let store = Store::new();
    let output = store.run(arguments);
    let words = format!("the feature {feature}, without which this sealblk was built");
    assert!(!output.status.success(), "{}", said(&output));
    assert_eq!(said(&output).contains(&words), !has, "{}", said(&output));
    if !has {
        assert_eq!(output.status.code(), Some(UNSUPPORTED), "{}", said(&output));
    }
}

#[test]
fn a_key_of_aws_kms_wants_a_feature() {
    let create = ["volume", "create", "--size", "1MiB", "--key", "aws:alias/"];
    says_what_is_missing(cfg!(feature = "aws"), "aws", &create);
}

#[test]
fn serving_the_kms_wants_a_feature() {
    // Without a certificate no such address is served.
    let serve = ["kms", "serve", "--listen", "0.0.0.0:0"];
    says_what_is_missing(cfg!(feature = "kms-server"), "kms-server", &serve);
}

#[test]
fn a_key_in_an_hsm_wants_a_feature() {
    // A label that no token has.
    let label = "x".repeat(33);
    let add = ["kms", "store", "add", "--pkcs11", "/nowhere", "--token", &label];
    says_what_is_missing(cfg!(feature = "pkcs11"), "pkcs11", &add);
}

#[test]
fn drawing_on_a_terminal_wants_a_feature() {
    // Not a terminal.
    says_what_is_missing(cfg!(feature = "top"), "top", &["top"]);
}

#[test]
fn a_qcow2_image_wants_a_feature() {
    let file = tempfile::Builder::new().suffix(".qcow2").tempfile().expect("make a file");
    std::fs::write(file.path(), b"QFI\xfb\0\0\0\x03").expect("write a file");
    let path = file.path().to_str().expect("UTF-8");
    says_what_is_missing(cfg!(feature = "qcow2"), "qcow2", &["volume", "import", path, "--unencrypted"]);
}

#[test]
fn an_object_store_wants_a_feature() {
    let list = ["snapshot", "list", "s3://bucket", "--endpoint", "nowhere"];
    says_what_is_missing(cfg!(feature = "object-store"), "object-store", &list);
}
