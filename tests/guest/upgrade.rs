//! The process that serves a guest's disk is replaced while the guest writes, reads and verifies. It sees
//! nothing: no error, no reset, no new device; nor does its QEMU, which is not told to connect again.

use crate::common::store::Store;
use crate::common::successor::Successor;
use crate::under_load;
use serde_json::Value;

/// How often it is replaced.
const UPGRADES: u32 = 6;

#[test]
fn a_guest_under_load_sees_nothing_of_an_upgrade() {
    let store = Store::new();
    let (attached, mut guest) = under_load(&store);
    let mut serving: Option<Successor> = None;
    for n in 1..=UPGRADES {
        match n {
            2 => drop(store.ok(&["snapshot", "create", "t"])),
            3 => drop(store.ok(&["volume", "rekey", "t"])),
            4 => drop(store.ok(&["key", "disable", "--yes", "alias/aws/ebs"])),
            _ => {}
        }
        let said: Value = serde_json::from_str(&store.ok(&["upgrade", "t", "--json"])).expect("JSON");
        assert!(said["pause_us"].as_u64().is_some_and(|us| us > 0), "{said}");
        if let Some(before) = serving.replace(Successor::of(&said)) {
            before.ends();
        }
        guest.more_load();
    }
    attached.ends();
    guest.stop_fio();
    let log = guest.ok("dmesg");
    for word in ["reset", "I/O error", "blocked for more"] {
        assert!(!log.contains(word), "the guest says {word:?}: {log}");
    }
    guest.ok("umount /mnt; e2fsck -fn /dev/vda");
    guest.shutdown();
    store.ok(&["detach", "t"]);
    serving.expect("a process serves it").ends();
}
