//! `sealblk metrics`: all volumes of the store, for Prometheus.
#![forbid(unsafe_code)]

use crate::base::{Error, Kind, Result};
use crate::cli::interval::{Reports, interval};
use crate::cli::{Env, attach, output};
use crate::host::notify::Notifier;
use crate::host::socket::SocketAccess;
use crate::ops::metrics::{Address, Form, Metrics};
use crate::ops::observe::PATIENCE;
use nix::sys::stat::Mode;
use nix::unistd::Gid;
use serde_json::json;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// What `metrics` takes.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sealblk metrics                                  prints them, once
  sealblk metrics --listen                         at http://127.0.0.1:9746/metrics
  sealblk metrics --unix /run/sealblk/metrics.sock --socket-group telegraf
  sealblk metrics --textfile /var/lib/node_exporter/sealblk.prom --interval 30

In prometheus.yml:
  scrape_configs:
    - job_name: sealblk
      static_configs: [{targets: ['127.0.0.1:9746']}]

It needs no key, and asks the process of each attached volume what it has counted; one that does not answer within 5 \
seconds is shown so (sealblk_volume_up 0) and holds up no other. Nobody is asked who he is, so listen on a loopback address, \
unless everybody who can reach another one may know the volumes' names and what they do. The documentation has every name \
(docs/metrics.md), and with it come rules for alerts (prometheus-rules.yml) and a dashboard (grafana-dashboard.json).")]
pub struct MetricsArgs {
    /// Serve them over HTTP at this address and port.
    #[arg(long, value_name = "ADDR", num_args = 0..=1, default_missing_value = "127.0.0.1:9746", conflicts_with = "textfile")]
    listen: Option<SocketAddr>,

    /// Serve them over HTTP at a Unix socket of this path, for collectors of this machine.
    #[arg(long, value_name = "PATH", conflicts_with_all = ["listen", "textfile"])]
    unix: Option<PathBuf>,

    /// Let this group connect to the socket.
    #[arg(long, value_name = "NAME", requires = "unix", value_parser = attach::group)]
    socket_group: Option<Gid>,

    /// The socket's permissions, in octal: who has the right to write may connect [default: 0660 with
    /// --socket-group, else what the umask leaves].
    #[arg(long, value_name = "MODE", requires = "unix", value_parser = attach::socket_mode)]
    socket_mode: Option<Mode>,

    /// Write them to this file, which is replaced as a whole, for node_exporter's textfile collector:
    /// its name must end in .prom.
    #[arg(long, value_name = "FILE", value_parser = textfile)]
    textfile: Option<PathBuf>,

    /// Write the file again every so many seconds, until Ctrl-C.
    #[arg(long, value_name = "SECONDS", requires = "textfile", value_parser = interval)]
    interval: Option<Duration>,
}

/// Prints, serves or writes the metrics.
pub fn run(env: &Env, args: &MetricsArgs) -> Result<()> {
    let metrics = Metrics::new(&env.store()?, PATIENCE);
    let access = SocketAccess { group: args.socket_group, mode: args.socket_mode };
    let unix = args.unix.clone().map(|path| Address::Unix(path, access));
    if let Some(address) = args.listen.map(Address::Tcp).or(unix) {
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
    let mut reports = Reports::every(interval);
    loop {
        reports.wait();
        // A full disk, or a store that cannot be read, may be another's business next time.
        if let Err(e) = metrics.write_to(file) {
            log::error!("{e}");
        }
    }
}

fn serve(env: &Env, metrics: Metrics, address: Address) -> Result<()> {
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
