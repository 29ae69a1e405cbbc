//! A volume of layer files, served to a front-end, and looked at as a whole.

use crate::common::frontend::{Options, Session};
use crate::common::loop_disk::{Kind, LoopDisk};
use crate::common::patience::limit;
use sealblk::backing::file::Place;
use sealblk::crypt::xts::{Engine, new_cipher};
use sealblk::crypt::{Dek, SectorSize};
use sealblk::disk::hydrate::{End, Hydration};
use sealblk::disk::{Cipher, Disk, Event, GuestData};
use sealblk::image::lock::Access;
use sealblk::reactor::Wait;
use sealblk::vhost::boundary::Boundary;
use sealblk::vhost::device::Device;
use sealblk::vhost::listener::{self, Socket, Stop};
use sealblk::vhost::queue::{Tuning, Worker};
use sealblk::vhost::session::Inlet;
use sealblk::vhost::tenure::{Serving as Queues, Sole};
use sealblk::virtio::{Segment, SharedShape};
use sealblk::volume::layers::{Layer, chain};
use std::fs::File;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

pub const QUEUES: usize = 2;

/// Where layers lie: on the disk and, where there is one, on a memory file system.
pub struct Places {
    /// Where the second is on, unless it is the memory file system.
    _disk: Option<LoopDisk>,
    dirs: Vec<TempDir>,
    made: usize,
}

impl Places {
    pub fn new() -> Self {
        let memory = Path::new("/dev/shm");
        let memory = memory.is_dir().then(|| TempDir::new_in(memory).unwrap());
        Places { _disk: None, dirs: [TempDir::new().unwrap()].into_iter().chain(memory).collect(), made: 0 }
    }

    /// On such a disk, and in memory for the second of two places, if `and_memory`.
    pub fn on(kind: Kind, and_memory: bool) -> Option<Self> {
        let dir = TempDir::new().unwrap();
        let disk = LoopDisk::mount(kind, dir.path())?;
        let mut dirs = vec![dir];
        if and_memory {
            dirs.extend(Places::new().dirs.into_iter().skip(1));
        }
        Some(Places { _disk: Some(disk), dirs, made: 0 })
    }

    /// A new layer file of zeros in one of the places.
    pub fn file(&mut self, place: usize, key: Option<usize>, sectors: u64) -> LayerFile {
        self.made += 1;
        let path = self.dirs[place % self.dirs.len()].path().join(format!("{}.img", self.made));
        File::create(&path).unwrap().set_len(sectors * 512).unwrap();
        LayerFile { path, key }
    }

    pub fn folder(&self) -> &Path {
        self.dirs[0].path()
    }
}

/// A layer's file, and which key encrypts it.
#[derive(Clone)]
pub struct LayerFile {
    pub path: PathBuf,
    pub key: Option<usize>,
}

/// The ciphers of a few keys.
pub struct Keys(Vec<Cipher>);

impl Keys {
    pub fn new(block: u32) -> Self {
        let unit = SectorSize::try_from(block).unwrap();
        let cipher = |n: u8| {
            let bytes: Vec<u8> = (0..64).map(|i| i * 3 + n).collect();
            let dek = Dek::from_bytes(&bytes).unwrap();
            Some(Arc::from(new_cipher(Engine::Auto, &dek, unit).unwrap()))
        };
        Keys((1..=3).map(cipher).collect())
    }

    pub fn count(&self) -> usize {
        self.0.len()
    }

    pub fn open(&self, file: &LayerFile, access: Access, block: u32) -> Layer {
        let cipher = file.key.and_then(|key| self.0[key].clone());
        Layer::open(&Place::whole(&file.path), access, block, cipher, None).unwrap()
    }

    /// All layers, the top first.
    pub fn open_all(&self, files: &[LayerFile], access: Access, block: u32) -> Vec<Layer> {
        let open = |(n, file)| self.open(file, if n == 0 { access } else { Access::Read }, block);
        files.iter().enumerate().map(open).collect()
    }
}

/// A device over such layers, a VMM connected to it.
pub struct Served {
    pub device: Arc<Queues>,
    pub session: Session,
    /// As the device has them open, the top first.
    pub layers: Vec<Layer>,
    /// How many of them, the lowest, are being hydrated from.
    pub leaving: usize,
    server: Serving,
}

/// The thread that serves VMMs.
pub struct Serving {
    stop: Arc<Stop>,
    thread: Option<JoinHandle<()>>,
}

