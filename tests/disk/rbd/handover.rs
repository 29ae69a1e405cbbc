//! One process after the other has an image for the same guest: an upgrade, and a live migration.

use super::cluster::{Cluster, elsewhere, rig, tenure};
use crate::common::attach::Host;
use crate::common::disk::FREE;
use crate::common::frontend::Vmm;
use crate::common::frontend::load::{Load, Random, settle};
use crate::common::frontend::vmm::Kind;
use crate::common::patience::wait_for;
use crate::common::store::sockets;
use crate::common::successor::{Played, Successor};
use crate::devices::rig::Rig;
use crate::nbd::server::content;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::Instant;
use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;

const SIZE: usize = 8 << 20;
const QUEUES: usize = 2;

/// Who an image says has it.
fn holder(cluster: &Cluster, name: &str) -> i32 {
    tenure(cluster, name)["holder"]["pid"].as_i64().expect("a process id") as i32
}

#[test]
fn another_process_takes_an_image_over_and_the_guest_sees_a_pause() {
    let cluster = Cluster::shared();
    let rig = rig(cluster, "upgraded", &[]);
    let there = elsewhere(&rig);
    let image = cluster.image("b", "upgraded");
    let (mut host, mut guest) = rig.attach("t", 512, vec![0; SIZE]);
    guest.work();
    let before = tenure(cluster, "upgraded");
    let mut serving: Option<Successor> = None;
    for seed in [1, 100, 200] {
        let mut next = None;
        guest.writes_survive(seed, || {
            let said = rig.json(&["upgrade", "t"]);
            eprintln!("requests stood still for {} us", said["pause_us"]);
            next = Some(Successor::of(&said));
        });
        let next = next.expect("it was upgraded");
        guest.work();
        let now = tenure(cluster, "upgraded");
        assert_eq!(now["tenure"], before["tenure"], "it is the same attach");
        assert_eq!(now["holder"]["pid"], next.pid().as_raw());
        match serving.replace(next) {
            Some(before) => before.ends(),
            None => assert!(host.wait().success(), "{}", host.output()),
        }
        // Others are kept away as before.
        let said = there.refuse(4, &["volume", "adopt", &image]);
        assert!(said.contains("gives signs of life"), "{said}");
    }
    let data = guest.leave();
    rig.store().ok(&["detach", "t"]);
    serving.expect("one serves it").ends();
    assert!(content(&rig, "volume", "t") == data);
    // It was given back.
    there.store().ok(&["volume", "adopt", &image, "--name", "mine"]);
}

#[test]
fn an_image_without_a_vmm_is_taken_over_as_well() {
    let cluster = Cluster::shared();
    let rig = rig(cluster, "idle", &[]);
    let (mut host, guest) = rig.attach("t", 512, vec![0; SIZE]);
    drop(guest);
    let successor = Successor::of(&rig.json(&["upgrade", "t"]));
    assert!(host.wait().success(), "{}", host.output());
    assert_eq!(holder(cluster, "idle"), successor.pid().as_raw());
    rig.store().ok(&["detach", "t"]);
    successor.ends();
}

#[test]
fn a_successor_that_gives_up_leaves_the_image_where_it_is() {
    let cluster = Cluster::shared();
    let rig = rig(cluster, "left", &[]);
    let there = elsewhere(&rig);
    let image = cluster.image("b", "left");
    let (host, mut guest) = rig.attach("t", 512, vec![0; SIZE]);
    guest.work();
    let before = tenure(cluster, "left");
    let control = rig.place.volume_folder().join("control.sock");
    let began = |mut played: Played| {
        played.hear_until("offer");
        played.say(json!("ready"));
        played.hear_until("that-is-all");
        played
    };
    // Before the image is lent, and when it is.
    for is_lent in [false, true] {
        let mut kept = None;
        guest.writes_survive(if is_lent { 100 } else { 1 }, || {
            let mut played = began(Played::new(&control, 1));
            if is_lent {
                played.say(json!("prepared"));
                played.hear_until("halted");
                let lent = tenure(cluster, "left");
                assert_eq!((&lent["tenure"], &lent["client"]), (&before["tenure"], &json!("")));
                let said = there.refuse(4, &["volume", "adopt", &image]);
                assert!(said.contains("hands it over to another process"), "{said}");
            }
            // It is silent from now on, or goes.
            kept = is_lent.then_some(played);
        });
        guest.work();
        drop(kept);
        let now = tenure(cluster, "left");
        assert_eq!((&now["tenure"], &now["holder"]), (&before["tenure"], &before["holder"]));
    }
    // Also where nobody asks for anything.
    let mut played = began(Played::new(&control, 1));
    played.say(json!("prepared"));
    played.hear_until("halted");
    drop(played);
    wait_for("the image is taken back", || match tenure(cluster, "left")["client"].as_str() {
        Some("") => Err("it is lent still"),
        _ => Ok(()),
    });
    // It can be upgraded all the same.
    let successor = Successor::of(&rig.json(&["upgrade", "t"]));
    guest.work();
    drop(host);
    let data = guest.leave();
    rig.store().ok(&["detach", "t"]);
    successor.ends();
    assert!(content(&rig, "volume", "t") == data);
}

