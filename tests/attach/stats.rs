//! What a host process counts, and what "sealblk stats" shows of it.

use crate::common::attach::{Place, flush, open, read, write};
use crate::common::disk::pattern;
use crate::common::frontend::block::{IOERR, OK, Segment};
use crate::common::frontend::{Request, Session};
use crate::common::patience::{AtEnd, wait_for};
use crate::common::store::said;
use serde_json::Value;
use std::sync::atomic::{AtomicBool, Ordering};

/// The one volume that "stats" reports of with these arguments.
fn stats(place: &Place, arguments: &[&str]) -> Value {
    let said = place.store.ok(&[&["stats", "t", "--json"], arguments].concat());
    let all: Vec<Value> = serde_json::from_str(&said).expect("a list");
    all.into_iter().next().expect("the volume")
}

#[test]
fn requests_are_counted_by_kind_with_their_bytes_errors_and_times() {
    let place = Place::new(&[]);
    let host = place.attach(&[]);
    let mut session = open(&place.socket());
    let ring = &mut session.rings[0];
    for n in 0..3 {
        write(ring, 8 * n, &pattern(n, 4096));
    }
    read(ring, 0, 8192);
    flush(ring);
    flush(ring);
    let status = |request: Request, ring: &mut _| request.run(ring).expect("an answer").status;
    assert_eq!(status(Request::read(1 << 40, 512), ring), IOERR);
    assert_eq!(status(Request::get_id(20), ring), OK);
    let some = Segment { sector: 64, count: 16, flags: 0 };
    assert_eq!(status(Request::discard(&[some]), ring), OK);
    assert_eq!(status(Request::write_zeroes(&[Segment { count: 8, ..some }]), ring), OK);
    // The times are noted right after the driver was shown the answer.
    let report = wait_for("all requests are counted", || {
        let report = stats(&place, &[]);
        let timed = ["read", "write", "flush", "discard", "write_zeroes"];
        match timed.iter().all(|kind| report["report"][kind]["await_ms"].is_number()) {
            true => Ok(report),
            false => Err(report.to_string()),
        }
    });
    let counted = |kind: &str| {
        let of = &report["now"][kind];
        (of["requests"].as_u64(), of["bytes"].as_u64(), of["errors"].as_u64())
    };
    assert_eq!(counted("write"), (Some(3), Some(3 * 4096), Some(0)), "{report}");
    assert_eq!(counted("read"), (Some(1), Some(8192), Some(0)));
    assert_eq!(counted("flush"), (Some(2), Some(0), Some(0)));
    assert_eq!(counted("discard"), (Some(1), Some(8192), Some(0)));
    assert_eq!(counted("write_zeroes"), (Some(1), Some(4096), Some(0)));
    // The serial, and a read beyond the end, which is no request of the disk's.
    assert_eq!(counted("other"), (Some(2), Some(0), Some(1)));
    let writes = &report["report"]["write"];
    let ms = |name: &str| writes[name].as_f64().expect("a number of milliseconds");
    assert!(0.0 < ms("p50_ms") && ms("p50_ms") <= ms("p99_ms") && ms("p99_ms") <= ms("max_ms"), "{writes}");
    let now = &report["now"];
    assert!(now["cipher"]["samples"].as_u64() > Some(0), "{now}");
    assert!(now["sleeps"].as_u64() > Some(0) && now["depth_max"].as_u64() == Some(1), "{now}");
    assert_eq!((now["depth"].as_u64(), &now["oldest_in_flight_ns"]), (Some(0), &Value::Null));
    assert_eq!((&report["report"]["since_attach"], &report["report"]["errors"]), (&true.into(), &1.into()));

    // They last longer than a VMM, and begin anew with the next attach.
    drop(session);
    let mut session = open(&place.socket());
    write(&mut session.rings[0], 0, &pattern(9, 512));
    assert_eq!(stats(&place, &[])["now"]["write"]["requests"], 4);
    drop(session);
    host.end();
    let host = place.attach(&[]);
    assert_eq!(stats(&place, &[])["now"]["write"]["requests"], 0);
    host.end();
    let output = place.store.run(&["stats", "t"]);
    assert_eq!(output.status.code(), Some(3), "{}", said(&output));
    assert!(said(&output).contains("it is not attached"), "{}", said(&output));
}

#[test]
fn what_waits_for_the_limits_is_seen_with_its_age() {
    let place = Place::new(&[]);
    let host = place.attach(&["--iops", "1", "--burst", "0.01"]);
    let mut session = open(&place.socket());
    let ring = &mut session.rings[0];
    let pending: Vec<_> = (0..4)
        .map(|n| {
            let pending = Request::write(8 * n, &pattern(n, 4096)).submit(ring).expect("room in the ring");
            ring.kick_if_wanted();
            pending
        })
        .collect();
    let report = wait_for("a request waits for the limits", || {
        let report = stats(&place, &[]);
        match report["now"]["throttled"]["count"].as_u64() {
            Some(1..) => Ok(report),
            _ => Err(report.to_string()),
        }
    });
    assert!(report["now"]["oldest_in_flight_ns"].as_u64() > Some(0), "{report}");
    assert!(report["now"]["depth"].as_u64() > Some(0), "{report}");
    assert_eq!(report["limits"]["iops"], 1);
    place.store.ok(&["throttle", "t"]);
    for pending in pending {
        let used = ring.wait_used().expect("it goes on");
        assert_eq!(pending.finish(ring, used).expect("an answer").status, OK);
    }
    let after = wait_for("waits are over", || {
        let report = stats(&place, &[]);
        match report["report"]["waited"]["await_ms"].is_number() {
            true => Ok(report),
            false => Err(report.to_string()),
        }
    });
    assert!(after["now"]["throttled"]["total_ns"].as_u64() > Some(0), "{after}");
    assert_eq!((&after["now"]["depth"], &after["limits"]["iops"]), (&0.into(), &0.into()));
    host.end();
}

