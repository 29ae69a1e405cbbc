//! Volumes made from snapshots: at once, whatever the size, since the snapshot's layers become
//! the volume's lower ones.
//!
//! Under the KMS keys of the snapshot the volume has the same data key, which each KMS wraps anew for
//! the volume (ReEncrypt), so that nobody sees it; if one of them is named, under that one alone. If
//! it is to have a data key of its own, the new top layer is under that, and the layers below stay
//! under the snapshot's, which the volume has as well. Under another KMS key, and where an
//! unencrypted snapshot is to be encrypted, the new top layer has a data key of its own, and the
//! layers below are marked to be copied up.

use crate::base::Result;
use crate::catalog::layout::Layout;
use crate::catalog::metadata::{KeyOwner, KeyRecord, LayerRecord, Metadata, Origin, encryption_context};
use crate::catalog::slots::KeySlot;
use crate::catalog::snapshot::Snapshot;
use crate::catalog::{Catalog, VolumeId};
use crate::events::EventLog;
use crate::kms::{Failure, KeyDescription, KeyProvider, KmsError, KmsKey, WrappedKey};
use crate::ops::also_keys::Also;
use crate::ops::keys::WrappingKey;
use crate::ops::make::{self, Wanted};
use crate::ops::need::{self, Budget};
use crate::volume::open::Unwrap;
use std::borrow::Cow;
use std::collections::BTreeMap;

/// How a KMS is reached, by the name of its provider.
pub type OpenProvider<'a> = &'a dyn Fn(&str) -> Result<Box<dyn KeyProvider>, KmsError>;

/// The ways to the data keys that a clone or copy needs.
#[derive(Clone, Copy)]
pub struct Keys<'a> {
    /// The KMSs.
    pub open_provider: OpenProvider<'a>,
    /// Unwraps a data key where that cannot be avoided.
    pub unwrap: Unwrap<'a>,
    /// The KMS keys that wrap data keys besides, which it has from the snapshot.
    pub(super) also: &'a Also,
}

/// Which data key the top layer of a clone is under.
#[derive(Clone, Copy)]
pub(super) enum TopKey<'a> {
    /// The snapshot's, if that has one.
    Snapshots,
    /// A data key of its own, by the KMS key that the snapshot's is wrapped by.
    Own(WrappingKey<'a>),
    /// The snapshot's if that is wrapped by this KMS key; else one of its own, to which everything is copied
    /// up. With `own`, one of its own in any case.
    Under {
        /// The KMS key.
        key: WrappingKey<'a>,
        /// Whether it is not to be the snapshot's.
        own: bool,
    },
}

