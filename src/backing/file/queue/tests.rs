//! What the kernel does now and then.

use super::*;

fn queue() -> FileQueue {
    let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    file.set_len(1 << 20).unwrap();
    let layer = Reached { file: Arc::new(file), inline: false, memory: None };
    FileQueue::new(layer, vec![], 4).unwrap()
}

fn done(queue: &mut FileQueue) -> (u64, io::Result<()>) {
    loop {
        match queue.next_event() {
            Some(Event::Done { tag, buffer, result }) => {
                buffer.into_iter().for_each(|b| queue.free(b));
                return (tag, result);
            }
            Some(_) => {}
            None => queue.wait(Wait::Event).unwrap(),
        }
    }
}

/// Has the kernel do what was submitted, and puts `result` in place of what came of it.
fn pretend(queue: &mut FileQueue, result: i32) {
    queue.enter(Wait::Event).unwrap();
    let entry = queue.ring.completion().next().expect("it was waited for");
    queue.complete(entry.user_data() as u32, result);
}

#[test]
fn what_the_kernel_did_not_begin_with_is_submitted_again() {
    let mut queue = queue();
    let mut buffer = queue.alloc(4096).unwrap();
    queue.bytes(&mut buffer).fill(7);
    queue.submit(1, Op::Write { offset: 8192, buffer, durable: false });
    for again in [libc::EAGAIN, libc::EINTR, libc::EAGAIN] {
        pretend(&mut queue, -again);
        assert!(queue.next_event().is_none(), "it is not over");
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
    assert!(queue.next_event().is_none(), "it is not over");
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
