//! A volume on a memory file system that is full.

use crate::common::attach::{Place, open, write};
use crate::common::disk::pattern;
use crate::common::frontend::block::{IOERR, OK};
use crate::common::frontend::{Options, Request, Segment, Session};
use crate::common::loop_disk::MemoryDisk;
use crate::common::store::Store;
use std::fs::File;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};

const AREA: usize = 256 << 10;

#[test]
fn one_queue_reads_what_another_discards_while_there_is_no_room_for_a_page() {
    let store = Store::new();
    let Some(disk) = MemoryDisk::mount(12 << 20, store.root().parent().unwrap()) else { return };
    let place = Place::of(store, &[]);
    let host = place.attach(&["--queues", "2"]);
    let options = Options { queues: 2, ..Options::default() };
    let mut session = Session::open(&place.socket(), &options).unwrap();
    let was = pattern(1, AREA);
    let (reading, zeros) = (AtomicBool::new(true), [0; 512]);
    let mut rest = File::create(disk.folder().join("rest")).unwrap();
    let (first, second) = session.rings.split_at_mut(1);
    write(&mut first[0], 0, &was);
    let half = first[0].mem.room() / 2;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while reading.load(Ordering::Relaxed) {
                // What was taken of the guest's memory is given back when nobody has any.
                while first[0].mem.room() < half {
                    std::thread::yield_now();
                }
                let outcome = Request::read(0, AREA).run(&mut first[0]).unwrap();
                assert_eq!(outcome.status, OK);
                // Each sector is what it was or zeros, and nothing that a key made of zeros.
                for (was, found) in was.chunks(512).zip(outcome.data.chunks(512)) {
                    assert!(found == was || found == zeros);
                }
            }
        });
        for _ in 0..60 {
            // Whatever becomes free is taken at once.
            while rest.write(&[9; 4096]).is_ok_and(|n| n > 0) {}
            for page in (0..AREA as u64 / 4096).rev() {
                let discard = Request::discard(&[Segment { sector: page * 8, count: 8, flags: 0 }]);
                assert_eq!(discard.run(&mut second[0]).unwrap().status, OK);
                while rest.write(&[9; 4096]).is_ok_and(|n| n > 0) {}
            }
            assert_eq!(Request::write(0, &was).run(&mut second[0]).unwrap().status, IOERR, "it is full");
            // Room for it again.
            rest = File::create(disk.folder().join("rest")).unwrap();
            write(&mut second[0], 0, &was);
        }
        reading.store(false, Ordering::Relaxed);
    });
    drop(session);
    host.end();
    let host = place.attach(&[]);
    assert!(crate::common::attach::read(&mut open(&place.socket()).rings[0], 0, AREA) == was);
    host.end();
}
