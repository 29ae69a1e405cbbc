//! The SDK's client for one region: whom it asks, as whom, and over which connections.

use crate::base::sync::Locked;
use crate::kms::KmsError;
use crate::kms::aws::plain_http;
use aws_config::{BehaviorVersion, Region};
use aws_sdk_kms::config::interceptors::BeforeTransmitInterceptorContextRef;
use aws_sdk_kms::config::retry::RetryConfig;
use aws_sdk_kms::config::{ConfigBag, Intercept, RuntimeComponents, SharedHttpClient};
use aws_sdk_kms::error::BoxError;
use aws_smithy_http_client::proxy::ProxyConfig;
use aws_smithy_http_client::tls::rustls_provider::CryptoMode;
use aws_smithy_http_client::tls::{self, TlsContext, TrustStore};
use aws_smithy_http_client::{Builder, Connector};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use tokio_rustls::rustls::RootCertStore;
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::pki_types::pem::PemObject;

/// A client and what is known of where it goes.
pub(super) struct Regional {
    /// The SDK's.
    pub client: aws_sdk_kms::Client,
    region: String,
    seen: Seen,
}

impl Regional {
    /// The client for `region`, else for the environment's: `AWS_REGION`, the profile's, the instance's.
    ///
    /// # Errors
    /// Validation where no region is known.
    pub(super) async fn new(region: Option<&str>) -> Result<Self, KmsError> {
        let http = http_client(trusted()?);
        let mut loader = aws_config::defaults(BehaviorVersion::latest()).http_client(http);
        if let Some(region) = region {
            loader = loader.region(Region::new(region.to_owned()));
        }
        let shared = loader.load().await;
        let Some(region) = shared.region().map(ToString::to_string).filter(|region| !region.is_empty())
        else {
            return Err(KmsError::Validation(
                "no AWS region is known: name the key by its ARN, or set AWS_REGION or the profile's region"
                    .into(),
            ));
        };
        let seen = Seen::default();
        let config = aws_sdk_kms::config::Builder::from(&shared)
            .retry_config(RetryConfig::disabled())
            .interceptor(seen.clone())
            .build();
        Ok(Regional { client: aws_sdk_kms::Client::from_conf(config), region, seen })
    }

    /// Where requests go, as a URL once one has been made.
    pub(super) fn endpoint(&self) -> String {
        let seen = self.seen.0.locked();
        seen.clone().unwrap_or_else(|| format!("AWS KMS in {}", self.region))
    }
}

/// HTTPS by rustls, through the environment's proxy if there is one; plain HTTP on this machine alone.
fn http_client(trusted: TlsContext) -> SharedHttpClient {
    let client = Builder::new().build_with_connector_fn(move |settings, components| {
        let mut connector = Connector::builder().proxy_config(ProxyConfig::from_env());
        connector.set_connector_settings(settings.cloned());
        connector.set_sleep_impl(components.and_then(RuntimeComponents::sleep_impl));
        connector.tls_provider(tls::Provider::rustls(CryptoMode::Ring)).tls_context(trusted.clone()).build()
    });
    plain_http::refuse_elsewhere(client)
}

/// HTTPS by rustls as for a KMS, and HTTP: for whoever sends nothing but ciphertext.
///
/// # Errors
/// As for [`trusted`].
#[cfg(feature = "object-store")]
pub(crate) fn connector_for_ciphertext() -> Result<Connector, KmsError> {
    let connector = Connector::builder().proxy_config(ProxyConfig::from_env());
    Ok(connector.tls_provider(tls::Provider::rustls(CryptoMode::Ring)).tls_context(trusted()?).build())
}

/// What environment and profile say of this machine: region and credentials, for whoever asks another service
/// than the KMS.
///
/// # Errors
/// As for [`trusted`].
#[cfg(feature = "object-store")]
pub(crate) async fn environment() -> Result<aws_config::SdkConfig, KmsError> {
    let http = http_client(trusted()?);
    Ok(aws_config::defaults(BehaviorVersion::latest()).http_client(http).load().await)
}

/// Whose certificates are believed: those of the file that `AWS_CA_BUNDLE` names, as AWS's other tools have
/// it, else the platform's roots (`SSL_CERT_FILE` and `SSL_CERT_DIR` name others).
///
/// # Errors
/// Validation for a file without usable certificates.
fn trusted() -> Result<TlsContext, KmsError> {
    let Some(path) = std::env::var_os("AWS_CA_BUNDLE").filter(|path| !path.is_empty()).map(PathBuf::from)
    else {
        return Ok(TlsContext::default());
    };
    let unusable = |why: &dyn std::fmt::Display| {
        KmsError::Validation(format!("AWS_CA_BUNDLE: {}: {why}", path.display()))
    };
    let pem = std::fs::read(&path).map_err(|e| unusable(&e))?;
    let certificates: Vec<_> =
        CertificateDer::pem_slice_iter(&pem).collect::<Result<_, _>>().map_err(|e| unusable(&e))?;
    // The SDK takes it for granted that each of them is good.
    let mut roots = RootCertStore::empty();
    certificates.into_iter().try_for_each(|certificate| roots.add(certificate)).map_err(|e| unusable(&e))?;
    if roots.is_empty() {
        return Err(unusable(&"there are no certificates in it"));
    }
    let store = TrustStore::empty().with_pem_certificate(pem);
    TlsContext::builder().with_trust_store(store).build().map_err(|e| unusable(&e))
}

/// The scheme and host of the last request: only the SDK knows what it makes of
/// environment, profile and region.
#[derive(Clone, Debug, Default)]
struct Seen(Arc<Mutex<Option<String>>>);

impl Intercept for Seen {
    fn name(&self) -> &'static str {
        "endpoint"
    }

    fn read_before_transmit(
        &self,
        context: &BeforeTransmitInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let uri = context.request().uri();
        let end = uri.find("://").and_then(|scheme| Some(scheme + 3 + uri[scheme + 3..].find('/')?));
        let endpoint = uri[..end.unwrap_or(uri.len())].to_owned();
        *self.0.locked() = Some(endpoint);
        Ok(())
    }
}
