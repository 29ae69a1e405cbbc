//! Attached as another user, and for reading alone: what the process that makes connections has to do with
//! neither.

use super::server::{Exported, attach, content, rig};
use crate::common::attach::Host;
use crate::common::frontend::Request;
use crate::common::frontend::block::{IOERR, OK};
use crate::common::successor::Successor;
use crate::devices::rig::{MIB, Rig};
use std::fs::Permissions;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;

const SIZE: usize = 8 << 20;
const NOBODY: u32 = 65534;

/// Makes `path` and all below it the user's.
fn give(path: &Path) {
    chown(path, Some(NOBODY), Some(NOBODY)).expect("root may give files away");
    if path.is_dir() {
        std::fs::read_dir(path).expect("list a folder").for_each(|entry| give(&entry.unwrap().path()));
    }
}

/// The volume is served by a process of an ordinary user's, which goes on after `interruption`.
pub fn by_an_ordinary_user(rig: &Rig, interruption: impl FnOnce(&Host)) {
    rig.store().let_belong_to("nobody");
    give(&rig.store().root());
    std::fs::set_permissions(rig.place.folder(), Permissions::from_mode(0o711)).unwrap();
    let (host, mut guest) = attach(rig, 512, vec![0; SIZE], &["--user", "nobody"]);
    let status = std::fs::read_to_string(host.proc("status")).unwrap();
    assert!(status.contains("Uid:\t65534\t65534\t65534\t65534"), "{status}");
    guest.work();
    guest.writes_survive(1, || interruption(&host));
    host.says("the connection is lost");
    guest.work();
    let data = guest.leave();
    host.end();
    assert!(content(rig, "volume", "t") == data);
}

/// The volume is served to be read, and to be written by nobody, also after an upgrade.
pub fn for_reading_alone(rig: &Rig) {
    let (host, mut guest) = attach(rig, 512, vec![0; SIZE], &[]);
    guest.work();
    let data = guest.leave();
    host.end();
    let (mut host, mut guest) = attach(rig, 512, data, &["--read-only"]);
    guest.look();
    let is_refused = |request: Request, ring: &mut _| {
        assert_eq!(request.run(ring).unwrap().status, IOERR);
    };
    is_refused(Request::write(0, &[1; 4096]), &mut guest.session.rings[0]);
    guest.look();
    let successor = Successor::of(&rig.json(&["upgrade", "t"]));
    assert!(host.wait().success(), "{}", host.output());
    guest.look();
    is_refused(Request::write(0, &[1; 4096]), &mut guest.session.rings[1]);
    assert_eq!(Request::flush().run(&mut guest.session.rings[0]).unwrap().status, OK);
    let data = guest.leave();
    rig.store().ok(&["detach", "t"]);
    successor.ends();
    assert!(content(rig, "volume", "t") == data);
}

#[test]
fn an_ordinary_user_s_process_is_served_and_connected_again() {
    let exported = Exported::zeros(10 * MIB);
    let mut server = Some(exported.by_nbdkit(&[], &[]));
    let rig = rig(&exported.address(), &[]);
    by_an_ordinary_user(&rig, |_| {
        server.take().into_iter().for_each(super::server::Server::crash);
        server = Some(exported.by_nbdkit(&[], &[]));
    });
}

#[test]
fn what_is_attached_for_reading_is_not_written() {
    let exported = Exported::zeros(10 * MIB);
    let _server = exported.by_nbdkit(&[], &[]);
    let rig = rig(&exported.address(), &[]);
    for_reading_alone(&rig);
}
