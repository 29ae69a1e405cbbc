//! Volumes behind NBD servers: nbdkit, qemu-nbd, and one of the test's own that loses what it had in memory,
//! or lies.

mod fake;
mod hostile;
mod life;
mod lost;
pub mod server;
pub mod ways;
