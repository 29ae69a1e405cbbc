//! A program of one's own that makes a volume and serves it to VMMs, by the library alone.
//!
//!     cargo run --example attach -- FOLDER SOCKET
//!
//! FOLDER is where the store lies; it is made if it is not there. The KMS's root key, which opens the store,
//! goes to the configuration folder (`/etc/sealblk`, or wherever `SEALBLK_CONFIG_DIR` says). The volume is
//! called "example".
//!
//! SOCKET is the path at which VMMs connect. Give the socket a folder of its own, outside the store: Landlock
//! knows no single names, so a confined process that shall remove its socket can remove every file in the
//! socket's folder.
//!
//!     qemu-system-x86_64 … -chardev socket,id=disk,path=SOCKET -device vhost-user-blk-pci,chardev=disk
//!
//! It ends by SIGINT, by SIGTERM, or by `sealblk --root FOLDER detach example`.
//!
//! Three processes of this one program take part, as three of the `sealblk` program do:
//!
//! - **The one that serves the volume** is this one. It never opens the KMS's store. It has one thread when
//!   it calls [`host::attach`], which confines it for good: a thread that runs already would stay free, so a
//!   process that has several is refused.
//! - **One that makes the volume**, if there is none yet. It asks the KMS, so it has the KMS's keys in its
//!   memory for a moment. A process that is going to read what a guest says should never have had them: hence
//!   a process of its own.
//! - **Helpers**, which the library starts as `/proc/self/exe --root … unwrap` and the like: whoever calls
//!   `attach` has to become one of them when called so (the first lines of `main`).

use sealblk::base::hardened::{Hardened, harden, harden_children};
use sealblk::base::root::Root;
use sealblk::base::root::owners::Owners;
use sealblk::catalog::VolumeId;
use sealblk::crypt::wiping_allocator::WipingAllocator;
use sealblk::crypt::xts::Engine;
use sealblk::host::socket::SocketAccess;
use sealblk::host::{self, Endpoint, Options};
use sealblk::ops::Store;
use sealblk::ops::create::{self, NewVolume};
use sealblk::sandbox::Mode;
use sealblk::vhost::queue::qos::Limits;
use sealblk::{Error, Kind, Result};
use std::process::{Command, ExitCode};
use std::time::Duration;

/// The helper that unwraps a data key zeroes what it frees. It can do so only where this is the program's
/// allocator; for all other processes of the program it is the system's.
#[global_allocator]
static ALLOCATOR: WipingAllocator = WipingAllocator;

const NAME: &str = "example";
const SIZE: u64 = 1 << 30;
const USAGE: &str = "usage: attach FOLDER SOCKET";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        // A helper. The command line knows what to do, and hardens itself.
        ["--root", ..] => sealblk::cli::main(),
        ["make", folder] => ended(make(folder)),
        [folder, socket] => ended(attach(folder, socket)),
        _ => ended(Err(Error::new(Kind::Usage, USAGE))),
    }
}

/// The exit codes are those of the `sealblk` program: 5 if the KMS refuses, for example.
fn ended(result: Result<()>) -> ExitCode {
    let Err(e) = result else { return ExitCode::SUCCESS };
    eprintln!("attach: {e}");
    ExitCode::from(e.kind().exit_code())
}

/// Everything that asks a KMS, or gets a data key, wants the proof that this process leaves no core file and
/// can be read by nobody but root. It comes first: what was in memory before could have been read.
fn hardened() -> Result<Hardened> {
    let proof = harden()?;
    // Also what this process executes, the helpers.
    harden_children()?;
    Ok(proof)
}

/// The store in `folder`, looked at as every command does: what somebody else can put there, root would act
/// on.
fn store(folder: &str, hardened: Hardened) -> Result<Store> {
    let root = Root::new(folder);
    Owners::configured()?.check_root(&root)?;
    Store::open(&root, hardened)
}

/// Makes the volume. The KMS's store and its default key are made by this, too, where there are none yet.
fn make(folder: &str) -> Result<()> {
    let hardened = hardened()?;
    // What the audit log calls this process.
    sealblk::audit::name_command("make");
    let store = store(folder, hardened)?;
    let name = NAME.parse().map_err(|e: String| Error::new(Kind::Usage, e))?;
    let new = NewVolume { size: Some(SIZE), name: Some(name), ..NewVolume::default() };
    let made = create::create(&store, &new, None)?;
    println!("{} is made: {} bytes", made.id(), made.size());
    Ok(())
}

fn attach(folder: &str, socket: &str) -> Result<()> {
    let hardened = hardened()?;
    sealblk::audit::name_command("attach");
    // The library says what it does by the `log` crate; RUST_LOG=info shows it on standard error.
    env_logger::init();
    let store = store(folder, hardened)?;
    let volume = volume(&store, folder)?;
    let options = Options {
        endpoint: Endpoint::Path(socket.into()),
        // As the umask has it; or name the VMM's group.
        access: SocketAccess::default(),
        // Each queue that a guest uses costs a thread and 4 MiB of buffers while it is used.
        queues: 2,
        queue_size: 1024,
        read_only: false,
        // What EBS shows: the volume's id without the hyphen.
        serial: None,
        engine: Engine::Auto,
        poll: Duration::from_micros(16),
        in_order: false,
        // No limit; `sealblk throttle` sets one while the volume is attached.
        limits: Limits::default(),
        hydrate_rate: 64 << 20,
        space_reserve: Default::default(),
        cpus: Vec::new(),
        // In production: nothing else. What the sandbox forbids ends the process with exit code 9.
        sandbox: Mode::On,
        // As root, name a user to become here (`Identity::parse`), whose the volume's files must be then.
        user: None,
        incoming: false,
        // For a layer behind an NBD server that is gone.
        nbd_reconnect: host::NBD_RECONNECT,
        source_patience: sealblk::backing::coming::PATIENCE,
    };
    // Returns when the volume is detached: everything is drained and durable then, the keys are wiped, and
    // the next process may have it. The process is confined for good by now, and is best ended: it can open
    // no file and start no program.
    host::attach(
        &store.catalog(),
        store.settings(),
        &volume.to_string(),
        &options,
        store.hardened(),
        |attached| {
            // VMMs can connect from here on. Whoever supervises this process is told here; by `NOTIFY_SOCKET`
            // systemd is told by the library.
            println!("{} is attached: {}", attached.volume, attached.how);
            Ok(())
        },
    )
}

/// The volume of that name, which another process makes first if there is none.
fn volume(store: &Store, folder: &str) -> Result<VolumeId> {
    match store.catalog().resolve(NAME) {
        Err(e) if e.kind() == Kind::NotFound => {}
        found => return found,
    }
    let made = Command::new("/proc/self/exe").args(["make", folder]).status()?;
    if !made.success() {
        return Err(Error::new(Kind::Other, format!("the volume was not made ({made})")));
    }
    store.catalog().resolve(NAME)
}
