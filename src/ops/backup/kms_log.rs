//! The log of a store's embedded KMS goes to a place with the store's backups, as it lies at home. With the
//! root key, which is never there, it opens what the KMS has wrapped.

use super::{For, Session, Target};
use crate::backup as place;
use crate::base::{Context, Error, Kind, Result};
use crate::kms::embedded::Embedded;
use crate::ops::Store;
use crate::place::{MAX_LEN, Put};
use uuid::Uuid;

/// Puts the log to a place.
///
/// # Errors
/// `NotFound` if the store has no such KMS; those of the place.
pub(super) fn put(store: &Store, session: &mut Session, kms: Uuid) -> Result<()> {
    let attempt = || format!("bring the log of the KMS {kms} to {}", session.url);
    let log = Embedded::copy_of_log(store.root(), MAX_LEN as u64, store.hardened()).map_err(Error::from);
    let log = log.context(attempt)?.ok_or_else(|| Error::new(Kind::NotFound, "the KMS is gone"))?;
    session.carrier.put(&place::kms_log_of(kms), &log, Put::Replace)?;
    session.carrier.sync()
}

/// Makes the KMS of this store out of the log that a place has, where there is none here.
///
/// # Errors
/// As [`Embedded::put_back`]; `NotFound` if the place has no such log.
pub(super) fn put_back(store: &Store, kms: Uuid, target: &Target, root_key: Option<&[u8]>) -> Result<()> {
    let attempt = || format!("put the KMS {kms} back out of {}", target.url);
    let mut session = Session::open(store, target, For::Reading)?;
    let log = session.carrier.get(&place::kms_log_of(kms), MAX_LEN)?;
    drop(session);
    let Some(log) = log else {
        let message = format!(
            "{} is not there; put {} back from elsewhere",
            place::kms_log_of(kms),
            store.root().kms().display()
        );
        return Err(Error::new(Kind::NotFound, message)).context(attempt);
    };
    let made = Embedded::put_back(store.root(), kms, &log, root_key, store.hardened());
    made.map_err(Error::from).context(attempt)
}
