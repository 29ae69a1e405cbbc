//! What can be done to a volume can be done to one on a device, and the device's bytes are
//! what the format says.

use super::rig::{MIB, Rig, is_zero, refuse};
use crate::common::attach::{flush, write};
use crate::common::disk::pattern;
use crate::common::frontend::Request;
use crate::common::frontend::Segment;
use crate::common::frontend::block::OK;
use crate::common::loop_disk::BareDisk;
use crate::common::store::Store;
use crate::common::successor::Successor;
use aes::Aes256;
use aes::cipher::KeyInit;
use xts_mode::{Xts128, get_tweak_default};

const SIZE: usize = 8 << 20;

/// Bytes of the device's blocks, and of the volume's sectors.
const KINDS: [(u32, usize); 4] = [(512, 512), (4096, 4096), (4096, 512), (512, 4096)];

fn live(block: u32, sector: usize) {
    let Some(disk) = BareDisk::zeros(12 * MIB, block) else { return };
    let rig = Rig::on(&disk, &["--sector-size", &sector.to_string()]);
    let store = rig.store();
    let (host, mut guest) = rig.attach("t", sector, vec![0; SIZE]);
    let access = rig.json(&["volume", "show", "t"])["attachment"]["access"].as_str().unwrap().to_owned();
    assert!(access.starts_with("io_uring, O_DIRECT"), "{access}");
    guest.work();
    let data = guest.leave();
    host.end();
    let reader = rig.reader();
    assert!(reader.volume_content(&reader.volume("t")) == data, "{block} {sector}");
    assert!(is_zero(&disk.content()[(MIB as usize) + SIZE..]), "nothing is written behind the volume");

    let (host, mut guest) = rig.attach("t", sector, data);
    guest.look();
    guest.work();
    // From now on the device is a frozen layer, below a file.
    let snapshot = rig.id(&["snapshot", "create", "t"]);
    let (then, frozen) = (guest.data.clone(), disk.content());
    assert!(String::from_utf8_lossy(&frozen[..MIB as usize]).contains("\"frozen\": true"));
    guest.work();
    store.ok(&["volume", "resize", "t", "10MiB"]);
    guest.grown(10 << 20);
    guest.work();
    let data = guest.leave();
    host.end();
    assert!(disk.content() == frozen, "a frozen layer does not change");
    let reader = rig.reader();
    assert!(reader.volume_content(&reader.volume("t")) == data);
    assert!(reader.snapshot_content(&reader.snapshot(&snapshot)) == then);

    // Two that share the device at one time.
    store.ok(&["volume", "create", "--snapshot", &snapshot, "--name", "clone"]);
    let (first, mut one) = rig.attach("t", sector, data);
    let (second, mut two) = rig.attach("clone", sector, then.clone());
    two.look();
    two.work();
    one.work();
    store.ok(&["volume", "flatten", "clone", "--follow"]);
    two.work();
    let (one, two) = (one.leave(), two.leave());
    first.end();
    second.end();
    let reader = rig.reader();
    assert!(reader.volume_content(&reader.volume("t")) == one);
    assert!(reader.volume_content(&reader.volume("clone")) == two);

    let out = rig.place.folder().join("out.img");
    store.ok(&["snapshot", "export", &snapshot, out.to_str().unwrap()]);
    assert!(std::fs::read(&out).unwrap() == then);
    // To another place, and back into a file.
    let outside = rig.place.folder().join("outside");
    std::fs::create_dir(&outside).unwrap();
    let url = format!("file://{}", outside.display());
    store.ok(&["snapshot", "push", &snapshot, &url]);
    let pulled = rig.id(&["snapshot", "pull", &format!("{url}/{snapshot}")]);
    let reader = rig.reader();
    assert!(reader.snapshot_content(&reader.snapshot(&pulled)) == then);
    store.ok(&["snapshot", "delete", &pulled]);
    store.ok(&["volume", "delete", "t"]);
    store.ok(&["volume", "delete", "clone"]);
    assert!(disk.content() == frozen, "the snapshot needs it");
    store.ok(&["snapshot", "delete", &snapshot]);
    let left = disk.content();
    assert!(is_zero(&left[..MIB as usize]) && left[MIB as usize..] == frozen[MIB as usize..]);
    assert!(rig.layers("device").is_empty() && rig.layers("img").is_empty());
}

