//! Copies where space is short: refused before they begin, stopped at a reserve, and going on by themselves.

use crate::common::attach::{Place, Said, flush, open, write};
use crate::common::disk::pattern;
use crate::common::loop_disk::MemoryDisk;
use crate::common::patience::{limit, wait_for as wait_until};
use crate::common::process::wait_within;
use crate::common::rig::Rig;
use crate::common::store::Store;
use crate::watch::{attach, filled, full, sees, wait_for, wait_until_done};
use nix::sys::signal::{Signal, kill};
use nix::sys::statvfs::statvfs;
use nix::unistd::Pid;
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

const MIB: u64 = 1 << 20;

/// A rig with six mebibytes of data on a small file system, and a file that takes all of that but so much.
struct Tight {
    rig: Rig,
    disk: MemoryDisk,
}

impl Tight {
    fn new(free: u64) -> Option<Self> {
        let store = Store::new();
        let disk = MemoryDisk::mount(48 * MIB, store.root().parent()?)?;
        let rig = filled(Rig::of(Place::of(store, &[])));
        let tight = Tight { rig, disk };
        tight.leave(free);
        Some(tight)
    }

    fn free(&self) -> u64 {
        let found = statvfs(self.disk.folder()).unwrap();
        found.blocks_available() * found.fragment_size()
    }

    fn ballast(&self) -> PathBuf {
        self.disk.folder().join("ballast")
    }

    fn leave(&self, free: u64) {
        let mut ballast = File::create(self.ballast()).unwrap();
        let block = [7; 4096];
        while self.free() > free {
            ballast.write_all(&block).unwrap();
        }
    }

    fn events(&self, result: &str) -> Vec<Value> {
        let events = self.rig.place.events().into_iter().map(|event| event["detail"].clone());
        events.filter(|it| it["event"] == "hydrateVolume" && it["result"] == result).collect()
    }

    fn waits(&self) -> Value {
        let waits = |shown: &Value| shown["attachment"]["hydration"]["waits_for_space"] == true;
        wait_for(&self.rig, "t", "the copy waits for space", waits)["attachment"]["hydration"].clone()
    }
}

#[test]
fn a_copy_stops_at_the_reserve_and_goes_on_when_there_is_space() {
    let Some(mut tight) = Tight::new(7 * MIB) else { return };
    let (host, socket) = attach(&tight.rig, "t", &["--hydrate-rate", "0", "--space-reserve", "3MiB"]);
    let mut session = open(&socket);
    let said = tight.rig.refuse(8, &["volume", "rekey", "t", "--space-reserve", "3MiB"]);
    assert!(said.contains("are lacking") && said.contains("--skip-space-check"), "{said}");
    assert_eq!(tight.rig.files("layers").len(), 1);
    tight.rig.place.store.ok(&["volume", "rekey", "t", "--skip-space-check"]);
    let shown = tight.waits();
    assert_eq!(shown["reserve"], 3 * MIB);
    assert!(shown["left"].as_u64().unwrap() > 0, "{shown}");
    let words = tight.rig.place.store.ok(&["volume", "show", "t"]);
    assert!(words.contains("it waits: ") && words.contains("space-reserve"), "{words}");
    // What it leaves is there for the guest.
    assert!(tight.free() >= 3 * MIB, "{}", tight.free());
    let data = pattern(9, 512 << 10);
    write(&mut session.rings[0], 0, &data);
    flush(&mut session.rings[0]);
    tight.rig.data[..512 << 10].copy_from_slice(&data);
    // Said once.
    assert_eq!(tight.events("waiting").len(), 1);
    assert!(tight.events("waiting")[0]["cause"].as_str().unwrap().contains("a copy leaves"));
    host.says("the copy from its lower layers waits");
    // What it is told to leave can be changed, and it is stopped as quickly as any other.
    tight.rig.place.store.ok(&["throttle", "t", "--space-reserve", "4MiB"]);
    assert_eq!(tight.waits()["reserve"], 4 * MIB);
    tight.rig.place.store.ok(&["snapshot", "create", "t"]);
    tight.waits();
    fs::remove_file(tight.ballast()).unwrap();
    wait_until_done(&tight.rig, "t");
    assert!(sees(&mut session, 8 << 20) == tight.rig.data);
    drop(session);
    tight.rig.place.store.ok(&["detach", "t"]);
    host.ends_well();
    assert_eq!((tight.events("waiting").len(), tight.events("failed").len()), (1, 0));
    let volume = tight.rig.reader().volume("t");
    assert!(tight.rig.reader().volume_content(&volume) == tight.rig.data);
}

