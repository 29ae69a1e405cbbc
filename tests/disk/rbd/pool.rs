//! Stores that lie in a pool, which two hosts share: each has a user of the cluster, a configuration folder
//! and a folder for what is its own; they have the store's key, and access to the same KMS.

use super::cluster::{Cluster, server_of, with_ceph};
use crate::common::attach::{Host, Place};
use crate::common::helpers::find_helper;
use crate::common::killed::stopped_before_saying;
use crate::common::leaks::{Needles, assert_has_none};
use crate::common::patience::wait_for;
use crate::common::store::{Store, said};
use crate::devices::rig::{attach, refuse};
use crate::host_disks::rig::Writer;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const SIZE: usize = 8 << 20;

/// A host of a store in a pool.
struct Shared {
    place: Place,
}

impl Shared {
    fn store(&self) -> &Store {
        &self.place.store
    }

    fn ok(&self, arguments: &[&str]) -> String {
        self.store().ok(arguments).trim().to_owned()
    }

    fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.store().ok(&[arguments, &["--json"]].concat())).expect("JSON")
    }

    fn refuse(&self, code: i32, arguments: &[&str]) -> String {
        refuse(self.store(), code, arguments)
    }

    /// What it says of the one volume that there is.
    fn only(&self) -> Value {
        let list = self.json(&["volume", "list"]);
        assert_eq!(list.as_array().map(Vec::len), Some(1), "{list}");
        list[0].clone()
    }

    fn names(&self) -> Vec<String> {
        let list = self.json(&["volume", "list"]);
        let name = |volume: &Value| volume["name"].as_str().unwrap_or("-").to_owned();
        let mut names: Vec<String> = list.as_array().expect("a list").iter().map(name).collect();
        names.sort();
        names
    }

    fn attach(&self, volume: &str, data: Vec<u8>) -> (Host, Writer) {
        attach(&self.place, volume, 512, data)
    }

    /// The folder of this host, below the one that the address names.
    fn own(&self) -> PathBuf {
        only_in(&state(self.store()))
    }
}

fn state(store: &Store) -> PathBuf {
    store.root().with_file_name("state")
}

fn only_in(folder: &Path) -> PathBuf {
    let mut found: Vec<_> =
        fs::read_dir(folder).expect("list it").map(|it| it.expect("list it").path()).collect();
    assert_eq!(found.len(), 1, "{found:?}");
    found.remove(0)
}

/// A host that uses the store in this namespace, and knows nothing of it yet.
fn host(cluster: &Cluster, namespace: &str, name: &str) -> Shared {
    let store = Store::new();
    with_ceph(&store);
    store.lie_in(cluster.store(namespace, name, &state(&store)));
    Shared { place: Place::there(store) }
}

/// Gives a host access to the KMS of another one.
fn share_kms(from: &Shared, to: &Shared) {
    fs::create_dir_all(to.store().config()).unwrap();
    let there = state(to.store()).join(from.own().file_name().unwrap());
    fs::create_dir_all(&there).unwrap();
    copy(&from.own().join("kms"), &there);
    for entry in fs::read_dir(from.store().config()).unwrap() {
        let path = entry.unwrap().path();
        if path.file_name().unwrap().to_str().unwrap().starts_with("kms") {
            copy(&path, &to.store().config());
        }
    }
}

/// Brings a host the store's key.
fn share_key(from: &Shared, to: &Shared) {
    let of_store = only_in(&from.store().config().join("stores"));
    let there = to.store().config().join("stores").join(of_store.file_name().unwrap());
    fs::create_dir_all(&there).unwrap();
    copy(&of_store.join("key"), &there);
}

fn copy(from: &Path, into: &Path) {
    assert!(Command::new("cp").arg("--archive").args([from, into]).status().unwrap().success());
}

/// Two hosts that share a store, in which the first has made the volume `t`.
fn two(cluster: &Cluster, namespace: &str) -> (Shared, Shared) {
    cluster.namespace(namespace, &["a", "b"]);
    let (a, b) = (host(cluster, namespace, "a"), host(cluster, namespace, "b"));
    a.ok(&["volume", "create", "--size", "8MiB", "--name", "t"]);
    share_kms(&a, &b);
    share_key(&a, &b);
    (a, b)
}

fn images(cluster: &Cluster, namespace: &str) -> Vec<String> {
    let said = cluster.tool(&["rbd", "ls", &format!("rbd/{namespace}")]);
    said.lines().map(str::to_owned).collect()
}

