//! Settings that an earlier version has left in a store, and how they come into the configuration folder.
//!
//! Nobody reads them where they are: whoever can write the store could have written them, and has a command
//! run or another key used. A store that has such a file is refused. An operator looks at it and moves it. It
//! is in the new place, durably, before it leaves the old one; a cut between the two leaves both, which say
//! the same, and the next try ends it.

use crate::base::root::{Root, files, owners, sync_dir};
use crate::base::{Context, Error, Kind, Result};
use crate::config::{FILE, MAX_LEN, Settings, edit, find, usage};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// # Errors
/// `Usage` for a store that has settings of an earlier version in it, with the command that moves them.
pub fn refuse_old(config: &Path, root: &Root) -> Result<()> {
    let old = root.old_settings();
    if !files::exists(&old) {
        return Ok(());
    }
    Err(usage(format!(
        "{} is not read, since whoever can write the store could have written it; look at it: if it is \
         yours, \"sealblk --root {} settings move\" moves it to {}, and if it is not, remove it",
        old.display(),
        root.path().display(),
        config.join(FILE).display()
    )))
}

/// Settings in a store that can be moved.
pub struct Old {
    config: PathBuf,
    /// Where they are.
    pub from: PathBuf,
    /// Where they go.
    pub to: PathBuf,
    /// The file as it is.
    pub text: String,
    /// What it means.
    pub settings: Settings,
    /// Whether the configuration folder says the same already.
    pub is_there: bool,
    mode: u32,
}

/// Reads the settings that an earlier version has left in the store at `root`; none if there are none.
/// Changes nothing.
///
/// # Errors
/// `Usage` for a file that cannot be understood, that somebody else can write, or that differs from settings
/// that are in the configuration folder already; `Corrupt` for what is no regular file.
pub fn look(root: &Root) -> Result<Option<Old>> {
    look_from(&Root::config_dir()?, root)
}

fn look_from(config: &Path, root: &Root) -> Result<Option<Old>> {
    let from = root.old_settings();
    if !files::exists(&from) {
        return Ok(None);
    }
    let attempt = || format!("move {}", from.display());
    if std::fs::read_link(&from).is_ok() {
        let message = format!(
            "it is a symbolic link; copy what it leads to into {} if that is yours, and remove the link",
            config.join(FILE).display()
        );
        return Err(Error::new(Kind::Corrupt, message).context(attempt()));
    }
    owners::check_deciding(&from).context(attempt)?;
    let text = files::read(&from, MAX_LEN).context(attempt)?;
    let text = String::from_utf8(text).map_err(|_| usage("it is not UTF-8")).context(attempt)?;
    let settings = Settings::parse(&text).context(attempt)?;
    let mode = from.metadata().context(attempt)?.mode() & 0o755;
    let found = find(config)?;
    let to = found.clone().unwrap_or_else(|| config.join(FILE));
    if let Some(found) = &found
        && Settings::read(found)? != settings
    {
        let message = format!(
            "{} says something else; make that file say what is to hold for all stores, and remove {}",
            found.display(),
            from.display()
        );
        return Err(usage(message).context(attempt()));
    }
    let config = config.to_owned();
    Ok(Some(Old { config, from, to, text, settings, is_there: found.is_some(), mode }))
}

