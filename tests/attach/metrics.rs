//! "sealblk metrics": what Prometheus gets, checked by Prometheus's own promtool, and the rules and the
//! dashboard that use it.

use crate::common::attach::{Place, flush, open, read, write};
use crate::common::disk::pattern;
use crate::common::frontend::Request;
use crate::common::frontend::block::IOERR;
use crate::common::patience::{limit, wait_for};
use crate::common::process::{repository, tie_to_test, tool};
use crate::common::store::{Store, said};
use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};

/// Runs promtool, which must be content.
#[track_caller]
fn promtool(arguments: &[&str], input: &str) {
    let mut command = tool("promtool");
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("start promtool: ./ci/setup gets it");
    let mut its = child.stdin.take().expect("a pipe");
    // It may have ended, and says why.
    let _ = its.write_all(input.as_bytes());
    drop(its);
    let output = child.wait_with_output().expect("promtool ends");
    assert!(output.status.success(), "promtool {arguments:?} (./ci/setup gets it): {}", said(&output));
}

/// The value of one sample.
#[track_caller]
fn value(metrics: &str, sample: &str) -> f64 {
    let found = metrics.lines().find_map(|line| line.strip_prefix(sample)?.strip_prefix(' '));
    let text = found.unwrap_or_else(|| panic!("no {sample} in\n{metrics}"));
    text.parse().expect("a number")
}

fn of_t(place: &Place, name: &str, more: &str) -> String {
    format!("{name}{{volume=\"{}\",name=\"t\"{more}}}", place.id())
}

/// Metrics of a store with everything in it: a volume with requests of each kind, one that is copied up, one
/// that is not attached, an event sink.
fn everything(then: impl FnOnce(&Place, String)) {
    let sink = "[[event-sink]]\nname = \"pager\"\ncommand = [\"/bin/true\"]\n";
    let place = Place::with_settings(sink, &[]);
    place.store.ok(&["volume", "create", "--size", "8MiB", "--name", "idle"]);
    let host = place.attach(&["--iops", "100000", "--hydrate-rate", "1"]);
    let mut session = open(&place.socket());
    let ring = &mut session.rings[0];
    // So much that it is not copied up at once.
    for n in 0..64 {
        write(ring, 128 * n, &pattern(n, 64 << 10));
    }
    read(ring, 0, 4096);
    flush(ring);
    assert_eq!(Request::read(1 << 40, 512).run(ring).expect("an answer").status, IOERR);
    place.store.ok(&["volume", "rekey", "t"]);
    place.store.ok(&["watch", "--once"]);
    let metrics = wait_for("all is counted", || {
        let metrics = place.store.ok(&["metrics"]);
        let count = of_t(&place, "sealblk_volume_request_duration_seconds_count", ",op=\"flush\"");
        let left = of_t(&place, "sealblk_volume_hydration_left_bytes", "");
        match metrics.contains(&format!("{count} 1\n")) && metrics.contains(&left) {
            true => Ok(metrics),
            false => Err(metrics),
        }
    });
    then(&place, metrics);
    host.end();
}

#[test]
fn promtool_accepts_what_is_shown_and_the_rules_do_what_they_say() {
    everything(|_, metrics| promtool(&["check", "metrics"], &metrics));
    let rules = repository().join("resources/prometheus-rules.yml");
    let rules = rules.to_str().expect("a path in UTF-8");
    promtool(&["check", "rules", rules], "");
    let folder = tempfile::tempdir().unwrap();
    let tests = fs::read_to_string(repository().join("tests/attach/rules.test.yml")).unwrap();
    let file = folder.path().join("rules.test.yml");
    fs::write(&file, tests.replace("RULES", rules)).unwrap();
    promtool(&["test", "rules", file.to_str().unwrap()], "");
}

#[test]
fn the_numbers_are_those_of_the_volume() {
    everything(|place, metrics| {
        let of = |name: &str, more: &str| value(&metrics, &of_t(place, name, more));
        assert_eq!(of("sealblk_volume_up", ""), 1.0);
        assert_eq!(of("sealblk_volume_written_bytes_total", ""), f64::from(4 << 20));
        assert_eq!(of("sealblk_volume_read_bytes_total", ""), 4096.0);
        assert_eq!(of("sealblk_volume_requests_total", ",op=\"write\""), 64.0);
        assert_eq!(of("sealblk_volume_request_errors_total", ",op=\"other\""), 1.0);
        assert_eq!(of("sealblk_volume_request_duration_seconds_count", ",op=\"read\""), 1.0);
        assert_eq!(of("sealblk_volume_limit_requests_per_second", ""), 100_000.0);
        assert_eq!(of("sealblk_volume_flush_failed", ""), 0.0);
        assert!(of("sealblk_volume_hydration_left_bytes", "") > 0.0);
        assert!(of("sealblk_volume_pauses_total", "") > 0.0);
        assert_eq!(value(&metrics, "sealblk_store_volumes"), 2.0);
        assert_eq!(value(&metrics, "sealblk_store_volumes_attached"), 1.0);
        assert_eq!(value(&metrics, "sealblk_store_root_key_present"), 1.0);
        assert!(value(&metrics, "sealblk_store_filesystem_free_bytes") > 0.0);
        let undelivered = "sealblk_event_sink_undelivered_events{sink=\"pager\"}";
        assert!(value(&metrics, undelivered) >= 2.0);
        let buckets = of_t(place, "sealblk_volume_request_duration_seconds_bucket", ",op=\"read\",le=");
        let buckets: Vec<u64> = metrics
            .lines()
            .filter(|line| line.starts_with(buckets.trim_end_matches('}')))
            .map(|line| line.rsplit(' ').next().unwrap().parse().unwrap())
            .collect();
        assert!(buckets.len() > 10 && buckets.is_sorted() && buckets.last() == Some(&1), "{buckets:?}");
        place.store.ok(&["events", "deliver"]);
        let metrics = place.store.ok(&["metrics"]);
        assert_eq!(value(&metrics, undelivered), 0.0);
        assert_eq!(value(&metrics, "sealblk_event_sink_lag_seconds{sink=\"pager\"}"), 0.0);
    });
}

