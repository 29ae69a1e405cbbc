//! Nothing is sent in the clear to another machine: neither a request, nor what would be
//! answered, a data key among it.
//!
//! It stands between the SDK and the network, so that it sees whom every request goes to, whichever of
//! environment, profile and settings has said so: the KMS, and whoever gives credentials.

use aws_sdk_kms::config::{RuntimeComponents, SharedHttpClient};
use aws_smithy_runtime_api::client::http::{
    HttpClient, HttpConnector, HttpConnectorFuture, HttpConnectorSettings, SharedHttpConnector,
};
use aws_smithy_runtime_api::client::orchestrator::HttpRequest;
use aws_smithy_runtime_api::client::result::ConnectorError;
use hyper::Uri;
use std::net::IpAddr;

/// Where a machine of AWS's asks for its own credentials. These services speak HTTP alone, and no packet to
/// them leaves the machine's link; a KMS is not there, so only the methods are let through that they know.
const CREDENTIAL_SERVICES: &[&str] =
    &["169.254.169.254", "169.254.170.2", "169.254.170.23", "fd00:ec2::254", "fd00:ec2::23"];

/// `http`, which refuses to speak to another machine without TLS.
pub(super) fn refuse_elsewhere(http: SharedHttpClient) -> SharedHttpClient {
    SharedHttpClient::new(Guard(http))
}

/// What is refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0} is another machine, and without TLS whoever is on the way reads the data key: name an https:// \
     address (\"sealblk kms serve\" has --tls-cert), or one on this machine that leads there by a tunnel"
)]
pub(super) struct InTheClear(String);

#[derive(Debug)]
struct Guard<T>(T);

impl HttpClient for Guard<SharedHttpClient> {
    fn http_connector(
        &self,
        settings: &HttpConnectorSettings,
        components: &RuntimeComponents,
    ) -> SharedHttpConnector {
        SharedHttpConnector::new(Guard(self.0.http_connector(settings, components)))
    }
}

impl HttpConnector for Guard<SharedHttpConnector> {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        match check(request.method(), request.uri()) {
            Ok(()) => self.0.call(request),
            Err(e) => HttpConnectorFuture::ready(Err(ConnectorError::user(e.into()))),
        }
    }
}

fn check(method: &str, uri: &str) -> Result<(), InTheClear> {
    let parsed: Option<Uri> = uri.parse().ok();
    let host = parsed.as_ref().and_then(Uri::host).unwrap_or_default();
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let address: Option<IpAddr> = host.parse().ok();
    let here = host == "localhost" || address.is_some_and(|address| address.is_loopback());
    let asks_for_credentials = ["GET", "PUT"].contains(&method) && CREDENTIAL_SERVICES.contains(&host);
    let encrypted = parsed.as_ref().and_then(Uri::scheme_str) == Some("https");
    if encrypted || here || asks_for_credentials {
        return Ok(());
    }
    // Neither path nor query, which may have a token in them.
    let authority = parsed.as_ref().and_then(Uri::authority).map_or("", |authority| authority.as_str());
    Err(InTheClear(format!("http://{}", authority.rsplit('@').next().unwrap_or_default())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_machine_is_spoken_to_without_tls() {
        for uri in [
            "https://kms.example/",
            "http://127.0.0.1:8600/",
            "http://127.8.9.10/",
            "http://localhost:1/",
            "http://[::1]:8600/x?y=z",
        ] {
            assert_eq!(check("POST", uri), Ok(()), "{uri}");
        }
        for uri in [
            "http://kms.example:8600/?token=x",
            "http://10.0.0.1/",
            "http://0.0.0.0:1/",
            "http://localhost.example/",
            "http://127.0.0.1.example/",
            "http://127.0.0.1@kms.example/",
            "http://[2001:db8::1]:8600/",
            "http://169.254.169.254/",
            "ftp://127.0.0.2.example/",
            "",
        ] {
            let refused = check("POST", uri).unwrap_err().to_string();
            assert!(refused.contains("https://") && !refused.contains("token"), "{uri}: {refused}");
        }
        assert_eq!(check("POST", "http://a:b@kms.example/").unwrap_err().0, "http://kms.example");
    }

    #[test]
    fn a_machine_may_ask_its_link_for_its_credentials() {
        for host in CREDENTIAL_SERVICES {
            let host = if host.contains(':') { format!("[{host}]") } else { (*host).to_owned() };
            for (method, may) in [("GET", true), ("PUT", true), ("POST", false)] {
                assert_eq!(check(method, &format!("http://{host}/latest")).is_ok(), may, "{method} {host}");
            }
        }
    }
}
