//! One request after another: from a chain to the disk, and from what the disk has done to
//! the answer in the ring.

use crate::backing::Buffer;
use crate::disk::{GuestData, Zeroing};
use crate::vhost::queue::counters::{Cause, OpKind};
use crate::vhost::queue::request::{Request, Stage};
use crate::vhost::queue::serve::{FLUSH, Server};
use crate::virtio::{Op, Status, memory};
use std::io;
use std::sync::atomic::Ordering;
use vm_memory::Bytes;

impl Server {
    /// Looks into a chain; there is a free slot. Returns the request that is to be handed
    /// over, if there is one.
    pub(super) fn begin(&mut self, head: u16) -> Option<u16> {
        let slot = self.free.pop()?;
        // On record before anything has an effect.
        if let Some(inflight) = &mut self.setup.inflight {
            inflight.take(head);
        }
        let request = &mut self.requests[usize::from(slot)];
        let Some(parsed) = self.setup.ring.parse(head, &self.io.disk().shape(), &mut request.segments) else {
            self.free.push(slot);
            self.tally.malformed();
            self.answer(head, 0);
            return None;
        };
        request.head = head;
        request.status = parsed.status;
        request.written = parsed.writable;
        request.data_len = parsed.data_len;
        request.started = 0;
        request.pieces = 0;
        request.kind = parsed.op.as_ref().map_or(OpKind::Other, OpKind::of);
        request.stall = None;
        request.waited = 0;
        self.tally.seen(slot);
        request.durable = self.setup.write_through.load(Ordering::Acquire);
        request.stage = Stage::Outside;
        request.outcome = Status::Ok;
        match parsed.op {
            Ok(op) => {
                request.op = op;
                if let Op::Read { sector } = op {
                    self.io.expect(sector, request.data_len);
                }
                Some(slot)
            }
            Err(status) => {
                // Nothing was moved: no data to mark.
                request.op = Op::Flush;
                self.finish(slot, status);
                None
            }
        }
    }

    /// Hands reads over again that a pause has taken back, oldest first.
    pub(super) fn restart_postponed(&mut self) {
        while let Some(&(tag, len)) = self.postponed.front() {
            let Op::Read { sector } = self.requests[usize::from(tag as u16)].op else {
                unreachable!("reads alone are taken back");
            };
            let sector = sector + (tag >> 16);
            let Some(buffer) = self.io.alloc(sector, len) else { return };
            self.postponed.pop_front();
            self.io.read(tag, sector, buffer);
        }
    }

    /// Goes on with requests that lacked something, oldest first.
    pub(super) fn restart_stalled(&mut self) {
        // Who must still wait for the limits says so again.
        self.throttled = None;
        while let Some(slot) = self.stalled.pop_front() {
            self.advance(slot);
            // If the request stalled again, `advance` has put it at the back. It is still the oldest,
            // so it goes to the front.
            if self.stalled.back() == Some(&slot) {
                self.stalled.rotate_right(1);
                return;
            }
            let request = &mut self.requests[usize::from(slot)];
            if let Some(stall) = request.stall.take() {
                self.tally.goes_on(stall, &mut request.waited);
            }
        }
    }

    /// Has a request wait.
    fn stall(&mut self, slot: u16, cause: Cause) {
        let request = &mut self.requests[usize::from(slot)];
        request.stall = Some(self.tally.stalled(request.stall, cause, &mut request.waited));
        self.stalled.push_back(slot);
    }

