//! Attaching where the machine withholds something.

use crate::common::attach::{Place, open, read, write};
use crate::common::disk::pattern;
use std::os::unix::process::CommandExt;

/// Makes `io_uring_setup` fail with EPERM in this process and its children, as container runtimes do.
fn without_io_uring() -> std::io::Result<()> {
    let load_number = libc::sock_filter { code: 0x20, jt: 0, jf: 0, k: 0 };
    let is_setup = libc::sock_filter { code: 0x15, jt: 0, jf: 1, k: libc::SYS_io_uring_setup as u32 };
    let answer = |k| libc::sock_filter { code: 0x06, jt: 0, jf: 0, k };
    let refuse = answer(libc::SECCOMP_RET_ERRNO | libc::EPERM as u32);
    let mut program = [load_number, is_setup, refuse, answer(libc::SECCOMP_RET_ALLOW)];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    nix::sys::prctl::set_no_new_privs()?;
    // SAFETY: the filter and the program that it points to live through the call, which copies them.
    let set = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter) };
    if set == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

#[test]
fn a_machine_that_cannot_serve_refuses_to_attach() {
    let place = Place::new(&[]);
    let mut command = place.attach_command(&[]);
    // SAFETY: between fork and exec only prctl is called, on values of the child's own stack.
    unsafe { command.pre_exec(without_io_uring) };
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
