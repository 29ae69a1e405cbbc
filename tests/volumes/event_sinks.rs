//! Delivery of events: at least once, in order, through failures, time-outs and kills, to
//! commands and over HTTP.

use crate::common::frontend::ring::readable;
use crate::common::patience::{limit, wait_for};
use crate::common::process::{tie_to_test, wait_within};
use crate::common::store::{Store, said};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::{Child, Stdio};

/// A store whose settings name these sinks.
fn store_with(sinks: &str) -> Store {
    let store = Store::new();
    store.configure(sinks);
    store
}

/// A sink that runs `script`, which finds its folder, made by this test, in $1.
fn command_sink(name: &str, folder: &std::path::Path, script: &str) -> String {
    let path = folder.join(format!("{name}.sh"));
    fs::write(&path, script).unwrap();
    let command = ["/bin/sh", path.to_str().unwrap(), folder.to_str().unwrap()];
    format!("[[event-sink]]\nname = {name:?}\ncommand = {command:?}\n")
}

fn make_event(store: &Store) {
    store.ok(&["volume", "create", "--size", "1MiB", "--unencrypted"]);
}

fn log(store: &Store) -> String {
    fs::read_to_string(store.root().join("events.jsonl")).unwrap()
}

fn id(event: &str) -> String {
    serde_json::from_str::<Value>(event).unwrap()["id"].as_str().unwrap().to_owned()
}

#[track_caller]
fn delivered(store: &Store, code: i32) -> Vec<u64> {
    let output = store.run(&["events", "deliver", "--json"]);
    assert_eq!(output.status.code(), Some(code), "{}", said(&output));
    let outcomes: Value = serde_json::from_slice(&output.stdout).unwrap();
    outcomes.as_array().unwrap().iter().map(|outcome| outcome["delivered"].as_u64().unwrap()).collect()
}

#[test]
fn a_command_gets_each_event_once_and_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let script = "cat >> $1/events; echo $SEALBLK_EVENT_ID >> $1/ids; echo noise";
    let store = store_with(&command_sink("a", folder.path(), script));
    (0..3).for_each(|_| make_event(&store));
    assert_eq!(delivered(&store, 0), [3]);
    assert_eq!(delivered(&store, 0), [0]);
    // What a crash left of an event is none.
    fs::write(store.root().join("events.jsonl"), log(&store) + "{\"torn").unwrap();
    make_event(&store);
    assert_eq!(delivered(&store, 0), [1]);
    let whole: String =
        log(&store).lines().filter(|l| l.ends_with('}')).map(|l| l.to_owned() + "\n").collect();
    assert_eq!(fs::read_to_string(folder.path().join("events")).unwrap(), whole);
    let ids: Vec<String> = whole.lines().map(id).collect();
    let told = fs::read_to_string(folder.path().join("ids")).unwrap();
    assert_eq!(told.lines().collect::<Vec<_>>(), ids);
}

#[test]
fn a_sink_that_refuses_gets_the_same_event_again_and_holds_up_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let takes = command_sink("takes", folder.path(), "cat >> $1/taken");
    let refuses =
        command_sink("refuses", folder.path(), "cat >> $1/offered; test -e $1/open || exit 3; cat >> $1/x");
    let store = store_with(&(refuses + &takes));
    (0..2).for_each(|_| make_event(&store));
    assert_eq!(delivered(&store, 1), [0, 2]);
    assert_eq!(delivered(&store, 1), [0, 0]);
    fs::write(folder.path().join("open"), "").unwrap();
    assert_eq!(delivered(&store, 0), [2, 0]);
    let log = log(&store);
    let (first, second) = log.split_once('\n').unwrap();
    let offered = fs::read_to_string(folder.path().join("offered")).unwrap();
    assert_eq!(offered, format!("{first}\n{first}\n{first}\n{second}"));
    assert_eq!(fs::read_to_string(folder.path().join("taken")).unwrap(), log);
    let words = said(&store.run(&["events", "deliver"]));
    assert_eq!(words, "refuses: 0 events delivered\ntakes: 0 events delivered\n");
}

