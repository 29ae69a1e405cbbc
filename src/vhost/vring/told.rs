//! What vhost-user-backend tells a ring: each change that a front-end makes of its state.

use super::{CURRENT, Memory, Vring};
use crate::base::sync::Locked;
use crate::vhost::dirty::RingLog;
use crate::vhost::queue;
use std::fs::File;
use std::io;
use std::sync::{Arc, MutexGuard};
use vhost_user_backend::{VringMutex, VringState, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::{Error, QueueT};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

impl<'a> VringStateGuard<'a, Memory> for Vring {
    type G = MutexGuard<'a, VringState<Memory>>;
}

impl<'a> VringStateMutGuard<'a, Memory> for Vring {
    type G = MutexGuard<'a, VringState<Memory>>;
}

impl VringT<Memory> for Vring {
    fn new(mem: Memory, max_queue_size: u16) -> Result<Self, Error> {
        let rings = CURRENT.with_borrow(Clone::clone).ok_or(Error::QueueNotReady)?;
        let state = VringMutex::new(mem.clone(), max_queue_size)?;
        let mut made = rings.made.locked();
        let index = made.len();
        if index >= rings.queues {
            return Err(Error::QueueNotReady);
        }
        let log = RingLog::new(rings.log.clone());
        let vring = Vring { index, rings: rings.clone(), state, mem, log, seat: Arc::default() };
        made.push(vring.clone());
        Ok(vring)
    }

    fn get_ref(&self) -> <Self as VringStateGuard<'_, Memory>>::G {
        self.state.get_ref()
    }

    fn get_mut(&self) -> <Self as VringStateMutGuard<'_, Memory>>::G {
        self.state.get_mut()
    }

    // The crate calls none of the next five by itself: they are for back-ends that use its event loop.

    fn add_used(&self, desc_index: u16, len: u32) -> Result<(), Error> {
        self.state.add_used(desc_index, len)
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        self.state.signal_used_queue()
    }

    fn enable_notification(&self) -> Result<bool, Error> {
        self.state.enable_notification()
    }

    fn disable_notification(&self) -> Result<(), Error> {
        self.state.disable_notification()
    }

    fn needs_notification(&self) -> Result<bool, Error> {
        self.state.needs_notification()
    }

    fn set_enabled(&self, enabled: bool) {
        self.state.set_enabled(enabled);
        if enabled {
            self.start_if_due();
        } else {
            self.stop_for_good();
        }
    }

    /// Migration gives running rings their addresses again, to say that they are logged: those run on. A ring
    /// that moves stops, and goes on with [`VringT::set_queue_next_used`], which the crate calls right after.
    fn set_queue_info(&self, desc_table: u64, avail_ring: u64, used_ring: u64) -> Result<(), Error> {
        if self.is_running() {
            let state = self.state.get_ref();
            let queue = state.get_queue();
            if (queue.desc_table(), queue.avail_ring(), queue.used_ring())
                == (desc_table, avail_ring, used_ring)
            {
                return Ok(());
            }
        }
        let moving = self.stop();
        self.seat.locked().moving = moving;
        self.state.set_queue_info(desc_table, avail_ring, used_ring)
    }

    fn queue_next_avail(&self) -> u16 {
        self.state.queue_next_avail()
    }

    fn set_queue_next_avail(&self, base: u16) {
        let was_running = self.stop();
        self.state.set_queue_next_avail(base);
        if was_running {
            self.start_if_due();
        }
    }

    /// `idx` is what the crate found in guest memory. A ring that runs, or was running, knows better.
    fn set_queue_next_used(&self, idx: u16) {
        let live = std::mem::take(&mut self.seat.locked().moving) || self.is_running();
        if !live {
            self.state.set_queue_next_used(idx);
        }
        self.start_if_due();
    }

    fn queue_used_idx(&self) -> Result<u16, Error> {
        self.state.queue_used_idx()
    }

    fn set_queue_size(&self, num: u16) {
        let was_running = self.stop();
        self.state.set_queue_size(num);
        if was_running {
            self.start_if_due();
        }
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        if self.state.get_ref().get_queue().event_idx_enabled() == enabled {
            return;
        }
        let was_running = self.stop();
        self.state.set_queue_event_idx(enabled);
        if was_running {
            self.start_if_due();
        }
    }

    fn set_queue_ready(&self, ready: bool) {
        self.state.set_queue_ready(ready);
        if ready {
            self.start_if_due();
        } else {
            self.stop_for_good();
        }
    }

    fn set_kick(&self, file: Option<File>) {
        self.stop();
        let stand_in = file.as_ref().map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)).transpose();
        let stand_in = stand_in.unwrap_or_else(|e| {
            self.fail(&e);
            None
        });
        self.seat.locked().kick = file;
        self.state.set_kick(stand_in.map(into_file));
        // Also a ring that did not run: its last kick may have been taken away, and the
        // crate starts it only once.
        self.start_if_due();
    }

    fn read_kick(&self) -> io::Result<bool> {
        Ok(false)
    }

    fn set_call(&self, file: Option<File>) {
        let mut seat = self.seat.locked();
        seat.call = file;
        let Some(serving) = &seat.running else { return queue::signal(seat.call.as_ref()) };
        let copy = seat.call.as_ref().map(File::try_clone).transpose();
        if let Err(e) = copy.and_then(|call| serving.workers[self.index].set_call(call)) {
            // Without it the guest would wait for interrupts that nobody sends.
            self.fail(&e);
        }
    }

    fn set_err(&self, file: Option<File>) {
        self.seat.locked().err = file;
    }
}

fn into_file(fd: EventFd) -> File {
    use std::os::fd::{FromRawFd, IntoRawFd};
    // SAFETY: `into_raw_fd` gives up the only owner of the descriptor; the File is the next one.
    unsafe { File::from_raw_fd(fd.into_raw_fd()) }
}