#[test]
fn a_volume_made_on_one_host_is_listed_attached_and_deleted_on_another() {
    let cluster = Cluster::shared();
    let (a, b) = two(cluster, "pool-life");
    let made = a.only();
    assert_eq!(b.only()["id"], made["id"]);
    assert_eq!(made["state"], "available");
    let (host, mut guest) = a.attach("t", vec![0; SIZE]);
    guest.work();
    let seen = b.only();
    assert_eq!(seen["state"], "in-use");
    assert_eq!(seen["attached_by"]["pid"], host.pid().as_raw(), "{seen}");
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    assert!(b.ok(&["volume", "list"]).contains(name.trim()), "the column of hosts");
    assert!(b.ok(&["volume", "show", "t"]).contains(&format!("process {} on the host", host.pid())));
    // Whoever wants it is told who has it.
    let (id, socket) = (made["id"].as_str().unwrap(), b.place.socket());
    let attach = ["attach", "t", "--socket-path", socket.to_str().unwrap()];
    for arguments in
        [&attach[..], &["volume", "delete", "t"], &["detach", "t"], &["volume", "rename", "t", "x"]]
    {
        let said = b.refuse(4, arguments);
        let holder = format!("{id} is attached by process {} on the host {}", host.pid(), name.trim());
        assert!(said.contains(&holder), "{said}");
    }
    // What needs no more than the records is done while it is attached, from where it is.
    a.ok(&["volume", "rename", "t", "u"]);
    b.ok(&["volume", "tag", "u", "env=prod"]);
    assert_eq!(a.only()["tags"]["env"], "prod");
    let data = guest.leave();
    host.end();
    let (host, mut guest) = b.attach("u", data);
    guest.look();
    guest.work();
    let said = a.refuse(4, &["detach", "u"]);
    assert!(said.contains("on the host"), "{said}");
    let data = guest.leave();
    b.ok(&["detach", "u"]);
    host.ends_well();
    let (host, mut guest) = a.attach("u", data);
    guest.look();
    guest.leave();
    host.end();
    assert_eq!(images(cluster, "pool-life").len(), 1);
    b.ok(&["volume", "delete", "u"]);
    assert!(a.names().is_empty() && images(cluster, "pool-life").is_empty());
    // What is left in the pool names nothing.
    let left = cluster.tool(&["rados", "-p", "rbd", "-N", "pool-life", "ls"]);
    assert!(!left.contains("vol-") && !left.contains("rbd_data"), "{left}");
}

#[test]
fn a_host_without_the_store_s_key_believes_nothing_and_is_told_what_to_bring() {
    let cluster = Cluster::shared();
    cluster.namespace("pool-key", &["a", "b", "c"]);
    let (a, b) = (host(cluster, "pool-key", "a"), host(cluster, "pool-key", "b"));
    assert!(b.names().is_empty(), "an empty store is nobody's");
    a.ok(&["volume", "create", "--size", "8MiB", "--name", "t"]);
    share_kms(&a, &b);
    let said = b.refuse(7, &["volume", "show", "t"]);
    assert!(
        said.contains("has no key of the store in ceph:rbd/pool-key") && said.contains("/key from a host"),
        "{said}"
    );
    let said = b.refuse(7, &["volume", "create", "--size", "8MiB"]);
    assert!(said.contains("has no key of the store"), "{said}");
    // Another store's.
    let other = host(cluster, "pool-key", "c");
    let folder = only_in(&a.store().config().join("stores"));
    let folder = other.store().config().join("stores").join(folder.file_name().unwrap());
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("key"), [7; 32]).unwrap();
    share_kms(&a, &other);
    let said = other.refuse(7, &["volume", "create", "--size", "8MiB"]);
    assert!(said.contains("is not the key of the store in ceph:rbd/pool-key"), "{said}");
    share_key(&a, &b);
    b.ok(&["volume", "show", "t"]);
    // What is put back from before is seen by whoever has seen what came later.
    let id = a.only()["id"].as_str().unwrap().to_owned();
    let object = ["-p", "rbd", "-N", "pool-key"];
    let before = cluster.folder().join("entry");
    let value = before.to_str().unwrap();
    let get = ["getomapval", "sealblk/ledger", &format!("{id}.json"), value];
    cluster.tool(&[&["rados"], &object[..], &get].concat());
    a.ok(&["volume", "rename", "t", "u"]);
    b.ok(&["volume", "show", "u"]);
    let text = fs::read_to_string(&before).unwrap();
    cluster.tool(
        &[&["rados"], &object[..], &["setomapval", "sealblk/ledger", &format!("{id}.json"), &text]].concat(),
    );
    for host in [&a, &b] {
        let said = host.refuse(7, &["volume", "show", "u"]);
        assert!(said.contains("is an older one, put back"), "{said}");
    }
}

