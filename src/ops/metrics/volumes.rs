//! The metrics of volumes, with the labels `volume`, an id, and `name`.

use crate::host::stats::Stats;
use crate::host::status::Coming;
use crate::ops::metrics::text::{Labels, Text, Type, number};
use crate::ops::observe::Observed;
use crate::ops::usage::Overview;
use crate::vhost::queue::counters::QueueStats;
use crate::vhost::queue::counters::histogram::Histogram;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The powers of two, in nanoseconds, up to which requests are counted in a histogram: 16 microseconds to 17
/// seconds. They are bounds of the buckets in which host processes count, so that the numbers are exact.
const BOUNDS: std::ops::RangeInclusive<u32> = 14..=34;

/// One volume whose host process has answered.
struct Answered<'a> {
    volume: &'a str,
    name: &'a str,
    stats: &'a Stats,
    total: QueueStats,
}

/// Writes all of them.
pub(super) fn write(text: &mut Text, volumes: &[Observed], overview: &Overview) {
    let ids: Vec<String> = volumes.iter().map(|it| it.entry.id.to_string()).collect();
    let named = || volumes.iter().zip(&ids);
    text.family("sealblk_volume_size_bytes", Type::Gauge, "How large the volume is.");
    for (it, id) in named() {
        if let Ok(metadata) = &it.entry.metadata {
            text.sample(&labels(id, it), metadata.size());
        }
    }
    type OfObserved = fn(&Observed, &Overview) -> u64;
    let of_all: [(_, _, OfObserved); 3] = [
        (
            "sealblk_volume_disk_used_bytes",
            "What layers take that only this volume names.",
            |it, overview| overview.usage(it.entry.id).own,
        ),
        (
            "sealblk_volume_disk_shared_bytes",
            "What layers take that this volume shares with snapshots and other volumes.",
            |it, overview| overview.usage(it.entry.id).shared,
        ),
        ("sealblk_volume_attached", "Whether a process has the volume attached.", |it, _| {
            it.holder.is_some().into()
        }),
    ];
    for (name, help, of) in of_all {
        text.family(name, Type::Gauge, help);
        named().for_each(|(it, id)| text.sample(&labels(id, it), of(it, overview)));
    }
    text.family(
        "sealblk_volume_up",
        Type::Gauge,
        "Whether the process that has the volume attached has answered; of attached volumes only.",
    );
    for (it, id) in named() {
        if let Some(stats) = &it.stats {
            text.sample(&labels(id, it), u8::from(stats.is_ok()));
        }
    }
    let answered: Vec<Answered<'_>> = named()
        .filter_map(|(it, volume)| {
            let stats = it.stats.as_ref()?.as_ref().ok()?;
            Some(Answered { volume, name: it.entry.name().unwrap_or(""), stats, total: stats.total() })
        })
        .collect();
    requests(text, &answered);
    durations(text, &answered);
    waits(text, &answered);
    gauges(text, &answered);
    states(text, &answered);
}

fn labels<'a>(id: &'a str, it: &'a Observed) -> [(&'a str, &'a str); 2] {
    [("volume", id), ("name", it.entry.name().unwrap_or(""))]
}

impl Answered<'_> {
    fn labels(&self) -> [(&str, &str); 2] {
        [("volume", self.volume), ("name", self.name)]
    }

    fn labels_and<'b>(&'b self, name: &'b str, value: &'b str) -> [(&'b str, &'b str); 3] {
        [("volume", self.volume), ("name", self.name), (name, value)]
    }
}

