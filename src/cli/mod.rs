//! The command line: one file a noun.

pub mod key;

use crate::root::Root;

/// What every command gets beside its own arguments.
pub struct Env {
    /// Where the store lies.
    pub root: Root,
    /// `--json`: one JSON value on standard output instead of text.
    pub json: bool,
}

/// Runs the command line and answers with the exit code.
pub fn main() -> std::process::ExitCode {
    std::process::ExitCode::SUCCESS
}
