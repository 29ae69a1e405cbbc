//! What decides lies beside the root key, and what lies with the ciphertext decides nothing.

use crate::common::attach::Place;
use crate::common::store::Store;
use crate::{edit, refused, run};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

const NOBODY: u32 = 65534;

/// What somebody leaves in the store who would like to be root, have plaintext written, and keep a data key.
fn plant(place: &Place) -> PathBuf {
    let ran = place.folder().join("ran");
    let text = format!(
        "default-key = 'arn:aws:kms:eu-1:666666666666:key/1234abcd-12ab-34cd-56ef-1234567890ab'\n\
         encrypt-by-default = false\n\
         [[event-sink]]\nname = 'x'\ncommand = ['/bin/sh', '-c', 'touch {}']\n",
        ran.display()
    );
    fs::write(place.store.root().join("sealblk.toml"), text).unwrap();
    ran
}

fn volumes(place: &Place) -> usize {
    fs::read_dir(place.store.root().join("volumes")).unwrap().count()
}

#[test]
fn settings_that_lie_in_the_store_do_nothing_but_get_commands_refused() {
    let place = Place::with_settings("encrypt-by-default = true\n", &[]);
    let snapshot: Value =
        serde_json::from_str(&place.store.ok(&["snapshot", "create", "t", "--json"])).unwrap();
    let snapshot = snapshot.to_string();
    let snapshot = snapshot.split('"').find(|word| word.starts_with("snap-")).unwrap().to_owned();
    let ran = plant(&place);
    let image = place.folder().join("image");
    fs::write(&image, [1; 4096]).unwrap();
    let (image, out) = (image.display().to_string(), place.folder().join("out").display().to_string());
    let socket = place.socket().display().to_string();
    let before = (volumes(&place), fs::read(place.volume_json()).unwrap());
    for command in [
        &["volume", "create", "--size", "1MiB"][..],
        &["volume", "create", "--size", "1MiB", "--unencrypted"],
        &["volume", "create", "--snapshot", &snapshot],
        &["volume", "import", &image, "--format", "raw", "--unencrypted"],
        &["volume", "export", "t", &out],
        &["volume", "rekey", "t"],
        &["volume", "rewrap", "t"],
        &["volume", "resize", "t", "9MiB"],
        &["snapshot", "create", "t"],
        &["snapshot", "copy", &snapshot],
        &["attach", "t", "--socket-path", &socket],
        &["events", "deliver"],
        &["audit", "verify"],
        &["settings", "show"],
        &["settings", "encrypt-by-default", "on"],
    ] {
        let said = refused(&place, command, 2, "settings move");
        assert!(said.contains(&place.store.root().join("sealblk.toml").display().to_string()), "{said}");
    }
    assert_eq!((volumes(&place), fs::read(place.volume_json()).unwrap()), before);
    assert!(!ran.exists() && !PathBuf::from(out).exists());
    // What is running can be ended all the same, and what there is can be looked at.
    fs::remove_file(place.store.root().join("sealblk.toml")).unwrap();
    let host = place.attach(&[]);
    plant(&place);
    place.store.ok(&["volume", "list"]);
    place.store.ok(&["volume", "show", "t"]);
    place.store.ok(&["detach", "t"]);
    host.ends_well();
    assert!(!ran.exists());
}

#[test]
fn a_planted_file_of_any_kind_gets_commands_refused() {
    let place = Place::new(&[]);
    let file = place.store.root().join("sealblk.toml");
    let create = ["volume", "create", "--size", "1MiB"];
    fs::create_dir(&file).unwrap();
    refused(&place, &create, 2, "settings move");
    refused(&place, &["settings", "move"], 7, "a folder");
    fs::remove_dir(&file).unwrap();
    symlink("/nowhere", &file).unwrap();
    refused(&place, &create, 2, "settings move");
    refused(&place, &["settings", "move"], 7, "symbolic link");
    fs::remove_file(&file).unwrap();
    nix::unistd::mkfifo(&file, nix::sys::stat::Mode::S_IRWXU).unwrap();
    refused(&place, &create, 2, "settings move");
    refused(&place, &["settings", "move"], 7, "named pipe");
    fs::remove_file(&file).unwrap();
    place.store.ok(&create);
}

