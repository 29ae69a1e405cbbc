//! A bucket of an object store as a place, by the crate `object_store`: S3, and whatever speaks its protocol.
//!
//! Connections, certificates and credentials are those of the AWS SDK, as for a KMS; requests,
//! signatures, retries and lists are the crate's. Credentials are asked for again a while before they
//! expire, by the same process.

use super::{Access, Listed, MAX_LEN, ObjectName, Objects, Put};
use crate::base::sync::Locked;
use crate::base::{Error, Kind, Result};
use crate::kms::aws;
use async_trait::async_trait;
use aws_credential_types::Credentials;
use aws_credential_types::provider::{ProvideCredentials, SharedCredentialsProvider};
use aws_smithy_http_client::Connector;
use aws_smithy_runtime_api::client::http::HttpConnector as _;
use aws_smithy_runtime_api::client::orchestrator::HttpRequest as SdkRequest;
use futures_util::StreamExt;
use http_body_util::{BodyExt, Full, Limited};
use object_store::aws::{AmazonS3, AmazonS3Builder, AwsCredential};
use object_store::client::{
    ClientOptions, CredentialProvider, HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest,
    HttpResponse, HttpResponseBody, HttpService,
};
use object_store::path::Path;
use object_store::{
    BackoffConfig, GetOptions, GetRange, ObjectStore, ObjectStoreExt, PutMode, PutOptions, RetryConfig,
};
use std::error::Error as StdError;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};
use tokio::runtime::Runtime;

/// How many threads there are.
pub(super) const WIDTH: usize = 8;
/// How long one request may take, from its first byte to the last of the answer.
const REQUEST: Duration = Duration::from_secs(120);
/// How long a request is tried again that the store was too busy for, or that got lost.
const PATIENCE: Duration = Duration::from_secs(120);
/// The kind of error for a request of which it is not known whether it was done: the crate makes it
/// again, whatever it was. A put that must not replace anything may then find what it has put itself, and
/// whoever asked for it looks.
const AGAIN: HttpErrorKind = HttpErrorKind::Connect;
/// So long before they expire, credentials are asked for anew.
const BEFORE_EXPIRY: Duration = Duration::from_secs(300);

/// A bucket, and how it is reached.
pub(crate) struct Bucket {
    name: String,
    prefix: Path,
    region: String,
    endpoint: Option<String>,
    credentials: Arc<FromSdk>,
    /// One for each thread: whose connections are another thread's to drive nobody can use.
    connectors: Mutex<Vec<Connector>>,
}

impl Bucket {
    /// Asks the environment, and where it says so other services, for region and credentials.
    ///
    /// # Errors
    /// `Usage` where there are no credentials, or where no region is known.
    pub(super) fn prepare(bucket: &str, prefix: &str, access: &Access) -> Result<Self> {
        access.endpoint.as_deref().map_or(Ok(()), check_endpoint)?;
        let runtime = runtime()?;
        runtime.block_on(async {
            let environment = aws::environment().await?;
            let of_environment = || {
                let of = |name: &str| std::env::var(name).ok().filter(|url| !url.is_empty());
                of("AWS_ENDPOINT_URL_S3").or_else(|| environment.endpoint_url().map(str::to_owned))
            };
            let endpoint = access.endpoint.clone().or_else(of_environment);
            if let Some(endpoint) = &endpoint {
                check_endpoint(endpoint)?;
            }
            let region = access.region.clone().or_else(|| environment.region().map(ToString::to_string));
            let region = match (region.filter(|region| !region.is_empty()), &endpoint) {
                (Some(region), _) => region,
                // Other stores than AWS's have one region, and most do not mind its name.
                (None, Some(_)) => "us-east-1".into(),
                (None, None) => {
                    let message =
                        "no region is known: say --region, or set AWS_REGION or the profile's region";
                    return Err(Error::new(Kind::Usage, message));
                }
            };
            let provider = environment.credentials_provider().ok_or_else(no_credentials)?;
            let credentials = Arc::new(FromSdk { provider, known: Mutex::default() });
            // Now, while files can be read and programs started; and what is wrong is said at once.
            credentials.current().await?;
            // Now, while certificates can be read.
            let connectors = (0..WIDTH).map(|_| aws::connector_for_ciphertext()).collect::<Result<_, _>>()?;
            Ok(Bucket {
                name: bucket.to_owned(),
                prefix: Path::parse(prefix).map_err(|e| Error::of(Kind::Usage, e))?,
                region,
                endpoint,
                credentials,
                connectors: Mutex::new(connectors),
            })
        })
    }

