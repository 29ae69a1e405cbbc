//! What can be done to a volume can be done to one behind a server, and what the server has is what the
//! format says.

use super::server::{Exported, content, rig};
use crate::common::attach::{Place, flush, write};
use crate::common::disk::pattern;
use crate::common::frontend::block::OK;
use crate::common::frontend::{Request, Segment};
use crate::common::helpers::{assert_children_outlive_ctrl_c, children};
use crate::common::killed::{End, killed_before};
use crate::common::leaks::{Needles, assert_has_none};
use crate::common::store::{Store, said};
use crate::common::successor::Successor;
use crate::devices::rig::{MIB, Rig, is_zero, refuse};
use aes::Aes256;
use aes::cipher::KeyInit;
use std::process::Command;
use xts_mode::{Xts128, get_tweak_default};

const SIZE: usize = 8 << 20;

/// A life behind a server that is up already.
fn live(exported: &Exported, sector: usize) {
    let rig = rig(&exported.address(), &["--sector-size", &sector.to_string()]);
    let store = rig.store();
    let (host, mut guest) = rig.attach("t", sector, vec![0; SIZE]);
    let access = rig.json(&["volume", "show", "t"])["attachment"]["access"].as_str().unwrap().to_owned();
    assert!(access.starts_with("NBD server"), "{access}");
    guest.work();
    let data = guest.leave();
    host.end();
    assert!(content(&rig, "volume", "t") == data, "{sector}");
    assert!(is_zero(&exported.content()[MIB as usize + SIZE..]), "nothing is written behind the volume");

    let (host, mut guest) = rig.attach("t", sector, data);
    guest.look();
    guest.work();
    // From now on the export is a frozen layer, below a file.
    let snapshot = rig.id(&["snapshot", "create", "t"]);
    let (then, frozen) = (guest.data.clone(), exported.content());
    assert!(String::from_utf8_lossy(&frozen[..MIB as usize]).contains("\"frozen\": true"));
    guest.work();
    let data = guest.leave();
    host.end();
    assert!(exported.content() == frozen, "a frozen layer does not change");
    assert!(content(&rig, "volume", "t") == data);
    assert!(content(&rig, "snapshot", &snapshot) == then);

    // Two that share it at one time.
    store.ok(&["volume", "create", "--snapshot", &snapshot, "--name", "clone"]);
    let (first, mut one) = rig.attach("t", sector, data);
    let (second, mut two) = rig.attach("clone", sector, then.clone());
    two.look();
    two.work();
    one.work();
    store.ok(&["volume", "flatten", "clone", "--follow"]);
    two.work();
    let (one, two) = (one.leave(), two.leave());
    first.end();
    second.end();
    assert!(content(&rig, "volume", "t") == one && content(&rig, "volume", "clone") == two);

    // To another place, and back into a file.
    let outside = rig.place.folder().join("outside");
    std::fs::create_dir(&outside).unwrap();
    let url = format!("file://{}", outside.display());
    store.ok(&["snapshot", "push", &snapshot, &url]);
    let pulled = rig.id(&["snapshot", "pull", &format!("{url}/{snapshot}")]);
    assert!(content(&rig, "snapshot", &pulled) == then);
    store.ok(&["snapshot", "delete", &pulled]);
    store.ok(&["volume", "delete", "t"]);
    store.ok(&["volume", "delete", "clone"]);
    assert!(exported.content() == frozen, "the snapshot needs it");
    store.ok(&["snapshot", "delete", &snapshot]);
    let left = exported.content();
    assert!(is_zero(&left[..MIB as usize]) && left[MIB as usize..] == frozen[MIB as usize..]);
    assert!(rig.layers("device").is_empty() && rig.layers("img").is_empty());
}

#[test]
fn a_volume_lives_behind_nbdkit() {
    let exported = Exported::zeros(12 * MIB);
    let _server = exported.by_nbdkit(&[], &[]);
    live(&exported, 512);
}

#[test]
fn a_volume_lives_behind_qemu() {
    let exported = Exported::zeros(12 * MIB);
    let _server = exported.by_qemu();
    live(&exported, 4096);
}

#[test]
fn a_volume_lives_behind_a_server_with_larger_blocks_than_its_sectors() {
    let exported = Exported::zeros(12 * MIB);
    let policy = ["blocksize-minimum=4096", "blocksize-preferred=4096", "blocksize-error-policy=error"];
    let _server = exported.by_nbdkit(&["blocksize-policy"], &policy);
    live(&exported, 512);
}

