//! The header of a qcow2 image, judged before a library reads it: what it may not say,
//! nobody is led to believe.
//!
//! Source: QEMU, docs/interop/qcow2.rst. Pure: it looks at bytes, and opens nothing.
#![forbid(unsafe_code)]

use crate::base::{Error, Kind, MAX_DISK_SIZE, Result};
use crate::image::foreign;
use std::path::Path;

/// What an image begins with.
pub(super) const MAGIC: [u8; 4] = *b"QFI\xfb";
/// The longest first cluster: everything that the header names lies in the first.
pub(super) const LONGEST: u64 = 1 << MAX_CLUSTER_BITS;

const MIN_CLUSTER_BITS: u32 = 9;
const MAX_CLUSTER_BITS: u32 = 21;
/// Bytes of a version 2 header, and the least of a version 3 one.
const V2_LEN: u64 = 72;
const V3_LEN: u64 = 104;
/// QEMU's bound on the L1 table: 32 MiB.
const MAX_L1_ENTRIES: u64 = (32 << 20) / 8;
const MAX_BACKING_NAME: u64 = 1023;

const END: u32 = 0;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const FEATURE_NAMES: u32 = 0x6803_f857;
const DATA_FILE: u32 = 0x4441_5441;

/// What makes an image that is read of one that is not: what that does, and the command
/// ([`foreign::command`]).
type Way = (&'static str, &'static str);
const REPAIR: Way = ("repair", "qemu-img check -r all -f qcow2 {in}");
const CONVERT: Way = ("convert", "qemu-img convert -f qcow2 -O qcow2 {in} {out}.qcow2");
const DECRYPT: Way = (
    "decrypt",
    "qemu-img convert --object secret,id=key,file=PASSPHRASE_FILE --image-opts \
     driver=qcow2,encrypt.key-secret=key,file.filename={in} -O qcow2 {out}.qcow2",
);

/// Bits of `incompatible_features`, and what can be done about each.
const INCOMPATIBLE: [(u64, &str, Way); 5] = [
    (1 << 0, "it was not closed properly", REPAIR),
    (1 << 1, "it is marked as corrupt", REPAIR),
    (1 << 2, "its data lies in another file", CONVERT),
    (1 << 3, "it is compressed with zstd, and zlib is read here", CONVERT),
    (1 << 4, "it has extended L2 entries", CONVERT),
];

/// What a header says that may be said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// The disk's size in bytes.
    pub(super) size: u64,
    /// The file that it is based on.
    pub(super) backing: Option<Backing>,
}

/// What an image is based on, in its own words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Backing {
    pub(super) file: String,
    pub(super) format: Option<String>,
}

impl Header {
    /// Reads the header of a file of `file_len` bytes, of which `bytes` are the first [`LONGEST`], or all.
    /// The file lies at `path`, for messages.
    ///
    /// # Errors
    /// `Corrupt` for one that makes no sense; `Unsupported` for an image of a kind that is not read here.
    pub(super) fn parse(bytes: &[u8], file_len: u64, path: &Path) -> Result<Self> {
        let fields = Fields { bytes };
        if bytes.get(..4) != Some(&MAGIC) {
            return Err(Error::new(Kind::Usage, "it is no qcow2 image"));
        }
        let version = fields.u32(4)?;
        if version != 2 && version != 3 {
            return Err(unsupported(format!("it is qcow2 of version {version}; versions 2 and 3 are read")));
        }
        let cluster_bits = fields.u32(20)?;
        if !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&cluster_bits) {
            return Err(corrupt(format!("its clusters have 2^{cluster_bits} bytes")));
        }
        let cluster = 1 << cluster_bits;
        if fields.u32(32)? != 0 {
            return Err(way_out("it is encrypted", DECRYPT, path));
        }
        let size = fields.u64(24)?;
        if size > MAX_DISK_SIZE {
            return Err(corrupt(format!("it is to be a disk of {size} bytes")));
        }
        check_l1(fields, cluster, size, file_len)?;
        let backing = backing_name(fields, cluster)?;
        let mut format = None;
        if version == 3 {
            check_features(fields.u64(72)?, path)?;
            if fields.u32(96)? > 6 {
                return Err(corrupt(format!("its reference counts have 2^{} bits", fields.u32(96)?)));
            }
            let header_len = u64::from(fields.u32(100)?);
            if header_len < V3_LEN || header_len > cluster || !header_len.is_multiple_of(8) {
                return Err(corrupt(format!("its header has {header_len} bytes")));
            }
            format = read_extensions(fields, header_len, cluster, path)?;
        } else if backing.is_some() {
            // The library does not read them in this version, and QEMU writes the backing file's format
            // there. The name of that file can come at once, and then there are none.
            format = match fields.u64(8)? {
                at if at < V2_LEN + 8 => None,
                // The last one ends where the name begins.
                at => read_extensions(fields, V2_LEN, at.min(cluster - 1) + 1, path)?,
            };
        }
        let backing = backing.map(|file| Backing { file, format });
        Ok(Header { size, backing })
    }
}

