//! The host process killed under load.

use crate::common::patience::{Deadline, limit};
use crate::inflight::rig::{Rig, Shape, Way, seed, store};

const SHAPES: [Shape; 4] = [
    Shape { queues: 1, event_idx: true, indirect: true },
    Shape { queues: 2, event_idx: false, indirect: true },
    Shape { queues: 2, event_idx: true, indirect: false },
    Shape { queues: 1, event_idx: false, indirect: false },
];
const ROUNDS: u64 = 8;
/// Requests a ring in each round.
const REQUESTS: u64 = 300;

fn survives_kills(way: Way) {
    let seed = seed();
    let mut left = 0;
    for (part, shape) in SHAPES.into_iter().enumerate() {
        let store = store();
        println!("{way:?}, {shape:?}");
        let mut rig = Rig::start(&store, way, shape, part as u64, seed);
        let (mut round, deadline) = (0, Deadline::after(limit()));
        while round < ROUNDS || left == 0 {
            deadline.check("a kill hits a request", || format!("none in {round} rounds"));
            let done = rig.completed();
            let target = rig.loads.iter().map(|l| l.submitted).max().expect("a ring") + REQUESTS;
            let kill_at = done + rig.random(REQUESTS * shape.queues as u64);
            println!("round {round}: killed after {kill_at} of {target} requests a ring");
            rig.pump(kill_at, target);
            rig.submit(target);
            rig.kill(target);
            left += rig.left_behind();
            rig.attach_again();
            rig = rig.reconnect();
            // Now and then it dies again, perhaps while it serves what its predecessor left.
            for _ in 0..rig.random(3) {
                rig.kill(target);
                rig.attach_again();
                rig = rig.reconnect();
            }
            rig.pump(target * shape.queues as u64, target);
            if round % 3 == 2 {
                for (load, ring) in rig.loads.iter_mut().zip(&mut rig.session.rings) {
                    load.verify(ring).unwrap_or_else(|e| panic!("round {round}: {e}"));
                }
            }
            round += 1;
        }
        rig.assert_whole();
    }
    println!("{left} requests were in flight when the host process was killed");
}

#[test]
fn qemu_loses_nothing_in_a_crash() {
    survives_kills(Way::Qemu);
}

#[test]
fn cloud_hypervisor_loses_nothing_in_a_crash() {
    survives_kills(Way::CloudHypervisor);
}

#[test]
fn qemu_without_a_region_loses_nothing_in_a_crash_if_answers_come_in_order() {
    survives_kills(Way::InOrder);
}