    /// Hands over as much of a request as there is room for.
    pub(super) fn advance(&mut self, slot: u16) {
        let request = &mut self.requests[usize::from(slot)];
        if request.stage == Stage::Outside {
            // A drain does not wait for the limits, nor does a flush.
            if self.draining.is_none()
                && request.op != Op::Flush
                && let Err(wait) = self.qos.admit(request.data_len)
            {
                self.throttled = Some(wait);
                return self.stall(slot, Cause::Limits);
            }
            request.stage = Stage::Moving;
        }
        match self.requests[usize::from(slot)].op {
            Op::Read { sector } => self.transfer(slot, sector, false),
            Op::Write { sector } => self.transfer(slot, sector, true),
            Op::GetId => self.get_id(slot),
            Op::Flush => self.ask_flush(slot),
            _ if !self.io.has_room() => self.stall(slot, Cause::Room),
            Op::Discard { sector, .. } => self.zero(slot, sector, Zeroing::Discard),
            Op::WriteZeroes { sector, unmap: true, .. } => self.zero(slot, sector, Zeroing::Unmap),
            Op::WriteZeroes { sector, .. } => self.zero(slot, sector, Zeroing::KeepSpace),
        }
    }

    fn transfer(&mut self, slot: u16, sector: u64, write: bool) {
        let request = &mut self.requests[usize::from(slot)];
        if !write && request.started == 0 {
            let guest = GuestData { mem: &**self.setup.ring.mem(), segments: &request.segments, skip: 0 };
            match self.io.read_now(sector, request.data_len, guest) {
                Ok(true) => return self.finish(slot, Status::Ok),
                Ok(false) => {}
                Err(e) => request.fail(&e, self.io.disk()),
            }
        }
        while !request.is_handed_over() {
            let left = request.data_len - request.started;
            let at = request.started;
            let len = self.io.piece(sector + at / 512, left);
            let Some(buffer) = self.io.alloc(sector + at / 512, len) else {
                return self.stall(slot, Cause::Room);
            };
            let (tag, sector) = (tag(slot, at), sector + at / 512);
            request.started += len as u64;
            if write {
                let guest =
                    GuestData { mem: &**self.setup.ring.mem(), segments: &request.segments, skip: at };
                match self.io.write(tag, sector, buffer, request.durable, guest) {
                    Ok(()) => request.pieces += 1,
                    Err(e) => request.fail(&e, self.io.disk()),
                }
            } else {
                self.io.read(tag, sector, buffer);
                request.pieces += 1;
            }
        }
        if request.pieces == 0 {
            let status = request.outcome;
            self.finish(slot, status);
        }
    }

    fn zero(&mut self, slot: u16, sector: u64, how: Zeroing) {
        let request = &mut self.requests[usize::from(slot)];
        while !request.is_handed_over() {
            let (at, left) = (request.started, request.total() - request.started);
            match self.io.zero(tag(slot, at), sector + at / 512, left / 512, how) {
                Some(part) => {
                    request.started += part.sectors * 512;
                    request.pieces += u32::from(part.submitted);
                }
                None => return self.stall(slot, Cause::Room),
            }
        }
        if request.pieces == 0 {
            self.finish(slot, Status::Ok);
        }
    }

    fn get_id(&mut self, slot: u16) {
        let request = &self.requests[usize::from(slot)];
        let mut id = &self.io.disk().serial()[..];
        for segment in &request.segments {
            let n = id.len().min(segment.len as usize);
            // In guest memory, as `parse` checked.
            if let Err(e) = self.setup.ring.mem().write_slice(&id[..n], segment.addr) {
                log::warn!("GET_ID: {e}");
            }
            self.setup.ring.mark_dirty(segment.addr, n as u64);
            id = &id[n..];
        }
        self.finish(slot, Status::Ok);
    }

    /// Has a request wait for the next flush, as one of its pieces.
    fn ask_flush(&mut self, slot: u16) {
        self.requests[usize::from(slot)].pieces += 1;
        self.flushes.ask(slot);
    }

    /// Begins a flush if somebody waits for one and none runs.
    pub(super) fn begin_flush(&mut self) {
        if self.io.has_room()
            && self.pausing.is_none()
            && self.flushes.begin()
            && let Err(e) = self.io.flush(FLUSH)
        {
            self.flushed(Err(e));
        }
    }

