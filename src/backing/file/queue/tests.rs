//! What the kernel does now and then.

use super::*;
use crate::reactor::{Reactor, Wait};
use std::os::unix::fs::FileExt;

fn queue() -> FileQueue {
    let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    file.set_len(1 << 20).unwrap();
    let layer = Reached::whole(Arc::new(file), 512);
    FileQueue::new(&Rc::new(Uring::new(4).unwrap()), layer, vec![], 4).unwrap()
}

/// So many queues over one file, as if its disk had blocks of `unit` bytes.
fn in_units(unit: u32, queues: usize) -> Vec<FileQueue> {
    let file = Arc::new(tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap());
    file.set_len(1 << 20).unwrap();
    let turns = Arc::new(Turns::new());
    let queue = |_| {
        let layer = Reached::whole(file.clone(), unit);
        let uring = Rc::new(Uring::new(4).unwrap());
        let queue = FileQueue::new(&uring, layer, vec![], 4).unwrap();
        queue.with_turns(&uring, Some(turns.clone())).unwrap()
    };
    (0..queues).map(queue).collect()
}

fn begin_write(queue: &mut FileQueue, tag: u64, offset: u64, len: usize, byte: u8) {
    let mut buffer = queue.alloc(offset, len).unwrap();
    assert_eq!(queue.bytes(&mut buffer).len(), len);
    queue.bytes(&mut buffer).fill(byte);
    queue.submit(tag, Op::Write { offset, buffer, durable: false });
}

/// Waits as the queue's thread does.
fn wait(queue: &mut FileQueue, wait: Wait) {
    let uring = queue.files.uring();
    uring.wait(if queue.has_done() { Wait::Poll } else { wait }).unwrap();
    while let Some(woken) = queue.files.uring().next_woken() {
        assert!(queue.woken(woken.token()));
    }
    queue.collect().unwrap();
}

fn done(queue: &mut FileQueue) -> (u64, io::Result<()>) {
    loop {
        match queue.next_done() {
            Some(Done { tag, buffer, result }) => {
                buffer.into_iter().for_each(|b| queue.free(b));
                return (tag, result);
            }
            None => wait(queue, Wait::Event),
        }
    }
}

/// Has the kernel do what was submitted, and puts `result` in place of what came of it.
fn pretend(queue: &mut FileQueue, result: i32) {
    let slot = queue.files.uring().steal_completion();
    queue.complete(slot, result);
}

#[test]
fn what_the_kernel_did_not_begin_with_is_submitted_again() {
    let mut queue = queue();
    let mut buffer = queue.alloc(8192, 4096).unwrap();
    queue.bytes(&mut buffer).fill(7);
    queue.submit(1, Op::Write { offset: 8192, buffer, durable: false });
    for again in [libc::EAGAIN, libc::EINTR, libc::EAGAIN] {
        pretend(&mut queue, -again);
        assert!(queue.next_done().is_none(), "it is not over");
    }
    let (tag, result) = done(&mut queue);
    assert!(tag == 1 && result.is_ok());
    assert_eq!(queue.in_flight(), 0);
    let mut found = [0; 4096];
    queue.file.read_exact_at(&mut found, 8192).unwrap();
    assert_eq!(found, [7; 4096]);
}

#[test]
fn what_never_begins_fails_in_the_end() {
    let mut queue = queue();
    queue.submit(2, Op::Flush);
    for _ in 0..=MAX_TRIES {
        pretend(&mut queue, -libc::EAGAIN);
    }
    let (tag, result) = done(&mut queue);
    assert_eq!((tag, result.unwrap_err().raw_os_error()), (2, Some(libc::EAGAIN)));
}

