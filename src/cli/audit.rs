//! `sealblk audit`: who used which key when, and whether the log of it is whole.
#![forbid(unsafe_code)]

use crate::audit;
use crate::audit::verify::{Report, each_line, verify};
use crate::base::plural::counted;
use crate::base::root::{Root, files};
use crate::base::{Context, Error, Kind, Result, Timestamp};
use crate::catalog::VolumeId;
use crate::cli::{Env, output};
use crate::events::read::Want;
use crate::kms::embedded::Embedded;
use serde_json::Value;
use std::ops::ControlFlow;
use std::time::Duration;

/// What can be done with the audit log.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Show the records, oldest first.
    #[command(after_help = "\
Examples:
  sealblk audit show --since 24h
  sealblk audit show --volume db --json
  sealblk audit show --key alias/aws/ebs --since 2026-01-31T00:00:00Z

Each use of a KMS key is a record (Decrypt, GenerateDataKeyWithoutPlaintext, DisableKey, …), and each step in the life of
a data key, the DEK: GenerateDek, UnwrapDek, AttachVolume, DetachVolume, ExportVolume, RewrapDek, DestroyDek. An attach is
Decrypt and UnwrapDek by the helper, then AttachVolume by the process that serves it. A process that was killed
leaves no DetachVolume.

With --json each record is printed as it lies in the log, one a line, in CloudTrail's shape. What is shown was not
checked: \"sealblk audit verify\" does that.")]
    Show(ShowArgs),
    /// Check that no record was changed, removed, moved or cut off.
    #[command(after_help = "\
Examples:
  sealblk audit verify
  sealblk audit verify --json || mail -s 'audit log' security@example.com </dev/null

Exit code 0: the log is whole. Exit code 7: it is not; the first bad record is named. A record names the one before it by
its hash, and the marks beside the KMS's root key name the last one. Run by who can read that root key, it checks the
records' MACs too. A record that a crash left unfinished is noted and is no damage.")]
    Verify,
}

/// What `audit show` takes.
#[derive(Debug, clap::Args)]
pub struct ShowArgs {
    /// Only what was recorded since then: a time like 2026-01-31T23:59:59Z, or how long
    /// ago, like 90m, 24h, 7d.
    #[arg(long, value_name = "WHEN", value_parser = since)]
    since: Option<Timestamp>,
    /// Only what is about this volume: its id or name, or the id of one that was deleted.
    #[arg(long, value_name = "VOLUME")]
    volume: Option<String>,
    /// Only what is about this KMS key: its ARN, id or alias.
    #[arg(long, value_name = "KEY")]
    key: Option<String>,
}

/// Runs one `sealblk audit` command.
pub fn run(env: &Env, command: Command) -> Result<()> {
    match command {
        Command::Show(args) => show(env, args),
        Command::Verify => check(env),
    }
}

/// Which records are wanted.
#[derive(Default)]
struct Filter {
    since: Option<Timestamp>,
    volume: Option<String>,
    key: Option<String>,
}

impl Filter {
    fn new(env: &Env, args: ShowArgs) -> Result<Self> {
        let volume = args.volume.map(|volume| volume_id(env, &volume)).transpose()?;
        let key = args.key.map(|key| key_name(env, &key));
        Ok(Filter { since: args.since, volume, key })
    }

    fn wants(&self, record: &Value) -> bool {
        let time = || Timestamp::try_from(record["eventTime"].as_str()?.to_owned()).ok();
        let parameters = &record["requestParameters"];
        let contexts = ["encryptionContext", "sourceEncryptionContext", "destinationEncryptionContext"];
        let of_volume = |id: &str| {
            let contexts = contexts.iter().map(|name| &parameters[*name]);
            // A grant is made for contexts too.
            let constraints = parameters["constraints"].as_object().into_iter().flat_map(|c| c.values());
            let mut pairs = contexts.chain(constraints).filter_map(Value::as_object).flat_map(|c| c.values());
            pairs.any(|value| value == id)
        };
        let resources = record["resources"].as_array().map_or(&[][..], Vec::as_slice);
        let of_key = |key: &str| {
            let arns = resources.iter().filter_map(|resource| resource["ARN"].as_str());
            let mut named = arns.chain(parameters["keyId"].as_str());
            named.any(|named| named == key || named.rsplit('/').next() == Some(key))
        };
        self.since.is_none_or(|since| time().is_some_and(|time| time >= since))
            && self.volume.as_deref().is_none_or(of_volume)
            && self.key.as_deref().is_none_or(of_key)
    }
}

