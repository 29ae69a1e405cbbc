//! Changing `sealblk.toml` by command: one setting at a time, the operator's comments,
//! order and spacing kept.

use crate::base::root::{Root, create_dir_durable, files, owners, replace_file};
use crate::base::{Context, Error, Kind, Result, locks};
use crate::config::{FILE, MAX_LEN, Settings, find, moving};
use std::fs::{File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use toml_edit::{DocumentMut, Item, Value};

/// Sets `key` to `value`, or takes it out so that its default holds again; durable when this returns. Returns
/// the settings as they are then.
///
/// # Errors
/// As for [`Settings::load`] of the file, before or with the change; it is as it was then.
pub fn set(root: &Root, key: &str, value: Option<Value>) -> Result<Settings> {
    set_in(&Root::config_dir()?, root, key, value)
}

fn set_in(config: &Path, root: &Root, key: &str, value: Option<Value>) -> Result<Settings> {
    moving::refuse_old(config, root)?;
    let _folder = lock(config)?;
    let (path, text) = match find(config)? {
        Some(path) => {
            let text =
                owners::read_deciding(&path, MAX_LEN).context(|| format!("read {}", path.display()))?;
            (path, text)
        }
        None => (config.join(FILE), Vec::new()),
    };
    let attempt = || format!("change {key} in {}", path.display());
    let not_text = |_| Error::new(Kind::Usage, "it is not UTF-8");
    let text = String::from_utf8(text).map_err(not_text).context(attempt)?;
    let text = changed(&text, key, value).context(attempt)?;
    let settings = Settings::parse(&text).context(attempt)?;
    let mode = std::fs::metadata(&path).map(|m| m.permissions().mode() & 0o777);
    replace_file(&path, text.as_bytes())?;
    if let Ok(mode) = mode {
        // Whom the operator let read it may go on reading it.
        std::fs::set_permissions(&path, Permissions::from_mode(mode)).context(attempt)?;
    }
    Ok(settings)
}

/// Of two commands at once, neither loses the other's change. The file itself is replaced, so it cannot be
/// locked: this locks the folder, which is made if there is none.
pub(super) fn lock(config: &Path) -> Result<impl Drop + use<>> {
    create_dir_durable(config)?;
    let folder: std::io::Result<File> = files::folder(config);
    folder.and_then(locks::lock_whole).context(|| format!("lock {}", config.display()))
}

/// `text` with `key` set to `value`. What stands before and behind an old value stays: a comment, say.
fn changed(text: &str, key: &str, value: Option<Value>) -> Result<String> {
    let mut document: DocumentMut = text.parse().map_err(|e: toml_edit::TomlError| {
        let message = e.to_string().trim_end().to_owned();
        Error::of(Kind::Usage, e).reworded(message)
    })?;
    match (value, document.get_mut(key).and_then(Item::as_value_mut)) {
        (Some(mut new), Some(old)) => {
            *new.decor_mut() = old.decor().clone();
            *old = new;
        }
        (Some(new), None) => drop(document.insert(key, Item::Value(new))),
        (None, _) => drop(document.remove(key)),
    }
    Ok(document.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
# Disks of team a.

region = 'eu-1'   # where we are
encrypt-by-default=false # for now

# The key
default-key = \"alias/one\"
# the end
";

    #[test]
    fn nothing_else_changes() {
        let text = changed(TEXT, "encrypt-by-default", Some(true.into())).unwrap();
        assert_eq!(text, TEXT.replace("=false", "=true"));
        let text = changed(&text, "default-key", Some("alias/two".into())).unwrap();
        assert_eq!(text, TEXT.replace("=false", "=true").replace("alias/one", "alias/two"));
        let text = changed(TEXT, "default-key", None).unwrap();
        assert!(!text.contains("alias/one") && text.contains("# the end") && text.contains("# where we are"));
        assert_eq!(changed("", "a", Some(1.into())).unwrap(), "a = 1\n");
        assert_eq!(changed(TEXT, "account", None).unwrap(), TEXT);
        assert!(changed("a = ", "a", None).is_err());
    }

    #[test]
    fn a_link_and_a_mode_stay_what_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let (root, config) = (Root::new(dir.path().join("root")), dir.path().join("config"));
        create_dir_durable(&config).unwrap();
        let (real, link) = (dir.path().join("real.toml"), config.join(FILE));
        std::fs::write(&real, TEXT).unwrap();
        std::fs::set_permissions(&real, Permissions::from_mode(0o644)).unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        let settings = set_in(&config, &root, "encrypt-by-default", Some(true.into())).unwrap();
        assert!(settings.encrypt_by_default && settings == Settings::load_from(&config, &root).unwrap());
        assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(std::fs::metadata(&real).unwrap().permissions().mode() & 0o777, 0o644);
        let broken = set_in(&config, &root, "region", Some("?".into())).unwrap_err();
        assert!(broken.to_string().contains("region must be"), "{broken}");
        assert_eq!(Settings::load_from(&config, &root).unwrap(), settings);
    }
}
