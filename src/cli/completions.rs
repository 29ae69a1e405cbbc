//! `sealblk completions`: the script by which a shell completes what is typed, made from the same definitions
//! as the help.
#![forbid(unsafe_code)]

use crate::base::{Context, Result};
use crate::cli::output;
use clap::{Arg, ValueEnum};
use clap_complete::aot::{Bash, Fish, Generator, Zsh};

/// Arguments of `completions`.
#[derive(clap::Args)]
#[command(after_help = "\
Example:
  sealblk completions bash >/usr/share/bash-completion/completions/sealblk
  sealblk completions zsh >/usr/share/zsh/vendor-completions/_sealblk
  sealblk completions fish >/usr/share/fish/vendor_completions.d/sealblk.fish

The Debian package brings all three.")]
pub struct Args {
    /// The shell.
    shell: Shell,
}

#[derive(Clone, Copy, ValueEnum)]
enum Shell {
    Bash,
    Zsh,
    Fish,
}

/// Prints the script for one shell.
pub(super) fn run(args: &Args) -> Result<()> {
    let script = match args.shell {
        Shell::Bash => script(&Bash),
        Shell::Zsh => script(&Zsh),
        Shell::Fish => script(&Fish),
    };
    output::print(&script?).map(drop)
}

fn script(shell: &impl Generator) -> Result<String> {
    let attempt = || "make the script";
    let mut command = without_hidden(&super::command());
    command.set_bin_name("sealblk");
    command.build();
    let mut script = Vec::new();
    shell.try_generate(&command, &mut script).context(attempt)?;
    String::from_utf8(script).map_err(std::io::Error::other).context(attempt)
}

/// The command without what is hidden in it. The generators offer hidden subcommands and options as well.
fn without_hidden(command: &clap::Command) -> clap::Command {
    let is_shown = |arg: &&Arg| !arg.is_hide_set();
    clap::Command::new(command.get_name().to_owned())
        .about(command.get_about().cloned().unwrap_or_default())
        .version(env!("CARGO_PKG_VERSION"))
        .disable_help_subcommand(command.is_disable_help_subcommand_set())
        .visible_aliases(command.get_visible_aliases().map(str::to_owned).collect::<Vec<_>>())
        .args(command.get_arguments().filter(is_shown).cloned())
        .subcommands(command.get_subcommands().filter(|sub| !sub.is_hide_set()).map(without_hidden))
}
