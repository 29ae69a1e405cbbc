//! Wrapping the data keys of a volume or a snapshot anew: under another KMS key, or under the newest
//! version of the same one.
//!
//! A helper process asks the KMS and proves the new wrapped key before anybody relies on it: it must unwrap,
//! and to the same data key. Only then is the record replaced: a volume's by whoever has the volume (this
//! process if nobody has it attached, else its host process). Until that one replacement the old wrapped key
//! is there, afterwards the new one.
//!
//! A data key is in the helper's memory alone, and where one KMS has both keys, for the proof alone.

use crate::base::child;
use crate::base::hardened::Hardened;
use crate::base::root::Root;
use crate::base::{Context, Error, Kind, Result, wire};
use crate::catalog::layout::written::WrittenSlot;
use crate::catalog::metadata::{KeyOwner, KeyRecord, encryption_context};
use crate::catalog::slots::KeySlot;
use crate::config::Settings;
use crate::crypt::secret_mem::on_scrubbed_stack;
use crate::crypt::{Dek, wiping_allocator};
use crate::helper::failure::WrittenFailure;
use crate::helper::slots::{Refused, ask_each, ask_slots, asked};
use crate::kms::key_ref::arn_region;
use crate::kms::patience::Patience;
use crate::kms::{
    self, EncryptionContext, Failure, KeyProvider, KeyRef, KmsError, KmsKey, ProviderName, WrappedKey,
};
use serde::{Deserialize, Serialize};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// The hidden subcommand of the helper.
pub const COMMAND: &str = "rewrap-key";
/// The longest request or answer in bytes: a blob of 6144 bytes in hexadecimal and some words.
const MAX_LINE: usize = 32 << 10;

