//! A VMM's session as messages: said to a fresh gate, they bring it to where this one is. So another process
//! can go on with the session, and the VMM's connection with it, without a word to the VMM.
//!
//! What a VMM has said is not kept for this. The messages are made of what the session is at the
//! moment: of the memory that is mapped, of the rings as they stand. Whoever takes them checks them
//! as if the VMM said them.

use crate::vhost::gate::message::{Message, VERSION, invalid};
use crate::vhost::gate::{Gate, LOG_USED, Result};
use crate::vhost::vring::RingState;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use vhost::vhost_user::message::{
    FrontendReq as Req, VhostUserProtocolFeatures as Protocol, VhostUserVirtioFeatures as Features,
};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

/// In a message about a ring's event descriptor: none comes with it.
const NO_FD: u64 = 1 << 8;

/// One message of a transcript.
#[derive(Debug)]
pub struct Said {
    /// The number of the vhost-user request.
    pub request: u32,
    /// Its body, in the byte order of the machine.
    pub body: Vec<u8>,
    /// The descriptors that go with it.
    pub fds: Vec<OwnedFd>,
}

impl Said {
    fn new(request: Req, body: Vec<u8>) -> Self {
        Said { request: request as u32, body, fds: Vec::new() }
    }

    fn with(mut self, fd: impl Into<OwnedFd>) -> Self {
        self.fds.push(fd.into());
        self
    }

    /// About a descriptor of ring `index`.
    fn event(request: Req, index: u64, file: Option<File>) -> Self {
        let word = if file.is_some() { index } else { index | NO_FD };
        let said = Said::new(request, word.to_ne_bytes().to_vec());
        Said { fds: file.into_iter().map(OwnedFd::from).collect(), ..said }
    }
}

