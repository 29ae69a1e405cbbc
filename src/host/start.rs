//! What an attach does before the process is confined: it takes and opens the volume, gets its data
//! keys, and makes the sockets.

use crate::base::hardened::Hardened;
use crate::base::root::Root;
use crate::base::{Context, Result};
use crate::catalog::lock::{Holder, LockFile, Purpose, Turn, VolumeLock};
use crate::catalog::metadata::{KeyOwner, KeyRecord, Metadata};
use crate::catalog::slots::Unwrapped;
use crate::catalog::{Catalog, VolumeId};
use crate::config::Settings;
use crate::events::{Event, EventLog};
use crate::helper::fetch;
use crate::helper::grants::{Granting, Keeper};
use crate::helper::slots::{ask_each, asked};
use crate::helper::unwrap::unwrap_slot;
use crate::host::Options;
use crate::host::control::{Bound, Control};
use crate::host::keys_held::KeysHeld;
use crate::host::opener::Opener;
use crate::host::socket::{Passed, SocketName};
use crate::kms::key_ref::{ProviderName, arn_region};
use crate::kms::patience::Patience;
use crate::kms::{Failure, KmsKey};
use crate::vhost::listener::Socket;
use crate::vhost::session::Inlet;
use crate::volume::open::{Deks, Opened};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

/// The volume, with its data keys.
pub(super) struct Taken {
    pub(super) place: Place,
    pub(super) lock_file: LockFile,
    pub(super) holder: Holder,
    /// `None` while another process has the volume.
    pub(super) opened: Option<Opened>,
    pub(super) opener: Opener,
    /// The volume as it was when its keys were asked for.
    pub(super) metadata: Metadata,
    pub(super) events: EventLog,
    pub(super) keeper: Keeper,
    /// To be dropped after the data keys; none for an unencrypted volume.
    pub(super) held: Option<KeysHeld>,
    /// Of its layers that are still coming, if any are.
    pub(super) coming: Option<fetch::Keys>,
}

impl Taken {
    /// Takes the volume, or the place of the process that is to have it next, and opens it. `path` is
    /// where VMMs will connect.
    pub(super) fn take(
        catalog: &Catalog,
        settings: &Settings,
        volume: VolumeId,
        options: &Options,
        path: Option<&Path>,
        hardened: Hardened,
    ) -> Result<Self> {
        let holder = Holder::this_process(Purpose::Attach, path)?;
        let lock_file = LockFile::open(&catalog.folder(volume), volume)?;
        let place = Place::take(&lock_file, &holder, options.incoming)?;
        let events = EventLog::new(catalog.root(), settings);
        let mut granted = None;
        let mut coming = None;
        let get_keys = |metadata: &Metadata| {
            let (deks, keeper) =
                unwrap_all(catalog, metadata, &events, settings, !options.incoming, hardened)?;
            coming = fetch::Keys::of(catalog, metadata, |n| deks.get(n).map(|given| &*given.dek))?;
            granted = Some((metadata.clone(), keeper));
            Ok(deks)
        };
        let (opener, opened) = match &place {
            Place::Holder(lock) => Opener::with_layers(catalog, lock, options, get_keys),
            Place::Next(_) | Place::Successor(_) => Opener::without(catalog, volume, options, get_keys),
        }?;
        let Some((metadata, keeper)) = granted else { unreachable!("nothing is opened without its keys") };
        let held = KeysHeld::begin(catalog.root(), &metadata, opener.keys.used(&metadata))?;
        Ok(Taken { place, lock_file, holder, opened, opener, metadata, events, keeper, held, coming })
    }
}

/// What this process is to the volume: who has it, or who is to have it next.
pub(super) enum Place {
    Holder(VolumeLock),
    Next(Turn),
    /// Who serves the volume until now hands it over, with the lock.
    Successor(VolumeLock),
}

impl Place {
    fn take(lock_file: &LockFile, holder: &Holder, incoming: bool) -> Result<Self> {
        match incoming {
            true => lock_file.announce().map(Place::Next),
            // The command that makes the nightly snapshot, say.
            false => lock_file.acquire_in_turn(holder).map(Place::Holder),
        }
    }
}