    /// One thread's way to the bucket.
    pub(super) fn open(&self) -> Result<OpenBucket> {
        let runtime = runtime()?;
        let connector = self.connectors.locked().pop();
        let connector = connector.ok_or_else(|| Error::new(Kind::Other, "there are too many threads"))?;
        let mut builder = AmazonS3Builder::new()
            .with_bucket_name(&self.name)
            .with_region(&self.region)
            .with_credentials(self.credentials.clone())
            .with_http_connector(Connect(Arc::new(connector)))
            .with_disable_bulk_delete(true)
            .with_retry(RetryConfig {
                backoff: BackoffConfig {
                    init_backoff: Duration::from_millis(100),
                    max_backoff: Duration::from_secs(5),
                    base: 2.,
                },
                max_retries: 8,
                retry_timeout: PATIENCE,
            });
        if let Some(endpoint) = &self.endpoint {
            // A store of one's own has seldom a name for each bucket.
            builder = builder
                .with_endpoint(endpoint)
                .with_allow_http(true)
                .with_virtual_hosted_style_request(false);
        }
        let store = builder.build().map_err(|e| self.failed("open", e))?;
        Ok(OpenBucket { runtime, store, prefix: self.prefix.clone(), bucket: self.name.clone() })
    }

    /// The host that requests go to, and its port: for whoever looks it up before the process is confined.
    pub(crate) fn host(&self) -> (String, u16) {
        let uri = self.endpoint.as_ref().and_then(|endpoint| endpoint.parse::<hyper::Uri>().ok());
        let port = |uri: &hyper::Uri| uri.port_u16().unwrap_or(443);
        match uri {
            Some(uri) => (uri.host().unwrap_or_default().trim_matches(['[', ']']).to_owned(), port(&uri)),
            None => (format!("s3.{}.amazonaws.com", self.region), 443),
        }
    }

    fn failed(&self, what: &str, e: object_store::Error) -> Error {
        failed(&self.name, what, e)
    }
}

fn runtime() -> Result<Runtime> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|e| Error::from(e).context("start the object store's client"))
}

