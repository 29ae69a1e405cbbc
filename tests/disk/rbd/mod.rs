//! Volumes in RBD images, of clusters that `ci/ceph-up` makes.

mod cluster;
mod faults;
mod fences;
mod handover;
mod life;
mod partition;
mod pool;
