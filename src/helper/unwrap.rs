//! The unwrap helper: a process of its own that talks to the KMS, hands the data key over and is gone.
//!
//! The two sides share a socket, the helper's standard input. The host process sends what is to be unwrapped
//! and a descriptor of secret memory; the helper fills that and answers with a line of JSON. Network code and
//! credentials are in the helper's memory only, and the host process has no part in what becomes of it. What
//! the helper frees is zeroed, by its allocator.

use crate::base::child;
use crate::base::hardened::Hardened;
use crate::base::root::Root;
use crate::base::wire::{self, Lines};
use crate::base::{Context, Error, Kind, Result};
use crate::catalog::layout::written::WrittenSlot;
use crate::catalog::metadata::{KeyOwner, KeyRecord, encryption_context};
use crate::catalog::rekey::passed_for;
use crate::catalog::slots::{KeySlot, Unwrapped};
use crate::catalog::{LayerId, VolumeId};
use crate::config::Settings;
use crate::crypt::secret_mem::{SecretFd, on_scrubbed_stack};
use crate::crypt::{BackupKeys, Dek, wiping_allocator};
use crate::helper::failure::WrittenFailure;
use crate::helper::slots::{Refused, ask_slots};
use crate::kms::patience::Patience;
use crate::kms::{self, EncryptionContext, Failure, KmsError};
use serde::{Deserialize, Serialize};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;
use zeroize::Zeroizing;

/// The hidden subcommand.
pub const COMMAND: &str = "unwrap";
/// The longest request or answer in bytes: all slots of a data key and one of another, as
/// long as they can be.
const MAX_LINE: usize = 256 << 10;
/// How long the helper may take beside the KMS's time before it is given up.
const MARGIN: Duration = Duration::from_secs(30);

/// What is to be unwrapped. The context is not in it: it follows from whose key it is.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    owner: KeyOwner,
    wrapped: WrittenSlot,
    /// Of the grant to decrypt by.
    grant_token: Option<String>,
    /// For how long a KMS that cannot be reached is asked again; the settings' patience if nothing is said.
    patience_ms: Option<u64>,
    /// Whom it is passed on to; without it, the memory is to hold the key as it is.
    under: Option<Under>,
    /// What is wanted in place of the key.
    derive: Option<Derive>,
}

/// The memory is to hold not the data key, but what [`BackupKeys`] are made of.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Derive {
    /// The volume whose seal key is among them.
    volume: VolumeId,
    /// The data key's check value, hexadecimal.
    check: Option<String>,
}

/// Who may read a data key that is passed on: who has another data key of the volume.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Under {
    wrapped: WrittenSlot,
    /// That data key's check value, hexadecimal, if it is known.
    check: Option<String>,
    /// The layer that is made for the new key.
    layer: LayerId,
    /// The other slots that the new key is going to have.
    also: Vec<WrittenSlot>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
enum Answer {
    /// The secret memory holds the key.
    Unwrapped,
    /// The KMS, or something on the way to it, refused.
    Refused(WrittenFailure),
}

/// Unwraps a data key of a volume or snapshot by a helper process, which has ended when this returns;
/// without a grant, with the settings' patience. Where several KMS keys wrap it, the next one is asked
/// if one does not give it.
///
/// # Errors
/// The KMS's refusal, or what went wrong on the way to it; of several, the answer of each.
pub fn unwrap(
    hardened: Hardened,
    root: &Root,
    owner: impl Into<KeyOwner>,
    key: &KeyRecord,
) -> Result<Unwrapped, Failure> {
    let (settings, owner) = (Settings::load(root)?, owner.into());
    let given = ask_slots(&settings, owner, key, |slot, patience| {
        Ok(unwrap_slot(hardened, root, owner, (key, slot), None, patience)?)
    })?;
    Ok(Unwrapped { dek: Arc::new(given.what), by: key.slots()[given.slot].kms_key() })
}

/// Unwraps one slot of a data key of a volume or snapshot by a helper process, by the grant whose token this
/// is, if there is one.
///
/// # Errors
/// As for [`unwrap`]; `Corrupt` where another slot could be right, and this one unwraps to another data key.
pub fn unwrap_slot(
    _: Hardened,
    root: &Root,
    owner: KeyOwner,
    (key, slot): (&KeyRecord, usize),
    token: Option<&str>,
    patience: Patience,
) -> Result<Dek, Failure> {
    let (slot, secret) = (&key.slots()[slot], SecretFd::create(Dek::LEN)?);
    let request = Request::new(owner, slot, token, patience);
    fill_by_helper(root, &secret, &request, patience.longest_call())?;
    let dek = Dek::from_secret(secret.map()?)?;
    let is_another = key.check().is_some_and(|check| check != dek.check_value());
    // Of a data key's only slot, the seal says so.
    if is_another && key.slots().len() > 1 {
        let e = Error::new(Kind::Corrupt, "this wrapped copy unwraps to another data key; it was replaced");
        return Err(Failure { key_id: Some(slot.wrapped.key_id.clone()), ..e.into() });
    }
    Ok(dek)
}

