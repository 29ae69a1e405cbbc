//! Connections to object stores: those of the AWS SDK, as for a KMS, for the crate `object_store`; and what
//! all stores have in common that are reached by them.

use super::MAX_LEN;
use crate::base::{Error, Kind, Result};
use async_trait::async_trait;
use aws_smithy_http_client::Connector;
use aws_smithy_runtime_api::client::http::HttpConnector as _;
use aws_smithy_runtime_api::client::orchestrator::HttpRequest as SdkRequest;
use http_body_util::{BodyExt, Full, Limited};
use object_store::client::{
    ClientOptions, HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse,
    HttpResponseBody, HttpService,
};
use object_store::{BackoffConfig, ObjectStore, RetryConfig};
use std::error::Error as StdError;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Runtime;

/// How long one request may take, from its first byte to the last of the answer.
const REQUEST: Duration = Duration::from_secs(120);
/// How long a request is tried again that the store was too busy for, or that got lost.
const PATIENCE: Duration = Duration::from_secs(120);

/// The kind of error for a request of which it is not known whether it was done: the crate makes it
/// again, whatever it was. A put that must not replace anything may then find what it has put itself, and
/// whoever asked for it looks.
const AGAIN: HttpErrorKind = HttpErrorKind::Connect;

/// What a kind of store has found in the environment.
pub(super) struct Found {
    /// Where requests go to: host and port.
    pub(super) host: (String, u16),
    /// Makes one thread's way.
    pub(super) build: Box<dyn Fn(Connect) -> object_store::Result<Box<dyn ObjectStore>>>,
}

pub(super) fn runtime() -> Result<Runtime> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|e| Error::from(e).context("start the object store's client"))
}

/// How often, and how long, a request is made again.
pub(super) fn retry() -> RetryConfig {
    RetryConfig {
        backoff: BackoffConfig {
            init_backoff: Duration::from_millis(100),
            max_backoff: Duration::from_secs(5),
            base: 2.,
        },
        max_retries: 8,
        retry_timeout: PATIENCE,
    }
}

/// Host and port of a URL that [`check_endpoint`] has let through.
pub(super) fn host_of(endpoint: &str) -> (String, u16) {
    let Ok(uri) = endpoint.parse::<hyper::Uri>() else { return (String::new(), 0) };
    let port = if uri.scheme_str() == Some("http") { 80 } else { 443 };
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    (host.to_owned(), uri.port_u16().unwrap_or(port))
}

pub(super) fn check_endpoint(endpoint: &str) -> Result<()> {
    let uri: Option<hyper::Uri> = endpoint.parse().ok();
    let scheme = uri.as_ref().and_then(|uri| uri.scheme_str());
    let has_host = uri.as_ref().and_then(|uri| uri.host()).is_some_and(|host| !host.is_empty());
    match scheme {
        Some("http" | "https") if has_host => Ok(()),
        _ => Err(Error::new(
            Kind::Usage,
            format!("{endpoint:?} is no endpoint, as https://s3.example:9000 is"),
        )),
    }
}

/// The SDK's connections. They are driven by one thread's runtime, and of no use to another.
#[derive(Clone, Debug)]
pub(super) struct Connect(Arc<Connector>);

impl Connect {
    pub(super) fn new(connector: Connector) -> Self {
        Connect(Arc::new(connector))
    }

    async fn send(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let (parts, body) = request.into_parts();
        let body = body.collect().await?.to_bytes();
        let unreadable = |e| HttpError::new(HttpErrorKind::Unknown, e);
        let request =
            SdkRequest::try_from(hyper::Request::from_parts(parts, body.into())).map_err(unreadable)?;
        let answer = self.0.call(request).await;
        let answer = answer.map_err(|e| HttpError::new_boxed(AGAIN, Box::new(Whole(e))))?;
        let answer = answer.try_into_http1x().map_err(unreadable)?;
        let (parts, body) = answer.into_parts();
        let body = Limited::new(body, MAX_LEN).collect().await;
        let body = body.map_err(|e| HttpError::new_boxed(AGAIN, e))?.to_bytes();
        let body = HttpResponseBody::new(Full::new(body).map_err(|never| match never {}));
        Ok(HttpResponse::from_parts(parts, body))
    }
}

impl HttpConnector for Connect {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(self.clone()))
    }
}

#[async_trait]
impl HttpService for Connect {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        match tokio::time::timeout(REQUEST, self.send(request)).await {
            Ok(answer) => answer,
            Err(late) => Err(HttpError::new(AGAIN, late)),
        }
    }
}

/// An error with what it comes from, since only the innermost says what was wrong.
#[derive(Debug)]
struct Whole<E>(E);

impl<E: StdError> std::fmt::Display for Whole<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", words(&self.0))
    }
}

impl<E: StdError + 'static> StdError for Whole<E> {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source()
    }
}

/// What an error says, and those that it comes from, as far as they say something else.
pub(super) fn words(e: &dyn StdError) -> String {
    let mut text = e.to_string();
    let mut next = e.source();
    while let Some(e) = next {
        let said = e.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        next = e.source();
    }
    text
}
