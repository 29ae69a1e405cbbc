//! The embedded KMS's keys, cut everywhere.

use super::script::Script;
use super::trace::Trace;
use super::volumes::survives;

/// A key goes through its states.
pub fn key_states() -> Trace {
    let script = Script::new();
    script.start();
    let id = script.create_key(&["--alias", "alias/a"]);
    script.change_key(&id, &["disable"], "Disabled");
    script.change_key(&id, &["enable"], "Enabled");
    script.create_key(&["--description", &"a long description ".repeat(60)]);
    script.change_key(&id, &["schedule-deletion", "--days", "7"], "PendingDeletion");
    script.change_key(&id, &["cancel-deletion"], "Disabled");
    script.finish()
}

#[test]
fn a_key_goes_through_its_states() {
    survives(&key_states());
}
