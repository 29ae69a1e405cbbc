//! Layers behind NBD servers: what the kernel would be asked for goes to the layer's [`Export`], with a copy
//! of the bytes, and what comes back is copied into the buffer.
#![forbid(unsafe_code)]

use super::work::{Move, PUNCH, Way, Work};
use super::{FileQueue, Pending};
use crate::backing::nbd::{Ask, Export, Given, Inbox};
use crate::reactor::{Reactor, Token, Uring, Watched};
use std::io;
use std::rc::Rc;
use std::sync::Arc;

/// The exports of a queue's layers.
pub(super) struct Remote {
    /// The top's, and those of the layers below it.
    exports: Vec<Option<Arc<Export>>>,
    inbox: Arc<Inbox>,
    /// Wakes the thread when an export has answered.
    answered: Watched,
}

impl Remote {
    /// None where no layer lies on an export.
    pub(super) fn new(uring: &Rc<Uring>, exports: Vec<Option<Arc<Export>>>) -> io::Result<Option<Self>> {
        if exports.iter().all(Option::is_none) {
            return Ok(None);
        }
        let inbox = Arc::new(Inbox::new()?);
        let reactor: Rc<dyn Reactor> = uring.clone();
        let answered = Watched::new(&reactor, inbox.wake_fd());
        Ok(Some(Remote { exports, inbox, answered }))
    }

    pub(super) fn is_woken_by(&self, token: Token) -> bool {
        *self.answered == token
    }

    fn export(&self, layer: u32) -> Option<&Export> {
        self.exports.get(layer as usize)?.as_deref()
    }
}

impl FileQueue {
    /// Has the export of a layer do it, if that lies on one, from `start` on. Returns whether it does.
    pub(super) fn asks_export(&mut self, slot: u32, pending: &mut Pending, start: u64) -> bool {
        let Some(remote) = &self.remote else { return false };
        let Some(export) = remote.export(pending.work.file()) else { return false };
        let ask = match (pending.work, &mut pending.buffer) {
            (Work::Sync, _) => Ask::Flush,
            (Work::Zero { offset, len, mode }, _) => {
                Ask::Zero { offset: start + offset, len, keep_space: mode != PUNCH }
            }
            (Work::Move(Move { way: Way::Write { flags }, offset, span, .. }), Some(buffer)) => {
                let bytes = self.pool.part(buffer, span).to_vec();
                Ask::Write { offset: start + offset, bytes, durable: flags != 0 }
            }
            (Work::Move(Move { offset, span, .. }), _) => Ask::Read { offset: start + offset, len: span.len },
        };
        export.ask(ask, &remote.inbox, slot);
        true
    }

    /// Takes what exports have answered.
    pub(super) fn take_answers(&mut self) {
        let Some(remote) = &self.remote else { return };
        for (slot, outcome) in remote.inbox.clone().take() {
            let result = self.deliver(slot, outcome);
            self.complete(slot, result.unwrap_or_else(|e| -e.raw_os_error().unwrap_or(libc::EIO)));
        }
    }

    /// Brings what was read into its buffer. Returns the number that the kernel would have given.
    fn deliver(&mut self, slot: u32, outcome: io::Result<Given>) -> io::Result<i32> {
        let given = outcome?;
        let Some(Pending { work: Work::Move(moving), buffer: Some(buffer), .. }) =
            self.pending.get_mut(slot as usize).and_then(Option::as_mut)
        else {
            return Ok(0);
        };
        if let Given::Bytes(bytes) = given {
            self.pool.part(buffer, moving.span).copy_from_slice(&bytes);
        }
        Ok(moving.span.len as i32)
    }
}
