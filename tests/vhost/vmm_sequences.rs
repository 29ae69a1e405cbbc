//! The messages of the known VMMs in their order, against the real process: start, pause, resume, reset,
//! reboot, and the back-end's death. Whatever stops a device is answered when nothing is in flight any more:
//! from then on, not one byte of the guest's memory changes.

use crate::common::disk::{FREE, assert_carries, pattern};
use crate::common::frontend::block::{IOERR, OK};
use crate::common::frontend::load::{Load, Random, settle};
use crate::common::frontend::session::{F_DISCARD, F_FLUSH, F_INDIRECT, F_MQ, F_RO, F_WRITE_ZEROES};
use crate::common::frontend::vmm::Kind;
use crate::common::frontend::{BlkConfig, Request, Vmm};
use crate::common::patience::{Deadline, limit};
use crate::common::store::{Attached, Store};
use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;

const QUEUES: usize = 2;
const SIZE: u64 = 64 << 20;

fn store() -> Store {
    let store = Store::new();
    store.ok(&["volume", "create", "--size", "64MiB", "--name", "t"]);
    store
}

fn attach(store: &Store) -> Attached<'_> {
    store.attach("t", &["--queues", "2"])
}

fn connect(attached: &Attached, kind: Kind) -> Vmm {
    Vmm::connect(attached.socket(), kind, QUEUES, 256, Protocol::empty()).expect("the VMM connects")
}

/// Load for each ring, on sectors of its own; the disk holds zeros there.
fn loads(vmm: &Vmm, part: u64) -> Vec<Load> {
    let first = |queue: u64| FREE.start + 4096 * part + 2048 * queue;
    (0..vmm.rings.len() as u64).map(|q| Load::new(part + 7 * q, first(q)..first(q) + 2048, true)).collect()
}

/// Puts requests on the rings until they are full, and kicks.
fn fill(vmm: &mut Vmm, loads: &mut [Load]) {
    for (load, ring) in loads.iter_mut().zip(&mut vmm.rings) {
        while load.submit(ring).expect("a request") {}
        ring.kick_if_wanted();
    }
}

fn finish(vmm: &mut Vmm, loads: &mut [Load]) {
    settle(loads, &mut vmm.rings).unwrap_or_else(|e| panic!("{e}"));
}

/// Everything in the guest's memory.
fn memory(vmm: &Vmm) -> Vec<Vec<u8>> {
    let region = |i| vmm.mem.read(vmm.mem.spec(i).guest, vmm.mem.spec(i).size as usize);
    (0..vmm.mem.regions()).map(region).collect()
}

/// Nothing changes in the guest's memory for as long as two hundred messages take, far
/// longer than requests do.
fn assert_still(vmm: &Vmm, when: &str) {
    let before = memory(vmm);
    for _ in 0..200 {
        vmm.sync().expect("an answer");
    }
    assert!(memory(vmm) == before, "after {when}, the guest's memory changes");
}

/// Fills the rings and, at a random moment, calls `stop`; the memory must be still then. After `go_on`, every
/// request is answered. Goes on until ten stops have found requests in flight, and have seen them answered.
fn stop_under_load(vmm: &mut Vmm, loads: &mut [Load], when: &str, stop: fn(&mut Vmm), go_on: fn(&mut Vmm)) {
    let mut random = Random::new(loads.len() as u64);
    let used = |vmm: &Vmm| vmm.rings.iter().map(|r| r.used_idx()).collect::<Vec<_>>();
    let (mut rounds, mut drained, deadline) = (0, 0, Deadline::after(limit()));
    while drained < 10 {
        rounds += 1;
        deadline.check(&format!("ten times, {when} finds requests in flight"), || {
            format!("{drained} times, of {rounds}")
        });
        fill(vmm, loads);
        for _ in 0..random.below(20_000) {
            std::hint::spin_loop();
        }
        let before = used(vmm);
        stop(vmm);
        let region = vmm.region.as_ref().expect("agreed");
        let left: Vec<_> = (0..QUEUES as u16).map(|q| region.marks(q)).collect();
        assert!(left.iter().all(Vec::is_empty), "after {when}, {left:?} are in flight");
        if used(vmm) != before {
            drained += 1;
            assert_still(vmm, when);
        }
        go_on(vmm);
        finish(vmm, loads);
    }
    for (load, ring) in loads.iter_mut().zip(&mut vmm.rings) {
        load.verify(ring).unwrap_or_else(|e| panic!("{e}"));
    }
}

fn stop_as_qemu(vmm: &mut Vmm) {
    vmm.enable(false).unwrap();
    for queue in 0..vmm.rings.len() {
        assert_eq!(vmm.base(queue).unwrap(), vmm.rings[queue].used_idx(), "something is in flight");
    }
}

