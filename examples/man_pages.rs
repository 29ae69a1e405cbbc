//! Writes the manual pages, `sealblk.1` and one for each command, made from the same definitions as the help.
//!
//!     cargo run --example man_pages -- FOLDER
//!
//! For who packages the program; `ci/package` runs it. It is no command of the program, which so has nothing
//! in it that host processes never need.

use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

/// The table of exit codes stands there, for all readers.
const README: &str = include_str!("../README.md");

const VERSION: &str = concat!("sealblk ", env!("CARGO_PKG_VERSION"));

const FILES: &[(&str, &str)] = &[
    ("/etc/sealblk/sealblk.toml", "The settings; ~/.config/sealblk/sealblk.toml for other users than root."),
    ("/etc/sealblk/kms-*.key", "The root key of the embedded KMS. Without it the volumes cannot be read."),
    ("/etc/sealblk/store-users", "Whom, beside root, folders of a store may belong to: one name a line."),
    ("/var/lib/sealblk", "The store: volumes, snapshots, layers, the KMS's store, events and the audit log."),
    ("/usr/share/doc/sealblk", "The manual: README.md, and what it names."),
];

const ENVIRONMENT: &[(&str, &str)] = &[
    ("SEALBLK_ROOT", "Where the store lies, unless --root says it."),
    ("SEALBLK_CONFIG_DIR", "Where settings and keys lie: another folder than /etc/sealblk."),
    ("RUST_LOG", "What is written to the log; --verbose is a short way to say it."),
];

fn main() -> io::Result<()> {
    match std::env::args_os().skip(1).collect::<Vec<_>>().as_slice() {
        [folder] => write_pages(Path::new(folder)),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "usage: man_pages FOLDER")),
    }
}

/// Writes all pages into a folder that is there.
pub fn write_pages(folder: &Path) -> io::Result<()> {
    let mut command = sealblk::cli::command().disable_help_subcommand(true);
    command.build();
    write_page(&command, folder, true)
}

/// Writes the page of a command, and those of the commands below it.
fn write_page(command: &clap::Command, folder: &Path, is_first: bool) -> io::Result<()> {
    let below: Vec<_> = command.get_subcommands().filter(|sub| !sub.is_hide_set()).collect();
    let page = Man::new(command.clone()).source(VERSION).manual("sealblk");
    let mut file = File::create(folder.join(page.get_filename()))?;
    page.render_title(&mut file)?;
    page.render_name_section(&mut file)?;
    page.render_synopsis_section(&mut file)?;
    page.render_description_section(&mut file)?;
    page.render_options_section(&mut file)?;
    if !below.is_empty() {
        page.render_subcommands_section(&mut file)?;
    }
    let mut rest = Roff::new();
    if let Some(text) = command.get_after_long_help().or(command.get_after_help()) {
        examples(&mut rest, &text.to_string());
    }
    if is_first {
        list(&mut rest, "FILES", FILES.iter().copied());
        list(&mut rest, "ENVIRONMENT", ENVIRONMENT.iter().copied());
        list(&mut rest, "EXIT STATUS", exit_codes());
    } else {
        rest.control("SH", ["SEE ALSO"]);
        rest.text([bold("sealblk"), roman("(1), where the exit codes are")]);
    }
    rest.to_writer(&mut file)?;
    file.flush()?;
    below.into_iter().try_for_each(|sub| write_page(sub, folder, false))
}

/// What stands behind the help: examples, which are set as they are, with paragraphs between them.
fn examples(roff: &mut Roff, text: &str) {
    let mut is_set = false;
    roff.control("SH", ["EXAMPLES"]);
    for line in text.lines() {
        let heading = line.strip_prefix("Examples:").or(line.strip_prefix("Example:"));
        // A short one stands behind its heading.
        let example = heading.map(str::trim_start).or(line.strip_prefix("  "));
        if example == Some("") || (example.is_none() && line.is_empty() && is_set) {
            continue;
        }
        if example.is_some() != is_set {
            is_set = example.is_some();
            roff.control(if is_set { "nf" } else { "fi" }, []);
            if !is_set {
                roff.control("PP", []);
            }
        }
        match (example, line) {
            (Some(example), _) => roff.text([roman(example)]),
            (None, "") => roff.control("PP", []),
            (None, line) => roff.text([roman(line)]),
        };
    }
    if is_set {
        roff.control("fi", []);
    }
}

fn list<'a>(roff: &mut Roff, heading: &str, items: impl IntoIterator<Item = (&'a str, &'a str)>) {
    roff.control("SH", [heading]);
    for (name, text) in items {
        roff.control("TP", []);
        roff.text([bold(name)]);
        roff.text([roman(text.replace('`', ""))]);
    }
}

fn exit_codes() -> Vec<(&'static str, &'static str)> {
    let table = README.lines().skip_while(|line| *line != "| code | meaning |").skip(2);
    let rows = table.map_while(|row| row.strip_prefix("| ")?.strip_suffix(" |")?.split_once(" | "));
    rows.collect()
}
