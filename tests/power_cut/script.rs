//! How a scenario is told: commands and guests, recorded, with what each promises.

use super::check::REGION;
use super::expect::{Content, Expect, Presence, SECTOR, Volume, ZEROS, sector};
use super::recorder::Recorder;
use super::site::Site;
use super::tape::{Running, Tape, mark};
use super::trace::Trace;
use crate::common::frontend::{Request, Segment, Session, block};
use crate::common::patience::wait_for;
use crate::common::process::tie_to_test;
use serde_json::Value;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};
use std::sync::Arc;

/// A recording in the making.
pub struct Script {
    site: Site,
    tape: Arc<dyn Tape>,
    seeds: u64,
}

/// Records a scenario by the system calls that are made.
pub fn traced(scenario: impl FnOnce(&mut Script)) -> Trace {
    let site = Site::new();
    let recorder = Recorder::new(site.top());
    scenario(&mut Script::new(site, Arc::new(recorder.clone())));
    recorder.finish()
}

/// A volume that is attached, and its guest.
pub struct Guest {
    tape: Arc<dyn Tape>,
    volume: String,
    session: Session,
    host: Box<dyn Running>,
    seeds: u64,
}

impl Script {
    /// With the empty store at `site`.
    pub fn new(site: Site, tape: Arc<dyn Tape>) -> Self {
        Script { site, tape, seeds: 0 }
    }

    /// From now on, power cuts are of interest; what came before is another scenario's.
    pub fn start(&self) {
        self.tape.start();
    }

    /// Changes what may be expected from now on.
    pub fn mark(&self, label: &str, apply: impl Fn(&mut Expect) + Send + Sync + 'static) {
        self.tape.mark(mark(label, apply));
    }

    /// Runs a command, which must succeed; returns what it printed. What it promises counts from the moment
    /// when it begins to print: [`Script::promise`].
    #[track_caller]
    pub fn run(&self, arguments: &[&str]) -> String {
        let said = self.tape.run(self.site.command(arguments));
        assert!(
            said.status.success(),
            "sealblk {}: {} {}{}",
            arguments.join(" "),
            said.status,
            said.out,
            said.err
        );
        said.out
    }

    /// What the last command promised.
    pub fn promise(&self, label: &str, apply: impl Fn(&mut Expect) + Send + Sync + 'static) {
        self.tape.mark_where_it_spoke(mark(label, apply));
    }

    /// Leaves settings in the store, as an earlier version had them, and durably.
    #[track_caller]
    pub fn leave_settings(&self) {
        let mut command = Command::new("/bin/sh");
        let write = format!("echo \"region = '{REGION}'\" > sealblk.toml && sync sealblk.toml && sync .");
        command.arg("-c").arg(write).current_dir(self.site.root()).stdin(Stdio::null());
        let said = self.tape.run(command);
        assert!(said.status.success(), "{} {}", said.status, said.err);
        self.mark("settings are in the store", |expect| expect.settings_moved = Some(false));
    }

    /// Moves them.
    #[track_caller]
    pub fn move_settings(&self) {
        self.run(&["settings", "move"]);
        self.mark("the settings were moved", |expect| expect.settings_moved = Some(true));
    }

    /// Makes a volume of so many 512-byte sectors with these arguments besides, which will hold
    /// `content`; returns its id.
    #[track_caller]
    pub fn create(&self, content: Content, arguments: &[&str]) -> String {
        let size = format!("{}B", content.sectors() * SECTOR);
        let default_key = !arguments.iter().any(|a| ["--unencrypted", "--key"].contains(a));
        self.mark("a volume is being made", move |expect| {
            expect.default_key |= default_key;
            expect.making(content.clone());
        });
        let size = ["--size", &size];
        let out = self.run(&[&["volume", "create"], &size[..], arguments].concat());
        let id = out.trim().to_owned();
        let told = id.clone();
        self.promise(&format!("{id} was made"), move |expect| expect.made(&told));
        id
    }

