//! Another data key for an attached volume, and its chain of layers made one: what changes at once. The
//! copying that follows is [`super::hydrate`]'s.
//!
//! The command that asks has had the KMS make the new data key, and a helper unwrap it and mask it under the
//! data key that the volume has, which whoever else listens on the control socket does not have; here it
//! arrives in secret memory, by a descriptor, and goes into memory that is this process's alone.

use super::top::NewTop;
use super::{check_writable, switch};
use crate::base::{Context, Error, Kind, Result};
use crate::catalog::LayerId;
use crate::catalog::metadata::LayerRecord;
use crate::catalog::rekey::{
    NewKey, WrittenNewKey, check_encrypted, check_may_stay, mark_to_flatten, passed_for, unmark,
};
use crate::crypt::Dek;
use crate::crypt::secret_mem::SecretFd;
use crate::crypt::xts::Engine;
use crate::disk::Disk;
use crate::host::control::conversation::Conversation;
use crate::host::state::{Record, State, gone};
use crate::volume::kept::Kept;
use crate::volume::layers;
use std::sync::Arc;
use std::time::Duration;

impl Record {
    /// Gives the volume a new top layer under the data key in `secret`, and begins to hydrate it
    /// from what is below. Returns how long the queues stood still. Whatever fails, the volume goes
    /// on as if nothing had been.
    ///
    /// # Errors
    /// `Usage` for a volume without encryption, or a key that is none; as [`Record::change`]
    /// and [`Record::freeze_top`].
    pub fn rekey(
        &self,
        engine: Engine,
        (key, layer): (WrittenNewKey, LayerId),
        secret: SecretFd,
        client: &mut Conversation<'_>,
    ) -> Result<Duration> {
        self.change(|state| {
            check_encrypted(&state.metadata)?;
            let key = key.parse(&state.metadata)?;
            let dek = self.take_new_key(secret, &key, layer, state)?;
            let key = key.checked(&dek);
            let done = self.change_key(engine, (key, layer), dek, state, client);
            if done.is_err() {
                self.hydrator.forget_old_keys(&state.metadata);
            }
            done
        })
    }

    /// The new data key, which only a process can read that has the volume's present one.
    /// What it came in is wiped.
    fn take_new_key(&self, secret: SecretFd, new: &NewKey, layer: LayerId, state: &State) -> Result<Dek> {
        let kept = self.hydrator.keyring().of(&state.metadata)?;
        let present = state.metadata.top().key.and_then(|n| kept.get(n));
        let present = present.ok_or_else(|| Error::new(Kind::Usage, "the volume is not encrypted"))?;
        let (shared, record) = (secret.map()?, new.record());
        let context = passed_for(state.metadata.id(), layer, record.slots());
        present.pass_key().take(shared.as_slice(), &context)
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
        // The helper that has passed it on had it from this one.
        let used = key.record().first().kms_key();
        let (id, unit) = (state.metadata.id(), state.metadata.sector_size());
        let kept = Kept::of(&dek, used.clone(), id, unit, engine)?;
        drop(dek);
        let seal_key = kept.seal_key().clone();
        let cipher = kept.cipher().clone();
        self.hydrator.keyring().add(kept);
        let new = NewTop {
            id: layer,
            cipher: |_: &State, _: &LayerRecord| Ok(Some(cipher)),
            leaving: state.layers.len(),
        };
        let ((), pause) = self.freeze_top(state, new, client, |freeze, state| {
            freeze.commit_rekeyed(&self.catalog, &state.lock, &mut state.metadata, key, &seal_key)
        })?;
        state.seal_key = Some(seal_key);
        self.hydrator.unwrapped_by().push(used);
        let id = state.metadata.id();
        log::info!("{id} has another data key; the queues stood still for {pause:?}");
        self.hydrator.report(&state.metadata, "hydrating");
        Ok(pause)
    }

    /// Has the top hydrated from everything below it. Returns whether there is anything below.
    ///
    /// # Errors
    /// As [`Record::change`] and [`switch`].
    pub fn flatten(&self) -> Result<bool> {
        if let Some(is_any) = self.is_being_flattened()? {
            return Ok(is_any);
        }
        self.change(|state| {
            let all = state.layers.len() - 1;
            let next = |disk: &Arc<Disk>, state: &State| {
                let next = state.layers.clone();
                let disk = disk.with_leaving_layers(layers::chain(&next), all);
                Ok((disk.context(|| "open its layers")?, next))
            };
            switch(state, next, |state| mark_to_flatten(&self.catalog, &state.lock, &mut state.metadata))?;
            self.hydrator.report(&state.metadata, "hydrating");
            Ok(true)
        })
    }

    /// Has nothing copied up any more: the layers stay in the chain, and what was copied stays in the top.
    /// Returns whether anything was to be copied.
    ///
    /// # Errors
    /// `Usage` for layers that cannot stay; as [`Record::change`] and [`switch`].
    pub fn cancel_flatten(&self) -> Result<bool> {
        self.change(|state| {
            if state.metadata.layout().leaving() == 0 {
                return Ok(false);
            }
            check_may_stay(&state.metadata)?;
            let next = |disk: &Arc<Disk>, state: &State| {
                let next = state.layers.clone();
                let disk = disk.with_leaving_layers(layers::chain(&next), 0);
                Ok((disk.context(|| "open its layers")?, next))
            };
            switch(state, next, |state| unmark(&self.catalog, &state.lock, &mut state.metadata))?;
            self.hydrator.report(&state.metadata, "cancelled");
            Ok(true)
        })
    }

    /// Whether there is anything below the top, if nothing is to be changed for that: because there is
    /// nothing, or because it is marked already.
    fn is_being_flattened(&self) -> Result<Option<bool>> {
        let state = self.state();
        let state = state.as_ref().ok_or_else(gone)?;
        check_writable(state)?;
        let all = state.layers.len().checked_sub(1).ok_or_else(gone)?;
        Ok((all == 0 || state.metadata.layout().leaving() == all).then_some(all > 0))
    }
}
