//! Records what real processes do to the files under one folder: each runs traced, with all its threads and
//! children, and stops at every system call that could change a file. One such call is made at a time, so
//! that their order is known.

use super::calls::{self, Plan};
use super::ptrace::{self, Stop};
use super::tape::{Running, Said, Tape};
use super::trace::{Entry, Ino, Mark, Op, Trace};
use crate::common::process::tie_to_test;
use nix::unistd::Pid;
use std::collections::HashSet;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// What is known of the folder, and what happened so far.
pub struct Ledger {
    /// The folder, without symbolic links.
    pub top: PathBuf,
    /// The file system that it is on.
    pub device: u64,
    /// The inode numbers of everything under it, of what was deleted too.
    pub known: HashSet<Ino>,
    entries: Vec<Entry>,
    start: usize,
    /// Where a process that is watched for it first wrote to its standard output.
    spoke: Option<usize>,
}

impl Ledger {
    /// Notes an operation.
    pub fn push(&mut self, op: Op) {
        if let Op::Make { ino, .. } = &op {
            self.known.insert(*ino);
        }
        self.entries.push(Entry::Op(op));
    }

    /// Notes that a traced process writes to its standard output.
    pub fn speaks(&mut self) {
        let now = self.entries.len();
        self.spoke.get_or_insert(now);
    }
}

/// A recording that goes on.
#[derive(Clone)]
pub struct Recorder {
    ledger: Arc<Mutex<Ledger>>,
    top: Ino,
}

/// A traced process that runs beside the test.
struct Traced {
    pid: Pid,
    tracer: Option<JoinHandle<ExitStatus>>,
}

impl Recorder {
    /// Records what is done under `top`, an empty folder on tmpfs, by the processes that this recorder runs.
    pub fn new(top: &Path) -> Self {
        let top = top.canonicalize().expect("the folder is there");
        let metadata = std::fs::metadata(&top).expect("the folder is there");
        let (device, known) = (metadata.dev(), HashSet::from([metadata.ino()]));
        let ledger = Ledger { top, device, known, entries: Vec::new(), start: 0, spoke: None };
        Recorder { ledger: Arc::new(Mutex::new(ledger)), top: metadata.ino() }
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn spawn(&self, command: &mut Command) -> Child {
        tie_to_test(command, vec![]);
        ptrace::prepare(command);
        let child = command.spawn().expect("start a traced program");
        ptrace::take_charge(Pid::from_raw(child.id() as i32));
        child
    }

    /// Traces a process and its descendants until all have ended.
    fn follow(&self, root: Pid, listen: bool) -> ExitStatus {
        let mut ended = None;
        while let Some((thread, stop)) = ptrace::wait(Pid::from_raw(-1)) {
            match stop {
                Stop::Call(call) => {
                    let mut ledger = self.ledger();
                    let plan = calls::plan(thread, &call, &ledger);
                    if let (Plan::Print, true) = (&plan, listen && thread == root) {
                        ledger.speaks();
                    }
                    match plan {
                        Plan::Nothing | Plan::Print => ptrace::go_on(thread, 0),
                        plan => make_call(thread, plan, &mut ledger),
                    }
                }
                Stop::Ended(status) if thread == root => ended = Some(ExitStatus::from_raw(status)),
                Stop::Ended(_) => {}
                Stop::Made(_) => unreachable!("a call that matters is followed to its end at once"),
                Stop::Other(signal) => ptrace::go_on(thread, signal),
            }
        }
        ended.expect("it was spawned, so it ends")
    }

    /// What was recorded.
    pub fn finish(&self) -> Trace {
        let ledger = self.ledger();
        Trace { top: self.top, entries: ledger.entries.clone(), start: ledger.start }
    }
}

impl Tape for Recorder {
    fn start(&self) {
        let mut ledger = self.ledger();
        ledger.start = ledger.entries.len();
    }

    fn mark(&self, mark: Mark) {
        self.ledger().entries.push(Entry::Mark(mark));
    }

    fn mark_where_it_spoke(&self, mark: Mark) {
        let mut ledger = self.ledger();
        let place = ledger.spoke.take().unwrap_or(ledger.entries.len());
        ledger.entries.insert(place, Entry::Mark(mark));
    }

    #[expect(clippy::zombie_processes, reason = "`follow` waits for it, as its tracer")]
    fn run(&self, mut command: Command) -> Said {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        self.ledger().spoke = None;
        let mut child = self.spawn(&mut command);
        let status = self.follow(Pid::from_raw(child.id() as i32), true);
        // Not more than a pipe holds: it was not read while the command ran.
        let (mut out, mut err) = (String::new(), String::new());
        child.stdout.take().expect("piped").read_to_string(&mut out).expect("output in UTF-8");
        child.stderr.take().expect("piped").read_to_string(&mut err).expect("output in UTF-8");
        Said { status, out, err }
    }

    fn begin(&self, mut command: Command) -> Box<dyn Running> {
        let (tell, told) = std::sync::mpsc::channel();
        let recorder = self.clone();
        let tracer = std::thread::spawn(move || {
            // By this thread, since only who spawned it may trace it.
            let pid = Pid::from_raw(recorder.spawn(&mut command).id() as i32);
            tell.send(pid).expect("the test waits for it");
            recorder.follow(pid, false)
        });
        Box::new(Traced { pid: told.recv().expect("the command was started"), tracer: Some(tracer) })
    }
}

/// Lets a thread make its call while no other makes one, and notes what it did.
fn make_call(thread: Pid, plan: Plan, ledger: &mut Ledger) {
    ptrace::make_call(thread);
    match ptrace::wait(thread) {
        Some((_, Stop::Made(result))) => {
            if result >= 0 {
                calls::carried_out(thread, plan, result as u64, ledger);
            }
            ptrace::go_on(thread, 0);
        }
        other => panic!("thread {thread} was killed in the middle of {plan:?}: {other:?}"),
    }
}

impl Running for Traced {
    fn has_ended(&mut self) -> bool {
        self.tracer.as_ref().is_none_or(JoinHandle::is_finished)
    }

    fn wait(mut self: Box<Self>) -> ExitStatus {
        let tracer = self.tracer.take().expect("it is waited for once");
        tracer.join().unwrap_or_else(|problem| std::panic::resume_unwind(problem))
    }
}

impl Drop for Traced {
    fn drop(&mut self) {
        if let Some(tracer) = self.tracer.take() {
            // An error means that it has ended already. Its id is not another's before its
            // tracer has reaped it.
            if !tracer.is_finished() {
                let _ = nix::sys::signal::kill(self.pid, nix::sys::signal::Signal::SIGKILL);
            }
            let _ = tracer.join();
        }
    }
}
