//! A bucket, or container, of an object store as a place, by the crate `object_store`: requests, signatures,
//! retries and lists are the crate's.

use super::connection::{Connect, check_endpoint, runtime, words};
use super::url::Service;
use super::{Access, Listed, ObjectName, Objects, Put};
use crate::base::sync::Locked;
use crate::base::{Error, Kind, Result};
use crate::kms::aws;
use futures_util::StreamExt;
use object_store::path::Path;
use object_store::{GetOptions, GetRange, ObjectStore, ObjectStoreExt, PutMode, PutOptions};
use std::sync::Mutex;
use tokio::runtime::Runtime;

/// How many threads there are.
pub(super) const WIDTH: usize = 8;
/// A bucket, and how it is reached.
pub(crate) struct Bucket {
    name: String,
    prefix: Path,
    host: (String, u16),
    /// One for each thread.
    stores: Mutex<Vec<Box<dyn ObjectStore>>>,
}

impl Bucket {
    /// Asks the environment, and where it says so other services, for what is needed to reach the bucket.
    ///
    /// # Errors
    /// `Usage` where there are no credentials, or where something else is not known that is needed;
    /// `Unsupported` for a store whose feature this program was built without.
    pub(super) fn prepare(service: Service, bucket: &str, prefix: &str, access: &Access) -> Result<Self> {
        access.endpoint.as_deref().map_or(Ok(()), check_endpoint)?;
        let found = match service {
            Service::S3 => super::s3::prepare(bucket, access),
            #[cfg(feature = "azure")]
            Service::Azure => super::azure::prepare(bucket, access),
            #[cfg(feature = "gcs")]
            Service::Gcs => super::gcs::prepare(bucket, access),
            #[cfg(not(all(feature = "azure", feature = "gcs")))]
            other => Err(Error::new(
                Kind::Unsupported,
                format!(
                    "{}:// takes a feature of its own, without which this sealblk was \
                         built",
                    other.scheme()
                ),
            )),
        }?;
        // Now, while certificates and credentials can be read.
        let stores = (0..WIDTH).map(|_| {
            let connect = Connect::new(aws::connector_for_ciphertext()?);
            (found.build)(connect).map_err(|e| cannot_open(service, &e))
        });
        Ok(Bucket {
            name: bucket.to_owned(),
            prefix: Path::parse(prefix).map_err(|e| Error::of(Kind::Usage, e))?,
            host: found.host,
            stores: Mutex::new(stores.collect::<Result<_>>()?),
        })
    }

    /// One thread's way to the bucket.
    pub(super) fn open(&self) -> Result<OpenBucket> {
        let store = self.stores.locked().pop();
        let store = store.ok_or_else(|| Error::new(Kind::Other, "there are too many threads"))?;
        Ok(OpenBucket { runtime: runtime()?, store, prefix: self.prefix.clone(), bucket: self.name.clone() })
    }

    /// The host that requests go to, and its port: for whoever looks it up before the process is confined.
    pub(crate) fn host(&self) -> (String, u16) {
        self.host.clone()
    }
}

/// What is wrong with what the environment says about a store.
fn cannot_open(service: Service, e: &object_store::Error) -> Error {
    Error::new(Kind::Usage, format!("{}:// cannot be reached so: {}", service.scheme(), printable(&words(e))))
}

/// One thread's way to a bucket.
pub(super) struct OpenBucket {
    runtime: Runtime,
    store: Box<dyn ObjectStore>,
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