#[test]
fn zeroing_that_keeps_the_space_is_a_hole_where_that_is_not_to_be_had() {
    let mut queue = queue();
    queue.file.write_all_at(&[7; 8192], 0).unwrap();
    queue.submit(3, Op::Zero { offset: 0, len: 4096, keep_space: true });
    pretend(&mut queue, -libc::EOPNOTSUPP);
    assert!(queue.next_done().is_none(), "it is not over");
    pretend(&mut queue, -libc::EAGAIN);
    assert!(done(&mut queue).1.is_ok());
    queue.submit(4, Op::Zero { offset: 0, len: 4096, keep_space: false });
    pretend(&mut queue, -libc::EOPNOTSUPP);
    assert_eq!(done(&mut queue).1.unwrap_err().raw_os_error(), Some(libc::EOPNOTSUPP));
    let mut found = [0; 8192];
    queue.file.read_exact_at(&mut found, 0).unwrap();
    assert!(found[..4096] == [0; 4096] && found[4096..] == [7; 4096]);
}

#[test]
fn a_device_is_flushed_only_while_it_has_a_cache() {
    let says = tempfile::NamedTempFile::new().unwrap();
    let cache = WriteCache::from(File::open(says.path()).unwrap());
    let mut queue = queue().with_write_cache(Some(Arc::new(cache)));
    for (words, at_once) in
        [("write through\n", true), ("write back\n", false), ("write through\n", true), ("", false)]
    {
        std::fs::write(says.path(), words).unwrap();
        queue.submit(5, Op::Flush);
        assert_eq!(queue.in_flight(), usize::from(!at_once), "{words:?}");
        assert!(done(&mut queue).1.is_ok());
    }
}

