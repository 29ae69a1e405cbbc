//! `sealblk volume show`: what a volume is, who has it, and what the next attach would meet.

use crate::base::plural::counted;
use crate::base::{Result, size};
use crate::catalog::attach_settings::AttachSettings;
use crate::catalog::coming::HowFar;
use crate::catalog::lock::{Held, Holder as LockHolder, Purpose};
use crate::catalog::metadata::{KeyRecord, VolumeName};
use crate::catalog::{Catalog, Metadata, VolumeId};
use crate::cli::slots::{Check, key_json};
use crate::cli::volume::modify::limit_words;
use crate::cli::{Env, output, space};
use crate::host::control;
use crate::host::status::{Progress, Refusals, Status};
use crate::kms::KmsKey;
use crate::ops::key_sharing::{self, Holder};
use crate::ops::modify;
use crate::ops::usage::{self, OfLayer};
use serde_json::{Value, json};

/// What `volume show` takes.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sealblk volume show db
  sealblk volume show db --check-key

--check-key asks the KMS. The exit code is 0 if the next attach would get its keys; else it is that of the attach:
3, 5, 6 or 7, and 8 where the root key is missing.")]
pub struct ShowArgs {
    /// The volume: its id, the first digits of its id, or its name.
    volume: String,
    /// Ask the KMS now what state the volume's keys are in.
    #[arg(long)]
    check_key: bool,
}

/// Shows one volume. With `--check-key` it fails, after printing everything, if a key is not usable.
pub(super) fn show(env: &Env, args: &ShowArgs) -> Result<()> {
    let catalog = env.catalog();
    let metadata = catalog.load(catalog.resolve(&args.volume)?)?;
    let attached = Attached::look(&catalog, &metadata)?;
    let check = |key: &KeyRecord| key.slots().iter().map(|slot| Check::make(env, &slot.kms_key())).collect();
    let checks: Option<Vec<Vec<Check>>> = args.check_key.then(|| metadata.keys().iter().map(check).collect());
    let sharing = key_sharing::of(&catalog, &metadata)?;
    let layers = usage::of_layers(&catalog, &metadata.id(), metadata.layers())?;
    if env.json {
        let mut value = description(&catalog, &metadata)?;
        value["attachment"] = attached.json();
        value["next_attach"] = json!(next_attach(env, &metadata));
        space::add_layers(&mut value, &layers);
        for (n, holders) in sharing.iter().enumerate() {
            value["keys"][n]["shared_with"] = shared_json(holders);
        }
        for (n, checks) in checks.iter().flatten().enumerate() {
            // Of the whole data key: that of a KMS key which gives it, if there is one.
            let best = checks.iter().find(|check| check.is_usable()).or(checks.first());
            value["keys"][n]["check"] = best.map_or(Value::Null, Check::json);
            for (m, check) in checks.iter().enumerate() {
                value["keys"][n]["slots"][m]["check"] = check.json();
            }
        }
        output::print_json(&value)?;
    } else {
        let rows = rows(env, &metadata, &attached, (&sharing, &layers), checks.as_deref());
        output::print(&output::table(&rows))?;
    }
    match checks.into_iter().flatten().find_map(Check::refusal_of) {
        Some(e) => Err(e.context(format!("the next attach of {} would be refused", metadata.id()))),
        None => Ok(()),
    }
}

fn rows(
    env: &Env,
    metadata: &Metadata,
    attached: &Attached,
    (sharing, layers): (&[Vec<Holder>], &[OfLayer]),
    checks: Option<&[Vec<Check>]>,
) -> Vec<Vec<String>> {
    let catalog = &env.catalog();
    let mut rows = vec![
        pair("id", metadata.id()),
        pair("name", metadata.name().map_or("-", VolumeName::as_str)),
        pair("size", format!("{} ({} bytes)", size::human(metadata.size()), metadata.size())),
        pair("sector size", format!("{} bytes", metadata.sector_size().bytes())),
        pair("encrypted", yes_or_no(metadata.is_encrypted())),
    ];
    for (n, (key, holders)) in metadata.keys().iter().zip(sharing).enumerate() {
        for (m, slot) in key.slots().iter().enumerate() {
            let name = if m == 0 { "key" } else { "also" };
            rows.push(pair(name, format!("{}: {}", slot.provider, slot.wrapped.key_id)));
            if let Some(check) = checks.and_then(|all| all.get(n)?.get(m)).filter(|_| key.slots().len() > 1) {
                rows.push(pair("", check.words()));
            }
        }
        rows.push(pair("", shared(metadata.top().key == Some(n), holders)));
        if let Some([check]) = checks.and_then(|all| all.get(n)).map(Vec::as_slice) {
            rows.push(pair("", check.words()));
        }
    }
    for (layer, usage) in metadata.layers().iter().zip(layers) {
        rows.push(pair("layer", catalog.shown_place(layer.id).display()));
        rows.push(pair("", space::layer_words(usage)));
    }
    rows.extend(attached.hydration(catalog, metadata));
    rows.extend(attached.coming(catalog, metadata));
    rows.extend(metadata.origin().map(|origin| pair("made from", origin.snapshot)));
    match catalog.tags(metadata.id()) {
        Ok(tags) => rows.extend(tags.iter().map(|(key, value)| pair("tag", format!("{key}={value}")))),
        Err(e) => rows.push(pair("tag", e)),
    }
    match catalog.attach_settings(metadata.id()) {
        Ok(kept) if kept.is_empty() => {}
        Ok(kept) => rows.push(pair("attach takes", kept_words(&kept))),
        Err(e) => rows.push(pair("attach takes", e)),
    }
    rows.push(pair("created", metadata.created()));
    rows.push(pair("state", state(&attached.held)));
    rows.extend(attached.rows());
    rows.push(pair("next attach", next_attach(env, metadata)));
    rows
}

