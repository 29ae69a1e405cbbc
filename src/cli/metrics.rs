//! `sealblk metrics`: all volumes of the store, for Prometheus.
#![forbid(unsafe_code)]

use crate::base::{Error, Kind, Result};
use crate::cli::{Env, output};
use crate::host::notify::Notifier;
use crate::ops::metrics::{Form, Metrics};
use crate::ops::observe::PATIENCE;
use serde_json::json;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// What `metrics` takes.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sealblk metrics                                  prints them, once
  sealblk metrics --listen                         at http://127.0.0.1:9746/metrics
  sealblk metrics --textfile /var/lib/node_exporter/sealblk.prom --interval 30

In prometheus.yml:
  scrape_configs:
    - job_name: sealblk
      static_configs: [{targets: ['127.0.0.1:9746']}]

It needs no key, and asks the process of each attached volume what it has counted; one that does not answer within 5 \
seconds is shown so (sealblk_volume_up 0) and holds up no other. Nobody is asked who he is, so listen on a loopback address, \
unless everybody who can reach another one may know the volumes' names and what they do. docs/metrics.md has every name; \
resources/prometheus-rules.yml rules for alerts, resources/grafana-dashboard.json a dashboard.")]
pub struct MetricsArgs {
    /// Serve them over HTTP at this address and port.
    #[arg(long, value_name = "ADDR", num_args = 0..=1, default_missing_value = "127.0.0.1:9746", conflicts_with = "textfile")]
    listen: Option<SocketAddr>,

    /// Write them to this file, which is replaced as a whole, for node_exporter's textfile collector:
    /// its name must end in .prom.
    #[arg(long, value_name = "FILE", value_parser = textfile)]
    textfile: Option<PathBuf>,

    /// Write the file again every so many seconds, until Ctrl-C.
    #[arg(long, value_name = "SECONDS", requires = "textfile", value_parser = super::stats::interval)]
    interval: Option<Duration>,
}

/// Prints, serves or writes the metrics.
pub fn run(env: &Env, args: &MetricsArgs) -> Result<()> {
    let metrics = Metrics::new(&env.store()?, PATIENCE);
    if let Some(address) = args.listen {
        return serve(env, metrics, address);
    }
    let Some(file) = &args.textfile else {
        if env.json {
            let message = "metrics are text; \"sealblk stats --json\" has numbers in JSON";
            return Err(Error::new(Kind::Usage, message));
        }
        return output::print(&metrics.text(Form::Prometheus)?).map(drop);
    };
    metrics.write_to(file)?;
    let Some(interval) = args.interval else { return Ok(()) };
    Notifier::connect().ready();
    let mut due = Instant::now();
    loop {
        due += interval;
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        // A full disk, or a store that cannot be read, may be another's business next time.
        if let Err(e) = metrics.write_to(file) {
            log::error!("{e}");
        }
    }
}

fn serve(env: &Env, metrics: Metrics, address: SocketAddr) -> Result<()> {
    crate::ops::metrics::serve(metrics, address, |url| {
        Notifier::connect().ready();
        let said = match env.json {
            true => format!("{}\n", json!({"url": url})),
            false => format!("metrics are at {url}\n"),
        };
        output::print(&said).map(drop)
    })
}

fn textfile(text: &str) -> Result<PathBuf, String> {
    match text.ends_with(".prom") {
        true => Ok(text.into()),
        false => Err("a file whose name ends in .prom: the collector reads no other".into()),
    }
}
