//! Who may be connected: how many at a time, of which peer and principal, and who makes way for somebody new.
//!
//! Nobody waits to be let in. Whoever connects takes the place of somebody who is worth less: of a peer with
//! too many connections that have shown no valid signature the oldest of them, else the oldest such
//! connection of the peer that has most, else the connection of a principal that has been idle for longest.
//! So silence, however many keep it, costs the others nothing.

use crate::base::sync::Locked;
use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use tokio::sync::Notify;

/// Connections at a time.
pub(super) const CONNECTIONS: usize = 256;
/// Of one peer, those that have shown no valid signature yet.
pub(super) const UNSIGNED_OF_PEER: usize = 64;
/// Of one principal.
pub(super) const OF_PRINCIPAL: usize = 64;

/// Who is at the other end, as far as the kernel knows.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Peer {
    /// Somebody at this address; of IPv6 the first half, which is what a site is given.
    Address(IpAddr),
    /// A user of this machine.
    User(u32),
}

impl Peer {
    /// The peer at this address.
    pub(super) fn at(address: IpAddr) -> Self {
        Peer::Address(match address.to_canonical() {
            IpAddr::V6(v6) => {
                let mut half = v6.octets();
                half[8..].fill(0);
                if v6.is_loopback() { address } else { IpAddr::from(half) }
            }
            v4 => v4,
        })
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Peer::Address(address) => address.fmt(f),
            Peer::User(user) => write!(f, "user {user}"),
        }
    }
}

/// All places.
#[derive(Default)]
pub(super) struct Places(Mutex<Taken>);

#[derive(Default)]
struct Taken {
    next: u64,
    /// By age: who came first is first.
    places: BTreeMap<u64, Held>,
}

struct Held {
    peer: Peer,
    /// Who has signed a request on it.
    principal: Option<String>,
    /// Requests that are being answered: 0 or 1.
    busy: bool,
    /// When it was last busy, in the order of such moments.
    last_busy: u64,
    leaving: bool,
    leave: Arc<Notify>,
}

/// A place that a connection has, until it is dropped.
pub(super) struct Place {
    places: Arc<Places>,
    number: u64,
    leave: Arc<Notify>,
    has_asked: AtomicBool,
}

/// A request that is being answered, until it is dropped.
pub(super) struct Busy<'a>(&'a Place);

impl Places {
    /// Takes a place for a connection of `peer`. `None` where every place has somebody who is being answered.
    pub(super) fn take(self: &Arc<Self>, peer: Peer) -> Option<Place> {
        let mut taken = self.taken();
        let unsigned = taken.places.values().filter(|held| !held.leaving && held.is_unsigned_of(&peer));
        if unsigned.count() >= UNSIGNED_OF_PEER {
            taken.make_way_oldest(|held| held.is_unsigned_of(&peer));
        }
        // Those that were told to leave do so at once, except for an answer that is on its way.
        while taken.places.values().filter(|held| !held.leaving).count() >= CONNECTIONS {
            if !taken.make_way_for_anybody() {
                return None;
            }
        }
        taken.next += 1;
        let (number, leave) = (taken.next, Arc::new(Notify::new()));
        let (busy, leaving, last_busy) = (false, false, 0);
        let held = Held { peer, principal: None, busy, last_busy, leaving, leave: leave.clone() };
        taken.places.insert(number, held);
        Some(Place { places: self.clone(), number, leave, has_asked: AtomicBool::new(false) })
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        // Each change is one assignment or one insertion: nothing is half done if somebody panicked.
        self.0.locked()
    }
}

impl Taken {
    /// The oldest that is so leaves.
    fn make_way_oldest(&mut self, is_so: impl Fn(&Held) -> bool) -> bool {
        let held = self.places.values_mut().find(|held| !held.leaving && is_so(held));
        held.map(|held| held.make_way()).is_some()
    }

    fn make_way_for_anybody(&mut self) -> bool {
        let mut unsigned: BTreeMap<Peer, usize> = BTreeMap::new();
        for held in self.places.values().filter(|held| !held.leaving && held.principal.is_none()) {
            *unsigned.entry(held.peer.clone()).or_default() += 1;
        }
        if let Some((peer, _)) = unsigned.into_iter().max_by_key(|(_, count)| *count) {
            return self.make_way_oldest(|held| held.is_unsigned_of(&peer));
        }
        self.make_way_idle(|_| true)
    }

    /// The one that has been idle for longest of those that are so leaves.
    fn make_way_idle(&mut self, is_so: impl Fn(&Held) -> bool) -> bool {
        let idle = self.places.values_mut().filter(|held| !held.leaving && !held.busy && is_so(held));
        idle.min_by_key(|held| held.last_busy).map(Held::make_way).is_some()
    }
}

impl Held {
    fn is_unsigned_of(&self, peer: &Peer) -> bool {
        self.principal.is_none() && self.peer == *peer
    }

    fn make_way(&mut self) {
        log::info!(
            "a connection of {} makes way: {}",
            self.peer,
            self.principal.as_deref().unwrap_or("it has shown no valid signature")
        );
        self.leaving = true;
        self.leave.notify_one();
    }
}

impl Place {
    /// A request's headers have come: whoever sends it is not silent.
    pub(super) fn asks(&self) {
        self.has_asked.store(true, Ordering::Relaxed);
    }

