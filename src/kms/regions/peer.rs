//! The KMS of another region, asked by AWS's protocol and two operations of our own.
//!
//! Nothing secret goes there that it could not open: material is wrapped for it. The access key's secret only
//! signs, requests here and answers there: an answer, also a refusal, that it has not signed for this very
//! request is none, whoever has ended the TLS that it came by. What the other KMS answers is a claim: bounded
//! in size and time, and parsed here.

use crate::config::regions::KmsRegion;
use crate::kms::KmsError;
use crate::kms::embedded::synchronization::{Message, Parameters, Wrapping};
use crate::kms::key_ref::id_text;
use crate::kms::server::sigv4::{self, AnswerKey, Signed};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use time::OffsetDateTime;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, version};
use uuid::Uuid;
use zeroize::Zeroizing;

/// For connecting, one request and its answer: an RSA key is made for it.
const ANSWER_TIME: Duration = Duration::from_secs(60);
/// The longest answer in bytes.
const ANSWER_MAX: usize = 64 << 10;
/// The longest file with an access key in bytes.
const CREDENTIALS_MAX: u64 = 4096;
/// The longest message of another KMS's that is passed on, characters.
const WORDS_MAX: usize = 500;

/// What came back.
struct Answer {
    status: StatusCode,
    body: Bytes,
    /// Whether it is signed by the access key's secret, as the answer to the request.
    is_signed: bool,
}

/// The KMS of another region, and as whom it is asked.
pub(super) struct Peer {
    place: KmsRegion,
    tls: Option<TlsConnector>,
    access_key: String,
    secret: Zeroizing<String>,
}

impl Peer {
    /// The KMS at `place`, with the access key that lies in its file.
    ///
    /// # Errors
    /// `Validation`, naming the file, for one that cannot be read, or that others may read or write.
    pub(super) fn of(place: &KmsRegion) -> Result<Self, KmsError> {
        let tls = place.ca.as_deref().map(connector).transpose()?;
        let (access_key, secret) = access_key(&place.credentials)?;
        Ok(Peer { place: place.clone(), tls, access_key, secret })
    }

    /// Its region.
    pub(super) fn region(&self) -> &str {
        &self.place.region
    }

    /// What it has of this key, and a one-time key if it has less than this generation.
    pub(super) fn parameters(&self, key: Uuid, generation: u64, makes: bool) -> Result<Parameters, KmsError> {
        let asked = json!({ "KeyId": id_text(key), "Generation": generation, "CreatesReplica": makes });
        let answer = self.ask("GetParametersForSynchronization", &asked)?;
        let bytes = |name: &str| {
            let text = answer.get(name).and_then(Value::as_str);
            text.and_then(|text| STANDARD.decode(text).ok()).ok_or_else(|| self.strange(name))
        };
        let has = answer.get("Generation").and_then(Value::as_u64);
        let generation = has.ok_or_else(|| self.strange("Generation"))?;
        let is_primary = answer.get("IsPrimary").and_then(Value::as_bool);
        let is_primary = is_primary.ok_or_else(|| self.strange("IsPrimary"))?;
        let state = answer.get("State").and_then(Value::as_str);
        let state = state.ok_or_else(|| self.strange("State"))?.to_owned();
        let wrapping = match answer.get("PublicKey") {
            None => None,
            Some(_) => Some(Wrapping { public_key: bytes("PublicKey")?, token: bytes("ImportToken")? }),
        };
        Ok(Parameters { generation, is_primary, state, wrapping })
    }

    /// Has it take a message; returns KeyMetadata as it has it.
    pub(super) fn tell(&self, key: Uuid, token: &[u8], message: &Message) -> Result<Value, KmsError> {
        let asked = json!({
            "KeyId": id_text(key),
            "ImportToken": STANDARD.encode(token),
            "Shared": message.shared,
            "WrappedKey": STANDARD.encode(&message.wrapped_key),
            "SharedMaterial": STANDARD.encode(&message.material),
        });
        let mut answer = self.ask("SynchronizeMultiRegionKey", &asked)?;
        match answer.get_mut("KeyMetadata") {
            Some(metadata @ Value::Object(_)) => Ok(metadata.take()),
            _ => Err(self.strange("KeyMetadata")),
        }
    }

