//! The suite that every provider passes.

use crate::common::kms_server::KmsServer;
use crate::common::patience::limit;
use crate::suite::{self, Subject};
use sealblk::kms::KmsError;
use sealblk::kms::aws::Aws;
use sealblk::kms::embedded::Embedded;
use sealblk::kms::embedded::clock::SystemClock;
use sealblk::kms::patience::Patience;
use std::process::Command;

const STORE: &str = "SEALBLK_TEST_STORE";
const CONFIG: &str = "SEALBLK_TEST_CONFIG";

/// The provider takes its environment from its process, so the suite runs in one of its own.
#[test]
fn the_aws_provider_passes_the_provider_suite() {
    let kms = KmsServer::start();
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
    command.env(STORE, store.join("kms")).env(CONFIG, config);
    let output = command.output().expect("start the suite");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"), "{said}");
}

#[test]
#[ignore = "it is started by the_aws_provider_passes_the_provider_suite, in an environment of its own"]
fn in_its_environment() {
    let variable = |name| std::env::var_os(name).expect("started by another test").into();
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
    suite::run(&Subject { provider: &provider, admin: &admin, grantee, elsewhere }, "aws-");
}
