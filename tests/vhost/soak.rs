//! Everything at once for a long time: load that knows what every sector holds, and meanwhile VMMs that
//! vanish, devices that are stopped and reset, host processes that are killed or detached, limits that
//! change, keys that are rewrapped, snapshots, volumes that grow and are re-keyed. Nothing may be lost, and a
//! host process may not grow.
//!
//! `ci/soak` runs it for an hour; among the other tests it runs for some seconds. SEALBLK_SOAK_SECONDS says
//! how long, SEALBLK_TEST_SEED repeats what was done, though not when.

use crate::common::frontend::server::{Holdings, holdings};
use crate::common::patience::wait_for;
use crate::common::store::{Attached, Store};
use crate::inflight::rig::{self, Rig, Shape, Way};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Requests between two events.
const REQUESTS: u64 = 300;
/// How much more memory a host process may have at its end than when it was warm. One page too many for each
/// of the thousands of connections and rings would be far more.
const GROWTH_KIB: u64 = 4096;
/// The buffers of a copy in the background, which a host process that has done one keeps.
const COPY_KIB: u64 = 4096;
/// Mappings that allocators make and keep.
const MORE_MAPS: usize = 16;
/// Snapshots in all: each leaves a layer more, of which a volume can have 64.
const MOST_SNAPSHOTS: u64 = 24;
/// Descriptors that a host process may keep for each layer that it got while it ran.
const FDS_A_LAYER: usize = 2;
/// Looks at a host process without a VMM before it counts as warm.
const WARM: usize = 4;

/// What happens to a volume under load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Pause,
    Reset,
    Vanish,
    Throttle,
    Rewrap,
    Snapshot,
    Show,
    Verify,
    Grow,
    Rekey,
    Kill,
    Detach,
}

/// How often each comes, in a thousand.
const OFTEN: [(Event, u64); 12] = [
    (Event::Pause, 250),
    (Event::Reset, 200),
    (Event::Vanish, 310),
    (Event::Throttle, 60),
    (Event::Rewrap, 30),
    (Event::Snapshot, 10),
    (Event::Show, 30),
    (Event::Verify, 50),
    (Event::Grow, 10),
    (Event::Rekey, 10),
    (Event::Kill, 30),
    (Event::Detach, 10),
];

/// A host process, as it is seen while no VMM is connected.
struct Life {
    /// Before the first VMM came.
    bare: Holdings,
    /// Layers that came since.
    layers: usize,
    looks: usize,
    warm: Option<Holdings>,
    last: Holdings,
}

impl Life {
    /// Of a host process that no VMM has connected to yet.
    fn begin(host: &Attached<'_>) -> Self {
        let bare = holdings(host.pid() as i32).expect("the host process runs");
        Life { bare, layers: 0, looks: 0, warm: None, last: bare }
    }

    /// Looks at it when it has tidied up after a VMM, which must leave nothing behind.
    fn look(&mut self, host: &Attached<'_>) {
        let good = |now: &Holdings| {
            let memory = self.warm.is_none_or(|warm| {
                now.maps <= warm.maps + MORE_MAPS && now.rss_kib <= warm.rss_kib + GROWTH_KIB
            });
            memory && now.fds <= self.bare.fds + FDS_A_LAYER * self.layers && now.threads <= self.bare.threads
        };
        let now = wait_for("the host process has tidied up after a VMM", || {
            let now = holdings(host.pid() as i32).expect("the host process runs");
            let (bare, warm) = (self.bare, self.warm);
            good(&now)
                .then_some(now)
                .ok_or_else(|| format!("without a VMM {bare:?}, warm {warm:?}, now {now:?}"))
        });
        self.looks += 1;
        if self.looks == WARM {
            self.warm = Some(now);
        }
        self.last = now;
    }
}

fn until() -> Instant {
    let seconds = std::env::var("SEALBLK_SOAK_SECONDS").ok();
    let seconds = seconds.map_or(10, |s| s.parse().expect("a number of seconds"));
    Instant::now() + Duration::from_secs(seconds)
}

/// Makes the volume a little larger than `size` bytes, and returns how large.
fn grow(store: &Store, size: u64) -> u64 {
    let size = size + (1 << 20);
    store.ok(&["volume", "resize", "t", &size.to_string()]);
    size
}

