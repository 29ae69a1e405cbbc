//! Another data key for an attached volume, and its chain of layers made one: what changes at once. The copying that follows
//! is [`crate::host::changes::hydrate`]'s.
//!
//! The process that asks has had the KMS make the new data key and a helper unwrap it; here it arrives in secret memory, by a
//! descriptor, and is copied into memory that is this process's alone.

use crate::base::{Context, Error, Kind, Result};
use crate::catalog::LayerId;
use crate::catalog::freeze::{Freeze, Maker};
use crate::catalog::rekey::{NewKey, WrittenNewKey, check_encrypted, mark_to_flatten};
use crate::crypt::Dek;
use crate::crypt::secret_mem::{SecretFd, on_scrubbed_stack};
use crate::crypt::xts::Engine;
use crate::host::changes::snapshot::{PATIENCE, get_ready, open_top};
use crate::host::control::conversation::Conversation;
use crate::host::state::{Record, State, gone};
use crate::host::status::UsedKey;
use crate::volume::kept::Kept;
use crate::volume::layers;
use std::sync::Arc;
use std::time::Duration;

impl Record {
    /// Gives the volume a new top layer under the data key in `secret`, and begins to bring up what is below. Answers how
    /// long the queues stood still. Whatever fails, the volume goes on as if nothing had been.
    pub fn rekey(
        &self,
        engine: Engine,
        (key, layer): (WrittenNewKey, LayerId),
        secret: SecretFd,
        client: &mut Conversation<'_>,
    ) -> Result<Duration> {
        let mut state = self.state();
        let state = state.as_mut().ok_or_else(gone)?;
        check_writable(state)?;
        check_encrypted(&state.metadata)?;
        let dek = take(secret)?;
        let key = key.parse(&state.metadata)?.checked(&dek);
        self.hydrator.stop();
        let done = self.change_key(engine, (key, layer), dek, state, client);
        if done.is_err() {
            self.hydrator.forget_old_keys(&state.metadata);
        }
        self.hydrator.begin(state, false);
        done
    }

    fn change_key(
        &self,
        engine: Engine,
        (key, layer): (NewKey, LayerId),
        dek: Dek,
        state: &mut State,
        client: &mut Conversation<'_>,
    ) -> Result<Duration> {
        self.hydrator.note_new_key(&key.also_of(&state.metadata))?;
        let kept = Kept::of(&dek, state.metadata.id(), state.metadata.sector_size(), engine)?;
        drop(dek);
        let (seal_key, used) = (kept.seal_key().clone(), UsedKey::of(key.record()));
        let cipher = Some(kept.cipher().clone());
        self.hydrator.keyring().add(kept);
        let freeze = Freeze::begin(&self.catalog, &state.lock, &state.metadata, Maker::Host(layer))?;
        let new_top = *freeze.new_top();
        let serving = state.serving()?;
        let ready = open_top(&self.catalog, state, cipher, &new_top, client).and_then(|(layer, _)| {
            let mut paused = serving.pause(PATIENCE).context(|| "wait for what is in flight")?;
            let next = get_ready(&mut paused, state, layer, state.layers.len(), None)?;
            Ok((paused, next))
        });
        let (paused, next) = match ready {
            Ok(ready) => ready,
            Err(e) => {
                freeze.cancel(&self.catalog, &state.lock);
                return Err(e);
            }
        };
        freeze.commit_rekeyed(&self.catalog, &state.lock, &mut state.metadata, key, &seal_key)?;
        let pause = paused.resume();
        next[1].image_lock.stop_writing();
        state.layers = next;
        state.seal_key = Some(seal_key);
        self.hydrator.unwrapped_by().push(used);
        let id = state.metadata.id();
        log::info!("{id} has another data key; the queues stood still for {pause:?}");
        self.hydrator.report(&state.metadata, "hydrating");
        Ok(pause)
    }

    /// Has everything below the top brought up. Answers whether there is anything.
    pub fn flatten(&self) -> Result<bool> {
        let mut state = self.state();
        let state = state.as_mut().ok_or_else(gone)?;
        check_writable(state)?;
        let all = state.layers.len().checked_sub(1).ok_or_else(gone)?;
        if all == 0 || state.metadata.layout().leaving() == all {
            return Ok(all > 0);
        }
        self.hydrator.stop();
        let marked = self.mark_all(state, all);
        self.hydrator.begin(state, false);
        if marked.is_ok() {
            self.hydrator.report(&state.metadata, "hydrating");
        }
        marked
    }

    fn mark_all(&self, state: &mut State, all: usize) -> Result<bool> {
        let serving = state.serving()?;
        let mut paused = serving.pause(PATIENCE).context(|| "wait for what is in flight")?;
        let disk = paused.disk().with_leaving_layers(layers::chain(&state.layers), all);
        let disk = disk.context(|| "open its layers")?;
        paused.prepare(Arc::new(disk)).context(|| "let the queues open its layers")?;
        mark_to_flatten(&self.catalog, &state.lock, &mut state.metadata)?;
        paused.resume();
        Ok(true)
    }
}

fn check_writable(state: &State) -> Result<()> {
    let _is_served = state.serving()?;
    match state.read_only {
        true => Err(Error::new(Kind::Busy, "it is attached read-only; detach it first")),
        false => Ok(()),
    }
}

/// The data key, in memory of this process's own. What it came in is wiped.
fn take(secret: SecretFd) -> Result<Dek> {
    let shared = secret.map()?;
    on_scrubbed_stack(|| Dek::from_bytes(shared.as_slice()))
}
