//! What a process does that is going to load a stranger's library: which files that needs, and how it becomes
//! deaf and dumb before. See also [`confine_module`](super::confine_module).

use super::{Access, Rule};
use crate::base::{Context, Result};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where the loader finds libraries, and what it and OpenSSL read.
const OF_THE_SYSTEM: [&str; 9] = [
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/usr/local/lib",
    "/etc/ld.so.cache",
    "/etc/ssl/openssl.cnf",
    "/etc/localtime",
    "/dev/urandom",
];
/// What names of hosts are looked up in.
pub(crate) const OF_THE_NETWORK: [&str; 6] = [
    "/etc/resolv.conf",
    "/etc/hosts",
    "/etc/nsswitch.conf",
    "/etc/gai.conf",
    "/etc/host.conf",
    "/etc/services",
];

/// What a process that loads a stranger's code is not given of this one's variables: credentials, and where
/// others lie. Beginnings of names.
const KEPT_BACK: [&str; 9] = [
    "AWS_",
    "AZURE_",
    "GOOGLE_",
    // Of a machine's identity at Azure.
    "IDENTITY_",
    "CREDENTIALS_DIRECTORY",
    "NOTIFY_SOCKET",
    "LISTEN_",
    "SEALBLK_PASSPHRASE_FD",
    "SEALBLK_PIN_FD",
];

/// Gives a process that is to load a stranger's code no variables that are not its affair.
pub(crate) fn keep_back(program: &mut Command) {
    for (name, _) in std::env::vars_os() {
        if is_kept_back(&name.to_string_lossy()) {
            program.env_remove(&name);
        }
    }
}

fn is_kept_back(name: &str) -> bool {
    KEPT_BACK.iter().any(|beginning| name.starts_with(beginning))
}

/// Closes what this process has inherited, beside the standard streams. It has opened nothing yet, or has
/// closed it.
pub(crate) fn keep_standard_streams() -> Result<()> {
    const FIRST: libc::c_uint = libc::STDERR_FILENO as libc::c_uint + 1;
    // SAFETY: nothing in this process owns a descriptor of these numbers, by what callers see to: it has just
    // begun, and its socket is standard input.
    match unsafe { libc::syscall(libc::SYS_close_range, FIRST, libc::c_uint::MAX, 0) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()).context(|| "close what was inherited"),
    }
}

/// What a stranger's code prints may be anything.
pub(crate) fn be_silent() -> Result<()> {
    let attempt = || "open /dev/null";
    let nothing = File::options().write(true).open("/dev/null").context(attempt)?;
    for stream in [libc::STDOUT_FILENO, libc::STDERR_FILENO] {
        // SAFETY: both are open; the standard streams have no owner that closes them.
        if unsafe { libc::dup2(nothing.as_raw_fd(), stream) } == -1 {
            return Err(std::io::Error::last_os_error()).context(attempt);
        }
    }
    Ok(())
}

/// Where libraries are, and what they read; with `network`, also what names of hosts are looked up in.
pub(crate) fn of_libraries(network: bool) -> Vec<PathBuf> {
    let searched = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let searched = std::env::split_paths(&searched).filter(|path| path.is_absolute());
    let network = network.then_some(OF_THE_NETWORK).into_iter().flatten();
    OF_THE_SYSTEM.into_iter().chain(network).map(PathBuf::from).chain(searched).collect()
}

/// Rules for those of these files and folders that are there, and whether each is written.
pub(crate) fn rules(files: impl Iterator<Item = (PathBuf, bool)>) -> Vec<Rule> {
    let rule = |(path, writes): (PathBuf, bool)| {
        let kind = path.metadata().ok()?.file_type();
        let access = match writes {
            _ if kind.is_char_device() && path != Path::new("/dev/urandom") => Access::Device,
            true if kind.is_dir() => Access::Tree,
            true => Access::Write,
            false if kind.is_dir() => Access::ReadTree,
            false => Access::Read,
        };
        Some(Rule::new(path, access))
    };
    files.filter_map(rule).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_of_every_place_and_kms_are_kept_back() {
        let of_places = ["AZURE_STORAGE_ACCOUNT_KEY", "GOOGLE_SERVICE_ACCOUNT_KEY", "IDENTITY_HEADER"];
        for name in of_places.into_iter().chain(["AWS_SECRET_ACCESS_KEY", "SEALBLK_PIN_FD"]) {
            assert!(is_kept_back(name), "{name}");
        }
        for name in ["PATH", "LD_LIBRARY_PATH", "SOFTHSM2_CONF", "MY_AWS_THING"] {
            assert!(!is_kept_back(name), "{name}");
        }
    }
}
