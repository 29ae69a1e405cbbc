//! Clones under another KMS key, and encrypted clones of what was not: they are attached at once, and need
//! nothing of where they come from once everything was copied.

use crate::common::attach::flush;
use crate::watch::{Guest, SLOW, attach, full, sees, wait_for_a_part, wait_until_done};

#[test]
fn a_clone_under_another_key_is_attached_at_once_and_ends_on_its_own() {
    for arguments in [&[][..], &["--unencrypted"]] {
        let rig = full(arguments);
        rig.place.store.ok(&["key", "create", "--alias", "alias/new"]);
        let snapshot = rig.id(&["snapshot", "create", "t"]);
        let clone = ["volume", "create", "--snapshot", &snapshot, "--name", "c", "--key", "alias/new"];
        rig.place.store.ok(&clone);
        let mut data = rig.data.clone();
        let (host, socket) = attach(&rig, "c", SLOW);
        let mut guest = Guest::on(&socket, 31);
        assert!(sees(&mut guest.session, 8 << 20) == data);
        wait_for_a_part(&rig, "c");
        guest.work(&mut data, 50);
        flush(&mut guest.session.rings[0]);
        drop(guest);
        host.crash();
        assert!(rig.reader().volume_content(&rig.reader().volume("c")) == data);
        let (host, socket) = attach(&rig, "c", &[]);
        let mut guest = Guest::on(&socket, 32);
        guest.work(&mut data, 20);
        wait_until_done(&rig, "c");
        guest.work(&mut data, 20);
        flush(&mut guest.session.rings[0]);
        drop(guest);
        host.end();
        let volume = rig.reader().volume("c");
        assert_eq!((volume.layers().len(), volume.keys().len(), volume.is_encrypted()), (1, 1, true));
        rig.place.store.ok(&["volume", "delete", "t"]);
        rig.place.store.ok(&["snapshot", "delete", &snapshot]);
        if arguments.is_empty() {
            rig.place.store.ok(&["key", "disable", "--yes", "alias/aws/ebs"]);
        }
        let (host, socket) = rig.attach("c");
        assert!(sees(&mut crate::common::attach::open(&socket), 8 << 20) == data);
        host.end();
        rig.assert_layers_are_named();
    }
}
