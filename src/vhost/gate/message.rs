//! vhost-user messages on a socket, whole, with their descriptors.
//!
//! Source: the vhost-user protocol, "Message Specification" (QEMU documentation). A message is a
//! header of three little-endian words (request, flags, size), a body of `size` bytes, and descriptors
//! that travel with the header.

use nix::sys::resource::{Resource, getrlimit};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

/// Protocol version in the flags' low bits.
pub(super) const VERSION: u32 = 1;
/// The flags' reply bit.
pub(super) const REPLY: u32 = 1 << 2;
/// The flags' bit by which the sender asks for an answer even to a message that has none.
pub(super) const NEED_REPLY: u32 = 1 << 3;
/// Bytes in the header.
pub(super) const HEADER: usize = 12;
/// The largest body of any message that we take.
pub(super) const MAX_BODY: usize = 4096 - HEADER;
/// The most descriptors of one message.
pub(super) const MAX_FDS: usize = 32;
/// The most that the kernel passes at once. There is room for all of them: a truncated control message would
/// leave descriptors open that nobody knows.
const KERNEL_MAX_FDS: usize = 253;
/// Room for them in a control message, with its header, in words of 8 bytes.
const CONTROL_WORDS: usize =
    size_of::<libc::cmsghdr>() / 8 + (KERNEL_MAX_FDS * size_of::<RawFd>()).div_ceil(8);

/// One message.
#[derive(Debug)]
pub(super) struct Message {
    /// What it asks for.
    pub request: u32,
    /// Version, reply and need-reply bits.
    pub flags: u32,
    /// The body.
    pub body: Vec<u8>,
    /// The descriptors that came with it; closed when it is dropped.
    pub fds: Vec<OwnedFd>,
}

impl Message {
    /// A request that wants an answer.
    pub(super) fn request(request: u32, body: Vec<u8>) -> Self {
        Message { request, flags: VERSION | NEED_REPLY, body, fds: Vec::new() }
    }

    /// The answer to a message with `request`.
    pub(super) fn reply(request: u32, body: Vec<u8>) -> Self {
        Message { request, flags: VERSION | REPLY, body, fds: Vec::new() }
    }

    /// The answer to a message with `request`: one 64-bit number.
    pub(super) fn reply_u64(request: u32, value: u64) -> Self {
        Self::reply(request, value.to_ne_bytes().to_vec())
    }

    /// Whether the sender asks for an answer in any case.
    pub(super) fn needs_reply(&self) -> bool {
        self.flags & NEED_REPLY != 0
    }

    /// This message with the need-reply bit set.
    pub(super) fn with_need_reply(mut self) -> Self {
        self.flags |= NEED_REPLY;
        self
    }

    /// The 64-bit number at byte `at` of the body. Messages are in the byte order of the machine.
    pub(super) fn u64_at(&self, at: usize) -> Option<u64> {
        Some(u64::from_ne_bytes(self.body.get(at..at + 8)?.try_into().ok()?))
    }

    /// The 32-bit number at byte `at` of the body.
    pub(super) fn u32_at(&self, at: usize) -> Option<u32> {
        Some(u32::from_ne_bytes(self.body.get(at..at + 4)?.try_into().ok()?))
    }

    /// Reads the next message; `None` if the peer closed between two messages.
    pub(super) fn receive(socket: &UnixStream) -> io::Result<Option<Self>> {
        let mut fds = Vec::new();
        let mut header = [0; HEADER];
        if !receive_exact(socket, &mut header, &mut fds, true)? {
            return Ok(None);
        }
        let [request, flags, size] = [0, 4, 8].map(|at| word_at(&header, at));
        let size = size as usize;
        if flags & 0x3 != VERSION || flags & !(0x3 | REPLY | NEED_REPLY) != 0 {
            return Err(invalid(format!("message {request}: flags {flags:#x}")));
        }
        if size > MAX_BODY {
            return Err(invalid(format!("message {request}: {size} bytes")));
        }
        let mut body = vec![0; size];
        receive_exact(socket, &mut body, &mut fds, false)?;
        Ok(Some(Message { request, flags, body, fds }))
    }

