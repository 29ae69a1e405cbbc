//! A sink that is a program: run once for each event, which it finds on its standard input
//! as one line of JSON.
//!
//! Exit code 0 says that it has taken the event. `SEALBLK_EVENT_ID` holds the event's id, by which it tells
//! an event that comes again.

use crate::events::read::Recorded;
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;
use std::io::{ErrorKind, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::Duration;

/// Delivers one event; says what went wrong.
pub(super) fn deliver(command: &[String], event: &Recorded, timeout: Duration) -> Result<(), String> {
    let (program, arguments) = command.split_first().ok_or("there is no command")?;
    let mut child = Command::new(program)
        .args(arguments)
        .env("SEALBLK_EVENT_ID", event.id().unwrap_or_default())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        // What it starts in turn ends with it when it takes too long.
        .process_group(0)
        .spawn()
        .map_err(|e| format!("start {program}: {e}"))?;
    let stdin = child.stdin.take();
    let line = format!("{}\n", event.text);
    let status = std::thread::scope(|scope| {
        // A program that does not read must not hold us up longer than one that does not end.
        scope.spawn(move || match stdin.map(|mut stdin| stdin.write_all(line.as_bytes())) {
            // It may know enough, or not want to read it.
            Some(Err(e)) if e.kind() != ErrorKind::BrokenPipe => log::warn!("write an event to a sink: {e}"),
            _ => {}
        });
        wait(&mut child, timeout)
    });
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("{program} ended with {status}")),
        Err(e) => Err(format!("{program} {e}")),
    }
}

/// Waits for the child's end, and ends it and its process group after `timeout`.
fn wait(child: &mut Child, timeout: Duration) -> Result<ExitStatus, String> {
    let pid = Pid::from_raw(child.id() as i32);
    let (ended, news) = mpsc::channel();
    let waiter = std::thread::spawn(move || {
        // It stays a zombie, so that its id means it until it is waited for below.
        let _ = waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT);
        let _ = ended.send(());
    });
    let in_time = news.recv_timeout(timeout).is_ok();
    if !in_time {
        let _ = killpg(pid, Signal::SIGKILL);
    }
    let _ = waiter.join();
    let status = child.wait().map_err(|e| format!("was not waited for: {e}"))?;
    if in_time {
        Ok(status)
    } else {
        Err(format!("took longer than {} s, and was killed", timeout.as_secs()))
    }
}
