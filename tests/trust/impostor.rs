//! A process that has a volume, and is no sealblk: it holds the lock and answers on the control socket what
//! it likes. A guest that has broken into its host process can do that much.

use crate::common::attach::Place;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use sealblk::catalog::VolumeId;
use sealblk::catalog::lock::{Holder, LockFile, Purpose, VolumeLock};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, IoSlice, IoSliceMut, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// The volume `t` of a place, held by this test.
pub struct Impostor {
    folder: PathBuf,
    size: u64,
    listener: UnixListener,
    lock_file: LockFile,
    _lock: VolumeLock,
}

/// One client of its.
pub struct Talk {
    /// The volume's folder.
    pub folder: PathBuf,
    /// What the client asks for.
    pub request: Value,
    /// The open file by which the volume is locked.
    pub lock: OwnedFd,
    size: u64,
    lines: BufReader<UnixStream>,
}

impl Impostor {
    /// Takes the volume.
    pub fn new(place: &Place) -> Self {
        let (folder, metadata) = (place.volume_folder(), place.metadata());
        let id: VolumeId = metadata.id();
        let holder = Holder::this_process(Purpose::Attach, None).unwrap();
        let lock_file = LockFile::open(&folder, id).unwrap();
        let lock = lock_file.acquire(&holder).unwrap();
        let listener = UnixListener::bind(folder.join("control.sock")).unwrap();
        Impostor { folder, size: metadata.size(), listener, lock_file, _lock: lock }
    }

    /// Has `talk` answer the one client that `act` sends.
    pub fn answers<T>(self, talk: impl FnOnce(&mut Talk) + Send, act: impl FnOnce() -> T) -> T {
        let result = std::thread::scope(|threads| {
            let (listener, folder, size) =
                (self.listener.try_clone().unwrap(), self.folder.clone(), self.size);
            let lock = self.lock_file.descriptor().try_clone_to_owned().unwrap();
            let server = threads.spawn(move || {
                let (client, _) = listener.accept().unwrap();
                let mut lines = BufReader::new(client);
                let mut line = String::new();
                lines.read_line(&mut line).unwrap();
                // Whoever only looked whether somebody listens says nothing.
                let Ok(request) = serde_json::from_str(&line) else { return };
                talk(&mut Talk { folder, request, lock, size, lines });
            });
            let result = act();
            // Where the client never came, nobody else does.
            let _ = UnixStream::connect(self.folder.join("control.sock"));
            server.join().unwrap();
            result
        });
        fs::remove_file(self.folder.join("control.sock")).unwrap();
        result
    }
}

impl Talk {
    /// Says something to the client, who may have gone.
    pub fn say(&mut self, what: &Value) {
        let _ = self.lines.get_mut().write_all(format!("{what}\n").as_bytes());
    }

    /// Says something, and passes these descriptors with it.
    pub fn say_with(&mut self, what: &Value, descriptors: &[BorrowedFd<'_>]) {
        let line = format!("{what}\n");
        let fds: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let (data, control) = ([IoSlice::new(line.as_bytes())], [ControlMessage::ScmRights(&fds)]);
        let socket = self.lines.get_ref().as_raw_fd();
        let _ = sendmsg::<()>(socket, &data, &control, MsgFlags::MSG_NOSIGNAL, None);
    }

    /// What the client says next.
    pub fn hear(&mut self) -> Option<Value> {
        let mut line = String::new();
        self.lines.read_line(&mut line).ok()?;
        serde_json::from_str(&line).ok()
    }

    /// Where the client wants the new layer.
    pub fn layer(&self) -> PathBuf {
        self.folder
            .join(format!("{}.img", self.request["layer"].as_str().expect("the client names the layer")))
    }

    /// Makes the new layer as it should be, and says so.
    pub fn make_layer(&mut self) {
        File::create_new(self.layer()).unwrap().set_len(self.size).unwrap();
        self.say(&json!("layer-made"));
    }

    /// Makes the new layer, and proposes this record when the client wants the freeze.
    pub fn propose(&mut self, record: impl FnOnce(&mut Value)) {
        self.make_layer();
        assert_eq!(self.hear().expect("the client goes on")["step"], "pause");
        let mut proposed = truthful(&self.folder, &self.request);
        record(&mut proposed);
        self.say(&json!({"frozen": {"record": proposed.to_string(), "pause_us": 1}}));
    }
}

/// The record of a snapshot as it was asked for, of the volume whose folder this is.
fn truthful(folder: &Path, request: &Value) -> Value {
    let volume: Value = serde_json::from_slice(&fs::read(folder.join("volume.json")).unwrap()).unwrap();
    let mut record = json!({
        "format": 1, "id": request["id"], "volume": volume["id"], "copy_of": null, "created": "2026-01-31T23:59:59Z",
        "description": request["description"], "tags": request["tags"], "sealed_as": request["id"],
        "mac": volume["mac"],
    });
    for field in ["size", "sector_size", "encrypted", "keys", "layers", "hydrate"] {
        record[field] = volume[field].clone();
    }
    record
}

impl Impostor {
    /// What the client that `act` sends says first, with the descriptor that comes with
    /// it. It gets no answer.
    pub fn overhears<T>(self, act: impl FnOnce() -> T) -> (Value, OwnedFd) {
        std::thread::scope(|threads| {
            let listener = self.listener.try_clone().unwrap();
            let server = threads.spawn(move || {
                let (client, _) = listener.accept().unwrap();
                let (mut line, mut fd) = (Vec::new(), None);
                while !line.ends_with(b"\n") {
                    let mut part = [0; 4096];
                    let mut space = nix::cmsg_space!([RawFd; 1]);
                    let mut data = [IoSliceMut::new(&mut part)];
                    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
                    let message =
                        recvmsg::<()>(client.as_raw_fd(), &mut data, Some(&mut space), flags).unwrap();
                    for control in message.cmsgs().unwrap() {
                        if let ControlMessageOwned::ScmRights(fds) = control {
                            // SAFETY: the kernel just made this descriptor for us; nobody else knows it.
                            fd = fds.first().map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) });
                        }
                    }
                    let bytes = message.bytes;
                    assert!(bytes > 0, "the client has gone");
                    line.extend_from_slice(&part[..bytes]);
                }
                (serde_json::from_slice(&line).unwrap(), fd.expect("a descriptor came with it"))
            });
            act();
            server.join().unwrap()
        })
    }
}
