//! The host process is killed under load, and another takes its place: the guest notices a
//! pause, nothing else.

use crate::common::guest::Guest;
use crate::common::store::Store;

/// Writes and reads through both queues with verification, on the bare disk: what fio wrote last must be
/// there, and nothing older.
const LOAD: &str = "--filename=/dev/vda --size=48M --offset_increment=64M --iodepth=32 --verify_backlog=32";

#[test]
fn a_guest_under_load_survives_kills_of_the_host_process() {
    let store = Store::new();
    store.ok(&["volume", "create", "--size", "256MiB", "--name", "t"]);
    let mut attached = store.attach("t", &["--queues", "2"]);
    let mut guest = Guest::builder().disk(attached.socket()).queues(2).reconnect().boot();
    guest.start_fio_with(LOAD);
    for _ in 0..5 {
        attached.wait_for_load(4 << 20);
        attached.kill();
        attached = store.attach("t", &["--queues", "2"]);
    }
    guest.more_load();
    guest.stop_fio();
    guest.shutdown();
    attached.detach();
}
