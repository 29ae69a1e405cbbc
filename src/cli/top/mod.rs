//! `sealblk top`: what attached volumes do, on a terminal, live.
//!
//! A library draws it, by the feature `top`: thirty crates, which no process runs that has a data key. It
//! starts no thread and uses no network. The keys are read here, since the library's own way of reading them
//! never ends where the terminal goes away.
#![forbid(unsafe_code)]

use crate::base::Result;
use crate::cli::Env;
use crate::cli::interval::interval;
use std::time::Duration;

/// What `top` takes.
#[derive(clap::Args)]
#[command(after_help = "\
Example:
  sealblk top

Keys: left and right choose the column that volumes are sorted by, r turns the order round, up and down move through \
volumes that do not fit, q ends it. The columns are those of \"sealblk stats\".")]
pub struct TopArgs {
    /// Look again every so many seconds.
    #[arg(long, short, value_name = "SECONDS", default_value = "1", value_parser = interval)]
    interval: Duration,
}

/// Shows attached volumes until `q`.
#[cfg(not(feature = "top"))]
pub fn run(_: &Env, args: &TopArgs) -> Result<()> {
    let message = format!(
        "what draws on a terminal is the feature top, without which this sealblk was built; \"sealblk stats \
         --interval {}\" goes anywhere",
        args.interval.as_secs_f64()
    );
    Err(crate::base::Error::new(crate::base::Kind::Unsupported, message))
}

/// Shows attached volumes until `q`.
#[cfg(feature = "top")]
pub fn run(env: &Env, args: &TopArgs) -> Result<()> {
    screen::run(env, args.interval)
}

#[cfg(feature = "top")]
mod screen;
