//! Attaching where the machine withholds something.

use crate::common::attach::{Place, open, read, write};
use crate::common::disk::pattern;
use crate::common::process::forbid_io_uring;

#[test]
fn a_machine_that_cannot_serve_refuses_to_attach() {
    let place = Place::new(&[]);
    let mut command = place.attach_command(&[]);
    forbid_io_uring(&mut command);
    let said = place.run(command, vec![]);
    assert_eq!(said.code, 8, "{said:?}");
    assert!(said.err.contains("io_uring"), "{said:?}");
    assert!(!place.socket().exists() && !place.volume_folder().join("control.sock").exists());
    place.attach(&[]).end();
}

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
