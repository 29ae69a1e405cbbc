//! The files of a confined process, by Landlock: what no rule names can be neither opened
//! nor made nor removed.
//!
//! Looking at names and sizes is not restricted, nor is what descriptors lead to that are open already.
//! With it go TCP connections, sockets in the abstract name space, and signals to others, as far as the
//! kernel knows these rules.

use crate::base::{Error, Kind, Result};
use landlock::{
    ABI, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, Scope, make_bitflags,
};
use nix::unistd::AccessFlags;
use std::path::PathBuf;

/// The newest rules that this was tested with. A later one (9) is for `connect`, which the filter sees to.
const NEWEST: ABI = ABI::V7;

/// What may be done with a file, or below a folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read a file.
    Read,
    /// Read, write and truncate a file.
    Write,
    /// List a folder; make, write, rename, replace and remove files in it, and rename sockets.
    Own,
    /// List a folder and all below it, and read files there.
    ReadTree,
    /// List a folder and all below it; read, write, make, replace and remove files and folders there.
    Tree,
    /// Read, write and steer a device.
    Device,
    /// List a folder; rename and remove files in it, whose contents are out of reach.
    Names,
    /// List a folder.
    List,
    /// Remove names in a folder. Whether that can be done is not checked beforehand.
    Remove,
}

impl Access {
    fn rights(self) -> BitFlags<AccessFs> {
        match self {
            Access::Read => make_bitflags!(AccessFs::{ReadFile}),
            Access::Write => make_bitflags!(AccessFs::{ReadFile | WriteFile | Truncate}),
            Access::Device => make_bitflags!(AccessFs::{ReadFile | WriteFile | IoctlDev}),
            Access::Own => {
                make_bitflags!(AccessFs::{ReadDir | ReadFile | WriteFile | Truncate | MakeReg | MakeSock | RemoveFile})
            }
            Access::ReadTree => make_bitflags!(AccessFs::{ReadDir | ReadFile}),
            Access::Tree => {
                make_bitflags!(AccessFs::{ReadDir | ReadFile | WriteFile | Truncate | MakeReg | MakeDir | RemoveFile | RemoveDir})
            }
            Access::Names => make_bitflags!(AccessFs::{ReadDir | MakeReg | RemoveFile}),
            Access::List => make_bitflags!(AccessFs::{ReadDir}),
            Access::Remove => make_bitflags!(AccessFs::{RemoveFile}),
        }
    }

    /// What the permissions of files must grant, beside these rules.
    pub(super) fn permissions(self) -> AccessFlags {
        match self {
            Access::Read => AccessFlags::R_OK,
            Access::Write | Access::Device => AccessFlags::R_OK | AccessFlags::W_OK,
            Access::ReadTree | Access::List => AccessFlags::R_OK | AccessFlags::X_OK,
            Access::Own | Access::Tree | Access::Names => {
                AccessFlags::R_OK | AccessFlags::W_OK | AccessFlags::X_OK
            }
            Access::Remove => AccessFlags::empty(),
        }
    }
}

/// One rule: a file or folder, which must be there, and what may be done with it.
#[derive(Clone, Debug)]
pub struct Rule {
    /// Its path. What it leads to now is meant, whatever has the name later.
    pub path: PathBuf,
    /// What may be done.
    pub access: Access,
}

impl Rule {
    /// A rule for `path`.
    pub fn new(path: impl Into<PathBuf>, access: Access) -> Self {
        Rule { path: path.into(), access }
    }
}

/// Puts the rules in force, and returns what the kernel made of them.
/// With `network`, TCP connections can be made.
pub(super) fn restrict(rules: &[Rule], network: bool) -> Result<String> {
    let attempt = || "set the Landlock rules";
    let tcp = AccessNet::BindTcp | AccessNet::ConnectTcp;
    let tcp = if network { AccessNet::BindTcp.into() } else { tcp };
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_read(NEWEST) | AccessFs::from_write(NEWEST))
        .and_then(|set| set.handle_access(tcp))
        .and_then(|set| set.scope(Scope::AbstractUnixSocket | Scope::Signal))
        .and_then(Ruleset::create)
        .map_err(|e| failed(e).context(attempt()))?;
    for rule in rules {
        let attempt = || format!("set a Landlock rule for {}", rule.path.display());
        let file = PathFd::new(&rule.path).map_err(|e| failed(e).context(attempt()))?;
        let rule = PathBeneath::new(file, rule.access.rights());
        ruleset = ruleset.add_rule(rule).map_err(|e| failed(e).context(attempt()))?;
    }
    let status = ruleset.restrict_self().map_err(|e| failed(e).context(attempt()))?;
    Ok(match status.ruleset {
        RulesetStatus::FullyEnforced => "Landlock".into(),
        RulesetStatus::PartiallyEnforced => {
            log::info!("this kernel's Landlock lacks some of the rules: {:?}", status.landlock);
            "Landlock in part".into()
        }
        RulesetStatus::NotEnforced => {
            log::warn!(
                "this kernel has no Landlock, or it is switched off: this process can open every file of its \
                 user"
            );
            "no Landlock".into()
        }
    })
}

fn failed(e: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::of(Kind::Other, e)
}

/// The version of the kernel's Landlock; none where it has none, or has it switched off.
pub fn landlock_version() -> Option<i32> {
    const VERSION: libc::c_uint = 1;
    let none = std::ptr::null::<libc::c_void>();
    // SAFETY: with this flag the call takes no memory, and returns a number.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, none, 0usize, VERSION) };
    i32::try_from(version).ok().filter(|version| *version > 0)
}
