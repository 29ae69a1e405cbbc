//! Connections and requests: what may arrive, how much of it, and for how long.
//!
//! hyper reads and writes HTTP/1; this bounds it. An answer of AWS's form goes to
//! everything that is HTTP at all.

use crate::base::Result;
use crate::base::sync::Locked;
use crate::crypt::secret_mem::on_scrubbed_stack;
use crate::kms::embedded::Embedded;
use crate::kms::embedded::principals::Caller;
use crate::kms::server::operations::{self, Request};
use crate::kms::server::places::{Peer, Place, Places};
use crate::kms::server::refusals::Refusals;
use crate::kms::server::sigv4::{self, AnswerKey, Authorization, Signed};
use crate::kms::server::tls::Tls;
use crate::kms::server::wire::{Fields, WireError};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{HeaderMap, Method, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::Value;
use std::collections::HashMap;
use std::convert::Infallible;
use std::io::ErrorKind;
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::thread::Thread;
use std::time::Duration;
use time::OffsetDateTime;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use uuid::Uuid;
use zeroize::{Zeroize, Zeroizing};

/// Bytes of a request's body: a policy of 32 KiB, escaped, fits several times.
const BODY_MAX: usize = 256 << 10;
/// Bytes of a request's line and headers.
const HEAD_MAX: usize = 32 << 10;
const HEADERS_MAX: usize = 64;
/// From the acceptance of a connection to the end of the TLS handshake.
const HANDSHAKE_TIME: Duration = Duration::from_secs(5);
/// From there to the end of the first request's headers.
const FIRST_HEAD_TIME: Duration = Duration::from_secs(5);
/// From the end of one request to the end of the next one's headers.
const HEAD_TIME: Duration = Duration::from_secs(30);
/// For a request's body to arrive.
const BODY_TIME: Duration = Duration::from_secs(15);
/// After this a connection is closed, between requests.
const CONNECTION_TIME: Duration = Duration::from_secs(600);
/// Closing may take so long: a request that is being answered, and a reader who does not read.
const CLOSING_TIME: Duration = Duration::from_secs(60);

/// Requests of one principal that are answered at a time; more wait.
const AT_A_TIME: usize = 8;

const CONTENT_TYPE: &str = "application/x-amz-json-1.1";
const TARGET: &str = "TrentService.";

/// What all connections share.
pub(super) struct Server {
    /// The KMS.
    pub kms: Arc<Embedded>,
    /// What was refused and is not in the audit log yet.
    pub refusals: Arc<Refusals>,
    /// It brings other regions what has changed of multi-Region keys.
    synchronizing: Thread,
    places: Arc<Places>,
    /// For each principal that has asked something.
    turns: Mutex<HashMap<String, Arc<Semaphore>>>,
}

impl Server {
    /// A server of this KMS, with nobody connected.
    pub(super) fn new(kms: Arc<Embedded>, refusals: Arc<Refusals>, synchronizing: Thread) -> Arc<Self> {
        let (places, turns) = (Arc::default(), Mutex::default());
        Arc::new(Server { kms, refusals, synchronizing, places, turns })
    }

    fn turns_of(&self, principal: &str) -> Arc<Semaphore> {
        let mut turns = self.turns.locked();
        turns.entry(principal.to_owned()).or_insert_with(|| Arc::new(Semaphore::new(AT_A_TIME))).clone()
    }
}

/// Answers the connections that `next` accepts, by TLS if that is given, until it fails for good.
pub(super) async fn accept<S>(
    server: Arc<Server>,
    tls: Option<Arc<Tls>>,
    next: impl AsyncFn() -> std::io::Result<(S, Peer)>,
) -> Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    loop {
        let (stream, peer) = match next().await {
            Ok(connected) => connected,
            Err(e) => {
                // A peer that went away again, or too many open files: neither lasts.
                log::warn!("a connection was not accepted: {e}");
                if e.kind() != ErrorKind::ConnectionAborted {
                    sleep(Duration::from_millis(100)).await;
                }
                continue;
            }
        };
        let Some(place) = server.places.take(peer.clone()) else {
            log::warn!("a connection of {peer} is refused: all others are being answered");
            continue;
        };
        let (server, acceptor, place) =
            (server.clone(), tls.as_ref().map(|tls| tls.acceptor()), Arc::new(place));
        tokio::spawn(async move {
            let Some(acceptor) = acceptor else { return connection(server, stream, place).await };
            let shaken = first(timeout(HANDSHAKE_TIME, acceptor.accept(stream)), place.makes_way()).await;
            let First::This(shaken) = shaken else { return };
            match shaken {
                Ok(Ok(stream)) => connection(server, stream, place).await,
                Ok(Err(e)) => log::debug!("a TLS handshake failed: {e}"),
                Err(_) => log::debug!("a TLS handshake took too long"),
            }
        });
    }
}

