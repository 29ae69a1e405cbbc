//! The event descriptors of a ring: kick, call and err.

use crate::vhost::gate::Result;
use crate::vhost::gate::message::{Message, invalid};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::{SFlag, fstat};

/// Kick, call and err: one descriptor, or none and the flag that says so. It must be an event descriptor and
/// never block: a full counter must not stop a queue.
pub(super) fn check_event(message: &Message) -> Result<()> {
    const NO_FD: u64 = 1 << 8;
    let word = message.u64_at(0).unwrap_or(u64::MAX);
    if word & !0x1ff != 0 {
        return Err(invalid(format!("flags {word:#x}")));
    }
    match (&message.fds[..], word & NO_FD != 0) {
        ([], true) => Ok(()),
        ([fd], false) => {
            // Event descriptors have no file type; files, pipes, sockets and devices do.
            if SFlag::from_bits_truncate(fstat(fd)?.st_mode) & SFlag::S_IFMT != SFlag::empty() {
                return Err(invalid("not an event descriptor".into()));
            }
            let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
            if !flags.contains(OFlag::O_RDWR) {
                return Err(invalid("an event descriptor that cannot be read and written".into()));
            }
            fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
            Ok(())
        }
        (fds, _) => Err(invalid(format!("{} descriptors for flags {word:#x}", fds.len()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::eventfd::{EfdFlags, EventFd};
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;
    use vhost::vhost_user::message::FrontendReq as Req;

    const NO_FD: u64 = 1 << 8;

    fn event() -> OwnedFd {
        EventFd::from_flags(EfdFlags::empty()).unwrap().into()
    }

    fn with_fds(word: u64, fds: Vec<OwnedFd>) -> Message {
        Message { fds, ..Message::request(Req::SET_VRING_CALL as u32, word.to_ne_bytes().to_vec()) }
    }

    #[test]
    fn what_is_signalled_never_blocks() {
        let message = with_fds(0, vec![event()]);
        check_event(&message).unwrap();
        let flags = fcntl(&message.fds[0], FcntlArg::F_GETFL).unwrap();
        assert!(OFlag::from_bits_retain(flags).contains(OFlag::O_NONBLOCK));
    }

    #[test]
    fn there_is_a_descriptor_or_the_flag_that_says_there_is_none() {
        assert!(check_event(&with_fds(NO_FD | 1, vec![])).is_ok());
        assert!(check_event(&with_fds(NO_FD, vec![event()])).is_err());
        assert!(check_event(&with_fds(0, vec![])).is_err());
        assert!(check_event(&with_fds(0, vec![event(), event()])).is_err());
        for flags in [1 << 9, 1 << 32, 1 << 63] {
            assert!(check_event(&with_fds(flags, vec![event()])).is_err(), "{flags:#x}");
        }
    }

    #[test]
    fn what_is_no_event_descriptor_is_refused() {
        let (reader, writer) = std::io::pipe().unwrap();
        let (one, _other) = UnixStream::pair().unwrap();
        let odd: [OwnedFd; 4] =
            [reader.into(), writer.into(), one.into(), std::fs::File::open("/dev/null").unwrap().into()];
        for fd in odd {
            assert!(check_event(&with_fds(0, vec![fd])).is_err());
        }
    }
}