#[test]
fn cloud_hypervisor_starts_pauses_and_resumes() {
    let store = store();
    let attached = attach(&store);
    let mut vmm = connect(&attached, Kind::CloudHypervisor);
    assert_eq!(BlkConfig::parse(&vmm.config).capacity, SIZE / 512);
    vmm.start().unwrap();
    let mut loads = loads(&vmm, 0);
    fill(&mut vmm, &mut loads);
    finish(&mut vmm, &mut loads);
    let pause = |vmm: &mut Vmm| vmm.enable(false).unwrap();
    let resume = |vmm: &mut Vmm| vmm.enable(true).unwrap();
    stop_under_load(&mut vmm, &mut loads, "a pause", pause, resume);
    // Twice in a row changes nothing.
    pause(&mut vmm);
    pause(&mut vmm);
    resume(&mut vmm);
    resume(&mut vmm);
    fill(&mut vmm, &mut loads);
    finish(&mut vmm, &mut loads);
}

#[test]
fn cloud_hypervisor_resets_and_starts_again() {
    let store = store();
    let attached = attach(&store);
    let mut vmm = connect(&attached, Kind::CloudHypervisor);
    for part in 0..4 {
        // At each activation it asks for a new region.
        vmm.region = None;
        vmm.start().unwrap();
        let mut loads = loads(&vmm, part);
        fill(&mut vmm, &mut loads);
        finish(&mut vmm, &mut loads);
        // Then the guest resets the device, with requests in flight.
        fill(&mut vmm, &mut loads);
        vmm.enable(false).unwrap();
        assert_still(&vmm, "a reset");
        vmm.rings.iter_mut().for_each(|r| r.reset(0));
    }
    vmm.region = None;
    vmm.start().unwrap();
    assert_carries(&mut vmm.rings[1], FREE.start, 4096);
}

#[test]
fn cloud_hypervisor_comes_back_to_a_new_back_end() {
    let store = store();
    let mut attached = attach(&store);
    let mut vmm = connect(&attached, Kind::CloudHypervisor);
    vmm.start().unwrap();
    let mut loads = loads(&vmm, 0);
    for round in 0..5 {
        fill(&mut vmm, &mut loads);
        if round % 2 == 0 {
            // Paused when it dies; the requests that were not taken are still there.
            vmm.enable(false).unwrap();
        }
        attached.kill();
        attached = attach(&store);
        vmm = vmm.reconnect(attached.socket()).unwrap();
        finish(&mut vmm, &mut loads);
    }
    for (load, ring) in loads.iter_mut().zip(&mut vmm.rings) {
        load.verify(ring).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(ring.used_idx(), load.submitted as u16);
    }
}

#[test]
fn cloud_hypervisor_without_a_region_comes_back_with_nothing_in_flight() {
    let store = store();
    let mut attached = attach(&store);
    let mut vmm =
        Vmm::connect(attached.socket(), Kind::CloudHypervisor, QUEUES, 256, Protocol::INFLIGHT_SHMFD)
            .unwrap();
    vmm.start().unwrap();
    assert!(vmm.region.is_none());
    let mut loads = loads(&vmm, 0);
    for _ in 0..3 {
        fill(&mut vmm, &mut loads);
        finish(&mut vmm, &mut loads);
        attached.kill();
        attached = attach(&store);
        vmm = vmm.reconnect(attached.socket()).unwrap();
    }
    for (load, ring) in loads.iter_mut().zip(&mut vmm.rings) {
        load.verify(ring).unwrap_or_else(|e| panic!("{e}"));
    }
}

#[test]
fn qemu_boots_by_a_bios_that_uses_one_ring_and_a_kernel_that_uses_all() {
    for kind in [Kind::Qemu7, Kind::Qemu10] {
        let store = store();
        let attached = attach(&store);
        let mut vmm = connect(&attached, kind);
        for boot in 0..3 {
            if kind == Kind::Qemu10 {
                // Before the first start, and several in a row.
                (0..3).for_each(|_| vmm.reset_device().unwrap());
            }
            vmm.region = None;
            vmm.rings.iter_mut().for_each(|r| r.reset(0));
            vmm.start_rings(1).unwrap();
            assert_carries(&mut vmm.rings[0], FREE.start, 4096);
            vmm.enable(false).unwrap();
            assert_eq!(vmm.base(0).unwrap(), 2);
            if kind == Kind::Qemu10 {
                (0..2).for_each(|_| vmm.reset_device().unwrap());
            }
            vmm.region = None;
            vmm.rings.iter_mut().for_each(|r| r.reset(0));
            vmm.start().unwrap();
            let mut loads = loads(&vmm, 1 + boot);
            for _ in 0..3 {
                fill(&mut vmm, &mut loads);
                finish(&mut vmm, &mut loads);
            }
            // The guest reboots.
            stop_as_qemu(&mut vmm);
        }
    }
}

