//! What `volume show` says of an attachment and of the next one.

use crate::common::attach::Place;
use crate::common::store::said;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::fs;

fn show(place: &Place, arguments: &[&str]) -> (i32, Value) {
    let output = place.store.run(&[&["volume", "show", "t", "--json"], arguments].concat());
    let value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", said(&output)));
    (output.status.code().expect("no signal"), value)
}

#[test]
fn an_attachment_is_shown_with_its_process_its_socket_and_its_key() {
    let place = Place::new(&[]);
    let (code, free) = show(&place, &[]);
    assert_eq!((code, &free["state"], &free["attachment"]), (0, &json!("available"), &Value::Null));
    let host = place.attach(&["--read-only"]);
    let (_, shown) = show(&place, &[]);
    assert_eq!(shown["state"], "in-use");
    let attachment = &shown["attachment"];
    assert_eq!(attachment["pid"], json!(host.pid().as_raw()));
    assert_eq!(attachment["socket"], json!(place.socket().display().to_string()));
    assert!(attachment["since"].as_str().expect("a time").ends_with('Z'));
    assert_eq!(attachment["unwrapped_by"], json!([{"provider": "embedded", "key_id": place.key()}]));
    assert_eq!(attachment["read_only"], true);
    let text = place.store.ok(&["volume", "show", "t"]);
    for words in [
        format!("by process {}", host.pid()),
        format!("socket {}", place.socket().display()),
        format!("data key unwrapped by embedded: {}", place.key()),
        format!("needs a Decrypt by embedded: {}", place.key()),
        "in-use".into(),
    ] {
        assert!(text.contains(&words), "{words}: {text}");
    }
    host.end();
    assert_eq!(show(&place, &[]).1, free_again(free, &place));
}

/// What it was, but that it has been attached: one generation more.
fn free_again(mut free: Value, place: &Place) -> Value {
    free["generation"] = json!(place.metadata().generation());
    free
}

#[test]
fn a_host_process_that_does_not_answer_is_said_not_to() {
    let place = Place::new(&[]);
    let host = place.attach(&[]);
    let (code, shown) = host.frozen(|| show(&place, &[]));
    assert_eq!((code, &shown["state"]), (0, &json!("in-use")));
    let problem = shown["attachment"]["problem"].as_str().expect("a problem");
    assert!(problem.contains(&format!("process {} has it", host.pid())), "{problem}");
    host.signal(Signal::SIGTERM);
    host.ends_well();
}

#[test]
fn the_state_of_the_key_is_the_one_of_now() {
    let place = Place::new(&[]);
    let arn = place.key();
    let usable = json!({"reachable": true, "state": "Enabled", "usable": true, "message": null});
    assert_eq!(show(&place, &["--check-key"]), (0, with_check(&place, usable)));
    assert!(place.store.ok(&["volume", "show", "t", "--check-key"]).contains("usable now"));

    let host = place.attach(&[]);
    place.store.ok(&["key", "disable", "--yes", &arn]);
    let (code, shown) = show(&place, &["--check-key"]);
    assert_eq!((code, &shown["keys"][0]["check"]["state"]), (5, &json!("Disabled")));
    let message = shown["keys"][0]["check"]["message"].as_str().expect("text").to_owned();
    host.end();
    // It is what the next attach says.
    assert!(place.refuse(5, &[]).contains(&message), "{message}");
    let output = place.store.run(&["volume", "show", "t", "--check-key"]);
    assert!(
        said(&output).contains(&format!("disabled: the next attach will be refused with: {arn} is disabled"))
    );

    place.store.ok(&["key", "schedule-deletion", "--yes", &arn, "--days", "7"]);
    let (code, shown) = show(&place, &["--check-key"]);
    assert_eq!((code, &shown["keys"][0]["check"]["state"]), (5, &json!("PendingDeletion")));
    let message = shown["keys"][0]["check"]["message"].as_str().expect("text").to_owned();
    assert!(place.refuse(5, &[]).contains(&message), "{message}");
}

fn with_check(place: &Place, check: Value) -> Value {
    let mut shown = show(place, &[]).1;
    shown["keys"][0]["slots"][0]["check"] = check.clone();
    shown["keys"][0]["check"] = check;
    shown
}

#[test]
fn a_kms_that_is_gone_is_said_to_be() {
    let place = Place::new(&[]);
    // The KMS's files; what proves the volume's record stays.
    for file in fs::read_dir(place.store.config()).unwrap().map(|entry| entry.unwrap().path()) {
        if file.is_file() {
            fs::remove_file(file).unwrap();
        }
    }
    let (code, shown) = show(&place, &["--check-key"]);
    assert_ne!(code, 0);
    let check = &shown["keys"][0]["check"];
    assert_eq!((&check["state"], &check["usable"]), (&Value::Null, &json!(false)));
    assert!(place.refuse(code, &[]).contains(check["message"].as_str().expect("text")));
}

#[test]
fn a_missing_layer_is_what_the_next_attach_would_meet() {
    let place = Place::new(&["--unencrypted"]);
    let (_, shown) = show(&place, &["--check-key"]);
    assert_eq!(shown["next_attach"], "needs no key: the volume is not encrypted");
    fs::rename(place.layer(), place.folder().join("elsewhere")).unwrap();
    let (_, shown) = show(&place, &[]);
    let words = shown["next_attach"].as_str().expect("text");
    let problem = words.strip_prefix("refused: ").expect("a refusal");
    assert!(place.refuse(7, &[]).contains(problem), "{problem}");
}
