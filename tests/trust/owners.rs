//! Whose folders a store is in.

use crate::common::attach::Place;
use crate::{refused, run};
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::PathBuf;

const NOBODY: u32 = 65534;

fn folders(place: &Place) -> Vec<PathBuf> {
    let root = place.store.root();
    place.store.ok(&["snapshot", "create", "t"]);
    let inner = ["volumes", "layers", "snapshots", "kms"].map(|name| root.join(name));
    std::iter::once(root).chain(inner).collect()
}

#[test]
fn a_store_in_which_somebody_else_can_write_is_refused() {
    let place = Place::new(&[]);
    let folders = folders(&place);
    let above = place.folder();
    for folder in folders.iter().chain([&above]) {
        let shown = folder.display().to_string();
        let before = fs::metadata(folder).unwrap().permissions();
        for (mode, words) in [(0o757, "every user"), (0o777, "every user")] {
            fs::set_permissions(folder, fs::Permissions::from_mode(mode)).unwrap();
            let said = refused(&place, &["volume", "list"], 2, words);
            assert!(said.contains(&shown) && said.contains("chmod go-w"), "{said}");
        }
        // Group 0 is root's own; any other may have others in it.
        fs::set_permissions(folder, fs::Permissions::from_mode(0o775)).unwrap();
        place.store.ok(&["volume", "list"]);
        chown(folder, None, Some(NOBODY)).unwrap();
        refused(&place, &["volume", "list"], 2, "its group");
        chown(folder, None, Some(0)).unwrap();
        fs::set_permissions(folder, before).unwrap();
        chown(folder, Some(NOBODY), None).unwrap();
        let said = refused(&place, &["volume", "list"], 2, "belongs to nobody");
        assert!(said.contains(&shown) && said.contains("store-users"), "{said}");
        chown(folder, Some(0), None).unwrap();
        place.store.ok(&["volume", "list"]);
    }
    // Names that only their owners can change will do above the root, and not in it.
    fs::set_permissions(&above, fs::Permissions::from_mode(0o1777)).unwrap();
    place.store.ok(&["volume", "list"]);
    fs::set_permissions(&folders[0], fs::Permissions::from_mode(0o1777)).unwrap();
    refused(&place, &["volume", "list"], 2, "every user");
}

#[test]
fn a_volumes_folder_that_is_somebody_elses_is_not_used() {
    let place = Place::new(&[]);
    let (folder, id) = (place.volume_folder(), place.id());
    let attach = ["attach", &id, "--socket-path", "/nonexistent/t.sock"];
    chown(&folder, Some(NOBODY), None).unwrap();
    refused(&place, &attach, 2, "belongs to nobody");
    refused(&place, &["snapshot", "create", &id], 2, "belongs to nobody");
    chown(&folder, Some(0), None).unwrap();
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).unwrap();
    refused(&place, &attach, 2, "every user");
}

#[test]
fn the_users_that_may_have_a_store_are_named_beside_the_root_key() {
    let place = Place::new(&[]);
    chown(place.store.root(), Some(NOBODY), None).unwrap();
    refused(&place, &["volume", "list"], 2, "belongs to nobody");
    place.store.let_belong_to("nobody");
    place.store.ok(&["volume", "list"]);
    // Not in the store, and not where somebody else could write them.
    let users = place.store.config().join("store-users");
    fs::rename(&users, place.store.root().join("store-users")).unwrap();
    refused(&place, &["volume", "list"], 2, "belongs to nobody");
    fs::rename(place.store.root().join("store-users"), &users).unwrap();
    fs::set_permissions(&users, fs::Permissions::from_mode(0o666)).unwrap();
    refused(&place, &["volume", "list"], 2, "every user");
    fs::set_permissions(&users, fs::Permissions::from_mode(0o644)).unwrap();
    chown(&users, Some(NOBODY), None).unwrap();
    refused(&place, &["volume", "list"], 2, "belongs to nobody");
    chown(&users, Some(0), None).unwrap();
    fs::write(&users, "no-such-user\n").unwrap();
    let (code, said) = run(&place, &["volume", "list"]);
    assert!(code == 2 && said.contains("there is no user no-such-user"), "{said}");
}
