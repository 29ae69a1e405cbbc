//! Whose a store's folders are, looked at before anything in them is used, as sshd does with a user's `~/.ssh`
//! (StrictModes): what somebody else can put there, root would act on.
//!
//! Folders belong to root, to whoever runs the command, or to a user that is named in `store-users` in the configuration
//! folder, one a line: those of `attach --user`, whom the files of volumes are given. Nobody else can write to them. Above
//! the root the same holds, except that a folder like `/tmp`, where nobody can rename what is another's, will do.

use crate::base::root::{Root, files};
use crate::base::{Context, Error, Kind, Result};
use nix::unistd::{Uid, User, getegid, geteuid};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// The file in the configuration folder that names users.
pub const STORE_USERS: &str = "store-users";
/// The longest such file in bytes.
const MAX_LEN: u64 = 64 << 10;

/// The users whose a store's folders may be.
#[derive(Clone, Debug)]
pub struct Owners(Vec<u32>);

impl Owners {
    /// Root, the user of this process, and those that the configuration folder names.
    ///
    /// # Errors
    /// `Usage` for a user that there is not, or a file that somebody else can write.
    pub fn configured() -> Result<Self> {
        let mut owners = vec![0, geteuid().as_raw()];
        // Who has no configuration folder names nobody in it.
        let Ok(config) = Root::config_dir() else { return Ok(Owners(owners)) };
        let path = config.join(STORE_USERS);
        let attempt = || format!("read {}", path.display());
        let text = match files::read(&path, MAX_LEN) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Owners(owners)),
            // The user of an attach may be kept from root's configuration: then what it names is not for that user.
            Err(e) if e.kind() == ErrorKind::PermissionDenied => return Ok(Owners(owners)),
            text => String::from_utf8_lossy(&text.context(attempt)?).into_owned(),
        };
        Owners(owners.clone()).check(&path, false).context(attempt)?;
        for name in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let user = User::from_name(name).context(attempt)?;
            let unknown = || Error::new(Kind::Usage, format!("there is no user {name}"));
            owners.push(user.ok_or_else(unknown).context(attempt)?.uid.as_raw());
        }
        Ok(Owners(owners))
    }

    /// Whether this is one of them.
    pub fn contain(&self, user: u32) -> bool {
        self.0.contains(&user)
    }

    /// Looks at the root and at what lies right in it, and at the folders that the root lies in.
    ///
    /// # Errors
    /// `Usage`, naming the first folder that somebody else has or can write, and what to do about it.
    pub fn check_root(&self, root: &Root) -> Result<()> {
        for above in root.path().ancestors().skip(1) {
            self.check(above, true)?;
        }
        let inner = [root.volumes(), root.layers(), root.snapshots(), root.kms(), root.event_sinks()];
        std::iter::once(root.path())
            .chain(inner.iter().map(|path| &**path))
            .try_for_each(|f| self.check(f, false))
    }

    /// Looks at one folder or file; one that is not there is nobody's. With `sticky`, a folder will do in which names are
    /// only their owners' to change.
    fn check(&self, path: &Path, sticky: bool) -> Result<()> {
        let found = match path.symlink_metadata() {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
            found => found.context(|| format!("look at {}", path.display()))?,
        };
        if found.is_symlink() {
            let message = format!(
                "{} is a symbolic link, and none is followed in a store; to have it elsewhere, mount that there (\"mount --bind\")",
                path.display()
            );
            return Err(Error::new(Kind::Corrupt, message));
        }
        if !self.0.contains(&found.uid()) {
            return Err(refused(path, &format!("belongs to {}", name_of(found.uid())), || {
                format!(
                    "make it root's or yours (\"chown\"), or, if that is the user of \"attach --user\", write the name into \
                     {STORE_USERS} in the configuration folder"
                )
            }));
        }
        let by_others = found.mode() & 0o002 != 0;
        // A group that is root's, or an ordinary user's own as Debian and Red Hat make them, has nobody else in it.
        let is_own_group = found.gid() == 0 || (!geteuid().is_root() && found.gid() == getegid().as_raw());
        let by_group = found.mode() & 0o020 != 0 && !is_own_group;
        if (by_others || by_group) && !(sticky && found.mode() & 0o1000 != 0) {
            let who = if by_others { "every user" } else { "its group" };
            return Err(refused(path, &format!("can be written by {who}"), || {
                format!("\"chmod go-w {}\" ends that", path.display())
            }));
        }
        Ok(())
    }

    /// Looks at the folder of a volume, or of whatever else lies in one of the root's folders.
    ///
    /// # Errors
    /// As for [`Owners::check_root`].
    pub fn check_folder(&self, path: &Path) -> Result<()> {
        self.check(path, false)
    }
}

fn refused(path: &Path, why: &str, mend: impl FnOnce() -> String) -> Error {
    let message =
        format!("{} {why}, who could have the store do whatever he likes; {}", path.display(), mend());
    Error::new(Kind::Usage, message)
}

/// The user's name; where there is none, the number in words.
pub(super) fn name_of(user: u32) -> String {
    let known = User::from_uid(Uid::from_raw(user)).ok().flatten();
    known.map_or_else(|| format!("the user {user}"), |user| user.name)
}
