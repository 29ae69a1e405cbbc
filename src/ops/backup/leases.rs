//! The leases of this process in a place: see [`crate::backup::lease`] for what they are.

use super::Session;
use crate::backup::lease::{self, Lease, RENEW};
use crate::base::{Error, Kind, Result};
use crate::place::Put;
use std::time::{Duration, Instant};

/// How long a push waits for somebody who sweeps.
const PATIENCE: Duration = Duration::from_secs(600);
/// How often it looks whether that is over.
const LOOK: Duration = Duration::from_secs(2);
/// What a lease holds: nothing that anybody reads.
const CONTENT: &[u8] = b"sealblk lease 1\n";

/// A lease that this process has put.
pub(super) struct Held {
    lease: Lease,
    renewed: Instant,
    /// Whether it was there already: an earlier process of this host was cut off.
    pub(super) was_there: bool,
}

impl Held {
    /// Puts the lease of a push, and waits until nobody sweeps.
    ///
    /// # Errors
    /// `Busy` if somebody sweeps for long.
    pub(super) fn push(session: &mut Session, lease: Lease) -> Result<Self> {
        let until = Instant::now() + PATIENCE;
        let was_there = session.carrier.exists(&lease.object())?;
        loop {
            let held = Self::put(session, lease, was_there)?;
            let is_swept = |(other, is_alive): &(Lease, bool)| *is_alive && matches!(other, Lease::Sweep(_));
            if !held.others(session)?.iter().any(is_swept) {
                return Ok(held);
            }
            if Instant::now() >= until {
                let message = format!(
                    "somebody removes snapshots from {} (\"{}\"); try again when that is done",
                    session.url,
                    lease::leases()
                );
                return Err(Error::new(Kind::Busy, message));
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Puts the lease of a sweep; none if somebody pushes or sweeps: then nothing may be swept.
    pub(super) fn sweep(session: &mut Session, lease: Lease) -> Result<Option<Self>> {
        let held = Self::put(session, lease, false)?;
        let others = held.others(session)?;
        if others.iter().any(|(_, is_alive)| *is_alive) {
            held.give_back(session)?;
            return Ok(None);
        }
        // Whoever put them notices that they are gone, and gives up.
        for (dead, _) in others {
            session.carrier.remove(&dead.object())?;
        }
        Ok(Some(held))
    }

    fn put(session: &mut Session, lease: Lease, was_there: bool) -> Result<Self> {
        session.carrier.put(&lease.object(), CONTENT, Put::Replace)?;
        Ok(Held { lease, renewed: Instant::now(), was_there })
    }

    fn others(&self, session: &mut Session) -> Result<Vec<(Lease, bool)>> {
        let listed = session.carrier.list(&lease::leases())?;
        lease::others(&listed, self.lease).ok_or_else(|| {
            let message = format!("{} does not list what was put there just now", session.url);
            Error::new(Kind::Other, message)
        })
    }

    /// Shows that this process is alive, if that is due.
    pub(super) fn renew(&mut self, session: &mut Session) -> Result<()> {
        if self.renewed.elapsed() < RENEW {
            return Ok(());
        }
        self.check(session)?;
        session.carrier.put(&self.lease.object(), CONTENT, Put::Replace)?;
        self.renewed = Instant::now();
        Ok(())
    }

    /// Fails if somebody has taken this process for dead.
    pub(super) fn check(&self, session: &mut Session) -> Result<()> {
        match session.carrier.exists(&self.lease.object())? {
            true => Ok(()),
            false => {
                let message = "this command stood still for so long that others took it for dead, and may \
                               have removed what it relied on; begin again";
                Err(Error::new(Kind::Busy, message))
            }
        }
    }

    /// Removes the lease.
    pub(super) fn give_back(self, session: &mut Session) -> Result<()> {
        session.carrier.remove(&self.lease.object())
    }
}