fn check_endpoint(endpoint: &str) -> Result<()> {
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

fn no_credentials() -> Error {
    Error::new(
        Kind::Usage,
        "there are no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile \
         (docs/backup.md)",
    )
}

/// The credentials that the AWS SDK finds.
#[derive(Debug)]
struct FromSdk {
    provider: SharedCredentialsProvider,
    known: Mutex<Option<Credentials>>,
}

impl FromSdk {
    async fn current(&self) -> Result<Arc<AwsCredential>> {
        let known = self.known.locked().clone();
        let is_good =
            |it: &Credentials| it.expiry().is_none_or(|expiry| expiry > SystemTime::now() + BEFORE_EXPIRY);
        let credentials = match known.filter(is_good) {
            Some(known) => known,
            None => {
                let fresh = self.provider.provide_credentials().await.map_err(|e| {
                    let why = StdError::source(&e).map_or_else(String::new, |why| format!(" ({why})"));
                    let none = no_credentials();
                    let message = format!("{none}; the AWS SDK says: {e}{why}");
                    none.reworded(message)
                })?;
                *self.known.locked() = Some(fresh.clone());
                fresh
            }
        };
        Ok(Arc::new(AwsCredential {
            key_id: credentials.access_key_id().to_owned(),
            secret_key: credentials.secret_access_key().to_owned(),
            token: credentials.session_token().map(str::to_owned),
        }))
    }
}

#[async_trait]
impl CredentialProvider for FromSdk {
    type Credential = AwsCredential;

    async fn get_credential(&self) -> object_store::Result<Arc<AwsCredential>> {
        let failed = |e: Error| object_store::Error::Generic { store: "S3", source: Box::new(e) };
        self.current().await.map_err(failed)
    }
}

/// The SDK's connections, for the crate.
#[derive(Clone, Debug)]
struct Connect(Arc<Connector>);

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

impl Connect {
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
fn words(e: &dyn StdError) -> String {
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

/// One thread's way to a bucket.
pub(super) struct OpenBucket {
    runtime: Runtime,
    store: AmazonS3,
    prefix: Path,
    bucket: String,
}

impl OpenBucket {
    fn at(&self, name: &ObjectName) -> Path {
        self.prefix.parts().chain(Path::from(name.as_str()).parts()).collect()
    }

    fn failed(&self, what: &str, e: object_store::Error) -> Error {
        failed(&self.bucket, what, e)
    }
}

/// The error for the reader. The store's own words come with it.
fn failed(bucket: &str, what: &str, e: object_store::Error) -> Error {
    use object_store::Error as E;
    let said = words(&e);
    let (kind, advice) = match &e {
        E::PermissionDenied { .. } => (Kind::Refused, "the credentials may not do this in the bucket"),
        E::Unauthenticated { .. } => (Kind::Refused, "the store does not believe who asks"),
        // Of a GET of an object that is not there, its own way is taken before.
        E::NotFound { .. } => (Kind::NotFound, "there is no such bucket"),
        _ if said.contains("ExpiredToken") => {
            (Kind::Refused, "the credentials have expired: the same command with new ones goes on")
        }
        E::NotSupported { .. } | E::NotImplemented { .. } => (Kind::Unsupported, "this store cannot do it"),
        _ => (Kind::Other, "the same command goes on where it came to"),
    };
    let said = printable(&said);
    Error::new(kind, format!("{what} in bucket {bucket}: {advice} ({said})"))
}

/// The beginning of what a store says, in one line.
fn printable(said: &str) -> String {
    let line: String = said.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(600) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}

impl Objects for OpenBucket {
    fn get(&mut self, name: &ObjectName, max: usize) -> Result<Option<Vec<u8>>> {
        let at = self.at(name);
        let got = self.runtime.block_on(async { self.store.get(&at).await?.bytes().await });
        match got {
            Ok(bytes) if bytes.len() <= max => Ok(Some(bytes.into())),
            Ok(bytes) => {
                let message =
                    format!("{name} has {} bytes, and {max} are the most that it can have", bytes.len());
                Err(Error::new(Kind::Corrupt, message))
            }
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(e) => Err(self.failed(&format!("read {name}"), e)),
        }
    }

    fn exists(&mut self, name: &ObjectName) -> Result<bool> {
        let at = self.at(name);
        let first = GetOptions { range: Some(GetRange::Bounded(0..1)), ..GetOptions::default() };
        let found = self.runtime.block_on(async {
            match self.store.head(&at).await {
                // The answer to HEAD has no words: asked otherwise, the store says why.
                Err(e) if !matches!(e, object_store::Error::NotFound { .. }) => {
                    self.store.get_opts(&at, first).await.map(drop)
                }
                found => found.map(drop),
            }
        });
        match found {
            Ok(()) => Ok(true),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(e) => Err(self.failed(&format!("look for {name}"), e)),
        }
    }

    fn put(&mut self, name: &ObjectName, bytes: Vec<u8>, put: Put) -> Result<bool> {
        let at = self.at(name);
        let mode = match put {
            Put::IfNew => PutMode::Create,
            Put::Replace => PutMode::Overwrite,
        };
        let put = self.store.put_opts(&at, bytes.into(), PutOptions { mode, ..PutOptions::default() });
        match self.runtime.block_on(put) {
            Ok(_) => Ok(true),
            Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => {
                Ok(false)
            }
            Err(e) => Err(self.failed(&format!("write {name}"), e)),
        }
    }

    fn list(&mut self, folder: &ObjectName) -> Result<Vec<Listed>> {
        let at = self.at(folder);
        let mut found = Vec::new();
        let listed: Result<(), object_store::Error> = self.runtime.block_on(async {
            let mut all = self.store.list(Some(&at));
            while let Some(object) = all.next().await {
                let object = object?;
                let below = object.location.prefix_match(&at).map(|parts| {
                    let parts: Vec<String> = parts.map(|part| part.as_ref().to_owned()).collect();
                    parts.join("/")
                });
                // What is called otherwise is none of ours.
                if let Some(Ok(name)) = below.map(|below| ObjectName::new(format!("{folder}/{below}"))) {
                    found.push(Listed { name, modified: object.last_modified.timestamp() });
                }
            }
            Ok(())
        });
        listed.map_err(|e| self.failed(&format!("list {folder}"), e))?;
        Ok(found)
    }

    fn remove(&mut self, name: &ObjectName) -> Result<()> {
        let at = self.at(name);
        match self.runtime.block_on(self.store.delete(&at)) {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(e) => Err(self.failed(&format!("remove {name}"), e)),
        }
    }

    fn sync(&mut self) -> Result<()> {
        Ok(())
    }
}
