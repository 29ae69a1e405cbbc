//! The binary: arguments to commands, errors to exit codes.

#[global_allocator]
static ALLOCATOR: sealblk::crypt::wiping_allocator::WipingAllocator =
    sealblk::crypt::wiping_allocator::WipingAllocator;

fn main() -> std::process::ExitCode {
    sealblk::cli::main()
}
