//! Clients of the control socket that are slow, silent, many, or late.

use crate::common::attach::{Place, open};
use crate::common::frontend::{Request, Session};
use crate::common::patience::{AtEnd, limit, wait_for};
use crate::common::store::said;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

const DETACH: &[u8] = b"{\"op\":\"detach\"}\n";

fn connect(place: &Place) -> UnixStream {
    let client = UnixStream::connect(place.volume_folder().join("control.sock")).expect("somebody listens");
    client.set_read_timeout(Some(limit())).unwrap();
    client
}

/// What a client is answered; empty if the connection is closed without a word.
fn answer(client: UnixStream) -> String {
    let mut line = String::new();
    BufReader::new(client).read_line(&mut line).expect("an answer in time");
    line
}

#[test]
fn clients_that_dribble_or_say_nothing_hold_up_nobody() {
    let place = Place::new(&[]);
    let host = place.attach(&[]);
    let silent: Vec<_> = (0..8).map(|_| connect(&place)).collect();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _end = AtEnd(&over);
        let over = &over;
        let dribble = move |mut client: UnixStream| {
            // Every byte is something new, so that a limit on silence would never be reached.
            while !over.load(Ordering::Relaxed) && client.write_all(b" ").is_ok() {
                std::thread::yield_now();
            }
        };
        for client in (0..4).map(|_| connect(&place)).collect::<Vec<_>>() {
            scope.spawn(move || dribble(client));
        }
        place.store.ok(&["throttle", "t", "--iops", "1000"]);
        place.store.ok(&["detach", "t"]);
        over.store(true, Ordering::Relaxed);
    });
    host.ends_well();
    for client in silent {
        let told: Value = serde_json::from_str(&answer(client)).expect("a word at the end");
        assert_eq!(told["failed"]["message"], "the request did not come in time");
    }
}

#[test]
fn a_crowd_of_clients_keeps_nobody_out() {
    let place = Place::new(&[]);
    let host = place.attach(&[]);
    let crowd: Vec<_> = (0..200).map(|_| connect(&place)).collect();
    place.store.ok(&["throttle", "t", "--iops", "1000"]);
    place.store.ok(&["detach", "t"]);
    host.ends_well();
    drop(crowd);
}

/// Whoever asks before the volume is let go of hears how that went. Who is connected, but asks later than
/// that, has half a second: then he hears that he was too late, and never nothing.
#[test]
fn a_detach_that_is_asked_for_while_another_ends_is_answered_too() {
    let place = Place::new(&[]);
    for round in 0..20 {
        let host = place.attach(&[]);
        let mut clients: Vec<_> = (0..6).map(|_| connect(&place)).collect();
        let mut last = clients.split_off(3);
        clients.iter_mut().for_each(|c| c.write_all(DETACH).unwrap());
        // The others ask when the end is on its way, or over except for them.
        let first = answer(clients.remove(0));
        last.iter_mut().for_each(|c| drop(c.write_all(DETACH)));
        assert_eq!(first, "\"detached\"\n");
        for client in clients {
            assert_eq!(answer(client), "\"detached\"\n", "round {round}");
        }
        for client in last {
            let told = answer(client);
            assert!(
                told == "\"detached\"\n" || told.contains("did not come in time"),
                "round {round}: {told}"
            );
        }
        host.ends_well();
    }
}

#[test]
fn an_attached_volume_is_renamed_by_its_host_process() {
    let place = Place::new(&[]);
    let id = place.id();
    let host = place.attach(&[]);
    let said = place.store.ok(&["volume", "rename", "t", "other"]);
    assert_eq!(said, format!("{id} is called other\n"));
    // What the process writes later has the name as well.
    place.store.ok(&["snapshot", "create", "other"]);
    place.store.ok(&["detach", "other"]);
    host.ends_well();
    place.store.ok(&["store", "check"]);
    place.store.ok(&["volume", "rename", "other", "t"]);
    let host = place.attach(&["--read-only"]);
    place.store.ok(&["volume", "rename", "t", "--unnamed"]);
    place.store.ok(&["detach", &id]);
    host.ends_well();
    place.store.ok(&["store", "check"]);
}

fn serial_of(session: &mut Session) -> String {
    let outcome = Request::get_id(20).run(&mut session.rings[0]).expect("it completes");
    String::from_utf8(outcome.data).expect("text").trim_end_matches('\0').to_owned()
}