    /// Makes a volume of a raw image of so many sectors, of which those in `data` hold something, with these
    /// arguments besides; returns its id.
    #[track_caller]
    pub fn import(&self, sectors: usize, data: &[Range<usize>], arguments: &[&str]) -> String {
        let mut content = Content::zeros(sectors);
        let image = self.site.beside("image");
        let file = File::create(&image).expect("make an image");
        file.set_len((sectors * SECTOR) as u64).expect("give it its length");
        for (seed, range) in (1..).zip(data) {
            content.may_become(range.start, &vec![seed; range.len()]);
            for number in range.clone() {
                file.write_all_at(&sector(number, seed), (number * SECTOR) as u64).expect("write the image");
            }
        }
        // What somebody has open for writing is not imported.
        drop(file);
        content.flush();
        self.mark("an image is being imported", move |expect| {
            expect.default_key = true;
            expect.making(content.clone());
        });
        let image = image.display().to_string();
        let out = self.run(&[&["volume", "import", &image], arguments].concat());
        let id = out.trim().to_owned();
        let told = id.clone();
        self.promise(&format!("{id} was imported"), move |expect| expect.made(&told));
        id
    }

    /// Writes what a volume holds into the image beside the store, which a power cut hits as well.
    #[track_caller]
    pub fn export_to_image(&self, id: &str) {
        // An export makes a file without a name first, which the recorder does not model; so it is copied.
        let aside = self.site.beside("exported").display().to_string();
        self.run(&["volume", "export", id, &aside]);
        let mut command = Command::new("/bin/sh");
        let copy = "dd if=\"$1\" of=image bs=1M conv=fsync status=none && sync .";
        command.args(["-c", copy, "sh", &aside]).current_dir(self.site.top()).stdin(Stdio::null());
        let said = self.tape.run(command);
        assert!(said.status.success(), "{} {}", said.status, said.err);
    }

    /// Makes a volume of that image, which holds what `source` holds, in place; returns its id.
    #[track_caller]
    pub fn take_image(&self, source: &str) -> String {
        let source = source.to_owned();
        self.mark("an image is being taken", move |expect| {
            let content = expect.content(&source).newest();
            expect.image = Some(content.clone());
            expect.making(content);
        });
        let image = self.site.image().display().to_string();
        let id = self.run(&["volume", "import", "--in-place", "--format", "raw", &image]).trim().to_owned();
        let told = id.clone();
        self.promise(&format!("{id} was made of an image"), move |expect| {
            expect.image = None;
            expect.made(&told);
        });
        id
    }

    /// Deletes a volume.
    #[track_caller]
    pub fn delete(&self, id: &str) {
        let (before, after) = (id.to_owned(), id.to_owned());
        self.mark(&format!("{id} is being deleted"), move |expect| expect.volume(&before, Presence::May));
        self.run(&["volume", "delete", id]);
        self.promise(&format!("{id} was deleted"), move |expect| {
            expect.volume(&after, Presence::MustNot);
            expect.events.push(("deleteVolume".into(), after.clone()));
        });
    }

    /// Makes a volume, attached or not, so many sectors large.
    #[track_caller]
    pub fn resize(&self, id: &str, sectors: usize) {
        let (before, after) = (id.to_owned(), id.to_owned());
        self.mark(&format!("{id} is being made larger"), move |expect| {
            expect.content(&before).may_grow(sectors);
        });
        self.run(&["volume", "resize", id, &format!("{}B", sectors * SECTOR)]);
        self.promise(&format!("{id} was made larger"), move |expect| {
            expect.content(&after).has_grown();
            expect.events.push(("modifyVolume".into(), after.clone()));
        });
    }

    /// Makes a snapshot of a volume, attached or not; returns its id. It holds all that was written by then.
    #[track_caller]
    pub fn snapshot(&self, id: &str) -> String {
        self.freeze(&[id], &[id]).remove(0)
    }

    /// Makes snapshots of all volumes that have the tag `set` at one moment; returns their ids, in the order
    /// of `volumes`, which they are.
    #[track_caller]
    pub fn snapshot_all_of(&self, set: &str, volumes: &[&str]) -> Vec<String> {
        self.freeze(volumes, &["--all-of", &format!("tag:set={set}")])
    }

