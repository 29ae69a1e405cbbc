//! Events in EventBridge's shape, as EBS sends them: one JSON object a line in `events.jsonl`.
//!
//! A line is written by one write(2) under a lock and is durable before [`EventLog::append`] returns. A power
//! cut can leave a last line that is cut short: readers pass over it, and the next event begins a new line.

pub mod deliver;
pub mod read;

use crate::base::plural::counted;
use crate::base::root::{Root, create_dir_durable, files, sync_dir};
use crate::base::sync::Locked;
use crate::base::{Context, Result, Timestamp, locks, spare};
use crate::catalog::{SnapshotId, VolumeId};
use crate::config::Settings;
use nix::fcntl::OFlag;
use serde::Serialize;
use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use uuid::Uuid;

/// Most volumes that an event about a key names beside the first.
const MAX_OTHERS: usize = 99;

/// What happened to a volume or snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    name: &'static str,
    result: &'static str,
    cause: String,
    request_id: Option<Uuid>,
    volume: VolumeId,
    kms_key: Option<String>,
    snapshot: Option<OfSnapshot>,
    /// The other volumes that it is about.
    others: Vec<VolumeId>,
}

/// What an event about a snapshot has besides.
#[derive(Clone, Debug, PartialEq, Eq)]
struct OfSnapshot {
    /// `None` if the snapshot was never made.
    id: Option<SnapshotId>,
    /// The snapshot that this one is a copy of; `None` if this one is of the event's volume.
    source: Option<SnapshotId>,
    start: Timestamp,
    end: Timestamp,
    incremental: Option<bool>,
}

impl Event {
    /// An event with a request of its own, and nothing besides.
    fn new(name: &'static str, volume: VolumeId, result: &'static str) -> Self {
        Event {
            name,
            result,
            cause: String::new(),
            request_id: Some(Uuid::new_v4()),
            volume,
            kms_key: None,
            snapshot: None,
            others: Vec::new(),
        }
    }

    /// `createVolume`: `available`, or `failed` for a cause, which of a KMS is its message, word for word.
    pub fn create_volume(volume: VolumeId, result: Result<(), String>) -> Self {
        let (result, cause) = match result {
            Ok(()) => ("available", String::new()),
            Err(cause) => ("failed", cause),
        };
        Event { cause, ..Self::new("createVolume", volume, result) }
    }

    /// `deleteVolume`: `deleted`.
    pub fn delete_volume(volume: VolumeId) -> Self {
        Self::new("deleteVolume", volume, "deleted")
    }

    /// `attachVolume`, or `reattachVolume` for a volume that was attached before: `failed`. `cause` is the
    /// KMS's message, word for word; `kms_key` the key's ARN.
    pub fn attach_failed(
        volume: VolumeId,
        kms_key: Option<&str>,
        cause: impl Into<String>,
        reattach: bool,
    ) -> Self {
        let name = if reattach { "reattachVolume" } else { "attachVolume" };
        let (cause, kms_key) = (cause.into(), kms_key.map(Into::into));
        Event { cause, kms_key, request_id: None, ..Self::new(name, volume, "failed") }
    }

    /// `modifyVolume`: how far it has come, `modifying`, `optimizing` or `completed`.
    pub fn modify_volume(volume: VolumeId, result: &'static str) -> Self {
        Self::new("modifyVolume", volume, result)
    }

    /// `modifyVolume`: `failed`, for a cause.
    pub fn modify_failed(volume: VolumeId, cause: impl Into<String>) -> Self {
        Event { cause: cause.into(), ..Self::modify_volume(volume, "failed") }
    }

    /// `watchKey`, which EBS does not have: the KMS key of these volumes is `usable`, `unusable`,
    /// `unreachable` or `pending-deletion`, and was not before. There is one volume at least.
    pub fn watch_key(
        volumes: Vec<VolumeId>,
        kms_key: &str,
        result: &'static str,
        cause: impl Into<String>,
    ) -> Self {
        let mut others = volumes;
        let volume = others.remove(0);
        others.truncate(MAX_OTHERS);
        let kms_key = Some(kms_key.into());
        Event {
            name: "watchKey",
            kms_key,
            cause: cause.into(),
            others,
            ..Self::modify_volume(volume, result)
        }
    }

