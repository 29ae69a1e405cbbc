//! Feature bits that the device offers.

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// The virtio feature bits of a disk. A read-only disk offers neither DISCARD nor WRITE_ZEROES.
///
/// SIZE_MAX is not offered: a request of any size is served in pieces from a bounded pool, and a limit would
/// only make drivers split what could stay whole.
pub fn offered(read_only: bool) -> u64 {
    let mut bits = bit(VIRTIO_F_VERSION_1)
        | bit(VIRTIO_RING_F_EVENT_IDX)
        | bit(VIRTIO_RING_F_INDIRECT_DESC)
        | bit(VIRTIO_BLK_F_SEG_MAX)
        | bit(VIRTIO_BLK_F_BLK_SIZE)
        | bit(VIRTIO_BLK_F_TOPOLOGY)
        | bit(VIRTIO_BLK_F_FLUSH)
        | bit(VIRTIO_BLK_F_CONFIG_WCE)
        | bit(VIRTIO_BLK_F_MQ);
    if read_only {
        bits |= bit(VIRTIO_BLK_F_RO);
    } else {
        bits |= bit(VIRTIO_BLK_F_DISCARD) | bit(VIRTIO_BLK_F_WRITE_ZEROES);
    }
    bits
}

/// Whether the driver that acknowledged `acked` expects a write to be durable when it completes
/// (virtio 1.3, 5.2.6.2), given the `writeback` byte of the configuration space.
pub fn write_through(acked: u64, writeback: bool) -> bool {
    let has = |feature: u32| acked & bit(feature) != 0;
    if has(VIRTIO_BLK_F_CONFIG_WCE) { !writeback } else { !has(VIRTIO_BLK_F_FLUSH) }
}

/// Whether the driver acknowledged EVENT_IDX.
pub fn event_idx(acked: u64) -> bool {
    acked & bit(VIRTIO_RING_F_EVENT_IDX) != 0
}

fn bit(feature: u32) -> u64 {
    1 << feature
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_without_flush_gets_durable_writes() {
        assert!(write_through(0, true));
        assert!(!write_through(bit(VIRTIO_BLK_F_FLUSH), true));
        assert!(write_through(bit(VIRTIO_BLK_F_FLUSH) | bit(VIRTIO_BLK_F_CONFIG_WCE), false));
        assert!(!write_through(bit(VIRTIO_BLK_F_FLUSH) | bit(VIRTIO_BLK_F_CONFIG_WCE), true));
    }

    #[test]
    fn a_read_only_disk_offers_nothing_that_writes() {
        assert_eq!(offered(true) & (bit(VIRTIO_BLK_F_DISCARD) | bit(VIRTIO_BLK_F_WRITE_ZEROES)), 0);
        assert_ne!(offered(true) & bit(VIRTIO_BLK_F_RO), 0);
        assert_eq!(offered(false) & bit(VIRTIO_BLK_F_RO), 0);
    }
}
