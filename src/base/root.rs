//! Where a store lies on disk: the root folder and the names inside it.

use crate::base::{Context, Error, Kind, Result};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// The root folder of a sealblk store.
#[derive(Clone, Debug)]
pub struct Root(PathBuf);

impl Root {
    /// The root at `path`; nothing is created yet.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Root(path.into())
    }

    /// The default: `/var/lib/sealblk` for root, else `$XDG_DATA_HOME/sealblk` or
    /// `~/.local/share/sealblk`.
    pub fn default_path() -> Result<PathBuf> {
        xdg("/var/lib", "XDG_DATA_HOME", ".local/share")
    }

    /// Where secrets that must not lie with the data go: `/etc/sealblk` for root, else
    /// `$XDG_CONFIG_HOME/sealblk` or `~/.config/sealblk`; `SEALBLK_CONFIG_DIR` overrides.
    pub fn config_dir() -> Result<PathBuf> {
        match std::env::var_os("SEALBLK_CONFIG_DIR") {
            Some(dir) if !dir.is_empty() => Ok(dir.into()),
            _ => xdg("/etc", "XDG_CONFIG_HOME", ".config"),
        }
    }

    /// The root folder itself.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// `volumes/`, one folder a volume.
    pub fn volumes(&self) -> PathBuf {
        self.0.join("volumes")
    }

    /// `snapshots/`, one record a snapshot.
    pub fn snapshots(&self) -> PathBuf {
        self.0.join("snapshots")
    }

    /// `layers/`, one ciphertext file a layer.
    pub fn layers(&self) -> PathBuf {
        self.0.join("layers")
    }

    /// `kms/`, the store of the embedded KMS.
    pub fn kms(&self) -> PathBuf {
        self.0.join("kms")
    }

    /// `grants/`, a note for each grant of an attach.
    pub fn grants(&self) -> PathBuf {
        self.0.join("grants")
    }

    /// `events.jsonl`.
    pub fn events(&self) -> PathBuf {
        self.0.join("events.jsonl")
    }

    /// `sealblk.toml`, the settings.
    pub fn settings(&self) -> PathBuf {
        self.0.join("sealblk.toml")
    }
}

fn xdg(system: &str, variable: &str, below_home: &str) -> Result<PathBuf> {
    if nix::unistd::geteuid().is_root() {
        return Ok(Path::new(system).join("sealblk"));
    }
    if let Some(dir) = std::env::var_os(variable).filter(|d| !d.is_empty()) {
        return Ok(Path::new(&dir).join("sealblk"));
    }
    let home = std::env::var_os("HOME").filter(|h| !h.is_empty()).ok_or_else(|| {
        Error::new(Kind::Usage, format!("neither {variable} nor HOME is set; give --root DIR"))
    })?;
    Ok(Path::new(&home).join(below_home).join("sealblk"))
}

/// Makes `dir` and its parents, mode 0700, and makes the new entries durable.
pub fn create_dir_durable(dir: &Path) -> Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    let parent = parent_of(dir);
    if !parent.is_dir() {
        create_dir_durable(parent)?;
    }
    match DirBuilder::new().mode(0o700).create(dir) {
        Ok(()) => sync_dir(parent),
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists && dir.is_dir() => Ok(()),
        Err(e) => Err(Error::from(e).context(format!("create folder {}", dir.display()))),
    }
}

/// fsyncs a folder, so that names made, renamed or removed in it survive a power cut.
pub fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|d| d.sync_all()).context(|| format!("sync folder {}", dir.display()))
}

/// Replaces `path` with `bytes`, mode 0600, atomically and durably: temporary file, fsync, rename,
/// fsync of the folder. After a power cut the file holds the old bytes or the new, never a mixture.
pub fn replace_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let tmp = {
        let mut name = path.file_name().unwrap_or_default().to_os_string();
        name.push(format!(".{}.tmp", uuid::Uuid::new_v4().simple()));
        path.with_file_name(name)
    };
    let write = || -> std::io::Result<()> {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&tmp)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&tmp, path)
    };
    if let Err(e) = write() {
        // Best effort: the error that matters is the first one.
        let _ = std::fs::remove_file(&tmp);
        return Err(Error::from(e).context(format!("write {}", path.display())));
    }
    sync_dir(parent_of(path))
}

fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    }
}
