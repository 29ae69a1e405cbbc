//! A volume moves from one host process to another, as in a live migration, with a front-end of our own
//! in the place of both VMMs: they share the guest's memory, which is what a migration makes true. Never
//! do both processes have it.

use crate::common::attach::{Host, Place};
use crate::common::disk::FREE;
use crate::common::frontend::load::{Load, Random, settle};
use crate::common::frontend::vmm::Kind;
use crate::common::frontend::{Fault, Request, SplitRing, Vmm, block};
use crate::common::patience::wait_for;
use crate::common::store::said;
use serde_json::Value;
use std::path::{Path, PathBuf};
use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;

const QUEUES: usize = 2;

/// The volume, and what runs on it.
struct Rig {
    place: Place,
    sockets: u32,
    loads: Vec<Load>,
}

impl Rig {
    fn new() -> Rig {
        // The volume has 16384 sectors.
        let first = |n: u64| FREE.start + 2048 * n;
        let load = |n| Load::new(n, first(n)..first(n) + 2048, true);
        Rig { place: Place::new(&[]), sockets: 0, loads: (0..QUEUES as u64).map(load).collect() }
    }

    /// Attaches the volume, or waits for it, on a socket of its own.
    fn attach(&mut self, arguments: &[&str]) -> (Host, PathBuf) {
        self.sockets += 1;
        let socket = self.place.folder().join(format!("{}.sock", self.sockets));
        let mut command = self.place.store.command();
        command.env("RUST_LOG", "debug").args(["attach", "t", "--queues", "2"]).args(arguments);
        command.arg("--socket-path").arg(&socket);
        (self.place.start(command, vec![]), socket)
    }

    fn source(&mut self, kind: Kind) -> (Host, Vmm) {
        let (host, socket) = self.attach(&[]);
        let mut vmm = connect(&socket, kind);
        start(&mut vmm);
        (host, vmm)
    }

    fn destination(&mut self, source: &Vmm) -> (Host, Vmm) {
        let (host, socket) = self.attach(&["--incoming"]);
        let vmm = source.incoming(&socket).unwrap();
        assert_eq!(vmm.config, source.config);
        (host, vmm)
    }

    /// Detaches the volume from `host`, which ends.
    fn detach(&self, host: Host) {
        self.place.store.ok(&["detach", "t"]);
        host.ends_well();
    }

    /// Fills the rings and kicks.
    fn fill(&mut self, vmm: &mut Vmm) {
        for (load, ring) in self.loads.iter_mut().zip(&mut vmm.rings) {
            while load.submit(ring).unwrap() {}
            ring.kick_if_wanted();
        }
    }

    /// Everything that was asked is answered rightly, and everything that was written is there.
    fn finish(&mut self, vmm: &mut Vmm) {
        settle(&mut self.loads, &mut vmm.rings).unwrap_or_else(|e| panic!("{e}"));
        for (load, ring) in self.loads.iter_mut().zip(&mut vmm.rings) {
            load.verify(ring).unwrap_or_else(|e| panic!("{e}"));
        }
    }

    fn go_on(&mut self, vmm: &mut Vmm) {
        self.fill(vmm);
        self.finish(vmm);
    }

    /// The process that has the volume, as `volume show` tells.
    fn holder(&self) -> Option<i64> {
        let shown: Value =
            serde_json::from_str(&self.place.store.ok(&["volume", "show", "t", "--json"])).unwrap();
        shown["attached_by"]["pid"].as_i64()
    }
}

/// As QEMU stops a device; cloud-hypervisor only disables the rings.
fn stop(vmm: &Vmm, kind: Kind) {
    vmm.enable(false).unwrap();
    if kind != Kind::CloudHypervisor {
        for queue in 0..vmm.rings.len() {
            assert_eq!(vmm.base(queue).unwrap(), vmm.rings[queue].used_idx(), "something is in flight");
        }
    }
    vmm.sync().unwrap();
}

/// Starts the device, and waits until it is.
fn start(vmm: &mut Vmm) {
    vmm.start().and_then(|()| vmm.sync()).unwrap();
}

/// The guest's rings, as its driver sees them, belong to the other VMM from now on.
fn move_guest(from: &mut Vmm, to: &mut Vmm) {
    to.rings = std::mem::take(&mut from.rings);
}

/// The guest, which has been stopped, goes on at the other VMM.
fn take_over(from: &mut Vmm, to: &mut Vmm) {
    move_guest(from, to);
    start(to);
}

/// The guest is stopped at the one VMM and goes on at the other.
fn hand_over(from: &mut Vmm, to: &mut Vmm, kind: Kind) {
    stop(from, kind);
    take_over(from, to);
}