    /// `unwrapKey`, which EBS does not have: `by-another`. The KMS keys that were asked first for a data key
    /// of the volume have not given it, for this cause; `kms_key` has.
    pub fn unwrapped_by_another(volume: VolumeId, kms_key: &str, cause: impl Into<String>) -> Self {
        let (cause, kms_key) = (cause.into(), Some(kms_key.into()));
        Event { cause, kms_key, ..Self::new("unwrapKey", volume, "by-another") }
    }

    /// `fenceVolume`, which EBS does not have: `failed`, for a cause. Another process has taken the RBD image
    /// that an attached volume lies in, and every request fails from now on.
    pub fn lost_image(volume: VolumeId, cause: impl Into<String>) -> Self {
        Event { name: "fenceVolume", ..Self::modify_failed(volume, cause) }
    }

    /// `flushVolume`, which EBS does not have: `failed`, for a cause. Writes that had completed may be lost,
    /// and no flush succeeds until the volume is attached again.
    pub fn flush_failed(volume: VolumeId, cause: impl Into<String>) -> Self {
        Event { name: "flushVolume", ..Self::modify_failed(volume, cause) }
    }

    /// `writeVolume`, which EBS does not have: `failed`. So many requests of the guest's failed for want of
    /// space since the last such event.
    pub fn write_refused(volume: VolumeId, requests: u64, cause: &impl std::fmt::Display) -> Self {
        let requests = counted(requests, "request of the guest's was", "requests of the guest's were");
        let cause =
            format!("{cause}: {requests} answered with an I/O error; make space, and they succeed again");
        Event { name: "writeVolume", ..Self::modify_failed(volume, cause) }
    }

    /// `hydrateVolume`, which EBS does not have: what lower layers hold is hydrated into the top one, under
    /// the data key that the KMS key `kms_key` wraps. How far it has come: `hydrating`,
    /// `completed` or `cancelled`.
    pub fn hydrate_volume(volume: VolumeId, kms_key: Option<&str>, result: &'static str) -> Self {
        let kms_key = kms_key.map(Into::into);
        Event { name: "hydrateVolume", kms_key, ..Self::modify_volume(volume, result) }
    }

    /// `hydrateVolume`: `failed`, for a cause. It is tried again.
    pub fn hydrate_failed(volume: VolumeId, kms_key: Option<&str>, cause: impl Into<String>) -> Self {
        Event { cause: cause.into(), ..Self::hydrate_volume(volume, kms_key, "failed") }
    }

    /// `hydrateVolume`: `waiting`, for space. It goes on by itself.
    pub fn hydrate_waits(volume: VolumeId, kms_key: Option<&str>, cause: impl Into<String>) -> Self {
        Event { cause: cause.into(), ..Self::hydrate_volume(volume, kms_key, "waiting") }
    }

    /// `copySnapshot` of `source`, which is of `volume`: `succeeded`, or `failed` for a cause. `incremental`
    /// if the two share their data.
    pub fn copy_snapshot(
        source: SnapshotId,
        volume: VolumeId,
        result: Result<SnapshotId, String>,
        start: Timestamp,
        incremental: bool,
    ) -> Self {
        let incremental = result.is_ok().then_some(incremental);
        let mut event = Self::create_snapshot(volume, result, start);
        event.name = "copySnapshot";
        if let Some(snapshot) = &mut event.snapshot {
            (snapshot.source, snapshot.incremental) = (Some(source), incremental);
        }
        event
    }

