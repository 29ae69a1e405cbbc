//! What a volume or snapshot holds, worked out from the files as docs/format.md describes them: sector by
//! sector, from the top layer down, with the data keys that the KMS gives out.

use hkdf::Hkdf;
use sealblk::base::root::Root;
use sealblk::catalog::layout::Layout;
use sealblk::catalog::{Catalog, Metadata, Snapshot};
use sealblk::crypt::xts::{Engine, SectorCipher, new_cipher};
use sealblk::crypt::{Dek, SectorSize};
use sealblk::kms::embedded::Embedded;
use sealblk::kms::embedded::clock::SystemClock;
use sealblk::kms::{EncryptionContext, KeyProvider};
use sha2::Sha256;
use std::cell::RefCell;
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

const SECTOR: usize = 512;

/// A store's files, and the KMS that opens them.
pub struct Reader {
    catalog: Catalog,
    kms: Embedded,
    /// Data keys that were unwrapped, by their wrapped copy: each unwrapping is one more record in the audit
    /// log, for which there may be no space later.
    known: RefCell<HashMap<Vec<u8>, Vec<u8>>>,
}

impl Reader {
    /// Of the store at `root`, whose KMS has its root key in `config`.
    pub fn new(root: &Path, config: PathBuf) -> Self {
        let root = Root::new(root);
        Reader {
            kms: Embedded::at(
                root.kms(),
                config,
                Box::new(SystemClock),
                sealblk::base::hardened::harden().unwrap(),
            ),
            catalog: Catalog::new(&root),
            known: RefCell::default(),
        }
    }

    /// The store's volumes and snapshots.
    pub fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// What is known of a volume.
    pub fn volume(&self, reference: &str) -> Metadata {
        let id = self.catalog.resolve(reference).expect("find the volume");
        self.catalog.load(id).expect("read its metadata")
    }

    /// What is known of a snapshot.
    pub fn snapshot(&self, reference: &str) -> Snapshot {
        let id = self.catalog.resolve_snapshot(reference).expect("find the snapshot");
        self.catalog.load_snapshot(id).expect("read its record")
    }

    /// All bytes of a volume.
    pub fn volume_content(&self, volume: &Metadata) -> Vec<u8> {
        self.content(volume.layout(), &volume.encryption_context())
    }

    /// All bytes of a snapshot.
    pub fn snapshot_content(&self, snapshot: &Snapshot) -> Vec<u8> {
        self.content(snapshot.layout(), &snapshot.encryption_context())
    }

    /// A layout's data keys.
    pub fn deks(&self, layout: &Layout, context: &EncryptionContext) -> Vec<Vec<u8>> {
        let open = |key: &sealblk::catalog::layout::KeyRecord| {
            let wrapped = &key.first().wrapped;
            let unwrap = || self.kms.decrypt(wrapped, context).expect("unwrap a data key").to_vec();
            self.known.borrow_mut().entry(wrapped.blob.clone()).or_insert_with(unwrap).clone()
        };
        layout.keys().iter().map(open).collect()
    }

    fn content(&self, layout: &Layout, context: &EncryptionContext) -> Vec<u8> {
        let unit = layout.geometry().sector_size();
        let cipher = |dek: &Vec<u8>| {
            new_cipher(Engine::Portable, &Dek::from_bytes(dek).expect("a key"), unit).expect("an engine")
        };
        let ciphers: Vec<Box<dyn SectorCipher>> = self.deks(layout, context).iter().map(cipher).collect();
        let mut content = vec![0; layout.geometry().size() as usize];
        // From the lowest up: what is in a layer covers what is below it.
        for layer in layout.layers().iter().rev() {
            let place = self.catalog.place(layer).expect("find a layer");
            let mut bytes = fs::read(place.path).expect("read a layer");
            if let Some(len) = place.on_device {
                // Behind the header.
                bytes = bytes[1 << 20..(1 << 20) + len as usize].to_vec();
            }
            assert_eq!(bytes.len() as u64, layer.size, "the layer is as long as the record says");
            let mut plain = bytes.clone();
            match layer.key {
                Some(key) => ciphers[key].decrypt_in_place(&mut plain, 0),
                None if layer.masked => mask(layer.id.as_bytes(), unit).decrypt_in_place(&mut plain, 0),
                None => {}
            }
            let sectors = bytes.chunks(SECTOR).zip(plain.chunks(SECTOR)).zip(content.chunks_mut(SECTOR));
            for ((stored, plain), content) in sectors {
                if stored.iter().any(|b| *b != 0) {
                    content.copy_from_slice(plain);
                }
            }
        }
        content
    }
}

/// What masks a layer without a key that lies above another.
fn mask(id: &[u8; 16], unit: SectorSize) -> Box<dyn SectorCipher> {
    let mut key = [0; 64];
    Hkdf::<Sha256>::new(None, id).expand(b"sealblk layer mask v1", &mut key).expect("64 bytes");
    new_cipher(Engine::Portable, &Dek::from_bytes(&key).expect("a key"), unit).expect("an engine")
}
