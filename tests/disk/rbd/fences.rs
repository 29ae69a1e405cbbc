//! One host at a time: who else wants an image is refused with the holder's name, and who has lost one is
//! answered nothing any more.

use super::cluster::{Cluster, elsewhere, keeper_of, rig, server_of, spare_of, tenure};
use crate::common::attach::read;
use crate::common::disk::pattern;
use crate::common::frontend::Request;
use crate::common::frontend::block::IOERR;
use crate::common::patience::wait_for;
use crate::nbd::server::{attach, content};
use nix::sys::signal::{Signal, kill};
use serde_json::Value;

const SIZE: usize = 8 << 20;

#[test]
fn a_second_host_is_refused_with_the_name_of_the_first() {
    let cluster = Cluster::shared();
    let rig = rig(cluster, "held", &[]);
    let there = elsewhere(&rig);
    let (host, mut guest) = rig.attach("t", 512, vec![0; SIZE]);
    guest.work();
    let image = cluster.image("b", "held");
    let said = there.refuse(4, &["volume", "adopt", &image, "--name", "mine"]);
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    let holder = format!("process {} on the host {}", host.pid(), name.trim());
    for words in [&holder, &format!("which has {} attached, since 20", rig.place.id()), "--break-lock"] {
        assert!(said.contains(words), "{words}: {said}");
    }
    assert_eq!(tenure(cluster, "held")["holder"]["pid"], host.pid().as_raw());
    // Who only reads needs no lock.
    rig.store().ok(&["volume", "show", "t"]);
    guest.work();
    let data = guest.leave();
    host.end();
    there.store().ok(&["volume", "adopt", &image, "--name", "mine"]);
    let (host, mut guest) = there.attach("mine", 512, data);
    guest.look();
    guest.leave();
    host.end();
}

#[test]
fn a_host_whose_lock_is_broken_answers_nothing_any_more_and_says_why() {
    let cluster = Cluster::shared();
    let rig = rig(cluster, "broken", &[]);
    let there = elsewhere(&rig);
    let (host, mut guest) = rig.attach("t", 512, vec![0; SIZE]);
    guest.work();
    guest.write_at_sector_one();
    let data = guest.data.clone();
    let image = cluster.image("b", "broken");
    there.store().ok(&["volume", "adopt", &image, "--name", "mine", "--break-lock"]);
    // From now on, whatever it is asked.
    let ring = &mut guest.session.rings[0];
    assert_eq!(Request::write(0, &[1; 4096]).run(ring).unwrap().status, IOERR);
    assert_eq!(Request::read(0, 4096).run(ring).unwrap().status, IOERR);
    assert_eq!(Request::flush().run(ring).unwrap().status, IOERR);
    host.says("it is lost to this process, and every request fails");
    let events = rig.place.events();
    let event = events.iter().find(|event| event["detail"]["event"] == "fenceVolume").expect("an event");
    assert_eq!(event["detail"]["result"], "failed", "{event}");
    assert!(event["detail"]["cause"].as_str().unwrap().contains("the image meanwhile"), "{event}");
    // The other one has all that was answered, also while the first goes on asking.
    let (second, mut other) = there.attach("mine", 512, data);
    other.look();
    other.work();
    let ring = &mut guest.session.rings[0];
    assert_eq!(Request::write(0, &[2; 4096]).run(ring).unwrap().status, IOERR);
    let data = other.leave();
    second.end();
    // Nobody has the image now, and it is the first one's no more.
    assert_eq!(Request::write(0, &[3; 4096]).run(&mut guest.session.rings[0]).unwrap().status, IOERR);
    drop(guest);
    host.signal(Signal::SIGTERM);
    let mut host = host;
    host.wait();
    assert!(content(&there, "volume", "mine") == data);
}

#[test]
fn a_server_that_is_killed_is_started_again_and_the_guest_sees_a_pause() {
    let cluster = Cluster::shared();
    let rig = rig(cluster, "killed", &[]);
    let (host, mut guest) = rig.attach("t", 512, vec![0; SIZE]);
    let before = tenure(cluster, "killed");
    for _ in 0..3 {
        let server = server_of(&host);
        guest.writes_survive(1, || kill(server, Signal::SIGKILL).unwrap());
        guest.work();
        assert_ne!(server_of(&host), server);
    }
    host.says("the connection is lost");
    assert_eq!(tenure(cluster, "killed")["tenure"], before["tenure"], "it is the same attach");
    let data = guest.leave();
    host.end();
    assert!(content(&rig, "volume", "t") == data);
}

#[test]
fn what_waits_to_be_written_does_not_land_on_top_of_another_host() {
    let cluster = Cluster::shared();
    let rig = rig(cluster, "stale", &[]);
    let there = elsewhere(&rig);
    let (host, mut guest) = attach(&rig, 512, vec![0; SIZE], &["--nbd-reconnect", "3600"]);
    guest.work();
    let data = guest.data.clone();
    // The first host's server stands still with a write that Ceph has not seen, and then dies.
    let server = server_of(&host);
    kill(server, Signal::SIGSTOP).unwrap();
    let ring = &mut guest.session.rings[0];
    Request::write(0, &pattern(1, 4096)).submit(ring).unwrap();
    ring.kick_if_wanted();
    // The second one takes the image, writes the same bytes, and gives it back.
    let image = cluster.image("b", "stale");
    there.store().ok(&["volume", "adopt", &image, "--name", "mine", "--break-lock"]);
    let (second, mut other) = there.attach("mine", 512, data);
    other.work();
    let data = other.leave();
    second.end();
    kill(server, Signal::SIGKILL).unwrap();
    host.says("it is lost to this process");
    drop(guest);
    host.crash();
    let (second, mut other) = there.attach("mine", 512, data);
    other.look();
    other.leave();
    second.end();
}

