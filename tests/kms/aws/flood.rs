//! A KMS that others keep busy with connections on which they say nothing: it goes on
//! answering those who ask.

use crate::common::attach::Place;
use crate::common::kms_server::{KmsServer, set};
use crate::common::patience::limit;
use crate::common::store::Store;
use std::collections::VecDeque;
use std::fs;
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::time::Instant;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, ClientConnection, RootCertStore};

/// Connections that are kept open: far more than the server has places for.
const SILENT: usize = 600;
/// Lines of one kind that the log has in a minute, before it counts them.
const LOGGED: usize = 20;

/// Whoever believes this certificate.
fn tls_client(certificate: &Path) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(certificate).expect("a certificate")).expect("a good one");
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
    let builder = builder.with_safe_default_protocol_versions().expect("TLS 1.3");
    Arc::new(builder.with_root_certificates(roots).with_no_client_auth())
}

/// A connection on which everything was said that TLS wants, and nothing else.
fn silent(address: &str, client: &Arc<ClientConfig>) -> std::io::Result<(TcpStream, ClientConnection)> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(limit()))?;
    let name = ServerName::try_from("127.0.0.1").expect("an address");
    let mut tls = ClientConnection::new(client.clone(), name).expect("a client");
    while tls.is_handshaking() {
        tls.complete_io(&mut stream)?;
    }
    Ok((stream, tls))
}

#[test]
fn silent_connections_keep_nobody_from_an_attach() {
    let files = tempfile::tempdir().expect("make a temporary folder");
    let (kms, log) = KmsServer::start_tls_with_log(files.path());
    let certificate = files.path().join("kms.pem");
    let store = Store::new();
    let mut variables = kms.principal("root").environment(&kms.url);
    set(&mut variables, "AWS_CA_BUNDLE", &certificate.display().to_string());
    store.set_environment(variables);
    let place = Place::of(store, &["--key", &format!("aws:{}", kms.create_key())]);

    let address = kms.url.trim_start_matches("https://").to_owned();
    let (client, over) = (tls_client(&certificate), Arc::new(AtomicBool::new(false)));
    let (tell, full) = channel();
    // They come for as long as the attach takes: there are always more of them than there is room for.
    let flood = std::thread::spawn({
        let over = over.clone();
        move || {
            let mut open = VecDeque::new();
            let mut made = 0;
            while !over.load(Ordering::Relaxed) {
                // The server may have dropped it again before the last word of the handshake.
                open.extend(silent(&address, &client));
                made += 1;
                if made == SILENT {
                    tell.send(()).expect("somebody waits");
                }
                if open.len() > SILENT {
                    open.pop_front();
                }
            }
            made
        }
    });
    full.recv_timeout(limit()).expect("the server accepts them all");
    place.attach(&[]).end();
    over.store(true, Ordering::Relaxed);
    let made = flood.join().expect("the flood ends");
    // One that came when its peer had its share has cost an older one its place; the log
    // has the first of them.
    let made_way = || fs::read_to_string(&log).expect("read the log").matches("makes way").count();
    let until = Instant::now() + limit();
    while made_way() < LOGGED {
        assert!(Instant::now() < until, "{} of {made} made way", made_way());
        std::thread::yield_now();
    }
}
