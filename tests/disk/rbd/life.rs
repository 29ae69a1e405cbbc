//! What can be done to a volume can be done to one in an image, and what the image has is
//! what the format says.

use super::cluster::{Cluster, elsewhere, keeper_of, rig, server_of, with_ceph};
use crate::common::frontend::block::OK;
use crate::common::frontend::{Request, Segment};
use crate::common::helpers::assert_children_outlive_ctrl_c;
use crate::common::leaks::{Needles, assert_has_none};
use crate::common::store::Store;
use crate::devices::rig::{MIB, is_zero, refuse};
use crate::nbd::server::content;
use crate::nbd::ways::{by_an_ordinary_user, for_reading_alone};
use nix::sys::signal::{Signal, kill};

const SIZE: usize = 8 << 20;

#[test]
fn a_volume_lives_in_an_image() {
    for sector in [512, 4096] {
        let cluster = Cluster::shared();
        let name = format!("life{sector}");
        let rig = rig(cluster, &name, &["--sector-size", &sector.to_string()]);
        let store = rig.store();
        let info = cluster.info(&name);
        assert_eq!(info["size"], 9 * MIB, "1 MiB more for the header");
        let features: Vec<_> =
            info["features"].as_array().unwrap().iter().map(|it| it.as_str().unwrap()).collect();
        assert_eq!(features, ["exclusive-lock", "object-map", "fast-diff"]);
        let (host, mut guest) = rig.attach("t", sector, vec![0; SIZE]);
        let access = rig.json(&["volume", "show", "t"])["attachment"]["access"].as_str().unwrap().to_owned();
        assert!(access.starts_with("RBD image"), "{access}");
        guest.work();
        let data = guest.leave();
        host.end();
        assert!(content(&rig, "volume", "t") == data, "{sector}");

        let (host, mut guest) = rig.attach("t", sector, data);
        guest.look();
        guest.work();
        // From now on the image is a frozen layer, below a file.
        let snapshot = rig.id(&["snapshot", "create", "t"]);
        let (then, frozen) = (guest.data.clone(), cluster.content(&name));
        assert!(String::from_utf8_lossy(&frozen[..MIB as usize]).contains("\"frozen\": true"));
        guest.work();
        // Another process reads the frozen layer meanwhile.
        store.ok(&["volume", "create", "--snapshot", &snapshot, "--name", "clone"]);
        let (second, mut two) = rig.attach("clone", sector, then.clone());
        two.look();
        two.work();
        store.ok(&["volume", "flatten", "clone", "--follow"]);
        let two = two.leave();
        second.end();
        let data = guest.leave();
        host.end();
        assert!(cluster.content(&name) == frozen, "a frozen layer does not change");
        assert!(content(&rig, "volume", "t") == data && content(&rig, "volume", "clone") == two);
        assert!(content(&rig, "snapshot", &snapshot) == then);

        store.ok(&["volume", "delete", "t"]);
        store.ok(&["volume", "delete", "clone"]);
        store.ok(&["snapshot", "delete", &snapshot]);
        // The image stays, without the copies of its wrapped keys.
        let left = cluster.content(&name);
        assert!(is_zero(&left[..MIB as usize]) && left[MIB as usize..] == frozen[MIB as usize..]);
        assert!(rig.layers("device").is_empty() && rig.layers("img").is_empty());
        let left = cluster.tool(&["rbd", "image-meta", "ls", "--format", "json", &format!("rbd/n/{name}")]);
        assert_eq!(left.trim(), "");
    }
}

#[test]
fn discards_give_space_back_and_what_is_zeros_is_not_there() {
    let cluster = Cluster::shared();
    let rig = rig(cluster, "discards", &[]);
    let (host, mut guest) = rig.attach("t", 512, vec![0; SIZE]);
    guest.work();
    guest.zero_all();
    let data = guest.leave();
    host.end();
    assert!(is_zero(&data) && is_zero(&cluster.content("discards")[MIB as usize..]));
    let used = cluster.tool(&["rbd", "du", "--format", "json", "rbd/n/discards"]);
    let used: serde_json::Value = serde_json::from_str(&used).unwrap();
    // The header's object, and that of the volume's first bytes, which is the same.
    assert_eq!(used["images"][0]["used_size"], 4 * MIB, "{used}");
}

