//! What attached volumes do at this moment: each one's host process is asked, all at the same time, and one
//! that does not answer holds up no other.

use crate::base::sync::Locked;
use crate::base::{Context, Error, Kind, Result};
use crate::catalog::lock::Holder;
use crate::catalog::{Catalog, Entry, VolumeId};
use crate::host::control;
use crate::host::stats::Stats;
use crate::ops::rates::Rates;
use std::collections::{HashMap, HashSet};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How long a host process may take to answer.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// What a thread that asks needs of a stack, with room.
const STACK: usize = 512 << 10;

/// One volume, looked at from outside.
pub struct Observed {
    /// Its record.
    pub entry: Entry,
    /// The process that has it attached.
    pub holder: Option<Holder>,
    /// What that process has counted; none of a volume that is not attached.
    pub stats: Option<Result<Stats>>,
}

/// Asks host processes, again and again.
pub struct Observer {
    catalog: Catalog,
    patience: Duration,
    /// Volumes whose host process was asked and has not answered yet. A process that hangs is asked once.
    asking: Arc<Mutex<HashSet<VolumeId>>>,
}

impl Observer {
    /// Asks those of this catalog, and waits for their answers as long as `patience`.
    pub fn new(catalog: Catalog, patience: Duration) -> Self {
        Observer { catalog, patience, asking: Arc::default() }
    }

    /// The store's volumes.
    pub fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// Looks at all volumes, or at these.
    ///
    /// # Errors
    /// Those of listing the volumes.
    pub fn look(&self, only: Option<&[VolumeId]>) -> Result<Vec<Observed>> {
        let mut entries = match only {
            None => self.catalog.list()?,
            Some(only) => only.iter().map(|&id| Entry { id, metadata: self.catalog.load(id) }).collect(),
        };
        entries.sort_by(|a, b| (a.name(), a.id).cmp(&(b.name(), b.id)));
        let holders: Vec<Option<Holder>> = entries.iter().map(|entry| self.holder(entry.id)).collect();
        let attached = entries.iter().zip(&holders).filter(|(_, holder)| holder.is_some());
        let mut answers = self.ask(&attached.map(|(entry, _)| entry.id).collect::<Vec<_>>());
        let observed = entries.into_iter().zip(holders);
        Ok(observed
            .map(|(entry, holder)| {
                let stats = answers.remove(&entry.id);
                // One that was detached meanwhile is not attached.
                let gone = matches!(&stats, Some(Err(e)) if e.kind() == Kind::NotFound);
                match gone {
                    true => Observed { entry, holder: None, stats: None },
                    false => Observed { entry, holder, stats },
                }
            })
            .collect())
    }

    /// What those of these volumes do that are attached, in the time between two looks. One that is attached
    /// anew meanwhile has what it did since; one that is detached meanwhile has nothing.
    ///
    /// # Errors
    /// Those of [`Observer::look`]. What keeps one volume from being looked at is its own.
    pub fn rates(
        &self,
        volumes: &[VolumeId],
        interval: Duration,
    ) -> Result<HashMap<VolumeId, Result<Rates>>> {
        let counted = |volumes: &[VolumeId]| -> Result<HashMap<VolumeId, Result<Stats>>> {
            let observed = self.look(Some(volumes))?.into_iter();
            Ok(observed.filter_map(|it| Some((it.entry.id, it.stats?))).collect())
        };
        let (mut before, mut found) = (HashMap::new(), HashMap::new());
        for (id, stats) in counted(volumes)? {
            match stats {
                Ok(stats) => drop(before.insert(id, stats)),
                // It is not asked a second time.
                Err(e) => drop(found.insert(id, Err(e))),
            }
        }
        // Nobody waits for nothing.
        if !before.is_empty() {
            std::thread::sleep(interval);
            let ids: Vec<VolumeId> = before.keys().copied().collect();
            let rates = |(id, now): (VolumeId, Result<Stats>)| {
                (id, now.map(|now| Rates::between(before.get(&id), &now)))
            };
            found.extend(counted(&ids)?.into_iter().map(rates));
        }
        Ok(found)
    }

    fn holder(&self, volume: VolumeId) -> Option<Holder> {
        let held = self.catalog.held(volume).inspect_err(|e| log::warn!("{volume}: {e}"));
        held.ok()?.attached()
    }

    /// What the host processes of these volumes answer; each has an answer or an error.
    fn ask(&self, volumes: &[VolumeId]) -> HashMap<VolumeId, Result<Stats>> {
        let (answer, answers) = channel();
        let deadline = Instant::now() + self.patience;
        let mut got = HashMap::new();
        for &volume in volumes {
            if let Err(e) = self.begin_to_ask(volume, answer.clone()) {
                got.insert(volume, Err(e));
            }
        }
        drop(answer);
        while let Ok((volume, stats)) =
            answers.recv_timeout(deadline.saturating_duration_since(Instant::now()))
        {
            got.insert(volume, stats);
        }
        for &volume in volumes {
            let late = || Err(silent(format!("does not answer within {} s", self.patience.as_secs_f64())));
            got.entry(volume).or_insert_with(late);
        }
        got
    }

    fn begin_to_ask(&self, volume: VolumeId, answer: Sender<(VolumeId, Result<Stats>)>) -> Result<()> {
        if !self.asking.locked().insert(volume) {
            return Err(silent("has not answered what it was asked before".into()));
        }
        let (catalog, patience, asking) = (self.catalog.clone(), self.patience, self.asking.clone());
        let ask = move || {
            let stats = control::stats(&catalog, volume, patience);
            asking.locked().remove(&volume);
            // Nobody waits any more if that took too long.
            let _ = answer.send((volume, stats));
        };
        let thread = std::thread::Builder::new().name("ask".into()).stack_size(STACK).spawn(ask);
        if thread.is_err() {
            self.asking.locked().remove(&volume);
        }
        thread.map(drop).context(|| "ask a host process")
    }
}

fn silent(how: String) -> Error {
    Error::new(Kind::Other, format!("the process that has it attached {how}"))
}
