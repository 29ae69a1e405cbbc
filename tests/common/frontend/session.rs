//! One vhost-user connection, set up in the order in which the known VMMs do it, over the `vhost` crate's
//! front-end.

use super::config::CONFIG_LEN;
use super::inflight::{Info, Region};
use super::raw::{RawSocket, connect};
use super::watch::Watch;
use super::{BlkConfig, Fault, GuestMem, Layout, Result, SplitRing};
use std::cell::RefCell;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Error as UserError, Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VringConfigData};

/// VHOST_USER_F_PROTOCOL_FEATURES among the virtio features.
pub const F_PROTOCOL: u64 = 1 << 30;
/// VIRTIO_RING_F_INDIRECT_DESC.
pub const F_INDIRECT: u64 = 1 << 28;
/// VIRTIO_RING_F_EVENT_IDX.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// VIRTIO_F_VERSION_1.
pub const F_VERSION_1: u64 = 1 << 32;
/// VHOST_F_LOG_ALL.
pub const F_LOG_ALL: u64 = 1 << 26;
/// VIRTIO_BLK_F_RO.
pub const F_RO: u64 = 1 << 5;
/// VIRTIO_BLK_F_BLK_SIZE.
pub const F_BLK_SIZE: u64 = 1 << 6;
/// VIRTIO_BLK_F_FLUSH.
pub const F_FLUSH: u64 = 1 << 9;
/// VIRTIO_BLK_F_CONFIG_WCE.
pub const F_CONFIG_WCE: u64 = 1 << 11;
/// VIRTIO_BLK_F_MQ.
pub const F_MQ: u64 = 1 << 12;
/// VIRTIO_BLK_F_DISCARD.
pub const F_DISCARD: u64 = 1 << 13;
/// VIRTIO_BLK_F_WRITE_ZEROES.
pub const F_WRITE_ZEROES: u64 = 1 << 14;

/// Whose order of messages is followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// QEMU 7.2: features asked for twice, calls set before the rings and again after the start.
    Qemu7,
    /// QEMU 10: the same, and the device is reset before its start.
    Qemu10,
    /// cloud-hypervisor: owner first, one pass over each ring.
    CloudHypervisor,
    /// cloud-hypervisor coming back after it lost the back-end: does not ask for protocol features.
    CloudHypervisorReconnect,
}

/// Which messages ask for an acknowledgement (where REPLY_ACK is agreed).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acks {
    /// Only the memory table, as QEMU does.
    MemTable,
    /// All, as cloud-hypervisor does.
    All,
}

/// What a front-end wishes.
#[derive(Clone, Debug)]
pub struct Options {
    /// Virtio features it would take; what the back-end offers of them is agreed.
    pub features: u64,
    /// Protocol features it would take; what the back-end offers of them is agreed.
    pub protocol: VhostUserProtocolFeatures,
    /// Request queues to set up.
    pub queues: usize,
    /// Entries of each.
    pub queue_size: u16,
    /// The guest's RAM.
    pub layout: Layout,
    /// Order of messages.
    pub order: Order,
    /// Acknowledgements.
    pub acks: Acks,
    /// Whether nobody is waited for who does not listen now: the back-end may have ended.
    pub now_or_never: bool,
}

impl Default for Options {
    fn default() -> Self {
        use VhostUserProtocolFeatures as P;
        Options {
            features: !F_LOG_ALL,
            protocol: P::MQ | P::CONFIG | P::REPLY_ACK | P::RESET_DEVICE | P::CONFIGURE_MEM_SLOTS,
            queues: 1,
            queue_size: 128,
            layout: Layout::flat(16 << 20),
            order: Order::Qemu7,
            acks: Acks::All,
            now_or_never: false,
        }
    }
}