#[test]
fn a_snapshot_made_on_one_host_is_cloned_on_another() {
    let cluster = Cluster::shared();
    let (a, b) = two(cluster, "pool-clone");
    let (host, mut guest) = a.attach("t", vec![0; SIZE]);
    guest.work();
    let said = a.refuse(8, &["snapshot", "create", "t"]);
    assert!(said.contains("detach it, do this"), "{said}");
    let then = guest.leave();
    host.end();
    let snapshot = a.ok(&["snapshot", "create", "t"]);
    let (host, mut guest) = a.attach("t", then.clone());
    guest.work();
    assert_eq!(b.json(&["snapshot", "list"])[0]["id"], snapshot.as_str());
    b.ok(&["volume", "create", "--snapshot", &snapshot, "--name", "clone"]);
    let (second, mut other) = b.attach("clone", then.clone());
    other.look();
    other.work();
    guest.look();
    // The one reads what it writes, the other what was.
    b.ok(&["volume", "flatten", "clone", "--follow"]);
    let cloned = other.leave();
    second.end();
    let data = guest.leave();
    host.end();
    b.ok(&["volume", "rekey", "t", "--follow"]);
    a.ok(&["volume", "resize", "clone", "12MiB"]);
    let (host, mut guest) = a.attach("t", data);
    guest.look();
    let data = guest.leave();
    host.end();
    let (host, mut guest) = b.attach("clone", [cloned, vec![0; 4 << 20]].concat());
    guest.look();
    guest.leave();
    host.end();
    // In the clear, and under another KMS key.
    let file = cluster.folder().join("exported");
    let exported = |host: &Shared, kind: &str, what: &str| {
        let _ = fs::remove_file(&file);
        host.ok(&[kind, "export", what, file.to_str().unwrap()]);
        fs::read(&file).unwrap()
    };
    assert!(exported(&a, "snapshot", &snapshot) == then);
    a.ok(&["key", "create", "--alias", "alias/spare"]);
    a.ok(&["volume", "key", "add", "clone", "--key", "alias/spare"]);
    a.ok(&["volume", "rewrap", "t", "--key", "alias/spare"]);
    let slots = b.json(&["volume", "show", "clone"])["keys"][0]["slots"].clone();
    assert_eq!(slots.as_array().map(Vec::len), Some(2), "{slots}");
    assert!(exported(&a, "volume", "t") == data);
    b.ok(&["snapshot", "delete", &snapshot]);
    for (host, volume) in [(&a, "t"), (&b, "clone")] {
        host.ok(&["volume", "delete", volume]);
    }
    assert!(images(cluster, "pool-clone").is_empty(), "{:?}", images(cluster, "pool-clone"));
}

#[test]
fn changes_of_two_hosts_at_one_time_are_all_made() {
    let cluster = Cluster::shared();
    let (a, b) = two(cluster, "pool-both");
    let (one, other) = (a.store(), b.store());
    std::thread::scope(|scope| {
        for (store, name) in [(one, "a"), (other, "b")] {
            scope.spawn(move || {
                for n in 0..6 {
                    store.ok(&["volume", "tag", "t", &format!("{name}{n}=x")]);
                }
                store.ok(&["volume", "create", "--size", "8MiB", "--name", name]);
            });
        }
    });
    assert_eq!(a.names(), ["a", "b", "t"]);
    let tags = b.json(&["volume", "show", "t"])["tags"].as_object().unwrap().len();
    assert_eq!(tags, 12, "of two that have read the same, one is refused or waits");
    // Of two volumes of one name, one comes second.
    let made: Vec<_> = std::thread::scope(|scope| {
        let make = |store: &Store| store.run(&["volume", "create", "--size", "8MiB", "--name", "same"]);
        let made = [scope.spawn(move || make(one)), scope.spawn(move || make(other))];
        made.map(|made| made.join().unwrap().status.code()).into()
    });
    assert!(made.contains(&Some(0)) && made.contains(&Some(4)), "{made:?}");
    assert_eq!(a.names().iter().filter(|name| *name == "same").count(), 1);
    assert_eq!(images(cluster, "pool-both").len(), 4);
}

