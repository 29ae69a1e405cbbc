//! Holding the records of a store against its ledger, and accepting what differs.
//!
//! A record that differs from the ledger is refused by every command ([`crate::catalog`]). Where it is right
//! all the same (a backup that was restored, a store of an earlier version or of another host), the operator
//! says so by [`accept`]; the audit log says who did.

use super::Store;
use crate::audit::AuditLog;
use crate::audit::Entry;
use crate::base::{Error, Kind, Result};
use crate::catalog::{Catalog, SnapshotId, VolumeId};

/// Which record is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subject {
    /// A volume's.
    Volume(VolumeId),
    /// A snapshot's.
    Snapshot(SnapshotId),
}

impl std::fmt::Display for Subject {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Subject::Volume(id) => id.fmt(f),
            Subject::Snapshot(id) => id.fmt(f),
        }
    }
}

/// What came of holding a record against the ledger.
#[derive(Debug)]
pub struct Finding {
    /// Whose record it is.
    pub subject: Subject,
    /// The name that the record gives it, believed or not.
    pub name: Option<String>,
    /// What is wrong with the record; none: it is believed.
    pub problem: Option<Problem>,
}

/// What is wrong with a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Problem {
    /// It is not what commands of this host have made of it: how it differs. It can be accepted.
    Differs(String),
    /// It cannot be read: why.
    Damaged(String),
}

impl Problem {
    /// In words.
    pub fn as_str(&self) -> &str {
        match self {
            Problem::Differs(text) | Problem::Damaged(text) => text,
        }
    }
}

/// Holds every record of the store against the ledger: volumes first, each kind sorted by id.
///
/// # Errors
/// Those of the file system. A record that cannot be read is a finding.
pub fn check(store: &Store) -> Result<Vec<Finding>> {
    let catalog = store.catalog();
    let volumes = catalog.ids()?.into_iter().map(Subject::Volume);
    let snapshots = catalog.snapshot_ids()?.into_iter().map(Subject::Snapshot);
    let found = volumes.chain(snapshots).map(|subject| find(&catalog, subject));
    found.filter_map(Result::transpose).collect()
}

/// Accepts the records of these volumes and snapshots as they are, and returns what was wrong with each. The
/// audit log gets an `AcceptRecord` record for each that was not believed before.
///
/// # Errors
/// `NotFound`; those of the file system. Those before it are accepted then. A record that cannot be read is
/// not accepted, and a finding.
pub fn accept(store: &Store, subjects: &[Subject]) -> Result<Vec<Finding>> {
    let catalog = store.catalog();
    let log = AuditLog::new(store.root())?;
    let mut found = Vec::new();
    for &subject in subjects {
        let gone = || Error::new(Kind::NotFound, format!("{subject} is not there any more"));
        let finding = find(&catalog, subject)?.ok_or_else(gone)?;
        if let Some(Problem::Differs(doubt)) = &finding.problem {
            // First the audit record: what cannot be recorded is not done.
            let (id, name) = (subject.to_string(), finding.name.clone());
            log.append(&Entry::accepted(&id, name.as_deref(), doubt), None)?;
            match subject {
                Subject::Volume(id) => catalog.accept(id)?,
                Subject::Snapshot(id) => catalog.accept_snapshot(id)?,
            }
        }
        found.push(finding);
    }
    Ok(found)
}

/// Which record `reference` means, by what the records claim: an id, or a name that one of them has.
///
/// # Errors
/// `NotFound`; `Usage` if it can be several.
pub fn resolve(store: &Store, reference: &str) -> Result<Subject> {
    let claims = Catalog::new(store.root());
    let is_snapshot = reference.starts_with(SnapshotId::PREFIX);
    match if is_snapshot { Err(Error::new(Kind::NotFound, "")) } else { claims.resolve(reference) } {
        Err(e) if e.kind() == Kind::NotFound => match claims.resolve_snapshot(reference) {
            // Nobody asked for a snapshot in particular.
            Err(other) if other.kind() == Kind::NotFound && !is_snapshot => Err(e),
            resolved => resolved.map(Subject::Snapshot),
        },
        resolved => resolved.map(Subject::Volume),
    }
}

/// None if there is no such record any more.
fn find(catalog: &Catalog, subject: Subject) -> Result<Option<Finding>> {
    let claims = catalog.without_ledger();
    let claimed = match subject {
        Subject::Volume(id) => claims.load(id).map(|volume| volume.name().map(ToString::to_string)),
        Subject::Snapshot(id) => {
            claims.load_snapshot(id).map(|snapshot| snapshot.label().tags.get("Name").map(str::to_owned))
        }
    };
    let name = match claimed {
        Ok(name) => name,
        Err(e) if e.kind() == Kind::NotFound => return Ok(None),
        Err(e) => {
            return Ok(Some(Finding { subject, name: None, problem: Some(Problem::Damaged(e.to_string())) }));
        }
    };
    let doubt = match subject {
        Subject::Volume(id) => catalog.doubt(id),
        Subject::Snapshot(id) => catalog.doubt_of_snapshot(id),
    };
    let problem = match doubt {
        Ok(doubt) => doubt.map(|doubt| Problem::Differs(doubt.to_string())),
        Err(e) if e.kind() == Kind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    Ok(Some(Finding { subject, name, problem }))
}
