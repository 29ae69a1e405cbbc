//! Copies of snapshots for another region, as EBS has it: which KMS key of that region wraps them.
//!
//! In this order: the key that was named; the keys of that region which wrap the snapshot's data keys, or
//! which are related to those that do (the same multi-Region key); the default key, where it is an alias, by
//! its name there. Nothing of the copy needs the region of the original any more.
#![forbid(unsafe_code)]

use super::{Way, Which, is_key_of};
use crate::base::{Error, Kind, Result};
use crate::catalog::slots::KeySlot;
use crate::catalog::snapshot::Snapshot;
use crate::config::regions::is_region;
use crate::kms::key_ref::{ALIAS_PREFIX, arn_account, arn_region, related_arn};
use crate::kms::{KeyRef, KmsError, KmsKey, ProviderName};
use crate::ops::Store;
use crate::ops::also_keys::{Also, AlsoKeys};
use crate::ops::keys::embedded;
use std::collections::BTreeMap;

/// How a copy of `source` is made for `region`, under the key that `key` names there; without one, as the
/// rules above say; and under those besides that `also` means.
///
/// # Errors
/// `Usage` for what names no key in that region, and where none is known; those of the KMS.
pub fn way(
    store: &Store,
    source: &Snapshot,
    region: &str,
    key: Option<&str>,
    also: &AlsoKeys,
) -> Result<Way> {
    if !is_region(region) {
        return Err(Error::new(Kind::Usage, format!("{region:?} is no region")));
    }
    let named = key.map(|key| reference_in(store, source, region, key)).transpose()?;
    let there = slots_there(store, source, region)?;
    let wanted = match &named {
        None => there,
        Some(named) => there.into_iter().filter(|(_, key)| is_named(key, named)).collect(),
    };
    // Each of its data keys has to come with one.
    let covers = |wanted: &BTreeMap<KmsKey, KmsKey>| {
        let has = |slot: &KeySlot| wanted.contains_key(&slot.kms_key());
        source.is_encrypted() && source.keys().iter().all(|key| key.slots().iter().any(has))
    };
    if covers(&wanted) {
        return Ok(Way::Shared { which: Which::As(wanted), also: Also::named(store, also)? });
    }
    let reference = match named {
        Some(named) => named,
        None => reference_in(store, source, region, &store.settings().default_key)
            .map_err(|e| e.context(format!("the default key for a copy in {region}; --key names another")))?,
    };
    let key = store.key_of(reference)?.and(Also::new(store, also)?);
    match is_key_of(&key.wrapping(), source).map_err(|failure| failure.error)? {
        Some(only) => Ok(Way::Shared { which: Which::Only(only), also: Also::named(store, also)? }),
        None => Ok(Way::Full(key)),
    }
}

/// The KMS keys that wrap data keys of `source`, each with the key in `region` that opens
/// what it has wrapped.
fn slots_there(store: &Store, source: &Snapshot, region: &str) -> Result<BTreeMap<KmsKey, KmsKey>> {
    let mut there = BTreeMap::new();
    for slot in source.keys().iter().flat_map(|key| key.slots()) {
        let key = slot.kms_key();
        if let Some(other) = key_there(store, &key, region)? {
            there.insert(key, other);
        }
    }
    Ok(there)
}

/// The key in `region` that opens what `key` has wrapped, if there is one.
fn key_there(store: &Store, key: &KmsKey, region: &str) -> Result<Option<KmsKey>> {
    let KmsKey { provider, key_id } = key;
    if *provider != ProviderName::Aws.as_str() {
        return Ok(is_embedded_there(store, key_id, region)?.then(|| key.clone()));
    }
    if arn_region(key_id) == Some(region) {
        return Ok(Some(key.clone()));
    }
    let Some(related) = related_arn(key_id, region) else { return Ok(None) };
    match store.provider(provider)?.describe(&related) {
        Ok(_) => Ok(Some(KmsKey { provider: provider.clone(), key_id: related })),
        // It is not there; or it is no key for this host to use.
        Err(KmsError::NotFound(_) | KmsError::NotAllowed(_)) => Ok(None),
        Err(e) => Err(e.with_advice_of(provider, &related)),
    }
}

/// Whether the embedded KMS in `region` has this key, as far as the one here knows.
fn is_embedded_there(store: &Store, key: &str, region: &str) -> Result<bool> {
    if store.settings().locality.region == region {
        return Ok(true);
    }
    let kms = embedded(store.root(), store.hardened())?;
    let it = match kms.key(crate::kms::key_ref::anywhere(key)) {
        Ok(found) => found.multi_region,
        Err(KmsError::NotFound(_)) => None,
        Err(e) => return Err(e.into()),
    };
    Ok(it.is_some_and(|it| it.replicas.iter().chain([&it.primary]).any(|other| other.region == region)))
}

/// The key of `region` that `text` means there.
///
/// # Errors
/// `Usage` for a key of another region; and for an id or alias at AWS whose account nothing tells.
fn reference_in(store: &Store, source: &Snapshot, region: &str, text: &str) -> Result<KeyRef> {
    let reference = store.reference(text)?;
    let elsewhere = || Error::new(Kind::Usage, format!("{text} is no key in {region}; name one that is"));
    if reference.provider == ProviderName::Embedded {
        let is_there = is_embedded_there(store, &reference.key, region)?;
        return if is_there { Ok(reference) } else { Err(elsewhere()) };
    }
    match arn_region(&reference.key) {
        Some(its) if its == region => return Ok(reference),
        Some(_) => return Err(elsewhere()),
        None => {}
    }
    let slots = source.keys().iter().flat_map(|key| key.slots());
    let account = slots
        .filter(|slot| slot.provider == ProviderName::Aws.as_str())
        .find_map(|slot| arn_account(&slot.wrapped.key_id).map(str::to_owned));
    let account = account.ok_or_else(|| {
        let message = format!("in which account of {region} {text} is nothing tells; name it by its ARN");
        Error::new(Kind::Usage, message)
    })?;
    let resource = match reference.key.starts_with(ALIAS_PREFIX) {
        true => reference.key.clone(),
        false => format!("key/{}", reference.key),
    };
    Ok(KeyRef { key: format!("arn:aws:kms:{region}:{account}:{resource}"), ..reference })
}

fn is_named(key: &KmsKey, named: &KeyRef) -> bool {
    key.provider == named.provider.as_str() && key.key_id == named.key
}