/// What the helper is asked. The context is not in it: it follows from the owner.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    owner: KeyOwner,
    /// Whose key it is going to be; the same one's, if nothing is said.
    to_owner: Option<KeyOwner>,
    /// The wrapped copy of the data key that there is.
    old: WrittenSlot,
    /// The data key's check value, hexadecimal, if it is known.
    check: Option<String>,
    /// The KMS key that shall wrap it; without one, the helper looks whether `old` unwraps to the data key.
    to: Option<Target>,
    /// For how long a KMS that cannot be reached is asked again.
    patience_ms: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Target {
    provider: String,
    key: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
enum Answer {
    /// Wrapped so, and proved; or what there was is proved.
    Proved(WrittenSlot),
    Refused(WrittenFailure),
}

/// Has a helper process wrap a data key by the KMS key `to`, out of whichever of its slots can be used. The
/// slot `replaced`, if the new one is to take the place of one, is tried first; otherwise those that the KMS
/// of `to` can wrap anew by itself (ReEncrypt). The helper has ended when this returns.
///
/// # Errors
/// The KMS's refusal, or what went wrong on the way to it; of several slots, the answer of each.
pub fn by_helper(
    root: &Root,
    settings: &Settings,
    owner: impl Into<KeyOwner>,
    key: &KeyRecord,
    replaced: Option<usize>,
    to: &KeyRef,
) -> Result<KeySlot, Failure> {
    wrap_by_helper(root, settings, (owner.into(), None), key, replaced, to)
}

/// As [`by_helper`], for `to_owner`: a data key of `owner`'s that becomes another's as well.
///
/// # Errors
/// As [`by_helper`].
pub fn for_another_by_helper(
    root: &Root,
    settings: &Settings,
    owner: impl Into<KeyOwner>,
    to_owner: impl Into<KeyOwner>,
    key: &KeyRecord,
    to: &KeyRef,
) -> Result<KeySlot, Failure> {
    wrap_by_helper(root, settings, (owner.into(), Some(to_owner.into())), key, None, to)
}

fn wrap_by_helper(
    root: &Root,
    settings: &Settings,
    owners: (KeyOwner, Option<KeyOwner>),
    key: &KeyRecord,
    replaced: Option<usize>,
    to: &KeyRef,
) -> Result<KeySlot, Failure> {
    let target = || Target { provider: to.provider.as_str().into(), key: to.key.clone() };
    let is_near = |slot: &KeySlot| {
        let KmsKey { provider, key_id } = slot.kms_key();
        provider == to.provider.as_str() && is_one_kms(&provider, &key_id, &to.key)
    };
    let mut order = asked(key, settings);
    order.sort_by_key(|&n| (replaced != Some(n), !is_near(&key.slots()[n])));
    each_slot(root, settings, owners, key, order, target)
}

/// Has helper processes look whether a data key can be unwrapped by one of its slots, and is the right one.
/// Each has ended when this returns.
///
/// # Errors
/// As [`by_helper`].
pub fn prove_by_helper(
    root: &Root,
    settings: &Settings,
    owner: impl Into<KeyOwner>,
    key: &KeyRecord,
) -> Result<(), Failure> {
    let owner = owner.into();
    let ask = |slot: usize, patience: Patience| {
        run_helper(root, &Request::new(owner, key, slot, None, patience)).map_err(Refused::Here)
    };
    ask_slots(settings, owner, key, ask).map(drop)
}

fn each_slot(
    root: &Root,
    settings: &Settings,
    (owner, to_owner): (KeyOwner, Option<KeyOwner>),
    key: &KeyRecord,
    order: Vec<usize>,
    target: impl Fn() -> Target,
) -> Result<KeySlot, Failure> {
    let keys = key.kms_keys();
    let ask = |slot: usize, patience: Patience| {
        let request = Request { to_owner, ..Request::new(owner, key, slot, Some(target()), patience) };
        run_helper(root, &request).map_err(|e| {
            // What is in the way of the new KMS key, no other slot removes. One that was not reached is asked
            // again.
            let is_of_slot = e.key_id.as_ref().is_none_or(|id| *id == keys[slot].key_id);
            match is_of_slot || e.error.kind() == Kind::KmsUnavailable {
                true => Refused::Here(e),
                false => Refused::Everywhere(e),
            }
        })
    };
    Ok(ask_each(&owner, &keys, order, Patience(settings.kms_patience), ask)?.what)
}

impl Request {
    fn new(owner: KeyOwner, key: &KeyRecord, slot: usize, to: Option<Target>, patience: Patience) -> Self {
        let check = key.check().map(hex::encode);
        Request {
            owner,
            to_owner: None,
            old: (&key.slots()[slot]).into(),
            check,
            to,
            patience_ms: patience.0.as_millis() as u64,
        }
    }
}

fn run_helper(root: &Root, request: &Request) -> Result<KeySlot, Failure> {
    let (socket, mut child) = child::spawn(root, COMMAND)?;
    let said = ask(&socket, request);
    drop(socket);
    let status = child.wait().context(|| "wait for the rewrap helper")?;
    match said.context(|| format!("the rewrap helper ({status})"))? {
        Answer::Proved(slot) => Ok(parse(slot)?),
        Answer::Refused(failure) => Err(failure.into()),
    }
}

fn parse(written: WrittenSlot) -> Result<KeySlot> {
    KeySlot::try_from(written).map_err(|problem| Error::new(Kind::Usage, problem))
}

/// Whether one KMS has both keys, so that it can wrap a data key anew by itself: AWS KMS has another one in
/// each region. `key` may be no ARN, and then says nothing of a region.
fn is_one_kms(provider: &str, key_id: &str, key: &str) -> bool {
    let regions = (arn_region(key_id), arn_region(key));
    provider != ProviderName::Aws.as_str() || regions.1.is_none() || regions.0 == regions.1
}

fn ask(socket: &UnixStream, request: &Request) -> Result<Answer> {
    wire::say(socket, request)?;
    let answer = wire::hear(socket, MAX_LINE)?.unwrap_or_default();
    serde_json::from_slice(&answer)
        .map_err(|e| Error::of(Kind::Other, e).context("its answer is not readable"))
}

/// The helper's side: the whole life of the process. What it frees is zeroed, by its allocator.
///
/// # Errors
/// Only when the answer could not be given.
pub fn help(hardened: Hardened, root: &Root) -> Result<()> {
    wiping_allocator::wipe_from_now_on();
    let socket = child::begin()?;
    // The key passes the stack too, in other people's frames.
    let new = on_scrubbed_stack(|| answer(hardened, root, receive(&socket)?));
    let answer = match new {
        Ok(slot) => Answer::Proved((&slot).into()),
        Err(e) => Answer::Refused(e.into()),
    };
    wire::say(&socket, &answer).context(|| "answer who asked for a wrapped key")
}

fn receive(socket: &UnixStream) -> Result<Request> {
    let attempt = || "take a request: this command is started by \"sealblk volume rewrap\" alone";
    let line = wire::hear(socket, MAX_LINE).context(attempt)?.unwrap_or_default();
    serde_json::from_slice(&line).map_err(|e| Error::of(Kind::Usage, e)).context(attempt)
}

fn answer(hardened: Hardened, root: &Root, request: Request) -> Result<KeySlot, Failure> {
    let check = request.check.as_ref().map(hex::decode).transpose().map_err(|e| Error::of(Kind::Usage, e))?;
    let (old, patience) = (parse(request.old)?, Some(Patience(Duration::from_millis(request.patience_ms))));
    let open = |provider: &str, key: &str| {
        let opened = kms::open_patient_provider(hardened, root, provider, patience);
        opened.map_err(|e| Failure::kms(e, provider, key))
    };
    let context = &encryption_context(request.owner);
    let to_context = &encryption_context(request.to_owner.unwrap_or(request.owner));
    let Some(Target { provider, key }) = request.to else {
        let at = open(&old.provider, &old.wrapped.key_id)?;
        let job =
            Job { from: None, to: &*at, old: &old.wrapped, key: &old.wrapped.key_id, context, to_context };
        let data_key = at.decrypt(&old.wrapped, context).map_err(|e| job.refused_old(e))?;
        let found = check_value(&data_key)?;
        return if check.is_none_or(|check| check == found) {
            Ok(old)
        } else {
            Err(another_data_key().into())
        };
    };
    let to = open(&provider, &key)?;
    let is_one_kms = old.provider == provider && {
        // In which region an alias or an id is, its KMS tells.
        let is_told = provider == ProviderName::Aws.as_str() && arn_region(&key).is_none();
        let told = is_told.then(|| to.describe(&key).ok()).flatten();
        let key = told.map_or_else(|| key.clone(), |described| described.key_id);
        is_one_kms(&provider, &old.wrapped.key_id, &key)
    };
    let elsewhere = (!is_one_kms).then(|| open(&old.provider, &old.wrapped.key_id)).transpose()?;
    let job = Job { from: elsewhere.as_deref(), to: &*to, old: &old.wrapped, key: &key, context, to_context };
    let new = job.wrap()?;
    job.prove(&new, check.as_deref())?;
    Ok(KeySlot::new(provider, new))
}

/// A data key, the KMS that wrapped it if that is another than the one that shall, and that one with its key.
struct Job<'a> {
    from: Option<&'a dyn KeyProvider>,
    to: &'a dyn KeyProvider,
    old: &'a WrappedKey,
    key: &'a str,
    context: &'a EncryptionContext,
    /// That of the new wrapped key.
    to_context: &'a EncryptionContext,
}

