//! Room for open files: how many descriptors the host process of a volume takes, and whether it may have
//! them.
//!
//! What is short is found out before a key is asked for, and not when a VMM that serves a guest already
//! shares one region of memory more.
#![forbid(unsafe_code)]

use crate::base::{Context, Error, Kind, Result};
use crate::catalog::layout::MAX_LAYERS;
use crate::vhost::device::MAX_MEMORY_REGIONS;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// For each queue: two io_urings, its event, its open file (two while a layer takes the place of another),
/// the event of its turn; kick, call and err of the VMM's, once for the session and once for its thread; and
/// a stand-in for the kick.
const A_QUEUE: u64 = 2 + 1 + 2 + 1 + 3 + 3 + 1;
/// For everything else, beside what is open when the attach begins: locks, logs, sockets, clients, a VMM's
/// session, a command that goes on.
const THE_REST: u64 = 96;
/// For the layers of a volume, as many as it may have.
const LAYERS: u64 = MAX_LAYERS as u64;
/// Regions in one message: as many as every VMM may share.
const A_TABLE: u64 = 32;
/// Copies of what travels in a message: the gate's and the crate's, beside those in use, which the new ones
/// replace.
const IN_TRANSIT: u64 = 2 * A_TABLE;

/// Raises this process's limit on open files as far as it may, and finds out what it is enough for. Returns
/// how many memory regions a VMM may share.
///
/// # Errors
/// `Unsupported` if the limit is too small for so many queues.
pub(super) fn make_room(queues: u16) -> Result<u16> {
    let attempt = || "look at the limit on open files";
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).context(attempt)?;
    if soft < hard {
        // As far as it goes. Programs that it starts get it as well, and do not use select().
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context(|| "raise the limit on open files")?;
    }
    let open = std::fs::read_dir("/proc/self/fd").context(|| "count the open files")?.count() as u64;
    regions(hard, open, queues)
}

fn regions(limit: u64, open: u64, queues: u16) -> Result<u16> {
    let least = open + u64::from(queues) * A_QUEUE + THE_REST + LAYERS + IN_TRANSIT + A_TABLE;
    if limit < least {
        return Err(Error::new(
            Kind::Unsupported,
            format!(
                "{queues} queues and {A_TABLE} regions of a VMM's memory take {least} open files, and this \
                 process may have {limit}: attach with fewer --queues, or raise the hard limit (\"ulimit \
                 -Hn\", LimitNOFILE= in a systemd unit)"
            ),
        ));
    }
    let regions = (limit - least + A_TABLE).min(MAX_MEMORY_REGIONS.into()) as u16;
    if regions < MAX_MEMORY_REGIONS {
        log::warn!(
            "this process may have {limit} open files: a VMM may share {regions} regions of memory, not \
             {MAX_MEMORY_REGIONS} (\"ulimit -Hn\", LimitNOFILE= in a systemd unit)"
        );
    }
    Ok(regions)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_limit_is_enough_for_is_told_before() {
        assert_eq!(regions(1 << 20, 10, 64).unwrap(), MAX_MEMORY_REGIONS);
        let refused = regions(82, 10, 16).unwrap_err();
        assert_eq!(refused.kind(), Kind::Unsupported);
        for word in ["16 queues", "82", "--queues", "LimitNOFILE="] {
            assert!(refused.to_string().contains(word), "{refused}");
        }
        let least = 10 + 16 * A_QUEUE + THE_REST + LAYERS + IN_TRANSIT + A_TABLE;
        assert!(regions(least - 1, 10, 16).is_err());
        for (more, regions_then) in [(0, 32), (1, 33), (476, 508), (477, 509), (478, 509)] {
            assert_eq!(regions(least + more, 10, 16).unwrap(), regions_then);
        }
    }
}
