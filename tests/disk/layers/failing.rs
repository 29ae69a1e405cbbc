//! A copy of which one write fails while another is still under way: what a guest writes
//! there must come after it.

use crate::common::forward::forward;
use crate::common::patience::{limit, wait_for};
use crate::layers::rig::{Keys, Places, read_whole};
use sealblk::backing::{Backing, Done, Op, Queue};
use sealblk::disk::hydrate::Hydration;
use sealblk::disk::{Disk, Event, GuestData};
use sealblk::image::lock::Access;
use sealblk::reactor::{Reactor, Wait};
use sealblk::virtio::{Segment, Shape};
use sealblk::volume::layers::chain;
use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::FileExt;
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// What has become of the guest's write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    /// It was not let in.
    Refused,
    /// It is on the disk.
    Written,
}

/// A backing whose first write fails, and whose second is under way until its queue is closed, and until
/// something was seen of the guest's.
struct Faulty {
    backing: Arc<dyn Backing>,
    writes: Arc<AtomicUsize>,
    go_on: Arc<Mutex<Receiver<Seen>>>,
}

struct FaultyQueue {
    queue: Box<dyn Queue>,
    writes: Arc<AtomicUsize>,
    go_on: Arc<Mutex<Receiver<Seen>>>,
    failed: Option<Done>,
    held: Option<(u64, Op)>,
}

impl Backing for Faulty {
    forward!(caps has_data below next_data);

    fn open_queue(&self, reactor: &Rc<dyn Reactor>, depth: u16) -> io::Result<Box<dyn Queue>> {
        let (queue, writes, go_on) =
            (self.backing.open_queue(reactor, depth)?, self.writes.clone(), self.go_on.clone());
        Ok(Box::new(FaultyQueue { queue, writes, go_on, failed: None, held: None }))
    }
}

impl Queue for FaultyQueue {
    forward!(alloc free places max_buffer bytes in_memory has_room collect woken);

    fn in_flight(&self) -> usize {
        self.queue.in_flight() + usize::from(self.failed.is_some()) + usize::from(self.held.is_some())
    }

    fn submit(&mut self, tag: u64, op: Op) {
        if !matches!(op, Op::Write { .. }) {
            return self.queue.submit(tag, op);
        }
        match (self.writes.fetch_add(1, Ordering::SeqCst), op) {
            (0, Op::Write { buffer, .. }) => {
                let result = Err(io::Error::from_raw_os_error(28));
                self.failed = Some(Done { tag, buffer: Some(buffer), result });
            }
            (1, op) => self.held = Some((tag, op)),
            (_, op) => self.queue.submit(tag, op),
        }
    }

    fn has_done(&self) -> bool {
        self.failed.is_some() || self.queue.has_done()
    }

    fn next_done(&mut self) -> Option<Done> {
        self.failed.take().or_else(|| self.queue.next_done())
    }
}

impl Drop for FaultyQueue {
    fn drop(&mut self) {
        let Some((tag, op)) = self.held.take() else { return };
        self.go_on.lock().unwrap().recv_timeout(limit()).expect("something is seen of the guest's write");
        // Whoever drops a queue waits for it.
        self.queue.submit(tag, op);
    }
}

/// A guest's write of a block at `sector`, as soon as it is let in; `tell` is told of its fate.
fn write(disk: &Arc<Disk>, sector: u64, bytes: &[u8; 4096], tell: &Sender<Seen>) {
    let mut queue = disk.open_queue(4).unwrap();
    let mem = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 4096)]).unwrap();
    mem.write_slice(bytes, GuestAddress(0)).unwrap();
    let segments = [Segment { addr: GuestAddress(0), len: 4096 }];
    let buffer = loop {
        match queue.alloc(sector, 4096) {
            Some(buffer) => break buffer,
            None => {
                tell.send(Seen::Refused).unwrap();
                queue.wait(Wait::Event).unwrap();
            }
        }
        while queue.next_event().is_some() {}
    };
    let guest = GuestData { mem: &mem, segments: &segments, skip: 0 };
    queue.write(0, sector, buffer, false, guest).unwrap();
    loop {
        match queue.next_event() {
            Some(Event::Done { buffer, result, .. }) => {
                result.unwrap();
                queue.free(buffer.unwrap());
                return tell.send(Seen::Written).unwrap();
            }
            Some(_) => {}
            None => queue.wait(Wait::Event).unwrap(),
        }
    }
}

#[test]
fn what_a_guest_writes_after_a_copy_that_failed_stays() {
    const SECTORS: u64 = 64;
    const SECOND: u64 = 16;
    let shape = Shape { sectors: SECTORS, block_size: 512, read_only: false };
    let (mut places, keys) = (Places::new(), Keys::new(512));
    let files = [places.file(0, Some(0), SECTORS), places.file(0, None, SECTORS)];
    // Two runs with a hole between, which are two writes of one chunk.
    let image = OpenOptions::new().write(true).open(&files[1].path).unwrap();
    image.write_all_at(&[1; 4096], 0).unwrap();
    image.write_all_at(&[2; 4096], SECOND * 512).unwrap();
    let layers = keys.open_all(&files, Access::ReadWrite, 512);
    let (go, go_on) = channel();
    let mut faulty = chain(&layers);
    let writes = Arc::<AtomicUsize>::default();
    faulty.backing = Arc::new(Faulty {
        backing: faulty.backing,
        writes: writes.clone(),
        go_on: Arc::new(Mutex::new(go_on)),
    });
    let disk = Arc::new(Disk::layered(shape, "rig", faulty).unwrap().hydrating());
    let hydration = Hydration::new(disk.clone(), 0).unwrap();
    std::thread::scope(|scope| {
        let run = scope.spawn(|| hydration.run());
        wait_for("two writes have begun", || match writes.load(Ordering::SeqCst) {
            begun @ ..2 => Err(begun),
            _ => Ok(()),
        });
        let (disk, go) = (&disk, &go);
        scope.spawn(move || write(disk, SECOND, &[9; 4096], go));
        let e = run.join().unwrap().unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::StorageFull, "{e}");
    });
    let expected = [vec![1; 4096], vec![0; 4096], vec![9; 4096]].concat();
    assert!(read_whole(&disk, 4096)[..12288] == expected, "an older write has landed on the guest's");
}
