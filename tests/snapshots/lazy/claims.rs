//! What a place says, and what lies in the store of what is to come, is proved before it is used.

use super::{BLOCK, assert_holds, attach, coming, fails, read_all};
use crate::common::attach::{open, read};
use crate::common::rig::Rig;
use crate::outside::content;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

#[test]
fn a_place_that_lies_is_not_believed() {
    let (rig, outside) = coming("1");
    let blocks = outside.objects("blocks");
    let whole: Vec<PathBuf> =
        blocks.into_iter().filter(|path| fs::metadata(path).unwrap().len() > BLOCK as u64).collect();
    assert_eq!(whole.len(), 3, "three of the blocks are full");
    let right: Vec<Vec<u8>> = whole.iter().map(|path| fs::read(path).unwrap()).collect();
    // One has other bytes, one is another one's, and one is missing.
    let mut wrong = right[0].clone();
    wrong[BLOCK / 2] ^= 1;
    fs::write(&whole[0], &wrong).unwrap();
    fs::write(&whole[1], &right[0]).unwrap();
    fs::remove_file(&whole[2]).unwrap();
    let (host, socket) = attach(&rig, "c", &[]);
    let mut session = open(&socket);
    for block in 8..11 {
        fails(&mut session.rings[0], block * 1024 + 8);
    }
    // All others are as they were.
    assert!(read(&mut session.rings[0], 0, 4096) == rig.data[..4096]);
    let said = rig.refuse(7, &["snapshot", "complete", "s"]);
    assert!(said.contains("3 of its blocks are not as they should be"), "{said}");
    for (path, bytes) in whole.iter().zip(&right) {
        fs::write(path, bytes).unwrap();
    }
    assert!(read_all(&mut session.rings[0], rig.data.len()) == rig.data);
    drop(session);
    host.end();
    rig.place.store.ok(&["snapshot", "complete", "s"]);
    assert!(content(&rig, "s") == rig.data);
}

#[test]
fn what_lies_in_the_store_is_proved_before_it_is_used() {
    let (rig, outside) = coming("1");
    // Another hand has written into the layer: where a block is to come, and where none is.
    let layer = fs::OpenOptions::new().write(true).open(file(&rig, "coming")).unwrap();
    for at in [4 << 20, (4 << 20) + BLOCK as u64 + 512, 2 << 20] {
        layer.write_all_at(&[7; 4096], at).unwrap();
    }
    assert_holds(&rig, "c", &rig.data);
    rig.place.store.ok(&["snapshot", "complete", "s"]);
    assert!(content(&rig, "s") == rig.data);
    // What is to come, and from where, cannot be edited.
    rig.id(&["snapshot", "pull", &outside.url(), "--name", "again", "--lazy"]);
    rig.place.store.ok(&["volume", "create", "--snapshot", "again", "--name", "d"]);
    let wanted = file(&rig, "wanted");
    let right = fs::read(&wanted).unwrap();
    let socket = rig.place.folder().join("d.socket");
    let refused = || {
        let mut command = rig.place.store.command();
        command.args(["attach", "d", "--socket-path"]).arg(&socket);
        let said = rig.place.run(command, vec![]);
        assert_eq!(said.code, 7, "{}", said.err);
        said.err
    };
    let mut edited = right.clone();
    let at = edited.len() - 100;
    edited[at] ^= 1;
    fs::write(&wanted, &edited).unwrap();
    assert!(refused().contains("MAC does not fit"));
    rig.refuse(7, &["snapshot", "complete", "again"]);
    let url = right.windows(8).position(|bytes| bytes == b"file:///").expect("where from");
    fs::write(&wanted, [&right[..url + 8], b"x/", &right[url + 8..]].concat()).unwrap();
    refused();
    fs::remove_file(&wanted).unwrap();
    let mut command = rig.place.store.command();
    command.args(["attach", "d", "--socket-path"]).arg(&socket);
    assert_ne!(rig.place.run(command, vec![]).code, 0);
    fs::write(&wanted, &right).unwrap();
    assert_holds(&rig, "d", &rig.data);
}

fn file(rig: &Rig, ending: &str) -> PathBuf {
    let all = rig.files("layers");
    all.into_iter().find(|path| path.extension().is_some_and(|it| it == ending)).expect("it is there")
}