#[test]
fn zeros_and_discards_are_exact_to_the_sector() {
    let cluster = Cluster::shared();
    let rig = rig(cluster, "exact", &[]);
    let (host, mut guest) = rig.attach("t", 512, vec![0; SIZE]);
    let full = crate::common::disk::pattern(5, SIZE);
    for (n, bytes) in full.chunks(1 << 20).enumerate() {
        let write = Request::write(n as u64 * 2048, bytes);
        assert_eq!(write.run(&mut guest.session.rings[0]).unwrap().status, OK);
    }
    guest.data = full;
    // Within an object, at its ends, over them, and all of one; the first ends 3 MiB into the volume.
    let ranges = [(3, 1), (100, 7), (6143, 1), (6144, 1), (6150, 3), (14335, 2), (14340, 1000), (15999, 385)];
    for (n, (sector, count)) in ranges.into_iter().enumerate() {
        let flags = u32::from(n % 2 == 0);
        let zero = Request::write_zeroes(&[Segment { sector, count, flags }]);
        let ring = &mut guest.session.rings[n % 2];
        assert_eq!(zero.run(ring).unwrap().status, OK, "{count} sectors at {sector}");
        guest.data[sector as usize * 512..][..count as usize * 512].fill(0);
    }
    // A whole object but for its first and last sector.
    let discard = Request::discard(&[Segment { sector: 6145 + 6, count: 8191 - 7, flags: 0 }]);
    assert_eq!(discard.run(&mut guest.session.rings[0]).unwrap().status, OK);
    guest.data[(6145 + 6) * 512..14335 * 512].fill(0);
    guest.look();
    let data = guest.leave();
    host.end();
    assert!(content(&rig, "volume", "t") == data);
    // What is zeros is not there, and everything else is.
    let image = &cluster.content("exact")[MIB as usize..];
    for (n, (sector, stored)) in data.chunks(512).zip(image.chunks(512)).enumerate() {
        assert_eq!(is_zero(sector), is_zero(stored), "sector {n}");
    }
}

#[test]
fn an_ordinary_user_s_process_is_served_and_connected_again() {
    let rig = rig(Cluster::shared(), "user", &[]);
    by_an_ordinary_user(&rig, |host| kill(server_of(host), Signal::SIGKILL).unwrap());
}

#[test]
fn what_is_attached_for_reading_takes_no_lock_and_is_not_written() {
    let cluster = Cluster::shared();
    let rig = rig(cluster, "read", &[]);
    for_reading_alone(&rig);
    let list = cluster.tool(&["rbd", "image-meta", "ls", "--format", "json", "rbd/n/read"]);
    assert_eq!(list.trim(), "");
}

#[test]
fn an_image_that_is_there_is_taken_if_it_is_zeros() {
    let cluster = Cluster::shared();
    cluster.tool(&["rbd", "create", "--size", "12M", "rbd/n/there"]);
    let store = Store::new();
    with_ceph(&store);
    let image = cluster.image("a", "there");
    cluster.tool(&[
        "rbd",
        "bench",
        "--io-type",
        "write",
        "--io-size",
        "4K",
        "--io-total",
        "4K",
        "rbd/n/there",
    ]);
    let said = refuse(&store, 4, &["volume", "create", "--rbd", &image]);
    assert!(said.contains("only a device of zeros can become a volume's"), "{said}");
    store.ok(&["volume", "create", "--rbd", &image, "--wipe", "--name", "all"]);
    let shown: serde_json::Value =
        serde_json::from_str(&store.ok(&["volume", "show", "all", "--json"])).unwrap();
    assert_eq!(shown["size"], 11 * MIB, "all of the image");
    // It is another volume's now.
    let said = refuse(&store, 4, &["volume", "create", "--rbd", &image]);
    assert!(said.contains("which is in this store"), "{said}");
    // Larger, behind Ceph's back first.
    cluster.tool(&["rbd", "resize", "--no-progress", "--size", "20M", "rbd/n/there"]);
    store.ok(&["volume", "resize", "all", "16MiB"]);
}