    /// Tells everybody whose flush is over.
    fn flushed(&mut self, result: io::Result<()>) {
        let result = result.map_err(|e| e.to_string());
        while let Some(slot) = self.flushes.take_done() {
            self.settle(slot, result.clone().map_err(io::Error::other));
        }
    }

    pub(super) fn complete(&mut self, tag: u64, buffer: Option<Buffer>, result: io::Result<()>) {
        if tag == FLUSH {
            let result = self.io.flushed(result);
            return self.flushed(result);
        }
        let slot = tag as u16;
        let at = (tag >> 16) * 512;
        let request = &mut self.requests[usize::from(slot)];
        let result = match (request.op, buffer) {
            (Op::Read { sector }, Some(buffer)) => {
                let guest =
                    GuestData { mem: &**self.setup.ring.mem(), segments: &request.segments, skip: at };
                match result {
                    Ok(()) => match self.io.deliver(tag, sector + at / 512, buffer, guest) {
                        Ok(false) => return,
                        done => done.map(drop),
                    },
                    Err(e) => {
                        self.io.free(buffer);
                        Err(e)
                    }
                }
            }
            (op, Some(buffer)) => {
                self.io.free(buffer);
                self.io.written(request.durable && matches!(op, Op::Write { .. }), result)
            }
            (_, None) => result,
        };
        self.settle(slot, result);
    }

    /// A piece of a request is done; with the last one, the request is.
    fn settle(&mut self, slot: u16, result: io::Result<()>) {
        let request = &mut self.requests[usize::from(slot)];
        if let Err(e) = result {
            request.fail(&e, self.io.disk());
        }
        request.pieces -= 1;
        // What has more to hand over is in `stalled`, unless it failed there.
        if request.pieces > 0 || !request.is_handed_over() {
            return;
        }
        if request.needs_flush() {
            request.stage = Stage::Flushing;
            return self.ask_flush(slot);
        }
        let status = request.outcome;
        self.stalled.retain(|&s| s != slot);
        self.finish(slot, status);
    }

    /// Answers a request: data marked, status written, used entry added.
    fn finish(&mut self, slot: u16, status: Status) {
        let request = &mut self.requests[usize::from(slot)];
        if let Some(stall) = request.stall.take() {
            self.tally.goes_on(stall, &mut request.waited);
        }
        let outcome = Request::counted(status);
        self.tally.finished(slot, request.kind, request.total(), outcome, request.waited);
        let mem = self.setup.ring.mem();
        if matches!(request.op, Op::Read { .. }) {
            for segment in &request.segments {
                self.setup.ring.mark_dirty(segment.addr, u64::from(segment.len));
            }
        }
        // In guest memory, as `parse` checked.
        if let Err(e) = memory::write(&**mem, request.status, status as u8) {
            log::warn!("status byte: {e}");
        }
        self.setup.ring.mark_dirty(request.status, 1);
        let (head, written) = (request.head, request.written);
        self.free.push(slot);
        self.answer(head, written);
    }

    /// Answers a chain, `written` bytes of it being ours: at once, or when those before it are answered.
    fn answer(&mut self, head: u16, written: u32) {
        let Some(mut in_order) = self.in_order.take() else { return self.add_used(head, written) };
        in_order.done(head, written);
        while let Some((head, written)) = in_order.next() {
            self.add_used(head, written);
        }
        self.in_order = Some(in_order);
    }

    fn add_used(&mut self, head: u16, written: u32) {
        self.heads[usize::from(head / 64)] &= !(1u64 << (head % 64));
        self.setup.ring.add_used(head, written);
        if let Some(inflight) = &mut self.setup.inflight {
            inflight.answer(head);
        }
    }
}

/// What the disk gives back with a completion: the request's slot, and which part of its data it was.
pub(super) fn tag(slot: u16, at: u64) -> u64 {
    u64::from(slot) | (at / 512) << 16
}
