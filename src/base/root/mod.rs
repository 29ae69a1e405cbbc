//! Where a store lies on disk: the root folder and the names inside it.

pub mod files;
pub mod offered;
pub mod owners;
pub mod records;
mod users;

pub use files::{create_dir_durable, replace_file, sync_dir};

use crate::base::space::Space;
use crate::base::{Error, Kind, Result, spare};
use nix::fcntl::OFlag;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// The configuration folder that `--config-dir` names.
static CONFIG_DIR: OnceLock<PathBuf> = OnceLock::new();

/// The root folder of a sealblk store.
#[derive(Clone, Debug)]
pub struct Root(PathBuf);

impl Root {
    /// The root at `path`; nothing is created yet. Symbolic links in the path are resolved now:
    /// below, none is followed.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Root(resolved(&path.into()))
    }

    /// The default: `/var/lib/sealblk` for root, else `$XDG_DATA_HOME/sealblk` or
    /// `~/.local/share/sealblk`.
    pub fn default_path() -> Result<PathBuf> {
        xdg("/var/lib", "XDG_DATA_HOME", ".local/share", "give --root DIR")
    }

    /// Where secrets and settings that must not lie with the data go: `/etc/sealblk` for root, else
    /// `$XDG_CONFIG_HOME/sealblk` or `~/.config/sealblk`; `SEALBLK_CONFIG_DIR` overrides, and
    /// [`Root::use_config_dir`] all of them.
    pub fn config_dir() -> Result<PathBuf> {
        if let Some(dir) = CONFIG_DIR.get() {
            return Ok(resolved(dir));
        }
        match std::env::var_os("SEALBLK_CONFIG_DIR") {
            Some(dir) if !dir.is_empty() => Ok(dir.into()),
            _ => xdg("/etc", "XDG_CONFIG_HOME", ".config", "give --config-dir DIR"),
        }
        .map(|dir: PathBuf| resolved(&dir))
    }

    /// Has this whole process use the configuration folder at `path`.
    ///
    /// # Errors
    /// `Usage` for an empty path, and where it uses another one already.
    pub fn use_config_dir(path: &Path) -> Result<()> {
        let usage = |message: String| Err(Error::new(Kind::Usage, message));
        if path.as_os_str().is_empty() {
            return usage("--config-dir is empty".into());
        }
        let path = std::path::absolute(path)?;
        match CONFIG_DIR.get_or_init(|| path.clone()) {
            used if *used == path => Ok(()),
            used => usage(format!("the configuration folder is {} already", used.display())),
        }
    }

    /// The folder that [`Root::use_config_dir`] was given, for processes that this one starts.
    pub fn used_config_dir() -> Option<&'static Path> {
        CONFIG_DIR.get().map(PathBuf::as_path)
    }

    /// The pool in which the store's records lie; none if they are files of this folder.
    pub fn pool(&self) -> Option<&'static records::Pooled> {
        records::pool_of(&self.0)
    }

    /// Where the store lies, in words.
    pub fn shown(&self) -> String {
        self.pool().map_or_else(|| self.0.display().to_string(), |pooled| pooled.shown.clone())
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

    /// `ledger/`, which says what records may say.
    pub fn ledger(&self) -> PathBuf {
        self.0.join("ledger")
    }

    /// `kms/`, the store of the embedded KMS.
    pub fn kms(&self) -> PathBuf {
        self.0.join("kms")
    }

    /// `grants/`, where earlier versions noted the grants of attaches. Nothing there is read.
    pub fn grants(&self) -> PathBuf {
        self.0.join("grants")
    }

    /// `event-sinks/`, how far each sink was served.
    pub fn event_sinks(&self) -> PathBuf {
        self.0.join("event-sinks")
    }

    /// `events.jsonl`.
    pub fn events(&self) -> PathBuf {
        self.0.join("events.jsonl")
    }

    /// `key-watch.json`, what KMSs have said last of the keys of volumes.
    pub fn key_watch(&self) -> PathBuf {
        self.0.join("key-watch.json")
    }

    /// `spare`, space for records on a full disk.
    fn spare(&self) -> PathBuf {
        self.0.join("spare")
    }

    /// Has this process use [`spare`] for what it writes down; makes that where there is space. Where it
    /// cannot be had, records are written as long as there is space.
    pub(crate) fn keep_spare(&self) {
        let keep = || -> Result<()> {
            let Some(space) = Space::at(&self.0)? else { return Ok(()) };
            let is_there = files::exists(&self.spare());
            if !is_there && !spare::may_be_made(&space) {
                return Ok(());
            }
            let file = files::open_with(&self.spare(), OFlag::O_RDWR | OFlag::O_CREAT)?;
            spare::keep(file, &space).inspect_err(|_| {
                if !is_there {
                    let _ = files::remove(&self.spare());
                }
            })?;
            Ok(())
        };
        if let Err(e) = keep() {
            log::debug!("no space is kept for records in {}: {e}", self.0.display());
        }
    }

    /// `sealblk.toml`, where earlier versions had the settings. They are in the configuration folder now.
    pub fn old_settings(&self) -> PathBuf {
        self.0.join("sealblk.toml")
    }
}

fn xdg(system: &str, variable: &str, below_home: &str, otherwise: &str) -> Result<PathBuf> {
    if nix::unistd::geteuid().is_root() {
        return Ok(Path::new(system).join("sealblk"));
    }
    if let Some(dir) = std::env::var_os(variable).filter(|d| !d.is_empty()) {
        return Ok(Path::new(&dir).join("sealblk"));
    }
    let home = std::env::var_os("HOME")
        .filter(|h| !h.is_empty())
        .ok_or_else(|| Error::new(Kind::Usage, format!("neither {variable} nor HOME is set; {otherwise}")))?;
    Ok(Path::new(&home).join(below_home).join("sealblk"))
}

/// The path without symbolic links, as far as it leads to something; the rest is as it was.
fn resolved(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    for above in path.ancestors() {
        if let Ok(real) = above.canonicalize() {
            let below = path.strip_prefix(above).unwrap_or(Path::new(""));
            // An empty name would leave a slash at the end.
            return if below.as_os_str().is_empty() { real } else { real.join(below) };
        }
    }
    path
}

pub(crate) fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    }
}
