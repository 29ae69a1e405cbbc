//! What is told at the end, as text or JSON.

use super::Args;
use super::frontend::server::Holdings;
use super::worker::Tally;
use clap::ValueEnum;
use serde_json::{Value, json};
use std::fmt::{Display, Formatter};
use std::time::Duration;

/// The result of a measurement.
pub struct Report {
    rw: String,
    bs: u64,
    qd: u16,
    queues: u16,
    huge_pages: bool,
    seconds: f64,
    requests: u64,
    errors: u64,
    kicks: u64,
    p50: f64,
    p99: f64,
    p999: f64,
    cpu_us: Option<f64>,
    cpu_share: Option<f64>,
    rss_kib: Option<u64>,
}

impl Report {
    /// From what the queues counted in `time`, and what the server used and holds.
    pub fn new(
        args: &Args,
        tally: Tally,
        time: Duration,
        cpu_ns: Option<u64>,
        held: Option<Holdings>,
    ) -> Self {
        let us = |share| tally.latency.quantile(share) as f64 / 1e3;
        Report {
            rw: args.rw.to_possible_value().expect("no pattern is hidden").get_name().into(),
            bs: args.bs,
            qd: args.qd,
            queues: args.queues,
            huge_pages: args.huge_pages,
            seconds: time.as_secs_f64(),
            requests: tally.done,
            errors: tally.failed,
            kicks: tally.kicks,
            p50: us(0.5),
            p99: us(0.99),
            p999: us(0.999),
            cpu_us: cpu_ns.map(|ns| ns as f64 / 1e3 / tally.done.max(1) as f64),
            cpu_share: cpu_ns.map(|ns| ns as f64 / time.as_nanos() as f64),
            rss_kib: held.map(|h| h.rss_kib),
        }
    }

    fn iops(&self) -> f64 {
        self.requests as f64 / self.seconds
    }

    fn mib_per_second(&self) -> f64 {
        self.iops() * self.bs as f64 / f64::from(1 << 20)
    }

    /// Whether every request was done. There may be none where a disk stood still all the time; a back-end
    /// that does not answer at all is an error before this.
    pub fn clean(&self) -> bool {
        self.errors == 0
    }

    /// One JSON object.
    pub fn json(&self) -> Value {
        json!({
            "rw": self.rw, "bs": self.bs, "qd": self.qd, "queues": self.queues,
            "huge_pages": self.huge_pages, "seconds": self.seconds,
            "requests": self.requests, "errors": self.errors, "kicks": self.kicks,
            "iops": self.iops(), "mib_per_second": self.mib_per_second(),
            "latency_us": { "p50": self.p50, "p99": self.p99, "p99_9": self.p999 },
            "server_cpu_us_per_request": self.cpu_us,
            "server_cpu_cores": self.cpu_share,
            "server_rss_kib": self.rss_kib,
        })
    }
}

impl Display for Report {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        writeln!(
            f,
            "{} of {} bytes, {} in flight on each of {} queues",
            self.rw, self.bs, self.qd, self.queues
        )?;
        writeln!(
            f,
            "  {:.0} IOPS, {:.1} MiB/s over {:.2} s",
            self.iops(),
            self.mib_per_second(),
            self.seconds
        )?;
        writeln!(f, "  latency us: p50 {:.2}, p99 {:.2}, p99.9 {:.2}", self.p50, self.p99, self.p999)?;
        if let (Some(us), Some(cores)) = (self.cpu_us, self.cpu_share) {
            writeln!(f, "  server: {us:.3} us CPU a request, {cores:.2} cores")?;
        }
        if let Some(kib) = self.rss_kib {
            writeln!(f, "  server: {kib} KiB resident beside the guest's memory")?;
        }
        write!(f, "  {} requests, {} failed, {} kicks", self.requests, self.errors, self.kicks)
    }
}

/// What an idle back-end cost.
pub struct IdleReport {
    seconds: f64,
    wakeups_per_second: f64,
    cpu_us_per_second: f64,
    rss_kib: u64,
}

impl IdleReport {
    /// From what was seen in `time`.
    pub fn new(time: Duration, wakeups: u64, cpu_ns: u64, held: Holdings) -> Self {
        let seconds = time.as_secs_f64();
        IdleReport {
            seconds,
            wakeups_per_second: wakeups as f64 / seconds,
            cpu_us_per_second: cpu_ns as f64 / 1e3 / seconds,
            rss_kib: held.rss_kib,
        }
    }

    /// One JSON object.
    pub fn json(&self) -> Value {
        json!({
            "idle_seconds": self.seconds,
            "wakeups_per_second": self.wakeups_per_second,
            "server_cpu_us_per_second": self.cpu_us_per_second,
            "server_rss_kib": self.rss_kib,
        })
    }
}

impl Display for IdleReport {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "connected and idle for {:.2} s", self.seconds)?;
        writeln!(
            f,
            "  server: {:.2} wake-ups and {:.1} us CPU a second",
            self.wakeups_per_second, self.cpu_us_per_second
        )?;
        write!(f, "  server: {} KiB resident beside the guest's memory", self.rss_kib)
    }
}
