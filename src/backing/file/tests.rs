//! Open files of queues, and writes of earlier processes.

use super::*;
use crate::reactor::Uring;

fn reactor() -> Rc<dyn Reactor> {
    Rc::new(Uring::new(1).unwrap())
}

/// Every descriptor of this process that is open on `file`.
fn opened(file: &File) -> Vec<std::path::PathBuf> {
    use std::os::unix::fs::MetadataExt;
    let id = |m: std::fs::Metadata| (m.dev(), m.ino());
    let ours = id(file.metadata().unwrap());
    let all = std::fs::read_dir("/proc/self/fd").unwrap().map(|fd| fd.unwrap().path());
    all.filter(|fd| std::fs::metadata(fd).is_ok_and(|m| id(m) == ours)).collect()
}

#[test]
fn a_file_is_not_opened_for_writing_while_another_queue_may_write() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("layer");
    File::create(&path).unwrap().set_len(1 << 20).unwrap();
    let file = || OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let backing = FileBacking::open(&path, false, 512, None).unwrap();
    let queue = backing.open_queue(&reactor(), 1).unwrap();
    drop(backing);
    // The open file of a queue is what the kernel keeps while requests are in flight,
    // whoever else is gone.
    let busy = lock_in_flight(&file(), locks::Kind::Exclusive).unwrap_err();
    assert_eq!(busy.kind(), io::ErrorKind::WouldBlock);
    let waiting = std::thread::scope(|scope| {
        let opens = scope.spawn(|| FileBacking::open(&path, false, 512, None).map(drop));
        drop(queue);
        opens.join().unwrap()
    });
    waiting.unwrap();
}

#[test]
fn a_queue_that_ends_has_no_writes_on_their_way_whoever_still_holds_its_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("layer");
    File::create(&path).unwrap().set_len(1 << 20).unwrap();
    let backing = FileBacking::open(&path, false, 512, None).unwrap();
    // The kernel may hold it like this for as long as an io_uring is kept and not used.
    let held = Arc::new(backing.open_again().unwrap());
    drop(backing);
    let top = Reached::whole(held.clone(), 512);
    let queue = FileQueue::new(&Rc::new(Uring::new(1).unwrap()), top, Vec::new(), 1).unwrap();
    let other = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    assert!(lock_in_flight(&other, locks::Kind::Exclusive).is_err());
    drop(queue);
    lock_in_flight(&other, locks::Kind::Exclusive).unwrap();
}

#[test]
fn every_queue_has_an_open_file_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("layer");
    File::create(&path).unwrap().set_len(1 << 20).unwrap();
    for read_only in [false, true] {
        let backing = FileBacking::open(&path, read_only, 512, None).unwrap();
        std::fs::rename(&path, dir.path().join("moved")).unwrap();
        let queues = [(); 2].map(|()| backing.open_queue(&reactor(), 1).unwrap());
        let files = opened(backing.file());
        assert_eq!(files.len(), 3);
        // A seek moves the position of one open file, whatever descriptors it has.
        lseek64(backing.file(), 77, Whence::SeekSet).unwrap();
        let positions = files.iter().map(|fd| {
            let info = fd.to_str().unwrap().replace("/fd/", "/fdinfo/");
            std::fs::read_to_string(info).unwrap().lines().next().unwrap().to_owned()
        });
        assert_eq!(positions.filter(|line| line.ends_with("77")).count(), 1);
        drop(queues);
        std::fs::rename(dir.path().join("moved"), &path).unwrap();
    }
}