/// The L1 table must lie in the file, reach as far as the disk, and not be longer than QEMU would have it.
fn check_l1(fields: Fields<'_>, cluster: u64, size: u64, file_len: u64) -> Result<()> {
    let (entries, offset) = (u64::from(fields.u32(36)?), fields.u64(40)?);
    let reach = cluster * (cluster / 8);
    if entries > MAX_L1_ENTRIES || entries < size.div_ceil(reach) {
        return Err(corrupt(format!("its L1 table has {entries} entries for {size} bytes")));
    }
    let in_file = offset.checked_add(entries * 8).is_some_and(|end| end <= file_len);
    if !offset.is_multiple_of(cluster) || offset < V2_LEN || !in_file {
        return Err(corrupt(format!(
            "its L1 table is to be at byte {offset} of {file_len}; the file may have been cut off"
        )));
    }
    Ok(())
}

fn check_features(incompatible: u64, path: &Path) -> Result<()> {
    if let Some((_, problem, way)) = INCOMPATIBLE.iter().find(|(bit, ..)| incompatible & bit != 0) {
        return Err(way_out(problem, *way, path));
    }
    match incompatible {
        0 => Ok(()),
        unknown => Err(unsupported(format!("it has features that are unknown here ({unknown:#x})"))),
    }
}

/// Goes through the header's extensions, all of which must lie before byte `end` of the first cluster;
/// returns the backing file's format.
fn read_extensions(fields: Fields<'_>, header_len: u64, end: u64, path: &Path) -> Result<Option<String>> {
    let mut at = header_len;
    let mut format = None;
    loop {
        let (kind, len) = (fields.u32(at)?, u64::from(fields.u32(at + 4)?));
        let data = fields.within(at + 8, len, end)?;
        at += 8 + len.next_multiple_of(8);
        match kind {
            END => return Ok(format),
            BACKING_FORMAT if format.is_some() => return Err(corrupt("it has two backing formats".into())),
            BACKING_FORMAT => format = Some(text(data)?),
            FEATURE_NAMES if !len.is_multiple_of(48) => {
                return Err(corrupt(format!("its feature names have {len} bytes")));
            }
            DATA_FILE => return Err(way_out(INCOMPATIBLE[2].1, CONVERT, path)),
            _ => {}
        }
    }
}

fn backing_name(fields: Fields<'_>, cluster: u64) -> Result<Option<String>> {
    let (offset, len) = (fields.u64(8)?, u64::from(fields.u32(16)?));
    match (offset, len) {
        (0, _) => Ok(None),
        (_, 1..=MAX_BACKING_NAME) => text(fields.within(offset, len, cluster)?).map(Some),
        _ => Err(corrupt(format!("its backing file's name has {len} bytes"))),
    }
}

fn text(bytes: &[u8]) -> Result<String> {
    let text = std::str::from_utf8(bytes).map_err(|_| corrupt("a name in its header is no text".into()))?;
    Ok(text.to_string())
}

#[derive(Clone, Copy)]
struct Fields<'a> {
    bytes: &'a [u8],
}

impl<'a> Fields<'a> {
    fn get(self, at: u64, len: u64) -> Result<&'a [u8]> {
        let range =
            usize::try_from(at).ok().zip(at.checked_add(len).and_then(|end| usize::try_from(end).ok()));
        let found = range.and_then(|(from, to)| self.bytes.get(from..to));
        found.ok_or_else(|| corrupt("its header is cut off".into()))
    }

    fn within(self, at: u64, len: u64, end: u64) -> Result<&'a [u8]> {
        match at.checked_add(len) {
            // The library wants the byte after it as well.
            Some(last) if last < end => self.get(at, len),
            _ => Err(corrupt("its header is longer than a cluster".into())),
        }
    }

    fn u32(self, at: u64) -> Result<u32> {
        let bytes = self.get(at, 4)?;
        Ok(u32::from_be_bytes(bytes.try_into().expect("asked for 4")))
    }

    fn u64(self, at: u64) -> Result<u64> {
        let bytes = self.get(at, 8)?;
        Ok(u64::from_be_bytes(bytes.try_into().expect("asked for 8")))
    }
}

fn corrupt(problem: String) -> Error {
    Error::new(Kind::Corrupt, format!("its qcow2 header makes no sense: {problem}"))
}

fn way_out(problem: &str, (does, command): Way, path: &Path) -> Error {
    unsupported(format!("{problem}; {does} it with \"{}\"", foreign::command(command, path)))
}

