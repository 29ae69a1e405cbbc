//! A change of an entry: noted before it is made, and settled afterwards.
#![forbid(unsafe_code)]

use super::entry::Entry;
use super::marks::write_mark;
use super::{Doubt, Facts, Ledger};
use crate::base::root::records::Claim;
use crate::base::root::replace_file;
use crate::base::{Context, Error, Kind, Result, locks};
use std::fs::File;
use std::time::{Duration, Instant};

/// How long another command is waited for that is changing the same record.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often to look whether it is done: nothing tells.
const LOOK: Duration = Duration::from_millis(5);

/// A record whose state is being changed: its entry is locked.
#[must_use = "the entry is locked until this is dropped"]
pub(crate) struct Change<'a, F> {
    pub(super) ledger: &'a Ledger,
    pub(super) id: String,
    /// Of a store in a pool: what keeps other hosts away.
    pub(super) claim: Option<Claim>,
    pub(super) mark: File,
    pub(super) number: u64,
    pub(super) accepted: Vec<F>,
}

impl<F: Facts> Change<'_, F> {
    /// Lists, durably, a state that the record may have from now on besides those that it may have.
    pub(crate) fn expect(&mut self, next: F) -> Result<()> {
        if self.accepted.contains(&next) {
            return Ok(());
        }
        let mut accepted = std::mem::take(&mut self.accepted);
        accepted.push(next);
        self.replace(accepted)
    }

    /// Lists, durably, what the record says now, and nothing else.
    ///
    /// # Errors
    /// `Corrupt` for what was not listed before.
    pub(crate) fn settle(&mut self, now: F) -> Result<()> {
        if self.accepted.as_slice() == std::slice::from_ref(&now) {
            return Ok(());
        }
        if self.accepted.iter().all(|accepted| accepted.difference(&now).is_some()) {
            let what = self.accepted.first().and_then(|accepted| accepted.difference(&now));
            return Err(Doubt::Differs(what.unwrap_or_default()).refuse(&self.id));
        }
        self.replace(vec![now])
    }

    pub(super) fn replace(&mut self, accepted: Vec<F>) -> Result<()> {
        let key = self.ledger.known_key()?;
        let number = self.number.checked_add(1).ok_or_else(|| {
            Error::new(Kind::Corrupt, format!("{}: the number {} has no next", self.id, self.number))
        })?;
        let next = Entry { number, accepted };
        let bytes = next.to_bytes(&self.id, &key);
        replace_file(&self.ledger.entry_path(&self.id), &bytes)?;
        (self.number, self.accepted) = (number, next.accepted);
        write_mark(&self.mark, number).context(|| format!("write the mark of {}", self.id))
    }

    pub(super) fn take_lock(&self) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        while !locks::try_lock(&self.mark, locks::Kind::Exclusive, locks::Bytes::ALL)
            .context(|| format!("lock the mark of {}", self.id))?
        {
            if Instant::now() >= until {
                return Err(Error::new(Kind::Busy, format!("another command is changing {}", self.id)));
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    }
}
