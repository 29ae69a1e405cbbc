//! Another process takes the place of the one that serves a volume, while a front-end of our own has requests
//! in flight: no VMM that we know, and no guest, may notice.

use crate::common::attach::{Host, Place, open};
use crate::common::disk::FREE;
use crate::common::frontend::Vmm;
use crate::common::frontend::load::{Load, Random};
use crate::common::frontend::vmm::Kind;
use crate::common::patience::{AtEnd, wait_for};
use crate::common::store::said;
use crate::common::successor::{Played, Successor};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;
use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;

const QUEUES: usize = 2;

/// A volume, attached.
struct Rig {
    place: Place,
}

impl Rig {
    fn new() -> Self {
        Rig { place: Place::new(&[]) }
    }

    fn attach(&self) -> Host {
        self.attach_with(&[])
    }

    fn attach_with(&self, arguments: &[&str]) -> Host {
        let mut command = self.place.attach_command(&[&["--queues", "2"], arguments].concat());
        command.env("RUST_LOG", "debug");
        self.place.start(command, vec![])
    }

    fn connect(&self, kind: Kind, queues: usize) -> Vmm {
        let mut vmm = Vmm::connect(&self.place.socket(), kind, queues, 256, Protocol::empty()).unwrap();
        vmm.start().and_then(|()| vmm.sync()).unwrap();
        vmm
    }

    /// Has another process take over; returns what the command says.
    fn upgrade(&self) -> (Successor, Value) {
        let said: Value =
            serde_json::from_str(&self.place.store.ok(&["upgrade", "t", "--json"])).expect("JSON");
        (Successor::of(&said), said)
    }

    /// The process that has the volume, as `volume show` tells.
    fn holder(&self) -> Option<i64> {
        let shown: Value =
            serde_json::from_str(&self.place.store.ok(&["volume", "show", "t", "--json"])).unwrap();
        shown["attached_by"]["pid"].as_i64()
    }

    fn control(&self) -> PathBuf {
        self.place.volume_folder().join("control.sock")
    }

    fn detach(&self, successor: Successor) {
        self.place.store.ok(&["detach", "t"]);
        successor.ends();
        assert_eq!(self.holder(), None);
        assert!(!self.place.socket().exists() && !self.control().exists());
    }
}

fn loads(queues: usize) -> Vec<Load> {
    let load = |n: u64| {
        let first = FREE.start + 2048 * n;
        Load::new(n, first..first + 2048, true)
    };
    (0..queues as u64).map(load).collect()
}

/// A volume, the process that serves it, a VMM of this kind on it, and what its guest is going to ask for.
fn begun(kind: Kind) -> (Rig, Host, Vmm, Vec<Load>) {
    let rig = Rig::new();
    let host = rig.attach();
    let vmm = rig.connect(kind, QUEUES);
    (rig, host, vmm, loads(QUEUES))
}

/// Keeps the rings full of requests while `f` runs, checks all answers, and reads in the end everything that
/// was written. `f` is given a count of completions.
fn under_load<T>(vmm: &mut Vmm, loads: &mut [Load], f: impl FnOnce(&AtomicU64) -> T) -> T {
    let (over, count) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let run = || {
            while !over.load(Ordering::SeqCst) {
                for (load, ring) in loads.iter_mut().zip(&mut vmm.rings) {
                    while load.submit(ring).unwrap() {}
                    ring.kick_if_wanted();
                    while load.take(ring).unwrap() {
                        count.fetch_add(1, Ordering::SeqCst);
                    }
                }
            }
        };
        let load = scope.spawn(run);
        let result = {
            let _ends = AtEnd(&over);
            wait_for_more(&count, "the load has begun");
            f(&count)
        };
        load.join().expect("the guest's requests are answered");
        result
    })
}

fn wait_for_more(count: &AtomicU64, what: &str) {
    let before = count.load(Ordering::SeqCst);
    wait_for(what, || match count.load(Ordering::SeqCst) {
        now if now > before + 1000 => Ok(()),
        now => Err(format!("{} completions", now - before)),
    });
}

fn finish(vmm: &mut Vmm, loads: &mut [Load]) {
    crate::common::frontend::load::settle(loads, &mut vmm.rings).unwrap_or_else(|e| panic!("{e}"));
    for (load, ring) in loads.iter_mut().zip(&mut vmm.rings) {
        load.verify(ring).unwrap_or_else(|e| panic!("{e}"));
    }
}

