//! What a record says, in CloudTrail's shape: who did what, with which key, and how it went.
//!
//! It never holds a ciphertext, a plaintext or a token: whoever makes an entry names what goes
//! into it, field by field.

use crate::base::{Locality, Timestamp};
use serde::Serialize;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::sync::OnceLock;
use uuid::Uuid;

/// Bytes of JSON that one parameter may have; of a longer one only the length is recorded.
const PARAMETER_MAX: usize = 8 << 10;
/// Bytes of JSON that all parameters may have together.
const PARAMETERS_MAX: usize = 32 << 10;
/// Characters of an error's message that are recorded.
const MESSAGE_MAX: usize = 1000;

/// What one record says.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Entry {
    event_version: &'static str,
    #[serde(rename = "eventID")]
    event_id: Uuid,
    event_time: Timestamp,
    event_source: &'static str,
    event_name: String,
    event_type: &'static str,
    read_only: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    aws_region: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    recipient_account_id: Option<String>,
    user_identity: Value,
    request_parameters: Value,
    response_elements: Value,
    resources: Vec<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error_code: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error_message: Option<String>,
}

/// What records of the life of data keys say they come from.
const DEK_SOURCE: &str = "sealblk";

/// A step in the life of a data key (DEK).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// A KMS made it, wrapped.
    Generate,
    /// A KMS unwrapped the data key for this process, or for the one that this process helps.
    Unwrap,
    /// A KMS wrapped the data key anew: under another key, or for another volume.
    Rewrap,
    /// A process has the data key, and serves the volume.
    Attach,
    /// The process that had the data key has wiped it.
    Detach,
    /// What the data key encrypts is going to be written into a file, in the clear.
    Export,
    /// The store's wrapped copies of it were removed, and with them the volume.
    Destroy,
}

impl Step {
    fn name(self) -> &'static str {
        match self {
            Step::Generate => "GenerateDek",
            Step::Unwrap => "UnwrapDek",
            Step::Rewrap => "RewrapDek",
            Step::Attach => "AttachVolume",
            Step::Detach => "DetachVolume",
            Step::Export => "ExportVolume",
            Step::Destroy => "DestroyDek",
        }
    }
}

impl Entry {
    /// A call of a KMS's operation `name`, which has succeeded.
    pub fn kms_call(name: &str, place: &Locality) -> Self {
        let entry = Entry::new(crate::audit::KMS_SOURCE, name, "AwsApiCall");
        let (region, account) = (Some(place.region.clone()), Some(place.account.clone()));
        Entry { read_only: is_read_only(name), aws_region: region, recipient_account_id: account, ..entry }
    }

    /// What a KMS did by itself, because its time had come.
    pub fn kms_service(name: &str, place: &Locality) -> Self {
        let identity = json!({ "type": "AWSService", "invokedBy": crate::audit::KMS_SOURCE });
        let entry = Entry::kms_call(name, place).by(identity);
        Entry { event_type: "AwsServiceEvent", ..entry }
    }

    /// A step in the life of a data key that is bound to `context`, wrapped by the key `arn` of
    /// `provider`'s. It has succeeded.
    pub fn dek(step: Step, context: &BTreeMap<String, String>, provider: &str, arn: &str) -> Self {
        let entry = Entry::new(DEK_SOURCE, step.name(), "SealblkStep");
        let entry = Entry { read_only: step == Step::Unwrap, ..entry }.about_key(arn);
        let entry = entry.with("provider", provider).with("keyId", arn);
        entry.with("encryptionContext", json!(context))
    }

    /// An operator has accepted the record of `id`, which calls itself `name`, in spite of `doubt`.
    pub fn accepted(id: &str, name: Option<&str>, doubt: &str) -> Self {
        let entry = Entry::new(DEK_SOURCE, "AcceptRecord", "SealblkStep");
        entry.with("record", id).with("name", name).with("problem", doubt)
    }

    fn new(event_source: &'static str, name: &str, event_type: &'static str) -> Self {
        Entry {
            event_version: "1.08",
            event_id: Uuid::new_v4(),
            event_time: Timestamp::now(),
            event_source,
            event_name: name.into(),
            event_type,
            read_only: false,
            aws_region: None,
            recipient_account_id: None,
            user_identity: json!({ "type": "LocalUser", "uid": nix::unistd::getuid().as_raw() }),
            request_parameters: Value::Object(Map::new()),
            response_elements: Value::Null,
            resources: Vec::new(),
            error_code: None,
            error_message: None,
        }
    }