#[test]
fn a_volume_lives_behind_a_server_that_can_do_nothing_but_read_and_write() {
    let exported = Exported::zeros(12 * MIB);
    let _server = exported.by_nbdkit(&["nozero", "noextents", "fua"], &["--no-sr"]);
    live(&exported, 512);
}

#[test]
fn a_server_that_is_slow_is_waited_for() {
    let exported = Exported::zeros(12 * MIB);
    let _server = exported.by_nbdkit(&["delay"], &["wdelay=3ms", "rdelay=2ms", "delay-zero=3ms"]);
    let rig = rig(&exported.address(), &[]);
    let (host, mut guest) = rig.attach("t", 512, vec![0; SIZE]);
    assert_children_outlive_ctrl_c(host.pid());
    guest.work();
    guest.look();
    // What makes connections has neither keys nor data.
    let secrets = [("the data key", &rig.place.dek()[..]), ("plaintext", &guest.some_written()[..])];
    let needles = Needles::of_secrets(&secrets);
    for child in children(host.pid()) {
        assert_has_none(child, &needles, "dial-nbd");
    }
    let data = guest.leave();
    host.end();
    assert!(content(&rig, "volume", "t") == data);
}

/// By the word of an implementation that is not ours: tweaks count from the layer's first sector.
#[test]
fn behind_the_header_lies_what_dm_crypt_would_have_written() {
    for sector in [512, 4096] {
        let exported = Exported::zeros(12 * MIB);
        let _server = exported.by_nbdkit(&[], &[]);
        let rig = rig(&exported.address(), &["--sector-size", &sector.to_string()]);
        let (host, mut guest) = rig.attach("t", sector, vec![0; SIZE]);
        let bytes = pattern(1, 1 << 16);
        let ring = &mut guest.session.rings[0];
        write(ring, 8, &bytes);
        flush(ring);
        host.end();
        let dek = rig.place.dek();
        let key = |half: &[u8]| Aes256::new_from_slice(half).unwrap();
        let xts = Xts128::new(key(&dek[..32]), key(&dek[32..]));
        let mut plain = exported.content()[MIB as usize..MIB as usize + SIZE].to_vec();
        let unit = (sector / 512) as u128;
        for (n, data) in plain.chunks_mut(sector).enumerate().filter(|(_, data)| !is_zero(data)) {
            xts.decrypt_sector(data, get_tweak_default(n as u128 * unit));
        }
        assert!(plain[4096..4096 + (1 << 16)] == bytes);
        assert!(is_zero(&plain[..4096]) && is_zero(&plain[4096 + (1 << 16)..]));
    }
}

#[test]
fn what_a_guest_discards_is_given_back_and_is_zeros() {
    for by_qemu in [false, true] {
        let exported = Exported::zeros(12 * MIB);
        let _server = if by_qemu { exported.by_qemu() } else { exported.by_nbdkit(&[], &[]) };
        let rig = rig(&exported.address(), &[]);
        let (host, mut guest) = rig.attach("t", 512, vec![0; SIZE]);
        let before = exported.allocated();
        let ring = &mut guest.session.rings[0];
        for n in 0..4 {
            write(ring, n * 2048, &pattern(n, 1 << 20));
        }
        flush(ring);
        assert!(exported.allocated() >= before + (4 << 20), "it was written");
        // All but the first and last of these sectors.
        let whole = [Segment { sector: 1, count: 8190, flags: 0 }];
        assert_eq!(Request::discard(&whole).run(ring).unwrap().status, OK);
        flush(ring);
        assert!(exported.allocated() < before + (1 << 20), "its space is given back");
        host.end();
        let data = &exported.content()[MIB as usize..MIB as usize + SIZE];
        assert!(!is_zero(&data[..512]) && !is_zero(&data[(4 << 20) - 512..4 << 20]));
        assert!(is_zero(&data[512..(4 << 20) - 512]));
    }
}