#[test]
fn what_reaches_the_pool_is_confined_and_an_attach_goes_on_without_it() {
    let cluster = Cluster::shared();
    let (a, b) = two(cluster, "pool-helper");
    let (host, mut guest) = a.attach("t", vec![0; SIZE]);
    let helper = helper_of(host.pid()).expect("it has one");
    guest.work();
    guest.look();
    let plaintext = guest.some_written();
    assert_has_none(helper, &Needles::of_secrets(&[("plaintext", &plaintext)]), "pool-helper");
    let status = fs::read_to_string(format!("/proc/{helper}/status")).unwrap();
    for line in ["Seccomp:\t2", "NoNewPrivs:\t1", "CapEff:\t0000000000000000"] {
        assert!(status.contains(line), "{status}");
    }
    for entry in fs::read_dir(format!("/proc/{helper}/fd")).unwrap() {
        let to = fs::read_link(entry.unwrap().path()).unwrap_or_default();
        let to = to.to_str().unwrap();
        let is_known = ["socket:", "pipe:", "anon_inode:", "/dev/"].iter().any(|it| to.starts_with(it));
        assert!(is_known, "it has {to} open");
    }
    // What it had taken is free after its time, and the image keeps others out all the same.
    kill(helper, Signal::SIGKILL).unwrap();
    guest.work();
    let refused = "another host is refused by the image, once the lock is free";
    wait_for(refused, || {
        let said = b.refuse(4, &["volume", "delete", "t"]);
        if said.contains("has the image") { Ok(()) } else { Err(said) }
    });
    let renamed = a.store().run(&["volume", "rename", "t", "x"]);
    assert!(
        !renamed.status.success() && said(&renamed).contains("serve-records helper has ended"),
        "{renamed:?}"
    );
    guest.work();
    let data = guest.leave();
    host.signal(Signal::SIGTERM);
    let mut host = host;
    host.wait();
    let (host, mut guest) = b.attach("t", data);
    guest.look();
    guest.leave();
    host.end();
}

#[test]
fn the_settings_say_where_the_store_lies_for_whoever_does_not_say_it() {
    let cluster = Cluster::shared();
    cluster.namespace("pool-set", &["a"]);
    let a = host(cluster, "pool-set", "a");
    a.store().configure(&format!("root = '{}'\n", cluster.store("pool-set", "a", &state(a.store()))));
    a.ok(&["volume", "create", "--size", "8MiB", "--name", "t", "--unencrypted"]);
    let with = a.store().command();
    let mut without = Command::new(with.get_program());
    without.args(["volume", "show", "t"]).stdin(Stdio::null());
    for (name, value) in with.get_envs() {
        match value {
            Some(value) => without.env(name, value),
            None => without.env_remove(name),
        };
    }
    let output = without.output().expect("start sealblk");
    assert!(output.status.success(), "{}", said(&output));
    assert!(said(&output).contains("rbd:rbd/pool-set/sealblk-"), "{}", said(&output));
}

#[test]
fn what_a_pool_does_not_have_yet_is_refused_before_anything_is_done() {
    let cluster = Cluster::shared();
    cluster.namespace("pool-not", &["a"]);
    let a = host(cluster, "pool-not", "a");
    for arguments in [
        &["gc"][..],
        &["snapshot", "push", "x", "/tmp"],
        &["volume", "import", "/dev/null"],
        &["volume", "delete", "x", "--shred"],
        &["store", "list"],
        &["attach", "x", "--socket-path", "/tmp/x", "--incoming"],
        &["volume", "create", "--size", "8MiB", "--preallocate"],
        &["volume", "create", "--size", "8MiB", "--rbd", "rbd/x"],
    ] {
        let said = a.refuse(8, arguments);
        assert!(said.contains("not there yet for a store in a pool"), "{arguments:?}: {said}");
    }
    let said = a.refuse(2, &["volume", "create", "--size", "1000000"]);
    assert!(said.contains("whole blocks"), "{said}");
    a.store().lie_in("ceph:".into());
    let said = a.refuse(2, &["volume", "list"]);
    assert!(said.contains("ceph:POOL[/NAMESPACE]"), "{said}");
    // Beyond what its caps are for.
    let outside = cluster.store("pool-not", "a", &state(a.store())).replace("rbd/pool-not", "rbd");
    a.store().lie_in(outside);
    let said = a.refuse(1, &["volume", "list"]);
    assert!(said.contains("caps of client.pool-not-a"), "{said}");
}

