//! The side of the process that serves the volume from now on. Its life is an attach's, except that nothing
//! is asked of a KMS, and that the volume comes from the process that has it.

use super::incumbent::Incumbent;
use super::{Link, MAX_PARTS, Offer, PREPARING, PROTOCOL, Part, STEP, Step};
use crate::backing::nbd::{self, Address, Right};
use crate::base::hardened::Hardened;
use crate::base::sync::Locked;
use crate::base::{Context, Error, Kind, Result, wire};
use crate::catalog::layout::MAX_LAYERS;
use crate::catalog::lock::{Holder, LockFile, Purpose};
use crate::catalog::metadata::KeyRecord;
use crate::catalog::slots::Unwrapped;
use crate::catalog::{Catalog, Metadata, VolumeId};
use crate::config::Settings;
use crate::crypt::Dek;
use crate::crypt::secret_mem::{SecretFd, SecretMem, on_scrubbed_stack};
use crate::events::EventLog;
use crate::helper::fetch;
use crate::helper::grants::Keeper;
use crate::helper::rbd;
use crate::host::control::{Answer, Control, Request};
use crate::host::keys_held::KeysHeld;
use crate::host::notify::Notifier;
use crate::host::opener::Opener;
use crate::host::service::Service;
use crate::host::socket::{self, SocketName};
use crate::host::start::{Place, Sockets, Taken};
use crate::host::{Attaching, Endpoint, descriptors, run};
use crate::image::lock::ImageLock;
use crate::kms::KmsKey;
use crate::sandbox;
use crate::vhost::gate::{Gate, Said};
use crate::vhost::listener::{Inherited, Socket};
use crate::vhost::session::{Inlet, Resumed};
use crate::volume::layers::PassedLocks;
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// The hidden command.
pub(crate) const COMMAND: &str = "take-over";

/// How it went, as the command that has started this process is told.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum Outcome {
    /// This process serves the volume.
    Taken {
        /// Its id.
        pid: u32,
        /// The version of the process that has served the volume before.
        from: String,
        /// How long requests stood still, in microseconds; `None` where no VMM is connected.
        pause_us: Option<u64>,
    },
    /// The process serves it that did before.
    Failed {
        /// [`Kind::name`].
        kind: String,
        /// Why.
        message: String,
    },
}

/// Takes the volume over from the process at the other end of standard input, and serves it until it is
/// detached. On standard output it is told, in one line, how the taking over went; then both are let go of.
///
/// # Errors
/// As [`crate::host::attach`].
pub(crate) fn take_over(
    catalog: &Catalog,
    settings: &Settings,
    volume: VolumeId,
    hardened: Hardened,
) -> Result<()> {
    // What the terminal of the command says is not for this process.
    let _ = nix::unistd::setsid();
    // Until it is known what the predecessor logs.
    log::set_max_level(log::LevelFilter::Warn);
    let (report, client) = Report::begin()?;
    let served = serve(catalog, settings, volume, hardened, &report, client);
    match report.failed(served.as_ref().err()) {
        // The command that has started this process says it.
        true => Ok(()),
        false => served,
    }
}

/// Who is to hear how it went, until that was said.
#[derive(Clone)]
struct Report(Arc<Mutex<Option<Hearers>>>);

struct Hearers {
    /// The command that has started this process.
    command: File,
    /// The process that serves the volume until now.
    predecessor: UnixStream,
}

impl Report {
    /// Takes standard input and output for what they are used for, and leaves nothing there.
    fn begin() -> Result<(Self, UnixStream)> {
        let attempt = || "this command is started by \"sealblk upgrade\" alone";
        let client = std::io::stdin().as_fd().try_clone_to_owned().context(attempt)?;
        let command = std::io::stdout().as_fd().try_clone_to_owned().context(attempt)?.into();
        let nothing = OpenOptions::new().read(true).write(true).open("/dev/null").context(attempt)?;
        for standard in [libc::STDIN_FILENO, libc::STDOUT_FILENO] {
            replace(standard, &nothing).context(attempt)?;
        }
        let client = UnixStream::from(client);
        let hearers = Hearers { command, predecessor: client.try_clone().context(attempt)? };
        Ok((Report(Arc::new(Mutex::new(Some(hearers)))), client))
    }

    /// Says how it went, if that was not said yet; returns whether it was not.
    fn say(&self, outcome: &Outcome) -> bool {
        let Some(mut hearers) = self.0.locked().take() else { return false };
        let line = serde_json::to_string(outcome).expect("strings and numbers");
        if let Err(e) = writeln!(hearers.command, "{line}") {
            log::debug!("whoever asked for this is gone: {e}");
        }
        if let Outcome::Failed { kind, message } = outcome {
            let (kind, message) = (kind.clone(), message.clone());
            // It finds the same out when this process has ended.
            let _ = wire::say(&hearers.predecessor, &Answer::Failed { kind, message });
        }
        true
    }

