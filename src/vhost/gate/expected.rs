//! What we expect each request that we offer to look like: sizes, descriptors, queue numbers, and
//! the features that it needs.

use crate::vhost::gate::message::{MAX_BODY, MAX_FDS, Message, invalid};
use crate::vhost::gate::{Limits, Result};
use std::ops::RangeInclusive;
use vhost::vhost_user::message::{FrontendReq as Req, VhostUserProtocolFeatures as Protocol};

/// What a request must look like.
pub(super) struct Expected {
    /// Bytes of its body.
    body: RangeInclusive<usize>,
    /// Most descriptors.
    fds: usize,
    /// Whether it begins with a queue's number.
    queue: bool,
    /// Protocol features that must have been acknowledged.
    needs: Protocol,
}

impl Expected {
    /// What `request` must look like, if we offer it.
    pub(super) fn of(request: Req) -> Option<Self> {
        let like = |body, fds, queue, needs| Some(Expected { body, fds, queue, needs });
        let none = Protocol::empty();
        match request {
            Req::GET_FEATURES | Req::SET_OWNER | Req::RESET_OWNER | Req::GET_PROTOCOL_FEATURES => {
                like(0..=0, 0, false, none)
            }
            Req::SET_FEATURES | Req::SET_PROTOCOL_FEATURES => like(8..=8, 0, false, none),
            Req::GET_QUEUE_NUM => like(0..=0, 0, false, Protocol::MQ),
            Req::SET_MEM_TABLE => like(8..=MAX_BODY, MAX_FDS, false, none),
            Req::GET_MAX_MEM_SLOTS => like(0..=0, 0, false, Protocol::CONFIGURE_MEM_SLOTS),
            Req::ADD_MEM_REG | Req::REM_MEM_REG => like(40..=40, 1, false, Protocol::CONFIGURE_MEM_SLOTS),
            Req::SET_VRING_NUM | Req::SET_VRING_BASE | Req::GET_VRING_BASE | Req::SET_VRING_ENABLE => {
                like(8..=8, 0, true, none)
            }
            Req::SET_VRING_ADDR => like(40..=40, 0, true, none),
            Req::SET_VRING_KICK | Req::SET_VRING_CALL | Req::SET_VRING_ERR => like(8..=8, 1, true, none),
            Req::GET_CONFIG | Req::SET_CONFIG => like(12..=12 + 256, 0, false, Protocol::CONFIG),
            Req::RESET_DEVICE => like(0..=0, 0, false, Protocol::RESET_DEVICE),
            Req::GET_INFLIGHT_FD => like(20..=24, 0, false, Protocol::INFLIGHT_SHMFD),
            Req::SET_INFLIGHT_FD => like(20..=24, 1, false, Protocol::INFLIGHT_SHMFD),
            Req::SET_LOG_BASE => like(16..=16, 1, false, Protocol::LOG_SHMFD),
            Req::SET_BACKEND_REQ_FD => like(0..=0, 1, false, Protocol::BACKEND_REQ),
            Req::SET_DEVICE_STATE_FD => like(8..=8, 1, false, Protocol::DEVICE_STATE),
            Req::CHECK_DEVICE_STATE => like(0..=0, 0, false, Protocol::DEVICE_STATE),
            _ => None,
        }
    }

    /// Compares a message with what is expected, given the protocol features that were acknowledged.
    pub(super) fn check(&self, message: &Message, acked: u64, limits: &Limits) -> Result<()> {
        if self.needs.bits() & !acked != 0 {
            return Err(invalid("its protocol feature was not acknowledged".into()));
        }
        if !self.body.contains(&message.body.len()) {
            return Err(invalid(format!("a body of {} bytes", message.body.len())));
        }
        if message.fds.len() > self.fds {
            return Err(invalid(format!("{} descriptors", message.fds.len())));
        }
        if self.queue {
            // Kick, call and err carry flags above the queue's number, the others a word of their own.
            let queue =
                u64::from(message.u32_at(0).unwrap_or(u32::MAX)) & if self.fds > 0 { 0xff } else { u64::MAX };
            if queue >= limits.queues {
                return Err(invalid(format!(
                    "queue {queue}, where {} are offered (attach with more --queues, or have the VMM use \
                     fewer)",
                    limits.queues
                )));
            }
        }
        Ok(())
    }
}

/// Whether a request has an answer of its own kind, rather than a mere acknowledgement.
pub(super) fn has_answer(request: Req) -> bool {
    matches!(
        request,
        Req::GET_FEATURES
            | Req::GET_PROTOCOL_FEATURES
            | Req::GET_QUEUE_NUM
            | Req::GET_MAX_MEM_SLOTS
            | Req::GET_VRING_BASE
            | Req::GET_CONFIG
            | Req::GET_INFLIGHT_FD
            | Req::SET_LOG_BASE
            | Req::SET_DEVICE_STATE_FD
            | Req::CHECK_DEVICE_STATE
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_offered_has_no_like() {
        for request in [Req::SET_LOG_FD, Req::IOTLB_MSG, Req::POSTCOPY_ADVISE, Req::GPU_SET_SOCKET] {
            assert!(Expected::of(request).is_none(), "{request:?}");
        }
    }
}
