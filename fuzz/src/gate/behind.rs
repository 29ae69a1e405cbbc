//! The device behind the gate: it answers every message, once it has checked that it is one that the real
//! one can take without harm.

use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::sys::stat::fstat;
use sealblk::vhost::gate::Limits;
use std::io::{IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use vhost::vhost_user::message::{FrontendReq as Req, VhostUserProtocolFeatures as Protocol};

/// Virtio features: VERSION_1, EVENT_IDX, protocol features, FLUSH.
const FEATURES: u64 = 1 << 32 | 1 << 30 | 1 << 29 | 1 << 9;

/// Its end of the connection, and what it was told.
pub struct Behind {
    socket: UnixStream,
    limits: Limits,
    regions: Vec<[u64; 4]>,
}

impl Behind {
    /// Nothing was said yet.
    pub fn new(socket: UnixStream, limits: Limits) -> Self {
        Behind { socket, limits, regions: Vec::new() }
    }

    /// Answers messages until the gate closes.
    pub fn serve(mut self) {
        while let Some((header, body, fds)) = self.receive() {
            let [request, flags, size] = header;
            assert_eq!(flags, 1 | 8, "version and need-reply: every message is answered");
            assert_eq!(size as usize, body.len());
            let request = Req::try_from(request).expect("a request of the protocol");
            let answer = self.take(request, &body, &fds);
            let header = [request as u32, 1 | 4, answer.len() as u32].map(u32::to_ne_bytes);
            // The gate may have left: that it may do at any time.
            let _ = self.socket.write_all(&[header.as_flattened(), &answer].concat());
        }
    }

    /// Checks one message; answers the answer's body.
    fn take(&mut self, request: Req, body: &[u8], fds: &[OwnedFd]) -> Vec<u8> {
        let word = |at: usize| u64::from_ne_bytes(body[at..at + 8].try_into().expect("8 bytes"));
        let half = |at: usize| u32::from_ne_bytes(body[at..at + 4].try_into().expect("4 bytes"));
        let queue = |number: u64| assert!(number < self.limits.queues, "queue {number}");
        let may_have_fds = matches!(
            request,
            Req::SET_MEM_TABLE
                | Req::ADD_MEM_REG
                | Req::SET_VRING_KICK
                | Req::SET_VRING_CALL
                | Req::SET_VRING_ERR
        );
        assert!(fds.is_empty() || may_have_fds, "{request:?} with descriptors");
        let number = match request {
            Req::GET_FEATURES => FEATURES,
            Req::GET_PROTOCOL_FEATURES => protocol(),
            Req::SET_FEATURES => assert_len(body, 8, word(0) & !FEATURES),
            Req::SET_PROTOCOL_FEATURES => assert_len(body, 8, word(0) & !protocol()),
            Req::RESET_OWNER | Req::RESET_DEVICE => assert_len(body, 0, 0),
            Req::GET_QUEUE_NUM => self.limits.queues,
            Req::GET_MAX_MEM_SLOTS => 509,
            Req::SET_MEM_TABLE => {
                let count = half(0) as usize;
                assert_eq!((body.len(), fds.len()), (8 + 32 * count, count));
                self.regions.clear();
                (0..count).for_each(|i| self.add(body, 8 + 32 * i, &fds[i]));
                0
            }
            Req::ADD_MEM_REG => {
                assert_eq!((body.len(), fds.len()), (40, 1));
                self.add(body, 8, &fds[0]);
                0
            }
            Req::REM_MEM_REG => {
                assert_eq!(body.len(), 40);
                let gone = [word(8), word(16), word(24)];
                let place = self.regions.iter().position(|r| r[..3] == gone);
                self.regions.remove(place.expect("a region that is there"));
                0
            }
            Req::SET_VRING_NUM => {
                queue(half(0).into());
                assert!((1..=self.limits.queue_size).contains(&half(4)) && half(4).is_power_of_two());
                assert_len(body, 8, 0)
            }
            Req::SET_VRING_BASE => {
                queue(half(0).into());
                assert_len(body, 8, u64::from(half(4)) >> 16)
            }
            Req::GET_VRING_BASE => {
                queue(half(0).into());
                return body.to_vec();
            }
            Req::SET_VRING_ENABLE | Req::SET_VRING_ADDR => {
                queue(half(0).into());
                0
            }
            Req::SET_VRING_KICK | Req::SET_VRING_CALL | Req::SET_VRING_ERR => {
                queue(word(0) & 0xff);
                assert_eq!(fds.len(), usize::from(word(0) & 0x100 == 0));
                fds.iter().for_each(check_event);
                assert_len(body, 8, word(0) >> 9)
            }
            Req::GET_CONFIG => return body.to_vec(),
            Req::SET_CONFIG => 0,
            other => panic!("{other:?} was not offered"),
        };
        number.to_ne_bytes().to_vec()
    }

    /// Checks a region against its file and the others.
    fn add(&mut self, body: &[u8], at: usize, file: &OwnedFd) {
        let new: [u64; 4] = std::array::from_fn(|i| {
            let at = at + 8 * i;
            u64::from_ne_bytes(body[at..at + 8].try_into().expect("8 bytes"))
        });
        let [guest, size, user, offset] = new.map(u128::from);
        assert!(size > 0 && guest + size < 1 << 63 && user + size < 1 << 63);
        let length = fstat(file).expect("a file").st_size as u128;
        assert!(offset + size <= length, "a region beyond its file");
        let seals = fcntl(file, FcntlArg::F_GET_SEALS).expect("a memory file");
        assert!(SealFlag::from_bits_retain(seals).contains(SealFlag::F_SEAL_SHRINK));
        for other in self.regions.iter().map(|r| r.map(u128::from)) {
            let apart = |a: u128, b: u128| a + size <= b || b + other[1] <= a;
            assert!(apart(guest, other[0]) && apart(user, other[2]), "regions overlap");
        }
        self.regions.push(new);
    }

    /// The next message with its descriptors, or nothing once the gate has left.
    fn receive(&mut self) -> Option<([u32; 3], Vec<u8>, Vec<OwnedFd>)> {
        let mut header = [0; 12];
        let mut fds = Vec::new();
        let mut space = nix::cmsg_space!([RawFd; 253]);
        let received = {
            let mut data = [IoSliceMut::new(&mut header)];
            let received = recvmsg::<()>(
                self.socket.as_raw_fd(),
                &mut data,
                Some(&mut space),
                MsgFlags::MSG_CMSG_CLOEXEC,
            )
            .ok()?;
            for control in received.cmsgs().expect("room for all descriptors") {
                if let ControlMessageOwned::ScmRights(new) = control {
                    // SAFETY: the kernel just made these descriptors for us; nobody else knows them.
                    fds.extend(new.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                }
            }
            received.bytes
        };
        if received == 0 {
            return None;
        }
        assert_eq!(received, header.len(), "the gate sends a message in one piece");
        let word = |i: usize| u32::from_ne_bytes(header[4 * i..4 * i + 4].try_into().expect("4 bytes"));
        let mut body = vec![0; word(2) as usize];
        self.socket.read_exact(&mut body).expect("a whole message");
        Some(([word(0), word(1), word(2)], body, fds))
    }
}

fn protocol() -> u64 {
    let features = Protocol::MQ
        | Protocol::CONFIG
        | Protocol::CONFIGURE_MEM_SLOTS
        | Protocol::RESET_DEVICE
        | Protocol::REPLY_ACK;
    features.bits()
}

/// The body has `len` bytes and nothing is wrong with it; success.
fn assert_len(body: &[u8], len: usize, wrong: u64) -> u64 {
    assert_eq!((body.len(), wrong), (len, 0));
    0
}

/// An event descriptor that cannot block whoever signals it.
fn check_event(fd: &OwnedFd) {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL).expect("a descriptor"));
    assert!(flags.contains(OFlag::O_NONBLOCK | OFlag::O_RDWR));
    assert_eq!(fstat(fd).expect("a descriptor").st_mode & 0o170000, 0, "an anonymous file");
}
