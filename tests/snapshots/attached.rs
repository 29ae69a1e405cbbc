//! Snapshots of volumes that are attached, under load: what they hold, and that the guest
//! notices nothing but a pause.

use crate::common::attach::{flush, open, read, write};
use crate::common::disk::pattern;
use crate::common::frontend::{Request, Segment, Session, SplitRing, block};
use crate::common::patience::AtEnd;
use crate::common::rig::Rig;
use sealblk::catalog::{LayerId, SnapshotId};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// What a volume holds, as a guest sees it.
fn guest_sees(session: &mut Session, len: usize) -> Vec<u8> {
    let ring = &mut session.rings[0];
    (0..len).step_by(1 << 20).flat_map(|at| read(ring, at as u64 / 512, 1 << 20)).collect()
}

#[test]
fn a_snapshot_of_an_attached_volume_holds_what_was_acknowledged_and_nothing_later() {
    for arguments in [&[][..], &["--sector-size", "4096"], &["--unencrypted"]] {
        let mut rig = Rig::new(arguments);
        let (host, socket) = rig.attach("t");
        let mut session = open(&socket);
        let more = pattern(7, 1 << 20);
        write(&mut session.rings[0], 4096, &more);
        rig.data[2 << 20..3 << 20].copy_from_slice(&more);
        let made = rig.json(&["snapshot", "create", "t", "--description", "live"]);
        assert!(made["pause_us"].as_u64().unwrap() > 0, "{made}");
        let id = made["id"].as_str().unwrap();
        let before = rig.data.clone();
        // Over what the frozen layer has, beside it, and zeros of every kind.
        let later = pattern(8, 1 << 20);
        write(&mut session.rings[0], 4096, &later);
        write(&mut session.rings[0], 0, &[0; 8192]);
        let zeroes = Request::write_zeroes(&[Segment { sector: 2048, count: 64, flags: 1 }]);
        assert_eq!(zeroes.run(&mut session.rings[0]).unwrap().status, block::OK);
        rig.data[2 << 20..3 << 20].copy_from_slice(&later);
        rig.data[..8192].fill(0);
        rig.data[1 << 20..(1 << 20) + 64 * 512].fill(0);
        flush(&mut session.rings[0]);
        assert!(guest_sees(&mut session, 8 << 20) == rig.data, "{arguments:?}");
        drop(session);
        host.end();
        let reader = rig.reader();
        assert!(reader.snapshot_content(&reader.snapshot(id)) == before, "{arguments:?}");
        assert!(reader.volume_content(&reader.volume("t")) == rig.data, "{arguments:?}");
        let (host, socket) = rig.attach("t");
        assert!(guest_sees(&mut open(&socket), 8 << 20) == rig.data, "{arguments:?}");
        host.end();
        rig.assert_layers_are_named();
    }
}

#[test]
fn snapshot_after_snapshot_while_a_guest_writes() {
    let rig = Rig::new(&[]);
    let (host, socket) = rig.attach("t");
    let mut session = open(&socket);
    write(&mut session.rings[0], 0, &[0; 64 * 4096]);
    let (done, acknowledged) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut taken = Vec::new();
    std::thread::scope(|scope| {
        let _end = AtEnd(&done);
        let ring = &mut session.rings[0];
        scope.spawn(|| {
            // Each block says which write it was.
            for n in 1_u64.. {
                let block: Vec<u8> = n.to_le_bytes().repeat(512);
                write(ring, (n % 64) * 8, &block);
                acknowledged.store(n, Ordering::SeqCst);
                if done.load(Ordering::SeqCst) {
                    break;
                }
            }
        });
        for _ in 0..5 {
            let before = acknowledged.load(Ordering::SeqCst);
            let id = rig.id(&["snapshot", "create", "t"]);
            taken.push((id, before, acknowledged.load(Ordering::SeqCst)));
        }
        done.store(true, Ordering::SeqCst);
    });
    drop(session);
    host.end();
    let reader = rig.reader();
    for (id, before, after) in taken {
        let content = reader.snapshot_content(&reader.snapshot(&id));
        let numbers: Vec<u64> = (0..64)
            .map(|block| u64::from_le_bytes(content[block * 4096..][..8].try_into().unwrap()))
            .collect();
        // One write at a time: a point in time is the last write that is in it, and every one before.
        let last = *numbers.iter().max().unwrap();
        assert!(last >= before && last <= after + 1, "{before} <= {last} <= {after}");
        for n in last.saturating_sub(63).max(1)..=last {
            let block = (n % 64) as usize * 4096;
            assert!(content[block..block + 4096] == n.to_le_bytes().repeat(512), "write {n} of {last}");
        }
    }
    rig.assert_layers_are_named();
}