/// The VMM may not start its device: the connection is closed.
fn is_refused(vmm: &mut Vmm) {
    let started = vmm.start().and_then(|()| vmm.sync());
    assert!(matches!(started, Err(Fault::Closed(_))), "{started:?}");
}

fn connect(socket: &Path, kind: Kind) -> Vmm {
    Vmm::connect(socket, kind, QUEUES, 256, Protocol::empty()).unwrap()
}

fn pid(host: &Host) -> Option<i64> {
    Some(host.pid().as_raw().into())
}

#[test]
fn a_guest_under_load_moves_from_process_to_process() {
    for kind in [Kind::Qemu7, Kind::Qemu10, Kind::CloudHypervisor] {
        let mut rig = Rig::new();
        let mut random = Random::new(5);
        let (mut source, mut vmm) = rig.source(kind);
        for _ in 0..4 {
            rig.fill(&mut vmm);
            let (destination, mut next) = rig.destination(&vmm);
            assert_eq!(rig.holder(), pid(&source));
            rig.fill(&mut vmm);
            (0..random.below(20_000)).for_each(|_| std::hint::spin_loop());
            stop(&vmm, kind);
            assert_eq!(rig.holder(), None, "the source has let go");
            take_over(&mut vmm, &mut next);
            assert_eq!(rig.holder(), pid(&destination));
            rig.finish(&mut next);
            // The source's VMM stays for a while, and says things that change nothing.
            vmm.sync().unwrap();
            drop(vmm);
            assert!(!destination.output().contains("did not end well"), "{}", destination.output());
            source.ends_well();
            (source, vmm) = (destination, next);
            rig.go_on(&mut vmm);
        }
        drop(vmm);
        // It listens for the next VMM, as any that is attached, and can be detached.
        rig.detach(source);
        assert_eq!(rig.holder(), None);
    }
}

/// What is being copied up stops with the source and goes on at the destination, also where it
/// comes back to the source.
#[test]
fn a_guest_moves_while_its_volume_is_rekeyed() {
    let mut rig = Rig::new();
    // What lies below would show through a hole.
    rig.loads.iter_mut().for_each(|load| load.discards_may_keep = true);
    let (source, mut vmm) = rig.source(Kind::Qemu10);
    rig.go_on(&mut vmm);
    rig.place.store.ok(&["throttle", "t", "--hydrate-rate", "1"]);
    rig.place.store.ok(&["volume", "rekey", "t"]);
    rig.fill(&mut vmm);
    let (destination, mut next) = rig.destination(&vmm);
    // It is cancelled at first.
    stop(&vmm, Kind::Qemu10);
    assert_eq!(rig.holder(), None, "the source has let go");
    start(&mut vmm);
    assert_eq!(rig.holder(), pid(&source));
    rig.go_on(&mut vmm);
    rig.fill(&mut vmm);
    hand_over(&mut vmm, &mut next, Kind::Qemu10);
    assert_eq!(rig.holder(), pid(&destination));
    rig.go_on(&mut next);
    drop(vmm);
    source.ends_well();
    // The destination's own rate is no obstacle.
    rig.place.store.ok(&["volume", "flatten", "t", "--follow"]);
    assert_eq!((rig.place.metadata().layers().len(), rig.place.metadata().keys().len()), (1, 1));
    rig.go_on(&mut next);
    drop(next);
    destination.end();
}

/// Its guest has not begun, or not again: it may all the same.
#[test]
fn a_source_whose_vmm_is_connected_stays_though_no_ring_has_run() {
    for kind in [Kind::Qemu10, Kind::CloudHypervisor] {
        let mut rig = Rig::new();
        let (source, socket) = rig.attach(&[]);
        let connect = || Vmm::connect(&socket, kind, QUEUES, 256, Protocol::empty()).unwrap();
        // The first VMM comes and goes, and the next has its place; or it is the first.
        if kind == Kind::Qemu10 {
            let mut before = connect();
            start(&mut before);
            rig.go_on(&mut before);
        }
        let mut vmm = connect();
        vmm.sync().unwrap();
        let (destination, mut next) = rig.destination(&vmm);
        wait_for("the source has let go", || match rig.holder() {
            None => Ok(()),
            holder => Err(format!("{holder:?}")),
        });
        // It begins here.
        start(&mut vmm);
        assert_eq!(rig.holder(), pid(&source));
        rig.go_on(&mut vmm);
        // It moves after that.
        stop(&vmm, kind);
        move_guest(&mut vmm, &mut next);
        start(&mut next);
        assert_eq!(rig.holder(), pid(&destination));
        rig.go_on(&mut next);
        drop(vmm);
        source.ends_well();
        drop(next);
        destination.end();
    }
}

