//! A VMM and its guest against the whole device: gate, vhost-user crate, rings, queue threads and a
//! disk. Threads take turns as they like here, so an input may not do the same twice; what must
//! hold holds whatever they do.

use super::input::Input;
use super::script::{Files, answers, send_all};
use sealblk::backing::file::FileBacking;
use sealblk::crypt::xts::{Engine, new_cipher};
use sealblk::crypt::{Dek, SectorSize};
use sealblk::disk::Disk;
use sealblk::image::lock::{Access, ImageLock};
use sealblk::vhost::boundary::Boundary;
use sealblk::vhost::device::Device;
use sealblk::vhost::queue::{Tuning, Worker};
use sealblk::vhost::session::{Inlet, serve};
use sealblk::vhost::tenure::{Serving, Sole};
use sealblk::virtio::{Shape, SharedShape};
use std::fs::File;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, LazyLock, Mutex};

/// 1 MiB.
const SECTORS: u64 = 2048;
const QUEUES: u16 = 2;

static DEVICE: LazyLock<Mutex<Arc<Device>>> = LazyLock::new(|| Mutex::new(Arc::new(device())));

/// The guest's memory, then the VMM's messages.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let image = usize::from(input.u16());
    let (files, closed) = Files::new(input.bytes(image));
    let (ours, vmm) = UnixStream::pair().expect("sockets");
    let sent = send_all(&ours, &mut input, files);

    // One VMM at a time, as with the real one.
    let device = DEVICE.lock().expect("nobody panicked");
    let _ = serve(&device, vmm, None);
    assert!(answers(&ours) <= sent, "more answers than messages");
    drop(ours);
    assert!(closed.all(), "a descriptor stays open");
}

fn device() -> Device {
    let folder = std::env::temp_dir().join(format!("sealblk-fuzz-{}", uuid::Uuid::new_v4()));
    std::fs::create_dir(&folder).expect("a folder");
    let name = folder.join("disk");
    File::create_new(&name).and_then(|file| file.set_len(512 * SECTORS)).expect("a disk");
    let backing = FileBacking::open(&name, false, 512, None).expect("a backing");
    let lock = ImageLock::acquire(&name, Access::ReadWrite).expect("a lock");
    std::fs::remove_file(&name).expect("removed");
    let inlet = Inlet::new(&folder, "inner").expect("a socket");
    std::fs::remove_dir(&folder).expect("removed");

    let key: Vec<u8> = (0..64).collect();
    let dek = Dek::from_bytes(&key).expect("a key");
    let cipher = new_cipher(Engine::Auto, &dek, SectorSize::B512).expect("a cipher");
    let shape = Shape { sectors: SECTORS, block_size: 512, read_only: false };
    let disk = Arc::new(Disk::new(shape, "fuzz", Box::new(backing), Some(cipher), lock));
    let worker = |index| {
        let died = |why: String| {
            // Nobody joins this thread before the end: nothing else would tell of it.
            eprintln!("{why}");
            std::process::abort();
        };
        // The first queue answers as chains are done, the second in order.
        let tuning = Tuning { in_order: index == 1, ..Tuning::default() };
        Worker::spawn(usize::from(index), disk.clone(), tuning, died).expect("a thread")
    };
    let workers = (0..QUEUES).map(worker).collect::<Vec<_>>();
    let tenure = Arc::new(Sole(Serving::new(disk, workers)));
    let shape = Arc::new(SharedShape::new(shape));
    let (channel, queues, seg_max, writeback) = (Arc::default(), QUEUES, 126, Arc::new(true.into()));
    let (queue_size, memory_regions) = (256, 509);
    let boundary = Boundary::new().expect("an event");
    Device { tenure, shape, inlet, channel, queues, seg_max, queue_size, memory_regions, boundary, writeback }
}
