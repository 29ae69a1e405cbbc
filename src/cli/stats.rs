//! `sealblk stats`: what attached volumes do, as `iostat` shows it of disks.
#![forbid(unsafe_code)]

use crate::base::{Error, Kind, Result};
use crate::catalog::VolumeId;
use crate::cli::interval::{Reports, interval};
use crate::cli::{Env, output};
use crate::events::read::Want;
use crate::host::stats::Stats;
use crate::ops::observe::{Observed, Observer, PATIENCE};
use crate::ops::rates::{Rates, Took};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::time::Duration;

/// What `stats` takes.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sealblk stats db
  sealblk stats --interval 1
  sealblk stats db --interval 5 --count 12 --json

The first report is of the time since the attach, each other one of the time since the one before. As in iostat, r/s and \
w/s are requests a second, rMB/s and wMB/s megabytes of 2^20 bytes, r_await, w_await and f_await how many milliseconds \
reads, writes and flushes took on average, and aqu-sz how many requests were in flight on average. p50, p99 and p99.9 are \
the milliseconds that so many of 100 reads and writes did not exceed: at most a sixteenth too high. err are requests that \
failed. JSON has more: each kind of request, waits, pauses, each queue; with --interval, it is one line a report.

Exit code 1 if a volume's process does not answer: that volume is named on standard error.")]
pub struct StatsArgs {
    /// The volumes: ids, beginnings of them, or names [default: all that are attached].
    volumes: Vec<String>,

    /// Report again every so many seconds, until Ctrl-C.
    #[arg(long, short, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1", value_parser = interval)]
    interval: Option<Duration>,

    /// End after so many reports.
    #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
}

/// Prints reports.
pub fn run(env: &Env, args: &StatsArgs) -> Result<()> {
    let catalog = env.catalog();
    let named: Vec<VolumeId> =
        args.volumes.iter().map(|volume| catalog.resolve(volume)).collect::<Result<_>>()?;
    let only = (!named.is_empty()).then_some(&named[..]);
    let observer = Observer::new(catalog, PATIENCE);
    let interval = args.interval.or(args.count.map(|_| Duration::from_secs(1)));
    let count = args.count.unwrap_or(if interval.is_some() { u64::MAX } else { 1 });
    let mut before: HashMap<VolumeId, Stats> = HashMap::new();
    let mut reports = Reports::every(interval.unwrap_or_default());
    let mut failed = None;
    for n in 0..count {
        if n > 0 {
            reports.wait();
        }
        let mut observed = observer.look(only)?;
        if only.is_none() {
            observed.retain(|it| it.stats.is_some());
        }
        failed = complain(&observed, only.is_some());
        let reports: Vec<_> = observed.iter().map(|it| (it, report(it, &before))).collect();
        let want = match (env.json, interval.is_some()) {
            (true, true) => output::print(&(json(&reports).to_string() + "\n"))?,
            (true, false) => output::print_json(&json(&reports)).map(|()| Want::More)?,
            (false, _) => output::print(&table(&reports, n > 0))?,
        };
        if want == Want::Enough {
            return Ok(());
        }
        before = observed.into_iter().filter_map(|it| Some((it.entry.id, it.stats?.ok()?))).collect();
    }
    failed.map_or(Ok(()), Err)
}

/// Says why there is no report of a volume; the last reason is the command's own error.
fn complain(observed: &[Observed], named: bool) -> Option<Error> {
    let mut last: Option<Error> = None;
    for it in observed {
        let whose = |e: &Error| Error::new(e.kind(), format!("{}: {e}", it.entry.id));
        let error = match (&it.entry.metadata, &it.stats) {
            (_, Some(Err(e))) => whose(e),
            (Err(e), None) if named => whose(e),
            (Ok(_), None) if named => {
                Error::new(Kind::NotFound, format!("{}: it is not attached", it.entry.id))
            }
            _ => continue,
        };
        if let Some(before) = last.replace(error) {
            output::tell(&format!("sealblk: {before}"));
        }
    }
    last
}

type Report<'a> = (&'a Observed, Option<Rates>);

fn report(it: &Observed, before: &HashMap<VolumeId, Stats>) -> Option<Rates> {
    let stats = it.stats.as_ref()?.as_ref().ok()?;
    Some(Rates::between(before.get(&it.entry.id), stats))
}

const HEAD: [&str; 14] = [
    "VOLUME", "r/s", "rMB/s", "r_await", "w/s", "wMB/s", "w_await", "f/s", "f_await", "aqu-sz", "p50", "p99",
    "p99.9", "err",
];

fn table(reports: &[Report<'_>], again: bool) -> String {
    let mut rows = vec![HEAD.map(String::from).to_vec()];
    for (it, rates) in reports {
        let Some(rates) = rates else { continue };
        let Took { p50_ms, p99_ms, p99_9_ms, .. } = rates.both;
        let (read, write, flush) = (&rates.read, &rates.write, &rates.flush);
        rows.push(vec![
            shown_name(it),
            fixed(read.per_second, 1),
            fixed(read.bytes_per_second / f64::from(1 << 20), 2),
            milliseconds(read.took.await_ms),
            fixed(write.per_second, 1),
            fixed(write.bytes_per_second / f64::from(1 << 20), 2),
            milliseconds(write.took.await_ms),
            fixed(flush.per_second, 1),
            milliseconds(flush.took.await_ms),
            fixed(rates.queue_length, 2),
            milliseconds(p50_ms),
            milliseconds(p99_ms),
            milliseconds(p99_9_ms),
            rates.errors.to_string(),
        ]);
    }
    if rows.len() == 1 {
        return "no volume is attached\n".into();
    }
    let gap = if again { "\n" } else { "" };
    format!("{gap}{}", output::table(&rows))
}

/// The volume's name, else its id.
pub(super) fn shown_name(it: &Observed) -> String {
    it.entry.name().map_or_else(|| it.entry.id.to_string(), String::from)
}

fn fixed(n: f64, digits: usize) -> String {
    format!("{n:.digits$}")
}

/// Milliseconds, of which the fast ones are parts.
pub(super) fn milliseconds(ms: Option<f64>) -> String {
    match ms {
        None => "-".into(),
        Some(ms) if ms < 10.0 => fixed(ms, 3),
        Some(ms) => fixed(ms, 1),
    }
}

fn json(reports: &[Report<'_>]) -> Value {
    reports.iter().map(|(it, rates)| one(it, rates.as_ref())).collect()
}

fn one(it: &Observed, rates: Option<&Rates>) -> Value {
    let mut value = json!({
        "id": it.entry.id,
        "name": it.entry.name(),
        "attached": it.holder.is_some(),
        "report": rates,
    });
    match &it.stats {
        Some(Ok(stats)) => {
            value["limits"] = json!(stats.limits);
            value["since_attach_seconds"] = json!(stats.since_ns as f64 / 1e9);
            value["now"] = json!(stats.total());
            value["queues"] = json!(stats.queues);
            value["status"] = json!(stats.status);
        }
        Some(Err(e)) => value["problem"] = json!(e.to_string()),
        None => {}
    }
    value
}