#[test]
fn a_source_whose_migration_is_cancelled_goes_on() {
    for kind in [Kind::Qemu10, Kind::CloudHypervisor] {
        let mut rig = Rig::new();
        let (source, mut vmm) = rig.source(kind);
        rig.fill(&mut vmm);
        let (destination, next) = rig.destination(&vmm);
        for _ in 0..3 {
            stop(&vmm, kind);
            assert_eq!(rig.holder(), None);
            start(&mut vmm);
            assert_eq!(rig.holder(), pid(&source));
            rig.go_on(&mut vmm);
            rig.fill(&mut vmm);
        }
        // The destination's VMM gives up, and so does the destination.
        drop(next);
        destination.end();
        stop(&vmm, kind);
        assert_eq!(rig.holder(), pid(&source), "nobody waits any more");
        start(&mut vmm);
        rig.go_on(&mut vmm);
        // Another attempt succeeds.
        let (destination, mut next) = rig.destination(&vmm);
        hand_over(&mut vmm, &mut next, kind);
        rig.go_on(&mut next);
        drop(vmm);
        source.ends_well();
        drop(next);
        destination.end();
    }
}

#[test]
fn a_destination_that_starts_while_the_source_writes_is_refused() {
    let mut rig = Rig::new();
    let (source, mut vmm) = rig.source(Kind::Qemu10);
    let (destination, mut next) = rig.destination(&vmm);
    // A ring of its own: the guest's belong to the source.
    next.rings = vec![SplitRing::new(&next.mem, 0, 256).unwrap()];
    is_refused(&mut next);
    let expected = format!("is attached by process {}", source.pid());
    destination.says(&expected);
    rig.go_on(&mut vmm);
    assert_eq!(rig.holder(), pid(&source));
    // It was no more than an attempt: the next finds the source stopped.
    let mut next = vmm.incoming(&rig.place.folder().join("2.sock")).unwrap();
    hand_over(&mut vmm, &mut next, Kind::Qemu10);
    rig.go_on(&mut next);
    drop(vmm);
    source.ends_well();
    drop(next);
    destination.end();
}

#[test]
fn a_source_that_goes_on_after_the_destination_is_refused() {
    let mut rig = Rig::new();
    let (source, mut vmm) = rig.source(Kind::Qemu10);
    let (destination, mut next) = rig.destination(&vmm);
    hand_over(&mut vmm, &mut next, Kind::Qemu10);
    rig.fill(&mut next);
    // A VMM that is wrong about who has the guest: it must not come to two writers.
    move_guest(&mut next, &mut vmm);
    is_refused(&mut vmm);
    let expected = format!("is attached by process {}", destination.pid());
    source.says(&expected);
    take_over(&mut vmm, &mut next);
    rig.finish(&mut next);
    source.ends_well();
}

#[test]
fn a_source_that_dies_leaves_the_volume_to_the_destination() {
    let mut rig = Rig::new();
    let (source, mut vmm) = rig.source(Kind::Qemu10);
    rig.go_on(&mut vmm);
    let (destination, mut next) = rig.destination(&vmm);
    source.crash();
    take_over(&mut vmm, &mut next);
    assert_eq!(rig.holder(), pid(&destination));
    rig.go_on(&mut next);
    drop(next);
    rig.detach(destination);
}

#[test]
fn a_destination_that_dies_leaves_the_volume_to_the_source() {
    let mut rig = Rig::new();
    let (source, mut vmm) = rig.source(Kind::Qemu10);
    // Before the source has let go, and after.
    for after in [false, true] {
        let (destination, next) = rig.destination(&vmm);
        rig.fill(&mut vmm);
        if after {
            stop(&vmm, Kind::Qemu10);
            assert_eq!(rig.holder(), None);
        }
        destination.crash();
        drop(next);
        if !after {
            stop(&vmm, Kind::Qemu10);
            assert_eq!(rig.holder(), pid(&source));
        }
        start(&mut vmm);
        rig.go_on(&mut vmm);
        assert_eq!(rig.holder(), pid(&source));
    }
    drop(vmm);
    rig.detach(source);
}