#[test]
fn pauses_are_counted_with_their_length() {
    let place = Place::new(&[]);
    let host = place.attach(&["--queues", "2"]);
    let mut session = open(&place.socket());
    write(&mut session.rings[0], 0, &pattern(1, 4096));
    place.store.ok(&["snapshot", "create", "t"]);
    place.store.ok(&["snapshot", "create", "t"]);
    let pauses = &stats(&place, &[])["now"]["pauses"];
    let ns = |name: &str| pauses[name].as_u64().expect("a number");
    assert_eq!((ns("count"), &pauses["now_ns"]), (2, &Value::Null), "{pauses}");
    assert!(0 < ns("longest_ns") && ns("longest_ns") < ns("total_ns"), "{pauses}");
    host.end();
}

#[test]
fn a_report_is_of_the_time_since_the_one_before() {
    let place = Place::new(&[]);
    let host = place.attach(&[]);
    let mut session = open(&place.socket());
    write(&mut session.rings[0], 0, &pattern(1, 4096));
    let said = place.store.ok(&["stats", "--interval", "0.1", "--count", "3", "--json"]);
    let reports: Vec<Vec<Value>> =
        said.lines().map(|line| serde_json::from_str(line).expect("one report a line")).collect();
    let of = |n: usize| &reports[n][0]["report"];
    assert_eq!(
        (reports.len(), &of(0)["since_attach"], &of(0)["write"]["requests"]),
        (3, &true.into(), &1.into())
    );
    for n in 1..3 {
        assert_eq!(
            (&of(n)["since_attach"], &of(n)["write"]["requests"]),
            (&false.into(), &0.into()),
            "{said}"
        );
        assert_eq!(of(n)["write"]["await_ms"], Value::Null);
    }
    let text = place.store.ok(&["stats"]);
    let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!((lines.len(), lines[0][..3].to_vec(), lines[1][0]), (2, vec!["VOLUME", "r/s", "rMB/s"], "t"));
    assert_eq!((lines[0].len(), lines[1].len(), lines[1].last()), (14, 14, Some(&"0")), "{text}");
    host.end();
    assert_eq!(place.store.ok(&["stats"]), "no volume is attached\n");
}

#[test]
fn a_process_that_does_not_answer_is_named_and_holds_up_no_other() {
    let place = Place::new(&[]);
    place.store.ok(&["volume", "create", "--size", "8MiB", "--name", "u"]);
    let (host, other) = (place.attach(&[]), place.store.attach("u", &[]));
    host.frozen(|| {
        let output = place.store.run(&["stats", "--json"]);
        assert_eq!(output.status.code(), Some(1), "{}", said(&output));
        let all: Vec<Value> = serde_json::from_slice(&output.stdout).expect("a list");
        let [t, u] = &all[..] else { panic!("{all:?}") };
        assert!(t["problem"].as_str().is_some_and(|p| p.contains("does not answer")), "{t}");
        assert!(u["report"]["seconds"].as_f64() > Some(0.0), "{u}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("does not answer"));
    });
    other.detach();
    host.end();
}

/// Does `what` while the first block of the disk is written again and again.
pub fn while_written(session: &mut Session, what: impl FnOnce()) {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _end = AtEnd(&over);
        let (over, ring) = (&over, &mut session.rings[0]);
        scope.spawn(move || {
            while !over.load(Ordering::Relaxed) {
                write(ring, 0, &pattern(1, 4096));
            }
        });
        what();
    });
}

#[test]
fn a_list_says_what_attached_volumes_do_if_it_is_asked_to() {
    let place = Place::new(&[]);
    place.store.ok(&["volume", "create", "--size", "8MiB", "--name", "u"]);
    let listed = |arguments: &[&str]| -> Vec<Value> {
        let said = place.store.ok(&[&["volume", "list", "--json"], arguments].concat());
        serde_json::from_str(&said).expect("a list")
    };
    // Nobody waits where nothing is attached.
    assert!(listed(&["--rates", "86400"]).iter().all(|it| it["rates"].is_null()));
    let host = place.attach(&[]);
    let mut session = open(&place.socket());
    assert!(listed(&[]).iter().all(|it| it.get("rates").is_none()), "a plain list asks nobody");
    while_written(&mut session, || {
        let rates = wait_for("writes are seen", || {
            let listed = listed(&["--rates", "0.1"]);
            let [t, u] = &listed[..] else { panic!("{listed:?}") };
            assert!(u["rates"].is_null(), "{u}");
            match t["rates"]["write"]["per_second"].as_f64() {
                Some(rate) if rate > 0.0 => Ok(t["rates"].clone()),
                _ => Err(t.to_string()),
            }
        });
        assert_eq!((&rates["since_attach"], &rates["read"]["requests"]), (&false.into(), &0.into()));
    });
    let text = place.store.ok(&["volume", "list", "--rates", "0.1"]);
    let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows[0][rows[0].len() - 4..], ["R/S", "W/S", "READ/S", "WRITTEN/S"], "{text}");
    assert_eq!(rows[2][rows[2].len() - 4..], ["-"; 4], "{text}");
    host.frozen(|| {
        let output = place.store.run(&["volume", "list", "--rates", "0.1"]);
        assert!(output.status.success() && said(&output).contains("does not answer"), "{}", said(&output));
    });
    host.end();
}