    /// Asks for one operation, once: whoever calls this may call it again.
    fn ask(&self, operation: &str, asked: &Value) -> Result<Value, KmsError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build();
        let runtime = runtime.map_err(|e| KmsError::Internal(format!("start an HTTP client: {e}")))?;
        let exchanged = runtime
            .block_on(async { tokio::time::timeout(ANSWER_TIME, self.exchange(operation, asked)).await });
        // A name that is still being looked up is not waited for.
        runtime.shutdown_background();
        let late = |_| self.not_reached(&format!("no answer within {} s", ANSWER_TIME.as_secs()));
        let Answer { status, body, is_signed } =
            exchanged.map_err(late)?.map_err(|e| self.not_reached(&e))?;
        let answer: Value = serde_json::from_slice(&body).map_err(|_| self.strange("JSON"))?;
        if is_signed && status == StatusCode::OK {
            return Ok(answer);
        }
        let text = |name: &str| answer.get(name).and_then(Value::as_str).unwrap_or_default();
        let kind: String =
            text("__type").chars().filter(char::is_ascii_alphanumeric).take(WORDS_MAX).collect();
        let words: String = text("message").chars().filter(|c| !c.is_control()).take(WORDS_MAX).collect();
        if !is_signed {
            let why = format!(
                "the answer is not signed with the secret of the access key in {}, so that anybody can have \
                 given it ({kind:.100}: {words})",
                self.place.credentials.display()
            );
            return Err(self.not_reached(&why));
        }
        match KmsError::of_wire(&kind, words) {
            KmsError::Internal(words) => Err(self.not_reached(&words)),
            e => Err(e),
        }
    }

    async fn exchange(&self, operation: &str, asked: &Value) -> Result<Answer, String> {
        let url = &self.place.url;
        let host = url.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
        let port = url.port_u16().unwrap_or(if self.tls.is_some() { 443 } else { 80 });
        let stream = TcpStream::connect((host, port)).await.map_err(|e| e.to_string())?;
        // Of a URL with https:// there is always a file of certificates.
        match (&self.tls, url.scheme_str()) {
            (Some(tls), Some("https")) => {
                let name = ServerName::try_from(host.to_owned()).map_err(|e| e.to_string())?;
                let stream = tls.connect(name, stream).await.map_err(|e| format!("TLS: {e}"))?;
                self.send(stream, operation, asked).await
            }
            (_, Some("http")) => self.send(stream, operation, asked).await,
            _ => Err("no certificates say whom to believe".into()),
        }
    }

    async fn send<S>(&self, stream: S, operation: &str, asked: &Value) -> Result<Answer, String>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (request, key) = self.signed(operation, asked).map_err(|e| e.to_string())?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| e.to_string())?;
        // It ends with the runtime.
        tokio::spawn(connection);
        let answer = sender.send_request(request).await.map_err(|e| e.to_string())?;
        let status = answer.status();
        let signature = answer.headers().get(sigv4::ANSWER_SIGNATURE).cloned();
        let body = Limited::new(answer.into_body(), ANSWER_MAX).collect().await.map_err(|e| e.to_string())?;
        let body = body.to_bytes();
        let signature = signature.as_ref().and_then(|it| it.to_str().ok());
        let is_signed = signature.is_some_and(|it| key.is_signed(status.as_u16(), &body, it));
        Ok(Answer { status, body, is_signed })
    }

    fn signed(
        &self,
        operation: &str,
        asked: &Value,
    ) -> hyper::http::Result<(Request<Full<Bytes>>, AnswerKey)> {
        let body = asked.to_string();
        let host = self.place.url.authority().map_or("", |authority| authority.as_str());
        let headers = [
            // Two requests of the same words are two: the answer to one is none to the other.
            ("amz-sdk-invocation-id", Uuid::new_v4().to_string()),
            ("content-type", "application/x-amz-json-1.1".to_owned()),
            ("host", host.to_owned()),
            ("x-amz-date", sigv4::date_header(OffsetDateTime::now_utc())),
            ("x-amz-target", format!("TrentService.{operation}")),
        ]
        .map(|(name, value)| (name.to_owned(), value));
        let signed =
            Signed { method: "POST", path: "/", query: "", headers: &headers, body: body.as_bytes() };
        let (authorization, key) =
            sigv4::authorization(&signed, &self.place.region, &self.access_key, &self.secret);
        let request = headers
            .iter()
            .fold(Request::post("/"), |request, (name, value)| request.header(name.as_str(), value.as_str()));
        let request = request.header("authorization", authorization).body(Full::new(Bytes::from(body)))?;
        Ok((request, key))
    }

    fn not_reached(&self, why: &str) -> KmsError {
        KmsError::Transport(format!(
            "could not reach the KMS of {} at {}: {why}",
            self.place.region, self.place.url
        ))
    }

    fn strange(&self, what: &str) -> KmsError {
        self.not_reached(&format!("its answer lacks {what}; is that \"sealblk kms serve\"?"))
    }
}

