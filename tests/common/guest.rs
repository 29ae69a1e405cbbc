//! A real Linux guest under QEMU, driven from a test: `Guest::builder().disk(socket).boot()`, then
//! `guest.ok("mkfs.ext4 /dev/vda")`.
//!
//! The guest is Debian's cloud kernel with a small initramfs; `./ci/setup` makes it, and a test fails when
//! it is missing. Its `/init` (`ci/guest/init`) runs one shell script at a time for us. Disks appear as
//! /dev/vda, /dev/vdb, … in the order in which they were given.

use super::patience::{Deadline, guest_limit, wait_for_within};
use super::qemu::{Qemu, Wire};
use base64::Engine;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// Bytes of one of fio's blocks, and how many of them a job writes before it verifies them.
const BLOCK: u32 = 16 << 10;
const BACKLOG: u32 = 32;

/// Makes a file system with some files, returns their checksums, and leaves it mounted at /mnt.
pub const MAKE_FILES: &str = "
    mkfs.ext4 -q /dev/vda
    mount /dev/vda /mnt
    seq 1 60000 >/mnt/numbers
    head -c 1000001 /dev/urandom >/mnt/random
    mkdir /mnt/many
    for i in $(seq 200); do echo \"file $i\" >/mnt/many/$i; done
    (cd /mnt && sha256sum numbers random many/*)
";

/// Returns the checksums of these files, from what is mounted at /mnt.
pub const CHECK_FILES: &str = "(cd /mnt && sha256sum numbers random many/*)";

enum Disk {
    VhostUser(PathBuf),
    Plain { path: PathBuf, read_only: bool },
}

/// What a guest will have.
pub struct Builder {
    disks: Vec<Disk>,
    queues: u16,
    reconnect: bool,
    args: Vec<String>,
    environment: Vec<(String, String)>,
}

impl Builder {
    /// A disk on the vhost-user-blk back-end that listens on `socket`; device `disk<n>`, chardev `sock<n>`
    /// to the monitor.
    pub fn disk(mut self, socket: impl AsRef<Path>) -> Self {
        self.disks.push(Disk::VhostUser(socket.as_ref().to_owned()));
        self
    }

    /// A file as an ordinary virtio disk.
    pub fn plain_disk(mut self, path: impl AsRef<Path>) -> Self {
        self.disks.push(Disk::Plain { path: path.as_ref().to_owned(), read_only: false });
        self
    }

    /// A file as an ordinary virtio disk that cannot be written.
    pub fn plain_read_only_disk(mut self, path: impl AsRef<Path>) -> Self {
        self.disks.push(Disk::Plain { path: path.as_ref().to_owned(), read_only: true });
        self
    }

    /// Queues of each vhost-user disk; default 2, one for each of the guest's processors.
    pub fn queues(mut self, queues: u16) -> Self {
        self.queues = queues;
        self
    }

    /// QEMU connects again when a back-end goes away.
    pub fn reconnect(mut self) -> Self {
        self.reconnect = true;
        self
    }

    /// More arguments for QEMU.
    pub fn args<S: Into<String>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// A variable for `ci/guest/qemu`: MEMORY, APPEND, SEALBLK_QEMU.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Boots the guest and waits until it takes commands.
    pub fn boot(self) -> Guest {
        let mut guest = self.start();
        guest.wait_ready();
        guest
    }

    /// Starts a QEMU that waits for a running guest with the same devices: [`Guest::move_to`] sends one.
    pub fn incoming(mut self) -> Guest {
        self.args.extend(["-incoming".into(), "defer".into()]);
        self.start()
    }

    fn start(self) -> Guest {
        let mut args = self.args.clone();
        for (n, disk) in self.disks.iter().enumerate() {
            args.extend(self.disk_args(n, disk));
        }
        let folder = tempfile::Builder::new()
            .prefix("guest-")
            .tempdir_in(env!("CARGO_TARGET_TMPDIR"))
            .expect("make a folder for the guest's logs");
        let (qemu, agent) = Qemu::start(&args, folder.path(), &self.environment);
        Guest { qemu, agent, folder: Some(folder), requests: 0, script: String::new() }
    }

    fn disk_args(&self, n: usize, disk: &Disk) -> [String; 4] {
        // QEMU reads a comma as the next option, two as a comma.
        let quoted = |path: &Path| path.to_str().expect("a path in UTF-8").replace(',', ",,");
        match disk {
            Disk::VhostUser(socket) => [
                "-chardev".into(),
                format!(
                    "socket,id=sock{n},path={}{}",
                    quoted(socket),
                    if self.reconnect { ",reconnect=1" } else { "" }
                ),
                "-device".into(),
                format!("vhost-user-blk-pci,id=disk{n},chardev=sock{n},num-queues={}", self.queues),
            ],
            Disk::Plain { path, read_only } => [
                "-blockdev".into(),
                format!(
                    "driver=file,node-name=file{n},filename={},read-only={}",
                    quoted(path),
                    if *read_only { "on" } else { "off" }
                ),
                "-device".into(),
                format!("virtio-blk-pci,id=disk{n},drive=file{n}"),
            ],
        }
    }
}

/// What a command in the guest did.
#[derive(Debug)]
pub struct Output {
    /// Its exit status; 0 is success.
    pub status: i32,
    /// What it wrote to stdout and stderr, as it came.
    pub stdout: String,
}

/// A running guest. It is ended, whatever happens, when the test drops it; when the test fails, the ends of
/// its console and of QEMU's messages are shown and their folder is kept.
pub struct Guest {
    qemu: Qemu,
    agent: Wire,
    folder: Option<TempDir>,
    requests: u64,
    /// What it was told last.
    script: String,
}

impl Guest {
    /// Begins to describe a guest.
    pub fn builder() -> Builder {
        Builder { disks: vec![], queues: 2, reconnect: false, args: vec![], environment: vec![] }
    }

    /// Runs a shell script in the guest.
    pub fn run(&mut self, script: &str) -> Output {
        self.start(script);
        self.finish()
    }

    /// Runs a shell script (ended by its first failing command) and returns what it wrote; the test fails
    /// when the script does.
    #[track_caller]
    pub fn ok(&mut self, script: &str) -> String {
        let output = self.run(&format!("set -e\n{script}"));
        assert_eq!(output.status, 0, "in the guest: {script}\n{}", output.stdout);
        output.stdout
    }

    /// Waits until a shell script succeeds in the guest; `what` is what that means.
    #[track_caller]
    pub fn wait_for(&mut self, what: &str, script: &str) {
        wait_for_within(guest_limit(), what, || match self.run(script) {
            Output { status: 0, .. } => Ok(()),
            Output { status, stdout } => Err(format!("status {status} of: {script}\n{stdout}")),
        });
    }

    /// Begins to write and read files in `folder`, which is on /dev/vda, by two jobs, every block verified,
    /// until [`Guest::stop_fio`]. When this returns, the files are there and the load is under way.
    #[track_caller]
    pub fn start_fio(&mut self, folder: &str) {
        self.start_fio_with(&format!(
            "--directory={folder} --size=24M --iodepth=16 --verify_backlog={BACKLOG}"
        ));
    }

    /// As [`Guest::start_fio`], with these arguments of fio's, which say where.
    #[track_caller]
    pub fn start_fio_with(&mut self, arguments: &str) {
        // First without any load: whoever is interrupted while he makes his files says
        // nothing of what he did.
        self.ok(&format!(
            "echo 'fio --name=load {arguments} --numjobs=2 --rw=randrw --bs={BLOCK} --direct=1 --ioengine=libaio \
                 --verify=crc32c --verify_fatal=1 --group_reporting --output=/tmp/fio' >/tmp/fio.sh
             sh -c \"$(cat /tmp/fio.sh) --create_only=1\" >/tmp/fio.err 2>&1 || {{ cat /tmp/fio /tmp/fio.err; exit 1; }}
             setsid sh -c \"exec $(cat /tmp/fio.sh) --time_based --runtime=1000000\" </dev/null >/tmp/fio.err 2>&1 &
             echo $! >/tmp/fio.pid"
        ));
        self.more_load();
    }

    /// Waits until fio has written and verified more: at least one of its two jobs has written more than what
    /// it writes before it verifies that.
    #[track_caller]
    pub fn more_load(&mut self) {
        let enough = self.written() + 2 * 2 * u64::from(BACKLOG) * u64::from(BLOCK);
        wait_for_within(guest_limit(), "fio has written and verified more", || match self.written() {
            written if written >= enough => Ok(()),
            written => Err(format!("{written} bytes written, of {enough}")),
        });
    }

    /// How many bytes the guest has written to /dev/vda; fio must run.
    #[track_caller]
    fn written(&mut self) -> u64 {
        let stat = self.ok("[ -e /proc/$(cat /tmp/fio.pid) ] || { cat /tmp/fio /tmp/fio.err; exit 1; }
             cat /sys/block/vda/stat");
        let sectors = stat.split_whitespace().nth(6).and_then(|sectors| sectors.parse::<u64>().ok());
        512 * sectors.expect("the number of sectors written")
    }

    /// Ends that; nothing may have been wrong.
    #[track_caller]
    pub fn stop_fio(&mut self) {
        self.ok("kill -INT $(cat /tmp/fio.pid) || { cat /tmp/fio /tmp/fio.err; exit 1; }");
        self.wait_for("fio has ended", "! [ -e /proc/$(cat /tmp/fio.pid) ]");
        self.ok("cat /tmp/fio /tmp/fio.err
             grep -q 'err= 0' /tmp/fio
             ! grep -q 'verify: bad' /tmp/fio /tmp/fio.err");
        assert!(!self.ok("dmesg").contains("I/O error"), "the guest saw an error");
    }

    /// Runs a shell script that must fail, and returns what it wrote.
    #[track_caller]
    pub fn refused(&mut self, script: &str) -> String {
        let output = self.run(script);
        assert_ne!(output.status, 0, "in the guest, this ought to have failed: {script}\n{}", output.stdout);
        output.stdout
    }

    /// Starts a shell script and does not wait: [`Guest::finish`] does.
    pub fn start(&mut self, script: &str) {
        self.requests += 1;
        self.script = script.to_owned();
        let script = base64::engine::general_purpose::STANDARD.encode(script);
        self.agent.send(format!("{} {script}\n", self.requests).as_bytes());
    }

    /// Waits for the end of the script that was started.
    #[track_caller]
    pub fn finish(&mut self) -> Output {
        let deadline = Deadline::after(guest_limit());
        let script = &self.script;
        let fails = |e| -> ! { panic!("the guest does not finish this: {script}: {e}") };
        let answer = self.agent.line(deadline).unwrap_or_else(|e| fails(e));
        let words = answer.split(' ').collect::<Vec<_>>();
        let ["done", id, status, length] = words[..] else {
            panic!("the guest did not finish its work but said {answer:?} (\"ready\": it has rebooted)");
        };
        assert_eq!(id, self.requests.to_string(), "the guest answered another request: {answer:?}");
        let length = length.parse().expect("a length");
        let stdout = self.agent.bytes(length, deadline).unwrap_or_else(|e| fails(e));
        let status = status.parse().expect("an exit status");
        Output { status, stdout: String::from_utf8_lossy(&stdout).into_owned() }
    }

    /// Reboots without a word to file systems (QEMU stays, every virtual device is reset) and waits until
    /// the guest is back.
    pub fn reboot(&mut self) {
        self.start("reboot -f");
        self.wait_ready();
    }

    /// Waits until a guest that was reset takes commands again.
    pub fn wait_ready(&mut self) {
        let answer = self.agent.line(Deadline::after(guest_limit()));
        let answer = answer.unwrap_or_else(|e| panic!("the guest did not boot: {e}"));
        assert_eq!(answer, "ready", "the guest did not boot");
    }

    /// Switches the guest off and waits for QEMU's end. File systems must have been unmounted.
    pub fn shutdown(mut self) {
        self.start("poweroff -f");
        let status = self.qemu.wait();
        assert!(status.success(), "QEMU ended with {status}");
    }

    /// Runs a command of QEMU's monitor, such as `stop`, `cont`, `system_reset`, `device_del`; the test fails
    /// when QEMU refuses it.
    pub fn qmp(&mut self, command: &str, arguments: Value) -> Value {
        self.qemu.execute(command, arguments)
    }

    /// Runs a command of QEMU's monitor; QEMU's words when it refuses.
    pub fn try_qmp(&mut self, command: &str, arguments: Value) -> Result<Value, String> {
        self.qemu.try_execute(command, arguments)
    }

    /// Waits for an event of QEMU's monitor, such as `DEVICE_DELETED`.
    pub fn qmp_event(&mut self, name: &str) -> Value {
        self.qemu.event(name)
    }

    /// Moves the running guest to a QEMU that waits for one, and returns it there; then this QEMU ends.
    pub fn move_to(mut self, mut destination: Guest) -> Guest {
        let socket = self.folder.as_ref().expect("until the drop").path().join("migration");
        let uri = format!("unix:{}", socket.display());
        destination.qmp("migrate-incoming", json!({ "uri": uri }));
        self.qmp("migrate-set-parameters", json!({ "max-bandwidth": 1u64 << 40, "downtime-limit": 5000 }));
        self.begin_migration(&uri);
        assert_eq!(self.migration_end(), "completed");
        destination.qmp_event("RESUME");
        destination.requests = self.requests;
        self.qmp("quit", json!({}));
        let status = self.qemu.wait();
        assert!(status.success(), "QEMU ended with {status}");
        destination
    }

    /// Begins to move the guest to `uri`.
    pub fn begin_migration(&mut self, uri: &str) {
        let events = json!([{ "capability": "events", "state": true }]);
        self.qmp("migrate-set-capabilities", json!({ "capabilities": events }));
        self.qmp("migrate", json!({ "uri": uri }));
    }

    /// Waits for the end of a migration; how it ended, in QEMU's word.
    pub fn migration_end(&mut self) -> String {
        loop {
            let status = self.qmp_event("MIGRATION")["data"]["status"].take();
            match status.as_str() {
                Some(end @ ("completed" | "failed" | "cancelled")) => return end.to_owned(),
                _ => continue,
            }
        }
    }

    /// Kills QEMU, as a crash of the VMM would.
    pub fn kill(mut self) {
        self.qemu.kill();
    }

    /// QEMU's process id.
    pub fn pid(&self) -> u32 {
        self.qemu.pid()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if std::thread::panicking()
            && let Some(folder) = self.folder.take()
        {
            eprintln!("the guest's logs are kept in {}", folder.keep().display());
        }
    }
}