/// Most whose ids are shown, of those who have a data key as well; JSON has all.
const SHOWN_MAX: usize = 6;

/// What a data key is for, and who else has it.
fn shared(is_of_top: bool, holders: &[Holder]) -> String {
    let what = if is_of_top { "data key of what it writes" } else { "data key of lower layers" };
    if holders.is_empty() {
        return format!("{what}: its own");
    }
    let mut names: Vec<String> = holders.iter().take(SHOWN_MAX).map(id_of).collect();
    if holders.len() > SHOWN_MAX {
        names.push(format!("{} more", holders.len() - SHOWN_MAX));
    }
    format!("{what}: shared with {}", names.join(", "))
}

fn id_of(holder: &Holder) -> String {
    match holder {
        Holder::Snapshot(id) => id.to_string(),
        Holder::Volume(id) => id.to_string(),
    }
}

fn shared_json(holders: &[Holder]) -> Value {
    let (snapshots, volumes): (Vec<_>, Vec<_>) =
        holders.iter().partition(|holder| matches!(holder, Holder::Snapshot(_)));
    let ids = |holders: Vec<&Holder>| holders.into_iter().map(id_of).collect::<Vec<_>>();
    json!({"snapshots": ids(snapshots), "volumes": ids(volumes)})
}

/// Who has a volume, and what its host process says of itself.
struct Attached {
    held: Held,
    /// `None` if the volume is not attached.
    status: Option<Result<Status>>,
}

impl Attached {
    fn look(catalog: &Catalog, metadata: &Metadata) -> Result<Self> {
        let held = catalog.held(metadata.id())?;
        let attached = matches!(&held, Held::By(LockHolder { purpose: Purpose::Attach, .. }));
        let status = attached.then(|| control::status(catalog, metadata.id()));
        Ok(Attached { held, status })
    }

    fn rows(&self) -> Vec<Vec<String>> {
        let mut rows = Vec::new();
        match &self.held {
            Held::By(holder) if holder.purpose == Purpose::Attach => {
                rows.push(pair("attached", format!("since {}, by {}", holder.since, holder.process())));
                rows.extend(holder.socket.as_ref().map(|socket| pair("", format!("socket {socket}"))));
            }
            Held::By(holder) => rows.push(pair("", holder)),
            Held::Elsewhere(holder) if holder.purpose == Purpose::Attach => {
                rows.push(pair("attached", format!("since {}, by {}", holder.since, holder.anywhere())));
            }
            Held::Elsewhere(holder) => rows.push(pair("", format!("in use by {}", holder.anywhere()))),
            Held::Free | Held::Unknown => {}
        }
        match &self.status {
            Some(Ok(status)) => {
                rows.push(pair("", &status.access));
                if status.read_only {
                    rows.push(pair("", "read-only"));
                }
                let limits = status.limits.as_ref().and_then(|it| limit_words(it.iops, it.throughput));
                rows.extend(limits.map(|words| pair("", format!("limited to {words}"))));
                if status.flush_failed {
                    let said = "a flush has failed: writes may be lost, and no flush succeeds until it is \
                                detached and attached again; check its disk first, and then the guest's file \
                                systems";
                    rows.push(pair("", said));
                }
                rows.extend(status.no_space.as_ref().map(|Refusals { requests, last }| {
                    let said =
                        counted(*requests, "request of the guest's was", "requests of the guest's were");
                    pair("", format!("{said} refused for want of space, the last one at {last}"))
                }));
                let used = |key: &KmsKey| {
                    pair("", format!("data key unwrapped by {}: {}", key.provider, key.key_id))
                };
                rows.extend(status.unwrapped_by.iter().map(used));
            }
            Some(Err(e)) => rows.push(pair("", e)),
            None => {}
        }
        rows
    }