fn volume_id(env: &Env, volume: &str) -> Result<String> {
    if let Ok(id) = volume.parse::<VolumeId>() {
        return Ok(id.to_string());
    }
    env.catalog().resolve(volume).map(|id| id.to_string()).map_err(|e| {
        let hint = "of a volume that was deleted, give the whole id";
        let message = format!("{e}; {hint}");
        e.reworded(message)
    })
}

/// The ARN of the key that is meant, if the embedded KMS knows it; else what was given.
fn key_name(env: &Env, key: &str) -> String {
    let known = Embedded::open(&env.root, env.hardened).and_then(|kms| kms.key(key));
    known.map_or_else(|_| key.strip_prefix("aws:").unwrap_or(key).to_owned(), |key| key.arn)
}

fn show(env: &Env, args: ShowArgs) -> Result<()> {
    let filter = Filter::new(env, args)?;
    let path = audit::path(&env.root);
    let attempt = || format!("read the audit log {}", path.display());
    let file = match files::open(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        opened => opened.context(attempt)?,
    };
    let mut outcome = Ok(Want::More);
    each_line(file, |bytes, _| {
        match serde_json::from_slice::<Value>(bytes).ok().filter(Value::is_object) {
            None => log::warn!("{}: passing over a line that is no record", path.display()),
            Some(record) if filter.wants(&record) => {
                outcome = match env.json {
                    true => output::print(&(String::from_utf8_lossy(bytes) + "\n")),
                    false => output::print(&line(&record)),
                };
            }
            Some(_) => {}
        }
        if matches!(outcome, Ok(Want::More)) { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })
    .context(attempt)?;
    outcome.map(drop)
}

/// One record as a line of text: number, when, what, how it went, about what, and who did it.
fn line(record: &Value) -> String {
    let text = |place: &str| record.pointer(place).and_then(Value::as_str).unwrap_or("-").to_owned();
    let context = record.pointer("/requestParameters/encryptionContext").and_then(Value::as_object);
    let mut about: Vec<String> = context
        .into_iter()
        .flat_map(|pairs| pairs.values())
        .filter_map(Value::as_str)
        .map(Into::into)
        .collect();
    let resources = record["resources"].as_array().map_or(&[][..], Vec::as_slice);
    about.extend(resources.iter().filter_map(|resource| resource["ARN"].as_str()).map(Into::into));
    let who = match record.pointer("/userIdentity/arn").and_then(Value::as_str) {
        Some(arn) => arn.to_owned(),
        None => format!("uid {}", record["process"]["uid"]),
    };
    let outcome = if record["errorCode"].is_string() { text("/errorCode") } else { "ok".into() };
    let mut line = format!(
        "{}  {}  {}  {outcome}  {}  by {who}, {} (pid {})",
        record["seq"],
        text("/eventTime"),
        text("/eventName"),
        about.join(" "),
        text("/process/program"),
        record["process"]["pid"],
    );
    // What somebody has put into a context is not to move a terminal's cursor.
    line.retain(|c| !c.is_control());
    line + "\n"
}

fn check(env: &Env) -> Result<()> {
    // Without settings there is no key: whoever can break them could have MACs that are not checked.
    env.settings()?;
    let key = match Embedded::open(&env.root, env.hardened).and_then(|kms| kms.audit_key()) {
        Ok(key) => key,
        Err(e) => {
            log::warn!("the records' MACs cannot be checked: {e}");
            None
        }
    };
    let report = verify(env.root.path(), &Root::config_dir()?, key.as_ref())?;
    match env.json {
        true => output::print_json(&report)?,
        false => output::print(&text(&report)).map(drop)?,
    }
    match report.problem {
        None => Ok(()),
        Some(problem) => {
            let path = audit::path(&env.root);
            Err(Error::new(Kind::Corrupt, format!("the audit log {}: {}", path.display(), problem.message)))
        }
    }
}

fn text(report: &Report) -> String {
    let Report { records, authenticated, unchecked, marked, unfinished, problem } = report;
    let mut lines = vec![match problem {
        None => format!(
            "the audit log is whole: {}, {authenticated} of them with a MAC that is right",
            counted(*records, "record", "records")
        ),
        Some(_) => format!("records 1 to {records} are as they were written; what follows them is not"),
    }];
    if *unchecked > 0 {
        let macs = counted(*unchecked, "MAC was", "MACs were");
        lines.push(format!(
            "{macs} not checked: this user cannot read the key, or another KMS store made them"
        ));
    }
    match marked {
        _ if problem.is_some() || *records == 0 => {}
        Some(seq) if seq == records => {
            lines.push("the marks beside the root key name the last record".into())
        }
        Some(seq) => lines.push(format!(
            "the marks beside the root key name record {seq}: whether more than \
             {records} were written, nothing tells"
        )),
        None => lines.push("no mark of this log is here: whether its end was cut off, nothing tells".into()),
    }
    if !unfinished.is_empty() && problem.is_none() {
        let places: Vec<String> = unfinished.iter().map(u64::to_string).collect();
        lines.push(format!(
            "a crash left a record unfinished in line {}; it was not acted on",
            places.join(", ")
        ));
    }
    lines.join("\n") + "\n"
}

fn since(text: &str) -> Result<Timestamp, String> {
    if let Ok(time) = Timestamp::try_from(text.to_owned()) {
        return Ok(time);
    }
    let wrong = || "it is a time like 2026-01-31T23:59:59Z, or a number and s, m, h or d".to_owned();
    let (number, unit) = text.split_at_checked(text.len().saturating_sub(1)).ok_or_else(wrong)?;
    let seconds = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86400,
        _ => return Err(wrong()),
    };
    let number: u64 = number.parse().map_err(|_| wrong())?;
    Ok(Timestamp::ago(Duration::from_secs(number.saturating_mul(seconds))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn points_in_time_are_absolute_or_relative() {
        assert_eq!(since("2026-01-31T23:59:59Z").unwrap().to_string(), "2026-01-31T23:59:59Z");
        assert!(since("90m").unwrap() < Timestamp::now());
        assert!(since("2d").unwrap() < since("47h").unwrap());
        for bad in ["", "h", "-1h", "1w", "2026-01-31", "1é"] {
            assert!(since(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn records_are_found_by_volume_and_key() {
        let record = json!({
            "eventTime": "2026-01-31T23:59:59Z",
            "requestParameters": {
                "keyId": "alias/x",
                "sourceEncryptionContext": {"aws:ebs:id": "vol-1"},
                "constraints": {"encryptionContextSubset": {"aws:ebs:id": "vol-3"}},
            },
            "resources": [{"ARN": "arn:aws:kms:us-east-1:0:key/abc"}],
        });
        let volume = |id: &str| Filter { volume: Some(id.into()), ..Filter::default() }.wants(&record);
        assert!(volume("vol-1") && volume("vol-3") && !volume("vol-2"));
        let key = |key: &str| Filter { key: Some(key.into()), ..Filter::default() }.wants(&record);
        assert!(key("abc") && key("arn:aws:kms:us-east-1:0:key/abc") && key("alias/x") && !key("ab"));
        let since = |text: &str| {
            let since = Timestamp::try_from(text.to_owned()).ok();
            Filter { since, ..Filter::default() }.wants(&record)
        };
        assert!(since("2026-01-31T23:59:59Z") && !since("2026-02-01T00:00:00Z"));
    }
}
