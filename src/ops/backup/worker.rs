//! The process of a step: what it is told to do, and how it says what came of it ([`super::step`]).

use super::step::{Came, LOOK, MAX_LINE, Said, Step};
use super::{kms_log, pull, push, receive, restore};
use crate::base::child;
use crate::base::wire::{self, Lines};
use crate::base::{Context, Error, Kind, Result};
use crate::crypt::wiping_allocator;
use crate::disk::transfer::Watch;
use crate::ops::Store;
use std::time::Instant;

/// The process's side: its whole life.
///
/// # Errors
/// Only when the other side could not even be told.
pub fn help(store: &Store) -> Result<()> {
    let socket = child::begin()?;
    let attempt = || "take a request: this command is started by \"sealblk backup\" and its kin alone";
    let line = Lines::of_at_most(MAX_LINE).next(&socket).context(attempt)?.unwrap_or_default();
    let step = serde_json::from_slice(&line).map_err(|e| Error::of(Kind::Usage, e).context(attempt()))?;
    let mut told: Option<Instant> = None;
    let mut watch = |done: u64, total: u64| {
        if told.is_none_or(|told| told.elapsed() >= LOOK) {
            told = Some(Instant::now());
            wire::say(&socket, &Said::Progress(done, total))?;
        }
        Ok(())
    };
    let said = match run(store, step, &mut watch) {
        Ok(came) => Said::Came(Box::new(came)),
        Err(e) => Said::Failed(e.kind().name().to_owned(), e.to_string().chars().take(8000).collect()),
    };
    wire::say(&socket, &said).context(|| "say what came of it")
}

fn run(store: &Store, step: Step, watch: Watch<'_>) -> Result<Came> {
    Ok(match step {
        Step::Push(snapshot, target) => Came::Pushed(push::push(store, snapshot, &target, watch)?),
        Step::Pull(snapshot, target, wanted) => {
            Came::Pulled(pull::pull(store, Some(snapshot), &target, &wanted, watch)?.id())
        }
        Step::Make(snapshot) => Came::Made(restore::make(store, snapshot)?),
        Step::Try(volume) => {
            restore::open_and_delete(store, volume)?;
            Came::Done
        }
        Step::Accept(pulled, source, target) => match receive::accept(store, pulled, source, &target)? {
            true => Came::Done,
            false => Came::CalledOff,
        },
        Step::Received(last, target) => Came::IsReceived(receive::is_received(store, last, &target)?),
        Step::Kms(kms, target, root_key) => {
            // The root key and a passphrase pass buffers of other people's code.
            wiping_allocator::wipe_from_now_on();
            kms_log::put_back(store, kms, &target, root_key.as_deref())?;
            Came::Done
        }
    })
}
