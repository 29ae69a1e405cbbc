//! Metrics for Prometheus: what all volumes of a store did, what the store takes, and what needs somebody to
//! look. docs/metrics.md has each name.
//!
//! Whoever reads them needs no key: host processes are asked what they have counted, and the rest is what
//! lies in the store's folders.
#![forbid(unsafe_code)]

mod keys;
mod serve;
mod text;
mod volumes;

pub use serve::{Address, serve};
pub use text::Form;

use crate::base::hardened::Hardened;
use crate::base::root::Root;
use crate::base::sync::Locked;
use crate::base::{Context, Error, Kind, Result};
use crate::config::Settings;
use crate::events::deliver;
use crate::kms::KmsKey;
use crate::kms::embedded::Embedded;
use crate::ops::Store;
use crate::ops::observe::{Observed, Observer};
use crate::ops::usage::Overview;
use crate::ops::watch::{self, Known};
use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};
use text::{Text, Type, number};

/// What was gathered is good for so long: whoever asks more often gets the same again.
const FRESH: Duration = Duration::from_millis(900);

/// Gathers metrics of a store.
pub struct Metrics {
    root: Root,
    hardened: Hardened,
    observer: Observer,
    /// One gathers at a time.
    last: Mutex<Option<Gathered>>,
}

/// Everything that is shown, of one moment.
struct Gathered {
    at: Instant,
    took: Duration,
    volumes: Vec<Observed>,
    overview: Overview,
    has_root_key: Option<bool>,
    sinks: Vec<(String, deliver::Behind)>,
    keys: BTreeMap<KmsKey, Known>,
}

impl Metrics {
    /// Of this store. A host process may take as long as `patience` to answer.
    pub fn new(store: &Store, patience: Duration) -> Self {
        let observer = Observer::new(store.catalog(), patience);
        Metrics { root: store.root().clone(), hardened: store.hardened(), observer, last: Mutex::default() }
    }

    /// All metrics, as they are now, or were less than a second ago.
    ///
    /// # Errors
    /// Those of reading the store. A volume or a sink that cannot be read fails alone.
    pub fn text(&self, form: Form) -> Result<String> {
        let mut last = self.last.locked();
        let fresh = last.take().filter(|gathered| gathered.at.elapsed() < FRESH);
        let gathered = fresh.map_or_else(|| self.gather(), Ok)?;
        let text = gathered.text(form);
        *last = Some(gathered);
        Ok(text)
    }

    fn gather(&self) -> Result<Gathered> {
        let begun = Instant::now();
        let mut volumes = self.observer.look(None)?;
        let overview = Overview::of(self.observer.catalog(), volumes.iter().map(|it| &it.entry))?;
        // Names are for people and need not be unique; ids are.
        volumes.sort_by_key(|it| it.entry.id);
        let has_root_key = Embedded::has_root_key(&self.root, self.hardened).unwrap_or_else(|e| {
            log::warn!("whether the root key of the store's own KMS is there cannot be told: {e}");
            None
        });
        let (sinks, keys) = (self.sinks(), watch::last_known(&self.root));
        Ok(Gathered {
            at: Instant::now(),
            took: begun.elapsed(),
            volumes,
            overview,
            has_root_key,
            sinks,
            keys,
        })
    }

    /// How far each event sink of the settings is behind. The settings may have changed.
    fn sinks(&self) -> Vec<(String, deliver::Behind)> {
        let settings = Settings::load(&self.root).inspect_err(|e| log::warn!("{e}"));
        let sinks = settings.map_or(Vec::new(), |settings| settings.event_sinks);
        let behind = |name: String| match deliver::behind(&self.root, &name) {
            Ok(behind) => Some((name, behind)),
            Err(e) => {
                log::warn!("event sink {name:?}: {e}");
                None
            }
        };
        sinks.into_iter().filter_map(|sink| behind(sink.name)).collect()
    }

