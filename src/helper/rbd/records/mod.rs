//! The records of a store that lies in a pool: the process that reaches them, and who asks it.
//!
//! Whoever works with such a store starts a **keeper of records**: a process that loads librados once it is
//! confined, and that ends with the one that started it. It has neither keys nor data, and it alone has a
//! network. What it is asked is in [`wire`], what may be asked in [`narrow`]; what that becomes in the pool
//! is in [`serve`] and [`locks`].
//!
//! - [`client`]: the side of whoever uses the store, which is what [`Records`](crate::base::root::records)
//!   asks.
//! - [`rados`]: the functions of librados, without pointers.

mod client;
mod locks;
mod narrow;
mod rados;
mod serve;
mod wire;

pub use client::{is_pool, open};
pub use serve::help;

/// The hidden subcommand.
pub const COMMAND: &str = "serve-records";
