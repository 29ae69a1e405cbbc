//! `sealblk gc`: clears away what nobody needs any more and nobody else has cleared away.
//!
//! Files that interrupted commands, and hands, left in a store. Grants of attaches that are over: their host process was
//! killed together with the keeper of its grants, or the KMS was out of reach at the detach.
#![forbid(unsafe_code)]

use crate::base::root::files;
use crate::base::{Context, Error, Result};
use crate::cli::{Env, output, size};
use crate::helper::grants::{self, Note, notes};
use crate::ops::gc::{LeftOver, What};
use serde_json::{Value, json};

/// Arguments of `gc`.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sealblk gc --dry-run
  sealblk gc --json

Removes layers that no volume and no snapshot names, temporary files, and what interrupted commands left. What somebody is
just making or using stays. While a record cannot be read, no layer is removed: it might be its. Retires grants at the KMS
of attaches that are over.")]
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
            "volume": self.note.volume,
            "key_id": self.note.key_id,
            "provider": self.note.provider,
            "grant_id": self.note.grant,
            "since": self.note.since,
            "result": self.word(),
            "error": self.problem(),
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
/// What stands in the way of finding what is left over; the kind of the first grant that could not be retired.
pub fn run(env: &Env, args: &Args) -> Result<()> {
    let catalog = env.catalog();
    // A store that does not exist is not made by looking.
    let mut found = match env.root.path().exists() {
        true if args.dry_run => catalog.left_overs()?,
        true => catalog.collect()?,
        false => Vec::new(),
    };
    found.extend(old_notes(env, args)?);
    let sweep = |note: Note| {
        let outcome = (!args.dry_run).then(|| grants::retire(&env.root, &note));
        Swept { note, outcome }
    };
    let swept: Vec<Swept> = grants::stale(&catalog)?.into_iter().map(sweep).collect();
    report(env, args, &found, &swept)?;
    let left = swept.iter().filter_map(|one| one.outcome.as_ref()?.as_ref().err());
    match (left.clone().next(), left.count()) {
        (None, _) => Ok(()),
        (Some(first), count) => {
            Err(Error::new(first.kind(), format!("{count} grants are not retired: {first}")))
        }
    }
}

/// Removes the notes of grants that earlier versions kept in the store, where whoever writes the ciphertext could have
/// written them. Nothing is done at the KMS because of them.
fn old_notes(env: &Env, args: &Args) -> Result<Vec<LeftOver>> {
    notes::warn_of_old(&env.root);
    let paths = notes::old(&env.root)?;
    let found: Vec<LeftOver> = paths.into_iter().filter_map(|path| LeftOver::at(What::Note, path)).collect();
    if !args.dry_run {
        for left in &found {
            files::remove_if_there(&left.path).context(|| format!("remove {}", left.path.display()))?;
        }
    }
    Ok(found)
}

fn report(env: &Env, args: &Args, found: &[LeftOver], swept: &[Swept]) -> Result<()> {
    if env.json {
        let left_overs: Vec<Value> = found.iter().map(description).collect();
        let grants: Vec<Value> = swept.iter().map(Swept::json).collect();
        let all = json!({"dry_run": args.dry_run, "left_overs": left_overs, "grants": grants});
        return output::print_json(&all);
    }
    let mut rows = vec![["WHAT", "BYTES", "PATH"].map(String::from).to_vec()];
    rows.extend(found.iter().map(|left| {
        vec![left.what.name().to_string(), size::human(left.bytes), left.path.display().to_string()]
    }));
    let grants: String = swept.iter().map(Swept::text).collect();
    output::print(&(output::table(&rows) + &grants)).map(drop)
}

fn description(left: &LeftOver) -> Value {
    json!({"what": left.what.name(), "path": left.path.display().to_string(), "bytes": left.bytes})
}