/// Processes that are to take over the volume.
fn successors(volume: &str) -> Vec<Pid> {
    let entries = std::fs::read_dir("/proc").expect("list processes").flatten();
    let numbers = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let is_one = |pid: &i32| {
        let command = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words: Vec<&str> = command.split('\0').collect();
        words.contains(&"take-over") && words.contains(&volume)
    };
    numbers.filter(is_one).map(Pid::from_raw).collect()
}

/// Which moment that is, is chance.
#[test]
fn whichever_process_is_killed_meanwhile_the_image_is_whole_and_free_for_the_next() {
    let cluster = Cluster::shared();
    let rig = rig(cluster, "crashing", &[]);
    let mut random = Random::new(11);
    let (host, guest) = rig.attach("t", 512, vec![0; SIZE]);
    drop(guest);
    let begun = Instant::now();
    let successor = Successor::of(&rig.json(&["upgrade", "t"]));
    let took = begun.elapsed();
    drop(host);
    successor.crash();
    let mut data = vec![0; SIZE];
    for round in 0..8 {
        let (host, mut guest) = rig.attach("t", 512, data);
        guest.work();
        let begun = guest.begin_side_by_side();
        let store = rig.store();
        let output = std::thread::scope(|scope| {
            let command = scope.spawn(|| store.run(&["upgrade", "t", "--json"]));
            std::thread::sleep(took.mul_f64(random.below(100) as f64 / 100.0));
            match round % 2 {
                0 => host.signal(Signal::SIGKILL),
                _ => {
                    for pid in successors(&rig.place.id()) {
                        // It may have ended by itself.
                        let _ = kill(pid, Signal::SIGKILL);
                    }
                }
            }
            command.join().expect("the command runs")
        });
        let taken: Option<Value> = serde_json::from_slice(&output.stdout).ok();
        let taken = taken.filter(|said| said["pid"].is_i64());
        eprintln!("round {round}: {}", if taken.is_some() { "taken over" } else { "not taken over" });
        data = std::mem::take(&mut guest.data);
        drop(guest);
        // Whoever serves it by now.
        taken.as_ref().map(Successor::of).into_iter().for_each(Successor::crash);
        host.crash();
        let (host, mut guest) = rig.attach("t", 512, data);
        guest.find(begun);
        guest.work();
        data = guest.leave();
        host.end();
    }
    assert!(content(&rig, "volume", "t") == data);
}

fn attach(rig: &Rig, name: &str, arguments: &[&str]) -> (Host, PathBuf) {
    let socket = sockets(&rig.place.folder()).join(name);
    let mut command = rig.store().command();
    command.args(["attach", "t", "--queues", "2"]).args(arguments).arg("--socket-path").arg(&socket);
    (rig.place.start(command, vec![]), socket)
}

fn go_on(vmm: &mut Vmm, loads: &mut [Load]) {
    for (load, ring) in loads.iter_mut().zip(&mut vmm.rings) {
        while load.submit(ring).unwrap() {}
        ring.kick_if_wanted();
    }
    settle(loads, &mut vmm.rings).unwrap_or_else(|e| panic!("{e}"));
    for (load, ring) in loads.iter_mut().zip(&mut vmm.rings) {
        load.verify(ring).unwrap_or_else(|e| panic!("{e}"));
    }
}

/// As QEMU stops a device.
fn stop(vmm: &Vmm) {
    vmm.enable(false).unwrap();
    for queue in 0..vmm.rings.len() {
        assert_eq!(vmm.base(queue).unwrap(), vmm.rings[queue].used_idx(), "something is in flight");
    }
    vmm.sync().unwrap();
}

#[test]
fn a_guest_moves_from_process_to_process_and_its_image_with_it() {
    let cluster = Cluster::shared();
    let rig = rig(cluster, "moves", &[]);
    let first = |n: u64| FREE.start + 2048 * n;
    let mut loads: Vec<Load> =
        (0..QUEUES as u64).map(|n| Load::new(n, first(n)..first(n) + 2048, true)).collect();
    let (mut source, socket) = attach(&rig, "0.sock", &[]);
    let mut vmm = Vmm::connect(&socket, Kind::Qemu10, QUEUES, 256, Protocol::empty()).unwrap();
    vmm.start().and_then(|()| vmm.sync()).unwrap();
    for n in 1..=3 {
        go_on(&mut vmm, &mut loads);
        let (destination, socket) = attach(&rig, &format!("{n}.sock"), &["--incoming"]);
        let mut next = vmm.incoming(&socket).unwrap();
        assert_eq!(holder(cluster, "moves"), source.pid().as_raw());
        // It is cancelled at first: the source takes the image back.
        stop(&vmm);
        vmm.start().and_then(|()| vmm.sync()).unwrap();
        assert_eq!(holder(cluster, "moves"), source.pid().as_raw());
        go_on(&mut vmm, &mut loads);
        stop(&vmm);
        next.rings = std::mem::take(&mut vmm.rings);
        next.start().and_then(|()| next.sync()).unwrap();
        assert_eq!(holder(cluster, "moves"), destination.pid().as_raw());
        drop(vmm);
        source.ends_well();
        (source, vmm) = (destination, next);
        go_on(&mut vmm, &mut loads);
    }
    drop(vmm);
    rig.store().ok(&["detach", "t"]);
    source.ends_well();
}
