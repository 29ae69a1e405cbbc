//! SoftHSM, the HSM in software that ci/setup gets from Debian: real tokens behind a real PKCS#11 module.

use super::process::{INHERITED, inherit};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

/// Tokens in a folder, gone with the value.
pub struct SoftHsm {
    folder: TempDir,
}

impl SoftHsm {
    /// A token of each of these labels; its PIN is [`SoftHsm::pin`].
    pub fn with_tokens(labels: &[&str]) -> Self {
        let hsm = SoftHsm { folder: tempfile::tempdir().expect("make a temporary folder") };
        fs::create_dir(hsm.tokens()).expect("make a folder");
        let settings = format!(
            "directories.tokendir = {}\nobjectstore.backend = file\nlog.level = ERROR\n",
            hsm.tokens().display()
        );
        fs::write(hsm.settings(), settings).expect("write the settings");
        for label in labels {
            let mut make = Command::new(tree().join("usr/bin/softhsm2-util"));
            make.arg("--module").arg(Self::module()).args(["--init-token", "--free", "--label", label]);
            make.args(["--so-pin", "5678-5678", "--pin", &Self::pin(label)]).envs(hsm.environment());
            let output = make.output().expect("start softhsm2-util");
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
        hsm
    }

    /// The PKCS#11 module.
    pub fn module() -> PathBuf {
        tree().join("usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so")
    }

    /// The PIN of the token of this label.
    pub fn pin(label: &str) -> String {
        format!("pin-of-the-token-{label}")
    }

    /// What leads the module to these tokens.
    pub fn environment(&self) -> Vec<(String, String)> {
        vec![("SOFTHSM2_CONF".into(), self.settings().display().to_string())]
    }

    /// The folder with the tokens.
    pub fn tokens(&self) -> PathBuf {
        self.folder.path().join("tokens")
    }

    /// How many keys all tokens have.
    pub fn keys(&self) -> usize {
        let tokens = fs::read_dir(self.tokens()).expect("list the tokens").map(|it| it.expect("list").path());
        let files = tokens.flat_map(|token| fs::read_dir(token).expect("list a token"));
        let names = files.map(|file| file.expect("list").file_name().into_string().expect("UTF-8"));
        names.filter(|name| name.ends_with(".object") && name != "token.object").count()
    }

    /// The settings of a server that may use the tokens of these labels over the wire, which names them
    /// `cluster-of-token-` and the label.
    pub fn for_the_wire(labels: &[&str]) -> String {
        let token = |label: &&str| {
            format!(
                "[[pkcs11-token]]\ncluster = 'cluster-of-token-{label}'\nmodule = '{}'\ntoken = '{label}'\n",
                Self::module().display()
            )
        };
        labels.iter().map(token).collect()
    }

    fn settings(&self) -> PathBuf {
        self.folder.path().join("softhsm2.conf")
    }
}

/// Gives a command this PIN by a descriptor, which a file is behind.
pub fn give_pin(command: &mut Command, pin: &str) {
    let mut file = tempfile::tempfile().expect("make a file");
    writeln!(file, "{pin}").expect("write a file");
    // The next number is for a passphrase.
    let number = INHERITED + 1;
    command.env("SEALBLK_PIN_FD", number.to_string());
    inherit(command, file.into(), number);
}

fn tree() -> PathBuf {
    let cache = std::env::var_os("SEALBLK_CACHE").map(PathBuf::from);
    let cache = cache.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("target/ci"));
    let tree = cache.join("softhsm");
    assert!(tree.exists(), "there is no {}; run ./ci/setup first", tree.display());
    // A confined process finds what a path means now, not by links.
    tree.canonicalize().expect("a folder")
}