#[test]
fn a_volume_moves_behind_a_server_and_off_it_and_gets_a_new_data_key_there() {
    let (first, second) = (Exported::zeros(10 * MIB), Exported::zeros(12 * MIB));
    let (_one, _two) = (first.by_nbdkit(&[], &[]), second.by_qemu());
    let rig = Rig { place: Place::of(Store::new(), &[]) };
    let store = rig.store();
    let (host, mut guest) = rig.attach("t", 512, vec![0; SIZE]);
    guest.work();
    let data = guest.leave();
    host.end();
    store.ok(&["volume", "move", "t", "--to", &first.address(), "--follow"]);
    assert!(rig.layers("img").is_empty() && rig.layers("device").len() == 1);
    let shown = rig.json(&["volume", "show", "t"]);
    let long = format!("nbd+unix:///?socket={}", first.socket().display());
    assert_eq!(shown["layers"][0]["path"], long.as_str());
    assert!(store.ok(&["volume", "list"]).contains(&long));
    // While the guest goes on.
    store.ok(&["volume", "rekey", "t", "--onto", &second.address()]);
    let (host, mut guest) = rig.attach("t", 512, data);
    guest.look();
    guest.work();
    store.ok(&["volume", "flatten", "t", "--follow"]);
    guest.look();
    guest.work();
    let data = guest.leave();
    host.end();
    assert!(is_zero(&first.content()[..MIB as usize]), "nothing needs it any more");
    assert!(content(&rig, "volume", "t") == data);
    store.ok(&["volume", "move", "t", "--to", "file", "--follow"]);
    assert!(is_zero(&second.content()[..MIB as usize]));
    assert!(rig.layers("img").len() == 1 && rig.layers("device").is_empty());
    assert!(content(&rig, "volume", "t") == data);
}

#[test]
fn another_store_adopts_what_is_behind_a_server() {
    let exported = Exported::zeros(10 * MIB);
    let _server = exported.by_nbdkit(&[], &[]);
    let rig = rig(&exported.address(), &[]);
    let (host, mut guest) = rig.attach("t", 512, vec![0; SIZE]);
    guest.work();
    let data = guest.leave();
    host.end();
    let store = Store::new();
    for (from, to) in [(rig.store().root().join("kms"), store.root()), (rig.store().config(), store.config())]
    {
        let to = if to == store.root() { to.join("kms") } else { to };
        std::fs::create_dir_all(to.parent().unwrap()).unwrap();
        assert!(Command::new("cp").arg("--archive").args([&from, &to]).status().unwrap().success());
    }
    // Of the other store.
    std::fs::remove_dir_all(store.config().join("stores")).unwrap();
    let there = Rig { place: Place::of(store, &[]) };
    there.store().ok(&["volume", "adopt", &exported.address(), "--name", "mine"]);
    assert!(content(&there, "volume", "mine") == data);
    let said = rig.refuse_attach(7);
    assert!(said.contains("was taken over by another store"), "{said}");
}

#[test]
fn a_volume_grows_when_what_is_behind_the_server_has() {
    let exported = Exported::zeros(9 * MIB);
    let server = exported.by_nbdkit(&[], &[]);
    let rig = rig(&exported.address(), &[]);
    let (host, mut guest) = rig.attach("t", 512, vec![0; SIZE]);
    guest.work();
    let said = rig.refuse(2, &["volume", "resize", "t", "10MiB"]);
    assert!(said.contains("make the device larger first"), "{said}");
    let data = guest.leave();
    host.end();
    server.crash();
    exported.file().set_len(11 * MIB).unwrap();
    // What is there now is none of the volume's.
    exported.overwrite(9 * MIB, &vec![0x77; 2 << 20]);
    let _server = exported.by_nbdkit(&[], &[]);
    rig.store().ok(&["volume", "resize", "t", "10MiB"]);
    let (host, mut guest) = rig.attach("t", 512, data);
    guest.grown(10 << 20);
    guest.look();
    guest.work();
    let data = guest.leave();
    host.end();
    assert!(content(&rig, "volume", "t") == data);
}

#[test]
fn a_new_process_takes_over_a_volume_behind_a_server() {
    let exported = Exported::zeros(10 * MIB);
    let _server = exported.by_nbdkit(&[], &[]);
    let rig = rig(&exported.address(), &[]);
    let (mut host, mut guest) = rig.attach("t", 512, vec![0; SIZE]);
    guest.work();
    let successor = Successor::of(&rig.json(&["upgrade", "t"]));
    assert!(host.wait().success(), "{}", host.output());
    guest.work();
    let data = guest.leave();
    rig.store().ok(&["detach", "t"]);
    successor.ends();
    assert!(content(&rig, "volume", "t") == data);
}

