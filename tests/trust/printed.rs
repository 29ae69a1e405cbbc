//! What others wrote, on the operator's terminal: nothing of it moves the cursor.

use crate::common::attach::Place;
use crate::impostor::Impostor;
use crate::{edit, run};
use serde_json::{Value, json};
use std::fs;

const EVIL: &str = "\u{1b}]0;owned\u{7}\u{1b}[2J\u{9b}31m\u{202e}gpj\r";

#[track_caller]
fn assert_harmless(said: &str) {
    let bad = |c: char| (c.is_control() && c != '\n' && c != '\t') || c == '\u{202e}';
    assert!(!said.chars().any(bad), "{said:?}");
}

#[test]
fn what_a_host_process_says_is_shown_in_one_line() {
    let place = Place::new(&[]);
    for json_wanted in [false, true] {
        let failed = json!({"failed": {"kind": "busy", "message": format!("{EVIL}\nsealblk: all is well")}});
        let arguments = if json_wanted {
            &["--json", "snapshot", "create", "t"][..]
        } else {
            &["snapshot", "create", "t"]
        };
        let (code, said) = Impostor::new(&place).answers(|talk| talk.say(&failed), || run(&place, arguments));
        assert_eq!(code, 4);
        assert_harmless(&said);
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(said.contains("u001b") && said.contains("all is well"), "{said}");
    }
}

#[test]
fn what_stands_in_the_store_is_shown_as_what_it_is() {
    let place = Place::new(&[]);
    let id = place.id();
    place.store.ok(&["snapshot", "create", "t"]);
    // In an event, which anybody could have written who can write the store.
    let events = place.store.root().join("events.jsonl");
    let first = fs::read_to_string(&events).unwrap();
    let mut event: Value = serde_json::from_str(first.lines().next().unwrap()).unwrap();
    event["detail"]["cause"] = "\u{9b}31m".into();
    fs::write(&events, format!("{event}\n{first}")).unwrap();
    // In a record that cannot be read, of which the error tells.
    edit(&place.volume_json(), |volume| volume[EVIL] = json!(1));
    for command in [
        &["volume", "list"][..],
        &["volume", "show", &id],
        &["--json", "volume", "list"],
        &["events"],
        &["events", "--json"],
        &["gc"],
    ] {
        let (_, said) = run(&place, command);
        assert_harmless(&said);
    }
    let (_, said) = run(&place, &["events", "--json"]);
    let read: Value = serde_json::from_str(said.lines().next().unwrap()).unwrap();
    assert_eq!(read["detail"]["cause"], "\u{9b}31m", "JSON stays what it was");
}
