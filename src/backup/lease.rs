//! Leases: that somebody pushes, or sweeps, so that nothing is swept that a push is going to need.
//!
//! A lease is an object. Whoever wants to work puts its own first and then looks at those of others: of two
//! who do so at one time, at least one sees the other. How old a lease is follows from the place's clock
//! alone, by comparison with one's own that was put just now. docs/format.md argues the order.

use super::object;
use crate::catalog::SnapshotId;
use crate::place::{Listed, ObjectName};
use std::time::Duration;
use uuid::Uuid;

/// After so long without a sign of life, whoever put a lease is taken for dead.
pub(crate) const DEAD: Duration = Duration::from_secs(24 * 3600);
/// How often a lease is put again while its owner works.
pub(crate) const RENEW: Duration = Duration::from_secs(600);

/// What a lease is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lease {
    /// This host, known by a number of its own in this place, pushes the snapshot.
    Push(SnapshotId, Uuid),
    /// Somebody sweeps.
    Sweep(Uuid),
}

impl Lease {
    /// The lease's object.
    pub(crate) fn object(self) -> ObjectName {
        match self {
            Lease::Push(snapshot, host) => object(&format!("leases/push-{snapshot}-{}", host.simple())),
            Lease::Sweep(id) => object(&format!("leases/sweep-{}", id.simple())),
        }
    }

    /// The lease of that name.
    fn parse(object: &ObjectName) -> Option<Self> {
        let name = object.last();
        if let Some(id) = name.strip_prefix("sweep-") {
            return Some(Lease::Sweep(id.parse().ok()?));
        }
        let (snapshot, host) = name.strip_prefix("push-")?.rsplit_once('-')?;
        Some(Lease::Push(snapshot.parse().ok()?, host.parse().ok()?))
    }
}

/// The folder of the leases.
pub(crate) fn leases() -> ObjectName {
    object("leases")
}

/// The leases of others among those listed, and whether each is alive. None if our own is not among them:
/// then it is not known what time it is there.
pub(crate) fn others(listed: &[Listed], own: Lease) -> Option<Vec<(Lease, bool)>> {
    let ours = own.object();
    let now = listed.iter().find(|it| it.name == ours)?.modified;
    let is_alive = |it: &Listed| now.saturating_sub(it.modified) < DEAD.as_secs() as i64;
    let others = listed.iter().filter(|it| it.name != ours);
    Some(others.filter_map(|it| Some((Lease::parse(&it.name)?, is_alive(it)))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_is_as_old_as_the_place_says() {
        let (own, host) = (Lease::Sweep(Uuid::new_v4()), Uuid::new_v4());
        let push = Lease::Push(SnapshotId::random(), host);
        let listed = |lease: Lease, modified| Listed { name: lease.object(), modified };
        assert_eq!(others(&[listed(push, 0)], own), None);
        let day = DEAD.as_secs() as i64;
        let all = [listed(own, day), listed(push, 1), listed(Lease::Sweep(host), 0)];
        assert_eq!(others(&all, own), Some(vec![(push, true), (Lease::Sweep(host), false)]));
        let odd = Listed { name: object("leases/x"), modified: day };
        assert_eq!(others(&[listed(own, day), odd], own), Some(vec![]));
        // A clock that was put back takes nobody's life.
        assert_eq!(others(&[listed(own, 0), listed(push, day)], own), Some(vec![(push, true)]));
    }
}
