//! A KMS that is down, slow, overloaded or no KMS at all: it is asked again for as long as the settings say,
//! whoever waits is told, and then it is an error and an event.

use crate::aws::faults::{Answer, Faults, Seen, exception, nobody};
use crate::aws::site::Site;
use crate::common::patience::limit;

use crate::common::process::{tie_to_test, wait_within};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use std::os::unix::process::ExitStatusExt;

const IMPATIENT: &str = "kms-patience = 1";

/// An attach that `attempt` makes, and that is refused after the KMS was asked at least twice, which was
/// told, and with these words. However long one try takes here: then patience is longer.
#[track_caller]
fn refused_after_another_try(site: &Site, words: &str, attempt: impl Fn() -> String) -> String {
    for seconds in [1, 5, 25, 125, 625] {
        site.place.store.configure(&format!("kms-patience = {seconds}"));
        let said = attempt();
        let told: Vec<&str> = said.lines().filter(|line| line.contains("; will retry until ")).collect();
        assert!(told.iter().all(|line| line.contains(words)), "{said}");
        if !told.is_empty() {
            return said;
        }
    }
    panic!("the KMS was never asked a second time");
}

#[test]
fn a_kms_that_is_down_is_an_error_and_an_event_after_a_while() {
    let site = Site::new(IMPATIENT);
    let url = nobody();
    site.move_to(&url);
    let why = format!("could not reach {url}: Connection refused (os error 111)");
    let said = refused_after_another_try(&site, &why, || site.refused(6, &why));
    let last = said.lines().last().expect("an error");
    assert!(last.starts_with("sealblk: attach vol-") && last.ends_with(&why), "{said}");
    site.move_to(&site.kms.url);
    site.place.attach(&[]).end();
}

#[test]
fn a_server_that_accepts_and_never_answers_is_given_up() {
    let site = Site::new(IMPATIENT);
    let faults = Faults::start([], Answer::Silence);
    site.move_to(&faults.url);
    site.refused(6, &format!("could not reach {}: no answer within 3 s", faults.url));
}

#[test]
fn what_is_no_kms_is_said_to_be_none() {
    let site = Site::new(IMPATIENT);
    let page = "<html>Bad Gateway</html>".to_owned();
    let no_kms = |status: u16| {
        format!("what answers there is no KMS, or its answer was cut off (HTTP status {status})")
    };
    for (answer, why) in [
        (Answer::Http(502, page.clone()), no_kms(502)),
        (Answer::Http(200, page), no_kms(200)),
        (Answer::Http(403, "{}".into()), no_kms(403)),
    ] {
        let faults = Faults::start([], answer);
        site.move_to(&faults.url);
        let why = format!("could not reach {}: {why}", faults.url);
        refused_after_another_try(&site, &why, || site.refused(6, &why));
    }
    for answer in [Answer::Garbage, Answer::HangUp] {
        let faults = Faults::start([], answer);
        site.move_to(&faults.url);
        let words = format!("could not reach {}: ", faults.url);
        refused_after_another_try(&site, &words, || site.place.refuse(6, &[]));
    }
}

#[test]
fn what_passes_is_waited_for() {
    let site = Site::new("kms-patience = 3600");
    let faults = Faults::start(
        [
            exception(500, "KMSInternalException", "Try again."),
            exception(400, "ThrottlingException", "Rate exceeded"),
            Answer::Http(500, String::new()),
            exception(400, "KeyUnavailableException", "Not now."),
        ],
        Answer::Pass(site.kms.url.clone()),
    );
    site.move_to(&faults.url);
    let host = site.place.attach(&[]);
    let said = host.output();
    for words in [
        "ThrottlingException: Rate exceeded; will retry until ",
        ": Try again.; ",
        "HTTP status 500",
        "Not now.",
    ] {
        assert!(said.contains(words), "{words}: {said}");
    }
    assert_eq!(faults.seen.try_iter().filter(|seen| matches!(seen, Seen::Request(_))).count(), 5);
    host.end();
}

