//! `sealblk volume list`.
#![forbid(unsafe_code)]

use super::{modify, show};
use crate::base::{Result, size};
use crate::catalog::metadata::KeyRecord;
use crate::catalog::{Catalog, Entry, VolumeId};
use crate::cli::filter::{self, Filter};
use crate::cli::interval::interval;
use crate::cli::sort::{Place, SortArgs};
use crate::cli::{Env, output};
use crate::kms::KmsKey;
use crate::ops::modify as kept;
use crate::ops::observe::{Observer, PATIENCE};
use crate::ops::rates::Rates;
use crate::ops::usage::{Overview, Usage};
use crate::ops::watch::{self, Health, Known, Outlook};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

/// What `volume list` takes.
#[derive(clap::Args)]
pub struct ListArgs {
    /// Only volumes of which this is so: id, name, status, encrypted, snapshot-id, tag-key, or tag:KEY. Of
    /// filters with one name any must be so, of others all.
    #[arg(long, value_name = "NAME=VALUE")]
    filter: Vec<Filter>,
    #[command(flatten)]
    sort: SortArgs,
    /// Show what attached volumes do at this moment as well: their counters are read twice, so many seconds
    /// apart [default: 1].
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1", value_parser = interval)]
    rates: Option<Duration>,
}

/// The filters of volumes, except for those of tags.
pub(in crate::cli) const FILTERS: [&str; 5] = ["id", "name", "status", "encrypted", "snapshot-id"];

/// Those of the volumes that the filters mean, in this order.
pub(in crate::cli) fn chosen(
    catalog: &Catalog,
    entries: Vec<Entry>,
    filters: &[Filter],
    sort: &SortArgs,
) -> Result<Vec<Entry>> {
    let mut chosen = Vec::new();
    for entry in entries {
        // Without any, nothing has to be looked at.
        if filters.is_empty() || is_wanted(catalog, &entry, filters)? {
            chosen.push(entry);
        }
    }
    sort.sort(&mut chosen, |entry: &Entry| {
        let known = entry.metadata.as_ref().ok();
        let (size, created) = (known.map(|it| it.size()), known.map(|it| it.created()));
        Place { name: entry.name(), id: entry.id, size, created }
    });
    Ok(chosen)
}