#[test]
fn a_host_process_that_was_killed_is_followed_at_once_on_its_host() {
    let cluster = Cluster::shared();
    let rig = rig(cluster, "crashed", &[]);
    let (host, mut guest) = rig.attach("t", 512, vec![0; SIZE]);
    guest.work();
    let server = server_of(&host);
    // With all that it has, as when the machine's memory is used up: nobody gives the lock back.
    kill(server, Signal::SIGSTOP).unwrap();
    let data = guest.data.clone();
    drop(guest);
    host.crash();
    let (host, mut guest) = rig.attach("t", 512, data);
    guest.look();
    guest.work();
    // Its own server was not the other one's.
    let _ = kill(server, Signal::SIGKILL);
    let data = guest.leave();
    host.end();
    assert!(content(&rig, "volume", "t") == data);
}

#[test]
fn a_host_process_that_is_killed_under_load_loses_nothing_that_it_has_acknowledged() {
    let cluster = Cluster::shared();
    let rig = rig(cluster, "loaded", &[]);
    let mut data = vec![0; SIZE];
    for _ in 0..3 {
        let (host, mut guest) = rig.attach("t", 512, data);
        guest.work();
        let begun = guest.begin_side_by_side();
        host.crash();
        data = std::mem::take(&mut guest.data);
        drop(guest);
        // Each of what was in flight is there, or what was there before; and stays so.
        let (host, mut guest) = rig.attach("t", 512, data);
        guest.find(begun);
        guest.look();
        guest.work();
        data = guest.leave();
        host.end();
    }
    assert!(content(&rig, "volume", "t") == data);
}

#[test]
fn whoever_writes_tells_so_in_the_image_and_takes_it_away_again() {
    let cluster = Cluster::shared();
    let rig = rig(cluster, "tenure", &[]);
    let list = || cluster.tool(&["rbd", "image-meta", "ls", "--format", "json", "rbd/n/tenure"]);
    assert_eq!(list().trim(), "");
    let (host, mut guest) = rig.attach("t", 512, vec![0; SIZE]);
    let found = tenure(cluster, "tenure");
    assert_eq!((&found["format"], &found["volume"]), (&Value::from(1), &Value::from(rig.place.id())));
    guest.work();
    assert!(read(&mut guest.session.rings[0], 0, 512) == guest.data[..512]);
    guest.leave();
    host.end();
    assert_eq!(list().trim(), "");
    let owners = || cluster.tool(&["rbd", "lock", "ls", "--format", "json", "rbd/n/tenure"]);
    wait_for("the lock is free", || if owners().trim() == "[]" { Ok(()) } else { Err(owners()) });
}

#[test]
fn a_keeper_that_is_killed_is_followed_by_another_one_and_the_guest_sees_a_pause() {
    let cluster = Cluster::shared();
    let rig = rig(cluster, "keeper", &[]);
    let (host, mut guest) = rig.attach("t", 512, vec![0; SIZE]);
    guest.work();
    let before = tenure(cluster, "keeper");
    let mut keeper = keeper_of(&host);
    for seed in [1, 100, 200] {
        let spare = spare_of(keeper);
        // Its server goes with it.
        guest.writes_survive(seed, || kill(keeper, Signal::SIGKILL).unwrap());
        guest.work();
        keeper = spare;
    }
    host.says("what keeps it for this process has ended; another one goes on");
    assert_eq!(tenure(cluster, "keeper")["tenure"], before["tenure"], "it is the same attach");
    let data = guest.leave();
    host.end();
    assert!(content(&rig, "volume", "t") == data);
}

#[test]
fn what_speaks_to_ceph_is_confined_and_has_nothing_of_the_host_process() {
    let cluster = Cluster::shared();
    let rig = rig(cluster, "confined", &[]);
    let (host, guest) = rig.attach("t", 512, vec![0; SIZE]);
    let server = server_of(&host);
    let proc = |name: &str| format!("/proc/{server}/{name}");
    let status = std::fs::read_to_string(proc("status")).unwrap();
    let of = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("there is such a line");
        line.trim().to_owned()
    };
    assert_eq!((of("NoNewPrivs:"), of("Seccomp:")), ("1".into(), "2".into()));
    let (caps, all) = (u64::from_str_radix(&of("CapEff:"), 16).unwrap(), of("CapBnd:"));
    assert_eq!(caps, 0, "of {all}");
    // Sockets, what waits for them, pipes, and nothing else: no file of the store, no memory for keys.
    for fd in std::fs::read_dir(proc("fd")).unwrap() {
        let to = std::fs::read_link(fd.unwrap().path()).unwrap().display().to_string();
        let kinds = ["socket:", "anon_inode:[eventpoll]", "anon_inode:[eventfd]", "pipe:", "/dev/null"];
        assert!(kinds.iter().any(|kind| to.starts_with(kind)), "{to}");
    }
    // The host process has no network; its own sockets are those of this machine.
    let maps = std::fs::read_to_string(host.proc("maps")).unwrap();
    assert!(!maps.contains("librbd") && !maps.contains("libstdc++"), "{maps}");
    drop(guest);
    host.end();
}