#[test]
fn large_reads_go_on_through_snapshots() {
    let rig = Rig::new(&[]);
    let (host, socket) = rig.attach("t");
    let mut session = open(&socket);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _end = AtEnd(&done);
        let (ring, data) = (&mut session.rings[0], &rig.data);
        let done = &done;
        let reader = scope.spawn(move || {
            // What completes together is more than a turn delivers.
            const LEN: usize = 384 << 10;
            let mut rounds = 0;
            while !done.load(Ordering::SeqCst) {
                let places =
                    (0..8).map(|i| (i * 5 + rounds) % 31 * (256 << 10)).map(|at| at.min(data.len() - LEN));
                let places: Vec<usize> = places.collect();
                let reads = places.iter().map(|at| Request::read((at / 512) as u64, LEN).submit(ring));
                let pending = reads.collect::<Result<Vec<_>, _>>().unwrap();
                ring.kick_if_wanted();
                for (at, outcome) in places.iter().zip(block::complete(ring, pending).unwrap()) {
                    assert_eq!(outcome.status, block::OK, "a read at byte {at}");
                    assert!(outcome.data == data[*at..at + LEN], "at byte {at}");
                }
                rounds += 1;
            }
            rounds
        });
        for _ in 0..8 {
            rig.id(&["snapshot", "create", "t"]);
        }
        done.store(true, Ordering::SeqCst);
        assert!(reader.join().unwrap() > 0);
    });
    drop(session);
    host.end();
}

fn counter(ring: &mut SplitRing, n: u64) {
    write(ring, 0, &n.to_le_bytes().repeat(64));
}

#[test]
fn snapshots_of_several_volumes_are_of_one_moment() {
    let rig = Rig::new(&["--tag", "vm=web"]);
    for name in ["u", "d"] {
        rig.place.store.ok(&["volume", "create", "--size", "1MiB", "--name", name, "--tag", "vm=web"]);
    }
    rig.place.store.ok(&["volume", "create", "--size", "1MiB", "--name", "other"]);
    let (first, second) = (rig.attach("t"), rig.attach("u"));
    let (mut one, mut two) = (open(&first.1), open(&second.1));
    counter(&mut one.rings[0], 0);
    let done = AtomicBool::new(false);
    let mut made = Vec::new();
    std::thread::scope(|scope| {
        let _end = AtEnd(&done);
        let (one, two) = (&mut one.rings[0], &mut two.rings[0]);
        scope.spawn(|| {
            // The second is never ahead of the first.
            for n in 1.. {
                counter(one, n);
                counter(two, n);
                if done.load(Ordering::SeqCst) {
                    break;
                }
            }
        });
        for _ in 0..4 {
            made.push(rig.json(&["snapshot", "create", "--all-of", "tag:vm=web"]));
        }
        done.store(true, Ordering::SeqCst);
    });
    drop((one, two));
    first.0.end();
    second.0.end();
    let reader = rig.reader();
    for made in made {
        let snapshots = made.as_array().unwrap();
        assert_eq!(snapshots.len(), 3);
        let count = |volume: &str| {
            let id = reader.volume(volume).id().to_string();
            let of = snapshots.iter().find(|s| s["volume_id"] == id.as_str()).expect("it has a snapshot");
            assert_eq!(of["pause_us"].is_null(), volume == "d");
            let content = reader.snapshot_content(&reader.snapshot(of["id"].as_str().unwrap()));
            u64::from_le_bytes(content[..8].try_into().unwrap())
        };
        let (ahead, behind) = (count("t"), count("u"));
        assert!(ahead == behind || ahead == behind + 1, "{ahead} {behind}");
    }
}

