//! "sealblk top", on a terminal that a test emulates.

use crate::common::attach::{Place, open, write};
use crate::common::disk::pattern;
use crate::common::patience::{Deadline, limit};
use crate::common::process::{tie_to_test, wait_within};
use crate::common::store::said;
use crate::stats::while_written;
use nix::pty::{Winsize, openpty};
use std::fs::File;
use std::io::{Read, Write};
use std::process::Stdio;
use std::time::Duration;

/// The words of the head that are shown the other way round: the column that volumes are sorted by.
fn marked(screen: &vt100::Screen) -> String {
    let cells = (0..screen.size().1).filter_map(|column| screen.cell(2, column));
    cells.filter(|cell| cell.inverse()).map(|cell| cell.contents()).collect::<String>().trim().to_owned()
}

#[test]
fn top_shows_volumes_on_a_terminal_and_leaves_it_as_it_was() {
    let place = Place::new(&[]);
    let host = place.attach(&[]);
    let mut session = open(&place.socket());
    write(&mut session.rings[0], 0, &pattern(1, 4096));
    let refused = place.store.run(&["top"]);
    assert_eq!(refused.status.code(), Some(2), "{}", said(&refused));

    let size = Winsize { ws_row: 10, ws_col: 110, ws_xpixel: 0, ws_ypixel: 0 };
    let terminal = openpty(&size, None).expect("a pseudo-terminal");
    let before = nix::sys::termios::tcgetattr(&terminal.slave).expect("its settings");
    let mut command = place.store.command();
    command.args(["top", "--interval", "0.1"]);
    let slave = || Stdio::from(terminal.slave.try_clone().expect("dup"));
    command.stdin(slave()).stdout(slave()).stderr(slave());
    tie_to_test(&mut command, vec![]);
    let mut top = command.spawn().expect("start sealblk");
    drop(command);
    nix::fcntl::fcntl(&terminal.master, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK))
        .expect("make it non-blocking");
    let mut master = File::from(terminal.master);
    let mut emulated = vt100::Parser::new(size.ws_row, size.ws_col, 0);
    let mut until = |master: &mut File, what: &str, is: &dyn Fn(&vt100::Screen) -> bool| {
        let deadline = Deadline::after(limit());
        let mut bytes = [0; 4096];
        while !is(emulated.screen()) {
            match master.read(&mut bytes) {
                Ok(n) => emulated.process(&bytes[..n]),
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
            deadline.check(&format!("top shows {what}"), || emulated.screen().contents());
        }
    };
    until(&mut master, "the volume", &|screen| {
        let contents = screen.contents();
        let row = contents.lines().nth(3).unwrap_or_default();
        screen.alternate_screen() && contents.contains("1 volume attached") && row.starts_with("t ")
    });
    until(&mut master, "the column", &|screen| marked(screen) == "r/s");
    // A look after another is of the time in between: writes are seen as they come.
    while_written(&mut session, || {
        until(&mut master, "what is written", &|screen| screen.contents().contains("iB/s written"));
    });
    master.write_all(b"\x1b[C").expect("press a key");
    until(&mut master, "the next column", &|screen| marked(screen) == "w/s");
    master.write_all(b"q").expect("press a key");
    let status = wait_within(&mut top, limit()).expect("top ends");
    assert!(status.success(), "{status}");
    until(&mut master, "what was there before", &|screen| {
        !screen.alternate_screen() && !screen.hide_cursor()
    });
    let after = nix::sys::termios::tcgetattr(&terminal.slave).expect("its settings");
    assert_eq!(after, before);
    host.end();
}
