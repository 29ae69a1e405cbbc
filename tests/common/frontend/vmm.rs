//! What each VMM sends, message by message and in its order. Where `Session` is a front-end of our own that
//! can be asked to behave like one or the other, this is a transcript: nothing is sent that they do not send.
//!
//! Sources: QEMU's hw/virtio/vhost.c, vhost-user.c and hw/block/vhost-user-blk.c; cloud-hypervisor's
//! virtio-devices/src/vhost_user; Firecracker's devices/virtio/vhost_user.rs and block/vhost_user.

use super::hostile::{config, memory_region, memory_table, ring_addresses, state, words};
use super::inflight::{Info, Region};
use super::raw::{NEED_REPLY, VERSION};
use super::session::{
    F_BLK_SIZE, F_CONFIG_WCE, F_DISCARD, F_EVENT_IDX, F_FLUSH, F_INDIRECT, F_MQ, F_PROTOCOL, F_RO,
    F_VERSION_1, F_WRITE_ZEROES,
};
use super::{Fault, GuestMem, Layout, RawSocket, Reply, Result, SplitRing};
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::sync::Arc;
use vhost::vhost_user::message::{FrontendReq as Req, VhostUserProtocolFeatures as Protocol};

const F_SIZE_MAX: u64 = 1 << 1;
const F_SEG_MAX: u64 = 1 << 2;
const F_TOPOLOGY: u64 = 1 << 10;
/// What every VMM but Firecracker passes on to the guest if it is offered.
const USUAL: u64 = F_SIZE_MAX
    | F_SEG_MAX
    | F_BLK_SIZE
    | F_TOPOLOGY
    | F_RO
    | F_FLUSH
    | F_CONFIG_WCE
    | F_DISCARD
    | F_WRITE_ZEROES
    | F_INDIRECT
    | F_EVENT_IDX
    | F_VERSION_1
    | F_PROTOCOL;

/// Whose messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// QEMU 7.2.
    Qemu7,
    /// QEMU 10.
    Qemu10,
    /// cloud-hypervisor v54.
    CloudHypervisor,
    /// Firecracker.
    Firecracker,
}

impl Kind {
    fn features(self, queues: usize) -> u64 {
        match self {
            Kind::Firecracker => F_VERSION_1 | F_EVENT_IDX | F_RO | F_FLUSH | F_PROTOCOL,
            _ if queues > 1 => USUAL | F_MQ,
            _ => USUAL,
        }
    }

    fn protocol(self) -> u64 {
        use Protocol as P;
        let usual = P::MQ | P::CONFIG | P::REPLY_ACK | P::CONFIGURE_MEM_SLOTS | P::INFLIGHT_SHMFD;
        let protocol = match self {
            Kind::Firecracker => P::CONFIG,
            Kind::Qemu7 | Kind::CloudHypervisor => usual,
            Kind::Qemu10 => usual | P::RESET_DEVICE,
        };
        protocol.bits()
    }
}

/// A VMM and its guest.
pub struct Vmm {
    /// The guest's RAM.
    pub mem: Arc<GuestMem>,
    /// The guest's rings.
    pub rings: Vec<SplitRing>,
    /// The configuration space, as the VMM read it.
    pub config: Vec<u8>,
    /// What it keeps for the back-end.
    pub region: Option<Region>,
    kind: Kind,
    raw: RawSocket,
    features: u64,
    protocol: u64,
    /// Whether it asks for acknowledgements of everything, which it does once that is agreed.
    acks: bool,
    /// Whether memory regions were added one by one, which is done once.
    regions_added: bool,
}

impl Vmm {
    /// Connects for a guest with so many rings, as at the VMM's start. `without` are protocol
    /// features that it is not to use.
    pub fn connect(
        path: &Path,
        kind: Kind,
        queues: usize,
        queue_size: u16,
        without: Protocol,
    ) -> Result<Vmm> {
        let mem = Arc::new(GuestMem::new(&Layout::flat(32 << 20))?);
        let ring = |_| SplitRing::new(&mem, 0, queue_size);
        let rings = (0..queues).map(ring).collect::<Result<Vec<_>>>()?;
        let mut vmm = Vmm {
            mem,
            rings,
            config: Vec::new(),
            region: None,
            kind,
            raw: RawSocket::connect(path)?,
            features: kind.features(queues),
            protocol: kind.protocol() & !without.bits(),
            acks: false,
            regions_added: false,
        };
        vmm.negotiate(true)?;
        Ok(vmm)
    }

    /// A VMM to which the guest is to move, on the back-end at `path`: connected, with the same
    /// memory and no rings yet.
    pub fn incoming(&self, path: &Path) -> Result<Vmm> {
        let mut vmm = Vmm {
            mem: self.mem.clone(),
            rings: Vec::new(),
            config: Vec::new(),
            region: None,
            kind: self.kind,
            raw: RawSocket::connect(path)?,
            features: self.features,
            protocol: self.protocol,
            acks: false,
            regions_added: false,
        };
        vmm.negotiate(true)?;
        Ok(vmm)
    }

