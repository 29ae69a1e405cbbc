//! Whose process it is: the user to drop to, and capabilities, of which none are left
//! where the files allow it.

use crate::base::{Context, Error, Kind, Result};
use crate::sandbox::files::{Access, Rule};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::unistd::{
    AccessFlags, Gid, Group, Uid, User, faccessat, initgroups, setegid, seteuid, setfsgid, setfsuid,
    setresgid, setresuid,
};
use std::ffi::CString;
use std::fmt;
use std::os::unix::fs::MetadataExt;

/// A user and a group to become.
#[derive(Clone, Debug)]
pub struct Identity {
    name: String,
    uid: Uid,
    gid: Gid,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.name, self.gid)
    }
}

impl Identity {
    /// The user and group that `text` names: `NAME` or `NAME:GROUP`.
    ///
    /// # Errors
    /// `Usage` if there is no such user or group, or if this process may not become it.
    pub fn parse(text: &str) -> Result<Self> {
        let (name, group) = match text.split_once(':') {
            Some((name, group)) => (name, Some(group)),
            None => (text, None),
        };
        let user = User::from_name(name).context(|| format!("look up the user {name}"))?;
        let user = user.ok_or_else(|| usage(format!("there is no user {name}")))?;
        let gid = match group {
            None => user.gid,
            Some(group) => group_called(group)?,
        };
        if !nix::unistd::geteuid().is_root() {
            return Err(usage(format!("only root can become {name}; start it as that user instead")));
        }
        Ok(Identity { name: name.to_owned(), uid: user.uid, gid })
    }

    /// The user and group with these ids.
    ///
    /// # Errors
    /// If it cannot be looked up who that is.
    pub(crate) fn of(uid: Uid, gid: Gid) -> Result<Self> {
        let user = User::from_uid(uid).context(|| format!("look up the user {uid}"))?;
        let name = user.map_or_else(|| uid.to_string(), |user| user.name);
        Ok(Identity { name, uid, gid })
    }

    /// The user's id and the group's.
    pub(crate) fn ids(&self) -> (Uid, Gid) {
        (self.uid, self.gid)
    }

    /// Becomes this user for good, unless he could not reach one of `files`: then this is still the one that
    /// it was, and can clear away what it has made.
    pub(super) fn become_it(&self, files: &[Rule]) -> Result<()> {
        let attempt = || format!("become {self}");
        let name = CString::new(self.name.as_str()).map_err(|e| Error::of(Kind::Usage, e))?;
        initgroups(&name, self.gid).context(attempt)?;
        let (uid, gid) = (nix::unistd::geteuid(), nix::unistd::getegid());
        setegid(self.gid).context(attempt)?;
        seteuid(self.uid).context(attempt)?;
        let problem = first_unreachable(files).map(|(rule, why)| unreachable_error(rule, why));
        seteuid(uid).context(attempt)?;
        setegid(gid).context(attempt)?;
        if let Some(problem) = problem {
            return Err(problem);
        }
        setresgid(self.gid, self.gid, self.gid).context(attempt)?;
        setresuid(self.uid, self.uid, self.uid).context(attempt)?;
        if !self.uid.is_root() && setresuid(Uid::from_raw(0), Uid::from_raw(0), Uid::from_raw(0)).is_ok() {
            return Err(Error::new(Kind::Other, "it could be undone").context(attempt()));
        }
        Ok(())
    }
}

/// The group of this name.
///
/// # Errors
/// `Usage` if there is none.
pub fn group_called(name: &str) -> Result<Gid> {
    let found = Group::from_name(name).context(|| format!("look up the group {name}"))?;
    Ok(found.ok_or_else(|| usage(format!("there is no group {name}")))?.gid)
}

fn usage(message: String) -> Error {
    Error::new(Kind::Usage, message)
}

