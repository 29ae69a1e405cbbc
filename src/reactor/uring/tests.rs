//! Watches and files of one io_uring.
#![allow(unsafe_code)]

use super::*;
use std::os::fd::AsRawFd;

#[test]
fn a_watch_that_wakes_at_its_end_ends() {
    let uring = Uring::new(4).unwrap();
    let woken = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
    let watched = || {
        let fd = uring.0.borrow().ring.as_raw_fd();
        let ring = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap();
        let polls = ring.lines().skip_while(|line| !line.starts_with("PollList")).skip(1);
        polls.take_while(|line| line.starts_with(' ')).count()
    };
    for round in 0..3 {
        uring.watch(woken.as_raw_fd());
        uring.wait(Wait::Poll).unwrap();
        assert_eq!(watched(), 1, "in round {round}");
        // Told, and not taken in.
        woken.write(1).unwrap();
        uring.0.borrow_mut().end_watches().unwrap();
        assert_eq!(watched(), 0, "in round {round}");
    }
}

#[test]
fn a_watch_tells_of_its_descriptor_until_it_ends() {
    let uring: Rc<dyn Reactor> = Rc::new(Uring::new(4).unwrap());
    let [one, two] = [(); 2].map(|()| vmm_sys_util::eventfd::EventFd::new(0).unwrap());
    let [first, second] = [&one, &two].map(|fd| super::super::Watched::new(&uring, fd.as_raw_fd()));
    assert_ne!(*first, *second);
    for _ in 0..2 {
        two.write(1).unwrap();
        uring.wait(Wait::Event).unwrap();
        assert_eq!(uring.next_woken(), Some(Woken::Ready(*second)));
        assert_eq!(uring.next_woken(), None);
    }
    one.write(1).unwrap();
    uring.wait(Wait::Event).unwrap();
    drop(first);
    assert_eq!(uring.next_woken(), None, "what was told before its end");
    one.write(1).unwrap();
    two.write(1).unwrap();
    uring.wait(Wait::Event).unwrap();
    assert_eq!(uring.next_woken(), Some(Woken::Ready(*second)));
    assert_eq!(uring.next_woken(), None);
}

#[test]
fn two_queues_have_files_of_their_own_and_each_hears_of_its_operations() {
    let uring = Rc::new(Uring::new(4).unwrap());
    let [one, two] = [(); 2].map(|()| tempfile::tempfile().unwrap());
    let sync = |files: &Files, slot| {
        // SAFETY: it refers to no memory.
        unsafe { files.push(slot, opcode::Fsync::new(files.number(0)).build(), 0) }
    };
    let first = Files::new(uring.clone(), &[one.as_raw_fd(), two.as_raw_fd()]).unwrap();
    let second = Files::new(uring.clone(), &[two.as_raw_fd()]).unwrap();
    sync(&first, 1);
    sync(&second, 2);
    while !(first.has_completed() && second.has_completed()) {
        uring.0.borrow_mut().enter(Wait::Event).unwrap();
        uring.0.borrow_mut().reap();
    }
    assert_eq!(second.next_completed(), Some((2, 0)));
    assert_eq!(second.next_completed(), None);
    assert_eq!(first.next_completed(), Some((1, 0)));
    drop(first);
    // The places are another's.
    let third = Files::new(uring.clone(), &[one.as_raw_fd()]).unwrap();
    sync(&third, 3);
    uring.wait(Wait::Event).unwrap();
    assert_eq!(third.next_completed(), Some((3, 0)));
    let all = vec![one.as_raw_fd(); uring.0.borrow().ring.places()];
    assert!(Files::new(uring.clone(), &all).is_err(), "there is no such room");
    drop((second, third));
    Files::new(uring, &all).unwrap();
}