    /// Connects again, after the back-end's end, and starts the device where the guest left it.
    pub fn reconnect(mut self, path: &Path) -> Result<Vmm> {
        self.raw = RawSocket::connect(path)?;
        (self.regions_added, self.acks) = (false, false);
        self.negotiate(false)?;
        self.start()?;
        Ok(self)
    }

    /// Starts the device as the guest's driver has set it up, all rings.
    pub fn start(&mut self) -> Result<()> {
        self.start_rings(self.rings.len())
    }

    /// Starts the device where the driver, as a BIOS does, has set up only the first so many rings.
    pub fn start_rings(&mut self, used: usize) -> Result<()> {
        self.rings.iter_mut().for_each(|r| r.event_idx = self.features & F_EVENT_IDX != 0);
        match self.kind {
            Kind::Qemu7 | Kind::Qemu10 => self.start_qemu(used),
            Kind::CloudHypervisor | Kind::Firecracker => self.start_rust_vmm(),
        }
    }

    /// Enables or disables every ring: all that cloud-hypervisor does to pause and resume.
    pub fn enable(&self, on: bool) -> Result<()> {
        (0..self.rings.len())
            .try_for_each(|q| self.tell(Req::SET_VRING_ENABLE, &state(q as u32, on.into()), &[]))
    }

    /// GET_VRING_BASE of one ring.
    pub fn base(&self, queue: usize) -> Result<u16> {
        let reply = self.ask(Req::GET_VRING_BASE, &state(queue as u32, 0), &[])?;
        Ok((reply.value()? >> 32) as u16)
    }

    /// RESET_DEVICE: QEMU 10 at each reset of the device by the guest.
    pub fn reset_device(&self) -> Result<()> {
        self.tell(Req::RESET_DEVICE, &[], &[])
    }

    /// Asks for the features, which says that everything before has been worked off.
    pub fn sync(&self) -> Result<u64> {
        self.ask(Req::GET_FEATURES, &[], &[])?.value()
    }

    /// Reads the configuration space once more.
    pub fn read_config(&self) -> Result<Vec<u8>> {
        let (len, flags) = match self.kind {
            Kind::Qemu7 | Kind::Qemu10 => (57, 0u32),
            _ => (60, 1),
        };
        let mut body = config(0, len, &vec![0; len as usize]);
        body[8..12].copy_from_slice(&flags.to_le_bytes());
        let reply = self.ask(Req::GET_CONFIG, &body, &[])?;
        if reply.body.len() != body.len() {
            return Err(Fault::Protocol(format!("{len} bytes of configuration asked: {reply:x?}")));
        }
        Ok(reply.body[12..].to_vec())
    }

    /// Writes into the configuration space, for the guest.
    pub fn write_config(&self, offset: u32, bytes: &[u8]) -> Result<()> {
        self.tell(Req::SET_CONFIG, &config(offset, bytes.len() as u32, bytes), &[])
    }

    fn is_qemu(&self) -> bool {
        matches!(self.kind, Kind::Qemu7 | Kind::Qemu10)
    }

    fn has(&self, feature: Protocol) -> bool {
        self.protocol & feature.bits() != 0
    }

    fn negotiate(&mut self, first: bool) -> Result<()> {
        if !self.is_qemu() {
            self.tell(Req::SET_OWNER, &[], &[])?;
        }
        self.features &= self.sync()?;
        if first || self.is_qemu() {
            self.protocol &= self.ask(Req::GET_PROTOCOL_FEATURES, &[], &[])?.value()?;
        }
        self.tell(Req::SET_PROTOCOL_FEATURES, &words(&[self.protocol]), &[])?;
        self.acks = !self.is_qemu() && self.has(Protocol::REPLY_ACK);
        if self.has(Protocol::MQ) && (first || self.is_qemu()) {
            let most = self.ask(Req::GET_QUEUE_NUM, &[], &[])?.value()?;
            assert!(most >= self.rings.len() as u64, "the back-end has only {most} queues");
        }
        if self.is_qemu() {
            self.ask(Req::GET_MAX_MEM_SLOTS, &[], &[])?;
            self.tell(Req::SET_OWNER, &[], &[])?;
            self.sync()?;
            self.set_calls()?;
        }
        if first {
            self.config = self.read_config()?;
        }
        Ok(())
    }

