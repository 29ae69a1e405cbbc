//! What a thread that serves a disk waits with: operations on layers and wake-ups, in one place.
//!
//! A [`Reactor`] is a thread's own for as long as it has something to serve. It is lent to the queues of the
//! layers' backing ([`crate::backing::Queue`]), which submit their operations to it and get back what has
//! become of them; who waits for what else (a kick, a command, a turn) has its descriptor watched. What the
//! bytes mean, and what a wake-up means, it does not know.
//!
//! There is one for real: [`Uring`], an io_uring with the bounce buffers ([`pool`]) that the kernel knows.

pub mod pool;
pub mod ring;
mod uring;

pub use pool::Buffer;
pub(crate) use uring::Files;
pub use uring::Uring;

use std::io;
use std::ops::Deref;
use std::os::fd::RawFd;
use std::rc::Rc;
use std::time::Duration;

/// Names a watch. No other watch of the same io_uring has or had it, until the numbers repeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token(pub(crate) u32);

/// What a watch has to tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Woken {
    /// The descriptor became readable.
    Ready(Token),
    /// The watch has ended by itself, because of an error of its descriptor.
    Unwatched(Token),
}

impl Woken {
    /// Of which watch this is told.
    pub fn token(self) -> Token {
        match self {
            Woken::Ready(token) | Woken::Unwatched(token) => token,
        }
    }
}

/// How long [`Reactor::wait`] may wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Not at all: submit, take what is there.
    Poll,
    /// Until something happens.
    Event,
    /// Until something happens, but no longer than this.
    Until(Duration),
}

/// Where a thread waits. It is of no use to another thread.
pub trait Reactor {
    /// Tells whenever `fd` becomes readable, until [`Reactor::unwatch`]. The descriptor must stay open until
    /// the next [`Reactor::wait`] has returned.
    fn watch(&self, fd: RawFd) -> Token;

    /// Ends a watch; when it returns, nothing is told of it any more.
    fn unwatch(&self, token: Token);

    /// Submits what was handed over and waits as `wait` says.
    ///
    /// # Errors
    /// Those of the kernel; then nothing can be waited for any more.
    fn wait(&self, wait: Wait) -> io::Result<()>;

    /// Whether something has happened that [`Reactor::wait`] would not wait for. Cheap enough to poll.
    fn is_ready(&self) -> bool;

    /// What a watch has told, the oldest first.
    fn next_woken(&self) -> Option<Woken>;

    /// The io_uring, for what submits operations to the kernel; a stand-in of a test has none.
    fn uring(self: Rc<Self>) -> Option<Rc<Uring>>;
}

/// A watch that ends when this goes.
pub struct Watched {
    reactor: Rc<dyn Reactor>,
    token: Token,
}

impl Watched {
    /// Has `reactor` watch `fd`: see [`Reactor::watch`].
    pub fn new(reactor: &Rc<dyn Reactor>, fd: RawFd) -> Self {
        Watched { token: reactor.watch(fd), reactor: reactor.clone() }
    }
}

impl Deref for Watched {
    type Target = Token;

    fn deref(&self) -> &Token {
        &self.token
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.reactor.unwatch(self.token);
    }
}
