//! TLS for the server: its certificate and key, and how they are replaced while it runs.

use crate::base::sync::ReadWriteLocked;
use crate::base::{Context, Error, Kind, Result};
use signal_hook::consts::SIGHUP;
use signal_hook::iterator::Signals;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{ServerConfig, version};

/// Where certificate and key are, PEM both.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    /// The certificate, and those between it and what clients trust.
    pub certificate: PathBuf,
    /// Its private key, which must not be for everybody to read.
    pub key: PathBuf,
}

/// The server's side of TLS, as the files said when they were last read.
pub struct Tls {
    files: Files,
    config: RwLock<Arc<ServerConfig>>,
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// `Usage`, naming the file, if they cannot be read or do not fit together.
    pub fn load(files: Files) -> Result<Arc<Self>> {
        let config = RwLock::new(read(&files)?);
        Ok(Arc::new(Tls { files, config }))
    }

    /// What the next connection is accepted with.
    pub fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(self.config.read_locked().clone())
    }

    /// Reads the files again at each SIGHUP. If they are no good, those that were good stay in use.
    pub fn reload_on_hangup(self: Arc<Self>) -> Result<()> {
        let attempt = || "wait for SIGHUP";
        let mut signals = Signals::new([SIGHUP]).context(attempt)?;
        let wait = move || {
            for _ in &mut signals {
                match read(&self.files) {
                    Ok(config) => {
                        *self.config.write_locked() = config;
                        log::info!("the certificate in {} is in use", self.files.certificate.display());
                    }
                    Err(e) => log::error!("{e}; the earlier certificate stays in use"),
                }
            }
        };
        std::thread::Builder::new().name("tls-files".into()).spawn(wait).context(attempt)?;
        Ok(())
    }
}

fn read(files: &Files) -> Result<Arc<ServerConfig>> {
    let certificates = CertificateDer::pem_file_iter(&files.certificate)
        .and_then(Iterator::collect::<std::result::Result<Vec<_>, _>>)
        .map_err(|e| unusable(&files.certificate, &e))?;
    if certificates.is_empty() {
        return Err(unusable(&files.certificate, &"there is no certificate in it"));
    }
    let mode = std::fs::metadata(&files.key).map_err(|e| unusable(&files.key, &e))?.permissions().mode();
    if mode & 0o007 != 0 {
        return Err(unusable(&files.key, &format!("everybody may use it (mode {:03o})", mode & 0o777)));
    }
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|e| unusable(&files.key, &e))?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[&version::TLS13, &version::TLS12])
        .map_err(|e| Error::new(Kind::Other, e.to_string()))?
        .with_no_client_auth()
        .with_single_cert(certificates, key)
        .map_err(|e| unusable(&files.certificate, &e))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

fn unusable(path: &Path, why: &dyn std::fmt::Display) -> Error {
    Error::new(Kind::Usage, format!("use {} for TLS: {why}", path.display()))
}
