//! The processes that bring what is still to come: which of them has what, and what becomes of
//! it when they are killed.

use super::{assert_holds, attach, coming, fails, pushed, read_all, results, said, wait_until_complete};
use crate::common::attach::{open, read};
use crate::common::helpers::{assert_children_outlive_ctrl_c, find_helper, helper};
use crate::common::killed::{End, killed_before};
use crate::common::leaks::{Needles, look_through};
use crate::common::patience::wait_for;
use crate::common::process::ended;
use crate::common::rig::Rig;
use crate::outside::content;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sealblk::crypt::secret_mem::SecretMem;
use sealblk::crypt::{BackupKeys, Dek};
use serde_json::{Value, json};
use std::fs;

fn kill_and_wait(pid: Pid) {
    let process = ended(pid);
    kill(pid, Signal::SIGKILL).expect("it is there");
    process.wait();
}

#[test]
fn whoever_is_killed_what_has_come_is_right_and_the_rest_comes_after_the_next_attach() {
    let (rig, _outside) = coming("1");
    let (host, socket) = attach(&rig, "c", &[]);
    let mut session = open(&socket);
    let part = 4 << 20..(4 << 20) + 4096;
    // The block that comes last behind that.
    let last = (8 << 20) - 4096;
    assert!(read(&mut session.rings[0], part.start as u64 / 512, 4096) == rig.data[part.clone()]);
    // Another carrier is started.
    kill_and_wait(helper(host.pid(), "carry"));
    if let Some(carrier) = find_helper(host.pid(), "carry") {
        kill_and_wait(carrier);
    }
    assert!(read(&mut session.rings[0], 5 << 11, 4096) == rig.data[5 << 20..][..4096]);
    // And another fetcher, as long as there is who starts it.
    kill_and_wait(helper(host.pid(), "fetch"));
    assert!(read(&mut session.rings[0], (9 << 19) / 512, 4096) == rig.data[9 << 19..][..4096]);
    assert_eq!(said(&rig, "c")["away"], Value::Null);
    let fetcher = ended(helper(host.pid(), "fetch"));
    kill_and_wait(helper(host.pid(), "start-fetchers"));
    fetcher.wait();
    // Without one nothing comes, and nobody waits.
    wait_for("it is known that nothing comes any more", || match said(&rig, "c")["away"].as_str() {
        Some(why) if why.contains("attach it again") => Ok(()),
        other => Err(format!("{other:?}")),
    });
    fails(&mut session.rings[0], last as u64 / 512);
    assert!(read(&mut session.rings[0], part.start as u64 / 512, 4096) == rig.data[part]);
    assert!(
        results(&rig).ends_with(&["waiting", "pulling", "failed"].map(String::from)),
        "{:?}",
        results(&rig)
    );
    drop(session);
    host.end();
    let (host, socket) = attach(&rig, "c", &[]);
    let mut session = open(&socket);
    assert!(read(&mut session.rings[0], last as u64 / 512, 4096) == rig.data[last..]);
    // It ends sooner if nothing was left.
    let fetcher = find_helper(host.pid(), "fetch").map(ended);
    drop(session);
    host.crash();
    fetcher.into_iter().for_each(|fetcher| fetcher.wait());
    assert_holds(&rig, "c", &rig.data);
    rig.place.store.ok(&["snapshot", "complete", "s"]);
    assert!(content(&rig, "s") == rig.data);
}

#[test]
fn fetchers_that_are_killed_under_load_are_followed_by_others() {
    let (rig, _outside) = coming("1");
    let (host, socket) = attach(&rig, "c", &[]);
    let mut session = open(&socket);
    std::thread::scope(|scope| {
        let killing = scope.spawn(|| {
            for _ in 0..3 {
                let fetcher = helper(host.pid(), "fetch");
                kill_and_wait(fetcher);
            }
        });
        // Backwards, which nobody expects.
        for at in (0..rig.data.len()).step_by(64 << 10).rev() {
            let found = read(&mut session.rings[0], at as u64 / 512, 64 << 10);
            assert!(found == rig.data[at..][..64 << 10], "at {at}");
        }
        killing.join().expect("none was missing");
    });
    assert!(read_all(&mut session.rings[0], rig.data.len()) == rig.data);
    wait_until_complete(&rig, "s");
    assert_eq!(said(&rig, "c")["failed"], json!(0));
    drop(session);
    host.end();
    assert!(content(&rig, "s") == rig.data);
}

