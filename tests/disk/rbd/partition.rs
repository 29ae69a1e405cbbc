//! Two hosts, each a network namespace with a state folder of its own, and a cluster in a third. One is cut
//! off under load, and the other one takes its image.

use super::cluster::{Cluster, elsewhere, with_ceph};
use crate::common::attach::{Host, Place};
use crate::common::disk::pattern;
use crate::common::frontend::block::{IOERR, complete};
use crate::common::frontend::load::Random;
use crate::common::frontend::{Options, Request, Session};
use crate::common::patience::wait_for;
use crate::common::process::tie_to_test;
use crate::common::store::{Store, sockets};
use crate::devices::rig::Rig;
use crate::host_disks::rig::Writer;
use std::process::{Command, Output, Stdio};

const SIZE: usize = 8 << 20;

/// A network of the test's own: a bridge in a namespace, and hosts that are connected to it.
struct Network {
    name: String,
}

impl Network {
    fn new() -> Network {
        let network = Network { name: format!("sb{}", std::process::id()) };
        ip(&["netns", "add", &network.name]);
        network.inside(&network.name, &["link", "set", "dev", "lo", "up"]);
        network.inside(&network.name, &["link", "add", "name", "bridge", "type", "bridge"]);
        network.inside(&network.name, &["address", "add", "10.77.0.1/24", "dev", "bridge"]);
        network.inside(&network.name, &["link", "set", "dev", "bridge", "up"]);
        for (host, address) in [("a", "10.77.0.2/24"), ("b", "10.77.0.3/24")] {
            let namespace = network.host(host);
            ip(&["netns", "add", &namespace]);
            let far = ["peer", "name", "net", "netns", &namespace];
            let near = ["link", "add", "name", host, "type", "veth"];
            network.inside(&network.name, &[&near[..], &far].concat());
            network.inside(&network.name, &["link", "set", "dev", host, "master", "bridge", "up"]);
            network.inside(&namespace, &["link", "set", "dev", "lo", "up"]);
            network.inside(&namespace, &["address", "add", address, "dev", "net"]);
            network.inside(&namespace, &["link", "set", "dev", "net", "up"]);
        }
        network
    }

    fn host(&self, name: &str) -> String {
        format!("{}{name}", self.name)
    }

    fn inside(&self, namespace: &str, arguments: &[&str]) {
        ip(&[&["-n", namespace], arguments].concat());
    }

    /// Cuts a host off, or connects it again.
    fn set(&self, host: &str, state: &str) {
        self.inside(&self.name, &["link", "set", "dev", host, state]);
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for name in [self.host("a"), self.host("b"), self.name.clone()] {
            let _ = Command::new("ip").args(["netns", "del", &name]).stderr(Stdio::null()).status();
        }
    }
}

#[track_caller]
fn ip(arguments: &[&str]) {
    let output = Command::new("ip").args(arguments).output().expect("start ip");
    assert!(
        output.status.success(),
        "ip {}: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A command of a store's, on a host.
fn on(network: &Network, host: &str, command: &Command) -> Command {
    let mut there = Command::new("ip");
    there.args(["netns", "exec", &network.host(host)]).arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => there.env(name, value),
            None => there.env_remove(name),
        };
    }
    there.stdin(Stdio::null());
    there
}

fn run(network: &Network, host: &str, rig: &Rig, arguments: &[&str]) -> Output {
    let mut command = rig.store().command();
    command.args(arguments);
    let mut command = on(network, host, &command);
    tie_to_test(&mut command, vec![]);
    command.output().expect("start sealblk")
}

fn attach(network: &Network, host: &str, rig: &Rig, volume: &str, data: Vec<u8>) -> (Host, Writer) {
    let socket = sockets(&rig.place.folder()).join(format!("{volume}.socket"));
    let mut command = rig.store().command();
    command
        .args(["attach", volume, "--queues", "2", "--nbd-reconnect", "3600", "--socket-path"])
        .arg(&socket);
    let process = rig.place.start(on(network, host, &command), vec![]);
    let session = Session::open(&socket, &Options { queues: 2, ..Options::default() });
    let random = Random::new(data.len() as u64 + 1);
    (process, Writer { session: session.expect("it serves a front-end"), data, random, sector: 512 })
}

#[test]
fn a_host_that_is_cut_off_loses_its_image_to_another_one_and_writes_nothing_when_it_is_back() {
    let network = Network::new();
    let cluster = Cluster::inside(&network.name, "10.77.0.1");
    let store = Store::new();
    with_ceph(&store);
    let image = cluster.image("a", "cut");
    let mut create = store.command();
    create.args(["volume", "create", "--size", "8MiB", "--name", "t", "--rbd", &image]);
    let made = on(&network, "a", &create).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let rig = Rig { place: Place::there(store) };
    let there = elsewhere(&rig);
    let (first, mut guest) = attach(&network, "a", &rig, "t", vec![0; SIZE]);
    guest.work();
    let data = guest.data.clone();

    network.set("a", "down");
    // Under load: none of these is answered, nor may be done later.
    let ring = &mut guest.session.rings[0];
    let begun: Vec<_> =
        (0..32).map(|n| Request::write(n * 64, &pattern(n + 1, 8192)).submit(ring).unwrap()).collect();
    ring.kick_if_wanted();

    let image = cluster.image("b", "cut");
    let adopt = || run(&network, "b", &there, &["volume", "adopt", &image, "--name", "mine"]);
    let refused = adopt();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(4), "the first host may be alive still: {said}");
    assert!(said.contains("gives signs of life"), "{said}");
    wait_for("Ceph has forgotten the first host", || {
        let output = adopt();
        if output.status.success() {
            Ok(())
        } else {
            Err(String::from_utf8_lossy(&output.stderr).into_owned())
        }
    });
    let (second, mut other) = attach(&network, "b", &there, "mine", data);
    other.look();
    other.work();
    let data = other.leave();
    second.end();

    // Nobody has the image at this moment, and the first host's requests still wait.
    network.set("a", "up");
    first.says("it is lost to this process");
    let ring = &mut guest.session.rings[0];
    for outcome in complete(ring, begun).unwrap() {
        assert_eq!(outcome.status, IOERR);
    }
    assert_eq!(Request::write(0, &[3; 4096]).run(ring).unwrap().status, IOERR);
    drop(guest);
    first.signal(nix::sys::signal::Signal::SIGTERM);
    let mut first = first;
    first.wait();
    let (second, mut other) = attach(&network, "b", &there, "mine", data);
    other.look();
    other.leave();
    second.end();
}
