//! A host process that is killed: what was flushed is there, and nothing that it left is in the way.

use crate::common::attach::{Place, flush, is_left, open, read, write};
use crate::common::disk::pattern;
use crate::common::frontend::Request;
use serde_json::Value;

#[test]
fn flushed_data_survives_and_the_stale_socket_is_replaced() {
    let place = Place::new(&[]);
    let flushed = pattern(1, 1 << 20);
    for round in 0..3 {
        let host = place.attach(&[]);
        let mut session = open(&place.socket());
        if round > 0 {
            assert!(read(&mut session.rings[0], 64, flushed.len()) == flushed, "round {round}");
        }
        write(&mut session.rings[0], 64, &flushed);
        flush(&mut session.rings[0]);
        // In flight when it dies.
        for n in 0..16 {
            let after = Request::write(8192 + 128 * n, &pattern(n, 65536));
            let _ = after.submit(&mut session.rings[0]).expect("room on the ring");
        }
        session.rings[0].kick();
        host.crash();
        assert!(place.socket().exists(), "a killed process leaves its socket");
        is_left(&place.socket());
        assert!(place.volume_folder().join("control.sock").exists());
        let shown: Value = serde_json::from_str(&place.store.ok(&["volume", "show", "t", "--json"])).unwrap();
        assert_eq!((&shown["state"], &shown["attached_by"]), (&"available".into(), &Value::Null));
        let detach = place.store.run(&["detach", "t"]);
        assert_eq!(detach.status.code(), Some(3), "there is nothing to detach");
    }
    let host = place.attach(&[]);
    let mut session = open(&place.socket());
    assert!(read(&mut session.rings[0], 64, flushed.len()) == flushed);
    drop(session);
    host.end();
    assert!(!place.socket().exists() && !place.volume_folder().join("control.sock").exists());
}

#[test]
fn a_write_that_was_cut_off_leaves_old_or_new_sectors_and_nothing_else() {
    let place = Place::new(&[]);
    let (old, new) = (pattern(1, 1 << 20), pattern(2, 1 << 20));
    let host = place.attach(&[]);
    let mut session = open(&place.socket());
    write(&mut session.rings[0], 0, &old);
    flush(&mut session.rings[0]);
    for (n, data) in new.chunks(65536).enumerate() {
        let _ = Request::write(128 * n as u64, data).submit(&mut session.rings[0]).expect("room on the ring");
    }
    session.rings[0].kick();
    host.crash();
    let host = place.attach(&[]);
    let mut session = open(&place.socket());
    let found = read(&mut session.rings[0], 0, old.len());
    let sectors = found.chunks(512).zip(old.chunks(512).zip(new.chunks(512)));
    for (n, (found, (old, new))) in sectors.enumerate() {
        assert!(found == old || found == new, "sector {n} holds neither what was there nor what was written");
    }
    host.end();
}

#[test]
fn a_volume_whose_host_was_killed_can_be_deleted() {
    let place = Place::new(&[]);
    let (layer, folder) = (place.layer(), place.volume_folder());
    place.attach(&[]).crash();
    place.store.ok(&["volume", "delete", "t"]);
    assert!(!layer.exists() && !folder.exists());
}
