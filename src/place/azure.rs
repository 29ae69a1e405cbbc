//! Containers of Azure's Blob Storage.
//!
//! Account and credentials are in the environment, in the variables that Azure's own tools have: an account
//! key, a shared access signature, a client's secret, a workload's or a machine's identity. The crate asks
//! for tokens, and anew before they expire.

use super::Access;
use super::connection::{Connect, Found, check_endpoint, host_of, retry};
use crate::base::{Error, Kind, Result};
use object_store::ObjectStore;
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};

/// Looks for the account and its credentials.
///
/// # Errors
/// `Usage` where no account is named.
pub(super) fn prepare(container: &str, access: &Access) -> Result<Found> {
    if access.region.is_some() {
        return Err(Error::new(Kind::Usage, "an account of Azure's has one region: leave out --region"));
    }
    let builder = MicrosoftAzureBuilder::from_env();
    let of = |key: AzureConfigKey| builder.get_config_value(&key).filter(|value| !value.is_empty());
    let account = of(AzureConfigKey::AccountName).ok_or_else(|| {
        let message = "no storage account is named: set AZURE_STORAGE_ACCOUNT_NAME, and \
                       AZURE_STORAGE_ACCOUNT_KEY or other credentials (docs/backup.md)";
        Error::new(Kind::Usage, message)
    })?;
    let endpoint = access.endpoint.clone().or_else(|| of(AzureConfigKey::Endpoint));
    endpoint.as_deref().map_or(Ok(()), check_endpoint)?;
    let host = match &endpoint {
        Some(endpoint) => host_of(endpoint),
        None => (format!("{account}.blob.core.windows.net"), 443),
    };
    let container = container.to_owned();
    let build = move |connect: Connect| {
        let mut builder =
            builder.clone().with_container_name(&container).with_http_connector(connect).with_retry(retry());
        if let Some(endpoint) = &endpoint {
            builder = builder.with_endpoint(endpoint.clone()).with_allow_http(true);
        }
        Ok(Box::new(builder.build()?) as Box<dyn ObjectStore>)
    };
    Ok(Found { host, build: Box::new(build) })
}
