//! What a keeper, its servers and whoever uses it say to each other, a line each: all are the same program.
#![forbid(unsafe_code)]

use super::tenure::{Tenure, Way};
use crate::backing::nbd::Terms;
use crate::base::{Error, Kind};
use crate::catalog::lock::Holder;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// The hidden subcommand.
pub const COMMAND: &str = "serve-rbd";
/// The longest line in bytes.
pub(super) const MAX_LINE: usize = 64 << 10;
/// How long a server may take until it serves.
pub(super) const TIME: Duration = Duration::from_secs(40);
/// How long a server may take to end that nobody asks any more.
pub(super) const AT_END: Duration = Duration::from_secs(25);

/// What a keeper is for.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Begin {
    pub(super) image: String,
    pub(super) write: bool,
}

/// What a keeper is asked for.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) enum Order {
    /// A server.
    Serve(Box<Wanted>),
    /// Another keeper, for when this one dies.
    Spare,
}

/// A server is wanted.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Wanted {
    pub(super) tenure: Tenure,
    pub(super) way: Way,
    pub(super) break_lock: bool,
    pub(super) make: Option<u64>,
}

/// What a server says to its keeper, and what the keeper says to whoever has started it.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) enum Answer {
    /// The keeper is confined.
    Ready,
    /// The address of the server's client, before it takes a lock.
    Client(String),
    /// What is to be seen of this process?
    LookAt(Holder),
    /// The image is served; the connection comes with this.
    Serves(Terms),
    /// There is another keeper; the socket to it comes with this.
    Spare,
    Failed(Problem, String),
    Lost(String),
}

/// As [`Kind`], as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Problem {
    Busy,
    Usage,
    NotFound,
    Unsupported,
    Other,
}

impl Problem {
    pub(super) fn kind(self) -> Kind {
        match self {
            Problem::Busy => Kind::Busy,
            Problem::Usage => Kind::Usage,
            Problem::NotFound => Kind::NotFound,
            Problem::Unsupported => Kind::Unsupported,
            Problem::Other => Kind::Other,
        }
    }
}

impl Answer {
    pub(super) fn of(e: &Error) -> Answer {
        let problem = match e.kind() {
            Kind::Busy => Problem::Busy,
            Kind::Usage => Problem::Usage,
            Kind::NotFound => Problem::NotFound,
            Kind::Unsupported => Problem::Unsupported,
            _ => Problem::Other,
        };
        Answer::Failed(problem, e.to_string())
    }
}
