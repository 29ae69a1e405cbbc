//! RBD images of Ceph clusters: processes that have librbd, and serve an image by NBD.
//!
//! librbd brings a network, threads and C++, which have no place beside a key. So whoever opens an
//! image starts a **keeper** ([`keeper`]): a process that holds nothing but the right to that one
//! image. It has a **server** ([`serve`]) for it, a child that loads librbd once it is confined, opens
//! the image, and answers by one end of a pair of sockets what the engine of `backing::nbd` asks at the
//! other. What goes there is ciphertext. A server that has died is started again by the keeper, when
//! the engine asks for another connection; and a keeper that has died has left a spare one behind.
//!
//! Who writes an image has its exclusive lock, and has put its **tenure** into the image's metadata
//! ([`tenure`]), which argues why there are never two writers.
//!
//! - [`images`]: the images that this process uses.
//! - [`library`]: the functions of librbd and librados, which are found at run time.
//! - [`image`]: an image that is open, and what is asked of it.
//! - [`records`]: the records of a store that lies in a pool, by another such process.

mod image;
mod images;
pub mod keeper;
mod library;
pub mod records;
mod serve;
mod talk;
mod tenure;

pub use images::{inherit, open_images, set_break_lock, start, tenures};
pub use keeper::help;
pub use talk::COMMAND;