/// What the first of two futures to end returned.
enum First<A, B> {
    This(A),
    That(B),
}

/// Waits for the first of two futures, and drops the other; if both are ready, it is this one.
async fn first<A, B>(this: impl Future<Output = A>, that: impl Future<Output = B>) -> First<A, B> {
    let (mut this, mut that) = (std::pin::pin!(this), std::pin::pin!(that));
    std::future::poll_fn(|context| match this.as_mut().poll(context) {
        Poll::Ready(done) => Poll::Ready(First::This(done)),
        Poll::Pending => that.as_mut().poll(context).map(First::That),
    })
    .await
}

/// How a connection comes to its end before its peer closes it.
enum Leaving {
    /// The connection has been there for long enough, or makes way for another.
    Gently,
    /// Nobody has shown a valid signature on it.
    AtOnce,
}

async fn until_it_leaves(place: &Place) -> Leaving {
    let first_head = async {
        sleep(FIRST_HEAD_TIME).await;
        if place.has_asked() {
            std::future::pending::<()>().await;
        }
    };
    match first(first(first_head, place.makes_way()), sleep(CONNECTION_TIME)).await {
        First::This(First::This(())) => {
            log::debug!("a connection without a request is closed");
            Leaving::AtOnce
        }
        First::This(First::That(())) if !place.is_signed() => Leaving::AtOnce,
        First::This(First::That(())) | First::That(()) => Leaving::Gently,
    }
}