#[test]
fn a_process_that_is_killed_loses_nothing_that_was_flushed() {
    let exported = Exported::zeros(10 * MIB);
    let _server = exported.by_nbdkit(&[], &[]);
    let rig = rig(&exported.address(), &[]);
    let (host, mut guest) = rig.attach("t", 512, vec![0; SIZE]);
    guest.work();
    flush(&mut guest.session.rings[0]);
    let begun = guest.begin_side_by_side();
    host.crash();
    let data = std::mem::take(&mut guest.data);
    drop(guest);
    let (host, mut guest) = rig.attach("t", 512, data);
    guest.find(begun);
    guest.look();
    guest.work();
    let data = guest.leave();
    host.end();
    assert!(content(&rig, "volume", "t") == data);
}

#[test]
fn wherever_a_creation_is_killed_the_export_is_free_again_or_the_volume_is_there() {
    let store = Store::new();
    store.ok(&["volume", "create", "--size", "1MiB", "--name", "first"]);
    let exported = Exported::zeros(8 * MIB);
    let _server = exported.by_nbdkit(&[], &[]);
    let mut killed = 0;
    for step in (0..).step_by(3) {
        let mut command = store.command();
        command.args(["volume", "create", "--nbd", &exported.address(), "--name", "t"]);
        let end = killed_before(&mut command, step);
        let list: serde_json::Value = serde_json::from_str(&store.ok(&["volume", "list", "--json"])).unwrap();
        match list.as_array().unwrap().len() {
            1 => store.ok(&["gc"]),
            _ => store.ok(&["volume", "delete", "t"]),
        };
        assert!(is_zero(&exported.content()), "step {step}: no header is left");
        let left = std::fs::read_dir(store.root().join("layers")).unwrap().count();
        assert_eq!(left, 1, "step {step}");
        if end != End::Killed {
            break;
        }
        killed += 1;
    }
    assert!(killed > 3, "{killed} times");
}

#[test]
fn what_cannot_be_taken_is_refused_and_left_as_it_is() {
    let store = Store::new();
    let exported = Exported::zeros(8 * MIB);
    let create = ["volume", "create", "--nbd", &exported.address()];
    let said = refuse(&store, 3, &create);
    assert!(said.contains("start the server that listens there"), "{said}");
    exported.overwrite(8 * MIB - 1, &[1]);
    let server = exported.by_nbdkit(&[], &[]);
    let said = refuse(&store, 4, &create);
    assert!(said.contains("data (the first byte that is not zero is at 8388607)"), "{said}");
    store.ok(&[&create[..], &["--wipe", "--name", "t"]].concat());
    let before = exported.content();
    assert!(is_zero(&before[MIB as usize..]));
    for more in [&[][..], &["--wipe"]] {
        let said = refuse(&store, 4, &[&create[..], more].concat());
        assert!(said.contains("a layer of vol-"), "{said}");
    }
    let said = refuse(&Store::new(), 4, &create);
    assert!(said.contains("which this store does not know"), "{said}");
    assert!(exported.content() == before);
    server.crash();
    let _server = exported.by_nbdkit(&[], &["-r"]);
    let said = refuse(&store, 2, &create);
    assert!(said.contains("lets nobody write"), "{said}");
    let output = store.run(&["attach", "t", "--socket-path", "/nowhere/x"]);
    assert!(said_of(&output).contains("lets nobody write"), "{}", said_of(&output));
    refuse(&store, 2, &["volume", "create", "--nbd", "nbd://host/x"]);
    refuse(&store, 2, &[&create[..], &["--preallocate"]].concat());
    let policy = ["blocksize-minimum=8192", "blocksize-preferred=8192"];
    let large = Exported::zeros(8 * MIB);
    let _server = large.by_nbdkit(&["blocksize-policy"], &policy);
    let said = refuse(&store, 8, &["volume", "create", "--nbd", &large.address()]);
    assert!(said.contains("its blocks have 8192 bytes"), "{said}");
}

fn said_of(output: &std::process::Output) -> String {
    said(output)
}

#[test]
fn an_export_has_a_name() {
    let exported = Exported::zeros(8 * MIB);
    let _server = exported.by_nbdkit(&["exportname"], &["exportname=a b", "exportname-strict=true"]);
    let store = Store::new();
    let said = refuse(&store, 3, &["volume", "create", "--nbd", &format!("{}?export=x", exported.address())]);
    assert!(said.contains("has no export \"x\""), "{said}");
    let address = format!("nbd+unix:///a%20b?socket={}", exported.socket().display());
    store.ok(&["volume", "create", "--nbd", &address, "--name", "t"]);
    assert!(store.ok(&["volume", "show", "t"]).contains(&address));
}