    #[track_caller]
    fn freeze(&self, volumes: &[&str], arguments: &[&str]) -> Vec<String> {
        let before: Vec<_> = volumes.iter().map(|id| id.to_string()).collect();
        self.mark(&format!("a snapshot of {volumes:?} is being made"), move |expect| {
            for id in &before {
                let content = expect.content(id).newest();
                expect.snapshots_being_made.insert(id.clone(), content);
            }
        });
        let said = self.run(&[&["snapshot", "create"], arguments].concat());
        let of = |volume: &str| {
            // With several, the volume's id stands behind each.
            let line = said.lines().find(|line| volumes.len() == 1 || line.ends_with(volume));
            line.and_then(|line| line.split_whitespace().next()).expect("it has an id").to_owned()
        };
        let made: Vec<_> = volumes.iter().map(|volume| of(volume)).collect();
        let told: Vec<_> = made.iter().cloned().zip(volumes.iter().map(|id| id.to_string())).collect();
        self.promise(&format!("{made:?} of {volumes:?} were made"), move |expect| {
            for (snapshot, volume) in &told {
                let content = expect.snapshots_being_made.remove(volume).expect("it is being made");
                expect.snapshots.insert(snapshot.clone(), Volume::with(content));
                expect.content(volume).flush();
                expect.events.push(("createSnapshot".into(), snapshot.clone()));
            }
        });
        made
    }

    /// Makes a volume of a snapshot, with these arguments besides; returns its id.
    #[track_caller]
    pub fn clone_of(&self, snapshot: &str, arguments: &[&str]) -> String {
        let of = snapshot.to_owned();
        self.mark(&format!("a volume is being made of {snapshot}"), move |expect| {
            let content = expect.snapshots[&of].content.clone();
            expect.making(content);
        });
        let out = self.run(&[&["volume", "create", "--snapshot", snapshot], arguments].concat());
        let id = out.trim().to_owned();
        let told = id.clone();
        self.promise(&format!("{id} was made"), move |expect| expect.made(&told));
        id
    }

    /// Copies a snapshot, with these arguments besides; returns the copy's id.
    #[track_caller]
    pub fn copy_of(&self, snapshot: &str, arguments: &[&str]) -> String {
        let of = snapshot.to_owned();
        self.mark(&format!("{snapshot} is being copied"), move |expect| {
            expect.snapshots_being_made.insert(of.clone(), expect.snapshots[&of].content.clone());
        });
        let copy = self.run(&[&["snapshot", "copy", snapshot], arguments].concat()).trim().to_owned();
        let (told, of) = (copy.clone(), snapshot.to_owned());
        self.promise(&format!("{copy} was made"), move |expect| {
            let content = expect.snapshots_being_made.remove(&of).expect("it is being made");
            expect.snapshots.insert(told.clone(), Volume::with(content));
            expect.events.push(("copySnapshot".into(), told.clone()));
        });
        copy
    }

    /// Makes a snapshot of what the place at `url` has of `snapshot`, with these arguments besides.
    #[track_caller]
    pub fn pull(&self, url: &str, snapshot: &str, arguments: &[&str]) -> String {
        let of = snapshot.to_owned();
        self.mark(&format!("{snapshot} is being pulled"), move |expect| {
            expect.snapshots_being_made.insert(of.clone(), expect.snapshots[&of].content.clone());
        });
        let url = format!("{url}/{snapshot}");
        let pulled = self.run(&[&["snapshot", "pull", &url], arguments].concat()).trim().to_owned();
        let (told, of) = (pulled.clone(), snapshot.to_owned());
        self.promise(&format!("{pulled} was made"), move |expect| {
            let content = expect.snapshots_being_made.remove(&of).expect("it is being made");
            expect.snapshots.insert(told.clone(), Volume::with(content));
            expect.events.push(("pullSnapshot".into(), told.clone()));
        });
        pulled
    }

    /// Backs the store up to the place at `url`; returns the id of the snapshot that it leaves here
    /// of `volume`, its only one.
    #[track_caller]
    pub fn backup(&self, url: &str, volume: &str) -> String {
        let of = volume.to_owned();
        self.mark("a backup is being made", move |expect| {
            let content = expect.content(&of).newest();
            expect.snapshots_being_made.insert(of.clone(), content);
        });
        let said = self.run(&["backup", url, "--root-key-is-kept", "--json"]);
        let said: Value = serde_json::from_str(&said).expect("JSON");
        let snapshot = said["volumes"][0]["snapshot"].as_str().expect("it has an id").to_owned();
        let (told, of) = (snapshot.clone(), volume.to_owned());
        self.promise(&format!("{volume} is backed up"), move |expect| {
            let content = expect.snapshots_being_made.remove(&of).expect("it is being made");
            expect.snapshots.insert(told.clone(), Volume::with(content));
        });
        snapshot
    }