#[test]
fn qemu_kicks_before_it_enables() {
    for kind in [Kind::Qemu7, Kind::Qemu10] {
        let store = store();
        let attached = attach(&store);
        let mut vmm = connect(&attached, kind);
        // The driver is faster than the VMM: everything is on the rings, and kicked, before the start.
        let mut loads = loads(&vmm, 0);
        for (load, ring) in loads.iter_mut().zip(&mut vmm.rings) {
            while load.submit(ring).unwrap() {}
            ring.kick();
        }
        vmm.start().unwrap();
        finish(&mut vmm, &mut loads);
        // And again on a device that was stopped.
        stop_as_qemu(&mut vmm);
        fill(&mut vmm, &mut loads);
        vmm.start().unwrap();
        finish(&mut vmm, &mut loads);
    }
}

#[test]
fn qemu_stops_a_device_under_load_and_starts_it_where_it_was() {
    for kind in [Kind::Qemu7, Kind::Qemu10] {
        let store = store();
        let attached = attach(&store);
        let mut vmm = connect(&attached, kind);
        vmm.start().unwrap();
        let mut loads = loads(&vmm, 0);
        let start = |vmm: &mut Vmm| vmm.start().unwrap();
        stop_under_load(&mut vmm, &mut loads, "a stop", stop_as_qemu, start);
        let only_base = |vmm: &mut Vmm| {
            for queue in 0..vmm.rings.len() {
                assert_eq!(vmm.base(queue).unwrap(), vmm.rings[queue].used_idx(), "something is in flight");
            }
        };
        stop_under_load(&mut vmm, &mut loads, "GET_VRING_BASE alone", only_base, start);
    }
}

#[test]
fn qemu_resets_a_device_under_load() {
    let store = store();
    let attached = attach(&store);
    let mut vmm = connect(&attached, Kind::Qemu10);
    vmm.start().unwrap();
    let mut loads = loads(&vmm, 0);
    let reset = |vmm: &mut Vmm| {
        vmm.reset_device().unwrap();
        // It is not acknowledged; an answer to the next says that it is done.
        vmm.sync().unwrap();
    };
    // A guest that goes on with the same rings, so that what was not served is seen to be whole.
    stop_under_load(&mut vmm, &mut loads, "RESET_DEVICE", reset, |vmm| vmm.start().unwrap());
}

#[test]
fn qemu_comes_back_to_a_new_back_end() {
    for kind in [Kind::Qemu7, Kind::Qemu10] {
        let store = store();
        let mut attached = attach(&store);
        let mut vmm = connect(&attached, kind);
        vmm.start().unwrap();
        let mut loads = loads(&vmm, 0);
        for _ in 0..4 {
            fill(&mut vmm, &mut loads);
            attached.kill();
            attached = attach(&store);
            vmm = vmm.reconnect(attached.socket()).unwrap();
            finish(&mut vmm, &mut loads);
        }
        for (load, ring) in loads.iter_mut().zip(&mut vmm.rings) {
            load.verify(ring).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(ring.used_idx(), load.submitted as u16);
        }
    }
}

#[test]
fn firecracker_uses_one_queue_and_few_features() {
    let store = store();
    let attached = attach(&store);
    let mut vmm = Vmm::connect(attached.socket(), Kind::Firecracker, 1, 256, Protocol::empty()).unwrap();
    assert_eq!(vmm.config.len(), 60);
    assert_eq!(BlkConfig::parse(&vmm.config).capacity, SIZE / 512);
    let ours = F_FLUSH | F_RO | F_MQ | F_INDIRECT | F_DISCARD | F_WRITE_ZEROES;
    assert_eq!(vmm.sync().unwrap() & ours, ours & !F_RO);
    vmm.start().unwrap();
    let ring = &mut vmm.rings[0];
    for n in 0..64 {
        assert_carries(ring, FREE.start + 64 * n, 4096 << (n % 4));
    }
    assert_eq!(Request::flush().run(ring).unwrap().status, OK);
    // After a change of the drive, it looks again.
    assert_eq!(vmm.read_config().unwrap(), vmm.config);
    assert_carries(&mut vmm.rings[0], FREE.start, 4096);
}

#[test]
fn firecracker_gets_a_read_only_disk() {
    let store = store();
    let attached = attach(&store);
    let mut vmm = connect(&attached, Kind::CloudHypervisor);
    vmm.start().unwrap();
    let data = pattern(5, 4096);
    assert_eq!(Request::write(FREE.start, &data).run(&mut vmm.rings[0]).unwrap().status, OK);
    drop(vmm);
    attached.detach();
    let attached = store.attach("t", &["--read-only"]);
    let mut vmm = Vmm::connect(attached.socket(), Kind::Firecracker, 1, 256, Protocol::empty()).unwrap();
    assert_ne!(vmm.sync().unwrap() & F_RO, 0);
    vmm.start().unwrap();
    let ring = &mut vmm.rings[0];
    assert_eq!(Request::write(FREE.start, &[1; 4096]).run(ring).unwrap().status, IOERR);
    assert!(Request::read(FREE.start, 4096).run(ring).unwrap().data == data);
}