/// The data keys, in the order of the volume's keys, and who keeps the grants. A refusal is an event, with
/// the KMS's words as its cause; so is a data key that another KMS key has given than the one that was asked
/// first.
fn unwrap_all(
    catalog: &Catalog,
    metadata: &Metadata,
    events: &EventLog,
    settings: &Settings,
    alone: bool,
    hardened: Hardened,
) -> Result<(Deks, Keeper)> {
    let first = metadata.keys().first().map(|key| key.first().wrapped.key_id.as_str());
    let refused = |failure: Failure| {
        let (key, cause) = (failure.key_id.as_deref().or(first), failure.cause.as_str());
        events.record(&Event::attach_failed(metadata.id(), key, cause, metadata.attached_before()));
        failure.error
    };
    settings.check_encrypted("it", metadata.is_encrypted()).map_err(|e| refused(e.into()))?;
    let granting = Granting::begin(catalog.root(), settings, metadata, alone);
    let mut asking = Asking {
        root: catalog.root(),
        volume: metadata.id(),
        settings,
        events,
        hardened,
        until: Instant::now() + settings.kms_patience,
        granting: granting.map_err(|e| refused(e.into()))?,
        failed: Vec::new(),
    };
    match metadata.keys().iter().map(|key| asking.unwrap(key)).collect::<Result<Deks, Failure>>() {
        Ok(deks) => {
            let used: Vec<KmsKey> = deks.iter().map(|dek| dek.by.clone()).collect();
            let keeper = asking.granting.end(&used).map_err(|e| refused(e.into()))?;
            Ok((deks, keeper))
        }
        Err(failure) => {
            asking.granting.cancel();
            Err(refused(failure))
        }
    }
}

/// Asking for the data keys of a volume, each at a KMS that gives it.
struct Asking<'a> {
    root: &'a Root,
    volume: VolumeId,
    settings: &'a Settings,
    events: &'a EventLog,
    hardened: Hardened,
    /// When patience ends.
    until: Instant,
    granting: Granting,
    /// KMS keys that have not given a data key of the volume: they are asked last for the next one.
    failed: Vec<KmsKey>,
}

impl Asking<'_> {
    fn unwrap(&mut self, key: &KeyRecord) -> Result<Unwrapped, Failure> {
        let keys = key.kms_keys();
        let mut order = asked(key, self.settings);
        order.sort_by_key(|&slot| self.failed.contains(&keys[slot]));
        let patience = Patience(self.until.saturating_duration_since(Instant::now()));
        let owner = KeyOwner::Volume(self.volume);
        let given = ask_each(&owner, &keys, order, patience, |slot, patience| {
            let token = self.granting.grant(&keys[slot], patience)?;
            Ok(unwrap_slot(self.hardened, self.root, owner, (key, slot), token.as_deref(), patience)?)
        })?;
        let by = keys[given.slot].clone();
        if let Some(detour) = given.detour() {
            log::warn!("{}: {by} has given the data key instead", self.volume);
            self.events.record(&Event::unwrapped_by_another(self.volume, &by.key_id, detour));
        }
        let here = &self.settings.locality.region;
        if by.provider == ProviderName::Embedded.as_str() && arn_region(&by.key_id) != Some(here) {
            log::info!("{}: {by} is of another region; its related key in {here} was asked", self.volume);
        }
        self.failed.extend(given.others.into_iter().map(|(key, _)| key));
        Ok(Unwrapped { dek: Arc::new(given.what), by })
    }
}

/// What clients and VMMs connect to.
pub(super) struct Sockets {
    pub(super) control: Bound,
    pub(super) inlet: Inlet,
    pub(super) socket: Option<Socket>,
    /// Of `socket`, where this process, or an earlier one of its service, has made it.
    pub(super) name: Option<SocketName>,
    /// Whether the service manager keeps `socket` already.
    pub(super) is_kept: bool,
}

impl Sockets {
    /// Makes them in the volume's `folder` and, unless one was `passed`, at `path`.
    pub(super) fn bind(
        folder: &Path,
        options: &Options,
        passed: Option<Passed>,
        path: Option<&Path>,
    ) -> Result<Self> {
        let control = Control::bind(folder, options.incoming)?;
        let inlet = if options.incoming { "inner-incoming.sock" } else { "inner.sock" };
        let inlet = Inlet::new(folder, inlet).context(|| "make a socket in the volume's folder")?;
        let is_kept = passed.as_ref().is_some_and(|passed| passed.is_kept);
        let (socket, name) = match (passed, path) {
            // A name that somebody has removed meanwhile nobody has to remove.
            (Some(Passed { socket, is_kept: true }), Some(path)) => {
                (socket, SocketName::of_another(path).ok())
            }
            (Some(Passed { socket, .. }), _) => (socket, None),
            (None, Some(path)) => {
                let (listener, name) = options.access.listen(path, options.user.as_ref())?;
                (Socket::Listening(listener), Some(name))
            }
            (None, None) => unreachable!("an endpoint is a path or a descriptor"),
        };
        Ok(Sockets { control, inlet, socket: Some(socket), name, is_kept })
    }
}
