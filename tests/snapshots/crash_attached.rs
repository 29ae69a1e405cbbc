//! A host process that is killed before each of the system calls by which it makes a snapshot: what was
//! flushed is there, and the snapshot is whole or not there.

use crate::common::attach::{flush, open, write};
use crate::common::disk::pattern;
use crate::common::killed::{Killed, Stepper, wait_for_thread};
use crate::common::rig::Rig;
use std::process::Stdio;

#[test]
fn a_host_process_that_is_killed_while_it_freezes_loses_nothing() {
    for arguments in [&[][..], &["--unencrypted"]] {
        let mut rig = Rig::new(arguments);
        let mut snapshots = 0;
        for step in 0.. {
            assert!(step < 200, "it never ends");
            let (host, socket) = rig.attach("t");
            let mut session = open(&socket);
            let data = pattern(step as u64, 4096);
            write(&mut session.rings[0], 8 * step as u64, &data);
            flush(&mut session.rings[0]);
            rig.data[4096 * step..][..4096].copy_from_slice(&data);
            // The thread that makes changes has begun when it has answered.
            rig.place.store.ok(&["throttle", "t"]);
            let stepper = Stepper::seize(wait_for_thread(host.pid(), "changes"));
            let mut command = rig.place.store.command();
            command.args(["snapshot", "create", "t"]).stdout(Stdio::null()).stderr(Stdio::null());
            let mut client = command.spawn().unwrap();
            let end = stepper.kill_before(step, || client.try_wait().expect("it is a child").is_some());
            let done = client.wait().unwrap();
            drop(session);
            match end {
                Killed::Yes => host.crash(),
                Killed::No => host.end(),
            }
            let reader = rig.reader();
            assert!(reader.volume_content(&reader.volume("t")) == rig.data, "step {step}");
            let now = reader.catalog().snapshots().unwrap();
            assert!(now.len() <= snapshots + 1, "step {step}");
            if now.len() > snapshots {
                for entry in &now {
                    let snapshot = entry.snapshot.as_ref().unwrap();
                    let holds_all = reader.snapshot_content(snapshot) == rig.data;
                    // The others are of earlier steps.
                    assert!(holds_all || now.len() > 1, "step {step}");
                }
            }
            snapshots = now.len();
            if end == Killed::No {
                assert!(done.success() && step > 5, "step {step}");
                break;
            }
        }
        let (host, socket) = rig.attach("t");
        let mut session = open(&socket);
        for (n, expected) in rig.data.chunks(1 << 20).enumerate() {
            let sector = (n << 20) as u64 / 512;
            assert!(crate::common::attach::read(&mut session.rings[0], sector, 1 << 20) == expected);
        }
        drop(session);
        host.end();
        rig.place.store.ok(&["gc"]);
        rig.assert_layers_are_named();
    }
}