#[test]
fn a_transfer_that_ends_early_goes_on_with_the_rest() {
    let mut queue = queue();
    queue.file.write_all_at(&[7; 8192], 0).unwrap();
    begin_write(&mut queue, 1, 65536, 8192, 9);
    // As if the kernel had written so much: what is not whole sectors is written once more.
    for moved in [512, 4096 + 100, 1, 0] {
        queue.file.write_all_at(&[0; 8192], 65536).unwrap();
        pretend(&mut queue, moved);
        let over = queue.next_done();
        match moved {
            0 => {
                let Some(Done { tag: 1, buffer: Some(buffer), result: Err(e) }) = over else { panic!() };
                assert_eq!(e.kind(), io::ErrorKind::WriteZero);
                queue.free(buffer);
            }
            _ => assert!(over.is_none(), "it is not over"),
        }
    }
    let mut found = [0; 8192];
    queue.file.read_exact_at(&mut found, 65536).unwrap();
    assert!(found[..4608] == [0; 4608] && found[4608..] == [9; 3584], "what was left, and nothing else");

    let buffer = queue.alloc(0, 8192).unwrap();
    queue.submit(2, Op::Read { offset: 0, buffer });
    pretend(&mut queue, 4096);
    wait(&mut queue, Wait::Event);
    let Some(Done { tag: 2, buffer: Some(mut buffer), result: Ok(()) }) = queue.next_done() else {
        panic!("it is over");
    };
    assert_eq!(queue.bytes(&mut buffer), [7; 8192]);
    queue.free(buffer);

    let buffer = queue.alloc((1 << 20) - 512, 1024).unwrap();
    queue.submit(3, Op::Read { offset: (1 << 20) - 512, buffer });
    assert_eq!(done(&mut queue).1.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
}

#[test]
fn what_is_written_of_a_block_leaves_the_rest_of_it() {
    for unit in [4096_usize, 2048, 1024] {
        let queue = &mut in_units(unit as u32, 1)[0];
        let mut expected = vec![7_u8; 1 << 20];
        queue.file.write_all_at(&expected, 0).unwrap();
        let sectors = [(0, 1), (1, 1), (7, 1), (7, 2), (1, 7), (3, 40), (8, 13), (5, 11), (16, 8), (9, 512)];
        for (n, (sector, count)) in sectors.into_iter().enumerate() {
            let (at, len, byte) = (100 * 512 * n + sector * 512, count * 512, 10 + n as u8);
            begin_write(queue, 1, at as u64, len, byte);
            assert!(done(queue).1.is_ok());
            expected[at..at + len].fill(byte);
            let mut found = vec![0; 1 << 20];
            queue.file.read_exact_at(&mut found, 0).unwrap();
            assert!(found == expected, "{count} sectors at {sector} in units of {unit}");

            let buffer = queue.alloc(at as u64, len).unwrap();
            queue.submit(2, Op::Read { offset: at as u64, buffer });
            wait(queue, Wait::Event);
            let Some(Done { buffer: Some(mut buffer), result: Ok(()), .. }) = queue.next_done() else {
                panic!("it was read");
            };
            assert!(queue.bytes(&mut buffer).iter().all(|&b| b == byte), "{count} sectors at {sector}");
            queue.free(buffer);
        }
    }
}

#[test]
fn queues_that_write_parts_of_one_block_lose_nothing_of_one_another() {
    let mut queues = in_units(4096, 2);
    let [one, other] = &mut queues[..] else { unreachable!() };
    // Each meets the one before in a block that one of the two has a part of.
    begin_write(one, 1, 0, 512, 1);
    begin_write(other, 2, 512, 512, 2);
    begin_write(one, 3, 1024, 512, 3);
    begin_write(other, 4, 0, 3584, 4);
    other.submit(5, Op::Zero { offset: 0, len: 8192, keep_space: false });
    begin_write(one, 6, 3584, 512, 6);
    assert!(other.next_done().is_none());
    let (mut tags, mut ended) = (Vec::new(), Vec::new());
    while ended.len() < 6 {
        for queue in [&mut *one, &mut *other] {
            wait(queue, Wait::Until(std::time::Duration::from_millis(1)));
            while let Some(Done { tag, buffer, result }) = queue.next_done() {
                buffer.into_iter().for_each(|b| queue.free(b));
                result.unwrap();
                ended.push(tag);
            }
        }
        let mut block = [0; 4096];
        one.file.read_exact_at(&mut block, 0).unwrap();
        tags.push(block.chunks(512).map(|sector| sector[0]).collect::<Vec<u8>>());
    }
    // In the order in which they were submitted.
    assert_eq!(ended, [1, 2, 3, 4, 5, 6]);
    let last = [0, 0, 0, 0, 0, 0, 0, 6];
    assert_eq!(tags.last().unwrap(), &last, "{tags:?}");
}

#[test]
fn a_queue_that_ends_lets_the_others_have_their_turn() {
    let mut queues = in_units(4096, 3);
    begin_write(&mut queues[0], 1, 0, 512, 1);
    begin_write(&mut queues[1], 2, 512, 512, 2);
    begin_write(&mut queues[2], 3, 1024, 512, 3);
    // One in the middle of its turn, and one before it.
    queues.remove(0);
    queues.remove(0);
    assert!(done(&mut queues[0]).1.is_ok());
    let mut block = [0; 4096];
    queues[0].file.read_exact_at(&mut block, 0).unwrap();
    assert!(block[1024..1536] == [3; 512]);
    assert_eq!(block[512..1024], [0; 512], "it was never begun");
}

#[test]
fn a_write_whose_block_cannot_be_read_is_not_begun() {
    let queue = &mut in_units(4096, 1)[0];
    queue.file.write_all_at(&[7; 4096], 0).unwrap();
    begin_write(queue, 1, 512, 512, 9);
    pretend(queue, -libc::EIO);
    let error = done(queue).1.unwrap_err();
    assert!(error.get_ref().unwrap().is::<NotBegun>(), "{error}");
    let mut block = [0; 4096];
    queue.file.read_exact_at(&mut block, 0).unwrap();
    assert_eq!(block, [7; 4096]);
    // The turn is the next one's.
    begin_write(queue, 2, 512, 512, 9);
    assert!(done(queue).1.is_ok());
}
