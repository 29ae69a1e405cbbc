//! What a front-end that comes back may count on, on the real process.

mod common;

use common::disk::Disk;
use common::frontend::{Options, Session};

#[test]
fn a_front_end_that_comes_back_finds_the_cache_mode_that_its_guest_chose() {
    let disk = Disk::attach(&[]);
    let session = disk.open();
    session.write_config(32, &[0]).unwrap();
    // Its guest sends no flushes any more, and nobody tells the back-end again after a reconnect.
    let (mem, rings) = session.abandon();
    let mut session = Session::resume(disk.socket(), &Options::default(), mem, rings).unwrap();
    session.start().unwrap();
    assert_eq!(session.config().unwrap().writeback, 0);
    session.stop().unwrap();
    session.reset_device().unwrap();
    assert_eq!(session.config().unwrap().writeback, 1, "a reset makes it the back-end's own choice");
}