    /// Writes the message in one piece.
    pub(super) fn send(&self, socket: &UnixStream) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(HEADER + self.body.len());
        for word in [self.request, self.flags, self.body.len() as u32] {
            bytes.extend_from_slice(&word.to_ne_bytes());
        }
        bytes.extend_from_slice(&self.body);
        let fds: Vec<RawFd> = self.fds.iter().map(AsRawFd::as_raw_fd).collect();
        let mut control = vec![ControlMessage::ScmRights(&fds)];
        control.truncate(usize::from(!fds.is_empty()));
        let mut sent = 0;
        while sent < bytes.len() {
            let data = [IoSlice::new(&bytes[sent..])];
            match sendmsg::<()>(socket.as_raw_fd(), &data, &control, MsgFlags::MSG_NOSIGNAL, None) {
                Ok(n) => {
                    sent += n;
                    // Descriptors travel with the first byte.
                    control.clear();
                }
                Err(nix::Error::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Whether it is the answer to `request`.
    pub(super) fn answers(&self, request: u32) -> bool {
        self.request == request && self.flags & REPLY != 0
    }

    /// Whether it claims to be an answer.
    pub(super) fn is_reply(&self) -> bool {
        self.flags & REPLY != 0
    }
}

/// Fills `buffer`, collecting descriptors. Returns `false` if the peer closed before the first
/// byte and that is allowed.
fn receive_exact(
    socket: &UnixStream,
    buffer: &mut [u8],
    fds: &mut Vec<OwnedFd>,
    may_end: bool,
) -> io::Result<bool> {
    let mut filled = 0;
    while filled < buffer.len() {
        let (count, truncated) = match receive_some(socket, &mut buffer[filled..], fds) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            received => received?,
        };
        if truncated {
            return Err(no_room());
        }
        if fds.len() > MAX_FDS {
            return Err(invalid("more descriptors than any message has".into()));
        }
        match count {
            0 if filled == 0 && may_end => return Ok(false),
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => filled += n,
        }
    }
    Ok(true)
}

/// Reads what there is, and takes over all descriptors that the kernel made for us: at the limit of open
/// files it makes a part of them, and says that the rest is cut off. Returns the number of bytes, and
/// whether descriptors were lost.
fn receive_some(socket: &UnixStream, buffer: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<(usize, bool)> {
    let mut space = [0u64; CONTROL_WORDS];
    let mut data = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: all zeros are a valid value of this structure of numbers and pointers.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut data;
    header.msg_iovlen = 1;
    header.msg_control = space.as_mut_ptr().cast();
    header.msg_controllen = size_of_val(&space);
    // SAFETY: the header leads to `buffer` and `space`, with their lengths; both live longer than the call.
    let count = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_CMSG_CLOEXEC) };
    let Ok(count) = usize::try_from(count) else { return Err(io::Error::last_os_error()) };
    // SAFETY: the kernel filled in the header and what it leads to; the macros stay inside `msg_controllen`
    // bytes of `space`, which is aligned for control messages. The descriptors in them were just made for
    // us; nobody else knows them.
    unsafe {
        let mut control = libc::CMSG_FIRSTHDR(&raw const header);
        while let Some(found) = control.as_ref() {
            if (found.cmsg_level, found.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
                let bytes = found.cmsg_len - libc::CMSG_LEN(0) as usize;
                let first = libc::CMSG_DATA(control).cast::<RawFd>();
                let new = (0..bytes / size_of::<RawFd>()).map(|i| first.add(i).read_unaligned());
                fds.extend(new.map(|fd| OwnedFd::from_raw_fd(fd)));
            }
            control = libc::CMSG_NXTHDR(&raw const header, control);
        }
    }
    Ok((count, header.msg_flags & libc::MSG_CTRUNC != 0))
}

/// The 32-bit number at byte `at` of a header.
pub(super) fn word_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// The error for descriptors that this process has no room for.
pub(super) fn no_room() -> io::Error {
    let limit =
        getrlimit(Resource::RLIMIT_NOFILE).map_or_else(|_| String::new(), |(soft, _)| format!(" {soft}"));
    invalid(format!(
        "this process has no room for more descriptors: its limit is{limit} (\"ulimit -n\", LimitNOFILE= in \
         a systemd unit); with fewer --queues it needs fewer"
    ))
}

/// An error about what the peer sent.
pub(super) fn invalid(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::resource::setrlimit;
    use std::fs::File;
    use std::io::Write;
    use vmm_sys_util::sock_ctrl_msg::ScmSocket;

    fn bytes(request: u32, flags: u32, body: &[u8]) -> Vec<u8> {
        let header = [request, flags, body.len() as u32].map(u32::to_ne_bytes);
        [header.as_flattened(), body].concat()
    }

    /// What is received when `sent` is all that the peer sends.
    fn receive(sent: &[u8]) -> io::Result<Option<Message>> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(sent).unwrap();
        drop(theirs);
        Message::receive(&ours)
    }

