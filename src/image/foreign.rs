//! Files that hold a disk, or something else, in a form that is not read here: what they are, and which
//! command makes a raw or qcow2 image of them.
//!
//! Such a file must not be taken for a raw image: the guest would find noise where its disk should be.
//! Sources: the formats' own descriptions, and the probes of QEMU (block/). Pure: it looks at the first and
//! last bytes, and opens nothing.
#![forbid(unsafe_code)]

use crate::image::header;
use std::ffi::OsStr;
use std::path::Path;

/// So many bytes of a file's beginning are looked at.
pub(super) const START: usize = 4096;
/// So many of its end.
pub(super) const END: usize = 512;

/// A form that is not read here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Foreign {
    /// What people call it.
    name: &'static str,
    /// Where it shows that.
    shows: Shows,
    /// What makes an image of it.
    way: Way,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shows {
    Begins,
    Ends,
}

/// What makes an image of a file. In a command, `{in}` is the file's path and `{out}` its name without its
/// last ending.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// A program that unpacks from standard input to standard output.
    Filter(&'static str),
    /// `qemu-img convert`, which has this name for the format.
    Convert(&'static str),
    /// Another command: what it does to the file, the command, and what is to be done then.
    Command(&'static str, &'static str, &'static str),
    /// There is no command.
    Words(&'static str),
}

const fn begins(name: &'static str, way: Way) -> Foreign {
    Foreign { name, shows: Shows::Begins, way }
}

const fn ends(name: &'static str, way: Way) -> Foreign {
    Foreign { name, shows: Shows::Ends, way }
}

const ENCRYPTED: Way = Way::Words("it is encrypted; decrypt it first");

/// What is known by fixed bytes at a fixed place of the beginning.
const BEGINNINGS: [(usize, &[u8], Foreign); 39] = [
    (0, b"\x1f\x8b\x08", begins("gzip", Way::Filter("gzip --decompress"))),
    (0, b"\xfd7zXZ\0", begins("xz", Way::Filter("xz --decompress"))),
    (0, b"\x28\xb5\x2f\xfd", begins("zstd", Way::Filter("zstd --decompress"))),
    (0, b"\x04\x22\x4d\x18", begins("lz4", Way::Filter("lz4 -d"))),
    (0, b"\x02\x21\x4c\x18", begins("lz4", Way::Filter("lz4 -d"))),
    (0, b"LZIP\x01", begins("lzip", Way::Filter("lzip --decompress"))),
    (0, b"\x89LZO\0\r\n\x1a\n", begins("lzop", Way::Filter("lzop --decompress"))),
    (0, b"\x1f\x9d", begins("compress", Way::Filter("gzip --decompress"))),
    (0, b"PK\x03\x04", begins("zip", UNZIP)),
    (0, b"PK\x05\x06", begins("zip", UNZIP)),
    (0, b"7z\xbc\xaf\x27\x1c", begins("7z", Way::Command("unpack", "7z x {in}", ""))),
    (0, b"Rar!\x1a\x07", begins("RAR", Way::Command("unpack", "unrar x {in}", ""))),
    (0, b"070701", begins("cpio", Way::Command("unpack", "cpio --extract --file={in}", ""))),
    (0, b"070707", begins("cpio", Way::Command("unpack", "cpio --extract --file={in}", ""))),
    (0, b"KDMV", begins("VMDK", Way::Convert("vmdk"))),
    (0, b"COWD", begins("VMDK", Way::Convert("vmdk"))),
    (0, b"\xbe\xba\xfe\xca\0\0\0\0", begins("VMDK (SEsparse)", VMDK_PART)),
    (0, b"WithoutFreeSpace", begins("Parallels", Way::Convert("parallels"))),
    (0, b"WithouFreSpacExt", begins("Parallels", Way::Convert("parallels"))),
    (0, b"conectix", begins("VHD", Way::Convert("vpc"))),
    (0, b"vhdxfile", begins("VHDX", Way::Convert("vhdx"))),
    (0x40, b"\x7f\x10\xda\xbe", begins("VDI", Way::Convert("vdi"))),
    (0, b"QED\0", begins("QED", Way::Convert("qed"))),
    (0, b"Bochs Virtual HD Image\0", begins("Bochs", Way::Convert("bochs"))),
    (0, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop", begins("cloop", Way::Convert("cloop"))),
    (
        0,
        b"\x3a\xff\x26\xed\x01\0",
        begins("Android sparse", Way::Command("unpack", "simg2img {in} {out}.img", "")),
    ),
    (0, b"EVF\t\r\n\xff\0", begins("EWF", EWF)),
    (0, b"EVF2\r\n\x81\0", begins("EWF", EWF)),
    (0, b"partclone-image", begins("partclone", PARTCLONE)),
    (0, b"MSWIM\0\0\0", begins("WIM", Way::Words("it holds files and no disk"))),
    (0, b"LUKS\xba\xbe", begins("LUKS", LUKS)),
    (0, b"Salted__", begins("openssl enc", ENCRYPTED)),
    (0, b"age-encryption.org/", begins("age", ENCRYPTED)),
    (0, b"-----BEGIN AGE ENCRYPTED", begins("age", ENCRYPTED)),
    (0, b"-----BEGIN PGP MESSAGE", begins("PGP", ENCRYPTED)),
    (0, b"%PDF-", begins("PDF", NO_DISK)),
    (0, b"\x7fELF", begins("ELF", Way::Words("it is a program, not a disk"))),
    (0, b"<!DOCTYPE", begins("HTML", PAGE)),
    (0, b"<html", begins("HTML", PAGE)),
];

const UNZIP: Way = Way::Command("unpack", "unzip {in}", "");
const TAR: Way =
    Way::Command("unpack", "tar --extract --verbose --file={in}", "import or convert the disk that is in it");
const VMDK_PART: Way = Way::Words(
    "it is a part of a disk; convert the small file that lists the parts: \
     \"qemu-img convert -f vmdk -O qcow2 LIST.vmdk DISK.qcow2\"",
);
const EWF: Way = Way::Command("unpack", "ewfexport -f raw -t {out} {in}", "");
const PARTCLONE: Way =
    Way::Command("unpack", "partclone.restore --restore_raw_file --source {in} --output {out}.img", "");
const LUKS: Way = Way::Command(
    "decrypt",
    "qemu-img convert --object secret,id=key,file=PASSPHRASE_FILE --image-opts \
     driver=luks,key-secret=key,file.filename={in} -O qcow2 {out}.qcow2",
    "",
);
const NO_DISK: Way = Way::Words("it is a document, not a disk");
const PAGE: Way = Way::Words("it is a web page, not a disk; the download may have failed");

/// What a file is that begins with `start` and ends with `end`, where that is a form that is not read here.
/// Both may be shorter than [`START`] and [`END`], if the file is.
pub(super) fn recognise(start: &[u8], end: &[u8]) -> Option<Foreign> {
    let found = BEGINNINGS.iter().find(|(at, magic, _)| is_at(start, *at, magic));
    found
        .map(|(_, _, foreign)| with_details(*foreign, start))
        .or_else(|| by_form(start))
        .or_else(|| by_end(end))
}

fn is_at(bytes: &[u8], at: usize, magic: &[u8]) -> bool {
    bytes.get(at..).is_some_and(|rest| rest.starts_with(magic))
}

/// A sparse VMDK file that has no list of the disk's parts in it is one of the parts. Where the list would be
/// stands at byte 28, in sectors.
fn with_details(foreign: Foreign, start: &[u8]) -> Foreign {
    let Some(list_at) = number(start, 28, 8).filter(|_| is_at(start, 0, b"KDMV")) else { return foreign };
    let list_at = usize::try_from(list_at).ok().and_then(|sector| sector.checked_mul(512));
    match list_at.and_then(|at| start.get(at)) {
        Some(b'K' | 0) => Foreign { way: VMDK_PART, ..foreign },
        _ => foreign,
    }
}

/// A number of `len` bytes, the lowest first.
fn number(bytes: &[u8], at: usize, len: usize) -> Option<u64> {
    let bytes = bytes.get(at..at + len)?;
    Some(bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}

/// What takes more than one look.
fn by_form(start: &[u8]) -> Option<Foreign> {
    if is_bzip2(start) {
        return Some(begins("bzip2", Way::Filter("bzip2 --decompress")));
    }
    // A frame to be skipped, as parallel compressors write it first.
    if start.first().is_some_and(|b| b & 0xf0 == 0x50) && is_at(start, 1, b"\x2a\x4d\x18") {
        return Some(begins("zstd", Way::Filter("zstd --decompress")));
    }
    if is_lzma(start) {
        return Some(begins("lzma", Way::Filter("xz --format=lzma --decompress")));
    }
    if is_at(start, 0, &header::MAGIC) && is_at(start, 4, &[0, 0, 0, 1]) {
        return Some(begins("qcow (version 1)", Way::Convert("qcow")));
    }
    if is_vmdk_list(start) {
        return Some(begins("a VMDK descriptor", Way::Convert("vmdk")));
    }
    is_tar(start).then(|| begins("tar (an OVA is one)", TAR))
}

/// A number for the size of the blocks, and then the mark of a block, or of the end.
fn is_bzip2(start: &[u8]) -> bool {
    let mark = |mark| is_at(start, 4, mark);
    is_at(start, 0, b"BZh")
        && start.get(3).is_some_and(|digit| (b'1'..=b'9').contains(digit))
        && (mark(b"\x31\x41\x59\x26\x53\x59") || mark(b"\x17\x72\x45\x38\x50\x90"))
}

/// The old format has no magic number. The usual properties; a dictionary of 2^n bytes; a length that is
/// unknown or bearable; and the first byte of the coder, which is always 0.
fn is_lzma(start: &[u8]) -> bool {
    let (Some(dictionary), Some(len)) = (number(start, 1, 4), number(start, 5, 8)) else { return false };
    start[0] == 0x5d
        && dictionary.is_power_of_two()
        && dictionary >= 4096
        && (len == u64::MAX || (1..1 << 50).contains(&len))
        && start.get(13) == Some(&0)
}

/// Text whose first line that is no comment is the version (QEMU, `vmdk_probe`).
fn is_vmdk_list(start: &[u8]) -> bool {
    let begins_as_text = start.starts_with(b"#") || start.to_ascii_lowercase().starts_with(b"version=");
    let mut lines = start.split(|b| *b == b'\n').map(|line| line.trim_ascii());
    let mut first = lines.by_ref().take_while(|line| line.is_empty() || line.starts_with(b"#"));
    let is_named = first.any(|line| line.to_ascii_lowercase().starts_with(b"# disk descriptorfile"));
    if is_named {
        return true;
    }
    let version = start.split(|b| *b == b'\n').map(|line| line.trim_ascii());
    let mut version = version.skip_while(|line| line.is_empty() || line.starts_with(b"#"));
    begins_as_text
        && version.next().is_some_and(|line| {
            matches!(line.to_ascii_lowercase().as_slice(), b"version=1" | b"version=2" | b"version=3")
        })
}

/// A name, and the header's sum. POSIX's mark alone would miss the oldest, and be too little for a guest's
/// own bytes.
fn is_tar(start: &[u8]) -> bool {
    let Some(header) = start.get(..512).filter(|header| header[0] != 0) else { return false };
    let mut field = header[148..156].iter().copied().filter(|b| *b != b' ' && *b != 0);
    let told = field.try_fold(0u32, |sum, digit| match digit {
        b'0'..=b'7' => Some((sum << 3 | u32::from(digit - b'0')) & 0x00ff_ffff),
        _ => None,
    });
    let spaces = |(at, byte): (usize, &u8)| if (148..156).contains(&at) { 32 } else { u32::from(*byte) };
    told == Some(header.iter().enumerate().map(spaces).sum())
}

fn by_end(end: &[u8]) -> Option<Foreign> {
    const VHD: Foreign = ends("a VHD of fixed size", Way::Convert("vpc"));
    // Old programs left out the last byte.
    let is_vhd = |len: usize| end.len().checked_sub(len).is_some_and(|at| is_at(end, at, b"conectix"));
    let is_dmg = end.len().checked_sub(512).is_some_and(|at| is_at(end, at, b"koly\0\0\0\x04"));
    match (is_vhd(512) || is_vhd(511), is_dmg) {
        (true, _) => Some(VHD),
        (_, true) => Some(ends("DMG", Way::Convert("dmg"))),
        _ => None,
    }
}

impl Foreign {
    /// What the file at `path` is, and the command that makes an image of it.
    pub(super) fn advice(self, path: &Path) -> String {
        let (input, out) = words(path);
        self.sentence("it", &self.by_command("it", &input, &out))
    }

    /// The same for what comes from standard input.
    pub(super) fn advice_on_stream(self) -> String {
        let way = match self.way {
            Way::Filter(filter) => {
                format!("put its program between: \"{filter} | sealblk volume import - --size SIZE\"")
            }
            Way::Words(words) => words.into(),
            _ => format!("write it into a file, and {}", self.by_command("that", "FILE", "NEW")),
        };
        self.sentence("standard input", &way)
    }

    /// What to do with `what`, a file at `input`, of which `out` is going to be the image.
    fn by_command(self, what: &str, input: &str, out: &str) -> String {
        let (does, command, then) = match self.way {
            Way::Words(words) => return words.into(),
            Way::Filter(filter) => ("unpack", format!("{filter} --stdout {{in}} > {{out}}"), ""),
            Way::Convert(format) => {
                ("convert", format!("qemu-img convert -f {format} -O qcow2 {{in}} {{out}}.qcow2"), "")
            }
            Way::Command(does, command, then) => (does, command.to_owned(), then),
        };
        let command = command.replace("{in}", input).replace("{out}", out);
        let then = if then.is_empty() { String::new() } else { format!(", and {then}") };
        format!("{does} {what} with \"{command}\"{then}")
    }

    fn sentence(self, what: &str, way: &str) -> String {
        let shows = match self.shows {
            Shows::Begins => "begins",
            Shows::Ends => "ends",
        };
        format!(
            "{what} {shows} like {}; {way}. To take it byte for byte all the same, say --format raw",
            self.name
        )
    }
}

/// A command for a shell, about the file at `path`: `{in}` in it is the path, and `{out}` its name without
/// its last ending.
pub(super) fn command(template: &str, path: &Path) -> String {
    let (input, out) = words(path);
    template.replace("{in}", &input).replace("{out}", &out)
}

/// The file's path and its name without its last ending, for a shell. What a command makes gets another name
/// than the file.
fn words(path: &Path) -> (String, String) {
    let name = |name: Option<&OsStr>| name.unwrap_or_default().to_string_lossy().into_owned();
    let out = match path.extension() {
        Some(ending) if ending.eq_ignore_ascii_case("qcow2") => name(path.file_stem()) + ".new",
        Some(_) => name(path.file_stem()),
        None => name(path.file_name()) + ".unpacked",
    };
    (shell_word(&path.display().to_string()), shell_word(&out))
}

/// A word as a shell reads it.
pub(super) fn shell_word(text: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "_./+:=@%,-".contains(c);
    match !text.is_empty() && !text.starts_with('-') && text.chars().all(is_plain) {
        true => text.into(),
        false if text.starts_with('-') => format!("./{}", quoted(text)),
        false => quoted(text),
    }
}

fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(start: &[u8], end: &[u8]) -> Option<&'static str> {
        recognise(start, end).map(|foreign| foreign.name)
    }

    /// A boot sector's beginning, code and a table of partitions, as of a raw disk.
    fn disk() -> Vec<u8> {
        let mut bytes = vec![0; START];
        bytes[..3].copy_from_slice(&[0xeb, 0x63, 0x90]);
        bytes[446..462].copy_from_slice(&[0x80, 0, 1, 1, 0x83, 0xfe, 0xff, 0xff, 0, 8, 0, 0, 0, 0, 1, 0]);
        bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
        bytes
    }

    #[test]
    fn a_disk_is_nothing_else() {
        assert_eq!(recognise(&disk(), &[0; END]), None);
        assert_eq!(recognise(&[0; START], &[0; END]), None);
        assert_eq!(recognise(b"", b""), None);
        // Text, scripts, and what only looks like a compressed file at first.
        for start in
            [&b"# a comment\nand no version\n"[..], b"BZh9", b"BZh91AY&SX", b"\x5d\0\0\x80", b"#\n#\n"]
        {
            assert_eq!(recognise(start, start), None, "{start:?}");
        }
        // What is meant for the end is no sign elsewhere.
        let mut end = [0; END];
        end[8..16].copy_from_slice(b"conectix");
        assert_eq!(recognise(&disk(), &end), None);
    }

    #[test]
    fn each_form_is_known_at_its_place() {
        for (at, magic, foreign) in BEGINNINGS {
            let mut bytes = vec![0xa5; START];
            bytes[at..at + magic.len()].copy_from_slice(magic);
            assert_eq!(name(&bytes, b""), Some(foreign.name));
            bytes[at] ^= 0x80;
            assert_eq!(name(&bytes, b""), None, "{}", foreign.name);
        }
        for (start, expected) in [
            (&b"BZh91AY&SY"[..], "bzip2"),
            (b"BZh1\x17\x72\x45\x38\x50\x90", "bzip2"),
            (b"\x5a\x2a\x4d\x18\x04\0\0\0", "zstd"),
            (b"\x5d\0\0\x80\0\xff\xff\xff\xff\xff\xff\xff\xff\0", "lzma"),
            (b"QFI\xfb\0\0\0\x01", "qcow (version 1)"),
            (b"# Disk DescriptorFile\nversion=1\n", "a VMDK descriptor"),
            (b"#\r\n\r\nversion=3\r\n", "a VMDK descriptor"),
            (b"version=1\n", "a VMDK descriptor"),
        ] {
            assert_eq!(name(start, b""), Some(expected));
        }
        let mut footer = vec![0; 512];
        footer[..8].copy_from_slice(b"conectix");
        assert_eq!(name(&disk(), &footer), Some("a VHD of fixed size"));
        assert_eq!(name(&disk(), &[&[0], &footer[..511]].concat()), Some("a VHD of fixed size"));
        footer[..8].copy_from_slice(b"koly\0\0\0\x04");
        assert_eq!(name(&disk(), &footer), Some("DMG"));
    }

    #[test]
    fn a_part_of_a_vmdk_is_not_converted_alone() {
        let mut bytes = vec![0; START];
        bytes[..4].copy_from_slice(b"KDMV");
        let advice =
            |bytes: &[u8]| recognise(bytes, b"").expect("it is known").advice(Path::new("/a/b-s001.vmdk"));
        assert!(advice(&bytes).contains("LIST.vmdk"));
        bytes[28] = 1;
        assert!(advice(&bytes).contains("LIST.vmdk"));
        bytes[512..535].copy_from_slice(b"# Disk DescriptorFile\nv");
        assert!(advice(&bytes).contains("qemu-img convert -f vmdk -O qcow2 /a/b-s001.vmdk b-s001.qcow2"));
    }

    #[test]
    fn a_command_can_be_given_to_a_shell_and_does_not_overwrite_what_it_reads() {
        let gzip = recognise(b"\x1f\x8b\x08", b"").expect("it is known");
        for (path, command) in [
            ("/a/disk.img.gz", "gzip --decompress --stdout /a/disk.img.gz > disk.img"),
            ("disk", "gzip --decompress --stdout disk > disk.unpacked"),
            ("/a b/it's.gz", "gzip --decompress --stdout '/a b/it'\\''s.gz' > 'it'\\''s'"),
            ("-x.gz", "gzip --decompress --stdout ./'-x.gz' > ./'-x'"),
        ] {
            let advice = gzip.advice(Path::new(path));
            assert!(advice.contains(&format!("\"{command}\"")), "{advice}");
        }
        assert!(gzip.advice_on_stream().contains("\"gzip --decompress | sealblk volume import -"));
    }
}