#[test]
fn settings_are_read_only_where_nobody_else_can_write_them() {
    let place = Place::with_settings("encrypt-by-default = true\n", &[]);
    let (config, file) = (place.store.config(), place.store.settings());
    let show = ["settings", "show"];
    let mode = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    for path in [&config, &file] {
        let before = fs::metadata(path).unwrap().permissions().mode();
        mode(path, 0o777);
        let said = refused(&place, &show, 2, "every user");
        assert!(said.contains(&path.display().to_string()), "{said}");
        mode(path, before);
        chown(path, Some(NOBODY), None).unwrap();
        refused(&place, &show, 2, "belongs to nobody");
        // Whom the store may belong to decides nothing.
        fs::write(config.join("store-users"), "nobody\n").unwrap();
        refused(&place, &show, 2, "belongs to nobody");
        chown(path, Some(0), None).unwrap();
        place.store.ok(&show);
    }
    // A folder that somebody else can write could have lost them just now.
    fs::rename(&file, place.folder().join("elsewhere.toml")).unwrap();
    mode(&config, 0o777);
    refused(&place, &show, 2, "every user");
    mode(&config, 0o755);
    // A link is followed to what nobody else can write, and by no link that somebody else can replace.
    symlink(place.folder().join("elsewhere.toml"), &file).unwrap();
    refused(&place, &["volume", "create", "--size", "1MiB", "--unencrypted"], 2, "encrypt-by-default");
    mode(&place.folder().join("elsewhere.toml"), 0o666);
    refused(&place, &show, 2, "every user");
    mode(&place.folder().join("elsewhere.toml"), 0o644);
    let open = place.folder().join("open");
    fs::create_dir(&open).unwrap();
    symlink(place.folder().join("elsewhere.toml"), open.join("link")).unwrap();
    mode(&open, 0o777);
    fs::remove_file(&file).unwrap();
    symlink(open.join("link"), &file).unwrap();
    refused(&place, &show, 2, "another user has made, or can replace");
    fs::rename(place.folder().join("elsewhere.toml"), open.join("real.toml")).unwrap();
    fs::remove_file(&file).unwrap();
    symlink(open.join("real.toml"), &file).unwrap();
    refused(&place, &show, 2, "every user");
    // A link that leads nowhere is not "no settings".
    fs::remove_file(open.join("real.toml")).unwrap();
    refused(&place, &show, 3, "real.toml");
}

