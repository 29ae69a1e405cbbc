//! The side of the process that serves the volume until now.

use super::{Link, Offer, PREPARING, PROTOCOL, Part, Passes, STEP, Step};
use crate::backing::coming;
use crate::backing::nbd::Export;
use crate::base::{Context, Error, Kind, Result, wire};
use crate::catalog::VolumeId;
use crate::crypt::Dek;
use crate::crypt::secret_mem::SecretFd;
use crate::helper::grants::Keeper;
use crate::helper::rbd;
use crate::host::control::Answer;
use crate::host::handover::Handover;
use crate::host::keyring::Keyring;
use crate::host::notify::Notifier;
use crate::host::state::{Record, State, gone};
use crate::host::{NBD_RECONNECT, Options};
use crate::vhost::boundary::{Boundary, Next};
use crate::vhost::gate::Gate;
use crate::vhost::listener::Stop;
use crate::vhost::queue::qos::Qos;
use nix::sys::socket::{getsockopt, sockopt};
use nix::unistd::Uid;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// How long a VMM may take to end a message that it has begun.
const MESSAGE: Duration = Duration::from_secs(10);
/// How long all turns together may take once the session is at a boundary.
const ALL_STEPS: Duration = Duration::from_secs(60);

/// How long it may take until an RBD image is let go of, with nothing under way: Ceph waits for up to 5
/// seconds for each answer of a watcher that has died.
const LENDING: Duration = Duration::from_secs(15);

/// What this process would leave to a successor.
pub(in crate::host) struct Predecessor {
    pub(in crate::host) options: Options,
    pub(in crate::host) memory_regions: u16,
    pub(in crate::host) volume: VolumeId,
    /// Who started this process, whoever it has become since.
    pub(in crate::host) started_by: Uid,
    /// The socket that VMMs connect to, its path, and whether its name is removed at the end.
    pub(in crate::host) listener: Option<Arc<UnixListener>>,
    pub(in crate::host) path: Option<PathBuf>,
    pub(in crate::host) is_name_ours: bool,
    pub(in crate::host) manager: Arc<Notifier>,
    pub(in crate::host) lock: OwnedFd,
    pub(in crate::host) handover: Weak<Handover>,
    pub(in crate::host) record: Arc<Record>,
    pub(in crate::host) keys: Arc<Keyring>,
    pub(in crate::host) keeper: Arc<Keeper>,
    pub(in crate::host) qos: Arc<Qos>,
    pub(in crate::host) stop: Arc<Stop>,
    pub(in crate::host) boundary: Arc<Boundary>,
}

impl Predecessor {
    /// Has the process at the other end of `client` take over, which has brought `secret`.
    ///
    /// # Errors
    /// Why it has not: this process serves the volume then, as if nobody had asked.
    pub(in crate::host) fn leave(
        self: &Arc<Self>,
        protocol: u32,
        secret: SecretFd,
        client: &UnixStream,
    ) -> Result<()> {
        if protocol != PROTOCOL {
            let message = format!(
                "this process, of version {}, hands over by protocol {PROTOCOL}, and was asked by protocol \
                 {protocol}",
                env!("CARGO_PKG_VERSION")
            );
            return Err(Error::new(Kind::Unsupported, message));
        }
        self.check_asker(client)?;
        // The record stays as it is until this is over: nobody else changes it while this client is heard,
        // and what copies layers up, and lets them go with their keys, stands still.
        match &*self.record.state() {
            Some(_) => self.record.hydrator.stop(),
            None => return Err(gone()),
        }
        let left = self.leave_at_boundary(secret, client);
        if left.is_err()
            && let Some(state) = &*self.record.state()
        {
            self.record.hydrator.begin(state);
        }
        left
    }

    fn leave_at_boundary(self: &Arc<Self>, secret: SecretFd, client: &UnixStream) -> Result<()> {
        let mut link = Link::new(client.try_clone()?);
        self.offer(secret, &link)?;
        match link.hear(PREPARING)? {
            Step::Ready => {}
            _ => return Err(Error::new(Kind::Usage, "the other process is to say that it is ready")),
        }
        let (tell, told) = channel();
        let this = self.clone();
        let job = move |session: Option<&mut Gate>| {
            let left = this.hand_over(session, &mut link);
            let next = if left.is_ok() { Next::Successor } else { Next::ThisProcess };
            // Whoever asked may have given up.
            let _ = tell.send(left);
            next
        };
        self.boundary.leave(Box::new(job))?;
        match told.recv_timeout(MESSAGE) {
            Err(RecvTimeoutError::Timeout) if self.boundary.take_back() => {
                Err(Error::new(Kind::Busy, "the VMM is in the middle of a message; try again"))
            }
            Err(RecvTimeoutError::Timeout) => told.recv_timeout(ALL_STEPS).unwrap_or_else(|_| Err(gone())),
            Err(RecvTimeoutError::Disconnected) => Err(gone()),
            Ok(left) => left,
        }
    }

