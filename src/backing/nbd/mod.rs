//! Layers behind an NBD server, which listens at a Unix socket of this host; and in RBD images, which a
//! process of this program's own (`helper::rbd`) serves in the same way, by a pair of sockets.
//!
//! The server is a stranger: it sees ciphertext, and what it sends is a claim. It can do to a layer what
//! whoever has a disk can do to that; [`replies`] sees to it that it can do nothing else.
//!
//! - [`Address`]: where an export is. An [`Image`] is one of an RBD image.
//! - [`handshake`]: how a connection begins, and the [`Terms`] that come of it.
//! - [`dial`]: who makes connections. A confined process cannot: another one does it for it.
//! - [`Export`]: an export as this process has it: one connection, which all queues share, and one thread.
//! - `engine`: what that thread does, above all when the connection is lost.
//! - `kept`: what was written and is not durable yet: it is written again to a server that comes back.
//! - [`replies`]: what the server answers.
//!
//! **Why a thread, and not the rings.** A ring that may send and receive may do so on every socket of the
//! process. A connection that queues share works with every server; one that takes several connections
//! promises nothing about flushes unless it says so. And what was written can be kept until it is durable,
//! which takes the bytes out of the queue's buffers anyway.

mod address;
pub mod dial;
mod engine;
mod export;
pub mod handshake;
mod image;
mod kept;
pub(crate) mod protocol;
pub mod replies;
mod task;

pub use address::{Address, Server};
pub use export::{Export, Right, WhenLost, borrow_images, rest, set_patience, when_lost};
pub use handshake::Terms;
pub use image::Image;

pub(crate) use replies::Given;
pub(crate) use task::{Ask, Inbox};