/// Unwraps the `new` data key of a volume into `secret`, [`Dek::PASSED_LEN`] bytes, so that only a process
/// can read it there that has the data key which `present` is. Neither is ever in this process.
///
/// # Errors
/// As for [`unwrap`].
pub fn unwrap_for_holder(
    _: Hardened,
    root: &Root,
    volume: VolumeId,
    new: (&KeyRecord, LayerId),
    present: &KeyRecord,
    secret: &SecretFd,
) -> Result<(), Failure> {
    let (settings, (new, layer)) = (Settings::load(root)?, new);
    // Its first KMS key has just made it.
    let (first, also) = (new.first(), &new.slots()[1..]);
    let ask = |slot: usize, patience: Patience| {
        let present_slot = &present.slots()[slot];
        let under = Under {
            wrapped: present_slot.into(),
            check: present.check().map(hex::encode),
            layer,
            also: also.iter().map(WrittenSlot::from).collect(),
        };
        let request = Request { under: Some(under), ..Request::new(volume.into(), first, None, patience) };
        fill_by_helper(root, secret, &request, 2 * patience.longest_call()).map_err(|e| {
            let is_of_new =
                e.key_id.as_ref() == Some(&first.wrapped.key_id) && !present_slot.is_by(&first.kms_key());
            if is_of_new { Refused::Everywhere(e) } else { Refused::Here(e) }
        })
    };
    ask_slots(&settings, volume.into(), present, ask).map(drop)
}

/// The keys of names and manifests that follow from a data key of a volume or snapshot, whose record says
/// which `volume` it is of. A helper process unwraps the data key, which is never in this process. Where
/// several KMS keys wrap it, the next one is asked if one does not give it.
///
/// # Errors
/// As for [`unwrap`]; `Corrupt` for a data key that is not the one that the record was sealed with.
pub fn backup_keys(
    _: Hardened,
    root: &Root,
    owner: impl Into<KeyOwner>,
    key: &KeyRecord,
    volume: VolumeId,
) -> Result<BackupKeys, Failure> {
    let (settings, owner) = (Settings::load(root)?, owner.into());
    let given = ask_slots(&settings, owner, key, |slot, patience| {
        let derive = Derive { volume, check: key.check().map(hex::encode) };
        let request =
            Request { derive: Some(derive), ..Request::new(owner, &key.slots()[slot], None, patience) };
        let secret = SecretFd::create(BackupKeys::LEN)?;
        fill_by_helper(root, &secret, &request, patience.longest_call())?;
        Ok(BackupKeys::from_secret(secret.map()?)?)
    })?;
    Ok(given.what)
}

impl Request {
    fn new(owner: KeyOwner, slot: &KeySlot, token: Option<&str>, patience: Patience) -> Self {
        Request {
            owner,
            wrapped: slot.into(),
            grant_token: token.map(str::to_owned),
            patience_ms: Some(patience.0.as_millis() as u64),
            under: None,
            derive: None,
        }
    }
}

fn fill_by_helper(root: &Root, secret: &SecretFd, request: &Request, time: Duration) -> Result<(), Failure> {
    log::debug!("the data key comes by {:?}", secret.kind());
    match run_helper(root, secret, request, time + MARGIN)? {
        Answer::Unwrapped => Ok(()),
        Answer::Refused(failure) => Err(failure.into()),
    }
}

fn run_helper(root: &Root, secret: &SecretFd, request: &Request, time: Duration) -> Result<Answer> {
    let (socket, mut child) = child::spawn(root, COMMAND)?;
    let answer = socket.set_read_timeout(Some(time)).map_err(Error::from);
    let answer = answer.and_then(|()| ask(&socket, secret, request));
    if answer.is_err() {
        // It did not keep to the protocol, or did not answer: whatever it is doing, it shall stop.
        let _ = child.kill();
    }
    let status = child.wait().context(|| "wait for the unwrap helper")?;
    answer.map_err(|e| e.context(format!("the unwrap helper ({status})")))
}

fn ask(socket: &UnixStream, secret: &SecretFd, request: &Request) -> Result<Answer> {
    wire::say_with(socket, request, secret.as_fd())?;
    let answer = wire::hear(socket, MAX_LINE)?.unwrap_or_default();
    serde_json::from_slice(&answer)
        .map_err(|e| Error::of(Kind::Other, e).context("its answer is not readable"))
}