    /// What is still to be copied up from lower layers, under their keys.
    fn hydration(&self, catalog: &Catalog, metadata: &Metadata) -> Vec<Vec<String>> {
        if metadata.layout().leaving() == 0 {
            return Vec::new();
        }
        let below = metadata.layout().leaving_layers();
        let keys = below.iter().filter_map(|layer| layer.key).map(|n| &metadata.keys()[n]);
        let mut old: Vec<&str> = keys.map(|key| key.first().wrapped.key_id.as_str()).collect();
        old.dedup();
        let what = match (below.iter().any(|l| l.key != metadata.top().key), old.is_empty()) {
            (false, _) => "in lower layers".to_string(),
            (true, true) => "not encrypted".to_string(),
            (true, false) => format!("under the old data keys ({})", old.join(", ")),
        };
        let progress = match &self.status {
            Some(Ok(status)) => status.hydration.as_ref(),
            _ => None,
        };
        let Some(Progress { left, rate, problem, waits_for_space, reserve: _ }) = progress else {
            let most = size::about(allocated(catalog, metadata));
            return vec![pair(
                "copied up",
                format!("at most {most} are still {what}; the next attach goes on"),
            )];
        };
        let left =
            left.map_or("it is not yet known how much is".into(), |n| format!("{} are", size::about(n)));
        let rate = if *rate == 0 {
            "without a limit".into()
        } else {
            format!("at {}/s at most", size::about(*rate))
        };
        let mut rows = vec![pair("copied up", format!("{left} still {what}; {rate}"))];
        let why = if *waits_for_space { "it waits" } else { "it does not go on" };
        rows.extend(problem.as_ref().map(|problem| pair("", format!("{why}: {problem}"))));
        rows
    }

    /// What is still to come of lower layers, from the place of a snapshot that was pulled lazily.
    fn coming(&self, catalog: &Catalog, metadata: &Metadata) -> Vec<Vec<String>> {
        let Some(far) = catalog.how_far(metadata.layers()) else { return Vec::new() };
        let Some(Ok(Status { coming: Some(now), .. })) = &self.status else {
            let words = format!("{}; an attach goes on with the rest", coming_words(&far));
            return vec![pair("coming", words)];
        };
        let far = HowFar { come: now.come, all: now.all, from: far.from };
        let mut rows = vec![pair("coming", coming_words(&far))];
        rows.extend(now.away.as_ref().map(|why| pair("", format!("nothing comes at the moment: {why}"))));
        if now.waiting + now.failed > 0 {
            let waiting = counted(now.waiting, "read waits", "reads wait");
            let failed = counted(now.failed, "read has failed", "reads have failed");
            rows.push(pair("", format!("{waiting} for what has not come, and {failed}")));
        }
        rows
    }

    fn json(&self) -> Value {
        let (Held::By(holder), Some(status)) = (&self.held, &self.status) else { return Value::Null };
        let mut value = json!({
            "pid": holder.pid,
            "host": holder.host,
            "since": holder.since,
            "socket": holder.socket,
        });
        match status {
            Ok(status) => {
                value["access"] = json!(status.access);
                value["read_only"] = json!(status.read_only);
                value["unwrapped_by"] = json!(status.unwrapped_by);
                value["hydration"] = json!(status.hydration);
                value["flush_failed"] = json!(status.flush_failed);
                value["no_space"] = json!(status.no_space);
                value["limits"] = json!(status.limits);
                value["coming"] = json!(status.coming);
            }
            Err(e) => value["problem"] = json!(e.to_string()),
        }
        value
    }
}

/// How far layers have come, in words.
pub(in crate::cli) fn coming_words(far: &HowFar) -> String {
    let HowFar { come, all, from } = far;
    format!("{} of {} have come from {from}", size::about(*come), size::about(*all))
}

/// What the next attach would meet, as far as one can tell without asking the KMS.
fn next_attach(env: &Env, metadata: &Metadata) -> String {
    let allowed = || env.settings()?.check_encrypted("it", metadata.is_encrypted());
    if let Err(problem) = env.catalog().check_layers(metadata).and_then(|()| allowed()) {
        return format!("refused: {problem}");
    }
    let mut asked: Vec<String> = Vec::new();
    for key in metadata.keys() {
        let slots = key.slots().iter().map(|slot| format!("{}: {}", slot.provider, slot.wrapped.key_id));
        let name = slots.collect::<Vec<String>>().join(", or by ");
        if !asked.contains(&name) {
            asked.push(name);
        }
    }
    match asked.is_empty() {
        true => "needs no key: the volume is not encrypted".into(),
        false => format!("needs a Decrypt by {}", asked.join(" and by ")),
    }
}

