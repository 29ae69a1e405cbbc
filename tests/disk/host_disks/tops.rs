//! Everything that gives a volume a layer that is written: the access is the disk's, and nothing that was
//! written is lost or changed by what is written beside it.

use crate::common::loop_disk::Kind;
use crate::host_disks::rig::{Access, Rig, Writer};

const SIZE: usize = 8 << 20;

/// The life of a volume, from its creation over everything that makes a top.
fn live(kind: Kind, sector: usize) {
    let Some(rig) = Rig::new(kind, sector) else { return };
    let store = &rig.place.store;
    let (host, session) = rig.attach("t");
    let mut guest = Writer::new(&rig, session, SIZE);
    guest.write_at_sector_one();
    rig.assert_access("t", Access::Best);
    guest.work();

    // Over the data of the frozen layer, and beside it.
    let snapshot = rig.id(&["snapshot", "create", "t"]);
    let then = guest.data.clone();
    guest.write_at_sector_one();
    rig.assert_access("t", Access::Best);
    guest.work();

    store.ok(&["volume", "rekey", "t"]);
    guest.write_at_sector_one();
    guest.work();
    store.ok(&["volume", "flatten", "t", "--follow"]);
    rig.assert_access("t", Access::Best);
    guest.look();

    if sector == 512 {
        // It does not end with a block any more.
        store.ok(&["volume", "resize", "t", &(SIZE + 512).to_string()]);
        guest.grown(SIZE + 512);
        rig.assert_access("t", if rig.has_parts() { Access::PageCache } else { Access::Best });
        guest.work();
        store.ok(&["snapshot", "create", "t"]);
        rig.assert_access("t", if rig.has_parts() { Access::PageCache } else { Access::Best });
        guest.work();
    }
    store.ok(&["volume", "resize", "t", "9MiB"]);
    guest.grown(9 << 20);
    rig.assert_access("t", Access::Best);
    guest.work();
    let data = guest.leave();
    host.end();
    let reader = rig.reader();
    assert!(reader.volume_content(&reader.volume("t")) == data, "{kind}");
    assert!(reader.snapshot_content(&reader.snapshot(&snapshot)) == then, "{kind}");

    // A snapshot, and more room, while nobody has it attached; what was written is there at the next attach.
    store.ok(&["snapshot", "create", "t"]);
    store.ok(&["volume", "resize", "t", "10MiB"]);
    let (host, session) = rig.attach("t");
    let mut guest = Writer { data, ..Writer::new(&rig, session, 0) };
    guest.grown(10 << 20);
    guest.write_at_sector_one();
    rig.assert_access("t", Access::Best);
    guest.work();
    let data = guest.leave();
    host.end();
    assert!(reader.volume_content(&reader.volume("t")) == data, "{kind}");

    // A clone, which is made to stand on its own.
    store.ok(&["volume", "create", "--snapshot", &snapshot, "--name", "clone"]);
    let (host, session) = rig.attach("clone");
    let mut guest = Writer { data: then, ..Writer::new(&rig, session, 0) };
    guest.write_at_sector_one();
    rig.assert_access("clone", Access::Best);
    guest.work();
    store.ok(&["volume", "flatten", "clone", "--follow"]);
    guest.work();
    let data = guest.leave();
    host.end();
    assert!(reader.volume_content(&reader.volume("clone")) == data, "{kind}");
}

#[test]
fn ext4_with_small_blocks() {
    for sector in [512, 4096] {
        live(Kind { block: 512, file_system: "ext4" }, sector);
    }
}

#[test]
fn ext4_with_large_blocks() {
    for sector in [512, 4096] {
        live(Kind { block: 4096, file_system: "ext4" }, sector);
    }
}

#[test]
fn xfs_with_blocks_of_every_size() {
    for (block, sector) in [(512, 512), (1024, 512), (4096, 512), (4096, 4096)] {
        live(Kind { block, file_system: "xfs" }, sector);
    }
}

#[test]
fn btrfs_which_has_blocks_of_its_own() {
    for sector in [512, 4096] {
        live(Kind { block: 512, file_system: "btrfs" }, sector);
    }
}

#[test]
fn a_killed_process_leaves_the_sectors_beside_whole() {
    let Some(rig) = Rig::new(Kind { block: 4096, file_system: "ext4" }, 512) else { return };
    let (mut host, session) = rig.attach("t");
    let mut guest = Writer::new(&rig, session, SIZE);
    guest.work();
    for _ in 0..8 {
        let begun = guest.begin_side_by_side();
        host.crash();
        let session;
        (host, session) = rig.attach("t");
        guest = Writer { session, ..guest };
        guest.find(begun);
        guest.look();
    }
    drop(guest);
    host.end();
}