    /// Makes a volume of what the place at `url` has of `snapshot`, a backup, by way of a snapshot that is
    /// gone in the end; returns its id.
    #[track_caller]
    pub fn restore(&self, url: &str, snapshot: &str) -> String {
        let of = snapshot.to_owned();
        self.mark("a volume is being restored", move |expect| {
            let content = expect.snapshots[&of].content.clone();
            expect.snapshots_being_made.insert(of.clone(), content.clone());
            expect.making(content);
        });
        let said: Value = serde_json::from_str(&self.run(&["restore", url, "--json"])).expect("JSON");
        let id = said["volumes"][0]["id"].as_str().expect("it has an id").to_owned();
        let (told, of) = (id.clone(), snapshot.to_owned());
        self.promise(&format!("{id} was restored"), move |expect| {
            expect.snapshots_being_made.remove(&of);
            expect.made(&told);
        });
        id
    }

    /// Another host with a store like this one, as it is now, which no power cut hits.
    #[track_caller]
    pub fn another_host(&self) -> Site {
        let other = Site::new();
        let mut copy = Command::new("cp");
        copy.arg("-a").arg(self.site.top().join(".")).arg(other.top());
        assert!(copy.status().expect("start cp").success());
        other.move_in().expect("bring the ledger's key to where the other store is");
        other
    }

    /// Takes the volume `id`, which another host sends by the place at `url`, and which was here, too;
    /// returns the id that it gets.
    #[track_caller]
    pub fn receive(&self, from: &Site, url: &str, id: &str) -> String {
        let mut command = from.command(&["volume", "send", id, url, "--wait", "120"]);
        command.stdout(Stdio::null());
        tie_to_test(&mut command, vec![]);
        // Who records waits for whatever ends.
        drop(command.spawn().expect("start sealblk"));
        let of = id.to_owned();
        self.mark("a volume is being received", move |expect| {
            let content = expect.volumes[&of].content.clone();
            expect.snapshots_being_made.insert(of.clone(), content.clone());
            expect.making(content);
        });
        let said = self.run(&["volume", "receive", url, id, "--wait", "120", "--json"]);
        let said: Value = serde_json::from_str(&said).expect("JSON");
        let received = said["id"].as_str().expect("it has an id").to_owned();
        let (told, of) = (received.clone(), id.to_owned());
        self.promise(&format!("{received} was received"), move |expect| {
            expect.snapshots_being_made.remove(&of);
            expect.made(&told);
        });
        wait_for("it is not there any more", || match from.ok(&["volume", "show", id]) {
            Ok(shown) => Err(shown),
            Err(_) => Ok(()),
        });
        received
    }

    /// Deletes a snapshot.
    #[track_caller]
    pub fn delete_snapshot(&self, id: &str) {
        let (before, after) = (id.to_owned(), id.to_owned());
        self.mark(&format!("{id} is being deleted"), move |expect| expect.snapshot(&before, Presence::May));
        self.run(&["snapshot", "delete", id]);
        self.promise(&format!("{id} was deleted"), move |expect| expect.snapshot(&after, Presence::MustNot));
    }

    /// Makes a KMS key; returns its id.
    #[track_caller]
    pub fn create_key(&self, arguments: &[&str]) -> String {
        self.mark("a key is being made", |expect| expect.key_being_made = true);
        let out = self.run(&[&["key", "create", "--json"], arguments].concat());
        let key: Value = serde_json::from_str(&out).expect("JSON");
        let id = key["key_id"].as_str().expect("it has an id").to_owned();
        let told = id.clone();
        self.promise(&format!("key {id} was made"), move |expect| {
            expect.key_being_made = false;
            expect.key_is(&told, "Enabled");
        });
        id
    }

    /// A command that brings a key into a state.
    #[track_caller]
    pub fn change_key(&self, id: &str, command: &[&str], state: &'static str) {
        let (before, after) = (id.to_owned(), id.to_owned());
        self.mark(&format!("key {id} may be {state}"), move |expect| expect.key_may_be(&before, state));
        self.run(&[&["key"], command, &[id]].concat());
        self.promise(&format!("key {id} is {state}"), move |expect| expect.key_is(&after, state));
    }

