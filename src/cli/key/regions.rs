//! What goes to other regions.

use crate::base::{Error, Kind, Result};
use crate::kms::embedded::Embedded;
use crate::kms::embedded::synchronization::NewReplica;
use crate::kms::regions;
use serde_json::{Value, json};

pub(super) fn replicate(kms: &Embedded, key: &str, region: &str, description: String) -> Result<()> {
    let new = NewReplica { description, ..NewReplica::default() };
    regions::replicate(kms, key, region, &new)?;
    // The others hear of it as well, now or when they are reached.
    regions::synchronize(kms)?;
    Ok(())
}

pub(super) fn update_primary(kms: &Embedded, key: &str, region: &str) -> Result<()> {
    Ok(regions::update_primary(kms, key, region).map(drop)?)
}

/// # Errors
/// `KmsUnavailable` if a region was not reached, else what the first has refused; each is named.
pub(super) fn synchronize(kms: &Embedded) -> Result<(String, Value)> {
    let failed = regions::synchronize(kms)?;
    if failed.is_empty() {
        return Ok(("all replicas are up to date\n".into(), json!({ "behind": [] })));
    }
    let words: Vec<String> = failed.iter().map(|(region, e)| format!("{region}: {e}")).collect();
    // What a later try may put right decides.
    let kinds: Vec<Kind> = failed.into_values().map(|e| Error::from(e).kind()).collect();
    let later = kinds.iter().find(|kind| **kind == Kind::KmsUnavailable).or(kinds.first());
    Err(Error::new(later.copied().unwrap_or(Kind::Other), words.join("; ")))
}
