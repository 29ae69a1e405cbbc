//! The KMS key decides about the next attach, never about this one.

use crate::common::attach::{Place, open, read, write};
use crate::common::disk::pattern;
use crate::common::tree::Tree;
use serde_json::{Value, json};

/// The last event, of which there must be one more than `before`: an attach that the KMS
/// refused with `cause`.
#[track_caller]
fn assert_event(place: &Place, before: usize, name: &str, cause: &str) {
    let events = place.events();
    assert_eq!(events.len(), before + 1);
    let event = events.last().expect("counted above");
    let volume = format!("arn:aws:ec2:us-east-1:000000000000:volume/{}", place.id());
    let detail = json!({"event": name, "result": "failed", "cause": cause, "request-id": ""});
    assert_eq!(
        (&event["source"], &event["detail-type"]),
        (&json!("aws.ec2"), &json!("EBS Volume Notification"))
    );
    assert_eq!((&event["resources"], &event["detail"]), (&json!([volume, place.key()]), &detail));
}

/// An attach that the KMS refuses with `cause`, which changes nothing but that there is an
/// event of this name.
#[track_caller]
fn refused(place: &Place, name: &str, cause: &str) -> String {
    let (tree, events) = (Tree::of(place), place.events().len());
    let said = place.refuse(5, &[]);
    tree.assert_unchanged(place, cause, 1);
    assert_event(place, events, name, cause);
    let words = format!("sealblk: attach {}: {}; ", place.id(), cause.trim_end_matches('.'));
    assert!(said.starts_with(&words), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    said
}

#[test]
fn a_disabled_key_lets_io_go_on_and_stops_the_next_attach() {
    let place = Place::new(&[]);
    let arn = place.key();
    let host = place.attach(&[]);
    let (first, second) = (pattern(1, 65536), pattern(2, 65536));
    let mut session = open(&place.socket());
    write(&mut session.rings[0], 8, &first);
    place.store.ok(&["key", "disable", "--yes", &arn]);
    write(&mut session.rings[0], 1000, &second);
    assert!(read(&mut session.rings[0], 8, first.len()) == first);
    // A VMM may also leave, and come back.
    drop(session);
    let mut session = open(&place.socket());
    assert!(read(&mut session.rings[0], 1000, second.len()) == second);
    host.end();

    let said = refused(&place, "reattachVolume", &format!("{arn} is disabled."));
    assert!(said.contains(&format!("enable it with \"sealblk key enable {arn}\" and try again")), "{said}");
    refused(&place, "reattachVolume", &format!("{arn} is disabled."));
    place.store.ok(&["key", "enable", &arn]);
    let host = place.attach(&[]);
    let mut session = open(&place.socket());
    assert!(read(&mut session.rings[0], 8, first.len()) == first);
    assert!(read(&mut session.rings[0], 1000, second.len()) == second);
    host.end();
}

#[test]
fn a_key_that_waits_for_its_deletion_stops_the_next_attach() {
    let place = Place::new(&[]);
    let arn = place.key();
    let host = place.attach(&[]);
    let mut session = open(&place.socket());
    place.store.ok(&["key", "schedule-deletion", "--yes", &arn, "--days", "7"]);
    write(&mut session.rings[0], 8, &pattern(1, 4096));
    host.end();

    let said = refused(&place, "reattachVolume", &format!("{arn} is pending deletion."));
    let both = [format!("sealblk key cancel-deletion {arn}"), format!("sealblk key enable {arn}")];
    assert!(both.iter().all(|words| said.contains(words)), "{said}");
    // Cancelling leaves it disabled, as AWS has it.
    place.store.ok(&["key", "cancel-deletion", &arn]);
    refused(&place, "reattachVolume", &format!("{arn} is disabled."));
    place.store.ok(&["key", "enable", &arn]);
    let host = place.attach(&[]);
    let mut session = open(&place.socket());
    assert!(read(&mut session.rings[0], 8, 4096) == pattern(1, 4096));
    host.end();
}

#[test]
fn until_a_first_attach_has_worked_a_failure_is_no_reattach() {
    let place = Place::new(&[]);
    let cause = format!("{} is disabled.", place.key());
    place.store.ok(&["key", "disable", "--yes", "alias/aws/ebs"]);
    refused(&place, "attachVolume", &cause);
    refused(&place, "attachVolume", &cause);
    place.store.ok(&["key", "enable", "alias/aws/ebs"]);
    place.attach(&[]).end();
    place.store.ok(&["key", "disable", "--yes", "alias/aws/ebs"]);
    refused(&place, "reattachVolume", &cause);
}

#[test]
fn an_attach_that_works_is_no_event() {
    let place = Place::new(&[]);
    let events = place.events();
    place.attach(&[]).end();
    place.attach(&["--read-only"]).end();
    assert_eq!(place.events(), events);
}

#[test]
fn a_refusal_in_json_is_one_object_with_the_kms_words() {
    let place = Place::new(&[]);
    place.store.ok(&["key", "disable", "--yes", "alias/aws/ebs"]);
    let said: Value = serde_json::from_str(&place.refuse(5, &["--json"])).expect("JSON");
    assert_eq!(said["error"]["kind"], "kms-refused");
    let message = said["error"]["message"].as_str().expect("text");
    assert!(message.contains(&format!("{} is disabled;", place.key())), "{message}");
}

#[test]
fn the_key_of_another_volume_makes_no_difference() {
    let place = Place::new(&[]);
    place.store.ok(&["key", "create", "--alias", "alias/other"]);
    place.store.ok(&["volume", "create", "--size", "1MiB", "--name", "o", "--key", "alias/other"]);
    place.store.ok(&["key", "disable", "--yes", "alias/other"]);
    place.attach(&[]).end();
}
