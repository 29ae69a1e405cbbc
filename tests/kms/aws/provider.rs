//! The suite that every provider passes.

use crate::common::kms_server::KmsServer;
use crate::common::patience::limit;
use crate::common::softhsm::{SoftHsm, give_pin};
use crate::suite::{self, Admin, SeenGrant, Subject};
use sealblk::kms::KmsError;
use sealblk::kms::aws::Aws;
use sealblk::kms::embedded::Embedded;
use sealblk::kms::embedded::clock::SystemClock;
use sealblk::kms::patience::Patience;
use std::path::PathBuf;
use std::process::{Command, Stdio};

const STORE: &str = "SEALBLK_TEST_STORE";
const CONFIG: &str = "SEALBLK_TEST_CONFIG";
const KEY_STORE: &str = "SEALBLK_TEST_KEY_STORE";

/// The provider takes its environment from its process, so the suite runs in one of its own.
#[test]
fn the_aws_provider_passes_the_provider_suite() {
    passes(of_suite(&KmsServer::start()));
}

/// The suite, for a provider that asks this KMS.
fn of_suite(kms: &KmsServer) -> Command {
    let root = kms.principal("root");
    let (store, config) = kms.folders();
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.args(["--exact", "aws::provider::in_its_environment", "--ignored", "--nocapture"]);
    for (name, value) in root.environment(&kms.url) {
        match value.as_str() {
            "" => command.env_remove(name),
            value => command.env(name, value),
        };
    }
    command.env(STORE, store.join("kms")).env(CONFIG, config).env_remove(KEY_STORE);
    command
}

fn passes(mut command: Command) {
    let output = command.output().expect("start the suite");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"), "{said}");
}

/// The keys of the served KMS are in a token.
#[test]
#[cfg(feature = "pkcs11")]
fn keys_in_an_hsm_pass_the_provider_suite() {
    let hsm = SoftHsm::with_tokens(&["one"]);
    let variables = hsm.environment();
    let kms = KmsServer::start_prepared("", |command| {
        command.envs(variables);
    });
    let mut add = kms.command();
    add.args(["kms", "store", "add", "--token", "one", "--keep-pin", "--pkcs11"]).arg(SoftHsm::module());
    give_pin(add.envs(hsm.environment()), &SoftHsm::pin("one"));
    assert!(add.stdout(Stdio::null()).status().expect("start sealblk").success());
    let mut command = of_suite(&kms);
    command.env(KEY_STORE, "one").envs(hsm.environment());
    passes(command);
    assert!(hsm.keys() > 10, "they are in the token");
}

/// A KMS whose new keys are in a token: only the program itself starts the process that has the module.
struct InToken {
    kms: Embedded,
    folders: (PathBuf, PathBuf),
}

impl Admin for InToken {
    fn create_key(&self) -> String {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sealblk"));
        command.env("SEALBLK_CONFIG_DIR", &self.folders.1).arg("--root").arg(&self.folders.0);
        let made = command.args(["--json", "key", "create", "--key-store", "one"]).output();
        let made = made.expect("start sealblk");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let made: serde_json::Value = serde_json::from_slice(&made.stdout).expect("JSON");
        made["arn"].as_str().expect("a text").to_owned()
    }
    fn absent_key(&self) -> String {
        self.kms.absent_key()
    }
    fn create_alias(&self, name: &str, key: &str) -> Result<(), KmsError> {
        Admin::create_alias(&self.kms, name, key)
    }
    fn enable(&self, key: &str) -> Result<(), KmsError> {
        Admin::enable(&self.kms, key)
    }
    fn disable(&self, key: &str) -> Result<(), KmsError> {
        Admin::disable(&self.kms, key)
    }
    fn schedule_deletion(&self, key: &str) -> Result<(), KmsError> {
        Admin::schedule_deletion(&self.kms, key)
    }
    fn cancel_deletion(&self, key: &str) -> Result<(), KmsError> {
        Admin::cancel_deletion(&self.kms, key)
    }
    fn grants(&self, key: &str) -> Vec<SeenGrant> {
        Admin::grants(&self.kms, key)
    }
}

#[test]
#[ignore = "it is started by the_aws_provider_passes_the_provider_suite, in an environment of its own"]
fn in_its_environment() {
    let variable = |name| PathBuf::from(std::env::var_os(name).expect("started by another test"));
    let admin = Embedded::at(
        variable(STORE),
        variable(CONFIG),
        Box::new(SystemClock),
        sealblk::base::hardened::harden().unwrap(),
    );
    let grantee = admin.locality().root_arn();
    let provider =
        Aws::open(Patience(limit()), Some(grantee.clone()), sealblk::base::hardened::harden().unwrap())
            .unwrap();
    // The ARN's region is where the request goes; this KMS is not that region's.
    let message = "Credential should be scoped to a valid region, not 'mars-north-1'. ";
    let elsewhere = Some(KmsError::NotAuthenticated(message.into()));
    let run = |admin: &dyn Admin| {
        suite::run(&Subject { provider: &provider, admin, grantee, elsewhere }, "aws-");
    };
    match std::env::var_os(KEY_STORE) {
        None => run(&admin),
        Some(_) => {
            let root = variable(STORE).parent().expect("it lies in a folder").to_owned();
            let folders = (root, variable(CONFIG));
            run(&InToken { kms: admin, folders });
        }
    }
}
