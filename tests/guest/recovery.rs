//! The host process is killed under load, and another takes its place: the guest notices a pause, nothing else.

use crate::common::guest::Guest;
use crate::common::store::Store;
use std::time::Duration;

/// Writes and reads through both queues with verification, on the bare disk: what fio wrote last must be there,
/// and nothing older. It goes on for as long as the kills take.
const LOAD: &str = "
    fio --name=load --filename=/dev/vda --size=48M --offset_increment=64M --numjobs=2 --rw=randrw --bs=16k \
        --direct=1 --ioengine=libaio --iodepth=32 --verify=crc32c --verify_fatal=1 \
        --verify_backlog=256 --time_based --runtime=45 --group_reporting --output=/tmp/fio || { cat /tmp/fio; exit 1; }
    grep -o 'err= *[0-9]*' /tmp/fio
";

#[test]
fn a_guest_under_load_survives_kills_of_the_host_process() {
    let store = Store::new();
    store.ok(&["volume", "create", "--size", "256MiB", "--name", "t"]);
    let mut attached = store.attach("t", &["--queues", "2"]);
    let mut guest = Guest::builder().disk(attached.socket()).queues(2).reconnect().boot();
    guest.start(LOAD);
    for _ in 0..5 {
        attached.wait_for_load(4 << 20);
        attached.kill();
        attached = store.attach("t", &["--queues", "2"]);
    }
    attached.wait_for_load(4 << 20);
    let done = guest.finish(Duration::from_secs(180));
    assert!(done.status == 0, "fio found an error: {}\n{}", done.stdout, attached.output());
    assert!(!guest.ok("dmesg").contains("I/O error"), "the guest saw an error");
    guest.shutdown();
    attached.detach();
}
