//! Settings of an earlier version come into the configuration folder, cut everywhere.

use super::expect::Content;
use super::script::{Script, traced};
use super::volumes::{SECTORS, survives};

/// In a store with a volume, and in a configuration folder that has nothing yet.
pub fn moved(script: &mut Script) {
    script.create(Content::zeros(SECTORS), &["--unencrypted"]);
    script.leave_settings();
    script.start();
    script.move_settings();
}

#[test]
fn settings_are_moved() {
    survives(&traced(moved));
}