impl Served {
    pub fn new(folder: &Path, disk: Arc<Disk>, layers: Vec<Layer>, tuning: &Tuning) -> Self {
        let workers = (0..QUEUES).map(|n| {
            Worker::spawn(n, disk.clone(), tuning.clone(), |why| panic!("a worker died: {why}")).unwrap()
        });
        let shape = Arc::new(SharedShape::new(disk.shape()));
        let device = Queues::new(disk.clone(), workers.collect::<Vec<_>>());
        let served = Arc::new(Device {
            tenure: Arc::new(Sole(device.clone())),
            shape,
            inlet: Inlet::new(folder, "inner").unwrap(),
            channel: Arc::default(),
            queues: QUEUES as u16,
            seg_max: 126,
            queue_size: 128,
            memory_regions: 32,
            boundary: Boundary::new().unwrap(),
            writeback: Arc::new(true.into()),
        });
        let name = folder.join("s");
        let _ = std::fs::remove_file(&name);
        let listener = UnixListener::bind(&name).unwrap();
        let stop = Stop::new().unwrap();
        let until = stop.clone();
        let serve = move || {
            listener::serve(&served, Some(Socket::Listening(listener)), None, &until).map(drop).unwrap()
        };
        let server = Serving { stop, thread: Some(std::thread::spawn(serve)) };
        let session = Session::open(&name, &Options { queues: QUEUES, ..Options::default() }).unwrap();
        let leaving = layers.len() - 1;
        Served { device, session, layers, leaving, server }
    }

    /// Begins to hydrate, if the disk is made for that.
    pub fn hydrate(&self, rate: u64) -> Option<Hydrating> {
        let hydration = Hydration::new(self.device.disk(), rate).ok()?;
        let runs = hydration.clone();
        Some(Hydrating { hydration, thread: std::thread::spawn(move || runs.run().unwrap()) })
    }

    /// Takes those layers away, of which those above must hold everything; returns how many are left.
    pub fn drop_lower_layers(&mut self) -> usize {
        let mut paused = self.device.pause(limit()).unwrap();
        self.layers.truncate(self.layers.len() - self.leaving);
        self.leaving = 0;
        let shape = paused.disk().shape();
        let disk = paused.disk().with_layers(shape, chain(&self.layers)).unwrap();
        paused.prepare(Arc::new(disk)).unwrap();
        paused.resume();
        self.layers.len()
    }

    /// Lets the VMM leave.
    pub fn without_session(self) -> Serving {
        self.server
    }

    /// Freezes the top and puts `top` above it, while the guest may have requests in flight. The lowest so
    /// many layers can be hydrated from then.
    pub fn freeze(&mut self, top: Layer, leaving: usize) {
        let mut paused = self.device.pause(limit()).unwrap();
        paused.disk().flush().unwrap();
        self.layers[0] = self.layers[0].frozen().unwrap();
        self.layers.insert(0, top);
        let disk = paused.disk().with_new_top(chain(&self.layers)).unwrap();
        self.leaving = leaving;
        paused.prepare(Arc::new(disk.hydrating_lowest(leaving))).unwrap();
        paused.resume();
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.stop.stop();
        let ended = self.thread.take().map(JoinHandle::join);
        assert!(std::thread::panicking() || matches!(ended, Some(Ok(()))), "the server panicked");
    }
}

/// A hydration in a thread of its own.
pub struct Hydrating {
    pub hydration: Arc<Hydration>,
    thread: JoinHandle<End>,
}

impl Hydrating {
    pub fn is_over(&self) -> bool {
        self.thread.is_finished()
    }

    pub fn stop(self) -> End {
        self.hydration.stop();
        self.wait()
    }

    pub fn wait(self) -> End {
        self.thread.join().unwrap()
    }
}

/// All of a disk, read through a queue of its own, in pieces of `piece` bytes.
pub fn read_whole(disk: &Arc<Disk>, piece: usize) -> Vec<u8> {
    let mem = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), piece)]).unwrap();
    let mut queue = disk.open_queue(4).unwrap();
    let size = disk.shape().sectors * 512;
    let mut all = Vec::new();
    while (all.len() as u64) < size {
        let len = piece.min((size - all.len() as u64) as usize);
        let sector = all.len() as u64 / 512;
        let segments = [Segment { addr: GuestAddress(0), len: len as u32 }];
        let guest = || GuestData { mem: &mem, segments: &segments, skip: 0 };
        mem.write_slice(&vec![0xdd; len], GuestAddress(0)).unwrap();
        if !queue.read_now(sector, len as u64, guest()).unwrap() {
            let buffer = queue.alloc(sector, len).unwrap();
            queue.read(7, sector, buffer);
            loop {
                match queue.next_event() {
                    Some(Event::Done { tag: 7, buffer: Some(buffer), result: Ok(()) }) => {
                        if queue.deliver(7, sector, buffer, guest()).unwrap() {
                            break;
                        }
                    }
                    Some(other) => panic!("{other:?}"),
                    None => queue.wait(Wait::Event).unwrap(),
                }
            }
        }
        let mut bytes = vec![0; len];
        mem.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        all.extend(bytes);
    }
    all
}