/// Runs a command until it is about to say something for the time number `step`; then it, or the process that
/// reaches the pool for it, is killed. Returns whether it has said as much.
fn killed(host: &Shared, arguments: &[&str], step: usize, is_helper: bool) -> bool {
    let mut command = host.store().command();
    command.args(arguments).stdout(Stdio::null()).stderr(Stdio::null());
    let kill_it = |pid: Pid| {
        let killed = if is_helper { helper_of(pid) } else { Some(pid) };
        // It may not have started one yet.
        killed.into_iter().for_each(|pid| kill(pid, Signal::SIGKILL).expect("it runs"));
    };
    stopped_before_saying(&mut command, step, kill_it).is_ok()
}

/// The process that reaches the pool for this one.
fn helper_of(pid: Pid) -> Option<Pid> {
    find_helper(pid, "serve-records")
}

/// A change that is cut off before each of its steps, by the end of the one process or the other.
fn cut_off(namespace: &str, is_helper: bool) {
    let cluster = Cluster::shared();
    let (a, b) = two(cluster, namespace);
    let stride = if is_helper { 3 } else { 2 };
    let mut cut = 0;
    for (n, arguments) in [
        &["volume", "create", "--size", "8MiB", "--name", "new", "--unencrypted"][..],
        &["volume", "rename", "t", "u"],
        &["volume", "delete", "new"],
    ]
    .into_iter()
    .enumerate()
    {
        for step in (n..).step_by(stride) {
            if !killed(&a, arguments, step, is_helper) {
                break;
            }
            cut += 1;
            // The old records or the new ones, on both hosts, and nobody's lock is in the way.
            let list = b.json(&["volume", "list"]);
            for volume in list.as_array().expect("a list") {
                assert_ne!(volume["state"], "damaged", "{arguments:?} {step}: {list}");
                let name = volume["name"].as_str().unwrap();
                assert!(["t", "u", "new"].contains(&name), "{arguments:?} {step}: {list}");
            }
            let names = b.names();
            b.ok(&["volume", "tag", if names.contains(&"u".to_owned()) { "u" } else { "t" }, "x=y"]);
            match n {
                0 if names.contains(&"new".into()) => drop(b.ok(&["volume", "delete", "new"])),
                1 if names.contains(&"u".into()) => drop(b.ok(&["volume", "rename", "u", "t"])),
                2 if !names.contains(&"new".into()) => {
                    b.ok(&["volume", "create", "--size", "8MiB", "--name", "new", "--unencrypted"]);
                }
                _ => {}
            }
        }
        if n == 0 {
            assert_eq!(a.names(), ["new", "t"], "the last one was not cut off");
        }
    }
    assert!(cut > 20, "{cut} steps");
    b.ok(&["volume", "create", "--size", "8MiB", "--name", "last"]);
    assert_eq!(images(cluster, namespace).len(), a.names().len(), "what was left over is cleared away");
}

#[test]
fn a_command_that_dies_between_two_steps_leaves_the_old_or_the_new() {
    cut_off("pool-cut", false);
}

#[test]
fn a_command_that_loses_the_pool_between_two_steps_leaves_the_old_or_the_new() {
    cut_off("pool-lost", true);
}

#[test]
fn the_lock_of_a_host_that_is_gone_is_free_after_its_time_and_it_changes_nothing_any_more() {
    let cluster = Cluster::shared();
    let (a, b) = two(cluster, "pool-gone");
    let (host, mut guest) = a.attach("t", vec![0; SIZE]);
    guest.work();
    // What reaches the pool for it stands still, and so does what has the image.
    let (records, image) = (helper_of(host.pid()).expect("it has one"), server_of(&host));
    for pid in [records, image] {
        kill(pid, Signal::SIGSTOP).expect("it runs");
    }
    let delete = || b.store().run(&["volume", "delete", "t"]);
    let first = delete();
    assert_eq!(first.status.code(), Some(4), "{}", said(&first));
    assert!(said(&first).contains(&format!("attached by process {}", host.pid())), "{}", said(&first));
    wait_for("its lock is free, and the image is forgotten by it", || {
        let output = delete();
        if output.status.success() { Ok(()) } else { Err(said(&output)) }
    });
    for pid in [records, image] {
        kill(pid, Signal::SIGCONT).expect("it is there");
    }
    // What it has of the volume is nothing any more.
    let said = a.refuse(3, &["volume", "rename", "t", "x"]);
    assert!(said.contains("no volume"), "{said}");
    assert!(b.names().is_empty() && images(cluster, "pool-gone").is_empty());
    drop(guest);
    host.crash();
    a.ok(&["volume", "create", "--size", "8MiB", "--name", "t"]);
}