    /// Wraps a volume's data key, which is wrapped by the KMS key `old`, by `new` instead.
    #[track_caller]
    pub fn rewrap(&self, id: &str, old: &str, new: &str) {
        let (volume, keys) = (id.to_owned(), [old.to_owned(), new.to_owned()]);
        self.mark(&format!("{id} is being rewrapped"), move |expect| {
            keys.iter().for_each(|key| expect.wrapped_by(&volume, key, false));
        });
        self.run(&["volume", "rewrap", id, "--key", new]);
        let (volume, new) = (id.to_owned(), new.to_owned());
        self.promise(&format!("{id} is wrapped by {new}"), move |expect| {
            expect.wrapped_by(&volume, &new, true)
        });
    }

    /// Runs a command that changes what "volume show" says of a volume at a place of its JSON, from `old` to
    /// `new`.
    #[track_caller]
    pub fn change(&self, id: &str, command: &[&str], place: &'static str, (old, new): (Value, Value)) {
        let (volume, may) = (id.to_owned(), [old.to_string(), new.to_string()]);
        self.mark(&format!("{id} may show {new} at {place}"), move |expect| {
            may.iter().for_each(|value| expect.shows(&volume, place, value, false));
        });
        self.run(command);
        let (volume, new) = (id.to_owned(), new.to_string());
        self.promise(&format!("{id} shows {new} at {place}"), move |expect| {
            expect.shows(&volume, place, &new, true)
        });
    }

    /// Attaches a volume.
    #[track_caller]
    pub fn attach(&mut self, id: &str) -> Guest {
        let (command, ready) = self.site.attach_command(id);
        let mut host = self.tape.begin(command);
        ready.wait(|| host.has_ended()).unwrap_or_else(|e| panic!("{e}"));
        let session = ready.connect().unwrap_or_else(|e| panic!("{e}"));
        self.seeds += 1 << 16;
        Guest { tape: self.tape.clone(), volume: id.into(), session, host, seeds: self.seeds }
    }
}

impl Guest {
    fn expect(&self, label: String, change: impl Fn(&mut Content) + Send + Sync + 'static) {
        let volume = self.volume.clone();
        self.tape.mark(mark(&label, move |expect| change(expect.content(&volume))));
    }

    #[track_caller]
    fn ask(&mut self, request: &Request) {
        let outcome = request.run(&mut self.session.rings[0]).expect("the request completes");
        assert_eq!(outcome.status, block::OK, "request {} at sector {}", request.kind, request.sector);
    }

    /// Writes other data to so many sectors from the first on.
    #[track_caller]
    pub fn write(&mut self, first: usize, count: usize) {
        self.seeds += 1;
        let seeds = vec![self.seeds; count];
        let data: Vec<u8> = (first..first + count).flat_map(|number| sector(number, self.seeds)).collect();
        let label = format!("the guest writes {first}+{count}");
        self.expect(label, move |content| content.may_become(first, &seeds));
        self.ask(&Request::write(first as u64, &data));
    }

    /// Makes so many sectors from the first on zeros.
    #[track_caller]
    pub fn write_zeroes(&mut self, first: usize, count: usize, unmap: bool) {
        let label = format!("the guest zeros {first}+{count}");
        self.expect(label, move |content| content.may_become(first, &vec![ZEROS; count]));
        let segment = Segment { sector: first as u64, count: count as u32, flags: unmap.into() };
        self.ask(&Request::write_zeroes(&[segment]));
    }

    /// Discards so many sectors from the first on, which have no layer below: they become zeros.
    #[track_caller]
    pub fn discard(&mut self, first: usize, count: usize) {
        let label = format!("the guest discards {first}+{count}");
        self.expect(label, move |content| content.may_become(first, &vec![ZEROS; count]));
        self.ask(&Request::discard(&[Segment { sector: first as u64, count: count as u32, flags: 0 }]));
    }

    /// Flushes.
    #[track_caller]
    pub fn flush(&mut self) {
        self.ask(&Request::flush());
        self.expect("the guest's flush is done".into(), Content::flush);
    }

    /// The front-end goes, and the volume is detached.
    #[track_caller]
    pub fn detach(self, script: &Script) {
        let Guest { volume, session, host, .. } = self;
        drop(session);
        script.run(&["detach", &volume]);
        // Durable when it is answered, although nobody promised it to the guest.
        let id = volume.clone();
        script.promise(&format!("{volume} is detached"), move |expect| expect.content(&id).flush());
        let status = host.wait();
        assert!(status.success(), "attach ended with {status}");
    }
}