/// A volume in JSON; nothing in it is secret, and the wrapped keys are left out all the same.
pub(super) fn description(catalog: &Catalog, metadata: &Metadata) -> Result<Value> {
    let held = catalog.held(metadata.id())?;
    let (tags, unreadable) = match catalog.tags(metadata.id()) {
        Ok(tags) => (json!(tags), None),
        Err(e) => (Value::Null, Some(e)),
    };
    let keys: Vec<Value> = metadata.keys().iter().map(key_json).collect();
    let layers: Vec<Value> = metadata
        .layers()
        .iter()
        .map(|layer| json!({"id": layer.id, "key": layer.key, "masked": layer.masked, "size": layer.size, "path": catalog.shown_place(layer.id).display().to_string()}))
        .collect();
    Ok(json!({
        "id": metadata.id(),
        "name": metadata.name(),
        "size": metadata.size(),
        "sector_size": metadata.sector_size(),
        "encrypted": metadata.is_encrypted(),
        "created": metadata.created(),
        "state": state(&held),
        "attached_by": match &held {
            Held::By(holder) | Held::Elsewhere(holder) => json!(holder),
            Held::Free | Held::Unknown => Value::Null,
        },
        "keys": keys,
        "layers": layers,
        "hydration": waiting(catalog, metadata),
        "coming": catalog.how_far(metadata.layers()),
        "snapshot_id": metadata.origin().map(|origin| origin.snapshot),
        "tags": tags,
        "generation": metadata.generation(),
        "attach": kept_json(catalog, metadata.id()),
        "problem": catalog.check_layers(metadata).err().or(unreadable).map(|e| e.to_string()),
    }))
}

/// What is kept with a volume for its attaches, in words.
pub(in crate::cli) fn kept_words(kept: &AttachSettings) -> String {
    let limits = modify::limits(kept);
    let mut words: Vec<String> = limit_words(limits.iops, limits.throughput).into_iter().collect();
    if kept.burst_ms.is_some() {
        words.push(format!("a burst of {} s", limits.burst.as_secs_f64()));
    }
    words.extend(kept.serial.as_ref().map(|serial| format!("serial {serial}")));
    words.extend(kept.queues.map(|queues| counted(queues, "queue", "queues")));
    if words.is_empty() { "nothing is kept for its attaches".into() } else { words.join(", ") }
}

/// What is kept with a volume for its attaches; null for what is not believed.
fn kept_json(catalog: &Catalog, id: VolumeId) -> Value {
    catalog.attach_settings(id).map_or(Value::Null, |kept| attach_json(&kept))
}

/// What is kept with a volume for its attaches, for programs.
pub(in crate::cli) fn attach_json(kept: &AttachSettings) -> Value {
    json!({
        "iops": kept.iops,
        "throughput": kept.throughput,
        "burst_seconds": kept.burst_ms.map(|ms| ms as f64 / 1000.0),
        "serial": kept.serial,
        "queues": kept.queues,
    })
}

/// What is to be copied up, whether anybody is at it or not.
fn waiting(catalog: &Catalog, metadata: &Metadata) -> Value {
    match metadata.layout().leaving() {
        0 => Value::Null,
        n => json!({"layers": n, "allocated": allocated(catalog, metadata)}),
    }
}

/// In how many bytes the leaving layers may have something: no more than that is left to be copied.
fn allocated(catalog: &Catalog, metadata: &Metadata) -> u64 {
    // What cannot be looked at is told of as the volume's problem.
    metadata.layout().leaving_layers().iter().map(|layer| usage::most_in(catalog, layer)).sum()
}

/// EBS's word for it.
pub(super) fn state(held: &Held) -> &'static str {
    match held {
        Held::Free => "available",
        Held::By(holder) | Held::Elsewhere(holder) => match holder.purpose {
            Purpose::Create => "creating",
            Purpose::Delete => "deleting",
            _ => "in-use",
        },
        Held::Unknown => "in-use",
    }
}

/// The host on which a volume is in use, for a list.
pub(super) fn host(held: &Held) -> Option<String> {
    match held {
        Held::By(holder) | Held::Elsewhere(holder) => holder.host.as_ref().map(|host| host.name.clone()),
        Held::Free | Held::Unknown => None,
    }
}

fn pair(name: &str, value: impl ToString) -> Vec<String> {
    vec![name.to_string(), value.to_string()]
}

pub(super) fn yes_or_no(it: bool) -> &'static str {
    if it { "yes" } else { "no" }
}
