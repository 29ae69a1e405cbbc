//! Commands and host processes that are killed before each of the system calls by which they change a
//! volume's layers: nothing that was flushed is lost, and the next one goes on.

use crate::common::attach::{flush, open, write};
use crate::common::disk::pattern;
use crate::common::killed::{End, Killed, Stepper, killed_before, thread, wait_for_thread};
use crate::common::rig::Rig;
use crate::watch::{deks, wait_until_done};
use std::process::Stdio;

#[test]
fn commands_that_are_killed_leave_a_whole_volume_and_the_next_one_goes_on() {
    for command in [&["volume", "rekey", "t", "--follow"][..], &["volume", "flatten", "t", "--follow"]] {
        let rig = Rig::new(&[]);
        for step in 0.. {
            assert!(step < 400, "it never ends");
            // So that there is something to be flattened.
            if rig.reader().volume("t").layers().len() == 1 {
                let snapshot = rig.id(&["snapshot", "create", "t"]);
                rig.place.store.ok(&["snapshot", "delete", &snapshot]);
            }
            let mut killed = rig.place.store.command();
            killed.args(command).stdout(Stdio::null()).stderr(Stdio::null());
            let end = killed_before(&mut killed, step);
            assert!(rig.reader().volume_content(&rig.reader().volume("t")) == rig.data, "step {step}");
            if end == End::Exited(0) {
                assert!(step > 10, "step {step}");
                break;
            }
            assert_eq!(end, End::Killed, "step {step}");
            if step % 3 == 0 {
                rig.place.store.ok(&["volume", "flatten", "t", "--follow"]);
                assert!(rig.reader().volume_content(&rig.reader().volume("t")) == rig.data, "step {step}");
                rig.assert_layers_are_named();
            }
        }
        rig.place.store.ok(&["gc"]);
        rig.assert_layers_are_named();
        let (host, socket) = rig.attach("t");
        assert!(crate::watch::sees(&mut open(&socket), 8 << 20) == rig.data);
        host.end();
    }
}

#[test]
fn a_host_process_that_is_killed_while_it_gets_another_key_loses_nothing() {
    let mut rig = Rig::new(&[]);
    for step in 0.. {
        assert!(step < 200, "it never ends");
        let (host, socket) = rig.attach("t");
        let mut session = open(&socket);
        let data = pattern(step as u64, 4096);
        write(&mut session.rings[0], 8 * step as u64, &data);
        flush(&mut session.rings[0]);
        rig.data[4096 * step..][..4096].copy_from_slice(&data);
        // The thread that makes changes has begun when it has answered.
        rig.place.store.ok(&["throttle", "t", "--hydrate-rate", "1"]);
        let stepper = Stepper::seize(wait_for_thread(host.pid(), "changes"));
        let mut command = rig.place.store.command();
        command.args(["volume", "rekey", "t"]).stdout(Stdio::null()).stderr(Stdio::null());
        let mut client = command.spawn().unwrap();
        let end = stepper.kill_before(step, || client.try_wait().expect("it is a child").is_some());
        let done = client.wait().unwrap();
        drop(session);
        match end {
            Killed::Yes => host.crash(),
            Killed::No => host.end(),
        }
        assert!(rig.reader().volume_content(&rig.reader().volume("t")) == rig.data, "step {step}");
        if end == Killed::No {
            assert!(done.success() && step > 5, "step {step}");
            break;
        }
        // Not too long a chain.
        if step % 8 == 7 {
            rig.place.store.ok(&["volume", "flatten", "t", "--follow"]);
        }
    }
    rig.place.store.ok(&["volume", "flatten", "t", "--follow"]);
    assert!(rig.reader().volume_content(&rig.reader().volume("t")) == rig.data);
    rig.place.store.ok(&["gc"]);
    rig.assert_layers_are_named();
}

#[test]
fn a_host_process_that_is_killed_while_layers_leave_loses_nothing() {
    let mut rig = Rig::new(&[]);
    for step in 0.. {
        assert!(step < 200, "it never ends");
        rig.place.store.ok(&["volume", "rekey", "t"]);
        let old = deks(&rig, "t");
        let socket = rig.place.folder().join("t.socket");
        let mut command = rig.place.store.command();
        command.args(["attach", "t", "--hydrate-rate", "1", "--queues", "2", "--socket-path"]).arg(&socket);
        let host = rig.place.start(command, vec![]);
        let mut session = open(&socket);
        let data = pattern(step as u64, 4096);
        write(&mut session.rings[0], 8 * step as u64, &data);
        flush(&mut session.rings[0]);
        rig.data[4096 * step..][..4096].copy_from_slice(&data);
        let stepper = Stepper::seize(wait_for_thread(host.pid(), "hydration"));
        let mut throttle = rig.place.store.command();
        throttle.args(["throttle", "t", "--hydrate-rate", "0"]).stdout(Stdio::null()).stderr(Stdio::null());
        let mut throttle = throttle.spawn().unwrap();
        let pid = host.pid();
        let end = stepper.kill_before(step, || thread(pid, "hydration").is_none());
        // It may have gone before it was answered.
        throttle.wait().unwrap();
        drop(session);
        match end {
            Killed::Yes => host.crash(),
            Killed::No => host.end(),
        }
        let volume = rig.reader().volume("t");
        assert!(rig.reader().volume_content(&volume) == rig.data, "step {step}");
        if end == Killed::No {
            assert!(step > 5 && volume.layers().len() == 1 && deks(&rig, "t") == old[1..], "step {step}");
            break;
        }
        // The next one goes on.
        let (host, _) = rig.attach("t");
        wait_until_done(&rig, "t");
        rig.place.store.ok(&["detach", "t"]);
        host.ends_well();
        assert!(rig.reader().volume_content(&rig.reader().volume("t")) == rig.data, "step {step}");
        rig.assert_layers_are_named();
    }
}
