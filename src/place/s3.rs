//! S3, and whatever speaks its protocol.
//!
//! Credentials are those of the AWS SDK, as for a KMS. They are asked for again a while before they
//! expire, by the same process.

use super::Access;
use super::connection::{Connect, Found, check_endpoint, host_of, retry, runtime};
use crate::base::sync::Locked;
use crate::base::{Error, Kind, Result};
use crate::kms::aws;
use async_trait::async_trait;
use aws_credential_types::Credentials;
use aws_credential_types::provider::{ProvideCredentials, SharedCredentialsProvider};
use object_store::ObjectStore;
use object_store::aws::{AmazonS3Builder, AwsCredential};
use object_store::client::CredentialProvider;
use std::error::Error as StdError;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

/// So long before they expire, credentials are asked for anew.
const BEFORE_EXPIRY: Duration = Duration::from_secs(300);

/// Asks the environment, and where it says so other services, for region and credentials.
///
/// # Errors
/// `Usage` where there are no credentials, or where no region is known.
pub(super) fn prepare(bucket: &str, access: &Access) -> Result<Found> {
    let runtime = runtime()?;
    let (region, endpoint, credentials) = runtime.block_on(async {
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
                let message = "no region is known: say --region, or set AWS_REGION or the profile's region";
                return Err(Error::new(Kind::Usage, message));
            }
        };
        let provider = environment.credentials_provider().ok_or_else(no_credentials)?;
        let credentials = Arc::new(FromSdk { provider, known: Mutex::default() });
        // Now, while files can be read and programs started; and what is wrong is said at once.
        credentials.current().await?;
        Ok((region, endpoint, credentials))
    })?;
    let host = match &endpoint {
        Some(endpoint) => host_of(endpoint),
        None => (format!("s3.{region}.amazonaws.com"), 443),
    };
    let bucket = bucket.to_owned();
    let build = move |connect: Connect| {
        let mut builder = AmazonS3Builder::new()
            .with_bucket_name(&bucket)
            .with_region(&region)
            .with_credentials(credentials.clone())
            .with_http_connector(connect)
            .with_disable_bulk_delete(true)
            .with_retry(retry());
        if let Some(endpoint) = &endpoint {
            // A store of one's own has seldom a name for each bucket.
            builder = builder
                .with_endpoint(endpoint)
                .with_allow_http(true)
                .with_virtual_hosted_style_request(false);
        }
        Ok(Box::new(builder.build()?) as Box<dyn ObjectStore>)
    };
    Ok(Found { host, build: Box::new(build) })
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