#[test]
fn of_several_volumes_all_have_snapshots_or_none() {
    let rig = Rig::new(&["--tag", "vm=web"]);
    rig.place.store.ok(&["key", "create", "--alias", "alias/gone"]);
    let create =
        ["volume", "create", "--size", "1MiB", "--name", "u", "--tag", "vm=web", "--key", "alias/gone"];
    rig.place.store.ok(&create);
    rig.place.store.ok(&["key", "disable", "--yes", "alias/gone"]);
    let (host, socket) = rig.attach("t");
    let mut session = open(&socket);
    let layers = rig.files("layers");
    let said = rig.refuse(5, &["snapshot", "create", "--all-of", "tag:vm=web"]);
    assert!(said.contains("is disabled"), "{said}");
    // The host process hears of it when the connection ends, and a detach comes after that.
    write(&mut session.rings[0], 0, &pattern(9, 4096));
    assert_eq!(rig.files("snapshots").len(), 0);
    drop(session);
    host.end();
    assert_eq!(rig.files("layers"), layers);
    assert_eq!(rig.reader().volume("t").layers().len(), 1);
    assert!(!rig.place.volume_folder().join("pending.json").exists());
    rig.refuse(3, &["snapshot", "create", "--all-of", "tag:vm=none"]);
    rig.refuse(2, &["snapshot", "create", "--all-of", "tag:vm=web", "t"]);
}

/// Another program on the control socket, line by line.
struct Client(BufReader<UnixStream>);

impl Client {
    fn new(rig: &Rig) -> Self {
        // The socket's own path may be too long.
        let folder = std::fs::File::open(rig.place.volume_folder()).unwrap();
        let fd = std::os::fd::AsRawFd::as_raw_fd(&folder);
        Client(BufReader::new(UnixStream::connect(format!("/proc/self/fd/{fd}/control.sock")).unwrap()))
    }

