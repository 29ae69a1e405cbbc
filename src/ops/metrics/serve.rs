//! `/metrics` over HTTP. Nothing secret is there, and nobody is asked who he is: what listens elsewhere than
//! on a loopback address tells everybody who can reach it how the store's volumes are called and what they
//! do. Who can reach a Unix socket, its permissions say.

use crate::base::{Context, Error, Kind, Result};
use crate::host::socket::SocketAccess;
use crate::ops::metrics::{Form, Metrics};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ACCEPT, ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;

/// Connections at a time; more wait to be accepted.
const AT_A_TIME: usize = 32;
/// From one answer, or the beginning, to the end of the next request's head.
const HEAD_TIME: Duration = Duration::from_secs(60);
/// After this a connection is closed, whatever is going on.
const CONNECTION_TIME: Duration = Duration::from_secs(600);
/// Bytes of a request's head.
const HEAD_MAX: usize = 16 << 10;

const HOME: &str = "sealblk: GET /metrics\n";

/// Where metrics are served.
#[derive(Clone, Debug)]
pub enum Address {
    /// At an address and port.
    Tcp(SocketAddr),
    /// At a Unix socket of this path, for those who may connect to it.
    Unix(PathBuf, SocketAccess),
}

/// Serves the metrics at `address` until the process is ended. `ready` hears where they are once requests are
/// accepted.
///
/// # Errors
/// Those of listening there, and of `ready`.
pub fn serve(metrics: Metrics, address: Address, ready: impl FnOnce(&str) -> Result<()>) -> Result<()> {
    // While the process has one thread.
    let unix = match &address {
        Address::Unix(path, access) => Some(access.listen(path, None)?),
        Address::Tcp(_) => None,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        // One gathers, and others wait for that.
        .max_blocking_threads(4)
        .build()
        .context(|| "start the metrics server")?;
    let attempt = || match &address {
        Address::Tcp(address) => format!("listen on {address}"),
        Address::Unix(path, _) => format!("listen on {}", path.display()),
    };
    let metrics = Arc::new(metrics);
    runtime.block_on(async {
        match (&address, unix) {
            (Address::Unix(path, _), Some((listener, _name))) => {
                listener.set_nonblocking(true).context(attempt)?;
                let listener = UnixListener::from_std(listener).context(attempt)?;
                ready(&format!("http+unix://{}", path.display()))?;
                accept(metrics, async || listener.accept().await.map(|(stream, _)| stream)).await
            }
            (Address::Tcp(address), _) => {
                let listener = TcpListener::bind(address).await.context(attempt)?;
                ready(&format!("http://{}/metrics", listener.local_addr().context(attempt)?))?;
                accept(metrics, async || listener.accept().await.map(|(stream, _)| stream)).await
            }
            (Address::Unix(..), None) => unreachable!("it was made above"),
        }
    })
}

/// Answers whoever connects.
async fn accept<S: AsyncRead + AsyncWrite + Send + Unpin + 'static>(
    metrics: Arc<Metrics>,
    next: impl AsyncFn() -> std::io::Result<S>,
) -> Result<()> {
    let places = Arc::new(Semaphore::new(AT_A_TIME));
    loop {
        let place = places.clone().acquire_owned().await;
        let place = place.map_err(|_| Error::new(Kind::Other, "the metrics server is over"))?;
        match next().await {
            Ok(stream) => {
                let metrics = metrics.clone();
                tokio::spawn(async move {
                    let _place = place;
                    if tokio::time::timeout(CONNECTION_TIME, connection(metrics, stream)).await.is_err() {
                        log::debug!("a connection was closed after {} s", CONNECTION_TIME.as_secs());
                    }
                });
            }
            Err(e) => {
                // A peer that went away again, or too many open files: neither lasts.
                log::warn!("a connection was not accepted: {e}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn connection(metrics: Arc<Metrics>, stream: impl AsyncRead + AsyncWrite + Unpin) {
    let service = service_fn(move |request| {
        let metrics = metrics.clone();
        async move { Ok::<_, Infallible>(respond(metrics, request).await) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME)
        .max_buf_size(HEAD_MAX)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(e) = served.await {
        log::debug!("a connection ended: {e}");
    }
}

async fn respond(metrics: Arc<Metrics>, request: hyper::Request<Incoming>) -> Response<Full<Bytes>> {
    let plain = Form::Prometheus.content_type();
    if ![Method::GET, Method::HEAD].contains(request.method()) {
        let mut response = answer(StatusCode::METHOD_NOT_ALLOWED, plain, "only GET\n".into());
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    match request.uri().path() {
        "/metrics" => {}
        "/" => return answer(StatusCode::OK, plain, HOME.into()),
        _ => return answer(StatusCode::NOT_FOUND, plain, HOME.into()),
    }
    let accepted = request.headers().get(ACCEPT).and_then(|accept| accept.to_str().ok());
    let form = Form::wanted(accepted.unwrap_or_default());
    // It waits for files and for host processes.
    let gathered = tokio::task::spawn_blocking(move || metrics.text(form)).await;
    match gathered {
        Ok(Ok(text)) => answer(StatusCode::OK, form.content_type(), text),
        Ok(Err(e)) => {
            log::error!("the metrics cannot be gathered: {e}");
            // The log has the reason, with paths that are nobody else's business.
            answer(StatusCode::INTERNAL_SERVER_ERROR, plain, "look at the log of sealblk metrics\n".into())
        }
        Err(_) => answer(StatusCode::INTERNAL_SERVER_ERROR, plain, "it panicked; look at its log\n".into()),
    }
}

fn answer(status: StatusCode, content_type: &'static str, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