#[test]
fn who_may_not_read_the_settings_is_told_so_and_gets_no_defaults() {
    use std::os::unix::process::CommandExt;
    // The program has to be where that user can start it.
    let place = Place::with_settings("encrypt-by-default = true\n", &[]);
    let program = place.folder().join("sealblk");
    // Copied by another process: a descriptor of this one's, open for writing, would be in every child that
    // another test starts meanwhile, and no program is run that somebody has open for writing.
    let mut copy = std::process::Command::new("cp");
    copy.arg(env!("CARGO_BIN_EXE_sealblk")).arg(&program);
    assert_eq!(crate::ends(copy).0, 0, "copy the program");
    fs::set_permissions(place.folder(), fs::Permissions::from_mode(0o755)).unwrap();
    let theirs = place.folder().join("theirs");
    fs::create_dir(&theirs).unwrap();
    chown(&theirs, Some(NOBODY), Some(NOBODY)).unwrap();
    let create = |config: &Path| {
        let mut command = std::process::Command::new(&program);
        command.uid(NOBODY).gid(NOBODY).current_dir("/").env_clear().env("SEALBLK_CONFIG_DIR", config);
        command.arg("--root").arg(theirs.join("root"));
        command.args(["volume", "create", "--size", "1MiB", "--unencrypted"]);
        crate::ends(command)
    };
    fs::set_permissions(place.store.config(), fs::Permissions::from_mode(0o700)).unwrap();
    let (code, said) = create(&place.store.config());
    assert!(
        code == 2 && said.contains("nobody may not read") && said.contains("SEALBLK_CONFIG_DIR"),
        "{said}"
    );
    fs::set_permissions(place.store.config(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(place.store.settings(), fs::Permissions::from_mode(0o600)).unwrap();
    let (code, said) = create(&place.store.config());
    assert!(code == 2 && said.contains("nobody may not read"), "{said}");
    fs::set_permissions(place.store.settings(), fs::Permissions::from_mode(0o644)).unwrap();
    let (code, said) = create(&place.store.config());
    assert!(code == 2 && said.contains("encrypt-by-default"), "{said}");
    // That user's own folder.
    let (code, said) = create(&theirs.join("config"));
    assert_eq!(code, 0, "{said}");
}

#[test]
fn an_encrypted_volume_that_becomes_an_unencrypted_one_is_not_opened_where_encryption_is_required() {
    let place = Place::new(&[]);
    place.store.ok(&["volume", "create", "--size", "8MiB", "--name", "plain", "--unencrypted"]);
    place.store.ok(&["snapshot", "create", "plain", "--name", "s"]);
    let plain: Value = {
        let id: Value =
            serde_json::from_str(&place.store.ok(&["volume", "show", "plain", "--json"])).unwrap();
        let folder = place.store.root().join("volumes").join(id["id"].as_str().unwrap());
        serde_json::from_slice(&fs::read(folder.join("volume.json")).unwrap()).unwrap()
    };
    place.store.configure("require-encrypted = true\n");
    place.attach(&[]).end();
    edit(&place.volume_json(), |record| {
        for field in ["encrypted", "keys", "seal", "mac"] {
            record[field] = plain[field].clone();
        }
        let mut layer = plain["layers"][1].clone();
        layer["id"] = record["layers"][0]["id"].clone();
        record["layers"] = json!([layer]);
    });
    // The ledger would be in the way first.
    place.store.accept();
    let said = place.refuse(5, &[]);
    assert!(said.contains("not encrypted") && said.contains("require-encrypted"), "{said}");
    let event = place.events().pop().unwrap();
    assert_eq!(
        (&event["detail"]["event"], &event["detail"]["result"]),
        (&json!("reattachVolume"), &json!("failed"))
    );
    let out = place.folder().join("out").display().to_string();
    let image = place.folder().join("image");
    fs::write(&image, [1; 4096]).unwrap();
    let image = image.display().to_string();
    for command in [
        &["snapshot", "create", "t"][..],
        &["volume", "resize", "t", "9MiB"],
        &["volume", "export", "t", &out],
        &["volume", "flatten", "plain", "--follow"],
        &["snapshot", "export", "s", &out],
        &["volume", "create", "--size", "1MiB", "--unencrypted"],
        &["volume", "create", "--snapshot", "s"],
        &["volume", "import", &image, "--format", "raw", "--unencrypted"],
        &["attach", "t", "--incoming", "--socket-path", &out],
    ] {
        refused(&place, command, 5, "require-encrypted");
    }
    // What comes of it is encrypted.
    place.store.ok(&["volume", "create", "--snapshot", "s", "--key", "alias/aws/ebs"]);
    place.store.ok(&["volume", "delete", "plain"]);
    // Making volumes is another setting's affair.
    place.store.configure("encrypt-by-default = true\n");
    place.attach(&[]).end();
}

#[test]
fn a_data_key_is_made_and_unwrapped_by_allowed_keys_alone() {
    let place = Place::new(&[]);
    place.store.ok(&["key", "create", "--alias", "alias/mine"]);
    let (used, id) = (place.key(), place.key().rsplit_once('/').unwrap().1.to_owned());
    let every = used.replace(&id, "*");
    for allowed in ["embedded", "alias/aws/ebs", &used, &id, &format!("embedded:{used}"), &every] {
        place.store.configure(&format!("kms-keys = ['aws:alias/x', {allowed:?}]\n"));
        place.attach(&[]).end();
        place.store.ok(&["volume", "show", "t", "--check-key"]);
    }
    place.store.configure("kms-keys = ['alias/mine', 'aws']\n");
    let said = place.refuse(5, &[]);
    assert!(said.contains(&used) && said.contains("kms-keys"), "{said}");
    let event = place.events().pop().unwrap();
    assert!(event["detail"]["cause"].as_str().unwrap().contains("kms-keys"), "{event}");
    let (code, records) = run(&place, &["audit", "show", "--json"]);
    assert_eq!(code, 0, "{records}");
    assert!(records.lines().last().unwrap().contains("AccessDeniedException"), "{records}");
    place.store.ok(&["audit", "verify"]);
    for command in [
        &["volume", "create", "--size", "1MiB"][..],
        &["volume", "create", "--size", "1MiB", "--key", "alias/aws/ebs"],
        &["volume", "show", "t", "--check-key"],
        &["volume", "rekey", "t", "--key", "alias/mine"],
        &["volume", "rewrap", "t", "--key", "alias/mine"],
        &["snapshot", "create", "t"],
        &["settings", "default-key", "alias/aws/ebs"],
    ] {
        refused(&place, command, 5, "kms-keys");
    }
    place.store.ok(&["volume", "create", "--size", "1MiB", "--key", "alias/mine"]);
    // A record names a key by its ARN: an alias could come to mean another key between two looks.
    place.store.configure("kms-keys = ['alias/aws/ebs']\n");
    let record = fs::read(place.volume_json()).unwrap();
    edit(&place.volume_json(), |record| record["keys"][0]["key_id"] = "alias/aws/ebs".into());
    place.store.accept();
    assert!(place.refuse(5, &[]).contains("kms-keys"));
    fs::write(place.volume_json(), record).unwrap();
    place.store.accept();
    place.attach(&[]).end();
    // An alias means what it means now.
    place.store.configure("kms-keys = ['alias/mine', 'alias/aws/ebs']\n");
    place.store.ok(&["volume", "rewrap", "t", "--key", "alias/mine"]);
    place.store.configure("kms-keys = ['alias/mine']\n");
    place.attach(&[]).end();
}

/// What an earlier version left comes into the configuration folder, by one command that shows it.
#[test]
fn settings_of_an_earlier_version_are_moved_by_a_command() {
    let store = Store::new();
    fs::create_dir(store.root()).unwrap();
    let old = store.root().join("sealblk.toml");
    let text = "# Ours\nencrypt-by-default = true # since May\n";
    fs::write(&old, text).unwrap();
    let shown = store.ok(&["settings", "move", "--dry-run"]);
    assert!(shown.contains(text) && shown.contains("would be moved"), "{shown}");
    assert!(old.exists() && !store.settings().exists());
    let shown = store.ok(&["settings", "move"]);
    assert!(shown.contains(text) && shown.contains(&store.settings().display().to_string()), "{shown}");
    assert_eq!(fs::read_to_string(store.settings()).unwrap(), text);
    assert!(!old.exists());
    let shown: Value = serde_json::from_str(&store.ok(&["settings", "show", "--json"])).unwrap();
    assert_eq!(shown["encrypt_by_default"], true);
    assert!(store.ok(&["settings", "move"]).contains("nothing is to be moved"));
    // As a cut of the power between the two leaves them.
    fs::write(&old, text).unwrap();
    let shown: Value = serde_json::from_str(&store.ok(&["settings", "move", "--json"])).unwrap();
    assert_eq!((&shown["moved"], &shown["text"]), (&json!(true), &json!(text)));
    assert!(!old.exists());
    // Another store's that say something else.
    fs::write(&old, "encrypt-by-default = false\n").unwrap();
    let output = store.run(&["settings", "move"]);
    let said = crate::common::store::said(&output);
    assert!(output.status.code() == Some(2) && said.contains("says something else"), "{said}");
    assert!(old.exists() && fs::read_to_string(store.settings()).unwrap() == text);
}
