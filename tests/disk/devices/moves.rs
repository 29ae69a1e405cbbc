//! Volumes that go from files onto devices, from device to device, and back.

use super::rig::{MIB, Rig, is_zero};
use crate::common::attach::flush;
use crate::common::killed::{End, killed_before};
use crate::common::loop_disk::BareDisk;
use std::path::PathBuf;

const SIZE: usize = 8 << 20;

/// Whether the device has a header.
fn is_taken(disk: &BareDisk) -> bool {
    disk.content().starts_with(b"sealblk device 1")
}

fn place_of_top(rig: &Rig) -> PathBuf {
    rig.json(&["volume", "show", "t"])["layers"][0]["path"].as_str().unwrap().into()
}

#[test]
fn a_volume_moves_from_a_device_to_another_one_and_into_a_file() {
    let (Some(first), Some(second)) = (BareDisk::zeros(10 * MIB, 512), BareDisk::new(12 * MIB, 4096)) else {
        return;
    };
    for more in [&[][..], &["--unencrypted"]] {
        let rig = Rig::on(&first, more);
        let store = rig.store();
        let (host, mut guest) = rig.attach("t", 512, vec![0; SIZE]);
        guest.work();
        let said = rig.refuse(4, &["volume", "move", "t", "--to", second.name(), "--wipe"]);
        assert!(said.contains("detach it for this command"), "{said}");
        let data = guest.leave();
        host.end();
        let said = rig.refuse(4, &["volume", "move", "t", "--to", second.name()]);
        assert!(said.contains("--wipe"), "{said}");
        store.ok(&["volume", "move", "t", "--to", second.name(), "--wipe", "--follow"]);
        assert_eq!(place_of_top(&rig), second.device);
        assert!(is_taken(&second) && !is_taken(&first), "{more:?}");
        assert!(rig.layers("img").is_empty() && rig.layers("device").len() == 1);
        let reader = rig.reader();
        assert!(reader.volume_content(&reader.volume("t")) == data);

        // Into a file, while the guest goes on.
        store.ok(&["volume", "move", "t", "--to", "file"]);
        let (host, mut guest) = rig.attach("t", 512, data);
        guest.look();
        guest.work();
        store.ok(&["volume", "flatten", "t", "--follow"]);
        guest.look();
        guest.work();
        let data = guest.leave();
        host.end();
        assert!(!is_taken(&second), "nothing needs it any more");
        assert!(rig.layers("img").len() == 1 && rig.layers("device").is_empty());
        let reader = rig.reader();
        assert!(reader.volume_content(&reader.volume("t")) == data);
        let said = rig.refuse(2, &["volume", "move", "t", "--to", "file"]);
        assert!(said.contains("in files of the store already"), "{said}");
        first.overwrite(0, &vec![0; 10 << 20]);
    }
}

#[test]
fn a_new_data_key_comes_onto_a_device_and_a_snapshot_keeps_the_old_one() {
    let (Some(first), Some(second)) = (BareDisk::zeros(10 * MIB, 512), BareDisk::zeros(12 * MIB, 512)) else {
        return;
    };
    let rig = Rig::on(&first, &[]);
    let (host, mut guest) = rig.attach("t", 512, vec![0; SIZE]);
    guest.work();
    flush(&mut guest.session.rings[0]);
    let snapshot = rig.id(&["snapshot", "create", "t"]);
    let then = guest.data.clone();
    guest.work();
    rig.refuse(4, &["volume", "rekey", "t", "--onto", second.name()]);
    let data = guest.leave();
    host.end();
    rig.store().ok(&["volume", "rekey", "t", "--onto", second.name(), "--follow"]);
    assert_eq!(place_of_top(&rig), second.device);
    assert!(is_taken(&first) && is_taken(&second), "the snapshot needs the first");
    let reader = rig.reader();
    assert!(reader.volume_content(&reader.volume("t")) == data);
    assert!(reader.snapshot_content(&reader.snapshot(&snapshot)) == then);
    rig.store().ok(&["snapshot", "delete", &snapshot]);
    assert!(!is_taken(&first));
}

#[test]
fn wherever_a_move_is_killed_the_volume_is_whole_and_the_device_its_own_or_free() {
    let (Some(first), Some(second)) = (BareDisk::zeros(10 * MIB, 512), BareDisk::zeros(10 * MIB, 512)) else {
        return;
    };
    let rig = Rig::on(&first, &[]);
    let (host, mut guest) = rig.attach("t", 512, vec![0; SIZE]);
    guest.work();
    let data = guest.leave();
    host.end();
    let mut killed = 0;
    for step in (0..).step_by(9) {
        let mut command = rig.store().command();
        command.args(["volume", "move", "t", "--to", second.name(), "--wipe", "--follow"]);
        if killed_before(&mut command, step) != End::Killed {
            break;
        }
        killed += 1;
        rig.store().ok(&["gc"]);
        let on_second = place_of_top(&rig) == second.device;
        assert_eq!(is_taken(&second), on_second, "step {step}");
        let reader = rig.reader();
        assert!(reader.volume_content(&reader.volume("t")) == data, "step {step}");
        if on_second {
            rig.store().ok(&["volume", "flatten", "t", "--follow"]);
            rig.store().ok(&["volume", "move", "t", "--to", first.name(), "--wipe", "--follow"]);
            assert!(!is_taken(&second));
        }
    }
    assert!(killed > 5, "{killed} times");
    rig.store().ok(&["volume", "flatten", "t", "--follow"]);
    assert!(!is_zero(&data) && is_taken(&second) && !is_taken(&first));
    let reader = rig.reader();
    assert!(reader.volume_content(&reader.volume("t")) == data);
}