#[test]
fn a_volume_lives_on_a_device_with_blocks_of_512_bytes() {
    live(KINDS[0].0, KINDS[0].1);
}

#[test]
fn a_volume_lives_on_a_device_with_blocks_of_4096_bytes() {
    live(KINDS[1].0, KINDS[1].1);
}

#[test]
fn a_volume_lives_on_a_device_with_larger_blocks_than_its_sectors() {
    live(KINDS[2].0, KINDS[2].1);
}

#[test]
fn a_volume_lives_on_a_device_with_smaller_blocks_than_its_sectors() {
    live(KINDS[3].0, KINDS[3].1);
}

/// By the word of an implementation that is not ours: tweaks count from the layer's first sector, which is
/// the device's 2048th. (`guest/disk.rs` has dm-crypt read it.)
#[test]
fn behind_the_header_lies_what_dm_crypt_would_have_written() {
    for (block, sector) in KINDS {
        let Some(disk) = BareDisk::zeros(12 * MIB, block) else { return };
        let rig = Rig::on(&disk, &["--sector-size", &sector.to_string()]);
        let (host, mut guest) = rig.attach("t", sector, vec![0; SIZE]);
        let (bytes, last) = (pattern(1, 1 << 16), pattern(2, 4096));
        let ring = &mut guest.session.rings[0];
        write(ring, 8, &bytes);
        write(ring, (SIZE as u64 - 4096) / 512, &last);
        flush(ring);
        host.end();
        let dek = rig.place.dek();
        let key = |half: &[u8]| Aes256::new_from_slice(half).unwrap();
        let xts = Xts128::new(key(&dek[..32]), key(&dek[32..]));
        let mut plain = disk.content()[MIB as usize..MIB as usize + SIZE].to_vec();
        let unit = (sector / 512) as u128;
        for (n, data) in plain.chunks_mut(sector).enumerate().filter(|(_, data)| !is_zero(data)) {
            xts.decrypt_sector(data, get_tweak_default(n as u128 * unit));
        }
        assert!(plain[4096..4096 + (1 << 16)] == bytes && plain[SIZE - 4096..] == last);
        assert!(is_zero(&plain[..4096]) && is_zero(&plain[4096 + (1 << 16)..SIZE - 4096]));
    }
}

#[test]
fn what_a_guest_discards_is_given_back_to_the_device_and_is_zeros() {
    for (block, sector) in KINDS {
        let Some(disk) = BareDisk::zeros(12 * MIB, block) else { return };
        let rig = Rig::on(&disk, &["--sector-size", &sector.to_string()]);
        let (host, mut guest) = rig.attach("t", sector, vec![0; SIZE]);
        let before = disk.allocated();
        let ring = &mut guest.session.rings[0];
        for n in 0..4 {
            write(ring, n * 2048, &pattern(n, 1 << 20));
        }
        flush(ring);
        assert!(disk.allocated() >= before + (4 << 20), "it was written");
        // All but the first and last of these sectors.
        let unit = (sector / 512) as u64;
        let whole = [Segment { sector: unit, count: (8192 - 2 * unit) as u32, flags: 0 }];
        assert_eq!(Request::discard(&whole).run(ring).unwrap().status, OK);
        flush(ring);
        assert!(disk.allocated() < before + (1 << 20), "{block} {sector}: its space is given back");
        host.end();
        let content = disk.content();
        let data = &content[MIB as usize..MIB as usize + SIZE];
        assert!(!is_zero(&data[..sector]) && !is_zero(&data[(4 << 20) - sector..4 << 20]));
        // What shares a block of the device with a sector that stays is left as it was.
        let edge = sector.max(block as usize);
        assert!(is_zero(&data[edge..(4 << 20) - edge]), "{block} {sector}");
    }
}

