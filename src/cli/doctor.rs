//! `sealblk doctor`: what this machine has of what a volume's host process wants.

use crate::backing::Backing;
use crate::backing::file::FileBacking;
use crate::backing::file::ring::{self, Tried};
use crate::base::root::Root;
use crate::base::root::owners::Owners;
use crate::base::{Error, Kind, Result};
use crate::cli::{Env, output};
use crate::crypt::secret_mem::{SecretFd, SecretKind};
use crate::crypt::xts::Engine;
use crate::sandbox;
use nix::sys::resource::{Resource, getrlimit};
use serde::Serialize;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

#[derive(Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Verdict {
    Ok,
    /// sealblk works, but not as well as it could.
    Note,
    /// Volumes cannot be attached.
    Bad,
}

#[derive(Serialize)]
struct Finding {
    what: &'static str,
    verdict: Verdict,
    found: String,
}

/// Looks at the machine, prints what it finds, and fails if something that is needed is not there.
pub fn run(env: &Env) -> Result<()> {
    let findings = [
        engines(),
        secret_memory(),
        locked_memory(),
        io_uring(),
        seccomp(),
        landlock(),
        data_folder(&env.root),
    ];
    if env.json {
        output::print_json(&findings)?;
    } else {
        let row = |f: &Finding| {
            let mark = match f.verdict {
                Verdict::Ok => "ok",
                Verdict::Note => "note",
                Verdict::Bad => "BAD",
            };
            vec![mark.to_string(), f.what.to_string(), f.found.clone()]
        };
        output::print(&output::table(&findings.iter().map(row).collect::<Vec<_>>()))?;
    }
    match findings.iter().find(|f| f.verdict == Verdict::Bad) {
        None => Ok(()),
        Some(bad) => Err(Error::new(Kind::Unsupported, format!("{}: {}", bad.what, bad.found))),
    }
}

fn engines() -> Finding {
    let names: Vec<_> = Engine::available().iter().map(|e| e.name()).collect();
    let fast = Engine::available().first() != Some(&Engine::Portable);
    Finding {
        what: "XTS engines",
        verdict: if fast { Verdict::Ok } else { Verdict::Note },
        found: match fast {
            true => format!("{} (the first is used)", names.join(", ")),
            false => format!("{} (this CPU has no VAES, or it is off)", names.join(", ")),
        },
    }
}

fn secret_memory() -> Finding {
    let (verdict, found) = match SecretFd::create(64).and_then(|fd| Ok((fd.kind(), fd.map()?))) {
        Ok((SecretKind::MemfdSecret, _)) => {
            (Verdict::Ok, "memfd_secret: not even root sees the pages".into())
        }
        Ok(_) => (
            Verdict::Note,
            "locked pages, left out of dumps; the kernel has no memfd_secret (boot with secretmem.enable=1)"
                .into(),
        ),
        Err(e) => (Verdict::Bad, e.to_string()),
    };
    Finding { what: "memory for keys", verdict, found }
}

fn locked_memory() -> Finding {
    // A page for each key schedule, and the pools of a few queues.
    const ENOUGH: u64 = 64 << 20;
    let (verdict, found) = match getrlimit(Resource::RLIMIT_MEMLOCK) {
        _ if is_root_of_the_host() => (Verdict::Ok, "unlimited for root".into()),
        Ok((soft, _)) if soft >= ENOUGH => (Verdict::Ok, format!("{} KiB", soft >> 10)),
        Ok((soft, _)) => (
            Verdict::Note,
            format!("{} KiB: bounce buffers may go unregistered (LimitMEMLOCK= in systemd)", soft >> 10),
        ),
        Err(e) => (Verdict::Note, e.to_string()),
    };
    Finding { what: "locked memory", verdict, found }
}

/// Root of a user namespace has the limits of any user.
fn is_root_of_the_host() -> bool {
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    nix::unistd::geteuid().is_root() && map.split_whitespace().eq(["0", "0", "4294967295"])
}

fn io_uring() -> Finding {
    let (verdict, found) = match ring::try_one() {
        Ok(Tried { no_buffers: Some(e), .. }) => {
            (Verdict::Note, format!("the kernel looks up the pages of bounce buffers for each request: {e}"))
        }
        Ok(Tried { deferred: true, .. }) => (Verdict::Ok, "with DEFER_TASKRUN".into()),
        Ok(_) => (Verdict::Note, "without DEFER_TASKRUN (it came with Linux 6.1)".into()),
        Err(e) => (Verdict::Bad, e.to_string()),
    };
    Finding { what: "io_uring", verdict, found }
}

fn seccomp() -> Finding {
    let (verdict, found) = match sandbox::check_seccomp() {
        Ok(()) => (Verdict::Ok, "the host process makes the system calls that it needs, and no other".into()),
        Err(e) => (Verdict::Bad, e.to_string()),
    };
    Finding { what: "seccomp", verdict, found }
}

fn landlock() -> Finding {
    let (verdict, found) = match sandbox::landlock_version() {
        Some(version) => {
            (Verdict::Ok, format!("version {version}: the host process opens its volume's files alone"))
        }
        None => {
            let found = "not in this kernel, or off (boot with lsm=landlock,…): the host process can open \
                         every file of its user; let it have one of its own (--user)";
            (Verdict::Note, found.into())
        }
    };
    Finding { what: "Landlock", verdict, found }
}

fn data_folder(store: &Root) -> Finding {
    let (what, root) = ("data folder", store.path());
    let finding =
        |verdict, found: String| Finding { what, verdict, found: format!("{}: {found}", root.display()) };
    let metadata = match std::fs::metadata(root) {
        Ok(metadata) => metadata,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return finding(Verdict::Ok, "not there yet; the first volume makes it".into());
        }
        Err(e) => return finding(Verdict::Bad, e.to_string()),
    };
    if !metadata.is_dir() {
        return finding(Verdict::Bad, "it is not a folder".into());
    }
    // What every other command begins with.
    if let Err(e) = Owners::configured().and_then(|owners| owners.check_root(store)) {
        return Finding { what, verdict: Verdict::Bad, found: e.to_string() };
    }
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return finding(Verdict::Note, format!("mode {mode:03o} lets others look at names; 700 would not"));
    }
    match access_of(&root.join(format!(".doctor-{}", std::process::id()))) {
        Ok(access) => finding(Verdict::Ok, access),
        Err(e) => finding(Verdict::Bad, e.to_string()),
    }
}

/// How a layer there would be reached, by a trial.
fn access_of(trial: &Path) -> Result<String> {
    let attempt = || -> Result<String> {
        // With data, which proves what is found; where there is room for it.
        let file = std::fs::File::create_new(trial)?;
        file.set_len(1 << 16)?;
        let _ = file.write_all_at(&[1; 1 << 13], 0);
        Ok(FileBacking::open(trial, false, 512, None)?.caps().access.clone())
    };
    let access = attempt();
    let _ = std::fs::remove_file(trial);
    access
}