    /// `pushSnapshot`, which EBS does not have: a snapshot of `volume` is in a place outside, `succeeded`, or
    /// `failed` for a cause. `incremental` if the place had some of its data already.
    pub fn push_snapshot(
        snapshot: SnapshotId,
        volume: VolumeId,
        result: Result<bool, String>,
        start: Timestamp,
    ) -> Self {
        let incremental = result.as_ref().ok().copied();
        let mut event = Self::create_snapshot(volume, result.map(|_| snapshot), start);
        event.name = "pushSnapshot";
        if let Some(of) = &mut event.snapshot {
            (of.id, of.incremental) = (Some(snapshot), incremental);
        }
        event
    }

    /// `pullSnapshot`, which EBS does not have: a snapshot was made of what a place outside has of `source`,
    /// which is of `volume`: `succeeded`, or `failed` for a cause.
    pub fn pull_snapshot(
        source: SnapshotId,
        volume: VolumeId,
        result: Result<SnapshotId, String>,
        start: Timestamp,
    ) -> Self {
        let event = Self::copy_snapshot(source, volume, result, start, false);
        Event { name: "pullSnapshot", ..event }
    }

    /// `pullSnapshot`, of what is still to come of the layers of `volume` when the snapshot is there already:
    /// `waiting` or `failed`, for a cause, `pulling` again, or `completed`.
    pub fn pull_rest(volume: VolumeId, result: &'static str, cause: impl Into<String>) -> Self {
        Event { cause: cause.into(), ..Self::new("pullSnapshot", volume, result) }
    }

    /// `exportVolume`, or of a snapshot of it `exportSnapshot`: `succeeded`, or `failed` for a
    /// cause. EBS has no such event.
    pub fn export(
        volume: VolumeId,
        snapshot: Option<SnapshotId>,
        result: Result<(), String>,
        start: Timestamp,
    ) -> Self {
        let (result, cause) = match result {
            Ok(()) => ("succeeded", String::new()),
            Err(cause) => ("failed", cause),
        };
        let end = Timestamp::now();
        let of = |id| OfSnapshot { id: Some(id), source: None, start, end, incremental: None };
        let name = if snapshot.is_some() { "exportSnapshot" } else { "exportVolume" };
        Event { cause, snapshot: snapshot.map(of), ..Self::new(name, volume, result) }
    }

    /// `createSnapshot`: `succeeded`, or `failed` for a cause.
    pub fn create_snapshot(volume: VolumeId, result: Result<SnapshotId, String>, start: Timestamp) -> Self {
        let snapshot = OfSnapshot {
            id: result.as_ref().ok().copied(),
            source: None,
            start,
            end: Timestamp::now(),
            incremental: None,
        };
        let (result, cause) = match result {
            Ok(_) => ("succeeded", String::new()),
            Err(cause) => ("failed", cause),
        };
        Event { cause, snapshot: Some(snapshot), ..Self::new("createSnapshot", volume, result) }
    }
}

#[derive(Serialize)]
struct Written<'a> {
    version: &'a str,
    id: String,
    #[serde(rename = "detail-type")]
    detail_type: &'a str,
    source: &'a str,
    account: &'a str,
    time: Timestamp,
    region: &'a str,
    resources: Vec<String>,
    detail: Detail<'a>,
}

#[derive(Serialize)]
struct Detail<'a> {
    event: &'a str,
    result: &'a str,
    cause: &'a str,
    #[serde(rename = "request-id")]
    request_id: String,
    #[serde(flatten)]
    snapshot: Option<SnapshotDetail>,
}

/// Named as EBS names them, each in its own way.
#[derive(Serialize)]
struct SnapshotDetail {
    snapshot_id: String,
    source: String,
    #[serde(rename = "startTime")]
    start: Timestamp,
    #[serde(rename = "endTime")]
    end: Timestamp,
    #[serde(rename = "Incremental", skip_serializing_if = "Option::is_none")]
    incremental: Option<String>,
}

/// The store's `events.jsonl`, for those who report.
#[derive(Clone, Debug)]
pub struct EventLog {
    root: PathBuf,
    path: PathBuf,
    account: String,
    region: String,
    /// The file, for a process that will not be able to open it any more.
    open: Option<Arc<Mutex<File>>>,
}