    /// Data keys go to root, who can have all that this process has, and to the user that started this
    /// process, who could attach the volume just as well.
    fn check_asker(&self, client: &UnixStream) -> Result<()> {
        let asker = getsockopt(client, sockopt::PeerCredentials)?.uid();
        match asker == 0 || Uid::from_raw(asker) == self.started_by {
            true => Ok(()),
            false => {
                let message =
                    "data keys go to root, or to the user that started this process, and to nobody else";
                Err(Error::new(Kind::Usage, message))
            }
        }
    }

    fn offer(&self, secret: SecretFd, link: &Link) -> Result<()> {
        let (data_keys, unwrapped_by, top) = {
            let state = self.record.state();
            let state = state.as_ref().ok_or_else(gone)?;
            let handover = self.handover.upgrade().ok_or_else(gone)?;
            if handover.has_failed_flush() {
                let message =
                    "a flush has failed, and the guest is to know: detach the volume, and attach it again";
                return Err(Error::new(Kind::Busy, message));
            }
            let top = state.layers.first().ok_or_else(gone)?;
            let used = self.keys.used(&state.metadata);
            let first = state.metadata.keys().iter().map(|key| key.first().kms_key());
            let used = if first.eq(used.iter().cloned()) { Vec::new() } else { used };
            (self.keys.of(&state.metadata)?, used, top.backing.file().try_clone()?)
        };
        if secret.len() < Dek::LEN * data_keys.len() {
            let message =
                format!("the volume has {} data keys, and there is no room for so many", data_keys.len());
            return Err(Error::new(Kind::Unsupported, message));
        }
        let mut memory = secret.map()?;
        for (kept, room) in data_keys.iter().zip(memory.as_mut_slice().chunks_mut(Dek::LEN)) {
            kept.write_dek(room);
        }
        // It is the other process's to wipe.
        memory.hand_over();
        let limits = self.qos.limits();
        let Options {
            queues,
            queue_size,
            read_only,
            ref serial,
            engine,
            poll,
            in_order,
            nbd_reconnect,
            source_patience,
            ..
        } = self.options;
        let offer = Offer {
            version: env!("CARGO_PKG_VERSION").into(),
            queues,
            queue_size,
            memory_regions: self.memory_regions,
            read_only,
            serial: serial.clone(),
            engine: engine.name().into(),
            poll_us: poll.as_micros() as u64,
            in_order,
            iops: limits.iops,
            throughput: limits.throughput,
            burst_ms: limits.burst.as_millis() as u64,
            hydrate_rate: self.record.hydrator.rate(),
            space_reserve: self.record.hydrator.reserve().given(),
            cpus: self.options.cpus.clone(),
            sandbox: self.options.sandbox.to_string(),
            log_level: log::max_level().to_string(),
            path: self.path.clone(),
            is_name_ours: self.is_name_ours,
            data_keys: data_keys.len(),
            unwrapped_by,
            nbd_reconnect: (nbd_reconnect != NBD_RECONNECT).then_some(nbd_reconnect.as_secs()),
            source_patience_ms: (source_patience != coming::PATIENCE)
                .then_some(source_patience.as_millis() as u64),
            images: rbd::tenures().into_iter().map(|(image, tenure)| (image.to_string(), tenure)).collect(),
            passes: Passes {
                listener: self.listener.is_some(),
                keeper: self.keeper.socket().is_some(),
                manager: self.manager.socket().is_some(),
            },
        };
        let stderr = std::io::stderr();
        let always = [self.lock.as_fd(), top.as_fd(), stderr.as_fd()];
        let listener = self.listener.as_ref().map(|listener| listener.as_fd());
        let others =
            [listener, self.keeper.socket().map(AsFd::as_fd), self.manager.socket().map(AsFd::as_fd)];
        let descriptors: Vec<BorrowedFd<'_>> =
            always.into_iter().chain(others.into_iter().flatten()).collect();
        link.say_with(&Answer::Offer(Box::new(offer)), &descriptors)
    }

