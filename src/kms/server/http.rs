//! Connections and requests: what may arrive, how much of it, and for how long.
//!
//! hyper reads and writes HTTP/1; this bounds it. An answer of AWS's form goes to everything that is HTTP at all.

use crate::base::Result;
use crate::crypt::secret_mem::on_scrubbed_stack;
use crate::kms::embedded::Embedded;
use crate::kms::server::operations::{self, Request};
use crate::kms::server::sigv4::{self, Authorization, Signed};
use crate::kms::server::tls::Tls;
use crate::kms::server::wire::{Fields, WireError};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{HeaderMap, Method, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::Value;
use std::convert::Infallible;
use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;
use time::OffsetDateTime;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use uuid::Uuid;
use zeroize::{Zeroize, Zeroizing};

/// Connections at a time; more wait to be accepted.
const CONNECTIONS: usize = 256;
/// Bytes of a request's body: a policy of 32 KiB, escaped, fits several times.
const BODY_MAX: usize = 256 << 10;
/// Bytes of a request's line and headers.
const HEAD_MAX: usize = 32 << 10;
const HEADERS_MAX: usize = 64;
/// From the acceptance of a connection to the end of the TLS handshake.
const HANDSHAKE_TIME: Duration = Duration::from_secs(10);
/// From the end of one request to the end of the next one's headers.
const HEAD_TIME: Duration = Duration::from_secs(30);
/// For a request's body to arrive.
const BODY_TIME: Duration = Duration::from_secs(15);
/// After this a connection is closed, between requests.
const CONNECTION_TIME: Duration = Duration::from_secs(600);
/// Closing may take so long: a request that is being answered, and a reader who does not read.
const CLOSING_TIME: Duration = Duration::from_secs(60);

const CONTENT_TYPE: &str = "application/x-amz-json-1.1";
const TARGET: &str = "TrentService.";

/// Answers the connections that `next` accepts, by TLS if that is given, until it fails for good.
pub async fn accept<S>(
    kms: Arc<Embedded>,
    tls: Option<Arc<Tls>>,
    next: impl AsyncFn() -> std::io::Result<S>,
) -> Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(place) = room.clone().acquire_owned().await else { return Ok(()) };
        let stream = match next().await {
            Ok(stream) => stream,
            Err(e) => {
                // A peer that went away again, or too many open files: neither lasts.
                log::warn!("a connection was not accepted: {e}");
                if e.kind() != ErrorKind::ConnectionAborted {
                    sleep(Duration::from_millis(100)).await;
                }
                continue;
            }
        };
        let (kms, acceptor) = (kms.clone(), tls.as_ref().map(|tls| tls.acceptor()));
        tokio::spawn(async move {
            match acceptor {
                None => connection(kms, stream).await,
                Some(acceptor) => match timeout(HANDSHAKE_TIME, acceptor.accept(stream)).await {
                    Ok(Ok(stream)) => connection(kms, stream).await,
                    Ok(Err(e)) => log::debug!("a TLS handshake failed: {e}"),
                    Err(_) => log::debug!("a TLS handshake took too long"),
                },
            }
            drop(place);
        });
    }
}

async fn connection<S>(kms: Arc<Embedded>, stream: S)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |request| {
        let kms = kms.clone();
        async move { Ok::<_, Infallible>(respond(kms, request).await) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME)
        .max_buf_size(HEAD_MAX)
        .max_headers(HEADERS_MAX)
        // An answer goes out as it lies there, without a copy in a buffer that lives as long as the connection.
        .writev(true)
        .serve_connection(TokioIo::new(stream), service);
    let mut served = std::pin::pin!(served);
    let outcome = match timeout(CONNECTION_TIME, served.as_mut()).await {
        Ok(outcome) => outcome,
        Err(_) => {
            served.as_mut().graceful_shutdown();
            match timeout(CLOSING_TIME, served).await {
                Ok(outcome) => outcome,
                Err(_) => return,
            }
        }
    };
    if let Err(e) = outcome {
        log::debug!("a connection ended: {e}");
    }
}