/// A connection to a back-end.
pub struct Session {
    /// The guest's RAM.
    pub mem: Arc<GuestMem>,
    /// The queues.
    pub rings: Vec<SplitRing>,
    /// What the back-end offered.
    pub offered: u64,
    /// The protocol features it offered.
    pub offered_protocol: VhostUserProtocolFeatures,
    /// The virtio features agreed.
    pub features: u64,
    /// The protocol features agreed.
    pub protocol: VhostUserProtocolFeatures,
    options: Options,
    front: RefCell<Frontend>,
    watch: Watch,
    raw: RawSocket,
    backend_channel: Option<UnixStream>,
    /// What the back-end notes requests in flight in. If there is one at the start of the device, the
    /// back-end is given it instead of being asked for one.
    pub inflight: Option<Region>,
}

impl Session {
    /// Connects, agrees on features and starts the device with empty rings.
    pub fn open(path: &Path, options: &Options) -> Result<Session> {
        let mut session = Self::connect(path, options)?;
        session.start()?;
        Ok(session)
    }

    /// Connects and agrees on features; the device is not started.
    pub fn connect(path: &Path, options: &Options) -> Result<Session> {
        let mem = Arc::new(GuestMem::new(&options.layout)?);
        let ring = |_| SplitRing::new(&mem, 0, options.queue_size);
        let rings = (0..options.queues).map(ring).collect::<Result<Vec<_>>>()?;
        Self::resume(path, options, mem, rings)
    }

    /// Connects for a guest that already has memory and rings, as a VMM does that lost its back-end.
    pub fn resume(
        path: &Path,
        options: &Options,
        mem: Arc<GuestMem>,
        rings: Vec<SplitRing>,
    ) -> Result<Session> {
        let socket = if options.now_or_never { UnixStream::connect(path)? } else { connect(path)? };
        let front = Frontend::from_stream(socket.try_clone()?, options.queues as u64);
        let mut session = Session {
            mem,
            rings,
            offered: 0,
            offered_protocol: VhostUserProtocolFeatures::empty(),
            features: 0,
            protocol: VhostUserProtocolFeatures::empty(),
            options: options.clone(),
            front: RefCell::new(front),
            watch: Watch::new(socket.try_clone()?),
            raw: RawSocket::new(socket),
            backend_channel: None,
            inflight: None,
        };
        session.negotiate()?;
        Ok(session)
    }

    /// Gives up the connection but keeps the guest: what `resume` takes.
    pub fn abandon(self) -> (Arc<GuestMem>, Vec<SplitRing>) {
        (self.mem, self.rings)
    }

    /// The connection for messages of one's own; answers must be read before the session is used again.
    pub fn raw(&self) -> &RawSocket {
        &self.raw
    }

    /// Our end of the back-end's own channel, if BACKEND_REQ was agreed.
    pub fn backend_channel(&self) -> Option<&UnixStream> {
        self.backend_channel.as_ref()
    }

    /// One call of the `vhost` crate's front-end, with a time limit.
    pub fn ask<T>(&self, what: &str, call: impl FnOnce(&mut Frontend) -> vhost::Result<T>) -> Result<T> {
        let result = self.watch.run(|| call(&mut self.front.borrow_mut()));
        result.map_err(|e| self.fault(what, e))
    }