    fn start_qemu(&mut self, used: usize) -> Result<()> {
        if self.has(Protocol::INFLIGHT_SHMFD) {
            self.share_region()?;
        }
        self.tell(Req::SET_FEATURES, &words(&[self.features]), &[])?;
        if !std::mem::replace(&mut self.regions_added, true) {
            for i in 0..self.mem.regions() {
                let r = self.mem.spec(i);
                let body = memory_region([r.guest, r.size, r.user, r.offset]);
                self.acked(Req::ADD_MEM_REG, &body, &[self.mem.fd(i)])?;
            }
        }
        for (q, ring) in self.rings.iter().enumerate().take(used) {
            self.tell(Req::SET_VRING_NUM, &state(q as u32, ring.size.into()), &[])?;
            // QEMU keeps what GET_VRING_BASE said, which is the used index, or takes that
            // if nobody said anything.
            self.tell(Req::SET_VRING_BASE, &state(q as u32, ring.used_idx().into()), &[])?;
            self.set_addresses(q)?;
            self.tell(Req::SET_VRING_KICK, &words(&[q as u64]), &[ring.kick_fd.as_raw_fd()])?;
        }
        self.enable(true)?;
        self.set_calls()
    }

    /// cloud-hypervisor and Firecracker, which come from the same code.
    fn start_rust_vmm(&mut self) -> Result<()> {
        self.tell(Req::SET_FEATURES, &words(&[self.features]), &[])?;
        let regions: Vec<_> = (0..self.mem.regions()).map(|i| self.mem.spec(i)).collect();
        let fds: Vec<RawFd> = (0..self.mem.regions()).map(|i| self.mem.fd(i)).collect();
        let table: Vec<_> = regions.iter().map(|r| [r.guest, r.size, r.user, r.offset]).collect();
        self.tell(Req::SET_MEM_TABLE, &memory_table(table.len() as u32, &table), &fds)?;
        for (q, ring) in self.rings.iter().enumerate() {
            self.tell(Req::SET_VRING_NUM, &state(q as u32, ring.size.into()), &[])?;
        }
        if self.has(Protocol::INFLIGHT_SHMFD) {
            self.share_region()?;
        }
        for (q, ring) in self.rings.iter().enumerate() {
            self.set_addresses(q)?;
            self.tell(Req::SET_VRING_BASE, &state(q as u32, ring.avail_idx().into()), &[])?;
            self.tell(Req::SET_VRING_CALL, &words(&[q as u64]), &[ring.call_fd.as_raw_fd()])?;
            self.tell(Req::SET_VRING_KICK, &words(&[q as u64]), &[ring.kick_fd.as_raw_fd()])?;
        }
        self.enable(true)
    }

    fn share_region(&mut self) -> Result<()> {
        let region = match self.region.take() {
            Some(region) => region,
            None => {
                let wish = Info::wish(self.rings.len() as u16, self.rings[0].size);
                let mut reply = self.ask(Req::GET_INFLIGHT_FD, &wish.body(24), &[])?;
                let file = reply.file.take().ok_or_else(|| Fault::Protocol(format!("no file: {reply:?}")))?;
                Region::new(Info::parse(&reply.body)?, file)?
            }
        };
        self.tell(Req::SET_INFLIGHT_FD, &region.info.body(24), &[region.file.as_raw_fd()])?;
        self.region = Some(region);
        Ok(())
    }

    fn set_addresses(&self, queue: usize) -> Result<()> {
        let ring = &self.rings[queue];
        let [desc, used, avail] = [ring.desc, ring.used, ring.avail].map(|addr| self.mem.user(addr));
        self.tell(Req::SET_VRING_ADDR, &ring_addresses(queue as u32, desc, used, avail), &[])
    }

    fn set_calls(&self) -> Result<()> {
        let call = |(q, ring): (usize, &SplitRing)| {
            self.tell(Req::SET_VRING_CALL, &words(&[q as u64]), &[ring.call_fd.as_raw_fd()])
        };
        self.rings.iter().enumerate().try_for_each(call)
    }

    /// Sends a message that has no answer of its own. cloud-hypervisor wants them all acknowledged.
    fn tell(&self, request: Req, body: &[u8], fds: &[RawFd]) -> Result<()> {
        if self.acks {
            return self.acked(request, body, fds);
        }
        self.raw.message(request as u32, VERSION, body, fds)
    }

    fn acked(&self, request: Req, body: &[u8], fds: &[RawFd]) -> Result<()> {
        match self.raw.ack(request as u32, body, fds)? {
            0 => Ok(()),
            _ => Err(Fault::Refused(format!("{request:?}"))),
        }
    }

    /// Sends a message that has an answer of its own.
    fn ask(&self, request: Req, body: &[u8], fds: &[RawFd]) -> Result<Reply> {
        let flags = if self.acks { VERSION | NEED_REPLY } else { VERSION };
        let reply = self.raw.ask(request as u32, flags, body, fds)?;
        match reply.request == request as u32 {
            true => Ok(reply),
            false => Err(Fault::Protocol(format!("{request:?} is answered by {reply:?}"))),
        }
    }
}