    /// How many of this process's descriptors are open on the file `of`.
    fn open_on(of: &File) -> usize {
        use std::os::unix::fs::MetadataExt;
        let id = |m: std::fs::Metadata| (m.dev(), m.ino());
        let mine = id(of.metadata().unwrap());
        let all = std::fs::read_dir("/proc/self/fd").unwrap();
        all.filter(|fd| std::fs::metadata(fd.as_ref().unwrap().path()).is_ok_and(|m| id(m) == mine)).count()
    }

    #[test]
    fn a_message_arrives_as_it_was_sent() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        let mut sent = Message::request(5, vec![7; MAX_BODY]);
        sent.fds = (0..MAX_FDS).map(|_| file.try_clone().unwrap().into()).collect();
        sent.send(&theirs).unwrap();
        let got = Message::receive(&ours).unwrap().unwrap();
        assert_eq!((got.request, got.needs_reply(), got.is_reply()), (5, true, false));
        assert_eq!((got.body, got.fds.len()), (sent.body, MAX_FDS));
    }

    #[test]
    fn a_connection_ends_between_messages_only() {
        assert!(receive(&[]).unwrap().is_none());
        let whole = bytes(1, VERSION, &[1, 2, 3]);
        for len in 1..whole.len() {
            assert_eq!(receive(&whole[..len]).unwrap_err().kind(), io::ErrorKind::UnexpectedEof, "{len}");
        }
        assert_eq!(receive(&whole).unwrap().unwrap().body, [1, 2, 3]);
    }

    #[test]
    fn headers_that_no_message_has_are_refused() {
        for flags in [0, 2, 3, VERSION | 0x10, VERSION | 1 << 31, u32::MAX] {
            assert_eq!(receive(&bytes(1, flags, &[])).unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
        for size in [MAX_BODY as u32 + 1, 1 << 31, u32::MAX] {
            let header = [1, VERSION, size].map(u32::to_ne_bytes);
            assert_eq!(receive(header.as_flattened()).unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
    }

    #[test]
    fn descriptors_that_are_too_many_are_closed() {
        for count in [33, 64, 253] {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let file = tempfile::tempfile().unwrap();
            theirs.send_with_fds(&[&bytes(1, VERSION, &[])[..]], &vec![file.as_raw_fd(); count]).unwrap();
            assert!(Message::receive(&ours).is_err());
            assert_eq!(open_on(&file), 1, "of {count} descriptors");
        }
    }

    #[test]
    fn descriptors_beyond_the_limit_of_open_files_are_no_leak() {
        // The limit is the process's, whose other tests must not meet it: a child of its own does this.
        const CHILD: &str = "SEALBLK_TEST_FEW_FILES";
        if std::env::var_os(CHILD).is_none() {
            let name = "vhost::gate::message::tests::descriptors_beyond_the_limit_of_open_files_are_no_leak";
            let mut test = std::process::Command::new(std::env::current_exe().unwrap());
            let done = test.args(["--exact", name, "--nocapture"]).env(CHILD, "1").output().unwrap();
            assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
            return;
        }
        let (ours, theirs) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        // Up to this number all are taken.
        let spare: Vec<File> = (0..64).map(|_| file.try_clone().unwrap()).collect();
        let taken = spare.iter().map(AsRawFd::as_raw_fd).max().unwrap() as u64 + 1;
        let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        for room in [0, 1, 7] {
            theirs.send_with_fds(&[&bytes(1, VERSION, &[])[..]], &[file.as_raw_fd(); 8]).unwrap();
            let set = |n| setrlimit(Resource::RLIMIT_NOFILE, n, most);
            set(taken + room).unwrap();
            let received = Message::receive(&ours);
            set(most).unwrap();
            assert_eq!(received.unwrap_err().kind(), io::ErrorKind::InvalidData, "room for {room}");
            assert_eq!(open_on(&file), 65, "room for {room}");
        }
    }

    #[test]
    fn descriptors_that_come_a_few_at_a_time_are_counted_together() {
        for (each, good) in [(8, true), (9, false)] {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let file = tempfile::tempfile().unwrap();
            // Four pieces of a header.
            for piece in bytes(1, VERSION, &[]).chunks(3) {
                theirs.send_with_fds(&[piece], &vec![file.as_raw_fd(); each]).unwrap();
            }
            let received = Message::receive(&ours);
            assert_eq!(received.as_ref().is_ok_and(|m| m.is_some()), good, "four times {each}");
            drop((received, ours, theirs));
            assert_eq!(open_on(&file), 1);
        }
    }
}
