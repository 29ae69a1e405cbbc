//! Snapshots of a volume that is attached and written all the time are pushed; and a push that
//! may bring little a second.

use crate::common::attach::open;
use crate::common::frontend::load::Load;
use crate::common::patience::{AtEnd, limit, wait_for};
use crate::common::process::{tie_to_test, wait_within};
use crate::common::rig::Rig;
use crate::outside::{Outside, content};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

#[test]
fn what_is_pushed_of_a_volume_under_load_is_its_snapshot_and_the_load_goes_on() {
    let rig = Rig::new(&[]);
    let outside = Outside::new();
    let (host, socket) = rig.attach("t");
    let mut session = open(&socket);
    let mut load = Load::new(1, 4 << 11..5 << 11, true);
    load.discards_may_keep = true;
    let (over, count) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let _end = AtEnd(&over);
        let ring = &mut session.rings[0];
        let (load, over, count) = (&mut load, &over, &count);
        scope.spawn(move || {
            while !over.load(Ordering::SeqCst) {
                while load.submit(ring).expect("room on the ring") {}
                ring.kick_if_wanted();
                while load.take(ring).expect("the right answer") {
                    count.fetch_add(1, Ordering::SeqCst);
                }
            }
            crate::common::frontend::load::settle(std::slice::from_mut(load), std::slice::from_mut(ring))
                .expect("all is answered");
            load.verify(ring).expect("all is there");
        });
        for _ in 0..3 {
            let id = rig.id(&["snapshot", "create", "t"]);
            let before = count.load(Ordering::SeqCst);
            let pushed = rig.json(&["snapshot", "push", &id, &outside.url()]);
            assert_eq!(pushed["was_there"], json!(false));
            wait_for("the load goes on", || match count.load(Ordering::SeqCst) {
                now if now > before => Ok(()),
                now => Err(now),
            });
            let back = rig.id(&["snapshot", "pull", &outside.of(&id)]);
            assert!(content(&rig, &back) == content(&rig, &id));
        }
    });
    rig.json(&["snapshot", "verify", &outside.url()]);
    drop(session);
    host.end();
}

#[test]
fn a_push_brings_no_more_than_its_limit_and_is_gone_on_with_without_one() {
    let rig = Rig::new(&[]);
    let outside = Outside::new();
    let id = rig.id(&["snapshot", "create", "t"]);
    let mut command = rig.place.store.command();
    command.args(["snapshot", "push", &id, &outside.url(), "--limit", "8KiB"]);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    tie_to_test(&mut command, vec![]);
    let mut pushes = command.spawn().expect("start sealblk");
    wait_for("the first block is there", || match outside.objects("blocks").len() {
        0 => Err("it is not"),
        _ => Ok(()),
    });
    // The next one would be there in eight seconds.
    assert_eq!(pushes.try_wait().expect("it is a child"), None);
    assert_eq!(outside.objects("blocks").len(), 1);
    kill(Pid::from_raw(pushes.id() as i32), Signal::SIGTERM).expect("it runs");
    wait_within(&mut pushes, limit()).expect("it ends");
    let pushed = rig.json(&["snapshot", "push", &id, &outside.url()]);
    assert_eq!((&pushed["blocks"], &pushed["was_there"]), (&json!(3), &json!(false)));
    let back = rig.id(&["snapshot", "pull", &outside.of(&id)]);
    assert!(content(&rig, &back) == rig.data);
}