/// Prints the list.
pub(super) fn list(env: &Env, args: &ListArgs) -> Result<()> {
    let filters = args.filter.as_slice();
    filter::check(filters, &FILTERS)?;
    let catalog = env.catalog();
    let mut entries = catalog.list()?;
    let overview = Overview::of(&catalog, &entries)?;
    let keys = LastKnown(watch::last_known(&env.root));
    entries = chosen(&catalog, entries, filters, &args.sort)?;
    let rates = match args.rates {
        Some(interval) => rates(env, &entries, interval)?,
        None => HashMap::new(),
    };
    if env.json {
        let values = entries.iter().map(|e| match &e.metadata {
            Ok(metadata) => {
                let mut value = show::description(&catalog, metadata)?;
                add_space(&mut value, metadata.id(), &overview);
                if args.rates.is_some() {
                    value["rates"] = json!(rates.get(&metadata.id()));
                }
                // As with the column below, only where somebody has asked.
                for (n, key) in metadata.keys().iter().enumerate().filter(|_| !keys.0.is_empty()) {
                    value["keys"][n]["last_known"] = keys.json(&key.first().kms_key());
                    for (m, slot) in key.slots().iter().enumerate() {
                        value["keys"][n]["slots"][m]["last_known"] = keys.json(&slot.kms_key());
                    }
                }
                Ok(value)
            }
            Err(error) => Ok(json!({
                "id": e.id,
                "state": "damaged",
                "error": {"kind": error.kind().name(), "message": error.to_string()},
            })),
        });
        return output::print_json(&values.collect::<Result<Vec<Value>>>()?);
    }
    let head = ["ID", "NAME", "SIZE", "SECTOR", "ENCRYPTED", "STATE", "CREATED", "ON DISK"].map(String::from);
    let mut rows = vec![head.to_vec()];
    for entry in &entries {
        rows.push(row(&catalog, entry, &overview)?);
    }
    let metadata = || entries.iter().map(|entry| entry.metadata.as_ref().ok());
    // Columns that are empty in most stores are not there in these.
    if !keys.0.is_empty() {
        let cells = metadata().map(|metadata| metadata.map(|it| keys.words(it.keys())));
        add_column(&mut rows, "KEY", cells);
    }
    let device = |metadata: &crate::catalog::Metadata| catalog.on_device(metadata.top().id).ok().flatten();
    let devices: Vec<Option<String>> =
        metadata().map(|metadata| device(metadata?).map(|on| on.name.display().to_string())).collect();
    if devices.iter().any(Option::is_some) {
        add_column(&mut rows, "DEVICE", devices.into_iter());
    }
    if env.root.pool().is_some() {
        let hosts: Result<Vec<_>> =
            entries.iter().map(|entry| Ok(show::host(&catalog.held(entry.id)?))).collect();
        add_column(&mut rows, "HOST", hosts?.into_iter());
    }
    let limits = |id| {
        let kept = kept::limits(&catalog.attach_settings(id).ok()?);
        modify::limit_words(kept.iops, kept.throughput)
    };
    let limits: Vec<Option<String>> = metadata().map(|metadata| limits(metadata?.id())).collect();
    if limits.iter().any(Option::is_some) {
        add_column(&mut rows, "LIMITS", limits.into_iter());
    }
    if args.rates.is_some() {
        for (head, cell) in RATES {
            let cells = entries.iter().map(|entry| rates.get(&entry.id).map(cell));
            add_column(&mut rows, head, cells);
        }
    }
    output::print(&(output::table(&rows) + &sum(&overview))).map(drop)
}

