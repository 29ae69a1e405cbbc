//! A Linux guest moves between two QEMU processes while it writes and reads its disk, and with it the volume
//! from one host process to another. QEMU is the newer one of Debian's backports suite: Debian 12's own
//! corrupts the memory of a busy guest that it migrates under emulation.

use crate::common::guest::{Builder, CHECK_FILES, Guest, MAKE_FILES};
use crate::common::store::Store;
use serde_json::json;
use std::path::Path;

fn machine(socket: &Path) -> Builder {
    Guest::builder().disk(socket).queues(2).env("SEALBLK_QEMU", "backports")
}

#[test]
fn a_guest_under_load_moves_between_two_qemus() {
    let store = Store::new();
    store.ok(&["volume", "create", "--size", "256MiB", "--name", "t"]);
    let mut source = store.attach_as("0", "t", &["--queues", "2"]);
    let mut guest = machine(source.socket()).boot();
    let files = guest.ok(&format!("{MAKE_FILES}\nsync"));
    guest.start_fio("/mnt");
    for hop in ["1", "2"] {
        source.more_load();
        let destination = store.attach_as(hop, "t", &["--queues", "2", "--incoming"]);
        guest = guest.move_to(machine(destination.socket()).incoming());
        source.ends();
        source = destination;
    }
    source.more_load();

    // A migration that goes nowhere: the guest stays, and nothing is logged any more.
    let destination = store.attach_as("3", "t", &["--queues", "2", "--incoming"]);
    let mut waiting = machine(destination.socket()).incoming();
    let folder = tempfile::tempdir().expect("make a folder");
    let uri = format!("unix:{}", folder.path().join("migration").display());
    waiting.qmp("migrate-incoming", json!({ "uri": uri }));
    guest.qmp("migrate-set-parameters", json!({ "max-bandwidth": 1 << 16 }));
    guest.begin_migration(&uri);
    source.more_load();
    guest.qmp("migrate_cancel", json!({}));
    assert_eq!(guest.migration_end(), "cancelled");
    waiting.kill();
    source.more_load();

    guest.stop_fio();
    assert_eq!(guest.ok(CHECK_FILES), files);
    guest.ok("umount /mnt; e2fsck -fn /dev/vda");
    // With somebody waiting, the host process would end with its VMM.
    drop(destination);
    guest.shutdown();
    source.detach();
}
