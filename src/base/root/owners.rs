//! Whose a store's folders are, looked at before anything in them is used, as sshd does with a user's
//! `~/.ssh` (StrictModes): what somebody else can put there, root would act on.
//!
//! Folders belong to root, to whoever runs the command, or to a user that is named in `store-users` in the
//! configuration folder, one a line: those of `attach --user`, whom the files of volumes are given. Nobody
//! else can write to them. Above the root the same holds, except that a folder like `/tmp`, where nobody can
//! rename what is another's, will do.
//!
//! The configuration folder, and each file in it that decides something, is root's or the caller's, and
//! nobody else's.

use crate::base::root::offered::without_links;
use crate::base::root::users::name_of;
use crate::base::root::{Root, files};
use crate::base::{Context, Error, Kind, Result};
use nix::unistd::{User, getegid, geteuid};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The file in the configuration folder that names users.
pub const STORE_USERS: &str = "store-users";
/// The longest such file in bytes.
const MAX_LEN: u64 = 64 << 10;
/// What to do about a folder of the store that is another user's.
const MEND_STORE: &str = "make it root's or yours (\"chown\"), or, if that is the user of \"attach --user\", \
                          write the name into store-users in the configuration folder";

/// The users whose a store's folders may be.
#[derive(Clone, Debug)]
pub struct Owners {
    users: Vec<u32>,
    /// What to do about a folder of another user.
    mend: &'static str,
}

/// Finds the file `name` in the configuration folder `config`, which decides something; none if it is not
/// there. A symbolic link is followed to a file that nobody else can write, or put another one in place of.
///
/// # Errors
/// `Usage` if somebody else has, or can write, the folder or the file, or if this user may not look into the
/// folder; `NotFound` for a link that leads nowhere.
pub fn find_deciding(config: &Path, name: &str) -> Result<Option<PathBuf>> {
    let ours = Owners::of_this_process();
    let path = config.join(name);
    let found = match path.symlink_metadata() {
        // Then whether the folder is somebody else's cannot be seen either.
        Err(e) if e.kind() == ErrorKind::PermissionDenied => return Err(unreadable(&path)),
        found => found,
    };
    ours.check_above(config)?;
    ours.check(config, false)?;
    match found {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        found => found.context(|| format!("look at {}", path.display()))?,
    };
    let (real, is_link) = without_links(&path)?;
    if is_link {
        ours.check_above(&real)?;
    }
    ours.check(&real, false)?;
    Ok(Some(real))
}

/// Looks at a file that would decide something.
///
/// # Errors
/// `Usage` if somebody else has it, or can write it.
pub fn check_deciding(path: &Path) -> Result<()> {
    Owners::of_this_process().check(path, false)
}

/// Reads a file that [`find_deciding`] has found, up to `max` bytes.
///
/// # Errors
/// `Usage` if this user may not read it; `Corrupt` for what is no file, or longer; those of the file system.
pub fn read_deciding(path: &Path, max: u64) -> Result<Vec<u8>> {
    match files::read(path, max) {
        Err(e) if e.kind() == ErrorKind::PermissionDenied => Err(unreadable(path)),
        read => Ok(read?),
    }
}

fn unreadable(path: &Path) -> Error {
    let user = name_of(geteuid().as_raw());
    let message = format!(
        "{user} may not read {}, which decides what holds here; let that user read the folder and this file, \
         or name a configuration folder of the user's own by SEALBLK_CONFIG_DIR",
        path.display()
    );
    Error::new(Kind::Usage, message)
}

impl Owners {
    /// Root and the user of this process.
    fn of_this_process() -> Self {
        let mend = "make it root's or yours (\"chown\"), and look at what it says";
        Owners { users: vec![0, geteuid().as_raw()], mend }
    }

    /// Root, the user of this process, and those that the configuration folder names.
    ///
    /// # Errors
    /// `Usage` for a user that there is not, or a file that somebody else can write.
    pub fn configured() -> Result<Self> {
        let ours = Self::of_this_process();
        let mut owners = Owners { mend: MEND_STORE, ..ours };
        // Who has no configuration folder names nobody in it.
        let Ok(config) = Root::config_dir() else { return Ok(owners) };
        let path = config.join(STORE_USERS);
        let attempt = || format!("read {}", path.display());
        match path.symlink_metadata() {
            // The user of an attach may be kept from root's configuration: then what it
            // names is not for that user.
            Err(e) if e.kind() == ErrorKind::PermissionDenied => return Ok(owners),
            _ => {}
        }
        let Some(path) = find_deciding(&config, STORE_USERS).context(attempt)? else { return Ok(owners) };
        let text = match files::read(&path, MAX_LEN) {
            Err(e) if e.kind() == ErrorKind::PermissionDenied => return Ok(owners),
            text => String::from_utf8_lossy(&text.context(attempt)?).into_owned(),
        };
        for name in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let user = User::from_name(name).context(attempt)?;
            let unknown = || Error::new(Kind::Usage, format!("there is no user {name}"));
            owners.users.push(user.ok_or_else(unknown).context(attempt)?.uid.as_raw());
        }
        Ok(owners)
    }

    /// Whether this is one of them.
    pub fn contain(&self, user: u32) -> bool {
        self.users.contains(&user)
    }

    /// Looks at the root and at what lies right in it, and at the folders that the root lies in.
    ///
    /// # Errors
    /// `Usage`, naming the first folder that somebody else has or can write, and what to do about it.
    pub fn check_root(&self, root: &Root) -> Result<()> {
        self.check_above(root.path())?;
        let inner =
            [root.volumes(), root.layers(), root.snapshots(), root.ledger(), root.kms(), root.event_sinks()];
        std::iter::once(root.path())
            .chain(inner.iter().map(|path| &**path))
            .try_for_each(|f| self.check(f, false))
    }

    /// Looks at the folders that `path` lies in.
    fn check_above(&self, path: &Path) -> Result<()> {
        path.ancestors().skip(1).try_for_each(|above| self.check(above, true))
    }

    /// Looks at one folder or file; one that is not there is nobody's. With `sticky`, a folder will do in
    /// which names are only their owners' to change.
    fn check(&self, path: &Path, sticky: bool) -> Result<()> {
        let found = match path.symlink_metadata() {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
            found => found.context(|| format!("look at {}", path.display()))?,
        };
        if found.is_symlink() {
            let message = format!(
                "{} is a symbolic link, and none is followed in a store; to have it elsewhere, mount that \
                 there (\"mount --bind\")",
                path.display()
            );
            return Err(Error::new(Kind::Corrupt, message));
        }
        if !self.contain(found.uid()) {
            let why = format!("belongs to {}", name_of(found.uid()));
            return Err(refused(path, &why, || self.mend.to_owned()));
        }
        let by_others = found.mode() & 0o002 != 0;
        // A group that is root's, or an ordinary user's own as Debian and Red Hat make
        // them, has nobody else in it.
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
        format!("{} {why}, who could have commands do whatever he likes; {}", path.display(), mend());
    Error::new(Kind::Usage, message)
}