/// Makes a volume from a snapshot, `wanted.geometry` large, and reports a `createVolume` event. Its top layer
/// is under the data key that `top` says. The caller has [checked](super::create::check) that size and sector
/// size go with the snapshot.
///
/// # Errors
/// As [`make::create`].
pub(super) fn create(
    catalog: &Catalog,
    events: &EventLog,
    wanted: &Wanted,
    snapshot: &Snapshot,
    (top, budget): (TopKey<'_>, Budget),
    keys: Keys<'_>,
) -> Result<Metadata> {
    make::create_with(catalog, events, wanted, |id| {
        let layout = layout(catalog, id, wanted, snapshot, (top, budget), keys)?;
        let origin = Origin { snapshot: snapshot.id(), proof: snapshot.proof() };
        let mut metadata = Metadata::with_layout(id, wanted.name.clone(), layout, Some(origin));
        // Nothing else could prove layers that anyone can write: such a volume is never without a seal.
        let must_be_sealed = metadata.is_encrypted() && !snapshot.is_encrypted();
        if must_be_sealed || wanted.device.is_some() || catalog.root().pool().is_some() {
            let owner = KeyOwner::Volume(id);
            let deks = metadata.keys().iter().map(|key| (keys.unwrap)(owner, key));
            let deks = deks.collect::<Result<Vec<_>, _>>()?;
            match must_be_sealed {
                true => metadata.seal(&deks),
                // As its first attach would, which would have to read all of the device for that.
                false => metadata.prove(&deks, || Ok(false))?,
            }
        }
        Ok(metadata)
    })
}

fn layout(
    catalog: &Catalog,
    id: VolumeId,
    wanted: &Wanted,
    snapshot: &Snapshot,
    (top, budget): (TopKey<'_>, Budget),
    ways: Keys<'_>,
) -> Result<Layout, Failure> {
    let (below, going_on) = (snapshot.layout().top(), snapshot.layout().hydrate());
    let mut which = Which::All;
    let (with, hydrate) = match top {
        TopKey::Snapshots => (None, going_on),
        TopKey::Own(key) => (Some(key), going_on),
        TopKey::Under { key, own } => match is_key_of(&key, snapshot)? {
            Some(_) if own => (Some(key), going_on),
            Some(named) => {
                which = Which::Only(named);
                (None, going_on)
            }
            None => (Some(key), Some(below.id)),
        },
    };
    // A device has the room that it needs.
    let takes_files = wanted.device.is_none() && catalog.root().pool().is_none();
    if let Some(hydrate) = hydrate.filter(|_| takes_files) {
        let above = snapshot.layers().iter().take_while(|layer| layer.id != hydrate).count();
        budget.check(catalog, need::of_layers(catalog, &snapshot.layers()[above..], None)?)?;
    }
    // First whether the key that was asked for can be had at all.
    let fresh = with.map(|key| key.generate(id)).transpose()?;
    let mut keys = rewrap_all(snapshot, id.into(), &which, ways)?;
    let top_key = match fresh {
        Some(fresh) => {
            // After the snapshot's: what proves its layers goes by the numbers that their keys have there.
            keys.push(fresh);
            Some(keys.len() - 1)
        }
        None => below.key,
    };
    let top = LayerRecord::new_top(top_key, wanted.geometry.size());
    let layers = std::iter::once(top).chain(snapshot.layers().iter().copied()).collect();
    Ok(Layout { geometry: wanted.geometry, keys, layers, hydrate })
}

/// The KMS key that `with` means, if it wraps the data key of the snapshot's top layer.
///
/// # Errors
/// The KMS's.
pub(super) fn is_key_of(with: &WrappingKey<'_>, snapshot: &Snapshot) -> Result<Option<KmsKey>, Failure> {
    let Some(top) = snapshot.top_key() else { return Ok(None) };
    match with.provider.describe(with.key) {
        Ok(KeyDescription { key_id, .. }) => {
            let named = KmsKey { provider: with.provider.name().into(), key_id };
            Ok(top.slot_by(&named).is_some().then_some(named))
        }
        // The default key is made at its first use.
        Err(KmsError::NotFound(_)) => Ok(None),
        Err(e) => Err(Failure::kms(e, with.provider.name(), with.key)),
    }
}

/// The snapshot's data keys for another `owner`: each slot wrapped by the same KMS key as before, and those
/// of `ways.also` besides. Of each data key the slots that `which` means. A slot whose KMS key cannot be used
/// is left out, with a warning, as long as the data key has another one.
///
/// # Errors
/// Those of the KMS; where a data key has no slot that can be used, the answer of each.
pub(crate) fn rewrap_all(
    snapshot: &Snapshot,
    owner: KeyOwner,
    which: &Which,
    ways: Keys<'_>,
) -> Result<Vec<KeyRecord>, Failure> {
    let each = |key: &KeyRecord| {
        ways.also.wrap(owner, rewrap_slots(snapshot, key, owner, which, ways.open_provider)?)
    };
    snapshot.keys().iter().map(each).collect()
}

/// Which of the slots of a data key are wrapped anew.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Which {
    /// All of them.
    #[default]
    All,
    /// The one of this KMS key, where it is among them; otherwise all.
    Only(KmsKey),
    /// Those of these KMS keys, each as one of the KMS key beside it, which opens what the first has wrapped.
    As(BTreeMap<KmsKey, KmsKey>),
}

impl Which {
    fn of<'a>(&self, key: &'a KeyRecord) -> Vec<Cow<'a, KeySlot>> {
        let all = || key.slots().iter().map(Cow::Borrowed).collect();
        match self {
            Which::All => all(),
            Which::Only(only) => key.slot_by(only).map_or_else(all, |slot| vec![Cow::Borrowed(slot)]),
            Which::As(others) => {
                let renamed = key.slots().iter().filter_map(|slot| {
                    let KmsKey { provider, key_id } = others.get(&slot.kms_key())?.clone();
                    Some(Cow::Owned(KeySlot::new(provider, WrappedKey { key_id, ..slot.wrapped.clone() })))
                });
                renamed.collect()
            }
        }
    }
}

/// One of the snapshot's data keys for another `owner`, as [`rewrap_all`] says.
///
/// # Errors
/// As [`rewrap_all`].
pub(in crate::ops) fn rewrap_slots(
    snapshot: &Snapshot,
    key: &KeyRecord,
    owner: KeyOwner,
    which: &Which,
    open_provider: OpenProvider<'_>,
) -> Result<KeyRecord, Failure> {
    let (from, to) = (snapshot.encryption_context(), encryption_context(owner));
    let rewrap = |slot: &KeySlot| {
        let (by, wrapped) = (&slot.provider, &slot.wrapped);
        let refused = |e: KmsError| Failure::kms(e, by, &wrapped.key_id);
        let provider = open_provider(by).map_err(refused)?;
        let wrapped = provider.rewrap(wrapped, &from, &wrapped.key_id, &to).map_err(refused)?;
        Ok::<_, Failure>(KeySlot::new(&**by, wrapped))
    };
    let wanted = which.of(key);
    let wanted: Vec<&KeySlot> = wanted.iter().map(|slot| &**slot).collect();
    let (mut slots, mut refusals) = (Vec::new(), Vec::new());
    for slot in wanted {
        match rewrap(slot) {
            Ok(slot) => slots.push(slot),
            Err(e) => refusals.push((slot.kms_key(), e)),
        }
    }
    let Some(record) = KeyRecord::of_slots(slots) else { return Err(Failure::of_all(refusals)) };
    for (by, e) in refusals {
        log::warn!(
            "{owner} is made without {by}, which wraps the data key of {}, and cannot now: {}; when it can, \
             \"key add\" adds it",
            snapshot.id(),
            e.cause
        );
    }
    Ok(record)
}
