//! Attaching where the machine withholds something.

#[path = "common/attach.rs"]
mod attach;
#[path = "common/mod.rs"]
mod common;
#[path = "common/process.rs"]
mod process;
#[path = "common/store.rs"]
mod store;

use attach::{Place, open, read, write};
use common::disk::pattern;

#[test]
fn a_vmm_is_served_wherever_temporary_files_go() {
    let place = Place::new(&[]);
    let long = place.folder().join("x".repeat(120));
    std::fs::create_dir(&long).unwrap();
    for temporary in [long, place.folder().join("nowhere"), "relative".into()] {
        let mut command = place.attach_command(&[]);
        command.env("TMPDIR", &temporary);
        let host = place.start(command, vec![]);
        for n in 0..3 {
            let mut session = open(&place.socket());
            write(&mut session.rings[0], 8 * n, &pattern(n, 4096));
            assert!(read(&mut session.rings[0], 8 * n, 4096) == pattern(n, 4096));
        }
        host.end();
    }
}