async fn respond(kms: Arc<Embedded>, request: hyper::Request<Incoming>) -> Response<Full<Bytes>> {
    let (head, body) = request.into_parts();
    let answer = match read(body).await {
        Ok(body) => {
            // It waits for the disk and for locks, which must not keep other connections waiting. What passes its stack
            // may be a data key, as it is and as text.
            let answered = tokio::task::spawn_blocking(move || {
                on_scrubbed_stack(|| {
                    answer(&kms, &head.method, &head.uri, &head.headers, &body).map(bytes_of)
                })
            });
            answered.await.unwrap_or_else(|_| {
                Err(WireError::new("KMSInternalException", "The KMS failed; its log says why."))
            })
        }
        Err(e) => Err(e),
    };
    let (status, body) = match answer {
        Ok(body) => (200, body),
        Err(e) => (e.status(), e.body().into()),
    };
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let headers = response.headers_mut();
    headers.insert(hyper::header::CONTENT_TYPE, hyper::header::HeaderValue::from_static(CONTENT_TYPE));
    headers.insert(hyper::header::CACHE_CONTROL, hyper::header::HeaderValue::from_static("no-store"));
    if let Ok(id) = Uuid::new_v4().to_string().parse() {
        headers.insert("x-amzn-requestid", id);
    }
    response
}

/// What is sent; wiped when it was, since it may have a data key in it.
fn bytes_of(mut answer: Value) -> Bytes {
    if answer.is_null() {
        return Bytes::new();
    }
    // Room for every answer with a key in it: growing would leave a copy behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(16 << 10));
    serde_json::to_writer(&mut *bytes, &answer).expect("a value can be written into memory");
    if let Some(Value::String(plaintext)) = answer.get_mut("Plaintext") {
        plaintext.zeroize();
    }
    Bytes::from_owner(bytes)
}

async fn read(body: Incoming) -> std::result::Result<Bytes, WireError> {
    let collected = timeout(BODY_TIME, Limited::new(body, BODY_MAX).collect()).await;
    let collected = collected.map_err(|_| WireError::serialization("The body did not arrive in time."))?;
    let collected = collected.map_err(|_| {
        WireError::serialization(format!("The body is longer than {BODY_MAX} bytes, or was cut off."))
    })?;
    Ok(collected.to_bytes())
}

/// Who asks for what, and the answer.
fn answer(
    kms: &Embedded,
    method: &Method,
    uri: &hyper::Uri,
    headers: &HeaderMap,
    body: &[u8],
) -> operations::Answer {
    if method != Method::POST || uri.path() != "/" {
        return Err(WireError { kind: "UnknownOperationException", message: None });
    }
    let headers = texts(headers)?;
    let signed = Signed {
        method: method.as_str(),
        path: uri.path(),
        query: uri.query().unwrap_or(""),
        headers: &headers,
        body,
    };
    let authorization = Authorization::of(&signed, &kms.locality().region, OffsetDateTime::now_utc())?;
    let (caller, secret) = kms.principal_of(&authorization.access_key)?.ok_or_else(sigv4::unrecognized)?;
    authorization.check(&signed, &secret)?;
    let operation = signed.header("x-amz-target").and_then(|target| target.strip_prefix(TARGET));
    let operation = operation.ok_or(WireError { kind: "UnknownOperationException", message: None })?;
    let fields = Fields::parse(body)?;
    let access_key = &authorization.access_key;
    operations::answer(&Request { kms, caller: &caller, access_key, fields }, operation)
}

/// The headers as texts, names in lower case.
fn texts(headers: &HeaderMap) -> std::result::Result<Vec<(String, String)>, WireError> {
    let text = |(name, value): (&hyper::header::HeaderName, &hyper::header::HeaderValue)| {
        let value = value.to_str().map_err(|_| WireError::serialization("A header is not ASCII."))?;
        Ok((name.as_str().to_owned(), value.trim().to_owned()))
    };
    headers.iter().map(text).collect()
}
