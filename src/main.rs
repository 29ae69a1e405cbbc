//! The binary: arguments to commands, errors to exit codes.

fn main() -> std::process::ExitCode {
    sealblk::cli::main()
}