    /// As [`Report::say`]: that it has failed.
    fn failed(&self, e: Option<&Error>) -> bool {
        let over = Error::new(Kind::Other, "it was detached just now");
        let e = e.unwrap_or(&over);
        self.say(&Outcome::Failed { kind: e.kind().name().into(), message: e.to_string() })
    }
}

/// Has the standard descriptor `number` mean what `file` does.
fn replace(number: i32, file: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: the standard descriptors are nobody's in particular, and open; dup3 makes one of them a copy of
    // a descriptor that is open, and closes what it was.
    match unsafe { libc::dup3(file.as_raw_fd(), number, 0) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

fn serve(
    catalog: &Catalog,
    settings: &Settings,
    volume: VolumeId,
    hardened: Hardened,
    report: &Report,
    client: UnixStream,
) -> Result<()> {
    let attempt = || format!("upgrade {volume}");
    sandbox::report_lost_memory()?;
    let incumbent = Incumbent::at(&client, catalog, volume).context(attempt)?;
    let mut link = Link::new(client);
    let heard = Heard::ask(hardened, &mut link).context(attempt)?;
    // It stays as it is from here on.
    let metadata = catalog.load(volume).context(attempt)?;
    let Heard { offer, lock, top, stderr, listener, keeper, manager, deks } = heard;
    let keys = metadata.keys().len();
    if deks.len() != keys {
        let message = format!("the volume's record has {keys} data keys, and {} came", deks.len());
        return Err(Error::new(Kind::Busy, message).context(attempt()));
    }
    incumbent.check_may_write(&offer, &top, catalog, &metadata).context(attempt)?;
    let sandbox = incumbent.sandbox(&offer)?;
    let path = offer.path.clone();
    let (endpoint, socket, name) = endpoint(&offer, listener).context(attempt)?;
    let options = offer.options(endpoint, sandbox, incumbent.user()?).context(attempt)?;
    let memory_regions = descriptors::make_room(options.queues).context(attempt)?;
    if memory_regions < offer.memory_regions {
        let message = format!(
            "this process may have fewer open files: a VMM was told that it may share {} regions of memory, \
             and here there is room for {memory_regions} (\"ulimit -Hn\")",
            offer.memory_regions
        );
        return Err(Error::new(Kind::Unsupported, message).context(attempt()));
    }
    if manager.is_some() {
        incumbent.join_group().context(attempt)?;
    }
    let holder = Holder::this_process(Purpose::Attach, path.as_deref())?;
    let lock_file = LockFile::of_holder(&catalog.folder(volume), volume, lock.into()).context(attempt)?;
    let lock = lock_file.of_another(&holder)?;
    let events = EventLog::new(catalog.root(), settings);
    let by = |n: usize, key: &KeyRecord| {
        let said = offer.unwrapped_by.get(n).filter(|said| key.slot_by(said).is_some());
        said.cloned().unwrap_or_else(|| key.first().kms_key())
    };
    let used: Vec<KmsKey> = metadata.keys().iter().enumerate().map(|(n, key)| by(n, key)).collect();
    let coming = fetch::Keys::of(catalog, &metadata, |n| deks.get(n)).context(attempt)?;
    let give_keys = |_: &Metadata| {
        let unwrapped = deks.into_iter().zip(used.iter().cloned());
        Ok(unwrapped.map(|(dek, by)| Unwrapped { dek: Arc::new(dek), by }).collect())
    };
    let (opener, _) = Opener::without(catalog, volume, &options, give_keys).context(attempt)?;
    let held = KeysHeld::begin(catalog.root(), &metadata, used)?;
    let keeper = keeper.map_or_else(Keeper::default, Keeper::of_another);
    let place = Place::Successor(lock);
    let opened = None;
    let taken = Taken { place, lock_file, holder, opened, opener, metadata, events, keeper, held, coming };
    let folder = catalog.folder(volume);
    let control = Control::bind(&folder, true).context(attempt)?;
    let inlet =
        Inlet::new(&folder, "inner-incoming.sock").context(|| "make a socket in the volume's folder")?;
    let sockets = Sockets { control, inlet, socket, name, is_kept: true };
    if let Ok(level) = offer.log_level.parse() {
        log::set_max_level(level);
    }
    let taking = Taking {
        link,
        from: offer.version,
        images: offer.images,
        stderr,
        report: report.clone(),
        begun: Instant::now(),
    };
    let attaching = Attaching {
        catalog: &catalog.without_ledger(),
        options: &options,
        taken,
        sockets,
        path: path.as_deref(),
        memory_regions,
        started_by: nix::unistd::geteuid(),
        manager: Notifier::of(manager),
        from: Some(taking),
    };
    // Nobody waits to hear that VMMs can connect: they are connected.
    run(attaching, |_| Ok(()))
}

/// Where VMMs come from, as the predecessor has passed it.
fn endpoint(
    offer: &Offer,
    listener: Option<OwnedFd>,
) -> Result<(Endpoint, Option<Socket>, Option<SocketName>)> {
    let odd = |what: String| {
        Error::new(Kind::Unsupported, format!("the vhost-user socket that was passed: {what}"))
    };
    let socket = listener.map(socket::of_descriptor).transpose().map_err(odd)?;
    let made_at = |path: &Path| matches!(&socket, Some(Socket::Listening(l)) if socket::is_at(l, path));
    let Some(path) = &offer.path else {
        return Ok((Endpoint::Fd(-1), socket, None));
    };
    // What the kernel says of the listener counts: another name is not this volume's to remove.
    if !made_at(path) {
        return Err(odd(format!("it was not made at {}", path.display())));
    }
    let name = offer.is_name_ours.then(|| SocketName::of_another(path)).transpose();
    // Somebody has removed the name: then nobody has to do it any more.
    let name = name.unwrap_or(None);
    Ok((Endpoint::Path(path.clone()), socket, name))
}

/// What came with the offer.
struct Heard {
    offer: Offer,
    lock: OwnedFd,
    top: File,
    stderr: OwnedFd,
    listener: Option<OwnedFd>,
    keeper: Option<UnixStream>,
    manager: Option<UnixDatagram>,
    deks: Vec<Dek>,
}

impl Heard {
    /// Asks for the volume.
    fn ask(_: Hardened, link: &mut Link) -> Result<Self> {
        // A key for each layer, at most.
        let secret = SecretFd::create(Dek::LEN * MAX_LAYERS)?;
        let request = Request::Upgrade { protocol: PROTOCOL };
        wire::say_with(&link.stream, &request, secret.as_fd())?;
        let offer = match link.hear::<Answer>(PREPARING).map_err(explained)? {
            Answer::Offer(offer) => *offer,
            _ => return Err(Error::new(Kind::Unsupported, "the answer is to another question")),
        };
        let (lock, top, stderr) = (link.descriptor()?, link.descriptor()?.into(), link.descriptor()?);
        let mut optional = |is_there: bool| is_there.then(|| link.descriptor()).transpose();
        let listener = optional(offer.passes.listener)?;
        let keeper = optional(offer.passes.keeper)?.map(UnixStream::from);
        let manager = optional(offer.passes.manager)?.map(UnixDatagram::from);
        if offer.data_keys > MAX_LAYERS {
            let message = format!("no volume has {} data keys", offer.data_keys);
            return Err(Error::new(Kind::Unsupported, message));
        }
        let memory = secret.map()?;
        let dek = |bytes: &[u8]| {
            let mut own = SecretMem::new(Dek::LEN)?;
            on_scrubbed_stack(|| own.as_mut_slice().copy_from_slice(bytes));
            Dek::from_secret(own)
        };
        let deks =
            memory.as_slice().chunks(Dek::LEN).take(offer.data_keys).map(dek).collect::<Result<_>>()?;
        Ok(Heard { offer, lock, top, stderr, listener, keeper, manager, deks })
    }
}

/// An earlier version knows no such request.
fn explained(e: Error) -> Error {
    match e.kind() {
        Kind::Usage if e.to_string().contains("unknown variant") => Error::new(
            Kind::Unsupported,
            "the process that serves it is of a version that cannot be replaced while it serves: detach the \
             volume, and attach it with this version",
        ),
        _ => e,
    }
}

/// What is left to do when this process is ready: the volume itself is to be taken.
pub(in crate::host) struct Taking {
    link: Link,
    from: String,
    /// The tenures of RBD images, as the predecessor says.
    images: Vec<(String, Uuid)>,
    stderr: OwnedFd,
    report: Report,
    begun: Instant,
}

/// A session, or none, as the predecessor has passed it.
struct Passed {
    vmm: Option<UnixStream>,
    session: Vec<Said>,
    locks: PassedLocks,
}

impl Taking {
    /// Where the predecessor logs, and this process does from the taking on.
    pub(in crate::host) fn log(&self) -> BorrowedFd<'_> {
        self.stderr.as_fd()
    }

    /// Has these exports opened as what the predecessor lends.
    ///
    /// # Errors
    /// `Unsupported` for an image of which it has not said that it would.
    pub(in crate::host) fn inherit_images(&self, exports: &[(Address, Right)]) -> Result<()> {
        let written = exports.iter().filter(|(_, right)| *right == Right::Write);
        for image in written.filter_map(|(address, _)| address.image()) {
            let name = image.to_string();
            let said = self.images.iter().find(|(said, _)| *said == name);
            let Some((_, tenure)) = said else {
                let message = format!(
                    "{name} has one writer at a time, and the process that serves the volume does not lend \
                     it: detach the volume, and attach it with this version"
                );
                return Err(Error::new(Kind::Unsupported, message));
            };
            rbd::inherit([(image.clone(), *tenure)]);
        }
        nbd::borrow_images(true);
        Ok(())
    }

    /// Takes the volume: at once where no VMM is connected; else what is returned does it, when it is asked
    /// to resume the VMM's session.
    ///
    /// # Errors
    /// Why the volume is the other process's still.
    pub(in crate::host) fn take(mut self, service: &Service) -> Result<Option<Inherited>> {
        log::debug!("ready after {:?}", self.begun.elapsed());
        self.link.say(&Step::Ready)?;
        let Passed { vmm, session, locks } = self.hear_session()?;
        let mut service = service.succession();
        let Some(vmm) = vmm else {
            self.link.say(&Step::Prepared)?;
            let (_, starts) = self.hear_halt()?;
            if !starts.is_empty() {
                return Err(Error::new(Kind::Usage, "rings were passed without a session"));
            }
            service.take(&locks, || self.commit())?;
            service.settle();
            self.tell(None);
            return Ok(None);
        };
        let connection = vmm.try_clone()?;
        let resume = move |gate: &mut Gate| {
            let taken = gate.replay(session).map_err(Error::from).and_then(|()| {
                self.link.say(&Step::Prepared)?;
                let (drained, starts) = self.hear_halt()?;
                let begun = Instant::now();
                service.take(&locks, || self.commit())?;
                Ok((drained, begun, starts))
            });
            let (drained, begun, starts) = match taken {
                Ok(taken) => taken,
                Err(e) => return Resumed::NotHere(io::Error::other(e)),
            };
            let started = gate.replay(starts);
            let pause = drained + begun.elapsed();
            service.end_with(connection);
            service.settle();
            self.tell(Some(pause));
            Resumed::Here(started)
        };
        Ok(Some(Inherited { vmm, resume: Box::new(resume) }))
    }

    fn hear_session(&mut self) -> Result<Passed> {
        let mut passed = Passed { vmm: None, session: Vec::new(), locks: PassedLocks::default() };
        for _ in 0..MAX_PARTS {
            match self.link.hear(STEP)? {
                Part::Vmm if passed.vmm.is_none() => passed.vmm = Some(vmm(self.link.descriptor()?)?),
                Part::Said { request, body, descriptors } if passed.vmm.is_some() => {
                    passed.session.push(self.link.message(request, &body, descriptors)?);
                }
                Part::ImageLock => {
                    let lock = ImageLock::of_another(self.link.descriptor()?.into());
                    passed.locks.image_locks.push(Arc::new(lock));
                }
                Part::ThatIsAll => return Ok(passed),
                _ => break,
            }
        }
        Err(Error::new(
            Kind::Unsupported,
            "what the other process says of the session has no end, or no order",
        ))
    }

    /// How long the rings took to stand still, and what starts them here.
    fn hear_halt(&mut self) -> Result<(Duration, Vec<Said>)> {
        let mut starts = Vec::new();
        for _ in 0..MAX_PARTS {
            match self.link.hear(2 * STEP)? {
                Part::Said { request, body, descriptors } => {
                    starts.push(self.link.message(request, &body, descriptors)?);
                }
                Part::Halted { drained_us } => return Ok((Duration::from_micros(drained_us), starts)),
                _ => break,
            }
        }
        Err(Error::new(Kind::Unsupported, "what the other process says of the rings has no end, or no order"))
    }

    /// The volume is this process's, if this succeeds.
    fn commit(&self) -> Result<()> {
        self.link.say(&Step::Taken { pid: std::process::id() })?;
        nbd::borrow_images(false);
        Ok(())
    }

    /// It is done: who has asked hears it, and the log goes where the predecessor's went.
    fn tell(&self, pause: Option<Duration>) {
        if let Err(e) = replace(libc::STDERR_FILENO, &self.stderr) {
            log::warn!("the log goes where the command's goes that has started this process: {e}");
        }
        let pid = std::process::id();
        log::info!(
            "process {pid} has taken over from one of version {}, which stood still for {pause:?}",
            self.from
        );
        let pause_us = pause.map(|pause| pause.as_micros() as u64);
        self.report.say(&Outcome::Taken { pid, from: self.from.clone(), pause_us });
    }
}

/// The connection of a VMM.
fn vmm(fd: OwnedFd) -> Result<UnixStream> {
    match socket::of_descriptor(fd) {
        Ok(Socket::Connected(vmm)) => Ok(vmm),
        _ => Err(Error::new(Kind::Unsupported, "what was passed is no VMM's connection")),
    }
}
