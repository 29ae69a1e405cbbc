//! The embedded KMS on AWS's wire, for boto3, the AWS CLI and every AWS SDK.
//!
//! It assumes nothing of whoever connects: a request is answered when its signature is right, and everything
//! before that is bounded in size and time. Without TLS it listens on loopback addresses and Unix sockets
//! only. It holds no state of its own: ending it at any moment loses nothing that was answered.

mod http;
mod operations;
mod places;
mod refusals;
pub mod sigv4;
pub mod tls;
pub mod wire;

use crate::base::{Context, Error, Kind, Result};
use crate::kms::embedded::Embedded;
use crate::kms::regions;
use http::Server;
use places::Peer;
use refusals::Refusals;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tls::Tls;
use tokio::net::{TcpListener, UnixListener, UnixStream};

/// Threads for operations, which wait for the disk.
const THREADS: usize = 32;

/// Where the server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// An address, without TLS a loopback one; port 0 is any.
    Tcp(SocketAddr),
    /// A Unix socket, made with mode 0600.
    Unix(PathBuf),
}

/// Serves `kms` until the process is ended, by TLS if there are files for it. `ready` hears where, as a URL,
/// once requests are accepted.
pub fn serve(
    kms: Embedded,
    address: &Address,
    tls: Option<tls::Files>,
    ready: impl FnOnce(&str) -> Result<()>,
) -> Result<()> {
    if let Address::Tcp(address) = address
        && !address.ip().is_loopback()
        && tls.is_none()
    {
        return Err(Error::new(
            Kind::Usage,
            format!(
                "{address} is not a loopback address, and without TLS data keys would pass the network in \
                 the clear: give --tls-cert and --tls-key, or listen on 127.0.0.1 or a Unix socket"
            ),
        ));
    }
    let tls = tls.map(Tls::load).transpose()?;
    if let Some(tls) = &tls {
        tls.clone().reload_on_hangup()?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .max_blocking_threads(THREADS)
        .build()
        .context(|| "start the KMS server")?;
    // A request's record names who has signed it, which only the server knows.
    let kms = Arc::new(kms.recorded_by_caller());
    let refusals = Arc::<Refusals>::default();
    refusals::tell_in_time(&kms, &refusals)?;
    let synchronizing = regions::synchronize_in_time(&kms).context(|| "synchronize regions")?;
    runtime.block_on(listen(Server::new(kms, refusals, synchronizing), address, tls, ready))
}

async fn listen(
    server: Arc<Server>,
    address: &Address,
    tls: Option<Arc<Tls>>,
    ready: impl FnOnce(&str) -> Result<()>,
) -> Result<()> {
    match address {
        Address::Tcp(address) => {
            let attempt = || format!("listen on {address}");
            let listener = TcpListener::bind(address).await.context(attempt)?;
            let scheme = if tls.is_some() { "https" } else { "http" };
            ready(&format!("{scheme}://{}", listener.local_addr().context(attempt)?))?;
            let next = async || {
                let (stream, address) = listener.accept().await?;
                Ok((stream, Peer::at(address.ip())))
            };
            http::accept(server, tls, next).await
        }
        Address::Unix(path) => {
            let listener = bind(path).await?;
            ready(&format!("http+unix://{}", path.display()))?;
            let next = async || {
                let (stream, _) = listener.accept().await?;
                let user = stream.peer_cred()?.uid();
                Ok((stream, Peer::User(user)))
            };
            http::accept(server, None, next).await
        }
    }
}

/// Binds a Unix socket. One that nobody listens on any more is replaced.
async fn bind(path: &Path) -> Result<UnixListener> {
    let attempt = || format!("listen on {}", path.display());
    // A file that is no socket refuses connections too, and is not ours to remove.
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
    if is_socket
        && let Err(e) = UnixStream::connect(path).await
        && e.kind() == std::io::ErrorKind::ConnectionRefused
    {
        std::fs::remove_file(path).context(attempt)?;
    }
    // Nobody but its owner may connect, also in the moment before its mode is set.
    let before = nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o177));
    let bound = UnixListener::bind(path);
    nix::sys::stat::umask(before);
    let listener = bound.context(attempt)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).context(attempt)?;
    Ok(listener)
}