#[test]
fn what_will_not_pass_is_not_waited_for_whatever_its_http_status() {
    let site = Site::new("kms-patience = 600");
    for status in [400, 403, 500, 503] {
        let faults = Faults::start([], exception(status, "com.amazonaws.kms#AccessDeniedException", "No."));
        site.move_to(&faults.url);
        let said = site.refused(5, "No.");
        assert!(!said.contains("will retry"), "{said}");
        faults.next();
        assert_eq!(faults.seen.try_iter().count(), 0, "asked once");
    }
}

#[test]
fn words_of_the_kms_cannot_steer_a_terminal() {
    let site = Site::new("");
    let faults = Faults::start([], exception(400, "AccessDeniedException", "a\u{1b}[2Jb\nc"));
    site.move_to(&faults.url);
    let said = site.refused(5, "a [2Jb c");
    assert!(said.contains("a [2Jb c"), "{said}");
}

#[test]
fn a_signal_ends_the_wait_of_an_attach_at_once_and_of_its_helper() {
    let site = Site::new("kms-patience = 3600");
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let faults = Faults::start([], Answer::Silence);
        site.move_to(&faults.url);
        let mut command = site.place.attach_command(&[]);
        tie_to_test(&mut command, vec![]);
        let mut child = command.spawn().expect("start sealblk");
        assert!(matches!(faults.next(), Seen::Request(_)));
        kill(Pid::from_raw(child.id() as i32), signal).expect("it runs");
        let status = wait_within(&mut child, limit()).expect("it ends");
        assert_eq!(status.signal(), Some(signal as i32));
        // The helper has let go of its connection.
        assert_eq!(faults.next(), Seen::GaveUp);
        assert!(!site.place.socket().exists());
    }
    // Nobody has the volume.
    site.move_to(&site.kms.url);
    site.place.attach(&[]).end();
}

#[test]
fn a_signal_ends_the_wait_of_a_command_and_nothing_is_left_of_it() {
    let site = Site::new("kms-patience = 3600");
    let volumes = || site.place.catalog().ids().expect("list the volumes").len();
    let before = volumes();
    let faults = Faults::start([], Answer::Silence);
    site.move_to(&faults.url);
    let mut command = site.place.store.command();
    command.args(["volume", "create", "--size", "1MiB", "--key", &format!("aws:{}", site.key)]);
    tie_to_test(&mut command, vec![]);
    let mut child = command.spawn().expect("start sealblk");
    assert!(matches!(faults.next(), Seen::Request(_)));
    kill(Pid::from_raw(child.id() as i32), Signal::SIGINT).expect("it runs");
    assert_eq!(wait_within(&mut child, limit()).expect("it ends").signal(), Some(Signal::SIGINT as i32));
    assert_eq!(volumes(), before);
    let left: Vec<_> = std::fs::read_dir(site.place.store.root().join("layers")).unwrap().collect();
    assert_eq!(left.len(), before, "{left:?}");
}

/// A watcher hears of it while the volume is attached, and before anybody attaches it again.
#[test]
fn a_key_of_a_kms_that_is_down_is_said_to_be_unreachable_and_then_usable_again() {
    let site = Site::new(IMPATIENT);
    let host = site.place.attach(&[]);
    let watch = || {
        let said = site.place.store.ok(&["watch", "--once", "--json"]);
        said.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect::<Vec<Value>>()
    };
    let results = || {
        let events = site.place.events().into_iter().filter(|event| event["detail"]["event"] == "watchKey");
        events.map(|event| event["detail"]["result"].as_str().expect("text").to_owned()).collect::<Vec<_>>()
    };
    assert_eq!((watch().len(), results().len()), (0, 0));
    site.move_to(&nobody());
    let changed = watch();
    assert_eq!(
        (&changed[0]["state"], &changed[0]["attached"]),
        (&json!("unreachable"), &json!([site.place.id()]))
    );
    assert!(changed[0]["message"].as_str().expect("text").contains("could not reach"), "{}", changed[0]);
    assert_eq!(watch().len(), 0, "it is told once");
    site.move_to(&site.kms.url);
    assert_eq!(watch()[0]["state"], "usable");
    site.kms.admin().schedule_deletion(&site.key, 7).expect("schedule it");
    let dying = watch();
    assert!(dying[0]["state"] == "pending-deletion" && dying[0]["deletion"].is_string(), "{}", dying[0]);
    assert_eq!(results(), ["unreachable", "usable", "pending-deletion"]);
    host.end();
}