fn unsupported(problem: String) -> Error {
    Error::new(Kind::Unsupported, problem)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: u64 = 1 << 20;

    /// A header of version 3 with 64 KiB clusters, a disk of 1 GiB, and one extension.
    fn header() -> Vec<u8> {
        let mut bytes = vec![0; 1 << 16];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &MAGIC);
        put(4, &3u32.to_be_bytes());
        put(8, &0x200u64.to_be_bytes());
        put(16, &8u32.to_be_bytes());
        put(20, &16u32.to_be_bytes());
        put(24, &(1u64 << 30).to_be_bytes());
        put(36, &2u32.to_be_bytes());
        put(40, &0x30000u64.to_be_bytes());
        put(96, &4u32.to_be_bytes());
        put(100, &104u32.to_be_bytes());
        put(104, &BACKING_FORMAT.to_be_bytes());
        put(108, &3u32.to_be_bytes());
        put(112, b"raw");
        put(0x200, b"base.img");
        bytes
    }

    #[test]
    fn what_it_says_is_found() {
        let backing = Backing { file: "base.img".into(), format: Some("raw".into()) };
        let expected = Header { size: 1 << 30, backing: Some(backing) };
        assert_eq!(Header::parse(&header(), FILE, Path::new("x.qcow2")).unwrap(), expected);
    }

    /// The same disk in version 2: `extensions` follow the header at once, and then the backing file's name.
    fn header_2(extensions: &[u8]) -> Vec<u8> {
        let mut bytes = header();
        bytes[4..8].copy_from_slice(&2u32.to_be_bytes());
        bytes[72..].fill(0);
        let name_at = 72 + extensions.len();
        bytes[72..name_at].copy_from_slice(extensions);
        bytes[name_at..name_at + 8].copy_from_slice(b"base.img");
        bytes[8..16].copy_from_slice(&(name_at as u64).to_be_bytes());
        bytes
    }

    #[test]
    fn version_2_says_its_backing_format_as_well() {
        let parse = |bytes: &[u8]| Header::parse(bytes, FILE, Path::new("x.qcow2"));
        let format = |extensions: &[u8]| {
            let backing = parse(&header_2(extensions)).expect("it is right").backing.expect("it has one");
            assert_eq!(backing.file, "base.img");
            backing.format
        };
        let raw = [&BACKING_FORMAT.to_be_bytes()[..], &3u32.to_be_bytes(), b"raw\0\0\0\0\0"].concat();
        let end = [0; 8];
        assert_eq!(format(&[&raw[..], &end].concat()), Some("raw".into()));
        assert_eq!(format(&end), None);
        assert_eq!(format(&[]), None);
        let mut long = raw;
        long[7] = 200;
        assert!(parse(&header_2(&[&long[..], &end].concat())).is_err(), "it reaches into the name");
        // Without a backing file nobody needs them.
        let mut alone = header_2(&long);
        alone[8..16].fill(0);
        assert_eq!(parse(&alone).expect("it is right").backing, None);
    }

    #[test]
    fn what_it_may_not_say_is_refused() {
        let u32 = |value: u32| value.to_be_bytes().to_vec();
        let u64 = |value: u64| value.to_be_bytes().to_vec();
        for (at, value, words) in [
            (0, u32(0), "no qcow2 image"),
            (4, u32(1), "of version 1"),
            (4, u32(4), "of version 4"),
            (8, u64(u64::MAX), "longer than a cluster"),
            (16, u32(0), "has 0 bytes"),
            (16, u32(1024), "has 1024 bytes"),
            (16, u32(u32::MAX), "has 4294967295 bytes"),
            (20, u32(8), "clusters"),
            (20, u32(22), "clusters"),
            (20, u32(u32::MAX), "clusters"),
            (24, u64(u64::MAX), "a disk of"),
            (24, u64(1 << 40), "L1 table has 2 entries"),
            (32, u32(1), "encrypted"),
            (32, u32(2), "encrypted"),
            (36, u32(0), "L1 table has 0 entries"),
            (36, u32(u32::MAX), "L1 table has 4294967295 entries"),
            (40, u64(0x30001), "at byte 196609"),
            (40, u64(0), "at byte 0"),
            (40, u64(u64::MAX << 16), "cut off"),
            (40, u64(FILE), "cut off"),
            (72, u64(1), "not closed properly"),
            (72, u64(2), "corrupt"),
            (72, u64(4), "another file"),
            (72, u64(8), "zlib"),
            (72, u64(16), "extended L2"),
            (72, u64(1 << 63), "unknown"),
            (96, u32(7), "reference counts"),
            (100, u32(96), "header has 96 bytes"),
            (100, u32(108), "header has 108 bytes"),
            (100, u32(u32::MAX), "header has 4294967295 bytes"),
            (104, u32(DATA_FILE), "another file"),
            (104, u32(FEATURE_NAMES), "feature names have 3 bytes"),
            (108, u32(1 << 16), "longer than a cluster"),
            (108, u32(u32::MAX), "longer than a cluster"),
            (112, vec![0xff], "no text"),
            (0x200, vec![0xc0, 0x80], "no text"),
        ] {
            let mut bytes = header();
            bytes[at..at + value.len()].copy_from_slice(&value);
            let e = Header::parse(&bytes, FILE, Path::new("x.qcow2")).expect_err(words);
            assert!(e.to_string().contains(words), "{at}: {e} instead of {words}");
        }
    }

    #[test]
    fn any_part_of_it_alone_is_refused() {
        let bytes = header();
        for len in 0..0x208 {
            assert!(Header::parse(&bytes[..len], FILE, Path::new("x.qcow2")).is_err(), "{len}");
        }
        assert!(Header::parse(&bytes[..0x208], FILE, Path::new("x.qcow2")).is_ok());
    }
}
