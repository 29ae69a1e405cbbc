//! Clusters of the tests', and stores with a volume in one.

use crate::common::attach::{Host, Place};
use crate::common::helpers::{children, was_started_with};
use crate::common::patience::wait_for;
use crate::common::process::repository;
use crate::common::store::Store;
use crate::devices::rig::Rig;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, Ordering};

/// A cluster of one monitor and one OSD. It ends with the value, or with the test program.
pub struct Cluster {
    /// Which the script makes, and removes at the end.
    folder: PathBuf,
    /// The network namespace that it is in, where that is one of its own.
    namespace: Option<String>,
    // At its end, the cluster ends.
    serving: Child,
}

static SHARED: LazyLock<Cluster> = LazyLock::new(|| Cluster::start(None));
static COUNT: AtomicU32 = AtomicU32::new(0);

/// `ci/ceph-up`, in this network namespace.
fn script(namespace: Option<&str>) -> Command {
    let script = repository().join("ci/ceph-up");
    let Some(name) = namespace else { return Command::new(script) };
    let mut command = Command::new("ip");
    command.args(["netns", "exec", name]).arg(script);
    command
}

impl Cluster {
    /// The one that tests share which leave it alone, each with its own images.
    pub fn shared() -> &'static Cluster {
        &SHARED
    }

    /// One for a test that breaks it.
    pub fn own() -> Cluster {
        Cluster::start(None)
    }

    /// One in the network namespace of this name, at this address.
    pub fn inside(namespace: &str, address: &str) -> Cluster {
        Cluster::start(Some((namespace, address)))
    }

    fn start(namespace: Option<(&str, &str)>) -> Cluster {
        // Loopback has many addresses: each cluster has one.
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let own = std::process::id();
        let folder = std::env::temp_dir().join(format!("sealblk-ceph-{own}-{number}"));
        let address = format!("127.{}.{}.{}", 1 + number % 200, own >> 8 & 255, 1 + own % 250);
        let (namespace, address) = match namespace {
            Some((name, address)) => (Some(name.to_owned()), address.to_owned()),
            None => (None, address),
        };
        let mut command = script(namespace.as_deref());
        command.arg("serve").arg(&folder);
        command.env("CEPH_ADDRESS", address);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut serving = command.spawn().expect("start ci/ceph-up");
        let mut line = String::new();
        let out = serving.stdout.take().expect("it is piped");
        BufReader::new(out).read_line(&mut line).expect("hear of it");
        assert_eq!(line, "ready\n", "ci/ceph-up has failed; ./ci/setup gets what it needs");
        let cluster = Cluster { folder, namespace, serving };
        cluster.tool(&["rbd", "namespace", "create", "rbd/n"]);
        for id in ["a", "b"] {
            cluster.script(&["host", id, "rbd/n"]);
        }
        cluster
    }

    pub fn folder(&self) -> PathBuf {
        self.folder.clone()
    }

    /// Makes a namespace in the pool, for the stores of one test, and a user of the cluster's for each of
    /// these hosts, who has the caps of docs/ceph.md there.
    pub fn namespace(&self, name: &str, hosts: &[&str]) {
        self.tool(&["rbd", "namespace", "create", &format!("rbd/{name}")]);
        for host in hosts {
            self.script(&["host", &format!("{name}-{host}"), &format!("rbd/{name}")]);
        }
    }

    /// The address of a store in this namespace, as a host reaches it, which has a folder of its own.
    pub fn store(&self, namespace: &str, host: &str, state: &Path) -> String {
        let (folder, id) = (self.folder(), format!("{namespace}-{host}"));
        let (conf, keyring) = (folder.join("ceph.conf"), folder.join(format!("ceph.client.{id}.keyring")));
        let files =
            format!("conf={}&keyring={}&state={}", conf.display(), keyring.display(), state.display());
        format!("ceph:rbd/{namespace}?id={id}&{files}")
    }

    #[track_caller]
    fn script(&self, arguments: &[&str]) -> String {
        let mut command = script(self.namespace.as_deref());
        command.arg(arguments[0]).arg(self.folder()).args(&arguments[1..]).stdin(Stdio::null());
        let output = command.output().expect("start ci/ceph-up");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}: {said}", arguments.join(" "));
        String::from_utf8(output.stdout).expect("UTF-8")
    }

    /// Runs a program of Ceph's as the administrator; returns what it prints.
    #[track_caller]
    pub fn tool(&self, arguments: &[&str]) -> String {
        self.script(&[&["tool"], arguments].concat())
    }

    /// An image in the namespace `n`, as the host `id` reaches it.
    pub fn image(&self, id: &str, name: &str) -> String {
        let folder = self.folder();
        let (conf, keyring) = (folder.join("ceph.conf"), folder.join(format!("ceph.client.{id}.keyring")));
        format!("rbd:rbd/n/{name}?id={id}&conf={}&keyring={}", conf.display(), keyring.display())
    }

    /// Adds lines to the settings of clients.
    pub fn settle(&self, lines: &str) {
        let path = self.folder().join("ceph.conf");
        let text = fs::read_to_string(&path).expect("read the settings");
        fs::write(&path, format!("{text}{lines}\n")).expect("write the settings");
    }

    /// What `rbd` says of an image in JSON.
    #[track_caller]
    pub fn info(&self, name: &str) -> serde_json::Value {
        let said = self.tool(&["rbd", "info", "--format", "json", &format!("rbd/n/{name}")]);
        serde_json::from_str(&said).expect("JSON")
    }

    /// All bytes of an image.
    #[track_caller]
    pub fn content(&self, name: &str) -> Vec<u8> {
        let file = self.folder.join(format!("{name}.content"));
        let _ = fs::remove_file(&file);
        let to = file.to_str().expect("UTF-8");
        self.tool(&["rbd", "export", "--no-progress", &format!("rbd/n/{name}"), to]);
        fs::read(&file).expect("read what was exported")
    }

    pub fn osd(&self) -> Pid {
        self.daemon("osd")
    }

    fn daemon(&self, name: &str) -> Pid {
        let file = self.folder().join("run").join(name).with_extension("pid");
        let text = fs::read_to_string(file).expect("there is such a daemon");
        Pid::from_raw(text.trim().parse().expect("a process id"))
    }

    pub fn signal_osd(&self, signal: Signal) {
        kill(self.osd(), signal).expect("the OSD runs");
    }

    /// Starts the OSD again that has ended.
    #[track_caller]
    pub fn start_osd(&self) {
        self.script(&["osd"]);
    }

    /// Kills the monitor.
    pub fn kill_monitor(&self) {
        kill(self.daemon("mon"), Signal::SIGKILL).expect("the monitor runs");
    }

    /// Starts the monitor again.
    #[track_caller]
    pub fn start_monitor(&self) {
        self.script(&["mon"]);
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let _ = self.osd_goes_on();
        drop(self.serving.stdin.take());
        let _ = self.serving.wait();
    }
}

