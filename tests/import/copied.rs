//! Raw images, and what is the same for all.

use crate::common::content::Reader;
use crate::rig::{QemuIo, Rig, files, overwrite, qemu};
use nix::libc::c_void;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use serde_json::json;
use std::fs;
use std::num::NonZeroUsize;
use std::os::unix::fs::MetadataExt;
use std::ptr::NonNull;

const LEN: usize = 8 << 20;

#[test]
fn a_raw_image_is_encrypted_sealed_and_what_a_guest_finds() {
    for arguments in [&[][..], &["--sector-size", "4096", "--preallocate"], &["--unencrypted"]] {
        let rig = Rig::new();
        let data = rig.raw("disk.img", LEN);
        let tags = ["--name", "v", "--tag", "env=prod"];
        let made = rig.import(&[&[&*rig.path("disk.img")], &tags[..], arguments].concat());
        let encrypted = !arguments.contains(&"--unencrypted");
        assert_eq!((&made["encrypted"], &made["size"]), (&json!(encrypted), &json!(LEN)));
        assert_eq!((&made["name"], &made["tags"]), (&json!("v"), &json!({"env": "prod"})));
        let id = made["id"].as_str().unwrap();
        let metadata: serde_json::Value = serde_json::from_slice(
            &fs::read(rig.store.root().join("volumes").join(id).join("volume.json")).unwrap(),
        )
        .unwrap();
        assert_eq!(metadata["mac"].is_string(), encrypted);
        rig.assert_holds("v", &data);
        rig.assert_guest_finds("v", &data);
        let event = &rig.events("createVolume")[0]["detail"];
        assert_eq!((&event["result"], &event["cause"]), (&json!("available"), &json!("")));
    }
}

#[test]
fn the_data_key_is_in_no_file_and_nothing_of_the_image_in_the_store() {
    let rig = Rig::new();
    let data = rig.raw("disk.img", LEN);
    rig.import(&[&rig.path("disk.img"), "--name", "v", "-vv"]);
    rig.store.ok(&["volume", "export", "v", &rig.path("out.img"), "-vv"]);
    let reader = Reader::new(&rig.store.root(), rig.store.config());
    let volume = reader.volume("v");
    let dek = &reader.deks(volume.layout(), &volume.encryption_context())[0];
    let halves = [&dek[..32], &dek[32..]];
    let forms = halves.map(|half| [half.to_vec(), hex::encode(half).into_bytes()]).concat();
    let mut folders = vec![rig.folder()];
    let mut looked_at = 0;
    while let Some(folder) = folders.pop() {
        for path in files(&folder) {
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let bytes = fs::read(&path).unwrap();
            let holds = |what: &[u8]| is_in(what, &bytes);
            assert!(!forms.iter().any(|form| holds(form)), "{} holds the data key", path.display());
            let of_store = path.starts_with(rig.store.root());
            assert!(!of_store || !holds(&data[4096..4160]), "{} holds plaintext", path.display());
            looked_at += 1;
        }
    }
    assert!(looked_at > 5);
}

/// Whether `bytes` hold `what` anywhere.
fn is_in(what: &[u8], bytes: &[u8]) -> bool {
    bytes.iter().enumerate().any(|(at, byte)| *byte == what[0] && bytes[at..].starts_with(what))
}

#[test]
fn zeros_take_no_space_whether_they_are_holes_or_written() {
    let rig = Rig::new();
    let mut data = rig.raw("disk.img", 64 << 20);
    let written = vec![0; 4 << 20];
    overwrite(rig.path("disk.img"), 8 << 20, &written);
    overwrite(rig.path("disk.img"), 20 << 20, &[1]);
    data[20 << 20] = 1;
    rig.import(&[&rig.path("disk.img"), "--name", "v"]);
    rig.assert_holds("v", &data);
    let blocks = fs::metadata(rig.store.only_layer()).unwrap().blocks() * 512;
    assert!((370_000..1 << 20).contains(&blocks), "{blocks} bytes");
}

#[test]
fn an_image_that_is_no_whole_sectors_has_zeros_at_its_end() {
    for (sector_size, size) in [("512", LEN + 512), ("4096", LEN + 4096)] {
        let rig = Rig::new();
        let data = rig.raw("disk.img", LEN + 1);
        let arguments = [&rig.path("disk.img"), "--name", "v", "--sector-size", sector_size];
        assert_eq!(rig.import(&arguments)["size"], size);
        rig.assert_holds("v", &data);
        rig.assert_guest_finds("v", &data);
    }
}

#[test]
fn a_volume_can_be_larger_than_its_image_and_not_smaller() {
    let rig = Rig::new();
    let data = rig.raw("disk.img", LEN);
    let said = rig.refuse(2, &["volume", "import", &rig.path("disk.img"), "--size", "7MiB"]);
    assert!(said.contains("8388608 at least"), "{said}");
    assert_eq!(rig.import(&[&rig.path("disk.img"), "--name", "v", "--size", "20MiB"])["size"], 20 << 20);
    rig.assert_holds("v", &data);
    rig.assert_guest_finds("v", &data);
}

