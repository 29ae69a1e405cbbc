//! A sink that is an HTTP endpoint: one POST an event, whose body is the event's JSON.
//!
//! Any 2xx says that it has taken the event. `Idempotency-Key` holds the event's id, by which it tells an
//! event that comes again. Redirects are not followed.

use crate::events::read::Recorded;
use http_body_util::Full;
use hyper::body::Bytes;
use hyper::{Request, StatusCode, Uri, header};
use hyper_util::rt::TokioIo;
use std::time::Duration;
use tokio::net::TcpStream;

/// Delivers one event; says what went wrong.
pub(super) fn deliver(url: &Uri, event: &Recorded, timeout: Duration) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build();
    let runtime = runtime.map_err(|e| format!("start an HTTP client: {e}"))?;
    let posted = runtime.block_on(async { tokio::time::timeout(timeout, post(url, event)).await });
    // A name that is still being looked up is not waited for.
    runtime.shutdown_background();
    let status = posted.map_err(|_| format!("{url} did not answer within {} s", timeout.as_secs()))??;
    if status.is_success() { Ok(()) } else { Err(format!("{url} answered {status}")) }
}

async fn post(url: &Uri, event: &Recorded) -> Result<StatusCode, String> {
    let failed = |e: &dyn std::fmt::Display| format!("{url}: {e}");
    let host = url.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    let stream = TcpStream::connect((host, url.port_u16().unwrap_or(80))).await.map_err(|e| failed(&e))?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| failed(&e))?;
    let request = request(url, event).map_err(|e| failed(&e))?;
    // It ends with the runtime.
    tokio::spawn(connection);
    sender.send_request(request).await.map(|response| response.status()).map_err(|e| failed(&e))
}

fn request(url: &Uri, event: &Recorded) -> hyper::http::Result<Request<Full<Bytes>>> {
    let path = url.path_and_query().map_or("/", |path| path.as_str());
    let host = url.authority().map_or("", |authority| authority.as_str());
    Request::post(path)
        .header(header::HOST, host)
        .header(header::CONTENT_TYPE, "application/json")
        .header(header::USER_AGENT, concat!("sealblk/", env!("CARGO_PKG_VERSION")))
        .header(header::CONNECTION, "close")
        .header("idempotency-key", event.id().unwrap_or_default())
        .body(Full::new(Bytes::from(event.text.clone())))
}