    /// Hands the session over, at a boundary between two messages.
    ///
    /// # Errors
    /// Why not: the rings run on then.
    fn hand_over(&self, session: Option<&mut Gate>, link: &mut Link) -> Result<()> {
        let handover = self.handover.upgrade().ok_or_else(gone)?;
        // No change of the layers begins until this is over.
        let mut held = self.record.state();
        let state = held.as_ref().ok_or_else(gone)?;
        let mut attempt = || -> Result<u32> {
            self.tell_session(session.as_deref(), link)?;
            for layer in &state.layers {
                link.say_with(&Part::ImageLock, &[layer.image_lock.file().as_fd()])?;
            }
            link.say(&Part::ThatIsAll)?;
            if link.hear::<Step>(STEP)? != Step::Prepared {
                return Err(Error::new(Kind::Usage, "the other process is to say that it is prepared"));
            }
            // What takes long is not to be waited for while the guest waits.
            self.flush_servers(state)?;
            drop(state.serving()?.pause(STEP)?);
            if self.stop.is_stopped() {
                return Err(gone());
            }
            let begun = Instant::now();
            session.as_deref().map_or(Ok(()), Gate::halt)?;
            self.flush_servers(state)?;
            if handover.has_dead_queue() {
                return Err(Error::new(Kind::Other, "a queue's thread died"));
            }
            image_of(state).map_or(Ok(()), |image| image.lend(LENDING)).context(|| "let go of the image")?;
            self.give(session.as_deref(), begun, link)
        };
        match attempt() {
            Ok(pid) => {
                // The VMM's connection is the successor's: ending this process is not to end it.
                self.stop.serving(None);
                handover.leave(&mut held);
                self.keeper.leave();
                self.manager.main_process(pid);
                log::info!("process {pid} serves {} from now on", self.volume);
                Ok(())
            }
            Err(e) => {
                // The other process cannot take the volume any more.
                image_of(state).into_iter().for_each(Export::take_back);
                session.iter().for_each(|gate| gate.go_on());
                // It hears why, if it is still there.
                let _ = wire::say(&link.stream, &Answer::failed(&e));
                Err(e)
            }
        }
    }

    /// Makes durable what came by this process's connections to NBD servers. A flush by the other process's
    /// covers that only where a server says so, and what is kept for a server that is killed is kept here.
    fn flush_servers(&self, state: &State) -> Result<()> {
        match state.layers.first().and_then(|top| top.backing.export()) {
            Some(_) => state.serving()?.disk().flush().context(|| "flush the NBD server"),
            None => Ok(()),
        }
    }

    /// Sends what can be said of the session while its rings run.
    fn tell_session(&self, session: Option<&Gate>, link: &Link) -> Result<()> {
        let Some(gate) = session else { return Ok(()) };
        link.say_with(&Part::Vmm, &[gate.vmm()])?;
        gate.transcript()?.iter().try_for_each(|message| link.said(message))
    }

    /// Sends where the rings stand, which are halted since `begun`, and hears whether the other process has
    /// taken the volume; returns that process's id.
    fn give(&self, session: Option<&Gate>, begun: Instant, link: &mut Link) -> Result<u32> {
        for message in session.map_or_else(|| Ok(Vec::new()), Gate::starts)? {
            link.said(&message)?;
        }
        link.say(&Part::Halted { drained_us: begun.elapsed().as_micros() as u64 })?;
        let heard = link.hear::<Step>(STEP);
        if let Ok(Step::Taken { pid }) = heard {
            return Ok(pid);
        }
        // It is not waited for any longer. What it has sent is here by now; what it has not, it cannot send
        // any more, and it takes the volume only when it has.
        let _ = link.stream.shutdown(Shutdown::Both);
        match link.hear::<Step>(STEP) {
            Ok(Step::Taken { pid }) => Ok(pid),
            _ => Err(heard.err().unwrap_or_else(|| {
                Error::new(Kind::Usage, "the other process is to say that it has taken the volume")
            })),
        }
    }
}

/// The RBD image that this process alone writes, if the top layer lies in one.
fn image_of(state: &State) -> Option<&Export> {
    state.layers.first()?.backing.export().filter(|export| export.is_exclusive())
}
