//! What a scenario is recorded on: a trace of system calls, or a log of a block device's writes.

use super::expect::Expect;
use super::trace::Mark;
use std::process::{Command, ExitStatus};
use std::sync::Arc;

/// What a command said, and how it ended.
#[derive(Debug)]
pub struct Said {
    /// How it ended.
    pub status: ExitStatus,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

/// A recording that goes on.
pub trait Tape: Send + Sync {
    /// From now on, power cuts are of interest.
    fn start(&self);
    /// What may be expected after a power cut changes now.
    fn mark(&self, mark: Mark);
    /// It changed at the moment when the command that ran last began to say that it had succeeded, or later.
    fn mark_where_it_spoke(&self, mark: Mark);
    /// Runs a command to its end.
    fn run(&self, command: Command) -> Said;
    /// Starts a command that runs beside the test.
    fn begin(&self, command: Command) -> Box<dyn Running>;
}

/// A recorded process that runs beside the test. Killed at drop.
pub trait Running {
    /// Whether it has ended.
    fn has_ended(&mut self) -> bool;
    /// Waits until it has.
    fn wait(self: Box<Self>) -> ExitStatus;
}

/// A mark.
pub fn mark(label: &str, apply: impl Fn(&mut Expect) + Send + Sync + 'static) -> Mark {
    Mark { label: label.into(), apply: Arc::new(apply) }
}
