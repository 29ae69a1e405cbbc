//! A disk that grows while a VMM has it: the VMM is told, the configuration shows it, and the new sectors are there.

mod common;
#[path = "common/guest.rs"]
mod guest;
#[path = "common/process.rs"]
mod process;
#[path = "common/qemu.rs"]
mod qemu;

use common::disk::assert_carries;
use common::frontend::block::IOERR;
use common::frontend::ring::readable;
use common::frontend::{LIMIT, Options, Request, Session};
use guest::Guest;
use sealblk::store::file::FileStore;
use sealblk::vhost::backend::Device;
use sealblk::vhost::gate::Told;
use sealblk::vhost::server::{self, Socket, Stop};
use sealblk::vhost::session::Inlet;
use sealblk::vhost::tenure::{Serving, Sole};
use sealblk::vhost::worker::{Tuning, Worker};
use sealblk::virtio::{Geometry, SharedGeometry};
use sealblk::volume::image_lock::{Access, ImageLock};
use sealblk::volume::io::Disk;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;

const SMALL: u64 = 16 << 20;
const LARGE: u64 = 24 << 20;

/// A device served by a thread of this process.
struct Rig {
    folder: tempfile::TempDir,
    device: Arc<Device>,
    stop: Arc<Stop>,
    server: Option<JoinHandle<()>>,
}

impl Rig {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("disk");
        std::fs::File::create(&image).unwrap().set_len(SMALL).unwrap();
        let lock = ImageLock::acquire(&image, Access::ReadWrite).unwrap();
        let store = Box::new(FileStore::open(&image, false, 512).unwrap());
        let geometry = Geometry { sectors: SMALL / 512, block_size: 512, read_only: false };
        let disk = Arc::new(Disk::new(geometry, "rig", store, None, lock));
        let worker = |n| Worker::spawn(n, disk.clone(), Tuning::default(), |why| panic!("{why}")).unwrap();
        let serving = Serving::new(disk.clone(), (0..2).map(worker).collect::<Vec<_>>());
        let device = Arc::new(Device {
            tenure: Arc::new(Sole(serving)),
            geometry: Arc::new(SharedGeometry::new(geometry)),
            inlet: Inlet::new(folder.path(), "inner").unwrap(),
            channel: Arc::default(),
            queues: 2,
            seg_max: 126,
            queue_size: 256,
            writeback: Arc::new(true.into()),
        });
        let listener = UnixListener::bind(folder.path().join("s")).unwrap();
        let stop = Stop::new().unwrap();
        let (until, served) = (stop.clone(), device.clone());
        let serve = move || server::serve(&served, Socket::Listening(listener), &until).unwrap();
        let server = Some(std::thread::spawn(serve));
        Rig { folder, device, stop, server }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("s")
    }

    fn grow(&self) -> Told {
        let image = std::fs::File::options().write(true).open(self.folder.path().join("disk")).unwrap();
        image.set_len(LARGE).unwrap();
        self.device.grow(LARGE / 512).unwrap()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.stop.stop();
        let ended = self.server.take().unwrap().join();
        assert!(ended.is_ok() || std::thread::panicking());
    }
}

fn open(rig: &Rig, more: Protocol) -> Session {
    let usual = Options::default();
    let protocol = usual.protocol | more;
    Session::open(&rig.socket(), &Options { protocol, ..usual }).unwrap()
}

#[test]
fn the_vmm_is_told_and_the_new_sectors_are_there() {
    for acks in [true, false] {
        let rig = Rig::new();
        let usual = Options::default();
        let without = if acks { Protocol::empty() } else { Protocol::REPLY_ACK };
        let protocol = (usual.protocol | Protocol::BACKEND_REQ) & !without;
        let mut session = Session::open(&rig.socket(), &Options { protocol, ..usual }).unwrap();
        let beyond = Request::read(SMALL / 512, 4096).run(&mut session.rings[0]).unwrap();
        assert_eq!((beyond.status, session.config().unwrap().capacity), (IOERR, SMALL / 512));
        let told = std::thread::scope(|scope| {
            let growing = scope.spawn(|| rig.grow());
            let mut channel = session.backend_channel().unwrap();
            assert!(readable(channel, LIMIT).unwrap());
            let mut message = [0; 12];
            channel.read_exact(&mut message).unwrap();
            assert_eq!(message, *[2, if acks { 9 } else { 1 }, 0].map(u32::to_le_bytes).as_flattened());
            // It looks before it answers, as QEMU does.
            assert_eq!(session.config().unwrap().capacity, LARGE / 512);
            if acks {
                let ack = [[2, 5, 8].map(u32::to_le_bytes).as_flattened(), &[0; 8]].concat();
                channel.write_all(&ack).unwrap();
            }
            growing.join().unwrap()
        });
        assert_eq!(told, if acks { Told::Confirmed } else { Told::Sent });
        assert_carries(&mut session.rings[0], SMALL / 512, 65536);
        assert_carries(&mut session.rings[0], LARGE / 512 - 8, 4096);
    }
}

#[test]
fn a_vmm_without_a_channel_sees_it_when_it_looks() {
    let rig = Rig::new();
    let mut session = open(&rig, Protocol::empty());
    assert_eq!(rig.grow(), Told::Nobody);
    assert_eq!(session.config().unwrap().capacity, LARGE / 512);
    assert_carries(&mut session.rings[0], SMALL / 512, 4096);
    drop(session);
    let session = open(&rig, Protocol::BACKEND_REQ);
    assert_eq!(session.config().unwrap().capacity, LARGE / 512);
    // The channel goes with its VMM.
    drop(session);
    let _next = open(&rig, Protocol::empty());
    assert_eq!(rig.grow(), Told::Nobody);
}

#[test]
fn a_vmm_that_never_answers_holds_up_neither_the_disk_nor_its_end() {
    let rig = Rig::new();
    let mut session = open(&rig, Protocol::BACKEND_REQ);
    std::thread::scope(|scope| {
        let growing = scope.spawn(|| rig.grow());
        assert!(readable(session.backend_channel().unwrap(), LIMIT).unwrap());
        assert_carries(&mut session.rings[0], SMALL / 512, 4096);
        assert_eq!(growing.join().unwrap(), Told::Sent);
    });
}

#[test]
fn a_linux_guest_under_qemu_sees_its_disk_grow() {
    let rig = Rig::new();
    let mut guest = Guest::builder().disk(rig.socket()).queues(2).boot();
    assert_eq!(guest.ok("blockdev --getsize64 /dev/vda").trim(), SMALL.to_string());
    guest.ok("mkfs.ext4 -q /dev/vda; mount /dev/vda /mnt; echo before >/mnt/file; sync");
    assert_eq!(rig.grow(), Told::Confirmed);
    let until = format!("until [ $(blockdev --getsize64 /dev/vda) = {LARGE} ]; do usleep 20000; done");
    guest.ok(&format!("timeout 60 sh -c '{until}'"));
    let last = LARGE / 4096 - 1;
    guest.ok(&format!(
        "head -c 4096 /dev/urandom >/tmp/block
         dd if=/tmp/block of=/dev/vda bs=4096 seek={last} oflag=direct status=none
         dd if=/dev/vda bs=4096 skip={last} iflag=direct status=none | cmp - /tmp/block
         cat /mnt/file; umount /mnt; e2fsck -fn /dev/vda"
    ));
    guest.shutdown();
}