#[test]
fn behind_a_copy_that_is_followed_space_is_given_back() {
    for attached in [false, true] {
        let Some(tight) = Tight::new(7 * MIB) else { return };
        let rig = &tight.rig;
        let host = attached.then(|| attach(rig, "t", &["--hydrate-rate", "0", "--space-reserve", "3MiB"]).0);
        // Six mebibytes are copied, and there are four: what was copied makes room for what comes.
        let rekey = ["volume", "rekey", "t", "--follow", "--space-reserve", "3MiB", "--skip-space-check"];
        rig.place.store.ok(&rekey);
        assert!(tight.free() >= 3 * MIB, "{}", tight.free());
        if let Some(host) = host {
            host.end();
        }
        let reader = rig.reader();
        assert_eq!(reader.volume("t").layers().len(), 1);
        assert!(reader.volume_content(&reader.volume("t")) == rig.data);
    }
}

/// What nothing else needs is not there twice, if somebody gives it back; what a snapshot needs is.
#[test]
fn a_copy_that_is_followed_begins_with_less_room_than_what_it_copies() {
    let store = Store::new();
    let Some(disk) = MemoryDisk::mount(256 * MIB, store.root().parent().unwrap()) else { return };
    let tight = Tight { rig: Rig::of(Place::of(store, &[])), disk };
    let (rig, elsewhere) = (&tight.rig, tempfile::tempdir().unwrap());
    let image = elsewhere.path().join("i.img");
    let data = pattern(4, 96 << 20);
    fs::write(&image, &data).unwrap();
    let import = ["volume", "import", image.to_str().unwrap(), "--format", "raw", "--name", "i"];
    rig.place.store.ok(&[&import[..], &["--space-reserve", "0"]].concat());
    tight.leave(72 * MIB);
    let copy = ["volume", "rekey", "i", "--space-reserve", "2MiB"];
    assert!(rig.refuse(8, &copy).contains("are lacking"));
    let followed = [&copy[..], &["--follow"]].concat();
    let snapshot = rig.id(&["snapshot", "create", "i"]);
    assert!(rig.refuse(8, &followed).contains("are lacking"), "the snapshot keeps what it has");
    rig.place.store.ok(&["snapshot", "delete", &snapshot]);
    rig.place.store.ok(&followed);
    assert!(tight.free() >= 2 * MIB, "{}", tight.free());
    let reader = rig.reader();
    assert!(reader.volume_content(&reader.volume("i")) == data);
    rig.assert_layers_are_named();
}

#[test]
fn a_command_that_copies_waits_for_space_and_says_so() {
    let Some(tight) = Tight::new(7 * MIB) else { return };
    let rig = &tight.rig;
    rig.place.store.ok(&["key", "create", "--alias", "alias/new"]);
    let snapshot = rig.id(&["snapshot", "create", "t"]);
    let commands: [&[&str]; 2] =
        [&["volume", "rekey", "t", "--follow"], &["snapshot", "copy", &snapshot, "--key", "alias/new"]];
    for command in commands {
        tight.leave(7 * MIB);
        let command = [command, &["--space-reserve", "3MiB", "--skip-space-check"]].concat();
        let mut copies = Talking::start(rig.place.store.command().args(&command), rig);
        copies.says("the copy waits");
        assert!(tight.free() >= 3 * MIB, "{command:?}: {}", tight.free());
        fs::remove_file(tight.ballast()).unwrap();
        assert_eq!(copies.ends().code, 0, "{command:?}");
    }
    assert_eq!(tight.events("waiting").len(), 1);
    let reader = rig.reader();
    assert!(reader.volume_content(&reader.volume("t")) == rig.data);
    rig.assert_layers_are_named();
}

#[test]
fn an_import_and_an_export_wait_for_space_and_can_be_interrupted() {
    let Some(tight) = Tight::new(4 * MIB) else { return };
    let (rig, elsewhere) = (&tight.rig, tempfile::tempdir().unwrap());
    let image = elsewhere.path().join("i.img");
    fs::write(&image, &rig.data).unwrap();
    let image = image.to_str().unwrap();
    let file = rig.place.folder().join("t.img");
    let commands: [&[&str]; 2] = [
        &["volume", "import", image, "--format", "raw", "--name", "i"],
        &["volume", "export", "t", file.to_str().unwrap()],
    ];
    for command in commands {
        tight.leave(4 * MIB);
        let command = [command, &["--space-reserve", "2MiB", "--skip-space-check"]].concat();
        let start = || Talking::start(rig.place.store.command().args(&command), rig);
        let mut copies = start();
        copies.says("the copy waits");
        kill(Pid::from_raw(copies.child.id() as i32), Signal::SIGTERM).unwrap();
        let said = copies.ends();
        assert!(said.code == 1 && said.err.contains("interrupted"), "{command:?}: {said:?}");
        rig.assert_layers_are_named();
        assert!(!file.exists());
        let mut copies = start();
        copies.says("the copy waits");
        assert!(tight.free() >= 2 * MIB - (256 << 10), "{command:?}: {}", tight.free());
        fs::remove_file(tight.ballast()).unwrap();
        assert_eq!(copies.ends().code, 0, "{command:?}");
    }
    let reader = rig.reader();
    assert!(reader.volume_content(&reader.volume("i"))[..8 << 20] == rig.data);
    assert!(fs::read(&file).unwrap() == rig.data);
}

