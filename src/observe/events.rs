//! Events in EventBridge's shape, as EBS sends them: one JSON object a line in `events.jsonl`.
//!
//! A line is written by one write(2) under a lock and is durable before [`EventLog::append`] returns. A power
//! cut can leave a last line that is cut short: readers pass over it, and the next event begins a new line.

pub mod read;

use super::Timestamp;
use crate::config::Settings;
use crate::error::{Context, Error, Kind, Result};
use crate::root::{Root, create_dir_durable, sync_dir};
use crate::volume::VolumeId;
use nix::fcntl::{Flock, FlockArg};
use serde::Serialize;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use uuid::Uuid;

/// What happened to a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    name: &'static str,
    result: &'static str,
    cause: String,
    request_id: Option<Uuid>,
    volume: VolumeId,
    kms_key: Option<String>,
}

impl Event {
    /// `createVolume`: `available`, or `failed` with the error as its cause.
    pub fn create_volume(volume: VolumeId, result: Result<(), &Error>) -> Self {
        let (result, cause) = match result {
            Ok(()) => ("available", String::new()),
            Err(e) => ("failed", e.to_string()),
        };
        let request_id = Some(Uuid::new_v4());
        Event { name: "createVolume", result, cause, request_id, volume, kms_key: None }
    }

    /// `deleteVolume`: `deleted`.
    pub fn delete_volume(volume: VolumeId) -> Self {
        let (cause, request_id) = (String::new(), Some(Uuid::new_v4()));
        Event { name: "deleteVolume", result: "deleted", cause, request_id, volume, kms_key: None }
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
        Event { name, result: "failed", cause, request_id: None, volume, kms_key }
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
}

/// The store's `events.jsonl`, for those who report.
#[derive(Clone, Debug)]
pub struct EventLog {
    root: PathBuf,
    path: PathBuf,
    account: String,
    region: String,
}

impl EventLog {
    /// The log of the store at `root`; nothing is opened or made yet.
    pub fn new(root: &Root, settings: &Settings) -> Self {
        EventLog {
            root: root.path().to_path_buf(),
            path: root.events(),
            account: settings.account.clone(),
            region: settings.region.clone(),
        }
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
        let arn = format!("arn:aws:ec2:{}:{}:volume/{}", self.region, self.account, event.volume);
        let written = Written {
            version: "0",
            id: Uuid::new_v4().to_string(),
            detail_type: "EBS Volume Notification",
            source: "aws.ec2",
            account: &self.account,
            time: Timestamp::now(),
            region: &self.region,
            resources: std::iter::once(arn).chain(event.kms_key.clone()).collect(),
            detail: Detail {
                event: event.name,
                result: event.result,
                cause: &event.cause,
                request_id: event.request_id.map(|id| id.to_string()).unwrap_or_default(),
            },
        };
        let mut line = serde_json::to_vec(&written).expect("strings and lists of strings");
        line.push(b'\n');
        line
    }

    fn append_line(&self, line: &[u8]) -> Result<()> {
        create_dir_durable(&self.root)?;
        let is_new = !self.path.exists();
        let file = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(&self.path)?;
        let mut file = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, e)| e)?;
        let before = file.metadata()?.len();
        let mut bytes = Vec::with_capacity(line.len() + 1);
        if !ends_a_line(&file, before)? {
            bytes.push(b'\n');
        }
        bytes.extend_from_slice(line);
        let written = file.write(&bytes)?;
        if written != bytes.len() {
            // Rather no event than half of one.
            file.set_len(before)?;
            return Err(Error::new(Kind::Other, "the file system is full"));
        }
        file.sync_data()?;
        if is_new { sync_dir(&self.root) } else { Ok(()) }
    }
}

fn ends_a_line(file: &File, len: u64) -> std::io::Result<bool> {
    let Some(last) = len.checked_sub(1) else { return Ok(true) };
    let mut byte = [0];
    file.read_exact_at(&mut byte, last)?;
    Ok(byte == *b"\n")
}
