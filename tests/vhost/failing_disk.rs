//! What a guest is told when its disk fails, and what "durable" means in write-through, over a backing that
//! records every operation and fails on demand.

use crate::common::forward::forward;
use crate::common::frontend::block::{IOERR, OK};
use crate::common::frontend::{Options, Request, Segment, Session};
use sealblk::backing::file::FileBacking;
use sealblk::backing::{Backing, Done, InMemory, Op, Queue};
use sealblk::disk::Disk;
use sealblk::image::lock::{Access, ImageLock};
use sealblk::reactor::Reactor;
use sealblk::vhost::boundary::Boundary;
use sealblk::vhost::device::Device;
use sealblk::vhost::listener::{self, Socket, Stop};
use sealblk::vhost::queue::{Tuning, Worker};
use sealblk::vhost::session::Inlet;
use sealblk::vhost::tenure::{Serving, Sole};
use sealblk::virtio::{Shape, SharedShape};
use std::collections::HashMap;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

const SECTORS: u64 = 16384;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    Write { durable: bool },
    Flush,
    Zero,
}

/// What was done so far, and what shall fail the next time.
#[derive(Default)]
struct Script {
    done: Vec<Kind>,
    fail: Option<(Kind, i32)>,
}

struct Scripted {
    backing: FileBacking,
    script: Arc<Mutex<Script>>,
}

struct ScriptedQueue {
    queue: Box<dyn Queue>,
    script: Arc<Mutex<Script>>,
    kinds: HashMap<u64, Kind>,
}

impl Backing for Scripted {
    forward!(caps has_data);

    fn open_queue(&self, reactor: &Rc<dyn Reactor>, depth: u16) -> io::Result<Box<dyn Queue>> {
        let queue = self.backing.open_queue(reactor, depth)?;
        Ok(Box::new(ScriptedQueue { queue, script: self.script.clone(), kinds: HashMap::new() }))
    }
}

impl Queue for ScriptedQueue {
    forward!(alloc free places max_buffer bytes has_room in_flight collect woken has_done);

    fn in_memory(&self, _layer: usize, _offset: u64, _len: usize) -> Option<InMemory<'_>> {
        None
    }

    fn submit(&mut self, tag: u64, op: Op) {
        let kind = match op {
            Op::Read { .. } | Op::ReadBelow { .. } => Kind::Read,
            Op::Write { durable, .. } => Kind::Write { durable },
            Op::Flush => Kind::Flush,
            Op::Zero { .. } => Kind::Zero,
        };
        assert!(self.kinds.insert(tag, kind).is_none(), "a tag is used twice at a time");
        self.queue.submit(tag, op)
    }

    fn next_done(&mut self) -> Option<Done> {
        let Done { tag, buffer, result } = self.queue.next_done()?;
        let kind = self.kinds.remove(&tag).expect("it was submitted");
        let mut script = self.script.lock().unwrap();
        script.done.push(kind);
        let result = match script.fail.take_if(|(what, _)| *what == kind) {
            Some((_, errno)) => Err(io::Error::from_raw_os_error(errno)),
            None => result,
        };
        Some(Done { tag, buffer, result })
    }
}

/// A device of two queues over such a backing, served by a thread.
struct Rig {
    folder: tempfile::TempDir,
    script: Arc<Mutex<Script>>,
    stop: Arc<Stop>,
    disk: Arc<Disk>,
    server: Option<JoinHandle<()>>,
}

impl Rig {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("disk");
        std::fs::File::create(&image).unwrap().set_len(512 * SECTORS).unwrap();
        let lock = ImageLock::acquire(&image, Access::ReadWrite).unwrap();
        let script: Arc<Mutex<Script>> = Arc::default();
        let backing = Scripted {
            backing: FileBacking::open(&image, false, 512, None).unwrap(),
            script: script.clone(),
        };
        let shape = Shape { sectors: SECTORS, block_size: 512, read_only: false };
        let disk = Arc::new(Disk::new(shape, "rig", Box::new(backing), None, lock));
        let workers = (0..2).map(|n| {
            Worker::spawn(n, disk.clone(), Tuning::default(), |why| panic!("a worker died: {why}")).unwrap()
        });
        let device = Arc::new(Device {
            tenure: Arc::new(Sole(Serving::new(disk.clone(), workers.collect::<Vec<_>>()))),
            shape: Arc::new(SharedShape::new(shape)),
            inlet: Inlet::new(folder.path(), "inner").unwrap(),
            channel: Arc::default(),
            queues: 2,
            seg_max: 126,
            queue_size: 256,
            memory_regions: 32,
            boundary: Boundary::new().unwrap(),
            writeback: Arc::new(true.into()),
        });
        let listener = UnixListener::bind(folder.path().join("s")).unwrap();
        let stop = Stop::new().unwrap();
        let until = stop.clone();
        let serve = move || {
            listener::serve(&device, Some(Socket::Listening(listener)), None, &until).map(drop).unwrap()
        };
        let server = Some(std::thread::spawn(serve));
        Rig { folder, script, stop, disk, server }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("s")
    }

    fn open(&self) -> Session {
        Session::open(&self.socket(), &Options { queues: 2, ..Options::default() }).unwrap()
    }

    fn fail_next(&self, kind: Kind, errno: i32) {
        self.script.lock().unwrap().fail = Some((kind, errno));
    }

    /// What was done since the last look.
    fn done(&self) -> Vec<Kind> {
        std::mem::take(&mut self.script.lock().unwrap().done)
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.stop.stop();
        let ended = self.server.take().map(JoinHandle::join);
        assert!(std::thread::panicking() || matches!(ended, Some(Ok(()))), "the server panicked");
    }
}

