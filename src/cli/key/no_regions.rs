//! What takes the place of [`regions`](super::regions) where sealblk was built without `kms-server`.

use crate::base::{Error, Kind, Result};
use crate::kms::embedded::Embedded;
use serde_json::Value;

fn not_built<T>() -> Result<T> {
    let message = "other regions are reached by the feature kms-server, without which this sealblk was built";
    Err(Error::new(Kind::Unsupported, message))
}

pub(super) fn replicate(_: &Embedded, _: &str, _: &str, _: String) -> Result<()> {
    not_built()
}

pub(super) fn update_primary(_: &Embedded, _: &str, _: &str) -> Result<()> {
    not_built()
}

pub(super) fn synchronize(_: &Embedded) -> Result<(String, Value)> {
    not_built()
}