impl Gate {
    /// The connection to the VMM.
    pub fn vmm(&self) -> BorrowedFd<'_> {
        self.vmm.as_fd()
    }

    /// Everything that brings a fresh gate to where this one is, except for what depends on where the rings
    /// stand.
    ///
    /// # Errors
    /// `InvalidData` while the VMM changes what cannot be changed by halves: a transfer of the device's
    /// state, or the guest's memory; later it can be asked again. Those of copying descriptors.
    pub fn transcript(&self) -> Result<Vec<Said>> {
        if self.transfer.is_begun() {
            return Err(invalid("the VMM is migrating the guest at this moment".into()));
        }
        let word = |request, value: u64| Said::new(request, value.to_ne_bytes().to_vec());
        let mut all = vec![word(Req::SET_PROTOCOL_FEATURES, self.acked)];
        all.extend(self.features_acked.map(|features| word(Req::SET_FEATURES, features)));
        if let Some(socket) = self.channel.copy()? {
            all.push(Said::new(Req::SET_BACKEND_REQ_FD, Vec::new()).with(socket));
        }
        all.extend(self.memory_said()?);
        if let Some((fd, offset, size)) = self.rings.log().shared()? {
            all.push(Said::new(Req::SET_LOG_BASE, words(&[size, offset])).with(fd));
        }
        if let Some((description, fd)) = self.rings.inflight_shared()? {
            let mut body = words(&[description.size, description.offset]);
            body.extend(description.queues.to_ne_bytes());
            body.extend(description.queue_size.to_ne_bytes());
            all.push(Said::new(Req::SET_INFLIGHT_FD, body).with(fd));
        }
        let tells_rings = self.features_acked.unwrap_or(0) & Features::PROTOCOL_FEATURES.bits() != 0;
        for (index, ring) in self.rings.states()?.into_iter().enumerate() {
            let index = index as u32;
            all.push(Said::new(Req::SET_VRING_NUM, halves(&[index, ring.size.into()])));
            all.push(Said::event(Req::SET_VRING_CALL, index.into(), ring.call));
            all.push(Said::event(Req::SET_VRING_ERR, index.into(), ring.err));
            if tells_rings {
                all.push(Said::new(Req::SET_VRING_ENABLE, halves(&[index, ring.enabled.into()])));
            }
        }
        Ok(all)
    }

    /// Has all rings stand still for a successor, drained but for reads that wait for a place that is away,
    /// which are noted as in flight. No message is handled until [`Gate::go_on`].
    ///
    /// # Errors
    /// Why one could not be halted.
    pub fn halt(&self) -> Result<()> {
        self.rings.halt()
    }

    /// Lets the rings run on that ran before [`Gate::halt`].
    pub fn go_on(&self) {
        self.rings.go_on();
    }

    /// What starts the rings of a gate that has heard [`Gate::transcript`], where they stand now: they are
    /// [halted](Gate::halt).
    ///
    /// # Errors
    /// As for [`Gate::transcript`].
    pub fn starts(&self) -> Result<Vec<Said>> {
        let mut all = Vec::new();
        for (index, ring) in self.rings.states()?.into_iter().enumerate() {
            let index = index as u32;
            match self.addresses_said(index, &ring) {
                Some(addresses) => all.push(addresses),
                None if ring.kick.is_some() && ring.addresses.is_some() => {
                    return Err(invalid(format!("ring {index} is not in the guest's memory at this moment")));
                }
                None => {}
            }
            all.push(Said::new(Req::SET_VRING_BASE, halves(&[index, ring.next_avail.into()])));
            if ring.kick.is_some() {
                all.push(Said::event(Req::SET_VRING_KICK, index.into(), ring.kick));
            }
        }
        Ok(all)
    }

    /// Hears messages of a transcript, as if the VMM said them; the VMM gets no answers.
    ///
    /// # Errors
    /// As a session with a VMM that says this would end.
    pub fn replay(&mut self, said: Vec<Said>) -> Result<()> {
        for Said { request, body, fds } in said {
            self.hear(Message { request, flags: VERSION, body, fds })?;
        }
        Ok(())
    }

    /// The guest's memory: region by region where the VMM has agreed to that, which has no limit on their
    /// number; else as one table.
    fn memory_said(&self) -> Result<Vec<Said>> {
        let regions = self.memory.regions();
        if regions.is_empty() {
            return Ok(Vec::new());
        }
        let mapped = self.rings.memory();
        let file_of = |guest: u64| {
            let region = mapped.iter().flat_map(|memory| memory.iter()).find(|r| r.start_addr().0 == guest);
            let file = region.and_then(|region| Some(region.file_offset()?.file().try_clone()));
            file.unwrap_or_else(|| Err(invalid("the guest's memory changes at this moment".into())))
        };
        let files = regions.iter().map(|region| file_of(region[0])).collect::<Result<Vec<File>>>()?;
        if self.acked & Protocol::CONFIGURE_MEM_SLOTS.bits() != 0 {
            let said = |(region, file): (&[u64; 4], File)| {
                Said::new(Req::ADD_MEM_REG, [words(&[0]), words(region)].concat()).with(file)
            };
            return Ok(regions.iter().zip(files).map(said).collect());
        }
        let count = halves(&[regions.len() as u32, 0]);
        let table = Said::new(Req::SET_MEM_TABLE, [count, words(regions.as_flattened())].concat());
        Ok(vec![Said { fds: files.into_iter().map(OwnedFd::from).collect(), ..table }])
    }

    /// The addresses of a ring, in the VMM's own address space as the protocol has it; `None` if it has none,
    /// or if they are in no region.
    fn addresses_said(&self, index: u32, ring: &RingState) -> Option<Said> {
        let [table, available, used] = ring.addresses?;
        let user = |guest| self.memory.user_address(guest);
        let log = ring.log_used;
        let mut body = halves(&[index, if log.is_some() { LOG_USED } else { 0 }]);
        body.extend(words(&[user(table)?, user(used)?, user(available)?, log.unwrap_or(0)]));
        Some(Said::new(Req::SET_VRING_ADDR, body))
    }
}

fn words(all: &[u64]) -> Vec<u8> {
    all.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn halves(all: &[u32]) -> Vec<u8> {
    all.iter().flat_map(|word| word.to_ne_bytes()).collect()
}
