//! Volumes of several layers as a guest sees them: against a model that knows only sectors, through
//! the front-end's rings and the queues' threads, over layers of mixed keys, lengths and file systems
//! that are frozen under load.

mod failing;
mod hydration;
mod model;
mod pauses;
mod power;
mod random;
mod recorded;
mod rig;
