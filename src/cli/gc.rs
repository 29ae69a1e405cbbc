//! `sealblk gc`: clears away what nobody needs any more and nobody else has cleared away.
//!
//! Grants of attaches that are over: their host process was killed together with the keeper of its grants, or the KMS was
//! out of reach at the detach.
#![forbid(unsafe_code)]

use super::{Env, output};
use crate::attach::grants::{self, Note};
use crate::error::{Error, Result};
use serde_json::{Value, json};

/// Arguments of `gc`.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  sealblk gc --dry-run")]
pub struct Args {
    /// Say what would be done, and do nothing.
    #[arg(long)]
    dry_run: bool,
}

/// What became of one stale grant.
struct Swept {
    note: Note,
    outcome: Option<Result<()>>,
}

impl Swept {
    /// `would-retire`, `retired` or `failed`.
    fn word(&self) -> &'static str {
        match self.outcome {
            None => "would-retire",
            Some(Ok(())) => "retired",
            Some(Err(_)) => "failed",
        }
    }

    fn problem(&self) -> Option<String> {
        Some(self.outcome.as_ref()?.as_ref().err()?.to_string())
    }

    fn json(&self) -> Value {
        json!({
            "VolumeId": self.note.volume,
            "KeyId": self.note.key_id,
            "Provider": self.note.provider,
            "GrantId": self.note.grant,
            "Since": self.note.since,
            "Result": self.word(),
            "Error": self.problem(),
        })
    }

    fn text(&self) -> String {
        let grant = self.note.grant.as_deref().unwrap_or("(not known whether it was made)");
        let (word, volume, key) = (self.word(), self.note.volume, &self.note.key_id);
        let problem = self.problem().map_or(String::new(), |problem| format!(": {problem}"));
        format!("{word} grant {grant} of {volume} on {key}{problem}\n")
    }
}

/// Clears away, and says what.
///
/// # Errors
/// The kind of the first thing that could not be cleared away; the rest is done all the same.
pub fn run(env: &Env, args: &Args) -> Result<()> {
    let sweep = |note: Note| {
        let outcome = (!args.dry_run).then(|| grants::retire(&env.root, &note));
        Swept { note, outcome }
    };
    let swept: Vec<Swept> = grants::stale(&env.catalog())?.into_iter().map(sweep).collect();
    if env.json {
        output::print_json(&json!({"Grants": swept.iter().map(Swept::json).collect::<Vec<_>>()}))?;
    } else {
        output::print(&swept.iter().map(Swept::text).collect::<String>())?;
    }
    let left = swept.iter().filter_map(|one| one.outcome.as_ref()?.as_ref().err());
    match (left.clone().next(), left.count()) {
        (None, _) => Ok(()),
        (Some(first), count) => {
            Err(Error::new(first.kind(), format!("{count} grants are not retired: {first}")))
        }
    }
}
