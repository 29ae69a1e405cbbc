//! Text of others on its way to a terminal: names, messages of a KMS, of a host process,
//! of whoever wrote a file.
//!
//! What would move a cursor, or the direction of writing, is shown as what it is. Everything that the program
//! prints goes through here, at its last step, so that no single message can forget it.

use serde::Serializer;
use std::borrow::Cow;
use std::path::{Path, PathBuf};

/// `text` with everything escaped that is not to be seen, except for ends of lines and tabs. Escaped as JSON
/// does it, so that JSON stays JSON.
pub fn lines(text: &str) -> Cow<'_, str> {
    escaped(text, |c| !matches!(c, '\n' | '\t'))
}

/// `text` as [`lines`] prints it, in one line: the ends of lines are escaped as well.
pub fn line(text: &str) -> Cow<'_, str> {
    escaped(text, |_| true)
}

/// A path in JSON, where it may not be text at all: then as [`Path::display`] has it.
pub fn path<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&path.display())
}

/// Several of them.
pub fn paths<S: Serializer>(paths: &[PathBuf], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(paths.iter().map(|path| path.display().to_string()))
}

fn escaped(text: &str, is_wanted: impl Fn(char) -> bool) -> Cow<'_, str> {
    let is_bad = |c: char| (c.is_control() || turns(c)) && is_wanted(c);
    if !text.chars().any(is_bad) {
        return Cow::Borrowed(text);
    }
    let mut safe = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match is_bad(c) {
            // All of them are in the first plane.
            true => safe.push_str(&format!("\\u{:04x}", c as u32)),
            false => safe.push(c),
        }
    }
    Cow::Owned(safe)
}

/// Characters that change the direction of what follows, or separate lines unseen.
fn turns(c: char) -> bool {
    matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{061c}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_moves_a_terminal_is_shown_and_the_rest_is_as_it_was() {
        assert_eq!(lines("a\u{1b}[2Jb\n\tc\r\u{9b}31m\u{7f}"), "a\\u001b[2Jb\n\tc\\u000d\\u009b31m\\u007f");
        assert_eq!(line("one\ntwo"), "one\\u000atwo");
        assert_eq!(lines("\u{202e}txt.exe"), "\\u202etxt.exe");
        for text in ["Größe 7", "数据", "שלום", "a \"b\" \\ c", "🙂"] {
            assert!(matches!(lines(text), Cow::Borrowed(same) if same == text));
        }
    }

    #[test]
    fn json_stays_json() {
        let value = serde_json::json!({"name": "\u{9b}31m\u{202e}\u{1b}"});
        let text = serde_json::to_string_pretty(&value).unwrap();
        assert_eq!(serde_json::from_str::<serde_json::Value>(&lines(&text)).unwrap(), value);
    }
}
