//! Volumes that lie on block devices, with blocks as large as their sectors, larger and smaller ones: through
//! the program, on loop devices of the test's own.

pub mod adopt;
mod discards;
mod hostile;
mod life;
mod moves;
pub mod rig;
mod taken;