    /// Whether [`Place::asks`] was called.
    pub(super) fn has_asked(&self) -> bool {
        self.has_asked.load(Ordering::Relaxed)
    }

    /// Whether a principal has signed a request on this connection.
    pub(super) fn is_signed(&self) -> bool {
        self.places.taken().places.get(&self.number).is_some_and(|held| held.principal.is_some())
    }

    /// A request was signed by `principal`, and is being answered. Where he has too many connections another
    /// of his that is idle makes way; `None` if all are busy.
    pub(super) fn signed_by(&self, principal: &str) -> Option<Busy<'_>> {
        let mut taken = self.places.taken();
        let is_his = |held: &Held| held.principal.as_deref() == Some(principal);
        let others =
            taken.places.iter().filter(|(n, held)| **n != self.number && !held.leaving && is_his(held));
        if others.count() >= OF_PRINCIPAL && !taken.make_way_idle(is_his) {
            return None;
        }
        let held = taken.places.get_mut(&self.number)?;
        held.principal = Some(principal.to_owned());
        held.busy = true;
        Some(Busy(self))
    }

    /// Returns when this connection is to make way.
    pub(super) async fn makes_way(&self) {
        self.leave.notified().await;
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        let mut taken = self.0.places.taken();
        taken.next += 1;
        let now = taken.next;
        if let Some(held) = taken.places.get_mut(&self.0.number) {
            held.busy = false;
            held.last_busy = now;
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.taken().places.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(n: u8) -> Peer {
        Peer::at(IpAddr::from([10, 0, 0, n]))
    }

    fn is_leaving(place: &Place) -> bool {
        place.places.taken().places[&place.number].leaving
    }

    fn take(places: &Arc<Places>, of: &Peer, count: usize) -> Vec<Place> {
        (0..count).map(|_| places.take(of.clone()).expect("a place")).collect()
    }

    #[test]
    fn a_peer_that_says_nothing_makes_way_for_itself() {
        let places = Arc::<Places>::default();
        let other = places.take(peer(2)).unwrap();
        let silent = take(&places, &peer(1), 3 * UNSIGNED_OF_PEER);
        assert!(!is_leaving(&other));
        let left: Vec<bool> = silent.iter().map(is_leaving).collect();
        assert!(left[..2 * UNSIGNED_OF_PEER].iter().all(|left| *left));
        assert!(left[2 * UNSIGNED_OF_PEER..].iter().all(|left| !left));
    }

    #[test]
    fn the_oldest_of_whoever_has_most_makes_way_and_never_one_that_has_signed() {
        let places = Arc::<Places>::default();
        let host = places.take(peer(9)).unwrap();
        drop(host.signed_by("host"));
        let few = take(&places, &peer(1), 40);
        let most: Vec<_> = (2..6).flat_map(|n| take(&places, &peer(n), 50)).collect();
        let rest = take(&places, &peer(6), CONNECTIONS - 241);
        assert!(![&few, &most, &rest].into_iter().flatten().any(is_leaving), "all have a place");
        let new = take(&places, &peer(7), 4);
        assert_eq!(most.iter().filter(|place| is_leaving(place)).count(), 4);
        assert!(![&few, &rest, &new].into_iter().flatten().chain([&host]).any(is_leaving));
    }

    #[test]
    fn a_principal_takes_no_more_than_his_share() {
        let places = Arc::<Places>::default();
        let his = take(&places, &peer(1), OF_PRINCIPAL / 2);
        let too = take(&places, &peer(2), OF_PRINCIPAL / 2);
        let busy: Vec<_> = his.iter().chain(&too).map(|place| place.signed_by("host").unwrap()).collect();
        let another = places.take(peer(3)).unwrap();
        assert!(another.signed_by("host").is_none(), "all of his are being answered");
        assert!(another.signed_by("other").is_some());
        drop(busy);
        let more = places.take(peer(3)).unwrap();
        assert!(more.signed_by("host").is_some());
        assert_eq!(his.iter().chain(&too).filter(|place| is_leaving(place)).count(), 1);
    }

    #[test]
    fn whoever_was_idle_for_longest_makes_way_when_everybody_has_signed() {
        let places = Arc::<Places>::default();
        let all = take(&places, &peer(1), 0);
        assert!(all.is_empty());
        let mut all = Vec::new();
        for n in 0..CONNECTIONS {
            all.push(places.take(peer(1)).unwrap());
            drop(all[n].signed_by(&format!("host-{n}")).unwrap());
        }
        drop(all[0].signed_by("host-0").unwrap());
        let held = all[1].signed_by("host-1").unwrap();
        let new = places.take(peer(2)).unwrap();
        assert!(is_leaving(&all[2]) && !is_leaving(&all[0]) && !is_leaving(&all[1]));
        drop((held, new));
    }

    #[test]
    fn addresses_of_one_site_are_one_peer() {
        let at = |text: &str| Peer::at(text.parse().unwrap());
        assert_eq!(at("2001:db8::1"), at("2001:db8::2:3"));
        assert_ne!(at("2001:db8::1"), at("2001:db8:0:1::1"));
        assert_eq!(at("::ffff:10.0.0.1"), at("10.0.0.1"));
        assert_ne!(at("10.0.0.1"), at("10.0.0.2"));
        assert_ne!(at("::1"), at("::2"));
    }
}