#[test]
fn what_a_file_is_is_not_decided_by_its_beginning_alone() {
    let rig = Rig::new();
    let mut data = rig.raw("disk.img", LEN);
    // As the guest of a raw disk can write it.
    overwrite(rig.path("disk.img"), 0, b"QFI\xfb\0\0\0\x03");
    data[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    let said = rig.refuse(2, &["volume", "import", &rig.path("disk.img")]);
    assert!(said.contains("say --format qcow2 or --format raw"), "{said}");
    rig.import(&[&rig.path("disk.img"), "--format", "raw", "--name", "v"]);
    rig.assert_holds("v", &data);
    for (name, start, words) in [
        ("a.qcow2", &b"\0\0\0\0"[..], "does not begin like it"),
        ("b.img", b"KDMV", "like VMDK"),
        ("c.img", b"vhdxfile", "like VHDX"),
    ] {
        rig.raw(name, LEN);
        overwrite(rig.path(name), 0, start);
        let said = rig.refuse(2, &["volume", "import", &rig.path(name)]);
        assert!(said.contains(words), "{said}");
    }
}

#[test]
fn what_is_no_image_is_refused_and_nothing_is_made() {
    let rig = Rig::new();
    rig.raw("disk.img", LEN);
    fs::write(rig.path("empty.img"), "").unwrap();
    let pipe = rig.folder().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    for (code, arguments, words) in [
        (3, &["missing.img"][..], "missing.img"),
        (2, &["empty.img"], "it is empty"),
        // Whoever has its other end may be another user, or nobody, and is not waited for.
        (2, &["pipe"], "a stream is taken from standard input"),
        (2, &["root"], "neither a file nor a block device"),
        #[cfg(feature = "qcow2")]
        (2, &["disk.img", "--format", "qcow2"], "no qcow2 image"),
        (2, &["disk.img", "--format", "vmdk"], "none of raw, qcow2"),
        (3, &["disk.img", "--key", "alias/other"], "no KMS store"),
    ] {
        fs::create_dir_all(rig.store.root()).unwrap();
        let path = rig.path(arguments[0]);
        let said = rig.refuse(code, &[&["volume", "import", &path], &arguments[1..]].concat());
        assert!(said.contains(words), "{said}");
    }
    rig.store.configure("encrypt-by-default = true\n");
    let said = rig.refuse(2, &["volume", "import", &rig.path("disk.img"), "--unencrypted"]);
    assert!(said.contains("encrypt-by-default"), "{said}");
    rig.assert_nothing_is_left();
}

#[test]
fn a_name_that_is_taken_is_refused_before_anything_is_copied() {
    let rig = Rig::new();
    rig.raw("disk.img", LEN);
    rig.import(&[&rig.path("disk.img"), "--name", "v"]);
    let layers = files(&rig.store.root().join("layers"));
    let said = rig.refuse(4, &["volume", "import", &rig.path("disk.img"), "--name", "v"]);
    assert!(said.contains("has the name \"v\" already"), "{said}");
    assert_eq!(files(&rig.store.root().join("layers")), layers);
}

#[test]
fn an_image_that_somebody_has_open_for_writing_is_refused() {
    let rig = Rig::new();
    let data = rig.raw("disk.img", LEN);
    let writer = fs::File::options().read(true).write(true).open(rig.path("disk.img")).unwrap();
    for arguments in [&[][..], &["--in-place"]] {
        let said = rig.refuse(4, &[&["volume", "import", &rig.path("disk.img")], arguments].concat());
        let words = format!("process {} ", std::process::id());
        assert!(said.contains(&words) && said.contains("open for writing"), "{said}");
    }
    rig.assert_nothing_is_left();
    assert!(fs::read(rig.path("disk.img")).unwrap() == data);
    // A mapping outlives its descriptor, and is not found among the descriptors.
    let mapped = Mapped::of(writer);
    let said = rig.refuse(4, &["volume", "import", &rig.path("disk.img")]);
    assert!(said.contains("another process has"), "{said}");
    drop(mapped);
    let _reader = fs::File::open(rig.path("disk.img")).unwrap();
    rig.import(&[&rig.path("disk.img"), "--name", "v"]);
    rig.assert_holds("v", &data);
}

/// A page of a file, mapped shared and writable; nothing else has the file open.
struct Mapped(NonNull<c_void>);

impl Mapped {
    fn of(file: fs::File) -> Self {
        let (len, rights) = (NonZeroUsize::new(4096).unwrap(), ProtFlags::PROT_READ | ProtFlags::PROT_WRITE);
        // SAFETY: it is mapped where nothing is, and nobody uses the memory.
        Mapped(unsafe { mmap(None, len, rights, MapFlags::MAP_SHARED, &file, 0) }.expect("map it"))
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: this is the whole mapping, and nobody uses the memory.
        unsafe { munmap(self.0, 4096) }.expect("unmap it");
    }
}

#[test]
fn an_image_that_is_changed_while_it_is_open_is_no_image_of_one_moment() {
    use sealblk::image::{BackingFiles, Image};
    let rig = Rig::new();
    rig.raw("disk.img", LEN);
    let path = rig.path("disk.img");
    let open = || Image::open(path.as_ref(), None, BackingFiles::Refuse).unwrap();
    // The clock of files may stand still for some milliseconds.
    fs::File::open(&path).unwrap().set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    let image = open();
    image.check_unchanged().unwrap();
    overwrite(&path, 4096, &[7]);
    let e = image.check_unchanged().unwrap_err();
    assert!(e.to_string().contains("was changed while it was copied"), "{e}");
    let image = open();
    let _writer = fs::File::options().write(true).open(&path).unwrap();
    let e = image.check_unchanged().unwrap_err();
    assert!(e.to_string().contains("open for writing"), "{e}");
}

#[test]
fn an_image_that_qemu_writes_is_refused_and_cannot_be_written_meanwhile() {
    let rig = Rig::new();
    rig.raw("disk.img", LEN);
    let qemu_io = QemuIo::on(&rig.path("disk.img"));
    let said = rig.refuse(4, &["volume", "import", &rig.path("disk.img")]);
    assert!(said.contains("is open in QEMU"), "{said}");
    drop(qemu_io);
    rig.import(&[&rig.path("disk.img")]);
    qemu("qemu-img", &["resize", "-q", "-f", "raw", &rig.path("disk.img"), "9M"]);
}