/// The helper's side: the whole life of the process.
///
/// # Errors
/// Only when the other side could not even be told.
pub fn help(hardened: Hardened, root: &Root) -> Result<()> {
    wiping_allocator::wipe_from_now_on();
    let socket = child::begin()?;
    let request = receive(&socket).map_err(Failure::from);
    // The key passes the stack too, in other people's frames.
    let filled =
        on_scrubbed_stack(|| request.and_then(|(request, secret)| fill(hardened, root, request, secret)));
    let answer = match filled {
        Ok(()) => Answer::Unwrapped,
        Err(failure) => Answer::Refused(failure.into()),
    };
    wire::say(&socket, &answer).context(|| "answer the host process")
}

fn receive(socket: &UnixStream) -> Result<(Request, SecretFd)> {
    let attempt = || "take a request: this command is started by \"sealblk attach\" alone";
    let mut lines = Lines::of_at_most(MAX_LINE);
    let bytes = lines.next(socket).context(attempt)?.unwrap_or_default();
    let request = serde_json::from_slice(&bytes).map_err(|e| Error::of(Kind::Usage, e));
    let fd =
        lines.take_descriptor().ok_or_else(|| Error::new(Kind::Usage, "no memory came with the request"));
    Ok((
        request.map_err(|e| e.context(attempt()))?,
        SecretFd::from_fd(fd.map_err(|e| e.context(attempt()))?)?,
    ))
}

fn fill(hardened: Hardened, root: &Root, request: Request, secret: SecretFd) -> Result<(), Failure> {
    let slot = parse(&request.wrapped)?;
    let patience = request.patience_ms.map(|ms| Patience(Duration::from_millis(ms)));
    let decrypt =
        |slot: &KeySlot, token: Option<&str>| decrypt(hardened, root, request.owner, slot, token, patience);
    let key = decrypt(&slot, request.grant_token.as_deref())?;
    let (expected, room) = match (&request.under, &request.derive) {
        (None, None) => (secret.len(), secret.len()),
        (Some(_), _) => (Dek::LEN, Dek::PASSED_LEN),
        (None, Some(_)) => (Dek::LEN, BackupKeys::LEN),
    };
    if (key.len(), secret.len()) != (expected, room) {
        let message = format!("the wrapped data key has {} bytes instead of {expected}", key.len());
        return Err(Error::new(Kind::Corrupt, message).into());
    }
    if let Some(Derive { volume, check }) = &request.derive {
        let dek = Dek::from_bytes(&key)?;
        check_is(&dek, check.as_ref(), "the snapshot")?;
        let mut memory = secret.map()?;
        dek.write_backup_keys(&volume.to_string(), memory.as_mut_slice());
        memory.hand_over();
        return Ok(());
    }
    let present = match &request.under {
        None => None,
        Some(under) => {
            let slot = parse(&under.wrapped)?;
            let present = Dek::from_bytes(&decrypt(&slot, None)?)?;
            check_is(&present, under.check.as_ref(), "the volume")?;
            Some((present, under))
        }
    };
    let mut memory = secret.map()?;
    match (present, request.owner) {
        (None, _) => memory.as_mut_slice().copy_from_slice(&key),
        (Some((present, under)), KeyOwner::Volume(volume)) => {
            let also = under.also.iter().map(parse);
            let slots: Vec<KeySlot> = std::iter::once(Ok(slot)).chain(also).collect::<Result<_>>()?;
            let context = passed_for(volume, under.layer, &slots);
            present.pass_key()?.pass(&key, &context, memory.as_mut_slice());
        }
        (Some(_), KeyOwner::Snapshot(_)) => {
            return Err(Error::new(Kind::Usage, "nobody has a snapshot attached").into());
        }
    }
    memory.hand_over();
    Ok(())
}

/// Fails unless this is the data key with the check value that is known of it, if one is.
fn check_is(dek: &Dek, check: Option<&String>, whose: &str) -> Result<()> {
    match check {
        Some(check) if *check != hex::encode(dek.check_value()) => Err(Error::new(
            Kind::Corrupt,
            format!(
                "the wrapped data key of {whose} unwraps to another key than the one that it was written \
                 with; it was replaced"
            ),
        )),
        _ => Ok(()),
    }
}

fn parse(written: &WrittenSlot) -> Result<KeySlot> {
    KeySlot::try_from(written.clone()).map_err(|problem| Error::new(Kind::Corrupt, problem))
}

fn decrypt(
    hardened: Hardened,
    root: &Root,
    owner: KeyOwner,
    KeySlot { provider, wrapped }: &KeySlot,
    token: Option<&str>,
    patience: Option<Patience>,
) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let context: EncryptionContext = encryption_context(owner);
    let refused = |e: KmsError| Failure::kms(e, provider, &wrapped.key_id);
    let opened = kms::open_patient_provider(hardened, root, provider, patience).map_err(refused)?;
    let key = match token {
        Some(token) => opened.decrypt_granted(wrapped, &context, token),
        None => opened.decrypt(wrapped, &context),
    };
    key.map_err(refused)
}
