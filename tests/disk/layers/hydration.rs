//! What a hydration leaves behind, and what becomes of it when something is wrong.

use crate::common::frontend::block::{IOERR, OK};
use crate::common::frontend::{Request, Segment};
use crate::common::patience::wait_for;
use crate::layers::rig::{Keys, LayerFile, Places, Served, read_whole};
use sealblk::disk::Disk;
use sealblk::disk::hydrate::{End, Hydration};
use sealblk::image::lock::Access;
use sealblk::vhost::queue::Tuning;
use sealblk::virtio::Shape;
use sealblk::volume::layers::chain;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

const SECTORS: u64 = 16384;
const SHAPE: Shape = Shape { sectors: SECTORS, block_size: 512, read_only: false };

/// An unencrypted image below, an empty encrypted layer above: a volume that is being encrypted in place.
fn in_place(places: &mut Places) -> (Vec<LayerFile>, Vec<u8>) {
    let (top, image) = (places.file(0, Some(0), SECTORS), places.file(0, None, SECTORS));
    // Data with holes, and with zeros that are none to the file system.
    let mut plain: Vec<u8> = (0..SECTORS * 512).map(|i| (i / 512 + i) as u8).collect();
    plain[1 << 20..3 << 20].fill(0);
    plain[4_000_000 / 512 * 512..][..512].fill(0);
    let file = OpenOptions::new().write(true).open(&image.path).unwrap();
    file.write_all_at(&plain[..1 << 20], 0).unwrap();
    file.write_all_at(&plain[3 << 20..], 3 << 20).unwrap();
    (vec![top, image], plain)
}

fn serve(places: &Places, keys: &Keys, files: &[LayerFile]) -> Served {
    let layers = keys.open_all(files, Access::ReadWrite, 512);
    let disk = Disk::layered(SHAPE, "rig", chain(&layers)).unwrap().hydrating();
    Served::new(places.folder(), Arc::new(disk), layers, &Tuning::default())
}

fn run(served: &mut Served, request: &Request) -> u8 {
    request.run(&mut served.session.rings[0]).unwrap().status
}

#[test]
fn an_unencrypted_image_is_encrypted_in_place_and_not_needed_any_more() {
    let (mut places, keys) = (Places::new(), Keys::new(512));
    let (files, mut expected) = in_place(&mut places);
    let mut served = serve(&places, &keys, &files);
    let hydrating = served.hydrate(0).unwrap();
    // Zeros that the guest writes are not what was there before; what it discards may be.
    let segment = |sector, count| Segment { sector, count, flags: 1 };
    assert_eq!(run(&mut served, &Request::write(5, &[9; 512])), OK);
    assert_eq!(run(&mut served, &Request::write_zeroes(&[segment(8000, 3000)])), OK);
    expected[5 * 512..6 * 512].fill(9);
    expected[8000 * 512..11000 * 512].fill(0);
    assert!(hydrating.hydration.left().is_none_or(|left| left <= SECTORS * 512));
    assert_eq!(hydrating.wait(), End::Complete);
    assert_eq!(served.drop_lower_layers(), 1);
    std::fs::remove_file(&files[1].path).unwrap();
    let disk = served.device.disk();
    drop(served);
    assert!(read_whole(&disk, 64 << 10) == expected);
    drop(disk);
    // Nothing of it is there in the clear.
    let top = std::fs::read(&files[0].path).unwrap();
    let sectors = top.chunks(512).zip(expected.chunks(512));
    assert_eq!(sectors.filter(|(there, plain)| plain.iter().any(|&b| b != 0) && there == plain).count(), 0);
    // And no room is taken by what was nowhere.
    assert!(top[(1 << 20)..3 << 20].iter().all(|&b| b == 0));
}

#[test]
fn a_stopped_hydration_goes_on_where_nothing_was_lost() {
    let (mut places, keys) = (Places::new(), Keys::new(512));
    let (files, expected) = in_place(&mut places);
    let open = |files: &[LayerFile]| keys.open_all(files, Access::ReadWrite, 512);
    let disk = |layers: &[_]| Arc::new(Disk::layered(SHAPE, "rig", chain(layers)).unwrap().hydrating());
    let layers = open(&files);
    let first = disk(&layers);
    // After one chunk it waits for days: it is stopped in the middle, and while it runs there is no other.
    let slow = Hydration::new(first.clone(), 1).unwrap();
    std::thread::scope(|scope| {
        let runs = scope.spawn(|| slow.run().unwrap());
        wait_for("the first chunk has moved", || match slow.left() {
            Some(left) if left != SECTORS * 512 - (2 << 20) => Ok(()),
            left => Err(format!("{left:?} bytes are left")),
        });
        assert!(Hydration::new(first.clone(), 0).unwrap().run().is_err());
        assert!(first.with_layers(SHAPE, chain(&layers[..1])).is_err());
        slow.stop();
        assert_eq!(runs.join().unwrap(), End::Stopped);
    });
    assert!(slow.left().is_some_and(|left| left > 0));
    drop((slow, first, layers));
    let second = disk(&open(&files));
    let rest = Hydration::new(second.clone(), 0).unwrap();
    assert_eq!(rest.run().unwrap(), End::Complete);
    assert_eq!(rest.left(), Some(0));
    drop((rest, second));
    assert!(read_whole(&disk(&open(&files[..1])), 256 << 10) == expected);
}

#[test]
fn a_layer_that_has_become_shorter_is_an_error_and_never_zeros() {
    let (mut places, keys) = (Places::new(), Keys::new(512));
    let (files, _) = in_place(&mut places);
    let mut served = serve(&places, &keys, &files);
    let below = OpenOptions::new().write(true).open(&files[1].path).unwrap();
    below.set_len(7 << 20).unwrap();
    assert_eq!(run(&mut served, &Request::read((7 << 20) / 512, 4096)), IOERR);
    assert_eq!(run(&mut served, &Request::read((7 << 20) / 512 - 8, 4096)), OK);
    let hydration = Hydration::new(served.device.disk(), 0).unwrap();
    let e = hydration.run().unwrap_err();
    assert!(e.to_string().contains(&format!("at {}", 7 << 20)), "{e}");
    // The guest goes on with what is there.
    assert_eq!(run(&mut served, &Request::read(0, 4096)), OK);
    assert_eq!(run(&mut served, &Request::write((7 << 20) / 512, &[1; 4096])), OK);
}