async fn connection<S>(server: Arc<Server>, stream: S, place: Arc<Place>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let its_place = place.clone();
    let service = service_fn(move |request| {
        let (server, place) = (server.clone(), its_place.clone());
        async move { Ok::<_, Infallible>(respond(&server, &place, request).await) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME)
        .max_buf_size(HEAD_MAX)
        .max_headers(HEADERS_MAX)
        // An answer goes out as it lies there, without a copy in a buffer that lives as
        // long as the connection.
        .writev(true)
        .serve_connection(TokioIo::new(stream), service);
    let mut served = std::pin::pin!(served);
    let outcome = match first(served.as_mut(), until_it_leaves(&place)).await {
        First::This(outcome) => outcome,
        First::That(Leaving::AtOnce) => return,
        First::That(Leaving::Gently) => {
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

async fn respond(
    server: &Arc<Server>,
    place: &Arc<Place>,
    request: hyper::Request<Incoming>,
) -> Response<Full<Bytes>> {
    place.asks();
    let sent = answer(server, place, request).await.unwrap_or_else(|e| Sent::of(Err(e), None));
    let mut response = Response::new(Full::new(sent.body));
    *response.status_mut() = StatusCode::from_u16(sent.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let headers = response.headers_mut();
    if let Some(signature) = sent.signature.and_then(|it| it.parse().ok()) {
        headers.insert(sigv4::ANSWER_SIGNATURE, signature);
    }
    headers.insert(hyper::header::CONTENT_TYPE, hyper::header::HeaderValue::from_static(CONTENT_TYPE));
    headers.insert(hyper::header::CACHE_CONTROL, hyper::header::HeaderValue::from_static("no-store"));
    if let Ok(id) = Uuid::new_v4().to_string().parse() {
        headers.insert("x-amzn-requestid", id);
    }
    if !place.is_signed() {
        headers.insert(hyper::header::CONNECTION, hyper::header::HeaderValue::from_static("close"));
    }
    response
}

/// An answer.
struct Sent {
    status: u16,
    body: Bytes,
    /// There where one KMS has asked another.
    signature: Option<String>,
}

impl Sent {
    fn of(answer: std::result::Result<Bytes, WireError>, key: Option<&AnswerKey>) -> Self {
        let (status, body) = match answer {
            Ok(body) => (200, body),
            Err(e) => (e.status(), e.body().into()),
        };
        let signature = key.map(|key| key.sign(status, &body));
        Sent { status, body, signature }
    }
}

async fn answer(
    server: &Arc<Server>,
    place: &Arc<Place>,
    request: hyper::Request<Incoming>,
) -> std::result::Result<Sent, WireError> {
    let (head, body) = request.into_parts();
    let body = read(body).await?;
    let kms = server.kms.clone();
    let signed = blocking(move || authenticate(&kms, &head.method, &head.uri, &head.headers, body)).await?;
    let turns = server.turns_of(&signed.caller.arn);
    // Nobody closes a semaphore here.
    let _turn = turns.acquire().await;
    let Some(busy) = place.signed_by(&signed.caller.arn) else {
        return Err(WireError::new("ThrottlingException", "Rate exceeded"));
    };
    let server = server.clone();
    let answered = blocking(move || {
        let answer = answer_signed(&server, &signed).map(bytes_of);
        Ok(Sent::of(answer, signed.answer_key.as_ref()))
    })
    .await;
    drop(busy);
    answered
}

/// Runs what waits for the disk and for locks, which must not keep other connections waiting. What passes its
/// stack may be a data key, as it is and as text.
async fn blocking<T: Send + 'static>(
    f: impl FnOnce() -> std::result::Result<T, WireError> + Send + 'static,
) -> std::result::Result<T, WireError> {
    tokio::task::spawn_blocking(move || on_scrubbed_stack(f))
        .await
        .unwrap_or_else(|_| Err(WireError::new("KMSInternalException", "The KMS failed; its log says why.")))
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

/// A request whose signature is right.
struct SignedRequest {
    caller: Caller,
    access_key: String,
    operation: String,
    body: Bytes,
    /// What to sign the answer with, where one KMS asks another.
    answer_key: Option<AnswerKey>,
}

/// Who asks for what.
fn authenticate(
    kms: &Embedded,
    method: &Method,
    uri: &hyper::Uri,
    headers: &HeaderMap,
    body: Bytes,
) -> std::result::Result<SignedRequest, WireError> {
    if method != Method::POST || uri.path() != "/" {
        return Err(WireError { kind: "UnknownOperationException", message: None });
    }
    let headers = texts(headers)?;
    let signed = Signed {
        method: method.as_str(),
        path: uri.path(),
        query: uri.query().unwrap_or(""),
        headers: &headers,
        body: &body,
    };
    let authorization = Authorization::of(&signed, &kms.locality().region, OffsetDateTime::now_utc())?;
    let (caller, secret) = kms.principal_of(&authorization.access_key)?.ok_or_else(sigv4::unrecognized)?;
    authorization.check(&signed, &secret)?;
    let operation = signed.header("x-amz-target").and_then(|target| target.strip_prefix(TARGET));
    let operation = operation.ok_or(WireError { kind: "UnknownOperationException", message: None })?;
    let is_between_regions = operations::BETWEEN_REGIONS.contains(&operation);
    let answer_key = is_between_regions.then(|| authorization.answer_key(&secret));
    let (operation, access_key) = (operation.to_owned(), authorization.access_key);
    Ok(SignedRequest { caller, access_key, operation, body, answer_key })
}

fn answer_signed(server: &Server, signed: &SignedRequest) -> operations::Answer {
    let fields = Fields::parse(&signed.body)?;
    let (kms, refusals, bytes) = (&*server.kms, &*server.refusals, signed.body.len());
    let request = Request::new(kms, refusals, &signed.caller, &signed.access_key, fields, bytes);
    let answer = operations::answer(&request, &signed.operation);
    if answer.is_ok() && operations::CHANGE_WHAT_REGIONS_SHARE.contains(&&*signed.operation) {
        server.synchronizing.unpark();
    }
    answer
}

/// The headers as texts, names in lower case.
fn texts(headers: &HeaderMap) -> std::result::Result<Vec<(String, String)>, WireError> {
    let text = |(name, value): (&hyper::header::HeaderName, &hyper::header::HeaderValue)| {
        let value = value.to_str().map_err(|_| WireError::serialization("A header is not ASCII."))?;
        Ok((name.as_str().to_owned(), value.trim().to_owned()))
    };
    headers.iter().map(text).collect()
}