#[test]
fn the_data_key_is_in_no_process_beside_the_host_and_no_key_where_a_network_is() {
    let (rig, outside) = coming("1");
    let (host, socket) = attach(&rig, "c", &[]);
    let mut session = open(&socket);
    assert!(read(&mut session.rings[0], 0, 4096) == rig.data[..4096]);
    let volume = rig.reader().volume("c");
    let dek = rig.reader().deks(volume.layout(), &volume.encryption_context()).remove(0);
    let mut derived = SecretMem::new(BackupKeys::LEN).expect("locked memory");
    let of = rig.reader().snapshot(volume.origin().expect("a clone").snapshot.to_string().as_str()).volume();
    Dek::from_bytes(&dek).expect("a key").write_backup_keys(&of.to_string(), derived.as_mut_slice());
    let fetcher = helper(host.pid(), "fetch");
    let (starter, carrier) = (helper(fetcher, "start-carriers"), helper(fetcher, "carry"));
    let of_fetchers = helper(host.pid(), "start-fetchers");
    assert_children_outlive_ctrl_c(host.pid());
    // What is looked at must stand still.
    let all = [fetcher, starter, carrier, of_fetchers];
    all.iter().for_each(|pid| kill(*pid, Signal::SIGSTOP).expect("it runs"));
    let status = |pid: Pid| fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    for pid in [fetcher, carrier] {
        for line in
            ["Seccomp:\t2", "NoNewPrivs:\t1", "CapEff:\t0000000000000000", "CapPrm:\t0000000000000000"]
        {
            assert!(status(pid).contains(line), "{line}: {}", status(pid));
        }
    }
    let of_all =
        Needles::of_secrets(&[("the data key", &dek[..]), ("what follows from it", derived.as_slice())]);
    for pid in [starter, carrier, of_fetchers] {
        let found = look_through(pid, &of_all);
        assert!(found.found.is_empty(), "{:?}", found.found);
    }
    // Whoever does not find what is there is not looking.
    let path = outside.path().to_str().expect("UTF-8");
    assert!(!look_through(carrier, &Needles::words(path)).found.is_empty());
    let found = look_through(fetcher, &Needles::of_key(&dek));
    assert!(found.found.is_empty(), "{:?}", found.found);
    all.iter().for_each(|pid| kill(*pid, Signal::SIGCONT).expect("it is there"));
    drop(session);
    host.end();
}

#[test]
fn another_process_takes_over_in_the_middle() {
    let (rig, _outside) = coming("1");
    let (host, socket) = attach(&rig, "c", &[]);
    let mut session = open(&socket);
    assert!(read(&mut session.rings[0], 0, 4096) == rig.data[..4096]);
    let said = rig.json(&["upgrade", "c"]);
    let pid = ended(Pid::from_raw(
        rig.json(&["volume", "show", "c"])["attachment"]["pid"].as_i64().unwrap() as i32
    ));
    assert!(read_all(&mut session.rings[0], rig.data.len()) == rig.data, "{said}");
    wait_until_complete(&rig, "s");
    drop(session);
    rig.place.store.ok(&["detach", "c"]);
    pid.wait();
    drop(host);
    assert!(content(&rig, "s") == rig.data);
}

/// Kills a command before each of its steps, and has the next one end it; what is left then is right.
fn killed_at_each_step(rig: &Rig, arguments: &[&str], at_end: &mut dyn FnMut(&Rig, usize)) {
    for step in 0.. {
        let mut command = rig.place.store.command();
        command.args(arguments);
        let End::Exited(code) = killed_before(&mut command, step) else {
            at_end(rig, step);
            continue;
        };
        assert_eq!(code, 0, "step {step}");
        return at_end(rig, step);
    }
}

#[test]
fn a_lazy_pull_that_is_killed_leaves_nothing_or_all_and_either_way_of_pulling_goes_on() {
    let (rig, outside) = pushed();
    let url = outside.url();
    let lazy = ["snapshot", "pull", &url, "--name", "s", "--lazy", "--limit", "1"];
    killed_at_each_step(&rig, &lazy, &mut |rig, step| {
        let is_there = rig.json(&["snapshot", "list"]).as_array().unwrap().len() == 1;
        // The other way goes on with it every second time.
        let how: &[&str] = if step % 2 == 0 { &lazy } else { &lazy[..5] };
        if !is_there {
            rig.id(how);
        }
        if rig.json(&["snapshot", "show", "s"])["state"] == json!("coming") {
            rig.place.store.ok(&["snapshot", "complete", "s"]);
        }
        assert!(content(rig, "s") == rig.data, "step {step}");
        rig.assert_layers_are_named();
        rig.place.store.ok(&["snapshot", "delete", "s"]);
        rig.place.store.ok(&["gc"]);
        assert!(rig.files("layers").is_empty(), "step {step}");
    });
}

#[test]
fn a_completion_that_is_killed_goes_on() {
    let (rig, outside) = coming("1");
    killed_at_each_step(&rig, &["snapshot", "complete", "s"], &mut |rig, step| {
        rig.place.store.ok(&["gc"]);
        rig.place.store.ok(&["snapshot", "complete", "s"]);
        assert!(content(rig, "s") == rig.data, "step {step}");
        rig.place.store.ok(&["gc"]);
        rig.assert_layers_are_named();
        rig.place.store.ok(&["volume", "delete", "c"]);
        rig.place.store.ok(&["snapshot", "delete", "s"]);
        rig.id(&["snapshot", "pull", &outside.url(), "--name", "s", "--lazy"]);
        rig.place.store.ok(&["volume", "create", "--snapshot", "s", "--name", "c"]);
    });
}
