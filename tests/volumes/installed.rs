//! What a package brings beside the program: completions of shells, and manual pages.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

#[path = "../../examples/man_pages.rs"]
#[allow(dead_code)]
mod man_pages;

/// Commands that are for the program itself.
const HIDDEN: [&str; 5] = ["rewrap-key", "keep-grants", "backup-step", "serve-place", "take-over"];

fn script(shell: &str) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sealblk"));
    // It needs no folder of anybody's.
    command.args(["completions", shell]).env_remove("HOME").env("SEALBLK_ROOT", "/proc/none");
    let output = command.output().expect("start sealblk");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.is_empty(), "{shell}: {}: {said}", output.status);
    String::from_utf8(output.stdout).expect("a script in UTF-8")
}

/// What bash offers for the last of `words`, with the script loaded.
fn offered_by_bash(words: &[&str]) -> Vec<String> {
    let script = format!(
        "{}\nshift 0\nCOMP_WORDS=(\"$@\") COMP_CWORD=$(($# - 1))\n\
         _sealblk sealblk \"${{COMP_WORDS[COMP_CWORD]}}\" \"${{COMP_WORDS[COMP_CWORD - 1]}}\"\n\
         printf '%s\\n' \"${{COMPREPLY[@]}}\"\n",
        script("bash")
    );
    let mut bash = Command::new("bash");
    bash.args(["--norc", "-eu", "-s", "--"]).args(words).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut bash = bash.spawn().expect("start bash");
    bash.stdin.take().expect("a pipe").write_all(script.as_bytes()).expect("bash reads its script");
    let output = bash.wait_with_output().expect("bash ends");
    assert!(output.status.success(), "{words:?}: {}", output.status);
    String::from_utf8(output.stdout).expect("words in UTF-8").lines().map(str::to_owned).collect()
}

#[test]
fn bash_completes_commands_and_options_and_offers_nothing_that_is_hidden() {
    let first = offered_by_bash(&["sealblk", ""]);
    for command in ["volume", "snapshot", "attach", "doctor", "completions"] {
        assert!(first.iter().any(|word| word == command), "{command}: {first:?}");
    }
    for hidden in HIDDEN {
        assert!(!first.iter().any(|word| word == hidden), "{hidden}: {first:?}");
    }
    assert_eq!(offered_by_bash(&["sealblk", "vol"]), ["volume"]);
    assert_eq!(offered_by_bash(&["sealblk", "volume", "cre"]), ["create"]);
    assert_eq!(offered_by_bash(&["sealblk", "volume", "create", "--sector-"]), ["--sector-size"]);
    assert_eq!(offered_by_bash(&["sealblk", "completions", "z"]), ["zsh"]);
    // An option of tests.
    let options = offered_by_bash(&["sealblk", "volume", "rekey", "--"]);
    assert!(options.iter().any(|option| option == "--follow"), "{options:?}");
    assert!(!options.iter().any(|option| option.contains("abort")), "{options:?}");
}

#[test]
fn the_scripts_of_other_shells_have_the_commands_and_not_the_hidden_ones() {
    for shell in ["zsh", "fish"] {
        let script = script(shell);
        let has =
            |word: &str| script.lines().any(|line| line.split(['\'', '"', ' ', ':']).any(|w| w == word));
        assert!(has("volume") && has("rekey") && has("export"), "{shell}");
        for hidden in HIDDEN {
            assert!(!has(hidden), "{shell}: {hidden}");
        }
    }
}

#[test]
fn an_unknown_shell_is_refused_with_those_that_there_are() {
    let output = Command::new(env!("CARGO_BIN_EXE_sealblk")).args(["completions", "tcsh"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("bash, zsh, fish"), "{said}");
}

/// The name of each command's page, for all that are shown.
fn page_names(command: &clap::Command, name: &str, names: &mut Vec<String>) {
    names.push(format!("{name}.1"));
    for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
        page_names(sub, &format!("{name}-{}", sub.get_name()), names);
    }
}

#[test]
fn each_command_that_is_shown_has_a_manual_page_of_its_options() {
    let folder = tempfile::tempdir().unwrap();
    man_pages::write_pages(folder.path()).unwrap();
    let mut expected = Vec::new();
    page_names(&sealblk::cli::command(), "sealblk", &mut expected);
    let entries = std::fs::read_dir(folder.path()).unwrap();
    let mut found: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    expected.sort();
    found.sort();
    assert_eq!(found, expected);
    assert!(found.len() > 40, "{found:?}");

    let page = |name: &str| std::fs::read_to_string(Path::new(folder.path()).join(name)).unwrap();
    let first = page("sealblk.1");
    for part in [".SH NAME", ".SH \"EXIT STATUS\"", ".SH FILES", "the KMS could not be reached"] {
        assert!(first.contains(part), "{part} is not in {first}");
    }
    for hidden in HIDDEN {
        assert!(!first.contains(&hidden.replace('-', "\\-")), "{hidden}");
    }
    let create = page("sealblk-volume-create.1");
    assert!(create.contains("\\-\\-sector\\-size"), "{create}");
    assert!(create.contains(".SH EXAMPLES\n.nf\n"), "{create}");
}
