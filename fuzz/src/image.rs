//! A qcow2 image, whoever made it.

use nix::sys::memfd::{MFdFlags, memfd_create};
use sealblk::base::root::offered::Offered;
use sealblk::image::{BackingFiles, Format, Image};
use std::fs::File;
use std::io::Write;

/// Bytes of data after which an image is left: its tables can say that there is far more than that.
const ENOUGH: u64 = 4 << 20;

/// Any file: it is refused, or has some content.
pub fn run(data: &[u8]) {
    let mut file = File::from(memfd_create(c"image", MFdFlags::empty()).expect("make a file"));
    file.write_all(data).expect("write into memory");
    for format in [Some(Format::Qcow2), None] {
        let offered = Offered { file: file.try_clone().expect("copy a descriptor"), path: "/fuzz".into() };
        if let Ok(image) = Image::of(offered, format, BackingFiles::Refuse) {
            read(&image);
        }
    }
}

fn read(image: &Image) {
    let mut room = vec![0; 64 << 10];
    let (mut at, mut seen) = (0, 0);
    while let Ok(Some(found)) = image.next_data(at) {
        assert!(found.start >= at && found.end > found.start && found.end <= image.size());
        let len = (found.end - found.start).min(room.len() as u64);
        if image.read(found.start, &mut room[..len as usize]).is_err() {
            break;
        }
        at = found.start + len;
        seen += len;
        if seen > ENOUGH {
            break;
        }
    }
}
