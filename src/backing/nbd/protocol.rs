//! Numbers of the NBD protocol (doc/proto.md of the NBD project), as far as they are used here.
#![forbid(unsafe_code)]

pub(crate) const GREETING: u64 = u64::from_be_bytes(*b"NBDMAGIC");
pub(crate) const OPTION: u64 = u64::from_be_bytes(*b"IHAVEOPT");
pub(crate) const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;

/// Flags of the greeting, and of the answer to it.
pub(crate) const FIXED_NEWSTYLE: u16 = 1;
pub(crate) const NO_ZEROES: u16 = 2;

pub(crate) const OPT_GO: u32 = 7;
pub(crate) const OPT_STRUCTURED_REPLY: u32 = 8;
pub(crate) const OPT_SET_META_CONTEXT: u32 = 10;

pub(crate) const REP_ACK: u32 = 1;
pub(crate) const REP_INFO: u32 = 3;
pub(crate) const REP_META_CONTEXT: u32 = 4;
/// Set in every reply that refuses.
pub(crate) const REP_ERROR: u32 = 1 << 31;
pub(crate) const REP_ERR_POLICY: u32 = REP_ERROR | 2;
pub(crate) const REP_ERR_TLS_REQD: u32 = REP_ERROR | 5;
pub(crate) const REP_ERR_UNKNOWN: u32 = REP_ERROR | 6;

pub(crate) const INFO_EXPORT: u16 = 0;
pub(crate) const INFO_BLOCK_SIZE: u16 = 3;

/// Flags of an export.
pub(crate) const HAS_FLAGS: u16 = 1;
pub(crate) const READ_ONLY: u16 = 2;
pub(crate) const SEND_FLUSH: u16 = 4;
pub(crate) const SEND_FUA: u16 = 8;
pub(crate) const SEND_WRITE_ZEROES: u16 = 64;

pub(crate) const REQUEST: u32 = 0x2560_9513;
pub(crate) const SIMPLE_REPLY: u32 = 0x6744_6698;
pub(crate) const STRUCTURED_REPLY: u32 = 0x668e_33ef;

pub(crate) const CMD_READ: u16 = 0;
pub(crate) const CMD_WRITE: u16 = 1;
pub(crate) const CMD_DISC: u16 = 2;
pub(crate) const CMD_FLUSH: u16 = 3;
pub(crate) const CMD_WRITE_ZEROES: u16 = 6;
pub(crate) const CMD_BLOCK_STATUS: u16 = 7;

pub(crate) const FLAG_FUA: u16 = 1;
pub(crate) const FLAG_NO_HOLE: u16 = 2;

/// The last chunk of a structured reply.
pub(crate) const CHUNK_DONE: u16 = 1;
pub(crate) const CHUNK_NONE: u16 = 0;
pub(crate) const CHUNK_OFFSET_DATA: u16 = 1;
pub(crate) const CHUNK_OFFSET_HOLE: u16 = 2;
pub(crate) const CHUNK_BLOCK_STATUS: u16 = 5;
/// Set in every chunk that tells of an error.
pub(crate) const CHUNK_ERROR: u16 = 1 << 15;

/// The context of block status that tells of zeros, and its flag for them.
pub(crate) const ALLOCATION: &str = "base:allocation";
pub(crate) const STATE_ZERO: u32 = 2;

/// Of a [`CMD_DISC`] to the server of an RBD image: another process has its tenure from now on.
pub(crate) const FLAG_LEND: u16 = 1 << 15;

/// The number by which the map of an RBD image is known.
pub(crate) const IMAGE_MAP: u32 = 1;

/// Errors that mean something of their own here.
pub(crate) const ENOSPC: u32 = 28;
pub(crate) const ESHUTDOWN: u32 = 108;
/// Of `helper::rbd` alone: Ceph has not answered in time.
pub(crate) const ETIMEDOUT: u32 = 110;
pub(crate) const EIO: u32 = 5;
pub(crate) const EPERM: u32 = 1;
pub(crate) const EINVAL: u32 = 22;

/// Bytes of a request's head.
pub(crate) const REQUEST_LEN: usize = 28;

/// The head of a request.
pub(crate) fn request(flags: u16, kind: u16, cookie: u64, offset: u64, len: u32) -> [u8; REQUEST_LEN] {
    let mut head = [0; REQUEST_LEN];
    head[..4].copy_from_slice(&REQUEST.to_be_bytes());
    head[4..6].copy_from_slice(&flags.to_be_bytes());
    head[6..8].copy_from_slice(&kind.to_be_bytes());
    head[8..16].copy_from_slice(&cookie.to_be_bytes());
    head[16..24].copy_from_slice(&offset.to_be_bytes());
    head[24..].copy_from_slice(&len.to_be_bytes());
    head
}
