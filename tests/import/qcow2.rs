//! qcow2 images as QEMU makes them.

use crate::rig::{Rig, overwrite, qemu};
use std::fs;

const LEN: usize = 8 << 20;

#[test]
fn what_qemu_writes_is_read_whatever_its_options() {
    let rig = Rig::new();
    let data = rig.raw("disk.img", LEN);
    for (n, options) in [
        &[][..],
        &["-c"],
        &["-o", "compat=0.10"],
        &["-o", "cluster_size=512"],
        &["-o", "cluster_size=2M"],
        &["-o", "refcount_bits=1"],
        &["-o", "preallocation=metadata"],
        &["-o", "lazy_refcounts=on"],
        &["-c", "-o", "cluster_size=4k,compat=0.10"],
    ]
    .into_iter()
    .enumerate()
    {
        let (image, name) = (rig.path(&format!("{n}.qcow2")), format!("v{n}"));
        let raw = rig.path("disk.img");
        qemu("qemu-img", &[&["convert", "-f", "raw", "-O", "qcow2"], options, &[&raw, &image]].concat());
        let size = ["512", "4096"][n % 2];
        let made = rig.import(&[&image, "--name", &name, "--sector-size", size]);
        assert_eq!(made["size"], LEN, "{options:?}");
        rig.assert_holds(&name, &data);
    }
    rig.assert_guest_finds("v1", &data);
}