#[test]
fn a_vmm_with_requests_in_flight_notices_no_upgrade() {
    for kind in [Kind::Qemu7, Kind::Qemu10, Kind::CloudHypervisor, Kind::Firecracker] {
        let queues = if kind == Kind::Firecracker { 1 } else { QUEUES };
        let rig = Rig::new();
        let mut host = Some(rig.attach());
        let mut vmm = rig.connect(kind, queues);
        let mut loads = loads(queues);
        let mut serving: Option<Successor> = None;
        for _ in 0..3 {
            let (successor, said) = under_load(&mut vmm, &mut loads, |count| {
                let upgraded = rig.upgrade();
                wait_for_more(count, "requests are answered by the successor");
                upgraded
            });
            assert!(said["pause_us"].as_u64().is_some(), "{said}");
            assert_eq!(rig.holder(), Some(successor.pid().as_raw().into()));
            match (host.take(), serving.replace(successor)) {
                (Some(mut first), None) => {
                    assert!(first.wait().success(), "{}", first.output());
                    assert_eq!(first.told(), format!("MAINPID={}", serving.as_ref().unwrap().pid()));
                }
                (_, Some(before)) => before.ends(),
                (None, None) => unreachable!(),
            }
            finish(&mut vmm, &mut loads);
            // The connection is the same, and what was agreed on it.
            vmm.sync().unwrap();
            assert_eq!(vmm.read_config().unwrap(), vmm.config);
        }
        // The VMM stops its device, as at the end of its guest, and starts it again.
        vmm.enable(false).and_then(|()| vmm.sync()).unwrap();
        vmm.enable(true).and_then(|()| vmm.sync()).unwrap();
        under_load(&mut vmm, &mut loads, |_| {});
        finish(&mut vmm, &mut loads);
        // The next one finds the same socket.
        drop(vmm);
        let mut vmm = rig.connect(kind, queues);
        under_load(&mut vmm, &mut loads, |_| {});
        finish(&mut vmm, &mut loads);
        drop(vmm);
        rig.detach(serving.expect("a process serves it"));
    }
}

#[test]
fn a_volume_without_a_vmm_is_taken_over_as_well() {
    let rig = Rig::new();
    let mut host = rig.attach();
    let (successor, said) = rig.upgrade();
    assert!(host.wait().success(), "{}", host.output());
    assert_eq!(said["pause_us"], Value::Null);
    let mut vmm = rig.connect(Kind::Qemu10, QUEUES);
    let mut loads = loads(QUEUES);
    under_load(&mut vmm, &mut loads, |_| {});
    finish(&mut vmm, &mut loads);
    // A connected VMM whose guest has not begun.
    drop(vmm);
    let idle = Vmm::connect(&rig.place.socket(), Kind::Qemu10, QUEUES, 256, Protocol::empty()).unwrap();
    let (next, _) = rig.upgrade();
    successor.ends();
    let mut vmm = idle;
    vmm.start().and_then(|()| vmm.sync()).unwrap();
    finish(&mut vmm, &mut loads);
    drop(vmm);
    rig.detach(next);
}

/// How often a volume is taken over in [`one_after_the_other`]: `ci/upgrade` has it done a thousand times.
const UPGRADES: &str = "SEALBLK_UPGRADES";
/// The program of another version, which takes turns with this one: `ci/upgrade` gives one.
const OTHER: &str = "SEALBLK_OTHER_VERSION";

/// What `upgrade --json` says; the first versions that could spelled its keys otherwise.
fn in_todays_words(mut said: Value) -> Value {
    for (earlier, today) in [("Pid", "pid"), ("PauseMicroseconds", "pause_us")] {
        if let Some(value) = said.get(earlier).cloned() {
            said[today] = value;
        }
    }
    said
}

/// Under load, with everything else that happens to a volume between; where another version is given, from
/// this one to that and back.
#[test]
fn one_after_the_other() {
    let times: u32 = std::env::var(UPGRADES).map_or(8, |text| text.parse().expect("a number"));
    let other = std::env::var_os(OTHER);
    let (rig, host, mut vmm, mut loads) = begun(Kind::CloudHypervisor);
    // What lies below would show through a hole.
    loads.iter_mut().for_each(|load| load.discards_may_keep = true);
    let mut pauses = Vec::new();
    let last = under_load(&mut vmm, &mut loads, |count| {
        let mut serving: Option<Successor> = None;
        for n in 0..times {
            let mut command = rig.place.store.command();
            if let Some(other) = other.as_ref().filter(|_| n % 2 == 0) {
                let own = std::mem::replace(&mut command, Command::new(other));
                command.args(own.get_args());
                command.envs(own.get_envs().filter_map(|(name, value)| Some((name, value?))));
            }
            let output = command.args(["upgrade", "t", "--json"]).output().expect("start sealblk");
            assert!(output.status.success(), "upgrade {n}: {}", said(&output));
            let said = in_todays_words(serde_json::from_slice(&output.stdout).expect("JSON"));
            pauses.push(said["pause_us"].as_u64().expect("a VMM is connected"));
            assert_eq!(host.told(), format!("MAINPID={}", said["pid"]), "the service's manager knows");
            if let Some(before) = serving.replace(Successor::of(&said)) {
                before.ends();
            }
            wait_for_more(count, "requests are answered by the successor");
            match n % 20 {
                3 => drop(rig.place.store.ok(&["snapshot", "create", "t", "--name", "s"])),
                7 => drop(rig.place.store.ok(&["volume", "rekey", "t"])),
                13 => drop(rig.place.store.ok(&["volume", "flatten", "t", "--follow"])),
                17 => drop(rig.place.store.ok(&["snapshot", "delete", "s"])),
                _ => {}
            }
        }
        serving.expect("a process serves it")
    });
    finish(&mut vmm, &mut loads);
    pauses.sort_unstable();
    let at = |part: usize| pauses[(pauses.len() - 1) * part / 100] as f64 / 1000.0;
    eprintln!(
        "{times} upgrades; requests stood still for {} ms (median), {} ms (90 %), {} ms (longest)",
        at(50),
        at(90),
        at(100)
    );
    drop((vmm, host));
    rig.detach(last);
}

