//! What an import takes: the file that was meant, and nobody else's.

use crate::common::attach::Place;
use crate::{refused, run};
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

const NOBODY: u32 = 65534;

/// A folder of another user's, beside the store, and a file of root's.
fn scene() -> (Place, PathBuf, PathBuf) {
    let place = Place::new(&[]);
    let theirs = place.folder().join("theirs");
    fs::create_dir(&theirs).unwrap();
    fs::set_permissions(&theirs, fs::Permissions::from_mode(0o755)).unwrap();
    chown(&theirs, Some(NOBODY), Some(NOBODY)).unwrap();
    let secrets = place.folder().join("secrets");
    fs::create_dir(&secrets).unwrap();
    let secret = secrets.join("disk.img");
    fs::write(&secret, vec![7; 1 << 20]).unwrap();
    (place, theirs, secret)
}

fn both_refused(place: &Place, path: &Path, words: &str) {
    let path = path.to_str().unwrap();
    refused(place, &["volume", "import", path], 2, words);
    refused(place, &["volume", "import", path, "--in-place"], 2, words);
}

#[test]
fn another_users_link_leads_to_nothing_of_roots() {
    let (place, theirs, secret) = scene();
    let link = theirs.join("image.img");
    symlink(&secret, &link).unwrap();
    nix::unistd::fchownat(
        nix::fcntl::AT_FDCWD,
        &link,
        Some(NOBODY.into()),
        None,
        nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW,
    )
    .unwrap();
    both_refused(&place, &link, "symbolic link");
    // Nor a folder's on the way.
    symlink(secret.parent().unwrap(), theirs.join("folder")).unwrap();
    both_refused(&place, &theirs.join("folder/disk.img"), "symbolic link");
    // Nor root's link, where the other user can put another one in its place.
    let own = theirs.join("roots");
    symlink(secret.parent().unwrap(), &own).unwrap();
    both_refused(&place, &own.join("disk.img"), "symbolic link");
    assert!(fs::read(&secret).unwrap() == vec![7; 1 << 20]);
    // What root has linked in its own folder is meant.
    symlink(secret.parent().unwrap(), place.folder().join("images")).unwrap();
    let (code, said) =
        run(&place, &["volume", "import", place.folder().join("images/disk.img").to_str().unwrap()]);
    assert_eq!(code, 0, "{said}");
}

#[test]
fn another_users_file_is_not_taken() {
    let (place, theirs, _) = scene();
    let file = theirs.join("disk.img");
    fs::write(&file, vec![7; 1 << 20]).unwrap();
    chown(&file, Some(NOBODY), Some(NOBODY)).unwrap();
    both_refused(&place, &file, "belongs to nobody");
    assert!(file.exists());
    chown(&file, Some(0), Some(0)).unwrap();
    let (code, said) = run(&place, &["volume", "import", file.to_str().unwrap(), "--in-place"]);
    assert_eq!(code, 0, "{said}");
    assert!(!file.exists());
}

#[test]
fn a_pipe_is_no_image() {
    let (place, theirs, _) = scene();
    let pipe = theirs.join("disk.img");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    both_refused(&place, &pipe, "neither a file nor a block device");
}
