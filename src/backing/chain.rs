//! Several files as one backing: a top layer over frozen ones, reached by one queue a thread.
//!
//! Each file is reached in its own way, and all through the same ring and pool of buffers. Only the top is
//! ever written. It knows nothing of what the layers mean to one another.

use crate::backing::file::FileBacking;
use crate::backing::{Backing, Caps, Queue};
use crate::base::space::Space;
use crate::reactor::Reactor;
use std::io;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

/// A chain of layers in files.
pub struct Chain {
    top: Arc<FileBacking>,
    below: Vec<Arc<FileBacking>>,
    lengths: Vec<u64>,
}

impl Chain {
    /// `below` from the layer right below the top; none of them may change any more.
    pub fn new(top: Arc<FileBacking>, below: Vec<Arc<FileBacking>>) -> Self {
        let lengths = below.iter().map(|layer| layer.caps().size).collect();
        Chain { top, below, lengths }
    }

    fn layer(&self, layer: usize) -> &FileBacking {
        if layer == 0 { &self.top } else { &self.below[layer - 1] }
    }
}

impl Backing for Chain {
    fn caps(&self) -> &Caps {
        self.top.caps()
    }

    fn open_queue(&self, reactor: &Rc<dyn Reactor>, depth: u16) -> io::Result<Box<dyn Queue>> {
        self.top.open_queue_over(&self.below, reactor, depth)
    }

    fn has_data(&self) -> io::Result<bool> {
        for layer in 0..=self.below.len() {
            if self.layer(layer).has_data()? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn below(&self) -> &[u64] {
        &self.lengths
    }

    fn next_data(&self, layer: usize, from: u64) -> io::Result<Option<Range<u64>>> {
        self.layer(layer).next_data_from(from)
    }

    fn space(&self) -> io::Result<Option<Space>> {
        self.top.space()
    }
}