/// TLS that believes those whose certificates are in this file, and nobody else.
fn connector(ca: &Path) -> Result<TlsConnector, KmsError> {
    let unusable = |e: &dyn std::fmt::Display| KmsError::Validation(format!("use {}: {e}", ca.display()));
    let mut roots = RootCertStore::empty();
    let certificates = CertificateDer::pem_file_iter(ca).map_err(|e| unusable(&e))?;
    for certificate in certificates {
        roots.add(certificate.map_err(|e| unusable(&e))?).map_err(|e| unusable(&e))?;
    }
    if roots.is_empty() {
        return Err(unusable(&"there is no certificate in it"));
    }
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[&version::TLS13, &version::TLS12])
        .map_err(|e| unusable(&e))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}

/// The access key in a file, as `kms principal create` prints it: its id and its secret. Other lines are for
/// people.
fn access_key(path: &Path) -> Result<(String, Zeroizing<String>), KmsError> {
    let unusable = |why: &dyn std::fmt::Display| {
        KmsError::Validation(format!("use the access key in {}: {why}", path.display()))
    };
    let file = File::open(path).map_err(|e| unusable(&e))?;
    let metadata = file.metadata().map_err(|e| unusable(&e))?;
    let user = nix::unistd::geteuid().as_raw();
    let is_private = metadata.permissions().mode() & 0o077 == 0 && [0, user].contains(&metadata.uid());
    if !metadata.is_file() || !is_private {
        return Err(unusable(&"others may read or change it; make it yours, and run \"chmod 600\" on it"));
    }
    // The room is there from the start: growing would leave a copy behind.
    let mut text = Zeroizing::new(String::with_capacity(CREDENTIALS_MAX as usize));
    file.take(CREDENTIALS_MAX).read_to_string(&mut text).map_err(|e| unusable(&e))?;
    let value = |name: &str| {
        let mut lines = text.lines().filter_map(|line| line.trim().split_once('='));
        lines.find(|(known, _)| *known == name).map(|(_, value)| value)
    };
    match (value("AWS_ACCESS_KEY_ID"), value("AWS_SECRET_ACCESS_KEY")) {
        (Some(id), Some(secret)) => Ok((id.to_owned(), Zeroizing::new(secret.to_owned()))),
        _ => Err(unusable(
            &"it has no lines AWS_ACCESS_KEY_ID=… and AWS_SECRET_ACCESS_KEY=…, as \"sealblk kms principal \
              create --peer\" prints them",
        )),
    }
}
