//! Buckets of Google Cloud Storage.
//!
//! Credentials are in the environment, as Google's own tools have them: a service account's file, the
//! application default credentials, or a machine's identity. The crate asks for tokens, and anew before they
//! expire.

use super::Access;
use super::connection::{Connect, Found, check_endpoint, host_of, retry};
use crate::base::{Error, Kind, Result};
use object_store::ObjectStore;
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};

/// Looks for credentials.
///
/// # Errors
/// `Usage` for a region, which a bucket has already.
pub(super) fn prepare(bucket: &str, access: &Access) -> Result<Found> {
    if access.region.is_some() {
        return Err(Error::new(Kind::Usage, "a bucket of Google's has one region: leave out --region"));
    }
    let builder = GoogleCloudStorageBuilder::from_env();
    let named = builder.get_config_value(&GoogleConfigKey::BaseUrl).filter(|url| !url.is_empty());
    let endpoint = access.endpoint.clone().or(named);
    endpoint.as_deref().map_or(Ok(()), check_endpoint)?;
    let host = endpoint.as_deref().map_or_else(|| ("storage.googleapis.com".into(), 443), host_of);
    let bucket = bucket.to_owned();
    let build = move |connect: Connect| {
        let mut builder =
            builder.clone().with_bucket_name(&bucket).with_http_connector(connect).with_retry(retry());
        if let Some(endpoint) = &endpoint {
            builder = builder.with_base_url(endpoint);
        }
        Ok(Box::new(builder.build()?) as Box<dyn ObjectStore>)
    };
    Ok(Found { host, build: Box::new(build) })
}