/// Gives up all capabilities. Only root may keep one, the one to reach files of others, and only where a
/// file of `rules` needs it. What root makes from here on belongs to the owner of the folder that `rules` say
/// is the process's own: without capabilities it could not be given away.
///
/// # Errors
/// `Usage`, naming the first file that the user of this process cannot reach.
pub(super) fn drop_capabilities(rules: &[Rule]) -> Result<()> {
    // Linux gives each thread two words of capabilities (capabilities(7), version 3 of the interface).
    const REACH_ALL_FILES: u32 = 1 << 1;
    let is_root = nix::unistd::geteuid().is_root();
    let may_keep = if is_root { REACH_ALL_FILES & permitted()? } else { 0 };
    if is_root {
        make_files_for_owner(rules)?;
    }
    set(0, may_keep)?;
    let unreachable = first_unreachable(rules);
    // A name that cannot be removed at the end is no reason to refuse, and one to keep what is had already.
    let unreachable = unreachable.or_else(|| (may_keep != 0).then(|| first_unremovable(rules)).flatten());
    match unreachable {
        None => set(0, 0),
        Some((rule, why)) if may_keep != 0 => {
            log::info!(
                "{}: {why} without the capability to reach others' files, which is kept",
                rule.path.display()
            );
            set(may_keep, may_keep)
        }
        Some((rule, why)) => Err(unreachable_error(rule, why)),
    }
}

/// Has the kernel take this process, whose user is root, for the owner of its own folder where it makes and
/// reaches files. Root it is otherwise: nobody else can send it signals.
fn make_files_for_owner(rules: &[Rule]) -> Result<()> {
    let is_own =
        |rule: &&Rule| matches!(rule.access, Access::Own | Access::Tree | Access::ReadTree | Access::Names);
    let Some(own) = rules.iter().find(is_own) else { return Ok(()) };
    let attempt = || format!("look whose {} is", own.path.display());
    let found = own.path.symlink_metadata().context(attempt)?;
    if found.uid() != 0 {
        // These calls return what was before, and never an error.
        setfsgid(Gid::from_raw(found.gid()));
        setfsuid(Uid::from_raw(found.uid()));
        if setfsuid(Uid::from_raw(found.uid())).as_raw() != found.uid() {
            return Err(
                Error::new(Kind::Other, "the kernel refuses to make files for its owner").context(attempt())
            );
        }
    }
    Ok(())
}

/// The first file that the permissions keep from whoever this process is at the moment.
fn first_unreachable(rules: &[Rule]) -> Option<(&Rule, Errno)> {
    let mut needed = rules.iter().filter(|rule| !rule.access.permissions().is_empty());
    needed.find_map(|rule| refused(rule, rule.access.permissions()))
}

/// The first folder in which whoever this process is at the moment can remove nothing.
fn first_unremovable(rules: &[Rule]) -> Option<(&Rule, Errno)> {
    let mut removable = rules.iter().filter(|rule| rule.access == Access::Remove);
    removable.find_map(|rule| refused(rule, AccessFlags::W_OK | AccessFlags::X_OK))
}

fn refused(rule: &Rule, access: AccessFlags) -> Option<(&Rule, Errno)> {
    let why = faccessat(AT_FDCWD, &rule.path, access, AtFlags::AT_EACCESS).err()?;
    Some((rule, why))
}

fn unreachable_error(rule: &Rule, why: Errno) -> Error {
    let user = nix::unistd::geteuid();
    let name = User::from_uid(user).ok().flatten().map_or_else(|| user.to_string(), |user| user.name);
    let message = format!(
        "the user {name} cannot use {} ({}): give it to him (\"chown -R {name}\" the store's folder), with \
         all folders above it to be entered",
        rule.path.display(),
        why.desc()
    );
    Error::new(Kind::Usage, message)
}

#[repr(C)]
struct Header {
    version: u32,
    pid: libc::c_int,
}

/// Effective, permitted, inheritable.
type Words = [u32; 3];

const VERSION_3: u32 = 0x2008_0522;

fn permitted() -> Result<u32> {
    let header = Header { version: VERSION_3, pid: 0 };
    let mut words: [Words; 2] = [[0; 3]; 2];
    // SAFETY: version 3 of the call reads the header and fills two structures of three
    // words, which are there.
    let answer = unsafe { libc::syscall(libc::SYS_capget, &raw const header, words.as_mut_ptr()) };
    if answer != 0 {
        return Err(Errno::last()).context(|| "ask for the capabilities");
    }
    Ok(words[0][1])
}

/// Makes these the thread's capabilities; the higher ones go in any case.
fn set(effective: u32, permitted: u32) -> Result<()> {
    let header = Header { version: VERSION_3, pid: 0 };
    let words: [Words; 2] = [[effective, permitted, 0], [0; 3]];
    // SAFETY: version 3 of the call reads the header and two structures of three words, which are there.
    let answer = unsafe { libc::syscall(libc::SYS_capset, &raw const header, words.as_ptr()) };
    if answer != 0 {
        return Err(Errno::last()).context(|| "give up capabilities");
    }
    Ok(())
}
