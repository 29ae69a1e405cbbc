//! The options of commands that use a place outside.
#![forbid(unsafe_code)]

use crate::base::{Error, Kind, Result, size};
use crate::catalog::SnapshotId;
use crate::ops::backup::Target;
use crate::ops::backup::remove::Keep;
use crate::place::Access;

/// How a place is reached.
#[derive(clap::Args, Clone)]
pub(super) struct PlaceArgs {
    /// Of an object store: where it listens, like https://s3.example:9000 [default: AWS, Azure, Google] [env:
    /// AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, AZURE_STORAGE_ENDPOINT, GOOGLE_BASE_URL].
    #[arg(long, value_name = "URL")]
    endpoint: Option<String>,
    /// Of s3://: the store's region [env: AWS_REGION].
    #[arg(long, value_name = "REGION")]
    region: Option<String>,
}

impl PlaceArgs {
    /// The place at `url`, and the snapshot that the URL ends with, if it does.
    pub(super) fn target(&self, url: &str, limit: u64) -> Result<(Target, Option<SnapshotId>)> {
        Target::parse(url, Access { endpoint: self.endpoint.clone(), region: self.region.clone() }, limit)
    }

    /// The place at `url`, which is meant as a whole; `instead` says what to do with a snapshot's id.
    ///
    /// # Errors
    /// `Usage` for a URL that ends with one, and for what is no place.
    pub(super) fn whole_target(&self, url: &str, limit: u64, instead: &str) -> Result<Target> {
        match self.target(url, limit)? {
            (target, None) => Ok(target),
            (_, Some(_)) => {
                Err(Error::new(Kind::Usage, format!("the place's URL ends with a snapshot's id; {instead}")))
            }
        }
    }

    /// Whether anything of it was given.
    pub(super) fn are_given(&self) -> bool {
        self.endpoint.is_some() || self.region.is_some()
    }
}

/// How much it may use.
#[derive(clap::Args)]
pub(super) struct LimitArgs {
    /// At most so many bytes a second, like 20MiB; 0: no limit.
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = size::parse)]
    limit: u64,
}

impl LimitArgs {
    /// Bytes a second.
    pub(super) fn rate(&self) -> u64 {
        self.limit
    }
}

/// What stays in a place.
#[derive(clap::Args)]
pub(super) struct KeepArgs {
    /// Keep the last so many.
    #[arg(long, value_name = "N")]
    keep_last: Option<usize>,
    /// Keep the newest of each of the last so many days that have one.
    #[arg(long, value_name = "N")]
    keep_daily: Option<usize>,
    /// Keep the newest of each of the last so many weeks that have one.
    #[arg(long, value_name = "N")]
    keep_weekly: Option<usize>,
    /// Keep the newest of each of the last so many months that have one.
    #[arg(long, value_name = "N")]
    keep_monthly: Option<usize>,
    /// Keep the newest of each of the last so many years that have one.
    #[arg(long, value_name = "N")]
    keep_yearly: Option<usize>,
}

impl KeepArgs {
    /// What was said; none if nothing was.
    pub(super) fn keep(&self) -> Option<Keep> {
        let all = [self.keep_last, self.keep_daily, self.keep_weekly, self.keep_monthly, self.keep_yearly];
        let [last, daily, weekly, monthly, yearly] = all.map(Option::unwrap_or_default);
        all.iter().any(Option::is_some).then_some(Keep { last, daily, weekly, monthly, yearly })
    }
}