impl Job<'_> {
    fn wrap(&self) -> Result<WrappedKey, Failure> {
        let Some(from) = self.from else {
            let new = self.to.rewrap(self.old, self.context, self.key, self.to_context);
            return new.map_err(|e| self.refused(e));
        };
        let data_key = from.decrypt(self.old, self.context).map_err(|e| self.refused_old(e))?;
        self.to.wrap(self.key, &data_key, self.to_context).map_err(|e| self.refused_new(e))
    }

    /// Fails unless the new wrapped key unwraps to the data key whose check value is `check`; without one, to
    /// what the old one unwraps to.
    fn prove(&self, new: &WrappedKey, check: Option<&[u8]>) -> Result<(), Failure> {
        let attempt =
            || format!("the new wrapped key, by {}, does not unwrap; the old one stays in place", new.key_id);
        let found =
            self.to.decrypt(new, self.to_context).map_err(|e| self.refused_new(e).context(attempt()))?;
        let found = check_value(&found).context(attempt)?;
        let same = match check {
            Some(check) => check == found,
            None => {
                let old = self.from.unwrap_or(self.to).decrypt(self.old, self.context);
                check_value(&old.map_err(|e| self.refused_old(e))?)? == found
            }
        };
        if same { Ok(()) } else { Err(another_data_key().into()) }
    }

    /// Of two keys of one KMS, the refusal does not say which it is about: the KMS is asked.
    fn refused(&self, e: KmsError) -> Failure {
        let is_in_the_way = |key: &str| self.to.describe(key).map_or(true, |key| !key.state.is_usable());
        let is_old = match &e {
            KmsError::Disabled(_) | KmsError::PendingDeletion(_) | KmsError::PendingImport(_) => {
                self.to.describe(&self.old.key_id).is_ok_and(|key| !key.state.is_usable())
            }
            KmsError::InvalidCiphertext | KmsError::IncorrectKey(_) => true,
            KmsError::NotFound(_) | KmsError::AccessDenied(_) | KmsError::NotAllowed(_) => {
                is_in_the_way(&self.old.key_id) && !is_in_the_way(self.key)
            }
            _ => false,
        };
        if is_old { self.refused_old(e) } else { self.refused_new(e) }
    }

    fn refused_old(&self, e: KmsError) -> Failure {
        Failure::kms(e, self.from.unwrap_or(self.to).name(), &self.old.key_id)
    }

    fn refused_new(&self, e: KmsError) -> Failure {
        Failure::kms(e, self.to.name(), self.key)
    }
}

fn another_data_key() -> Error {
    let message = "the wrapped data key unwraps to another key than the one the volume was written with; it \
                   belongs to another volume or was replaced; nothing was changed";
    Error::new(Kind::Corrupt, message)
}

fn check_value(data_key: &[u8]) -> Result<[u8; 16]> {
    Ok(Dek::from_bytes(data_key)?.check_value())
}

#[cfg(test)]
mod tests;
