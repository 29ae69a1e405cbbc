//! qcow2 images that somebody made to do harm: each is an error or some content, and never anything else.

use crate::rig::{Rig, overwrite, qemu};
use sealblk::image::{BackingFiles, Format, Image};
use std::fs;
use std::path::Path;

const LEN: usize = 2 << 20;

/// Reads all of an image, as an import does.
fn read_all(path: &Path) -> sealblk::base::Result<u64> {
    let image = Image::open(path, Some(Format::Qcow2), BackingFiles::Refuse)?;
    let mut room = vec![0; 256 << 10];
    let (mut at, mut sum) = (0, 0);
    // What a header says can be far more than there is; the bytes that there are, are soon read.
    while let Some(data) = image.next_data(at)?.filter(|_| sum < 64 << 20) {
        assert!(data.start >= at && data.end > data.start && data.end <= image.size());
        let part = (data.end - data.start).min(room.len() as u64) as usize;
        image.read(data.start, &mut room[..part])?;
        at = data.start + part as u64;
        sum += part as u64;
    }
    Ok(sum)
}

/// A generator of numbers that are the same in every run.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self, below: u64) -> u64 {
        // Xorshift (Marsaglia 2003).
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below
    }
}

/// Numbers that are on an edge somewhere.
const EDGES: [u64; 12] = [
    0,
    1,
    0x1ff,
    0x200,
    0x10000,
    1 << 62,
    1 << 63,
    (1 << 62) | 0x1ff,
    (1 << 63) | 0x10000,
    0x00ff_ffff_ffff_fe00,
    u64::MAX >> 1,
    u64::MAX,
];

#[test]
fn whatever_its_tables_say_it_is_an_error_or_some_content() {
    let rig = Rig::new();
    rig.raw("disk.img", LEN);
    for (n, options) in
        [&["-o", "cluster_size=4k"][..], &["-c", "-o", "cluster_size=4k"], &["-o", "compat=0.10"]]
            .iter()
            .enumerate()
    {
        let image = rig.folder().join(format!("{n}.qcow2"));
        let names = [rig.path("disk.img"), image.display().to_string()];
        let names = names.each_ref().map(String::as_str);
        qemu("qemu-img", &[&["convert", "-f", "raw", "-O", "qcow2"], *options, &names].concat());
        let whole = fs::read(&image).unwrap();
        assert!(read_all(&image).unwrap() > 0);
        let word = |at: usize| u64::from_be_bytes(whole[at..at + 8].try_into().unwrap());
        let l1 = word(40) as usize;
        let l2 = (word(l1) & 0x00ff_ffff_ffff_fe00) as usize;
        let (mut numbers, mut errors) = (Numbers(0x5eed + n as u64), 0);
        const ROUNDS: u32 = 1500;
        for _ in 0..ROUNDS {
            // Where it hurts: the header and its extensions, the L1 table, the first L2 table.
            let (start, len) = [(0, 0x200), (l1, 64), (l2, 1 << 12)][numbers.next(3) as usize];
            let at = start + numbers.next(len) as usize / 8 * 8;
            let value = match numbers.next(3) {
                0 => EDGES[numbers.next(EDGES.len() as u64) as usize],
                1 => word(at) ^ (1 << numbers.next(64)),
                _ => numbers.next(u64::MAX),
            };
            overwrite(&image, at as u64, &value.to_be_bytes());
            errors += u32::from(read_all(&image).is_err());
            overwrite(&image, at as u64, &whole[at..at + 8]);
        }
        assert!((ROUNDS / 10..ROUNDS).contains(&errors), "{errors} of {ROUNDS} were refused");
        assert!(read_all(&image).unwrap() > 0);
    }
}

#[test]
fn a_secret_file_that_it_names_is_not_read() {
    let rig = Rig::new();
    let secret = rig.path("secret");
    fs::write(&secret, vec![b's'; 1 << 20]).unwrap();
    let image = rig.path("x.qcow2");
    qemu("qemu-img", &["create", "-q", "-f", "qcow2", "-u", "-b", &secret, "-F", "raw", &image, "1M"]);
    let said = rig.refuse(2, &["volume", "import", &image]);
    assert!(said.contains("based on another file"), "{said}");
    // The other way to name one.
    let mut command = std::process::Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2", "-o"]);
    command.arg(format!("data_file={secret},data_file_raw=on")).args([&*image, "1M"]);
    assert!(command.status().unwrap().success());
    let data_file = fs::metadata(&secret).unwrap().len();
    assert_eq!(data_file, 1 << 20);
    for arguments in [&[][..], &["--backing-files"]] {
        let said = rig.refuse(8, &[&["volume", "import", &image], arguments].concat());
        assert!(said.contains("its data lies in another file"), "{said}");
    }
    rig.assert_nothing_is_left();
}

#[test]
fn a_disk_of_an_absurd_size_is_refused_before_anything_is_made() {
    let rig = Rig::new();
    let image = rig.path("x.qcow2");
    qemu("qemu-img", &["create", "-q", "-f", "qcow2", &image, "1M"]);
    for (size, words) in [(1u64 << 62, "L1 table"), (u64::MAX, "a disk of")] {
        overwrite(&image, 24, &size.to_be_bytes());
        let said = rig.refuse(7, &["volume", "import", &image]);
        assert!(said.contains(words), "{said}");
    }
    rig.assert_nothing_is_left();
}