    /// Replaces `file` by the metrics, for node_exporter's textfile collector: whoever reads it finds the old
    /// ones or the new ones, whole.
    ///
    /// # Errors
    /// Those of reading the store and of writing the file.
    pub fn write_to(&self, file: &Path) -> Result<()> {
        let text = self.text(Form::Prometheus)?;
        let attempt = || format!("write {}", file.display());
        let name = file.file_name().ok_or_else(|| Error::new(Kind::Usage, "it names no file"));
        let name = name.context(attempt)?.to_string_lossy();
        // The collector takes files that end in ".prom" alone.
        let new = file.with_file_name(format!(".{name}.{}.tmp", std::process::id()));
        let write = || {
            let mut out = std::fs::File::create(&new)?;
            // Another user's node_exporter reads it.
            out.set_permissions(std::fs::Permissions::from_mode(0o644))?;
            out.write_all(text.as_bytes())?;
            std::fs::rename(&new, file)
        };
        write().inspect_err(|_| drop(std::fs::remove_file(&new))).context(attempt)
    }
}

impl Gathered {
    fn text(&self, form: Form) -> String {
        let mut text = Text::new(form);
        text.family("sealblk_build", Type::Info, "Which sealblk gathers these metrics.");
        text.sample(&[("version", env!("CARGO_PKG_VERSION"))], 1);
        text.family(
            "sealblk_gathering_duration_seconds",
            Type::Gauge,
            "How long gathering all of this took.",
        );
        text.sample(&[], number(self.took.as_secs_f64()));
        self.store(&mut text);
        self.sinks(&mut text);
        keys::write(&mut text, &self.volumes, &self.keys);
        volumes::write(&mut text, &self.volumes, &self.overview);
        text.end()
    }

    fn store(&self, text: &mut Text) {
        let Overview { sizes, used, space, .. } = &self.overview;
        let count = |is: fn(&Observed) -> bool| self.volumes.iter().filter(|it| is(it)).count() as u64;
        for (name, help, value) in [
            ("sealblk_store_volumes", "Volumes in the store.", count(|_| true)),
            ("sealblk_store_volumes_attached", "Volumes that are attached.", count(|it| it.holder.is_some())),
            (
                "sealblk_store_volumes_damaged",
                "Volumes whose record cannot be read, or is not believed.",
                count(|it| it.entry.metadata.is_err()),
            ),
            ("sealblk_store_provisioned_bytes", "Sizes of all volumes, which they may come to take.", *sizes),
            ("sealblk_store_used_bytes", "What volumes and snapshots take on disk, each layer once.", *used),
        ] {
            text.family(name, Type::Gauge, help);
            text.sample(&[], value);
        }
        if let Some(space) = space {
            text.family(
                "sealblk_store_filesystem_size_bytes",
                Type::Gauge,
                "Size of the store's file system.",
            );
            text.sample(&[], space.size);
            text.family(
                "sealblk_store_filesystem_free_bytes",
                Type::Gauge,
                "What is free of the store's file system for users other than root.",
            );
            text.sample(&[], space.free);
        }
        if let Some(has_root_key) = self.has_root_key {
            text.family(
                "sealblk_store_root_key_present",
                Type::Gauge,
                "Whether the root key of the store's own KMS is where it should be: without it no volume \
                 under its keys can be attached.",
            );
            text.sample(&[], u8::from(has_root_key));
        }
    }

    fn sinks(&self, text: &mut Text) {
        if self.sinks.is_empty() {
            return;
        }
        text.family(
            "sealblk_event_sink_undelivered_events",
            Type::Gauge,
            "Events that a sink is still to get.",
        );
        for (name, behind) in &self.sinks {
            text.sample(&[("sink", name)], behind.events);
        }
        text.family(
            "sealblk_event_sink_lag_seconds",
            Type::Gauge,
            "How long ago the oldest event happened that a sink is still to get; 0 if there is none.",
        );
        for (name, behind) in &self.sinks {
            text.sample(&[("sink", name)], behind.oldest.map_or(0, |oldest| oldest.age().as_secs()));
        }
    }
}