#[test]
fn a_volume_grows_when_its_device_has_grown() {
    for attached in [true, false] {
        let Some(disk) = BareDisk::zeros(9 * MIB, 512) else { return };
        let rig = Rig::on(&disk, &[]);
        let (mut host, mut guest) = rig.attach("t", 512, vec![0; SIZE]);
        guest.work();
        let said = rig.refuse(2, &["volume", "resize", "t", "10MiB"]);
        assert!(said.contains("make the device larger first"), "{said}");
        disk.set_len(11 * MIB);
        // What is there now is none of the volume's.
        disk.overwrite(9 * MIB, &vec![0x77; 2 << 20]);
        if !attached {
            let data = guest.leave();
            host.end();
            rig.store().ok(&["volume", "resize", "t", "10MiB"]);
            (host, guest) = rig.attach("t", 512, data);
        } else {
            rig.store().ok(&["volume", "resize", "t", "10MiB"]);
        }
        let header = disk.content()[..MIB as usize].to_vec();
        assert!(String::from_utf8_lossy(&header).contains("\"size\": 10485760"), "{attached}");
        guest.grown(10 << 20);
        guest.look();
        guest.work();
        let data = guest.leave();
        host.end();
        let reader = rig.reader();
        assert!(reader.volume_content(&reader.volume("t")) == data);
    }
}

#[test]
fn a_clone_and_an_unencrypted_volume_lie_on_devices_as_well() {
    let (Some(disk), Some(other)) = (BareDisk::zeros(9 * MIB, 512), BareDisk::zeros(16 * MIB, 4096)) else {
        return;
    };
    for arguments in [&[][..], &["--unencrypted"]] {
        let rig = Rig::on(&disk, arguments);
        let (host, mut guest) = rig.attach("t", 512, vec![0; SIZE]);
        guest.work();
        let data = guest.leave();
        host.end();
        let snapshot = rig.id(&["snapshot", "create", "t"]);
        let store = rig.store();
        store.ok(&["volume", "create", "--snapshot", &snapshot, "--device", other.name(), "--name", "c"]);
        assert_eq!(rig.json(&["volume", "show", "c"])["size"], 15 * MIB);
        let (host, mut guest) = rig.attach("c", 512, data);
        guest.grown(15 << 20);
        guest.look();
        guest.work();
        let data = guest.leave();
        host.end();
        let reader = rig.reader();
        assert!(reader.volume_content(&reader.volume("c")) == data, "{arguments:?}");
        store.ok(&["volume", "delete", "c"]);
        store.ok(&["volume", "delete", "t"]);
        store.ok(&["snapshot", "delete", &snapshot]);
        for disk in [&disk, &other] {
            let name = ["volume", "create", "--device", disk.name(), "--wipe", "--size", "4MiB"];
            let id = rig.id(&name);
            store.ok(&["volume", "delete", &id]);
            assert!(is_zero(&disk.content()));
        }
    }
}

#[test]
fn a_new_process_takes_over_a_volume_on_a_device() {
    let Some(disk) = BareDisk::zeros(10 * MIB, 512) else { return };
    let rig = Rig::on(&disk, &[]);
    let (mut host, mut guest) = rig.attach("t", 512, vec![0; SIZE]);
    guest.work();
    let successor = Successor::of(&rig.json(&["upgrade", "t"]));
    assert!(host.wait().success(), "{}", host.output());
    guest.work();
    // It has the device for itself, as the one before had.
    let other = Store::new();
    let said = refuse(&other, 4, &["volume", "create", "--device", disk.name(), "--wipe"]);
    assert!(said.contains("another program has it for itself"), "{said}");
    let data = guest.leave();
    rig.store().ok(&["detach", "t"]);
    successor.ends();
    let reader = rig.reader();
    assert!(reader.volume_content(&reader.volume("t")) == data);
}

#[test]
fn a_process_that_is_killed_loses_nothing_that_was_flushed_and_frees_the_device() {
    let Some(disk) = BareDisk::zeros(10 * MIB, 512) else { return };
    let rig = Rig::on(&disk, &[]);
    let (host, mut guest) = rig.attach("t", 512, vec![0; SIZE]);
    guest.work();
    flush(&mut guest.session.rings[0]);
    let begun = guest.begin_side_by_side();
    host.crash();
    let data = std::mem::take(&mut guest.data);
    drop(guest);
    let (host, mut guest) = rig.attach("t", 512, data);
    guest.find(begun);
    guest.look();
    guest.work();
    let data = guest.leave();
    host.end();
    let reader = rig.reader();
    assert!(reader.volume_content(&reader.volume("t")) == data);
}