#[test]
fn who_is_killed_before_he_could_note_a_delivery_repeats_it() {
    let folder = tempfile::tempdir().unwrap();
    let script = "cat >> $1/events; test -e $1/spare || kill -9 $PPID";
    let store = store_with(&command_sink("a", folder.path(), script));
    (0..2).for_each(|_| make_event(&store));
    let killed = store.run(&["events", "deliver"]);
    assert_eq!(killed.status.code(), None, "{}", said(&killed));
    fs::write(folder.path().join("spare"), "").unwrap();
    assert_eq!(delivered(&store, 0), [2]);
    let events = fs::read_to_string(folder.path().join("events")).unwrap();
    let ids: Vec<String> = events.lines().map(id).collect();
    let [first, second] = &log(&store).lines().map(id).collect::<Vec<_>>()[..] else { panic!("two events") };
    assert_eq!(ids, [first, first, second].map(String::clone));
}

#[test]
fn a_command_that_takes_too_long_is_ended_with_all_it_has_started() {
    let folder = tempfile::tempdir().unwrap();
    let script = "sleep 1000 & echo $! > $1/new; mv $1/new $1/pid; wait";
    let sink = command_sink("slow", folder.path(), script);
    let store = store_with("");
    make_event(&store);
    // As long as it takes the script to start something.
    let mut seconds = 1;
    let pid = loop {
        store.configure(&format!("{sink}timeout = {seconds}\n"));
        let output = store.run(&["events", "deliver"]);
        assert_eq!(output.status.code(), Some(1));
        let words = format!("took longer than {seconds} s, and was killed");
        assert!(said(&output).contains(&words), "{}", said(&output));
        match fs::read_to_string(folder.path().join("pid")) {
            Ok(pid) => break pid,
            Err(e) => assert!(seconds < 300, "within {seconds} s the script starts nothing: {e}"),
        }
        seconds *= 2;
    };
    let left = || fs::read_to_string(format!("/proc/{}/cmdline", pid.trim())).unwrap_or_default();
    wait_for("what the script has started ends", || match left() {
        left if left.contains("1000") => Err(left),
        _ => Ok(()),
    });
}

#[test]
fn a_new_sink_may_begin_with_what_happens_from_now_on() {
    let folder = tempfile::tempdir().unwrap();
    let store = store_with(&command_sink("a", folder.path(), "cat >> $1/events"));
    make_event(&store);
    store.ok(&["events", "deliver", "--from-now"]);
    make_event(&store);
    // It is not new any more.
    store.ok(&["events", "deliver", "--from-now"]);
    let events = fs::read_to_string(folder.path().join("events")).unwrap();
    assert_eq!(events.lines().map(id).collect::<Vec<_>>(), [id(log(&store).lines().nth(1).unwrap())]);
}

#[test]
fn a_log_that_was_replaced_is_delivered_from_its_beginning_one_that_moved_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let store = store_with(&command_sink("a", folder.path(), "cat >> $1/events"));
    (0..2).for_each(|_| make_event(&store));
    assert_eq!(delivered(&store, 0), [2]);
    make_event(&store);
    let lines: Vec<String> = log(&store).lines().map(|line| line.to_owned() + "\n").collect();
    fs::write(store.root().join("events.jsonl"), lines[1..].concat()).unwrap();
    assert_eq!(delivered(&store, 0), [1]);
    fs::write(store.root().join("events.jsonl"), lines[..2].concat()).unwrap();
    assert_eq!(delivered(&store, 0), [2]);
}

/// What an endpoint was asked.
struct Asked {
    line: String,
    headers: Vec<String>,
    body: String,
}

/// Takes one request and answers it with this status.
fn answer(listener: &TcpListener, status: &str) -> Asked {
    assert!(readable(listener, limit()).unwrap(), "nobody has asked within {:?}", limit());
    let (stream, _) = listener.accept().unwrap();
    let asked = read_request(&stream);
    write!(&stream, "HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n").unwrap();
    asked
}