/// Every word that begins as our metrics do.
fn names(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !(c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_'));
    words.filter(|word| word.starts_with("sealblk_")).map(String::from).collect()
}

#[test]
fn rules_dashboard_and_documentation_name_what_there_is() {
    everything(|_, metrics| {
        let there = names(&metrics);
        for file in ["resources/prometheus-rules.yml", "resources/grafana-dashboard.json"] {
            let text = fs::read_to_string(repository().join(file)).unwrap();
            let unknown: Vec<_> = names(&text).difference(&there).cloned().collect();
            assert_eq!(unknown, [""; 0], "{file}");
        }
        let dashboard = fs::read(repository().join("resources/grafana-dashboard.json")).unwrap();
        serde_json::from_slice::<serde_json::Value>(&dashboard).expect("the dashboard is JSON");
        let families = metrics.lines().filter_map(|line| line.strip_prefix("# TYPE "));
        let families = families.map(|line| line.split(' ').next().unwrap().trim_end_matches("_total"));
        let documented = fs::read_to_string(repository().join("docs/metrics.md")).unwrap();
        let is_there = |name: &str| {
            let end = name.strip_prefix("sealblk_store_volumes").unwrap_or(name);
            documented.contains(&format!("`{name}`")) || documented.contains(&format!("`{end}`"))
        };
        let missing: Vec<_> = families.filter(|name| !is_there(name)).collect();
        assert_eq!(missing, [""; 0], "docs/metrics.md");
    });
}

#[test]
fn a_volume_whose_process_does_not_answer_and_a_missing_root_key_are_shown() {
    let place = Place::new(&[]);
    place.store.ok(&["volume", "create", "--size", "8MiB", "--name", "u"]);
    let (host, other) = (place.attach(&[]), place.store.attach("u", &[]));
    let key = fs::read_dir(place.store.config()).unwrap().find_map(|entry| {
        let path = entry.unwrap().path();
        path.extension().is_some_and(|e| e == "key").then_some(path)
    });
    let key = key.expect("the root key's file");
    fs::rename(&key, key.with_extension("away")).unwrap();
    host.frozen(|| {
        let metrics = place.store.ok(&["metrics"]);
        assert_eq!(value(&metrics, &of_t(&place, "sealblk_volume_up", "")), 0.0);
        assert_eq!(value(&metrics, "sealblk_store_root_key_present"), 0.0);
        assert_eq!(metrics.matches("sealblk_volume_up{").count(), 2, "{metrics}");
        assert_eq!(metrics.matches("sealblk_volume_written_bytes_total{").count(), 1, "{metrics}");
    });
    fs::rename(key.with_extension("away"), &key).unwrap();
    other.detach();
    host.end();
}

/// `sealblk metrics --listen`, on some port of the loopback. Killed at drop.
struct Server {
    child: Child,
    address: SocketAddr,
}

impl Server {
    fn start(store: &Store) -> Self {
        let mut command: Command = store.command();
        command.args(["metrics", "--listen", "127.0.0.1:0"]).stdout(Stdio::piped());
        tie_to_test(&mut command, vec![]);
        let mut child = command.spawn().expect("start sealblk");
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).expect("it says where it is");
        let url = line.trim_end().strip_prefix("metrics are at http://").expect("a URL");
        let address = url.strip_suffix("/metrics").expect("the path").parse().expect("an address");
        Server { child, address }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).expect("it listens");
        stream.set_read_timeout(Some(limit())).unwrap();
        stream
    }

    /// Head and body of the answer to a request.
    fn ask(&self, first: &str, more: &str) -> (String, String) {
        let mut stream = self.connect();
        write!(stream, "{first} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{more}\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
        (head.to_ascii_lowercase(), body.to_owned())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn prometheus_is_served_in_the_form_that_it_asks_for() {
    let place = Place::new(&[]);
    let host = place.attach(&[]);
    let server = Server::start(&place.store);
    // Who says nothing keeps nobody waiting.
    let silent: Vec<_> = (0..8).map(|_| server.connect()).collect();
    let (head, plain) = server.ask("GET /metrics", "");
    assert!(head.starts_with("http/1.1 200 ") && head.contains("text/plain; version=0.0.4"), "{head}");
    promtool(&["check", "metrics"], &plain);
    let (head, open) = server.ask("GET /metrics", "Accept: application/openmetrics-text;version=1.0.0\r\n");
    assert!(head.contains("content-type: application/openmetrics-text; version=1.0.0"), "{head}");
    assert!(open.ends_with("\n# EOF\n") && !plain.contains("# EOF"), "{open}");
    assert_eq!(value(&open, &of_t(&place, "sealblk_volume_up", "")), 1.0);
    assert!(open.contains("# TYPE sealblk_volume_requests counter\n"), "{open}");
    for (first, status) in
        [("HEAD /metrics", "200"), ("GET /", "200"), ("GET /other", "404"), ("POST /metrics", "405")]
    {
        let (head, _) = server.ask(first, "");
        assert!(head.starts_with(&format!("http/1.1 {status} ")), "{first}: {head}");
    }
    drop(silent);
    host.end();
    wait_for("the volume is not attached any more", || {
        let (_, metrics) = server.ask("GET /metrics", "");
        match value(&metrics, &of_t(&place, "sealblk_volume_attached", "")) {
            0.0 if !metrics.contains("sealblk_volume_up{") => Ok(()),
            _ => Err(metrics),
        }
    });
}

#[test]
fn a_unix_socket_is_for_those_who_may_connect_to_it() {
    let place = Place::new(&[]);
    let path = place.folder().join("metrics.sock");
    let serve = |arguments: &[&str]| {
        let mut command: Command = place.store.command();
        command.args(["metrics", "--unix"]).arg(&path).args(arguments).stdout(Stdio::piped());
        tie_to_test(&mut command, vec![]);
        let mut child = command.spawn().expect("start sealblk");
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).expect("it says where it is");
        assert_eq!(line, format!("metrics are at http+unix://{}\n", path.display()));
        child
    };
    let ask = || {
        let mut stream = UnixStream::connect(&path).expect("it listens");
        stream.set_read_timeout(Some(limit())).unwrap();
        write!(stream, "GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        answer.split_once("\r\n\r\n").expect("a head").1.to_owned()
    };
    let mode = || fs::metadata(&path).unwrap().permissions().mode() & 0o777;
    let mut first = serve(&["--socket-mode", "0606"]);
    assert_eq!((value(&ask(), "sealblk_store_volumes"), mode()), (1.0, 0o606));
    // Another one does not take its place while it is there.
    let output = place.store.run(&["metrics", "--unix", path.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(4), "{}", said(&output));
    first.kill().unwrap();
    first.wait().unwrap();
    let mut second = serve(&["--socket-group", "root"]);
    assert_eq!((value(&ask(), "sealblk_store_volumes"), mode()), (1.0, 0o660));
    second.kill().unwrap();
    second.wait().unwrap();
    for wrong in [
        &["--socket-mode", "0600"][..],
        &["--listen", "--unix", "/x"],
        &["--unix", "/x", "--textfile", "/x.prom"],
    ] {
        let output = place.store.run(&[&["metrics"], wrong].concat());
        assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    }
}

#[test]
fn a_text_file_is_replaced_as_a_whole() {
    let place = Place::new(&[]);
    let file = place.folder().join("sealblk.prom");
    let name = file.to_str().unwrap();
    place.store.ok(&["metrics", "--textfile", name]);
    let first = fs::read_to_string(&file).unwrap();
    promtool(&["check", "metrics"], &first);
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o644);
    assert_eq!(value(&first, "sealblk_store_volumes"), 1.0);
    // A reader that has the old one open reads it to its end.
    let mut open = fs::File::open(&file).unwrap();
    place.store.ok(&["volume", "create", "--size", "8MiB"]);
    place.store.ok(&["metrics", "--textfile", name]);
    let mut old = String::new();
    open.read_to_string(&mut old).unwrap();
    assert_eq!(old, first);
    assert_eq!(value(&fs::read_to_string(&file).unwrap(), "sealblk_store_volumes"), 2.0);
    let there = fs::read_dir(place.folder()).unwrap().map(|it| it.unwrap().file_name());
    assert!(there.into_iter().all(|name| !name.to_string_lossy().ends_with(".tmp")));
    for (arguments, code) in [
        (&["metrics", "--textfile", "/tmp/sealblk.txt"][..], 2),
        (&["metrics", "--textfile", "/nowhere/at/all.prom"], 3),
        (&["metrics", "--interval", "5"], 2),
        (&["metrics", "--listen", "nowhere"], 2),
        (&["metrics", "--json"], 2),
    ] {
        let output = place.store.run(arguments);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", said(&output));
    }
}