#[test]
fn while_a_volume_is_handed_over_nobody_else_gets_it() {
    let mut rig = Rig::new();
    let (_source, vmm) = rig.source(Kind::Qemu10);
    let (destination, next) = rig.destination(&vmm);
    let second = rig.place.refuse(4, &["--incoming"]);
    assert!(second.contains("another process waits for"), "{second}");
    stop(&vmm, Kind::Qemu10);
    let third = rig.place.refuse(4, &[]);
    assert!(third.contains("is about to be handed over"), "{third}");
    let deletion = rig.place.store.run(&["volume", "delete", "t"]);
    assert_eq!(deletion.status.code(), Some(4), "{}", said(&deletion));
    drop(next);
    destination.end();
}

#[test]
fn a_volume_that_was_changed_meanwhile_is_refused() {
    let mut rig = Rig::new();
    let (source, mut vmm) = rig.source(Kind::Qemu10);
    let (destination, mut next) = rig.destination(&vmm);
    stop(&vmm, Kind::Qemu10);
    let whole = std::fs::read(rig.place.volume_json()).unwrap();
    let mut edited: Value = serde_json::from_slice(&whole).unwrap();
    edited["mac"] = Value::String("00".repeat(32));
    std::fs::write(rig.place.volume_json(), serde_json::to_vec(&edited).unwrap()).unwrap();
    move_guest(&mut vmm, &mut next);
    is_refused(&mut next);
    destination.says("the MAC does not fit");
    assert_eq!(rig.holder(), None);
    std::fs::write(rig.place.volume_json(), whole).unwrap();
    take_over(&mut next, &mut vmm);
    rig.go_on(&mut vmm);
    drop(next);
    destination.end();
    drop(vmm);
    rig.detach(source);
}

/// A guest that is paused can be moved, too. Nothing tells its host process to stop then.
#[test]
fn a_guest_that_was_paused_before_moves_as_well() {
    let mut rig = Rig::new();
    let (source, mut vmm) = rig.source(Kind::Qemu10);
    rig.go_on(&mut vmm);
    stop(&vmm, Kind::Qemu10);
    assert_eq!(rig.holder(), pid(&source));
    let (destination, mut next) = rig.destination(&vmm);
    take_over(&mut vmm, &mut next);
    assert_eq!(rig.holder(), pid(&destination));
    rig.go_on(&mut next);
    drop(vmm);
    source.ends_well();
    // Nor is anything in the way where no VMM is connected.
    drop(next);
    let (third, socket) = rig.attach(&["--incoming"]);
    let mut vmm = connect(&socket, Kind::Qemu10);
    start(&mut vmm);
    destination.ends_well();
    assert_eq!(rig.holder(), pid(&third));
}

#[test]
fn what_the_guest_chose_goes_with_the_volume() {
    const WRITEBACK: usize = 32;
    let mut rig = Rig::new();
    let (mut host, mut vmm) = rig.source(Kind::Qemu10);
    assert_eq!(vmm.config[WRITEBACK], 1);
    vmm.write_config(WRITEBACK as u32, &[0]).unwrap();
    vmm.sync().unwrap();
    // Another process, after a crash.
    host.crash();
    (host, _) = rig.attach(&[]);
    vmm = vmm.reconnect(&rig.place.folder().join("2.sock")).unwrap();
    assert_eq!(vmm.read_config().unwrap()[WRITEBACK], 0);
    rig.go_on(&mut vmm);
    // Another process, to which the guest moves.
    let (destination, mut next) = rig.destination(&vmm);
    hand_over(&mut vmm, &mut next, Kind::Qemu10);
    assert_eq!(next.read_config().unwrap()[WRITEBACK], 0);
    drop(vmm);
    host.ends_well();
    // The process ends before the VMM, which will look for another.
    rig.detach(destination);
    let (host, socket) = rig.attach(&[]);
    let mut next = next.reconnect(&socket).unwrap();
    assert_eq!(next.read_config().unwrap()[WRITEBACK], 0);
    rig.go_on(&mut next);
    // The guest is gone for good, and the process knows it before it ends.
    drop(next);
    host.says("the VMM has disconnected");
    rig.detach(host);
    let (_host, socket) = rig.attach(&[]);
    let vmm = connect(&socket, Kind::Qemu10);
    assert_eq!(vmm.config[WRITEBACK], 1);
}

#[test]
fn a_destination_can_wait_for_a_volume_that_was_never_attached() {
    let mut rig = Rig::new();
    let (destination, socket) = rig.attach(&["--incoming"]);
    assert_eq!(rig.holder(), None);
    let mut vmm = connect(&socket, Kind::Qemu10);
    start(&mut vmm);
    rig.go_on(&mut vmm);
    assert_eq!(rig.holder(), pid(&destination));
    assert!(rig.place.metadata().is_sealed());
    let read = Request::read(0, 512).run(&mut vmm.rings[0]).unwrap();
    assert_eq!(read.status, block::OK);
}
