//! Locks of a store in a pool, which keep other hosts away: beside each lock of the kernel's, which keeps
//! this host's processes apart, one of the pool's.
//!
//! Who has one says who it is, as a volume's lock file does. A process of this host that is seen to
//! have ended has it no more. Of another host's nobody here can tell: its lock is free when it was
//! not renewed for its time.
#![forbid(unsafe_code)]

use super::{Held, Holder, Purpose};
use crate::base::root::records::{Claim, Pooled, pool_above};
use crate::base::{Context, Error, Kind, Result};
use std::path::Path;
use std::time::{Duration, Instant};

/// How often a lock is taken from processes that have ended, one after the other.
const TRIES: u32 = 8;
/// How often to look whether a lock is free: nothing tells.
const LOOK: Duration = Duration::from_millis(50);
/// How long a lock is waited for that is one for moments: longer than it lasts when its owner is cut off.
const PATIENCE: Duration = Duration::from_secs(75);

/// The lock of what has this path; none if the store does not lie in a pool. If another process has it: who.
pub(super) fn claim(path: &Path, holder: &Holder) -> Result<Option<Result<Claim, Held>>> {
    let Some((pooled, name)) = named(path) else { return Ok(None) };
    take(pooled, name, holder).map(Some)
}

/// Who has the lock of what has this path, on whichever host.
pub(super) fn holder(path: &Path) -> Result<Held> {
    let Some((pooled, name)) = named(path) else { return Ok(Held::Free) };
    let attempt = || format!("ask {} who has {name}", pooled.shown);
    Ok(pooled.records.holder(name).context(attempt)?.map_or(Held::Free, |text| match held_by(Some(&text)) {
        Held::Elsewhere(holder) if has_ended(&holder) => Held::Free,
        held => held,
    }))
}

/// Waits for the lock of what has this path, which others have for moments; none if the store does not lie
/// in a pool.
///
/// # Errors
/// `Busy`, naming the process that has it for longer; those of the pool.
pub(crate) fn await_claim(path: &Path) -> Result<Option<Claim>> {
    let Some((pooled, name)) = named(path) else { return Ok(None) };
    let holder = Holder::this_process(Purpose::Recover, None)?;
    let until = Instant::now() + PATIENCE;
    loop {
        match take(pooled, name, &holder)? {
            Ok(claim) => return Ok(Some(claim)),
            Err(_) if Instant::now() < until => std::thread::sleep(LOOK),
            Err(held) => {
                let who = match held {
                    Held::Elsewhere(holder) => holder.anywhere(),
                    _ => "another process".into(),
                };
                let message = format!("{who} has the lock \"{name}\" of {}; try again", pooled.shown);
                return Err(Error::new(Kind::Busy, message));
            }
        }
    }
}

fn named(path: &Path) -> Option<(&'static Pooled, &str)> {
    let pooled = pool_above(path)?;
    Some((pooled, path.strip_prefix(&pooled.root).ok()?.to_str()?))
}

fn take(pooled: &Pooled, name: &str, holder: &Holder) -> Result<Result<Claim, Held>> {
    let attempt = || format!("take the lock \"{name}\" of {}", pooled.shown);
    let text = serde_json::to_string(holder).expect("strings and numbers");
    let mut held = Held::Unknown;
    for _ in 0..TRIES {
        let who = match Claim::take(pooled, name, &text).context(attempt)? {
            Ok(claim) => return Ok(Ok(claim)),
            Err(who) => who,
        };
        held = held_by(who.as_deref());
        match (&held, who) {
            (Held::Elsewhere(holder), Some(text)) if has_ended(holder) => {
                pooled.records.break_lock(name, &text).context(attempt)?;
            }
            _ => break,
        }
    }
    Ok(Err(held))
}

fn held_by(text: Option<&str>) -> Held {
    text.and_then(|text| serde_json::from_str(text).ok()).map_or(Held::Unknown, Held::Elsewhere)
}

/// Whether it is a process of this host that is seen to have ended.
fn has_ended(holder: &Holder) -> bool {
    holder.has_an_id_of_here() && !holder.is_seen_alive()
}