/// Whoever may attach no more may be upgraded: the key was unwrapped when it could be.
#[test]
fn no_kms_is_asked() {
    let rig = Rig::new();
    let host = rig.attach();
    let key = rig.place.key();
    rig.place.store.ok(&["key", "disable", "--yes", &key]);
    let mut vmm = rig.connect(Kind::Qemu10, QUEUES);
    let mut loads = loads(QUEUES);
    let (successor, _) = under_load(&mut vmm, &mut loads, |_| rig.upgrade());
    finish(&mut vmm, &mut loads);
    drop((vmm, host));
    rig.detach(successor);
    let refused = rig.place.run(rig.place.attach_command(&[]), vec![]);
    assert_ne!(refused.code, 0);
}

/// What changes an attached volume finds the process that serves it now, which can do all
/// that the first could.
#[test]
fn a_successor_makes_snapshots_rekeys_and_grows_the_volume() {
    let (rig, host, mut vmm, mut loads) = begun(Kind::Qemu10);
    // What lies below would show through a hole.
    loads.iter_mut().for_each(|load| load.discards_may_keep = true);
    let ok = |arguments: &[&str]| drop(rig.place.store.ok(arguments));
    let last = under_load(&mut vmm, &mut loads, |count| {
        ok(&["snapshot", "create", "t"]);
        let (first, _) = rig.upgrade();
        ok(&["snapshot", "create", "t"]);
        ok(&["volume", "rekey", "t"]);
        let (second, _) = rig.upgrade();
        first.ends();
        ok(&["volume", "resize", "t", "9MiB"]);
        let (third, _) = rig.upgrade();
        second.ends();
        ok(&["volume", "flatten", "t", "--follow"]);
        wait_for_more(count, "the last one answers requests");
        third
    });
    finish(&mut vmm, &mut loads);
    drop((vmm, host));
    rig.detach(last);
    let host = rig.attach();
    let mut vmm = rig.connect(Kind::Qemu10, QUEUES);
    finish(&mut vmm, &mut loads);
    drop(vmm);
    host.end();
}

/// What the operator has set goes with the volume.
#[test]
fn a_read_only_attach_stays_one() {
    let rig = Rig::new();
    let host = rig.attach_with(&["--read-only", "--serial", "abc"]);
    let session = open(&rig.place.socket());
    let before = session.config().unwrap();
    drop(session);
    let (successor, _) = rig.upgrade();
    drop(host);
    let session = open(&rig.place.socket());
    assert_eq!(session.config().unwrap(), before);
    drop(session);
    let (next, _) = rig.upgrade();
    successor.ends();
    let refused = said(&rig.place.store.run(&["volume", "resize", "t", "9MiB"]));
    assert!(refused.contains("read-only"), "{refused}");
    rig.detach(next);
}

#[test]
fn what_is_not_attached_is_not_upgraded() {
    let rig = Rig::new();
    let said = said(&rig.place.store.run(&["upgrade", "t"]));
    assert!(said.contains("it is not attached"), "{said}");
    let all = rig.place.store.ok(&["upgrade", "--all"]);
    assert_eq!(all, "no volume is attached on this host\n");
    let host = rig.attach();
    let all: Value = serde_json::from_str(&rig.place.store.ok(&["upgrade", "--all", "--json"])).unwrap();
    let successor = Successor::of(&all["upgraded"][0]);
    assert_eq!(all["failed"], json!([]));
    drop(host);
    rig.detach(successor);
}

