//! Images that become volumes, and volumes that become images, on a disk with large blocks.

use crate::common::disk::pattern;
use crate::common::loop_disk::Kind;
use crate::host_disks::rig::{Access, Rig, Writer};

#[test]
fn what_is_imported_is_found_and_what_is_exported_is_the_same() {
    for file_system in ["ext4", "xfs"] {
        let Some(rig) = Rig::new(Kind { block: 4096, file_system }, 512) else { continue };
        let (store, image, out) = (&rig.place.store, rig.path("disk.img"), rig.path("out.img"));
        let (image, out) = (image.to_str().unwrap(), out.to_str().unwrap());
        // One ends with a block, one does not.
        for (n, len, expected) in [(1, 3 << 20, Access::Best), (2, (3 << 20) + 1536, Access::PageCache)] {
            let mut bytes = pattern(n, len);
            // Holes, in blocks and in parts of them.
            bytes[70_000..90_000].fill(0);
            bytes[512..1024].fill(0);
            for place in [&[][..], &["--in-place"]] {
                std::fs::write(image, &bytes).unwrap();
                store.ok(&[&["volume", "import", image, "--name", "v"], place].concat());
                let (host, session) = rig.attach("v");
                let mut guest = Writer { data: bytes.clone(), ..Writer::new(&rig, session, 0) };
                guest.look();
                rig.assert_access("v", expected);
                guest.write_at_sector_one();
                guest.work();
                if !place.is_empty() {
                    store.ok(&["volume", "flatten", "v", "--follow"]);
                    guest.work();
                }
                let data = guest.leave();
                host.end();
                store.ok(&["volume", "export", "v", out]);
                assert!(std::fs::read(out).unwrap() == data, "{file_system}, {len} bytes, {place:?}");
                std::fs::remove_file(out).unwrap();
                store.ok(&["volume", "delete", "v"]);
            }
        }
    }
}

#[test]
fn doctor_says_how_a_volume_would_be_reached() {
    let Some(rig) = Rig::new(Kind { block: 4096, file_system: "ext4" }, 512) else { return };
    let said = rig.place.store.ok(&["doctor"]);
    assert!(said.contains("O_DIRECT in the disk's blocks of 4096 bytes"), "{said}");
}