/// A column of what volumes do: its head, and what it shows.
type RateColumn = (&'static str, fn(&Rates) -> String);

const RATES: [RateColumn; 4] = [
    ("R/S", |rates| format!("{:.0}", rates.read.per_second)),
    ("W/S", |rates| format!("{:.0}", rates.write.per_second)),
    ("READ/S", |rates| size::about(rates.read.bytes_per_second as u64)),
    ("WRITTEN/S", |rates| size::about(rates.write.bytes_per_second as u64)),
];

/// What those of these volumes do that are attached, in the time between two looks. One whose process does
/// not answer is named, and holds up no other.
fn rates(env: &Env, entries: &[Entry], interval: Duration) -> Result<HashMap<VolumeId, Rates>> {
    let ids: Vec<VolumeId> = entries.iter().map(|entry| entry.id).collect();
    let found = Observer::new(env.catalog(), PATIENCE).rates(&ids, interval)?;
    let told = |(id, rates): (VolumeId, Result<Rates>)| match rates {
        Ok(rates) => Some((id, rates)),
        Err(e) => {
            output::tell(&format!("sealblk: {id}: {e}"));
            None
        }
    };
    Ok(found.into_iter().filter_map(told).collect())
}

/// Adds a column at the end: its head, and a cell for each row below.
fn add_column(rows: &mut [Vec<String>], head: &str, cells: impl Iterator<Item = Option<String>>) {
    let cells = cells.map(|cell| cell.unwrap_or_else(|| "-".into()));
    for (row, cell) in rows.iter_mut().zip(std::iter::once(head.to_owned()).chain(cells)) {
        row.push(cell);
    }
}

/// What KMSs have said last of keys, as "sealblk watch" has asked them.
struct LastKnown(BTreeMap<KmsKey, Known>);

impl LastKnown {
    fn json(&self, key: &KmsKey) -> Value {
        self.0.get(key).map_or(Value::Null, |known| {
            json!({
                "state": known.state,
                "deletion": known.deletion,
                "message": known.message,
                "since": known.since,
                "checked": known.checked,
            })
        })
    }

    /// How it is with these data keys.
    fn words(&self, keys: &[KeyRecord]) -> String {
        let Some(Outlook { worst, deletion, all_usable }) = Outlook::of(keys, &self.0) else {
            return "-".into();
        };
        match worst {
            None => "not asked yet".into(),
            Some(Health::Usable) if !all_usable => "usable, not by every key".into(),
            Some(state) => {
                format!("{}{}", state.words(), deletion.map_or(String::new(), |at| format!(", {at}")))
            }
        }
    }
}

/// What all volumes take, and may come to take, against the file system; nothing where there is none.
fn sum(overview: &Overview) -> String {
    let Overview { sizes, used, space, .. } = overview;
    let (Some(space), true) = (space, *sizes > 0) else { return String::new() };
    let about = size::about;
    let times = *sizes as f64 / space.size as f64;
    let overcommitted = if times > 1.0 { format!("; overcommitted {times:.1} times") } else { String::new() };
    format!(
        "\n{} in all volumes, {} on disk with their snapshots; the file system has {}, {} \
         free{overcommitted}\n",
        about(*sizes),
        about(*used),
        about(space.size),
        about(space.free),
    )
}

fn add_space(value: &mut Value, id: VolumeId, overview: &Overview) {
    let usage = overview.usage(id);
    value["space"] = json!({"own": usage.own, "shared": usage.shared, "on_devices": usage.on_devices});
    // Nothing that changes by itself: lists are compared.
    value["file_system"] = match &overview.space {
        Some(space) => json!({"size": space.size, "volumes": overview.sizes}),
        None => Value::Null,
    };
}

/// Whether a volume is one of those that `filters` mean.
pub(in crate::cli) fn is_wanted(catalog: &Catalog, entry: &Entry, filters: &[Filter]) -> Result<bool> {
    let status = match entry.metadata {
        Ok(_) => show::state(&catalog.held(entry.id)?),
        Err(_) => "damaged",
    };
    let metadata = entry.metadata.as_ref().ok();
    let fields = [
        ("id", Some(entry.id.to_string())),
        ("name", entry.name().map(String::from)),
        ("status", Some(status.to_string())),
        ("encrypted", metadata.map(|m| m.is_encrypted().to_string())),
        ("snapshot-id", metadata.and_then(|m| m.origin()).map(|o| o.snapshot.to_string())),
    ];
    // A volume whose tags cannot be read has none.
    let tags = catalog.tags(entry.id).unwrap_or_default();
    Ok(filter::matches(filters, &fields, &tags))
}

fn row(catalog: &Catalog, entry: &Entry, overview: &Overview) -> Result<Vec<String>> {
    let id = entry.id.to_string();
    let none = || "-".to_string();
    let metadata = match &entry.metadata {
        Ok(metadata) => metadata,
        Err(e) => {
            log::warn!("{e}");
            return Ok(vec![id, none(), none(), none(), none(), "damaged".into(), none(), none()]);
        }
    };
    let Usage { own, shared, on_devices } = overview.usage(entry.id);
    let mut usage = size::about(own);
    if shared > 0 {
        usage += &format!(" + {} shared", size::about(shared));
    }
    if on_devices > 0 {
        usage += &format!(" + {} of devices", size::about(on_devices));
    }
    if let Some(far) = catalog.how_far(metadata.layers()) {
        usage += &format!(" + {} to come", size::about(far.all.saturating_sub(far.come)));
    }
    Ok(vec![
        id,
        metadata.name().map_or_else(none, ToString::to_string),
        size::human(metadata.size()),
        metadata.sector_size().bytes().to_string(),
        show::yes_or_no(metadata.is_encrypted()).to_string(),
        show::state(&catalog.held(entry.id)?).to_string(),
        metadata.created().to_string(),
        usage,
    ])
}