    /// Agrees on features, in the chosen order.
    fn negotiate(&mut self) -> Result<()> {
        use VhostUserProtocolFeatures as P;
        let clh = matches!(self.options.order, Order::CloudHypervisor | Order::CloudHypervisorReconnect);
        if clh {
            self.ask("SET_OWNER", |f| f.set_owner())?;
        }
        self.offered = self.ask("GET_FEATURES", |f| f.get_features())?;
        self.features = self.offered & (self.options.features | F_PROTOCOL);
        if self.features & F_PROTOCOL == 0 {
            return Err(Fault::Protocol("the back-end has no protocol features".into()));
        }
        if self.options.order == Order::CloudHypervisorReconnect {
            self.ask("SET_FEATURES", |f| f.set_features(self.features))?;
            self.offered_protocol = self.options.protocol;
        } else {
            self.offered_protocol = self.ask("GET_PROTOCOL_FEATURES", |f| f.get_protocol_features())?;
        }
        self.protocol = self.offered_protocol & self.options.protocol;
        self.ask("SET_PROTOCOL_FEATURES", |f| f.set_protocol_features(self.protocol))?;
        self.want_acks(self.options.acks == Acks::All);
        if self.protocol.contains(P::MQ) && self.options.order != Order::CloudHypervisorReconnect {
            let most = self.ask("GET_QUEUE_NUM", |f| f.get_queue_num())?;
            if most < self.rings.len() as u64 {
                return Err(Fault::Protocol(format!("the back-end has only {most} queues")));
            }
        }
        if self.protocol.contains(P::CONFIGURE_MEM_SLOTS) && !clh {
            self.ask("GET_MAX_MEM_SLOTS", |f| f.get_max_mem_slots())?;
        }
        if self.protocol.contains(P::BACKEND_REQ) {
            let (ours, theirs) = UnixStream::pair()?;
            self.ask("SET_BACKEND_REQ_FD", |f| f.set_backend_request_fd(&theirs))?;
            self.backend_channel = Some(ours);
        }
        if !clh {
            self.ask("SET_OWNER", |f| f.set_owner())?;
            self.ask("GET_FEATURES", |f| f.get_features())?;
            self.set_calls()?;
        }
        Ok(())
    }

    /// Starts the device with the rings where they are: 0 for new ones.
    pub fn start(&mut self) -> Result<()> {
        let bases: Vec<u16> = self.rings.iter().map(|r| r.used_idx()).collect();
        self.start_at(&bases)
    }

    /// Starts the device; `bases` is the next available index of each ring.
    pub fn start_at(&mut self, bases: &[u16]) -> Result<()> {
        use VhostUserProtocolFeatures as P;
        if self.options.order == Order::Qemu10 && self.protocol.contains(P::RESET_DEVICE) {
            self.reset_device()?;
        }
        self.ask("SET_FEATURES", |f| f.set_features(self.features))?;
        if self.protocol.contains(P::INFLIGHT_SHMFD) {
            self.share_inflight()?;
        }
        self.set_mem_table()?;
        for (index, base) in bases.iter().enumerate() {
            self.rings[index].event_idx = self.features & F_EVENT_IDX != 0;
            self.set_ring(index, *base)?;
        }
        self.enable(true)?;
        if matches!(self.options.order, Order::Qemu7 | Order::Qemu10) {
            self.set_calls()?;
        }
        Ok(())
    }

    /// Everything of one ring but its enabling.
    pub fn set_ring(&self, index: usize, base: u16) -> Result<()> {
        let ring = &self.rings[index];
        let clh = !matches!(self.options.order, Order::Qemu7 | Order::Qemu10);
        self.ask("SET_VRING_NUM", |f| f.set_vring_num(index, ring.size))?;
        if !clh {
            self.ask("SET_VRING_BASE", |f| f.set_vring_base(index, base))?;
        }
        let place = VringConfigData {
            queue_max_size: ring.size,
            queue_size: ring.size,
            flags: 0,
            desc_table_addr: self.mem.user(ring.desc),
            used_ring_addr: self.mem.user(ring.used),
            avail_ring_addr: self.mem.user(ring.avail),
            log_addr: None,
        };
        self.ask("SET_VRING_ADDR", |f| f.set_vring_addr(index, &place))?;
        if clh {
            self.ask("SET_VRING_BASE", |f| f.set_vring_base(index, base))?;
            self.ask("SET_VRING_CALL", |f| f.set_vring_call(index, &ring.call_fd))?;
        }
        self.ask("SET_VRING_ERR", |f| f.set_vring_err(index, &ring.err_fd))?;
        self.ask("SET_VRING_KICK", |f| f.set_vring_kick(index, &ring.kick_fd))
    }

