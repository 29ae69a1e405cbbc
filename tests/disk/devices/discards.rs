//! A device that cannot give space back and promise zeros.

use sealblk::backing::file::FileBacking;
use sealblk::backing::{Backing, Caps, Queue};
use sealblk::disk::{Disk, Zeroing};
use sealblk::image::lock::{Access, ImageLock};
use sealblk::reactor::{Reactor, Wait};
use sealblk::virtio::Shape;
use std::io;
use std::rc::Rc;
use std::sync::Arc;

const SECTORS: u64 = 2048;

struct GivesNothingBack {
    backing: FileBacking,
    caps: Caps,
}

impl Backing for GivesNothingBack {
    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn open_queue(&self, reactor: &Rc<dyn Reactor>, depth: u16) -> io::Result<Box<dyn Queue>> {
        self.backing.open_queue(reactor, depth)
    }

    fn has_data(&self) -> io::Result<bool> {
        self.backing.has_data()
    }
}

#[test]
fn where_no_space_is_given_back_a_discard_does_nothing_and_zeros_are_zeros_all_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk");
    std::fs::write(&image, vec![7; 512 * SECTORS as usize]).unwrap();
    for gives_back in [true, false] {
        let lock = ImageLock::acquire(&image, Access::ReadWrite).unwrap();
        let backing = FileBacking::open(&image, false, 512, None).unwrap();
        let caps = Caps { gives_back, ..backing.caps().clone() };
        let shape = Shape { sectors: SECTORS, block_size: 512, read_only: false };
        let backing = Box::new(GivesNothingBack { backing, caps });
        let disk = Arc::new(Disk::new(shape, "", backing, None, lock));
        let mut queue = disk.open_queue(4).unwrap();
        for (how, submitted) in
            [(Zeroing::Discard, gives_back), (Zeroing::Unmap, true), (Zeroing::KeepSpace, true)]
        {
            let zeroed = queue.zero(1, 0, 64, how).expect("there is room");
            assert_eq!((zeroed.sectors, zeroed.submitted), (64, submitted), "{how:?}");
            while queue.in_flight() > 0 {
                queue.wait(Wait::Event).unwrap();
                while queue.next_event().is_some() {}
            }
        }
    }
    let content = std::fs::read(&image).unwrap();
    assert!(content[..64 * 512].iter().all(|byte| *byte == 0) && content[64 * 512..].iter().all(|b| *b == 7));
}
