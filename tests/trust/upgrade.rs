//! What a process that takes over believes of the one that serves the volume, and may have been broken into:
//! nothing that would give that one more than it has.

use crate::common::attach::Place;
use crate::impostor::{Impostor, Talk};
use crate::run;
use sealblk::catalog::lock::{self, Held};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};

/// How a volume is attached that is not encrypted, and whose attach wants nothing in particular.
fn offer() -> Value {
    json!({
        "version": "9.9.9", "queues": 1, "queue_size": 256, "memory_regions": 32, "read_only": false, "serial": null,
        "engine": "auto", "poll_us": 0, "in_order": false, "iops": 0, "throughput": 0, "burst_ms": 1000,
        "hydrate_rate": 0, "space_reserve": null, "cpus": [], "sandbox": "on", "log_level": "WARN", "path": null,
        "is_name_ours": false, "data_keys": 0,
        "passes": {"listener": false, "keeper": false, "manager": false},
    })
}

/// Says `offer`, with these descriptors.
fn say(talk: &mut Talk, offer: Value, descriptors: &[BorrowedFd<'_>]) {
    assert_eq!(talk.request["op"], "upgrade");
    talk.say_with(&json!({"offer": offer}), descriptors);
}

/// The top layer of the volume, open as whoever serves it has it.
fn top(place: &Place) -> File {
    File::options().read(true).write(true).open(place.layer()).unwrap()
}

/// Has the volume of `place` taken over from an impostor that talks so; it must fail, with these words.
#[track_caller]
fn fails(place: &Place, talk: impl FnOnce(&mut Talk) + Send, words: &str) {
    let (code, said) = Impostor::new(place).answers(talk, || run(place, &["upgrade", "t"]));
    assert_ne!(code, 0, "{said}");
    assert!(said.contains(words), "{said}");
}

fn place() -> Place {
    let place = Place::new(&["--unencrypted"]);
    place.attach(&[]).end();
    place
}

#[test]
fn what_is_offered_is_held_against_what_the_kernel_says() {
    let place = place();
    let stderr = std::io::stderr();
    let read_only = File::open(place.layer()).unwrap();
    let another = tempfile::tempfile().unwrap();
    // It has the layer for reading alone, or another file.
    for file in [&read_only, &another] {
        let talk = |talk: &mut Talk| {
            let lock = talk.lock.try_clone().unwrap();
            say(talk, offer(), &[lock.as_fd(), file.as_fd(), stderr.as_fd()]);
        };
        fails(&place, talk, "does not have the top layer open as it says");
    }
    // What it passes as the lock is none: that would leave the volume to anybody.
    let (top, none) = (top(&place), File::open(place.volume_folder().join("lock")).unwrap());
    for file in [&none, &another] {
        let talk = |talk: &mut Talk| say(talk, offer(), &[file.as_fd(), top.as_fd(), stderr.as_fd()]);
        fails(&place, talk, "is not the lock by which a process has it");
    }
    // A name that is another's: it would be removed at the end.
    let precious = place.folder().join("precious");
    fs::write(&precious, "").unwrap();
    let own = UnixListener::bind(place.folder().join("own")).unwrap();
    let mut lie = offer();
    lie["path"] = json!(precious);
    lie["is_name_ours"] = json!(true);
    lie["passes"]["listener"] = json!(true);
    let talk = |talk: &mut Talk| {
        let lock = talk.lock.try_clone().unwrap();
        say(talk, lie.clone(), &[lock.as_fd(), top.as_fd(), stderr.as_fd(), own.as_fd()]);
    };
    fails(&place, talk, "it was not made at");
    assert!(precious.exists());
    // What makes no sense, or is of another version.
    for (field, value) in [
        ("queues", json!(65)),
        ("queue_size", json!(100)),
        ("engine", json!("rot13")),
        ("sandbox", json!("maybe")),
        ("data_keys", json!(3)),
        ("more", json!(1)),
    ] {
        let mut odd = offer();
        odd[field] = value;
        let talk = |talk: &mut Talk| {
            let lock = talk.lock.try_clone().unwrap();
            say(talk, odd.clone(), &[lock.as_fd(), top.as_fd(), stderr.as_fd()]);
        };
        let (code, said) = Impostor::new(&place).answers(talk, || run(&place, &["upgrade", "t"]));
        assert!([2, 4, 7, 8].contains(&code), "{field}: {code}: {said}");
    }
    // The volume is nobody's after all that, and can be attached.
    place.attach(&[]).end();
}

#[test]
fn a_session_that_is_passed_goes_through_the_gate() {
    let place = place();
    let stderr = std::io::stderr();
    let top = top(&place);
    let begin = |talk: &mut Talk| {
        let lock = talk.lock.try_clone().unwrap();
        say(talk, offer(), &[lock.as_fd(), top.as_fd(), stderr.as_fd()]);
        assert_eq!(talk.hear(), Some(json!("ready")));
    };
    let image_lock = |talk: &mut Talk| talk.say_with(&json!("image-lock"), &[top.as_fd()]);
    let said = |request: u32, body: &[u8]| json!({"said": {"request": request, "body": hex::encode(body), "descriptors": 0}});
    // Messages that no VMM may send; a session without a VMM; one without an end.
    let (vmm, _other) = UnixStream::pair().unwrap();
    for (message, words) in [
        (said(2, &u64::MAX.to_ne_bytes()), "were not offered"),
        (said(999, &[]), "unknown request"),
        (said(37, &[0; 40]), "its protocol feature was not acknowledged"),
        (said(8, &[0; 3]), "a body of 3 bytes"),
    ] {
        let talk = |talk: &mut Talk| {
            begin(talk);
            talk.say_with(&json!("vmm"), &[vmm.as_fd()]);
            talk.say(&message);
            image_lock(talk);
            talk.say(&json!("that-is-all"));
            talk.hear();
        };
        fails(&place, talk, words);
    }
    fails(
        &place,
        |talk| {
            begin(talk);
            talk.say(&said(2, &[0; 8]));
            talk.hear();
        },
        "no end, or no order",
    );
    fails(
        &place,
        |talk| {
            begin(talk);
            talk.say_with(&json!("vmm"), &[vmm.as_fd()]);
            (0..5000).for_each(|_| talk.say(&said(1, &[])));
            talk.hear();
        },
        "no end, or no order",
    );
    // It does not give the volume away after all: the lock is its own still, which the next command sees.
    let keep = |talk: &mut Talk| {
        begin(talk);
        image_lock(talk);
        talk.say(&json!("that-is-all"));
        assert_eq!(talk.hear(), Some(json!("prepared")));
        talk.say(&json!({"failed": {"kind": "busy", "message": "not today"}}));
        assert!(talk.hear().is_some_and(|said| said.get("failed").is_some()));
        // The end of the other side: it has let go of everything that it was passed.
        assert_eq!(talk.hear(), None);
        assert!(matches!(lock::query(&talk.folder), Ok(Held::By(_))), "the lock is gone");
    };
    fails(&place, keep, "not today");
    place.attach(&[]).end();
}
