//! `sealblk gc`: clears away what nobody needs any more and nobody else has cleared away.
//!
//! Files that interrupted commands, and hands, left in a store. Grants of attaches that are over: their host
//! process was killed together with the keeper of its grants, or the KMS was out of reach at the detach.
#![forbid(unsafe_code)]

use crate::base::plural::counted;
use crate::base::{Error, Result, size};
use crate::cli::space::{self, RateArgs};
use crate::cli::{Env, output};
use crate::helper::grants::Note;
use crate::ops::gc::{self, Collected, LeftOver};
use crate::ops::space::Given;
use serde_json::{Value, json};

/// Arguments of `gc`.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sealblk gc --dry-run
  sealblk gc --json

Removes layers that no volume and no snapshot names, temporary files, and what interrupted commands left. What somebody is
just making or using stays. While a record cannot be read, no layer is removed: it might be its. Retires grants at the KMS
of attaches that are over. Then gives back what of the layers is needed by no snapshot and no volume, and merges layers that
nothing tells apart, in the direction that moves less; volumes stay attached meanwhile. With --dry-run it says how much it
could give back without moving anything.")]
pub struct Args {
    /// Say what would be done, and do nothing.
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    rate: RateArgs,
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
/// What stands in the way of finding what is left over; the kind of the first grant that
/// could not be retired.
pub fn run(env: &Env, args: &Args) -> Result<()> {
    let store = env.store()?;
    let Collected { left_overs, grants } = if args.dry_run { gc::look(&store) } else { gc::clear(&store) }?;
    let space = match args.dry_run {
        true => Given { bytes: space::look(&store)?, ..Given::default() },
        false => space::give_back(&store, None, &args.rate)?,
    };
    let swept: Vec<Swept> = grants.into_iter().map(|(note, outcome)| Swept { note, outcome }).collect();
    report(env, args, &left_overs, &swept, &space)?;
    let left = swept.iter().filter_map(|one| one.outcome.as_ref()?.as_ref().err());
    match (left.clone().next(), left.count()) {
        (None, _) => Ok(()),
        (Some(first), count) => {
            let grants = counted(count, "grant is", "grants are");
            Err(Error::new(first.kind(), format!("{grants} not retired: {first}")))
        }
    }
}

fn report(env: &Env, args: &Args, found: &[LeftOver], swept: &[Swept], given: &Given) -> Result<()> {
    if env.json {
        let left_overs: Vec<Value> = found.iter().map(description).collect();
        let grants: Vec<Value> = swept.iter().map(Swept::json).collect();
        let space = space::json(given);
        let all =
            json!({"dry_run": args.dry_run, "left_overs": left_overs, "grants": grants, "space": space});
        return output::print_json(&all);
    }
    let mut rows = vec![["WHAT", "BYTES", "PATH"].map(String::from).to_vec()];
    rows.extend(found.iter().map(|left| {
        vec![left.what.name().to_string(), size::human(left.bytes), left.path.display().to_string()]
    }));
    let grants: String = swept.iter().map(Swept::text).collect();
    let space = match (args.dry_run, given.bytes) {
        (true, 0) => String::new(),
        (true, bytes) => format!("layers: {} could be given back\n", size::about(bytes)),
        (false, _) => match space::words(given) {
            words if words.is_empty() => words,
            words => format!("layers{}\n", words.replacen(';', ":", 1)),
        },
    };
    output::print(&(output::table(&rows) + &grants + &space)).map(drop)
}

fn description(left: &LeftOver) -> Value {
    json!({"what": left.what.name(), "path": left.path.display().to_string(), "bytes": left.bytes})
}