fn requests(text: &mut Text, volumes: &[Answered<'_>]) {
    let bytes: [OfQueues; 4] = [
        ("sealblk_volume_read_bytes", "Bytes that guests have read.", |q| q.read.bytes),
        ("sealblk_volume_written_bytes", "Bytes that guests have written.", |q| q.write.bytes),
        ("sealblk_volume_discarded_bytes", "Bytes that guests have discarded.", |q| q.discard.bytes),
        ("sealblk_volume_zeroed_bytes", "Bytes that guests had zeroed.", |q| q.write_zeroes.bytes),
    ];
    counters(text, volumes, &bytes);
    text.family("sealblk_volume_requests", Type::Counter, "Requests that were answered, also with an error.");
    for it in volumes {
        for (op, kind) in it.total.kinds() {
            text.sample(&it.labels_and("op", op), kind.requests);
        }
    }
    text.family(
        "sealblk_volume_request_errors",
        Type::Counter,
        "Requests that were answered with an I/O error.",
    );
    for it in volumes {
        for (op, kind) in it.total.kinds() {
            text.sample(&it.labels_and("op", op), kind.errors);
        }
    }
    counters(
        text,
        volumes,
        &[("sealblk_volume_unsupported_requests", "Requests that were answered as unsupported.", |q| {
            q.unsupported
        })],
    );
}

fn durations(text: &mut Text, volumes: &[Answered<'_>]) {
    text.family(
        "sealblk_volume_request_duration_seconds",
        Type::Histogram,
        "Time from when a request was seen until the guest could see the answer.",
    );
    for it in volumes {
        for (op, histogram) in it.stats.latencies.kinds() {
            // Most guests never ask for some kinds.
            if histogram.count() > 0 || ["read", "write", "flush"].contains(&op) {
                write_histogram(text, &it.labels_and("op", op), histogram);
            }
        }
    }
    text.family(
        "sealblk_volume_request_wait_seconds",
        Type::Histogram,
        "Time that requests waited before they were given to the disk, of those that waited.",
    );
    for it in volumes {
        write_histogram(text, &it.labels(), &it.stats.latencies.waiting);
    }
}

fn write_histogram(text: &mut Text, labels: &Labels<'_>, histogram: &Histogram) {
    let below = BOUNDS.map(|power| (seconds(1 << power), histogram.below(1 << power)));
    text.histogram(labels, below, histogram.count(), seconds(histogram.sum_ns));
}

fn waits(text: &mut Text, volumes: &[Answered<'_>]) {
    text.family(
        "sealblk_volume_stalls",
        Type::Counter,
        "How often a request began to wait before the disk: for the volume's limits, or for room (a buffer, \
         the disk's queue, a copy at that place).",
    );
    for it in volumes {
        text.sample(&it.labels_and("cause", "limits"), it.total.throttled.count);
        text.sample(&it.labels_and("cause", "room"), it.total.no_room.count);
    }
    text.family("sealblk_volume_stall_seconds", Type::Counter, "How long requests waited before the disk.");
    for it in volumes {
        text.sample(&it.labels_and("cause", "limits"), number(seconds(it.total.throttled.total_ns)));
        text.sample(&it.labels_and("cause", "room"), number(seconds(it.total.no_room.total_ns)));
    }
    counters(
        text,
        volumes,
        &[
            ("sealblk_volume_polls", "How often a queue's thread looked for work before sleeping.", |q| {
                q.polls
            }),
            ("sealblk_volume_polls_found", "How often it found some.", |q| q.polls_found),
            ("sealblk_volume_sleeps", "How often a queue's thread slept.", |q| q.sleeps),
            ("sealblk_volume_pauses", "How often the queues stood still for a change of layers.", |q| {
                q.pauses.count
            }),
            (
                "sealblk_volume_cipher_sampled_bytes",
                "Bytes whose encryption or decryption was measured.",
                |q| q.cipher.bytes,
            ),
        ],
    );
    counters_in_seconds(
        text,
        volumes,
        &[
            ("sealblk_volume_pause_seconds", "How long the queues stood still for changes of layers.", |q| {
                q.pauses.total_ns
            }),
            (
                "sealblk_volume_cipher_sampled_seconds",
                "How long encrypting or decrypting those bytes took that were measured, copying included.",
                |q| q.cipher.total_ns,
            ),
        ],
    );
}

fn gauges(text: &mut Text, volumes: &[Answered<'_>]) {
    type OfVolume = fn(&Answered<'_>) -> u64;
    let whole: [(_, _, OfVolume); 7] = [
        ("sealblk_volume_queues", "Queues that the volume offers.", |it| it.stats.queues.len() as u64),
        ("sealblk_volume_queues_running", "Queues that a guest uses.", |it| {
            it.stats.queues.iter().filter(|queue| queue.ring_runs).count() as u64
        }),
        ("sealblk_volume_requests_in_flight", "Requests that are being served.", |it| it.total.depth),
        ("sealblk_volume_requests_in_flight_max", "The most at a time, each queue's most added up.", |it| {
            it.total.depth_max
        }),
        ("sealblk_volume_limit_requests_per_second", "The limit on requests; 0: none.", |it| {
            it.stats.limits.iops
        }),
        ("sealblk_volume_limit_bytes_per_second", "The limit on bytes; 0: none.", |it| {
            it.stats.limits.throughput
        }),
        ("sealblk_volume_paused", "Whether the queues stand still at this moment.", |it| {
            it.total.pauses.now_ns.is_some().into()
        }),
    ];
    for (name, help, of) in whole {
        text.family(name, Type::Gauge, help);
        volumes.iter().for_each(|it| text.sample(&it.labels(), of(it)));
    }
    let in_seconds: [(_, _, OfVolume); 2] = [
        (
            "sealblk_volume_oldest_request_age_seconds",
            "How long the oldest request in flight is there; 0 if there is none.",
            |it| it.total.oldest_in_flight_ns.unwrap_or(0),
        ),
        ("sealblk_volume_longest_pause_seconds", "The longest time that the queues stood still.", |it| {
            it.total.pauses.longest_ns
        }),
    ];
    for (name, help, of) in in_seconds {
        text.family(name, Type::Gauge, help);
        volumes.iter().for_each(|it| text.sample(&it.labels(), number(seconds(of(it)))));
    }
    text.family(
        "sealblk_volume_attach_time_seconds",
        Type::Gauge,
        "When the volume was attached, since the epoch: its counters began at 0 then.",
    );
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    for it in volumes {
        let at = now.saturating_sub(Duration::from_nanos(it.stats.since_ns));
        text.sample(&it.labels(), at.as_secs());
    }
}

/// What host processes say of themselves. Where all queues stand still, they say nothing for that moment.
fn states(text: &mut Text, volumes: &[Answered<'_>]) {
    let said = || volumes.iter().filter_map(|it| Some((it, it.stats.status.as_ref()?)));
    text.family(
        "sealblk_volume_flush_failed",
        Type::Gauge,
        "Whether a flush has failed: writes may be lost, and no flush succeeds until the next attach.",
    );
    said().for_each(|(it, status)| text.sample(&it.labels(), u8::from(status.flush_failed)));
    text.family("sealblk_volume_no_space_requests", Type::Counter, "Requests that failed for want of space.");
    for (it, status) in said() {
        text.sample(&it.labels(), status.no_space.as_ref().map_or(0, |refused| refused.requests));
    }
    let coming = || said().filter_map(|(it, status)| Some((it, status.coming.as_ref()?)));
    let of_coming: [OfComing; 4] = [
        (
            "sealblk_volume_coming_left_bytes",
            Type::Gauge,
            "What is still to come from the place of a snapshot that was pulled lazily.",
            |it| it.all.saturating_sub(it.come),
        ),
        (
            "sealblk_volume_source_away",
            Type::Gauge,
            "Whether nothing comes from there at the moment.",
            |it| u64::from(it.away.is_some()),
        ),
        ("sealblk_volume_source_waiting_reads", Type::Gauge, "Reads that wait for what is to come.", |it| {
            it.waiting
        }),
        (
            "sealblk_volume_source_failed_reads",
            Type::Counter,
            "Reads that failed since what they needed did not come, or was not right.",
            |it| it.failed,
        ),
    ];
    for (name, kind, help, value) in of_coming {
        text.family(name, kind, help);
        coming().for_each(|(it, coming)| text.sample(&it.labels(), value(coming)));
    }
    let copying = || said().filter_map(|(it, status)| Some((it, status.hydration.as_ref()?)));
    text.family(
        "sealblk_volume_hydration_left_bytes",
        Type::Gauge,
        "What is still to be copied up, at most.",
    );
    for (it, progress) in copying() {
        // Where that is not known yet, there is no sample.
        if let Some(left) = progress.left {
            text.sample(&it.labels(), left);
        }
    }
    text.family(
        "sealblk_volume_hydration_stuck",
        Type::Gauge,
        "Whether copying up waits, for space or after an error.",
    );
    for (it, progress) in copying() {
        text.sample(&it.labels(), u8::from(progress.waits_for_space || progress.problem.is_some()));
    }
}

type OfComing = (&'static str, Type, &'static str, fn(&Coming) -> u64);
type OfQueues = (&'static str, &'static str, fn(&QueueStats) -> u64);

fn counters(text: &mut Text, volumes: &[Answered<'_>], families: &[OfQueues]) {
    for (name, help, of) in families {
        text.family(name, Type::Counter, help);
        volumes.iter().for_each(|it| text.sample(&it.labels(), of(&it.total)));
    }
}

fn counters_in_seconds(text: &mut Text, volumes: &[Answered<'_>], families: &[OfQueues]) {
    for (name, help, of) in families {
        text.family(name, Type::Counter, help);
        volumes.iter().for_each(|it| text.sample(&it.labels(), number(seconds(of(&it.total)))));
    }
}

fn seconds(nanos: u64) -> f64 {
    nanos as f64 / 1e9
}