#[test]
fn what_is_kept_with_a_volume_is_in_force_at_once_and_at_the_next_attach() {
    let place = Place::new(&[]);
    let shown = || -> Value {
        let shown: Value = serde_json::from_str(&place.store.ok(&["volume", "show", "t", "--json"])).unwrap();
        shown["attachment"]["limits"].clone()
    };
    let limits = |iops: u64, throughput: u64, burst_ms: u64| json!({"iops": iops, "throughput": throughput, "burst_ms": burst_ms});
    let host = place.attach(&[]);
    assert_eq!(shown(), limits(0, 0, 1000));
    let output =
        place.store.run(&["volume", "modify", "t", "--iops", "3000", "--serial", "kept", "--queues", "3"]);
    assert!(
        said(&output).contains("the limits are in force") && said(&output).contains("attached again"),
        "{}",
        said(&output)
    );
    assert_eq!(shown(), limits(3000, 0, 1000));
    // What a throttle says lasts until the detach.
    place.store.ok(&["throttle", "t", "--throughput", "1MiB"]);
    assert_eq!(shown(), limits(0, 1 << 20, 1000));
    host.end();
    let host = place.attach(&["--json"]);
    let told: Value = serde_json::from_str(&host.output()).expect("one JSON value");
    assert_eq!((&told["queues"], shown()), (&json!(3), limits(3000, 0, 1000)));
    let mut session = open(&place.socket());
    assert!(serial_of(&mut session) == "kept");
    drop(session);
    host.end();
    // The attach's own arguments come first.
    let host = place.attach(&["--json", "--iops", "5", "--serial", "mine", "--queues", "1", "--burst", "2"]);
    let told: Value = serde_json::from_str(&host.output()).expect("one JSON value");
    assert_eq!((&told["queues"], shown()), (&json!(1), limits(5, 0, 2000)));
    let mut session = open(&place.socket());
    assert!(serial_of(&mut session) == "mine");
    drop(session);
    host.end();
}

#[test]
fn a_key_that_attached_volumes_need_is_not_switched_off_by_mistake() {
    let place = Place::new(&[]);
    let id = place.id();
    let host = place.attach(&[]);
    place.store.ok(&["snapshot", "create", "t", "--name", "s"]);
    for arguments in [&["disable", "alias/aws/ebs"][..], &["schedule-deletion", "alias/aws/ebs"]] {
        let output = place.store.run(&[&["key"], arguments].concat());
        let words = said(&output);
        assert_eq!(output.status.code(), Some(4), "{words}");
        assert!(words.contains(&id) && words.contains("snap-") && words.contains("--yes"), "{words}");
    }
    place.store.ok(&["volume", "show", "t", "--check-key"]);
    place.store.ok(&["key", "disable", "alias/aws/ebs", "--yes"]);
    host.end();
    // Of what is not attached it is said, and done.
    place.store.ok(&["key", "enable", "alias/aws/ebs"]);
    assert!(place.store.ok(&["key", "disable", "alias/aws/ebs"]).contains(&format!("needed by {id}")));
}

#[test]
fn a_log_in_json_says_what_each_line_is_about() {
    let place = Place::new(&[]);
    let mut command = place.attach_command(&["-v", "--log-format", "json"]);
    command.env_remove("RUST_LOG");
    let host = place.start(command, vec![]);
    drop(open(&place.socket()));
    host.says("the VMM has disconnected");
    drop(open(&place.socket()));
    wait_for("the second VMM leaves", || match host.output().matches("the VMM has disconnected").count() {
        2.. => Ok(()),
        _ => Err(host.output()),
    });
    let output = host.output();
    host.end();
    let lines = output.lines().filter(|line| line.starts_with('{'));
    let lines: Vec<Value> = lines.map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(lines.len() + 1, output.lines().count(), "all but that it is attached: {output}");
    let connections: Vec<_> = lines
        .iter()
        .filter(|line| line["message"].as_str().expect("text").contains("a VMM has connected"))
        .map(|line| (line["connection"].as_u64(), line["level"].as_str(), line["volume"].as_str()))
        .collect();
    let id = place.id();
    assert_eq!(connections, [1, 2].map(|n| (Some(n), Some("info"), Some(id.as_str()))));
    // What ends it is a line like the others; a variable asks for that as well.
    let mut command = place.attach_command(&[]);
    command.env_remove("RUST_LOG").env("SEALBLK_LOG_FORMAT", "json");
    place.store.ok(&["key", "disable", "alias/aws/ebs"]);
    let refused = place.run(command, vec![]);
    assert_eq!(refused.code, 5);
    for line in refused.err.lines() {
        let line: Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
        assert!(line["time"].is_string() && line["level"].is_string(), "{line}");
    }
    assert!(refused.err.contains("is disabled"), "{}", refused.err);
    // Where there is no journal, the level stands before each line, as journald reads it.
    let mut command = place.attach_command(&["--log-format", "journal"]);
    command.env("RUST_LOG", "");
    let refused = place.run(command, vec![]);
    let in_journal = Path::new("/run/systemd/journal/socket").exists();
    assert!(in_journal || refused.err.lines().any(|line| line.starts_with("<3>")), "{}", refused.err);
}

#[test]
fn an_argument_comes_before_the_variable_and_a_wrong_variable_is_refused() {
    let place = Place::new(&[]);
    let run = |format: &str, arguments: &[&str]| {
        let mut command = place.attach_command(arguments);
        command.env_remove("RUST_LOG").env("SEALBLK_LOG_FORMAT", format);
        place.run(command, vec![])
    };
    place.store.ok(&["key", "disable", "alias/aws/ebs"]);
    for (format, arguments) in [("json", &["--log-format", "text"][..]), ("", &[])] {
        let refused = run(format, arguments);
        assert_eq!(refused.code, 5);
        assert!(!refused.err.contains('{') && refused.err.contains("sealblk: attach"), "{}", refused.err);
    }
    let refused = run("xml", &[]);
    assert_eq!(refused.code, 2);
    assert!(
        refused.err.contains("SEALBLK_LOG_FORMAT is \"xml\": use text, json or journal"),
        "{}",
        refused.err
    );
}