    fn say(&mut self, line: &Value) {
        self.0.get_mut().write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    fn hear(&mut self) -> Value {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or(Value::Null)
    }

    /// Asks for a snapshot. Each client chooses its layer's name, which is returned.
    fn begin(&mut self) -> LayerId {
        let (id, layer) = (SnapshotId::random(), LayerId::random());
        self.say(&json!({"op": "snapshot", "id": id, "layer": layer, "description": "", "tags": {}}));
        layer
    }

    /// Asks for a snapshot, and links its layer to where layers lie.
    fn make(&mut self, rig: &Rig) -> LayerId {
        let layer = self.begin();
        assert_eq!(self.hear(), "layer-made");
        let made = rig.place.volume_folder().join(format!("{layer}.img"));
        std::fs::hard_link(made, rig.place.store.root().join(format!("layers/{layer}.img"))).unwrap();
        layer
    }
}

#[test]
fn while_a_change_is_under_way_counters_are_told_and_another_change_waits() {
    let rig = Rig::new(&[]);
    let (host, socket) = rig.attach("t");
    let session = open(&socket);
    let counted = || -> Value {
        let said = rig.place.store.ok(&["stats", "t", "--json"]);
        let all: Value = serde_json::from_str(&said).expect("a list");
        all[0].clone()
    };
    let mut client = Client::new(&rig);
    client.make(&rig);
    assert_eq!(counted()["status"]["read_only"], false);
    let store = &rig.place.store;
    std::thread::scope(|scope| {
        let other = scope.spawn(|| store.ok(&["throttle", "t", "--iops", "77"]));
        client.say(&json!({"step": "pause", "hold": true}));
        assert_eq!(client.hear(), "held");
        // The host process lets the queues go on after some seconds, however slow this test is.
        let paused = counted();
        let pauses = &paused["now"]["pauses"];
        if pauses["now_ns"].is_number() {
            assert_eq!((&paused["status"], &paused["limits"]["iops"]), (&Value::Null, &0.into()), "{paused}");
        } else {
            assert_eq!(pauses["count"], 1, "{paused}");
        }
        drop(client);
        other.join().expect("the limits are set once the change is called off");
    });
    assert_eq!(counted()["limits"]["iops"], 77);
    drop(session);
    host.end();
}

#[test]
fn whoever_goes_away_in_the_middle_leaves_the_volume_as_it_was() {
    let rig = Rig::new(&[]);
    let (host, socket) = rig.attach("t");
    let mut session = open(&socket);
    let (layers, id) = (rig.files("layers"), rig.reader().volume("t"));
    let pause = json!({"step": "pause", "hold": true});
    type Script<'a> = (&'a str, &'a dyn Fn(&mut Client));
    let scripts: [Script<'_>; 6] = [
        ("says nothing", &|_| ()),
        ("begins", &|c| {
            c.begin();
        }),
        ("links the layer", &|c| {
            c.make(&rig);
        }),
        ("does not link it, and pauses", &|c| {
            c.begin();
            c.hear();
            c.say(&pause);
            assert_eq!(c.hear()["failed"]["kind"], "not-found");
        }),
        ("commits before it has paused", &|c| {
            c.make(&rig);
            c.say(&json!({"step": "commit"}));
            assert_eq!(c.hear()["failed"]["kind"], "usage");
        }),
        ("pauses", &|c| {
            c.make(&rig);
            c.say(&pause);
            assert_eq!(c.hear(), "held");
        }),
    ];
    for (what, script) in scripts {
        let mut client = Client::new(&rig);
        script(&mut client);
        drop(client);
        // Waits for the end of the pause, if there is one.
        write(&mut session.rings[0], 8, &pattern(3, 4096));
        // The next one is heard when this is over.
        rig.place.store.ok(&["throttle", "t"]);
        assert_eq!(rig.reader().volume("t"), id, "{what}");
    }
    drop(session);
    host.end();
    rig.place.store.ok(&["gc"]);
    assert_eq!(rig.files("layers"), layers);
    let folder = crate::common::rig::files(&rig.place.volume_folder());
    assert!(folder.iter().all(|p| p.ends_with("lock") || p.ends_with("volume.json")), "{folder:?}");
    let (host, socket) = rig.attach("t");
    assert!(open(&socket).rings.len() == 1);
    rig.place.store.ok(&["snapshot", "create", "t"]);
    host.end();
}

#[test]
fn a_clone_and_its_source_are_attached_side_by_side() {
    let rig = Rig::new(&[]);
    let source = rig.attach("t");
    let snapshot = rig.id(&["snapshot", "create", "t"]);
    rig.place.store.ok(&["key", "create", "--alias", "alias/other"]);
    let make = ["volume", "create", "--snapshot", &snapshot, "--name"];
    rig.place.store.ok(&[&make[..], &["c"]].concat());
    rig.place.store.ok(&[&make[..], &["k", "--key", "alias/other", "--size", "9MiB"]].concat());
    let (clone, other) = (rig.attach("c"), rig.attach("k"));
    assert!(rig.reader().volume("c").is_sealed() && rig.reader().volume("k").is_sealed());
    let mut sessions = [&source, &clone, &other].map(|(_, socket)| open(socket));
    for (n, session) in sessions.iter_mut().enumerate() {
        assert!(guest_sees(session, 8 << 20) == rig.data, "{n}");
        write(&mut session.rings[0], 100, &pattern(20 + n as u64, 4096));
        flush(&mut session.rings[0]);
    }
    for (n, session) in sessions.iter_mut().enumerate() {
        let mut expected = rig.data.clone();
        expected[51200..51200 + 4096].copy_from_slice(&pattern(20 + n as u64, 4096));
        assert!(guest_sees(session, 8 << 20) == expected, "{n}");
    }
    drop(sessions);
    for (host, _) in [source, clone, other] {
        host.end();
    }
    assert!(rig.reader().snapshot_content(&rig.reader().snapshot(&snapshot)) == rig.data);
}

#[test]
fn what_is_attached_read_only_is_not_frozen() {
    let rig = Rig::new(&[]);
    let host = rig.place.attach(&["--read-only"]);
    assert!(rig.refuse(4, &["snapshot", "create", "t"]).contains("attached read-only"));
    host.end();
}