    /// This record, of something that was done in this region, if that is known.
    pub fn in_region(self, region: Option<String>) -> Self {
        Entry { aws_region: region, ..self }
    }

    /// This record, of a call by somebody else than this process's user.
    pub fn by(self, user_identity: Value) -> Self {
        Entry { user_identity, ..self }
    }

    /// This record with a parameter. A value that is too long is recorded by its length.
    pub fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        let mut value = value.into();
        let len = value.to_string().len();
        if len > PARAMETER_MAX || len + self.request_parameters.to_string().len() > PARAMETERS_MAX {
            value = format!("left out: {len} bytes").into();
        }
        self.request_parameters[name] = value;
        self
    }

    /// This record, about the KMS key of this ARN too.
    pub fn about_key(mut self, arn: &str) -> Self {
        let account = arn.split(':').nth(4);
        let key = json!({ "ARN": arn, "accountId": account, "type": "AWS::KMS::Key" });
        if !self.resources.contains(&key) {
            self.resources.push(key);
        }
        self
    }

    /// This record with something of the answer.
    pub fn answering(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.response_elements[name] = value.into();
        self
    }

    /// This record, of a call that was refused or failed.
    pub fn failed(self, code: &str, message: &str) -> Self {
        let message = message.chars().take(MESSAGE_MAX).collect();
        Entry { error_code: Some(code.into()), error_message: Some(message), ..self }
    }
}

/// As CloudTrail has it: what changes neither keys nor what is known of them.
fn is_read_only(operation: &str) -> bool {
    let reads = ["Describe", "Get", "List", "Generate", "Encrypt", "Decrypt", "ReEncrypt"];
    reads.iter().any(|read| operation.starts_with(read))
}

/// The process that writes a record.
#[derive(Clone, Debug, Serialize)]
pub struct Process {
    pid: u32,
    ppid: u32,
    uid: u32,
    /// Who logged in, whatever he has become since; absent for services.
    #[serde(skip_serializing_if = "Option::is_none")]
    loginuid: Option<u32>,
    program: String,
}

impl Process {
    /// This one. Asked before a process is confined: it reads `/proc`.
    pub fn this() -> Self {
        let loginuid = std::fs::read_to_string("/proc/self/loginuid").ok();
        Process {
            pid: std::process::id(),
            ppid: std::os::unix::process::parent_id(),
            uid: nix::unistd::getuid().as_raw(),
            loginuid: loginuid.and_then(|text| text.trim().parse().ok()).filter(|uid| *uid != u32::MAX),
            program: program(),
        }
    }
}

/// The command that this process carries out, for its records: `volume create`.
static COMMAND: OnceLock<String> = OnceLock::new();

/// Says which command this process carries out. Said once, before anything is recorded; of a process that
/// says nothing, the records name the program alone.
pub fn name_command(words: &str) {
    let _ = COMMAND.set(words.to_owned());
}

/// The program's path and its command.
fn program() -> String {
    let path = std::env::current_exe().map_or_else(|_| "sealblk".into(), |path| path.display().to_string());
    match COMMAND.get() {
        Some(command) => format!("{path} {command}"),
        None => path,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_long_is_recorded_by_its_length() {
        let place = Locality::default();
        let mut entry = Entry::kms_call("PutKeyPolicy", &place).with("policy", "x".repeat(PARAMETER_MAX));
        assert_eq!(entry.request_parameters["policy"], format!("left out: {} bytes", PARAMETER_MAX + 2));
        for n in 0..100 {
            entry = entry.with(&format!("p{n}"), "\u{1}".repeat(1000));
        }
        let entry = entry.failed("ValidationException", &"\u{1}".repeat(100_000));
        let (line, _) =
            crate::audit::line::encode(Uuid::nil(), &crate::audit::Position::START, &entry, None).unwrap();
        assert!(line.len() < crate::audit::line::LINE_MAX, "{}", line.len());
    }
}