impl EventLog {
    /// The log of the store at `root`; nothing is opened or made yet.
    pub fn new(root: &Root, settings: &Settings) -> Self {
        EventLog {
            root: root.path().to_path_buf(),
            path: root.events(),
            account: settings.locality.account.clone(),
            region: settings.locality.region.clone(),
            open: None,
        }
    }

    /// Opens the file now, and never again: for a process that is going to be confined.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn keep_open(&mut self) -> Result<()> {
        let file = self.open_file().context(|| format!("open {}", self.path.display()))?;
        self.open = Some(Arc::new(Mutex::new(file)));
        Ok(())
    }

    fn open_file(&self) -> Result<File> {
        create_dir_durable(&self.root)?;
        let is_new = !files::exists(&self.path);
        let file = files::open_with(&self.path, OFlag::O_RDWR | OFlag::O_APPEND | OFlag::O_CREAT)?;
        if is_new {
            sync_dir(&self.root)?;
        }
        Ok(file)
    }

    /// Appends an event. For those who have something more important to report: a failure is logged.
    pub fn record(&self, event: &Event) {
        if let Err(e) = self.append(event) {
            log::error!("an event was lost: {e}");
        }
    }

    /// Appends an event; it is durable when this returns.
    pub fn append(&self, event: &Event) -> Result<()> {
        self.append_line(&self.line(event)).context(|| format!("write an event to {}", self.path.display()))
    }

    fn line(&self, event: &Event) -> Vec<u8> {
        let volume = self.arn("volume", event.volume);
        let of_snapshot = event.snapshot.as_ref();
        let detail = of_snapshot.map(|s| SnapshotDetail {
            snapshot_id: s.id.map(|id| self.arn("snapshot", id)).unwrap_or_default(),
            source: s.source.map_or_else(|| volume.clone(), |id| self.arn("snapshot", id)),
            start: s.start,
            end: s.end,
            incremental: s.incremental.map(|yes| yes.to_string()),
        });
        // A snapshot that was never made has no name.
        let snapshot = of_snapshot.and_then(|s| s.id).map(|id| self.arn("snapshot", id));
        let resource = snapshot.unwrap_or(volume);
        let others = event.others.iter().map(|id| self.arn("volume", id));
        let written = Written {
            version: "0",
            id: Uuid::new_v4().to_string(),
            detail_type: match of_snapshot {
                Some(_) => "EBS Snapshot Notification",
                None => "EBS Volume Notification",
            },
            source: "aws.ec2",
            account: &self.account,
            time: Timestamp::now(),
            region: &self.region,
            resources: std::iter::once(resource).chain(event.kms_key.clone()).chain(others).collect(),
            detail: Detail {
                event: event.name,
                result: event.result,
                cause: &event.cause,
                request_id: event.request_id.map(|id| id.to_string()).unwrap_or_default(),
                snapshot: detail,
            },
        };
        let mut line = serde_json::to_vec(&written).expect("strings and lists of strings");
        line.push(b'\n');
        line
    }

    fn arn(&self, kind: &str, id: impl std::fmt::Display) -> String {
        format!("arn:aws:ec2:{}:{}:{kind}/{id}", self.region, self.account)
    }

    fn append_line(&self, line: &[u8]) -> Result<()> {
        // The lock below is the open file's, and would let several threads of this process in.
        let open = self.open.as_ref().map(|file| file.locked());
        let file = match &open {
            Some(file) => file.try_clone()?,
            None => self.open_file()?,
        };
        let mut file = locks::lock_whole(file)?;
        let before = file.metadata()?.len();
        let mut bytes = Vec::with_capacity(line.len() + 1);
        if !ends_a_line(&file, before)? {
            bytes.push(b'\n');
        }
        bytes.extend_from_slice(line);
        let append = || match file.write(&bytes)? {
            written if written == bytes.len() => Ok(()),
            _ => {
                // Rather no event than half of one.
                file.set_len(before)?;
                Err(io::Error::new(ErrorKind::StorageFull, "the file system is full"))
            }
        };
        spare::with(append)?;
        Ok(file.sync_data()?)
    }
}