/// Whatever copies is refused before it begins, with the numbers, and leaves nothing.
#[test]
fn what_does_not_fit_is_refused_before_anything_is_done() {
    let rig = full(&[]);
    rig.place.store.ok(&["key", "create", "--alias", "alias/new"]);
    let snapshot = rig.id(&["snapshot", "create", "t"]);
    let (image, out) = (rig.place.folder().join("raw.img"), rig.place.folder().join("out.img"));
    fs::write(&image, &rig.data).unwrap();
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    let (image_path, out_path) = (path(&image), path(&out));
    let ids = || rig.reader().catalog().ids().unwrap();
    let (layers, volumes) = (rig.files("layers"), ids());
    let wanted = rig.place.folder().join("volumes.toml");
    fs::write(&wanted, format!("[[volume]]\nname = 'a'\nsnapshot = '{snapshot}'\nkey = 'alias/new'\n"))
        .unwrap();
    let wanted = path(&wanted);
    let commands: [&[&str]; 9] = [
        &["apply", &wanted],
        &["volume", "rekey", "t"],
        &["volume", "flatten", "t"],
        &["volume", "import", &image_path],
        &["volume", "import", &image_path, "--preallocate"],
        &["volume", "import", &image_path, "--in-place"],
        &["volume", "create", "--snapshot", &snapshot, "--key", "alias/new"],
        &["snapshot", "copy", &snapshot, "--key", "alias/new"],
        &["volume", "export", "t", &out_path],
    ];
    for command in commands {
        let said = rig.refuse(8, &[command, &["--space-reserve", "1PiB"]].concat());
        let has_numbers = said.contains("(space-reserve)") && said.contains("are lacking");
        assert!(has_numbers, "{command:?}: {said}");
        assert_eq!(rig.files("layers"), layers, "{command:?}");
        assert_eq!(ids(), volumes, "{command:?}");
        assert!(image.exists() && !out.exists());
    }
    let error = rig.refuse(8, &["volume", "rekey", "t", "--space-reserve", "1PiB", "--json"]);
    let error: Value = serde_json::from_str(&error).unwrap();
    assert_eq!(error["error"]["kind"], "no-space");
    // What copies nothing needs nothing.
    for command in [&["volume", "create", "--snapshot", &snapshot][..], &["snapshot", "copy", &snapshot]] {
        match command[0] {
            "volume" => drop(rig.id(&[command, &["--space-reserve", "1PiB"]].concat())),
            _ => drop(rig.id(command)),
        }
    }
    // The settings decide where the command does not say.
    rig.place.store.configure("space-reserve = '1PiB'\n");
    assert_eq!(rig.json(&["settings", "show"])["space_reserve"], json!(1_u64 << 50));
    rig.refuse(8, &["volume", "rekey", "t"]);
    rig.place.store.ok(&["volume", "rekey", "t", "--skip-space-check"]);
    rig.place.store.ok(&["volume", "flatten", "t", "--follow", "--space-reserve", "0"]);
}

/// A command whose standard error is read while it runs.
struct Talking {
    child: Child,
    said: PathBuf,
}

impl Talking {
    fn start(command: &mut Command, rig: &Rig) -> Self {
        // Not on the small file system.
        let said = rig.place.folder().join("said");
        let _ = fs::remove_file(&said);
        command.stdout(Stdio::null()).stderr(File::create(&said).unwrap());
        Talking { child: command.spawn().unwrap(), said }
    }

    #[track_caller]
    fn says(&mut self, words: &str) {
        wait_until(&format!("it says \"{words}\""), || {
            let said = fs::read_to_string(&self.said).unwrap();
            let ended = self.child.try_wait().unwrap();
            assert!(said.contains(words) || ended.is_none(), "{said}");
            if said.contains(words) { Ok(()) } else { Err(said) }
        });
    }

    fn ends(mut self) -> Said {
        let status = wait_within(&mut self.child, limit()).unwrap();
        let err = fs::read_to_string(&self.said).unwrap();
        Said { code: status.code().expect("no signal"), out: String::new(), err }
    }
}

impl Drop for Talking {
    fn drop(&mut self) {
        // An error means that it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
