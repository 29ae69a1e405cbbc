//! Wrapping the data keys of a volume or a snapshot anew: under another KMS key, or under the newest
//! version of the same one.
//!
//! A helper process asks the KMS and proves the new wrapped key before anybody relies on it: it must unwrap,
//! and to the same data key. Only then is the record replaced: a volume's by whoever has the volume (this
//! process if nobody has it attached, else its host process). Until that one replacement the old wrapped key
//! is there, afterwards the new one.
//!
//! A data key is in the helper's memory alone, and where one KMS has both keys, for the proof alone.

use crate::base::hardened::Hardened;
use crate::base::root::Root;
use crate::base::{Context, Error, Kind, Result, wire};
use crate::catalog::metadata::{KeyOwner, KeyRecord, encryption_context};
use crate::crypt::secret_mem::on_scrubbed_stack;
use crate::crypt::{Dek, wiping_allocator};
use crate::helper;
use crate::helper::failure::WrittenFailure;
use crate::kms::{self, EncryptionContext, Failure, KeyProvider, KeyRef, KeyState, KmsError, WrappedKey};
use serde::{Deserialize, Serialize};
use std::os::unix::net::UnixStream;

/// The hidden subcommand of the helper.
pub const COMMAND: &str = "rewrap-key";
/// The longest request or answer in bytes: a blob of 6144 bytes in hexadecimal and some words.
const MAX_LINE: usize = 32 << 10;

/// What the helper is asked. The context is not in it: it follows from the owner.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    owner: KeyOwner,
    provider: String,
    key_id: String,
    /// Hexadecimal.
    blob: String,
    /// The data key's check value, hexadecimal, if it is known.
    check: Option<String>,
    to_provider: String,
    to_key: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
enum Answer {
    /// Wrapped anew and proved; the blob is hexadecimal.
    Rewrapped {
        key_id: String,
        blob: String,
    },
    Refused(WrittenFailure),
}

/// Has a helper process wrap `old` anew, which has ended when this returns.
pub fn by_helper(
    root: &Root,
    owner: impl Into<KeyOwner>,
    old: &KeyRecord,
    to: &KeyRef,
) -> Result<WrappedKey> {
    let request = Request {
        owner: owner.into(),
        provider: old.provider.clone(),
        key_id: old.wrapped.key_id.clone(),
        blob: hex::encode(&old.wrapped.blob),
        check: old.check().map(hex::encode),
        to_provider: to.provider.as_str().into(),
        to_key: to.key.clone(),
    };
    let (socket, mut child) = helper::spawn(root, COMMAND)?;
    let said = ask(&socket, &request);
    drop(socket);
    let status = child.wait().context(|| "wait for the rewrap helper")?;
    match said.context(|| format!("the rewrap helper ({status})"))? {
        Answer::Rewrapped { key_id, blob } => {
            let blob = hex::decode(&blob).map_err(|e| Error::of(Kind::Other, e))?;
            Ok(WrappedKey { key_id, blob })
        }
        Answer::Refused(failure) => Err(Failure::from(failure).error),
    }
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
    let socket = helper::begin()?;
    // The key passes the stack too, in other people's frames.
    let new = on_scrubbed_stack(|| receive(&socket).and_then(|request| answer(hardened, root, &request)));
    let answer = match new {
        Ok(WrappedKey { key_id, blob }) => Answer::Rewrapped { key_id, blob: hex::encode(blob) },
        Err(e) => Answer::Refused(Failure::from(e).into()),
    };
    wire::say(&socket, &answer).context(|| "answer who asked for a new wrapped key")
}

fn receive(socket: &UnixStream) -> Result<Request> {
    let attempt = || "take a request: this command is started by \"sealblk volume rewrap\" alone";
    let line = wire::hear(socket, MAX_LINE).context(attempt)?.unwrap_or_default();
    serde_json::from_slice(&line).map_err(|e| Error::of(Kind::Usage, e)).context(attempt)
}

fn answer(hardened: Hardened, root: &Root, request: &Request) -> Result<WrappedKey> {
    let unhex = |text: &String| hex::decode(text).map_err(|e| Error::of(Kind::Usage, e));
    let old = WrappedKey { key_id: request.key_id.clone(), blob: unhex(&request.blob)? };
    let check = request.check.as_ref().map(unhex).transpose()?;
    let to = kms::open_provider(hardened, root, &request.to_provider)?;
    let elsewhere = (request.provider != request.to_provider)
        .then(|| kms::open_provider(hardened, root, &request.provider))
        .transpose()?;
    let job = Job {
        from: elsewhere.as_deref(),
        to: &*to,
        old: &old,
        key: &request.to_key,
        context: &encryption_context(request.owner),
    };
    let new = job.wrap()?;
    job.prove(&new, check.as_deref()).map(|()| new)
}

/// A data key, the KMS that wrapped it if that is another than the one that shall, and that one with its key.
struct Job<'a> {
    from: Option<&'a dyn KeyProvider>,
    to: &'a dyn KeyProvider,
    old: &'a WrappedKey,
    key: &'a str,
    context: &'a EncryptionContext,
}

impl Job<'_> {
    fn wrap(&self) -> Result<WrappedKey> {
        let Some(from) = self.from else {
            let new = self.to.rewrap(self.old, self.context, self.key, self.context);
            return new.map_err(|e| self.refused(e));
        };
        let data_key = from.decrypt(self.old, self.context).map_err(|e| self.refused_old(e))?;
        self.to
            .wrap(self.key, &data_key, self.context)
            .map_err(|e| e.with_advice_of(self.to.name(), self.key))
    }

    /// Fails unless the new wrapped key unwraps to the data key whose check value is `check`; without one, to
    /// what the old one unwraps to.
    fn prove(&self, new: &WrappedKey, check: Option<&[u8]>) -> Result<()> {
        let attempt =
            || format!("the new wrapped key, by {}, does not unwrap; the old one stays in place", new.key_id);
        let found =
            self.to.decrypt(new, self.context).map_err(|e| e.with_advice_of(self.to.name(), &new.key_id));
        let found = check_value(&found.context(attempt)?).context(attempt)?;
        let same = match check {
            Some(check) => check == found,
            None => {
                let old = self.from.unwrap_or(self.to).decrypt(self.old, self.context);
                check_value(&old.map_err(|e| self.refused_old(e))?)? == found
            }
        };
        if same {
            return Ok(());
        }
        let message = "the wrapped data key unwraps to another key than the one the volume was written with; \
                       it belongs to another volume or was replaced; nothing was changed";
        Err(Error::new(Kind::Corrupt, message))
    }

    /// Of two keys of one KMS. If one is in a state in which it does nothing, the refusal does not say
    /// which: the KMS is asked.
    fn refused(&self, e: KmsError) -> Error {
        let old = &self.old.key_id;
        let is_state = matches!(e, KmsError::Disabled(_) | KmsError::PendingDeletion(_));
        let is_old = is_state && self.to.describe(old).is_ok_and(|key| key.state != KeyState::Enabled);
        e.with_advice_of(self.to.name(), if is_old { old } else { self.key })
    }

    fn refused_old(&self, e: KmsError) -> Error {
        e.with_advice_of(self.from.unwrap_or(self.to).name(), &self.old.key_id)
    }
}

fn check_value(data_key: &[u8]) -> Result<[u8; 16]> {
    Ok(Dek::from_bytes(data_key)?.check_value())
}

#[cfg(test)]
mod tests;