fn ends_a_line(file: &File, len: u64) -> std::io::Result<bool> {
    let Some(last) = len.checked_sub(1) else { return Ok(true) };
    let mut byte = [0];
    file.read_exact_at(&mut byte, last)?;
    Ok(byte == *b"\n")
}

#[cfg(test)]
mod tests {
    use super::read::{EventReader, Want};
    use super::*;
    use serde_json::{Value, json};
    use std::os::unix::fs::PermissionsExt;

    fn store() -> (tempfile::TempDir, Root, EventLog) {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(dir.path().join("store"));
        let log = EventLog::new(&root, &Settings::default());
        (dir, root, log)
    }

    fn all(root: &Root) -> Vec<Value> {
        let mut events = Vec::new();
        let take = |r: &read::Recorded| {
            events.push(r.event.clone());
            Ok(Want::More)
        };
        EventReader::new(root).read(take).unwrap();
        events
    }

    #[test]
    fn an_event_has_the_shape_of_eventbridge() {
        let (_dir, root, log) = store();
        let id = VolumeId::random();
        let key = "arn:aws:kms:us-east-1:000000000000:key/1";
        log.append(&Event::attach_failed(id, Some(key), format!("{key} is disabled."), true)).unwrap();
        let mut event = all(&root).remove(0);
        for field in ["id", "time"] {
            assert!(event[field].is_string());
            event.as_object_mut().unwrap().remove(field);
        }
        let volume = format!("arn:aws:ec2:us-east-1:000000000000:volume/{id}");
        let expected = json!({
            "version": "0", "detail-type": "EBS Volume Notification", "source": "aws.ec2",
            "account": "000000000000", "region": "us-east-1", "resources": [volume, key],
            "detail": {"event": "reattachVolume", "result": "failed", "cause": format!("{key} is disabled."),
                       "request-id": ""},
        });
        assert_eq!(event, expected);
        assert_eq!(std::fs::metadata(root.events()).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn results_have_the_words_of_ebs() {
        let (_dir, root, log) = store();
        let id = VolumeId::random();
        log.append(&Event::create_volume(id, Ok(()))).unwrap();
        log.append(&Event::create_volume(id, Err("no".into()))).unwrap();
        log.append(&Event::delete_volume(id)).unwrap();
        log.append(&Event::attach_failed(id, None, "no", false)).unwrap();
        let told: Vec<Value> =
            all(&root).iter().map(|e| json!([e["detail"]["event"], e["detail"]["result"]])).collect();
        let expected = [
            json!(["createVolume", "available"]),
            json!(["createVolume", "failed"]),
            json!(["deleteVolume", "deleted"]),
            json!(["attachVolume", "failed"]),
        ];
        assert_eq!(told, expected);
        assert_eq!(all(&root)[1]["detail"]["cause"], "no");
        assert_eq!(all(&root)[0]["detail"]["request-id"].as_str().unwrap().len(), 36);
    }

    #[test]
    fn a_torn_last_line_costs_no_other_event() {
        let (_dir, root, log) = store();
        let id = VolumeId::random();
        log.append(&Event::delete_volume(id)).unwrap();
        let whole = std::fs::read(root.events()).unwrap();
        for cut in 1..whole.len() {
            let torn = [&whole[..], &whole[..cut]].concat();
            std::fs::write(root.events(), torn).unwrap();
            assert_eq!(all(&root).len(), 1, "{cut}");
            log.append(&Event::delete_volume(id)).unwrap();
            assert!(all(&root).len() >= 2, "{cut}");
        }
    }

    #[test]
    fn events_of_many_writers_do_not_mix() {
        let (_dir, root, log) = store();
        std::thread::scope(|threads| {
            for _ in 0..8 {
                threads.spawn(|| {
                    (0..20).for_each(|_| log.append(&Event::delete_volume(VolumeId::random())).unwrap())
                });
            }
        });
        assert_eq!(all(&root).len(), 160);
    }
}
