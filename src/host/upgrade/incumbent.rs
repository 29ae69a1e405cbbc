//! The process that serves the volume until now, as the kernel knows it, whatever it says of itself: who it
//! is, whether it is confined, whether it may write, and to which service it belongs.
#![forbid(unsafe_code)]

use super::Offer;
use crate::base::root::files;
use crate::base::{Context, Error, Kind, Result};
use crate::catalog::{Catalog, Metadata, VolumeId};
use crate::host::control::peer;
use crate::sandbox::{Identity, Mode};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::{Gid, Uid};
use std::fs::File;
use std::os::unix::net::UnixStream;

/// The process that serves the volume, as the kernel knows it.
pub(super) struct Incumbent {
    pid: u32,
    uid: Uid,
    gid: Gid,
    is_filtered: bool,
}

impl Incumbent {
    /// The one at the other end of `client`, which has the volume.
    ///
    /// # Errors
    /// `Busy` if that cannot be seen from here.
    pub(super) fn at(client: &UnixStream, catalog: &Catalog, volume: VolumeId) -> Result<Self> {
        let pid = peer::holder_at(client, &catalog.folder(volume))?;
        let attempt = || format!("look at process {pid}");
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).context(attempt)?;
        let field = |name: &str, n: usize| -> Result<u32> {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            let value = line.and_then(|line| line.split_whitespace().nth(n)?.parse().ok());
            value.ok_or_else(|| Error::new(Kind::Other, format!("{name} cannot be read")).context(attempt()))
        };
        // The effective ids.
        let (uid, gid) = (Uid::from_raw(field("Uid", 1)?), Gid::from_raw(field("Gid", 1)?));
        let is_filtered = field("Seccomp", 0)? != 0;
        // The status was of the process that has the volume, if that still is the one.
        peer::holder_at(client, &catalog.folder(volume))?;
        Ok(Incumbent { pid, uid, gid, is_filtered })
    }

    /// Whom this process has to become.
    pub(super) fn user(&self) -> Result<Option<Identity>> {
        match self.uid == nix::unistd::geteuid() {
            true => Ok(None),
            false => Identity::of(self.uid, self.gid).map(Some),
        }
    }

    /// A process that is confined leaves the volume to one that is.
    pub(super) fn sandbox(&self, offer: &Offer) -> Result<Mode> {
        if self.is_filtered {
            return Ok(Mode::On);
        }
        offer.sandbox.parse()
    }

    /// A process that has the layer for reading alone cannot say that it writes.
    pub(super) fn check_may_write(
        &self,
        offer: &Offer,
        top: &File,
        catalog: &Catalog,
        metadata: &Metadata,
    ) -> Result<()> {
        let place = catalog.place(metadata.top())?;
        let path = place.path;
        let (there, passed) = (path.symlink_metadata()?, top.metadata()?);
        let flags = OFlag::from_bits_retain(fcntl(top, FcntlArg::F_GETFL)?);
        let writes = flags & OFlag::O_ACCMODE == OFlag::O_RDWR;
        // Behind an NBD server, no open file tells who may write: a connection is one for both.
        match files::is_same(&there, &passed) && (offer.read_only || writes || place.behind.is_some()) {
            true => Ok(()),
            false => {
                let message = format!("process {} does not have the top layer open as it says", self.pid);
                Err(Error::new(Kind::Busy, message))
            }
        }
    }

    /// A service stays in its control group: otherwise its manager would take it for ended.
    pub(super) fn join_group(&self) -> Result<()> {
        let group = |pid: &str| -> Result<String> {
            let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))
                .context(|| "look at a control group")?;
            let line = text.lines().find_map(|line| line.strip_prefix("0::"));
            line.map(String::from).ok_or_else(|| Error::new(Kind::Unsupported, "there is no cgroup v2"))
        };
        let (theirs, ours) = (group(&self.pid.to_string())?, group("self")?);
        if theirs == ours {
            return Ok(());
        }
        let procs = format!("/sys/fs/cgroup{theirs}/cgroup.procs");
        std::fs::write(&procs, std::process::id().to_string()).map_err(|e| {
            let message = format!(
                "the volume is a service's, and this process cannot join that ({procs}: {e}): have the \
                 service manager do it (\"systemctl reload\")"
            );
            Error::new(Kind::Unsupported, message)
        })
    }
}
