//! The configuration space, read and written at any place.

use super::input::Input;
use sealblk::virtio::Shape;
use sealblk::virtio::config_space::{ConfigSpace, SIZE, WRITEBACK_OFFSET, writeback_written};

/// A disk of any size, one read and one write.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let block_size = if input.coin() { 4096 } else { 512 };
    let shape = Shape { sectors: input.u64(), block_size, read_only: input.coin() };
    let space = ConfigSpace { shape, queues: input.u16(), seg_max: input.u32() };
    let writeback = input.coin();
    let whole = space.bytes(writeback);
    assert_eq!(whole[..8], shape.sectors.to_le_bytes());
    assert_eq!(whole[20..24], block_size.to_le_bytes());
    assert_eq!(whole[WRITEBACK_OFFSET], u8::from(writeback));

    let (offset, size) = (input.u32(), input.u32());
    let end = u64::from(offset) + u64::from(size);
    match space.read(offset, size, writeback) {
        Some(bytes) => assert_eq!(bytes, whole[offset as usize..end as usize]),
        None => assert!(end > SIZE as u64),
    }

    let written = input.rest();
    let covered = (u64::from(offset)..u64::from(offset) + written.len() as u64).contains(&32);
    match writeback_written(offset, written) {
        Some(on) => assert!(covered && on == (written[WRITEBACK_OFFSET - offset as usize] != 0)),
        None => assert!(!covered),
    }
}