impl Cluster {
    fn osd_goes_on(&self) -> nix::Result<()> {
        kill(self.osd(), Signal::SIGCONT)
    }
}

/// What stands in the metadata of an image in the namespace `n`, which somebody has for writing.
#[track_caller]
pub fn tenure(cluster: &Cluster, name: &str) -> serde_json::Value {
    let text = cluster.tool(&["rbd", "image-meta", "get", &format!("rbd/n/{name}"), "sealblk"]);
    serde_json::from_str(&text).expect("JSON")
}

/// Lets a store's commands find librbd.
pub fn with_ceph(store: &Store) {
    let cache = std::env::var_os("SEALBLK_CACHE").map(PathBuf::from);
    let client = cache.unwrap_or_else(|| repository().join("target/ci")).join("ceph/client");
    store.set_environment(vec![("LD_LIBRARY_PATH".into(), client.to_str().expect("UTF-8").into())]);
}

/// A store with the volume `t`, of 8 MiB, in the image of this name, which is made; the
/// store is the host `a`'s.
#[track_caller]
pub fn rig(cluster: &Cluster, name: &str, arguments: &[&str]) -> Rig {
    let store = Store::new();
    with_ceph(&store);
    let image = cluster.image("a", name);
    Rig { place: Place::of(store, &[&["--rbd", &image], arguments].concat()) }
}

/// The host `b`, which has access to the same KMS.
pub fn elsewhere(rig: &Rig) -> Rig {
    let there = crate::devices::adopt::elsewhere(rig);
    with_ceph(there.store());
    there
}

/// The process that has librbd open for a host process: a child of a child.
pub fn server_of(host: &Host) -> Pid {
    wait_for("an image is served", || {
        let mut servers = children(host.pid()).into_iter().filter(is_keeper).flat_map(children);
        servers.find(has_librbd).ok_or("nobody serves it")
    })
}

/// The process that has the image of a host process for it, and starts its server.
pub fn keeper_of(host: &Host) -> Pid {
    children(host.pid()).into_iter().find(is_keeper).expect("it has one")
}

/// The one that goes on when this one has ended.
pub fn spare_of(keeper: Pid) -> Pid {
    wait_for("there is another keeper", || {
        children(keeper).into_iter().find(|it| !has_librbd(it)).ok_or("there is none")
    })
}

fn has_librbd(pid: &Pid) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/maps")).is_ok_and(|maps| maps.contains("librbd"))
}

fn is_keeper(pid: &Pid) -> bool {
    was_started_with(*pid, "serve-rbd")
}
