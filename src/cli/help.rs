//! Help that the terminal alone wraps: what stands in several lines of the source is one paragraph.
#![forbid(unsafe_code)]

use clap::Command;

/// The command, and all below it, with the paragraphs of their last part each in one line.
pub(super) fn flowing(command: Command) -> Command {
    let command = match command.get_after_help().map(ToString::to_string) {
        Some(text) => command.after_help(joined(&text)),
        None => command,
    };
    command.mut_subcommands(flowing)
}

/// Joins the lines of each paragraph. What is indented is laid out as it is printed: examples and lists.
fn joined(text: &str) -> String {
    let is_prose = |line: &str| line.starts_with(|c: char| !c.is_whitespace());
    let mut joined = String::new();
    let mut before = "";
    for line in text.lines() {
        if !joined.is_empty() {
            joined.push(if is_prose(before) && is_prose(line) { ' ' } else { '\n' });
        }
        joined.push_str(line);
        before = line;
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paragraphs_are_joined_and_examples_are_not() {
        let text =
            "Examples:\n  one \\\n    two\n  three\n\nA line\nand another.\n\nNext:\n  four\nfive\nsix";
        let expected =
            "Examples:\n  one \\\n    two\n  three\n\nA line and another.\n\nNext:\n  four\nfive six";
        assert_eq!(joined(text), expected);
        assert_eq!(joined(&joined(text)), expected);
    }
}
