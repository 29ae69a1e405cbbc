//! What commands print: JSON values and aligned tables, to a standard output that may go away.
#![forbid(unsafe_code)]

use crate::base::{Context, Error, Result, printable};
use crate::events::read::Want;
use serde::Serialize;
use std::io::{ErrorKind, Write};

/// Prints text to standard output; what would move a terminal's cursor is shown as what it
/// is ([`printable`]).
///
/// A reader that has gone away, as `head` does, is no error: the answer says that it wants no more.
pub fn print(text: &str) -> Result<Want> {
    let mut out = std::io::stdout().lock();
    match out.write_all(printable::lines(text).as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(Want::More),
        Err(e) if e.kind() == ErrorKind::BrokenPipe => Ok(Want::Enough),
        Err(e) => Err(Error::from(e).context("write to standard output")),
    }
}

/// Says something on standard error, beside the results. Whoever has closed that does not want to know.
pub fn tell(text: &str) {
    let _ = std::io::stderr().write_all(format!("{}\n", printable::lines(text)).as_bytes());
}

/// Prints a JSON value and a newline.
pub fn print_json(value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(std::io::Error::from).context(|| "print JSON")?;
    print(&(text + "\n")).map(drop)
}

/// Rows with their columns aligned, a space's width apart at least; the first row is the head.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |c: usize| rows.iter().filter_map(|r| r.get(c)).map(|t| t.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(&format!("{cell:width$}  "));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_by_characters() {
        let rows = [["ID", "NAME", "SIZE"], ["1", "Größe", "20 GiB"]];
        let rows: Vec<Vec<String>> = rows.iter().map(|r| r.map(String::from).to_vec()).collect();
        assert_eq!(table(&rows), "ID  NAME   SIZE\n1   Größe  20 GiB\n");
    }
}