fn read_request(stream: &TcpStream) -> Asked {
    stream.set_read_timeout(Some(limit())).unwrap();
    let mut reader = BufReader::new(stream);
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        match line.trim_end() {
            "" => break,
            line => lines.push(line.to_owned()),
        }
    }
    let length = lines
        .iter()
        .find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length: ")?.parse().ok());
    let mut body = vec![0; length.expect("a length")];
    reader.read_exact(&mut body).unwrap();
    Asked { line: lines.remove(0), headers: lines, body: String::from_utf8(body).unwrap() }
}

#[test]
fn an_endpoint_gets_each_event_by_post_until_it_has_taken_it() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let store = store_with(&format!("[[event-sink]]\nname = 'h'\nurl = 'http://localhost:{port}/in?x=1'\n"));
    (0..2).for_each(|_| make_event(&store));
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| {
            ["503 No", "200 OK", "302 Found", "204 No Content"].map(|status| answer(&listener, status))
        });
        for (code, taken) in [(1, 0), (1, 1), (0, 1)] {
            assert_eq!(delivered(&store, code), [taken]);
        }
        let asked = asked.join().unwrap();
        let log = log(&store);
        let (first, second) = log.trim_end().split_once('\n').unwrap();
        assert_eq!(asked.each_ref().map(|asked| &*asked.body), [first, first, second, second]);
        for asked in &asked {
            assert_eq!(asked.line, "POST /in?x=1 HTTP/1.1");
            let has = |header: &str| asked.headers.iter().any(|h| h.to_ascii_lowercase() == header);
            assert!(has(&format!("host: localhost:{port}")) && has("content-type: application/json"));
            assert!(has(&format!("idempotency-key: {}", id(&asked.body))), "{:?}", asked.headers);
        }
    });
}

#[test]
fn an_endpoint_that_does_not_answer_is_given_up_in_time() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let store = store_with(&format!("[[event-sink]]\nname = 'h'\nurl = '{url}'\ntimeout = 1\n"));
    make_event(&store);
    let output = store.run(&["events", "deliver"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains("did not answer within 1 s"), "{}", said(&output));
}

/// `events deliver --follow`, once it is ready. Killed at drop.
struct Follower {
    child: Child,
    log: PathBuf,
}

impl Follower {
    fn start(store: &Store) -> Self {
        let notify = store.root().with_file_name("follow.notify");
        let log = store.root().with_file_name("follow.log");
        let manager = UnixDatagram::bind(&notify).unwrap();
        manager.set_read_timeout(Some(limit())).unwrap();
        let mut command = store.command();
        command.args(["events", "deliver", "--follow"]).env("NOTIFY_SOCKET", &notify);
        command.stdout(Stdio::null()).stderr(fs::File::create(&log).unwrap());
        tie_to_test(&mut command, vec![]);
        let child = command.spawn().unwrap();
        let mut message = [0; 64];
        manager.recv(&mut message).expect("it gets ready");
        Follower { child, log }
    }

    fn end(mut self) {
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM).unwrap();
        let status = wait_within(&mut self.child, limit()).unwrap();
        assert!(status.success(), "{status}: {}", fs::read_to_string(&self.log).unwrap());
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_service_delivers_what_happens_and_catches_up_when_the_sink_is_back() {
    // An address of its own, so that nobody else takes the port while nobody listens.
    let address: SocketAddr = format!("127.61.{}.7:9080", std::process::id() % 250).parse().unwrap();
    let store = store_with(&format!("[[event-sink]]\nname = 'h'\nurl = 'http://{address}/'\n"));
    let service = Follower::start(&store);
    // Whoever makes events goes on, whether they are delivered or not.
    (0..2).for_each(|_| make_event(&store));
    let busy = store.run(&["events", "deliver"]);
    assert_eq!(busy.status.code(), Some(4), "{}", said(&busy));
    let listener = TcpListener::bind(address).unwrap();
    let mut bodies: Vec<String> = (0..2).map(|_| answer(&listener, "200 OK").body).collect();
    make_event(&store);
    bodies.push(answer(&listener, "200 OK").body);
    assert_eq!(bodies.join("\n") + "\n", log(&store));
    service.end();
    assert_eq!(delivered(&store, 0), [0]);
}