impl Old {
    /// Moves them, comments and all, durably.
    ///
    /// # Errors
    /// As for [`look`], if that has changed meanwhile; those of the file system. The old file is there then,
    /// unless it was moved by somebody else.
    pub fn carry_out(&self) -> Result<()> {
        let attempt = || format!("move {}", self.from.display());
        let _folder = edit::lock(&self.config)?;
        match find(&self.config)? {
            Some(found) if Settings::read(&found)? == self.settings => {
                // An editor may have written it just now.
                files::open(&found).and_then(|file| file.sync_all()).context(attempt)?;
                sync_dir(found.parent().unwrap_or(Path::new("/")))?;
            }
            Some(found) => {
                return Err(usage(format!("{} was written just now", found.display())).context(attempt()));
            }
            None => {
                // Under another name until it is whole and durable.
                files::create_file(&self.to, self.text.as_bytes()).context(attempt)?;
                files::set_mode(&self.to, self.mode).context(attempt)?;
            }
        }
        match files::read(&self.from, MAX_LEN) {
            Ok(now) if now != self.text.as_bytes() => {
                let message = "it was changed just now, and is left where it is";
                return Err(Error::new(Kind::Busy, message).context(attempt()));
            }
            _ => files::remove_if_there(&self.from).context(attempt)?,
        }
        sync_dir(self.from.parent().unwrap_or(Path::new(".")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# Ours\nregion = 'eu-1' # here\n";

    fn place() -> (tempfile::TempDir, Root, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let (root, config) = (dir.path().join("root"), dir.path().join("config"));
        std::fs::create_dir(&root).unwrap();
        let root = Root::new(root);
        std::fs::write(root.old_settings(), TEXT).unwrap();
        (dir, root, config)
    }

    fn old(config: &Path, root: &Root) -> Old {
        look_from(config, root).unwrap().expect("there are settings")
    }

    #[test]
    fn settings_in_a_store_are_refused_until_they_are_moved() {
        let (_dir, root, config) = place();
        let e = Settings::load_from(&config, &root).unwrap_err();
        assert!(e.kind() == Kind::Usage && e.to_string().contains("settings move"), "{e}");
        let found = old(&config, &root);
        assert!(!found.is_there && !config.exists() && found.text == TEXT);
        found.carry_out().unwrap();
        assert_eq!(std::fs::read_to_string(config.join(FILE)).unwrap(), TEXT);
        assert!(!root.old_settings().exists() && look_from(&config, &root).unwrap().is_none());
        assert_eq!(Settings::load_from(&config, &root).unwrap(), found.settings);
    }

    #[test]
    fn what_a_cut_left_in_both_places_is_ended() {
        let (_dir, root, config) = place();
        old(&config, &root).carry_out().unwrap();
        std::fs::write(root.old_settings(), TEXT).unwrap();
        let found = old(&config, &root);
        assert!(found.is_there);
        found.carry_out().unwrap();
        assert!(!root.old_settings().exists());
        assert_eq!(std::fs::read_to_string(config.join(FILE)).unwrap(), TEXT);
    }

    #[test]
    fn settings_that_differ_stay_both() {
        let (_dir, root, config) = place();
        std::fs::create_dir(&config).unwrap();
        std::fs::write(config.join(FILE), "encrypt-by-default = true\n").unwrap();
        let e = look_from(&config, &root).err().expect("they differ");
        assert!(e.kind() == Kind::Usage && e.to_string().contains("says something else"), "{e}");
        std::fs::remove_file(config.join(FILE)).unwrap();
        // The same between the look and the move.
        let found = old(&config, &root);
        std::fs::write(config.join(FILE), "encrypt-by-default = true\n").unwrap();
        assert!(found.carry_out().unwrap_err().to_string().contains("just now"));
        std::fs::remove_file(config.join(FILE)).unwrap();
        std::fs::write(root.old_settings(), "region = 'x'\n").unwrap();
        assert_eq!(found.carry_out().unwrap_err().kind(), Kind::Busy);
        assert_eq!(std::fs::read_to_string(root.old_settings()).unwrap(), "region = 'x'\n");
    }

    #[test]
    fn what_others_can_write_or_nobody_understands_is_not_moved() {
        use std::os::unix::fs::PermissionsExt;
        let (dir, root, config) = place();
        let file = root.old_settings();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o666)).unwrap();
        let e = look_from(&config, &root).err().expect("everybody can write it");
        assert!(e.to_string().contains("every user"), "{e}");
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
        std::fs::write(&file, "region = \n").unwrap();
        assert_eq!(look_from(&config, &root).err().map(|e| e.kind()), Some(Kind::Usage));
        std::fs::rename(&file, dir.path().join("elsewhere")).unwrap();
        std::os::unix::fs::symlink(dir.path().join("elsewhere"), &file).unwrap();
        let e = look_from(&config, &root).err().expect("it is a link");
        assert!(e.kind() == Kind::Corrupt && e.to_string().contains("symbolic link"), "{e}");
    }
}
