//! The embedded KMS's keys, cut everywhere.

use super::script::{Script, traced};
use super::volumes::survives;

/// A key goes through its states.
pub fn key_states(script: &mut Script) {
    script.start();
    let id = script.create_key(&["--alias", "alias/a"]);
    script.change_key(&id, &["disable"], "Disabled");
    script.change_key(&id, &["enable"], "Enabled");
    script.create_key(&["--multi-region", "--description", &"a long description ".repeat(60)]);
    script.change_key(&id, &["schedule-deletion", "--days", "7"], "PendingDeletion");
    script.change_key(&id, &["cancel-deletion"], "Disabled");
}

#[test]
fn a_key_goes_through_its_states() {
    survives(&traced(key_states));
}