#[test]
fn a_successor_that_gives_up_leaves_the_volume_where_it_is() {
    let (rig, host, mut vmm, mut loads) = begun(Kind::Qemu10);
    under_load(&mut vmm, &mut loads, |count| {
        for steps in 0..=5 {
            let mut played = Played::new(&rig.control(), 1);
            if steps > 0 {
                played.hear_until("offer");
            }
            if steps > 1 {
                played.say(json!("ready"));
            }
            if steps > 2 {
                played.hear_until("that-is-all");
            }
            if steps > 3 {
                played.say(json!("prepared"));
            }
            if steps > 4 {
                played.hear_until("halted");
            }
            // It goes, with all that was passed to it.
            drop(played);
            wait_for_more(count, "requests are answered by the process that was to be replaced");
            assert_eq!(rig.holder(), Some(host.pid().as_raw().into()), "after {steps} steps");
        }
    });
    finish(&mut vmm, &mut loads);
    // It can be replaced all the same.
    let (successor, _) = under_load(&mut vmm, &mut loads, |_| rig.upgrade());
    finish(&mut vmm, &mut loads);
    drop((vmm, host));
    rig.detach(successor);
}

/// It is asked for what it does not know, or told what makes no sense.
#[test]
fn a_successor_that_is_not_understood_gets_nothing() {
    let (rig, host, mut vmm, mut loads) = begun(Kind::CloudHypervisor);
    under_load(&mut vmm, &mut loads, |_| {
        let mut played = Played::new(&rig.control(), 2);
        let refused = played.hear();
        assert_eq!(refused["failed"]["kind"], "unsupported", "{refused}");
        assert!(refused["failed"]["message"].as_str().unwrap().contains("by protocol 1"), "{refused}");
        assert!(played.passed.is_empty());
        for odd in [json!("prepared"), json!({"taken": {"pid": 1}}), json!("sit"), json!(7)] {
            let mut played = Played::new(&rig.control(), 1);
            played.hear_until("offer");
            played.say(odd);
            assert!(played.hear().get("failed").is_some());
        }
        let mut played = Played::new(&rig.control(), 1);
        played.hear_until("offer");
        played.say(json!("ready"));
        played.hear_until("that-is-all");
        played.say(json!({"taken": {"pid": 1}}));
        assert!(played.hear().get("failed").is_some(), "it has not stopped yet");
    });
    finish(&mut vmm, &mut loads);
    assert_eq!(rig.holder(), Some(host.pid().as_raw().into()));
    drop(vmm);
    host.end();
}

/// Whichever process is killed, and whenever: nothing that was acknowledged is lost, and
/// never do two serve it.
#[test]
fn a_process_that_is_killed_meanwhile_loses_nothing() {
    let rig = Rig::new();
    let mut random = Random::new(3);
    let mut loads = loads(QUEUES);
    let begun = Instant::now();
    let (host, successor) = (rig.attach(), rig.upgrade().0);
    // About what an upgrade takes here: which moment a process is killed in is chance, and all over that.
    let took = begun.elapsed();
    drop(host);
    rig.detach(successor);
    let mut host = rig.attach();
    let mut vmm = rig.connect(Kind::CloudHypervisor, QUEUES);
    for round in 0..12 {
        let before = host.pid();
        let upgraded = std::thread::scope(|scope| {
            let command = scope.spawn(|| rig.place.store.run(&["upgrade", "t", "--json"]));
            for (load, ring) in loads.iter_mut().zip(&mut vmm.rings) {
                while load.submit(ring).unwrap() {}
                ring.kick_if_wanted();
            }
            std::thread::sleep(took.mul_f64(random.below(100) as f64 / 100.0));
            host.signal(Signal::SIGKILL);
            command.join().expect("the command runs")
        });
        host.wait();
        // Its service manager would keep its socket, and pass it to the next.
        drop(host);
        let taken: Option<Value> = serde_json::from_slice(&upgraded.stdout).ok();
        let successor = taken.as_ref().map(Successor::of);
        assert_ne!(successor.as_ref().map(|s| s.pid()), Some(before));
        eprintln!("round {round}: {}", if successor.is_some() { "taken over" } else { "killed before" });
        if successor.is_none() {
            // Its VMM comes back to a process that was attached anew, as after any crash.
            host = rig.attach();
            vmm = vmm.reconnect(&rig.place.socket()).unwrap();
            finish(&mut vmm, &mut loads);
            continue;
        }
        finish(&mut vmm, &mut loads);
        successor.into_iter().for_each(Successor::crash);
        host = rig.attach();
        vmm = vmm.reconnect(&rig.place.socket()).unwrap();
        finish(&mut vmm, &mut loads);
    }
    drop(vmm);
    host.end();
}
