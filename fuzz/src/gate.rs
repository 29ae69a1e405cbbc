//! A VMM's messages through the gate, with a device behind it that trusts nobody.

mod behind;

use super::input::Input;
use super::script::{Files, answers, send_all};
use behind::Behind;
use sealblk::vhost::boundary::Boundary;
use sealblk::vhost::gate::{Gate, Limits};
use sealblk::vhost::tenure::{Serving, Tenure};
use sealblk::vhost::vring::Rings;
use std::io::{self, ErrorKind};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

const LIMITS: Limits = Limits { queues: 3, queue_size: 256, memory_regions: 509 };

/// No ring runs here.
struct Nobody;

impl Tenure for Nobody {
    fn claim(&self) -> io::Result<Arc<Serving>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn serving(&self) -> Option<Arc<Serving>> {
        None
    }

    fn rest(&self) {}

    fn guest_chose(&self, _write_through: bool) {}

    fn vmm_came(&self) {}

    fn vmm_left(&self) -> bool {
        false
    }
}

/// A script of messages, sent before the gate looks at the first, so that nobody waits for anybody.
pub fn run(data: &[u8]) {
    let (ours, vmm) = UnixStream::pair().expect("sockets");
    let (inner, behind) = UnixStream::pair().expect("sockets");
    let (files, closed) = Files::new(&[]);
    let sent = send_all(&ours, &mut Input::new(data), files);

    let device = std::thread::spawn(move || Behind::new(behind, LIMITS).serve());
    let rings = Rings::new(Arc::new(Nobody), 0, Arc::default());
    let boundary = Boundary::new().expect("an event");
    let gate = Gate::new(vmm, inner, LIMITS, rings, Arc::default());
    let passed = gate.and_then(|mut gate| gate.run(&boundary));
    if let Err(panic) = device.join() {
        std::panic::resume_unwind(panic);
    }
    if let Err(e) = &passed {
        let kinds = [ErrorKind::InvalidData, ErrorKind::UnexpectedEof];
        assert!(kinds.contains(&e.kind()) || e.raw_os_error().is_some(), "{e:?}");
    }
    assert!(answers(&ours) <= sent, "more answers than messages");
    drop(ours);
    assert!(closed.all(), "a descriptor stays open");
}