#[test]
fn what_is_no_image_is_refused_in_words() {
    let cluster = Cluster::shared();
    let store = Store::new();
    with_ceph(&store);
    let create = |code, image: &str, more: &[&str]| {
        refuse(&store, code, &[&["volume", "create", "--rbd", image], more].concat())
    };
    let said = create(3, &cluster.image("a", "none"), &[]);
    assert!(said.contains("rbd/n/none") && said.contains("--size"), "{said}");
    // Beyond what the host's caps are for.
    let outside = cluster.image("a", "x").replace("rbd/n/x", "rbd/x");
    let said = create(1, &outside, &["--size", "8MiB"]);
    assert!(said.contains("client.a may not use") && said.contains("docs/ceph.md"), "{said}");
    // One that could not be kept from others.
    cluster.tool(&["rbd", "create", "--size", "12M", "--image-feature", "layering", "rbd/n/plain"]);
    let said = create(2, &cluster.image("a", "plain"), &[]);
    assert!(said.contains("no exclusive lock") && said.contains("rbd feature enable"), "{said}");
    let unknown = cluster.image("a", "x").replace("id=a", "id=nobody");
    let said = create(1, &unknown, &["--size", "8MiB"]);
    assert!(said.contains("client.nobody") && said.contains("keyring"), "{said}");
    let said = create(2, "x", &["--size", "8MiB"]);
    assert!(said.contains("give POOL[/NAMESPACE]/IMAGE"), "{said}");
}

#[test]
fn where_ceph_is_not_installed_its_package_is_named() {
    let store = Store::new();
    // The first librados that the loader finds is none.
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("librados.so.2"), "").unwrap();
    store.set_environment(vec![("LD_LIBRARY_PATH".into(), folder.path().to_str().unwrap().into())]);
    let said = refuse(&store, 8, &["volume", "create", "--rbd", "rbd/x", "--size", "8MiB"]);
    assert!(said.contains("apt install librados2"), "{said}");
}

#[test]
fn a_volume_moves_into_an_image_and_out_of_it_and_gets_a_new_key_there() {
    let cluster = Cluster::shared();
    let store = Store::new();
    with_ceph(&store);
    let rig = crate::devices::rig::Rig { place: crate::common::attach::Place::of(store, &[]) };
    let (host, mut guest) = rig.attach("t", 512, vec![0; SIZE]);
    guest.work();
    let data = guest.leave();
    host.end();
    let store = rig.store();
    store.ok(&["volume", "move", "t", "--to", &cluster.image("a", "moved"), "--follow"]);
    assert!(content(&rig, "volume", "t") == data && rig.layers("img").is_empty());
    assert_eq!(cluster.info("moved")["size"], 9 * MIB);
    // Into another image, with another data key.
    store.ok(&["volume", "rekey", "t", "--onto", &cluster.image("a", "rekeyed"), "--follow"]);
    let (host, mut guest) = rig.attach("t", 512, data);
    guest.look();
    guest.work();
    let data = guest.leave();
    host.end();
    assert!(content(&rig, "volume", "t") == data);
    store.ok(&["volume", "move", "t", "--to", "file", "--follow"]);
    assert!(content(&rig, "volume", "t") == data && rig.layers("device").is_empty());
    for name in ["moved", "rekeyed"] {
        assert!(is_zero(&cluster.content(name)[..MIB as usize]), "{name} is free");
    }
}

#[test]
fn a_volume_goes_with_its_image_to_another_host_and_back() {
    let cluster = Cluster::shared();
    let rig = rig(cluster, "adopted", &[]);
    let there = elsewhere(&rig);
    let (host, mut guest) = rig.attach("t", 512, vec![0; SIZE]);
    guest.work();
    let data = guest.leave();
    host.end();
    let id = there.id(&["volume", "adopt", &cluster.image("b", "adopted"), "--name", "mine"]);
    assert_eq!(id, rig.place.id());
    let (host, mut guest) = there.attach("mine", 512, data);
    guest.look();
    guest.work();
    let data = guest.leave();
    host.end();
    let said = rig.refuse_attach(7);
    assert!(said.contains("was taken over by another store"), "{said}");
    rig.store().ok(&["volume", "adopt", &cluster.image("a", "adopted")]);
    let (host, mut guest) = rig.attach("t", 512, data);
    guest.look();
    guest.leave();
    host.end();
}

/// What has librbd, and a network, has ciphertext alone; and what started it has nothing at all.
#[test]
fn what_serves_an_image_has_neither_the_data_key_nor_what_the_guest_writes() {
    let cluster = Cluster::shared();
    let rig = rig(cluster, "kept-to-itself", &[]);
    let dek = rig.place.dek();
    let (host, mut guest) = rig.attach("t", 512, vec![0; SIZE]);
    guest.work();
    guest.look();
    let plaintext = guest.some_written();
    let needles = Needles::of_secrets(&[("the data key", &dek), ("plaintext", &plaintext)]);
    for (pid, known) in [(server_of(&host), "kept-to-itself"), (keeper_of(&host), "serve-rbd")] {
        assert_has_none(pid, &needles, known);
    }
    assert_children_outlive_ctrl_c(host.pid());
    guest.work();
    guest.look();
    guest.leave();
    host.end();
}