#[test]
fn soak() {
    let (begun, end, seed) = (Instant::now(), until(), rig::seed());
    let store = rig::store();
    store.ok(&["key", "create", "--alias", "alias/other"]);
    let shape = Shape { queues: 2, event_idx: true, indirect: true };
    let mut rig = Rig::start(&store, Way::Qemu, shape, 0, seed);
    rig.loads.iter_mut().for_each(|load| load.discards_may_keep = true);
    // One that no VMM has seen is what the others are held to.
    rig.crash();
    rig.attach_again();
    let (mut life, mut lives) = (Life::begin(rig.host()), Vec::new());
    rig = rig.reconnect();
    let mut counts: BTreeMap<Event, u64> = BTreeMap::new();
    let (mut told, mut size) = (Instant::now(), 64 << 20);
    while Instant::now() < end {
        let target = rig.loads.iter().map(|l| l.submitted).max().expect("a ring") + REQUESTS;
        rig.pump(rig.completed() + REQUESTS, target);
        let event = next(&mut rig);
        *counts.entry(event).or_default() += 1;
        match event {
            Event::Pause => rig.stop_and_start(false),
            Event::Reset => rig.stop_and_start(true),
            Event::Vanish => rig = rig.vanish(|host| life.look(host)),
            Event::Throttle => throttle(&store, &mut rig),
            Event::Rewrap => rewrap(&store, &mut rig),
            Event::Snapshot if counts[&event] <= MOST_SNAPSHOTS => {
                store.ok(&["snapshot", "create", "t"]);
                life.layers += 1;
            }
            Event::Snapshot => {}
            Event::Show => drop(store.ok(&["volume", "show", "t", "--check-key"])),
            Event::Verify => verify(&mut rig),
            Event::Grow => size = grow(&store, size),
            Event::Rekey => {
                store.ok(&["volume", "rekey", "t", "--follow"]);
                life.layers += 1;
            }
            Event::Kill => {
                rig.submit(target + REQUESTS);
                rig.kill(target + REQUESTS);
                rig.attach_again();
                lives.push(std::mem::replace(&mut life, Life::begin(rig.host())));
                rig = rig.reconnect();
            }
            Event::Detach => {
                rig.detach();
                size = grow(&store, size);
                rig.attach_again();
                lives.push(std::mem::replace(&mut life, Life::begin(rig.host())));
                rig = rig.vanish(|_| ());
            }
        }
        if told.elapsed() > Duration::from_secs(60) {
            told = Instant::now();
            println!("{} s: {} requests, {counts:?}", begun.elapsed().as_secs(), rig.completed());
        }
    }
    verify(&mut rig);
    rig = rig.vanish(|host| life.look(host));
    lives.push(life);
    summary(&lives, &counts, rig.completed(), begun.elapsed());
}

fn next(rig: &mut Rig<'_>) -> Event {
    let mut roll = rig.random(1000);
    for (event, often) in OFTEN {
        match roll.checked_sub(often) {
            Some(rest) => roll = rest,
            None => return event,
        }
    }
    unreachable!("they are a thousand in all")
}

fn throttle(store: &Store, rig: &mut Rig<'_>) {
    let iops = [0, 0, 1000, 20_000][rig.random(4) as usize];
    let bytes = [0, 0, 100 << 20][rig.random(3) as usize];
    let (iops, bytes) = (iops.to_string(), bytes.to_string());
    store.ok(&["throttle", "t", "--iops", &iops, "--throughput", &bytes, "--burst", "0.1"]);
}

fn rewrap(store: &Store, rig: &mut Rig<'_>) {
    let key = ["alias/aws/ebs", "alias/other"][rig.random(2) as usize];
    store.ok(&["volume", "rewrap", "t", "--key", key]);
}

/// Reads everything that was ever written, with nothing else going on.
fn verify(rig: &mut Rig<'_>) {
    rig.settle();
    for (load, ring) in rig.loads.iter_mut().zip(&mut rig.session.rings) {
        load.verify(ring).unwrap_or_else(|e| panic!("{e}"));
    }
}

fn summary(lives: &[Life], counts: &BTreeMap<Event, u64>, requests: u64, took: Duration) {
    println!("{requests} requests in {} s, {} host processes, {counts:?}", took.as_secs(), lives.len());
    println!("with no VMM, in each host process that lived long enough:");
    println!("{:>6} {:>16} {:>12} {:>12}", "looks", "RSS KiB", "descriptors", "threads");
    let mut ends = Vec::new();
    for life in lives {
        if let Life { bare, warm: Some(warm), last, .. } = life {
            let (rss, fds, threads) = (
                format!("{} > {}", warm.rss_kib, last.rss_kib),
                format!("{} > {}", bare.fds, last.fds),
                format!("{} > {}", bare.threads, last.threads),
            );
            println!("{:>6} {rss:>16} {fds:>12} {threads:>12}", life.looks);
            ends.push(last.rss_kib);
        }
    }
    let (first, most) = (ends.first().copied(), ends.iter().max().copied());
    assert!(
        most <= first.map(|kib| kib + GROWTH_KIB + COPY_KIB),
        "later host processes are larger than the first"
    );
}