#[test]
fn zero_clusters_snapshots_and_odd_sizes_are_read() {
    let rig = Rig::new();
    let mut data = rig.raw("disk.img", LEN + 512 * 7);
    let image = rig.path("disk.qcow2");
    qemu("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &rig.path("disk.img"), &image]);
    qemu("qemu-img", &["snapshot", "-c", "before", &image]);
    qemu(
        "qemu-io",
        &["-c", "write -z 64k 64k", "-c", "write -z -u 128k 64k", "-c", "write -P 9 100k 3k", &image],
    );
    data[64 << 10..192 << 10].fill(0);
    data[100 << 10..103 << 10].fill(9);
    rig.import(&[&image, "--name", "v"]);
    rig.assert_holds("v", &data);
    rig.assert_guest_finds("v", &data);
}

#[test]
fn an_image_that_guests_wrote_in_pieces_is_read() {
    let rig = Rig::new();
    let image = rig.path("disk.qcow2");
    qemu("qemu-img", &["create", "-q", "-f", "qcow2", &image, &format!("{}", LEN + 512)]);
    qemu(
        "qemu-io",
        &["-c", "write -P 1 512 512", "-c", "write -P 2 8M 512", "-c", "write -P 3 5M 1k", &image],
    );
    let mut data = vec![0; LEN + 512];
    for (value, at, len) in [(1, 512, 512), (2, LEN, 512), (3, 5 << 20, 1024)] {
        data[at..at + len].fill(value);
    }
    rig.import(&[&image, "--name", "v"]);
    rig.assert_holds("v", &data);
}

/// `top.qcow2` over `middle.qcow2` over `disk.img`.
fn chain(rig: &Rig) -> Vec<u8> {
    let mut data = rig.raw("disk.img", LEN);
    let (middle, top) = (rig.path("middle.qcow2"), rig.path("top.qcow2"));
    qemu("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "disk.img", "-F", "raw", &middle, "12M"]);
    qemu(
        "qemu-io",
        &["-c", "write -P 5 1M 64k", "-c", "write -z 0 64k", "-c", "write -P 6 10M 64k", &middle],
    );
    qemu("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "middle.qcow2", "-F", "qcow2", &top]);
    qemu("qemu-io", &["-c", "write -P 7 1080k 8k", &top]);
    data.resize(12 << 20, 0);
    data[..64 << 10].fill(0);
    data[1 << 20..(1 << 20) + (64 << 10)].fill(5);
    data[10 << 20..(10 << 20) + (64 << 10)].fill(6);
    data[1080 << 10..1088 << 10].fill(7);
    data
}

#[test]
fn backing_files_are_read_when_that_is_asked_for_and_only_then() {
    let rig = Rig::new();
    let data = chain(&rig);
    let said = rig.refuse(2, &["volume", "import", &rig.path("top.qcow2")]);
    assert!(
        said.contains("based on another file, \"middle.qcow2\"") && said.contains("--backing-files"),
        "{said}"
    );
    rig.assert_nothing_is_left();
    rig.import(&[&rig.path("top.qcow2"), "--backing-files", "--name", "v"]);
    rig.assert_holds("v", &data);
    rig.assert_guest_finds("v", &data);
}

#[test]
fn a_backing_file_that_is_not_what_it_should_be_is_refused() {
    let rig = Rig::new();
    chain(&rig);
    let (image, import) =
        (rig.path("x.qcow2"), ["volume", "import", &rig.path("x.qcow2"), "--backing-files"]);
    let create = |arguments: &[&str]| {
        let _ = fs::remove_file(&image);
        qemu("qemu-img", &[&["create", "-q", "-f", "qcow2", "-u"], arguments, &[&image, "8M"]].concat());
    };
    for (arguments, code, words) in [
        (&["-b", "nbd://host/disk", "-F", "raw"][..], 2, "not a file's path"),
        (&["-b", "json:{\"driver\":\"null-co\"}", "-F", "raw"], 2, "not a file's path"),
        (&["-b", "gone.img", "-F", "raw"], 3, "gone.img"),
        (&["-b", "disk.img", "-F", "vmdk"], 2, "of format \"vmdk\""),
        (&["-b", "disk.img", "-F", "qcow2"], 2, "no qcow2 image"),
        (&["-b", "x.qcow2", "-F", "qcow2"], 8, "more than 32 files"),
        (&["-b", "root", "-F", "raw"], 2, "neither a file nor a block device"),
    ] {
        fs::create_dir_all(rig.store.root()).unwrap();
        create(arguments);
        let said = rig.refuse(code, &import);
        assert!(said.contains(words), "{arguments:?}: {said}");
    }
    rig.assert_nothing_is_left();
}

#[test]
fn version_2_says_what_its_backing_file_is_and_if_not_there_is_a_way() {
    let rig = Rig::new();
    let mut data = rig.raw("disk.img", LEN);
    let image = rig.path("old.qcow2");
    let options = ["create", "-q", "-f", "qcow2", "-o", "compat=0.10", "-b", "disk.img", "-F", "raw", &image];
    qemu("qemu-img", &options);
    qemu("qemu-io", &["-c", "write -P 5 1M 64k", &image]);
    data[1 << 20..(1 << 20) + (64 << 10)].fill(5);
    assert_eq!(fs::read(&image).unwrap()[4..8], [0, 0, 0, 2]);
    rig.import(&[&image, "--backing-files", "--name", "v"]);
    rig.assert_holds("v", &data);
    // As old versions of QEMU wrote it: no extension says the format.
    overwrite(&image, 72, &[0; 8]);
    let said = rig.refuse(2, &["volume", "import", &image, "--backing-files"]);
    let command = said.split('"').find(|part| part.starts_with("qemu-img rebase")).expect("a command");
    let command = command.replace("FORMAT", "raw");
    let arguments: Vec<&str> = command.split(' ').skip(1).collect();
    qemu("qemu-img", &arguments);
    rig.import(&[&image, "--backing-files", "--name", "w"]);
    rig.assert_holds("w", &data);
}

#[test]
fn a_cut_off_image_is_an_error_and_not_zeros() {
    let rig = Rig::new();
    let data = rig.raw("disk.img", LEN);
    for (name, options) in [("a.qcow2", &[][..]), ("b.qcow2", &["-c"])] {
        let image = rig.path(name);
        let raw = rig.path("disk.img");
        qemu("qemu-img", &[&["convert", "-f", "raw", "-O", "qcow2"], options, &[&raw, &image]].concat());
        let whole = fs::read(&image).unwrap();
        // Not even the last byte of the data can be missing.
        let end = whole.iter().rposition(|b| *b != 0).unwrap();
        for len in [3, 100, 1 << 16, 3 << 16, whole.len() / 2, end] {
            fs::write(&image, &whole[..len]).unwrap();
            let output = rig.store.run(&["volume", "import", &image, "--name", "v"]);
            if output.status.success() {
                // Of compressed data, what was cut off may have been nothing but padding.
                assert_eq!((name, len), ("b.qcow2", end));
                rig.assert_holds("v", &data);
                rig.store.ok(&["volume", "delete", "v"]);
                continue;
            }
            let said = String::from_utf8_lossy(&output.stderr);
            let code = output.status.code();
            assert!(matches!(code, Some(1 | 2 | 7)), "{name} of {len} bytes: {code:?} {said}");
        }
    }
    rig.assert_nothing_is_left();
}

#[test]
fn kinds_of_qcow2_that_are_not_read_are_refused_with_a_way_out() {
    let rig = Rig::new();
    let image = rig.path("x.qcow2");
    for (options, words) in [
        (&["-o", "compression_type=zstd"][..], "compressed with zstd"),
        (&["-o", "extended_l2=on"], "extended L2"),
        (&["-o", "data_file=data.raw"], "in another file"),
        (
            &[
                "--object",
                "secret,id=s,data=x",
                "-o",
                "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
            ],
            "it is encrypted",
        ),
    ] {
        let _ = fs::remove_file(&image);
        let mut command = std::process::Command::new("qemu-img");
        command.current_dir(rig.folder());
        command.args(["create", "-q", "-f", "qcow2"]).args(options).args([&image, "8M"]);
        assert!(command.status().unwrap().success(), "{options:?}");
        let said = rig.refuse(8, &["volume", "import", &image]);
        assert!(said.contains(words) && said.contains("qemu-img convert"), "{options:?}: {said}");
        let command = said.split('"').find(|part| part.starts_with("qemu-img")).expect("a command");
        fs::write(rig.path("PASSPHRASE_FILE"), "x").unwrap();
        let mut convert = std::process::Command::new("sh");
        convert.arg("-ec").arg(command).current_dir(rig.folder());
        assert!(convert.status().unwrap().success(), "{command}");
        rig.import(&[&rig.path("x.new.qcow2"), "--name", "v"]);
        rig.assert_holds("v", &[0; 8 << 20]);
        rig.store.ok(&["volume", "delete", "v"]);
    }
    rig.assert_nothing_is_left();
}