fn run(session: &mut Session, queue: usize, request: Request) -> u8 {
    request.run(&mut session.rings[queue]).unwrap().status
}

fn zeroes(flags: u32) -> Request {
    Request::write_zeroes(&[Segment { sector: 64, count: 64, flags }])
}

#[test]
fn in_write_through_whatever_changes_the_disk_is_durable_when_it_completes() {
    let rig = Rig::new();
    let mut session = rig.open();
    for flags in [0, 1] {
        assert_eq!(run(&mut session, 0, zeroes(flags)), OK);
        assert_eq!(rig.done(), [Kind::Zero], "with a write cache, a flush is the guest's affair");
    }
    session.write_config(32, &[0]).unwrap();
    assert_eq!(run(&mut session, 0, Request::write(0, &[1; 4096])), OK);
    assert_eq!(rig.done(), [Kind::Write { durable: true }]);
    for flags in [0, 1] {
        assert_eq!(run(&mut session, 0, zeroes(flags)), OK);
        assert_eq!(rig.done(), [Kind::Zero, Kind::Flush]);
    }
    rig.fail_next(Kind::Zero, libc::EIO);
    assert_eq!(run(&mut session, 0, zeroes(1)), IOERR);
    rig.fail_next(Kind::Flush, libc::EIO);
    assert_eq!(run(&mut session, 0, zeroes(1)), IOERR);
    assert_eq!(run(&mut session, 0, Request::flush()), IOERR, "a failed flush is never a success again");
}

#[test]
fn a_failed_flush_stays_failed_for_every_queue_and_every_vmm() {
    let rig = Rig::new();
    let told: Arc<Mutex<Vec<String>>> = Arc::default();
    let list = told.clone();
    rig.disk.hear_of_failed_flush(move |e| list.lock().unwrap().push(e.to_string()));
    let mut session = rig.open();
    assert_eq!(run(&mut session, 0, Request::flush()), OK);
    assert!(!rig.disk.has_failed_flush());
    rig.fail_next(Kind::Flush, libc::EIO);
    assert_eq!(run(&mut session, 0, Request::flush()), IOERR);
    assert!(rig.disk.has_failed_flush());
    for queue in [0, 1] {
        assert_eq!(run(&mut session, queue, Request::flush()), IOERR);
    }
    drop(session);
    assert_eq!(run(&mut rig.open(), 1, Request::flush()), IOERR);
    let refused = rig.disk.flush().expect_err("a detach must not say that all is well");
    assert!(refused.to_string().contains("detached and attached again"), "{refused}");
    assert_eq!(told.lock().unwrap().len(), 1, "it is told once");
}

#[test]
fn a_durable_write_that_failed_may_have_cost_earlier_ones() {
    // The kernel reports a failed write-back once: to whoever syncs next, here the durable write.
    let rig = Rig::new();
    let mut session = rig.open();
    assert_eq!(run(&mut session, 0, Request::write(0, &[1; 4096])), OK);
    session.write_config(32, &[0]).unwrap();
    rig.fail_next(Kind::Write { durable: true }, libc::ENOSPC);
    assert_eq!(run(&mut session, 0, Request::write(8, &[1; 4096])), IOERR);
    assert_eq!(run(&mut session, 0, Request::flush()), OK, "for want of room nothing is lost");
    rig.fail_next(Kind::Write { durable: true }, libc::EIO);
    assert_eq!(run(&mut session, 0, Request::write(8, &[1; 4096])), IOERR);
    assert_eq!(run(&mut session, 0, Request::flush()), IOERR);
}