    /// Tells the back-end where the guest's memory is.
    pub fn set_mem_table(&self) -> Result<()> {
        self.want_acks(true);
        let result = self.ask("SET_MEM_TABLE", |f| f.set_mem_table(&self.mem.table()));
        self.want_acks(self.options.acks == Acks::All);
        result.map(|_| ())
    }

    /// Enables or disables every ring.
    pub fn enable(&self, on: bool) -> Result<()> {
        for index in 0..self.rings.len() {
            self.ask("SET_VRING_ENABLE", |f| f.set_vring_enable(index, on))?;
        }
        Ok(())
    }

    /// Stops the device: rings disabled, then their next available index asked for.
    pub fn stop(&self) -> Result<Vec<u16>> {
        self.enable(false)?;
        let base = |index| self.ask("GET_VRING_BASE", |f| f.get_vring_base(index));
        (0..self.rings.len()).map(|i| base(i).map(|b| b as u16)).collect()
    }

    /// Resets the device.
    pub fn reset_device(&self) -> Result<()> {
        self.ask("RESET_DEVICE", |f| f.reset_device())
    }

    /// Reads the configuration space.
    pub fn config_bytes(&self, offset: u32, len: u32) -> Result<Vec<u8>> {
        let flags = VhostUserConfigFlags::empty();
        let blank = vec![0; len as usize];
        self.ask("GET_CONFIG", |f| f.get_config(offset, len, flags, &blank)).map(|(_, bytes)| bytes)
    }

    /// Reads the configuration space into its fields.
    pub fn config(&self) -> Result<BlkConfig> {
        Ok(BlkConfig::parse(&self.config_bytes(0, CONFIG_LEN)?))
    }

    /// Writes into the configuration space, as the guest's driver does.
    pub fn write_config(&self, offset: u32, bytes: &[u8]) -> Result<()> {
        self.ask("SET_CONFIG", |f| f.set_config(offset, VhostUserConfigFlags::WRITABLE, bytes))
    }

    fn set_calls(&self) -> Result<()> {
        for (index, ring) in self.rings.iter().enumerate() {
            self.ask("SET_VRING_CALL", |f| f.set_vring_call(index, &ring.call_fd))?;
        }
        Ok(())
    }

    fn share_inflight(&mut self) -> Result<()> {
        let region = match self.inflight.take() {
            Some(region) => region,
            None => {
                let wish = Info::wish(self.rings.len() as u16, self.options.queue_size);
                let (info, file) = self.ask("GET_INFLIGHT_FD", |f| f.get_inflight_fd(&wish.into()))?;
                Region::new(info.into(), file)?
            }
        };
        let info = region.info.into();
        self.ask("SET_INFLIGHT_FD", |f| f.set_inflight_fd(&info, region.file.as_raw_fd()))?;
        self.inflight = Some(region);
        Ok(())
    }

    fn want_acks(&self, on: bool) {
        let on = on && self.protocol.contains(VhostUserProtocolFeatures::REPLY_ACK);
        let flags = if on { VhostUserHeaderFlag::NEED_REPLY } else { VhostUserHeaderFlag::empty() };
        self.front.borrow().set_hdr_flags(flags);
    }

    fn fault(&self, what: &str, error: vhost::Error) -> Fault {
        if self.watch.fired() {
            return Fault::TimedOut(what.into());
        }
        match error {
            vhost::Error::VhostUserProtocol(e) => match e {
                UserError::Disconnected | UserError::PartialMessage | UserError::SocketBroken(_) => {
                    Fault::Closed(what.into())
                }
                UserError::BackendInternalError => Fault::Refused(what.into()),
                e => Fault::Protocol(format!("{what}: {e}")),
            },
            e => Fault::Protocol(format!("{what}: {e}")),
        }
    }
}
