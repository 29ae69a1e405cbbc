"""What was measured: reads the raw results, takes medians, and holds them against the aims."""

import json
import os
import statistics
from collections import namedtuple
from pathlib import Path

# One workload: queues, pattern, bytes of a request, requests in flight on each queue, and whether the guest's
# memory is in huge pages.
Work = namedtuple("Work", "queues rw bs qd huge")

# A server's key in the measurements: two lines of a heading, and the name in prose.
SERVERS = {
    "sealblk": ("sealblk", "encrypted"),
    "sealblk-plain": ("sealblk", "plain"),
    "qsd-raw": ("qsd", "raw"),
    "qsd-raw-iothread": ("qsd raw", "iothread"),
    "qsd-luks": ("qsd", "LUKS"),
    "qsd-luks-iothread": ("qsd LUKS", "iothread"),
    "sealblk-sleeping": ("sealblk", "no polling"),
}

# The pool of bounce buffers that a queue in use has, as the README states it.
POOL_MIB = 4


class Cell:
    """One workload on one server: the medians of its rounds."""

    def __init__(self, loads):
        median = lambda pick: statistics.median(pick(load) for load in loads)
        self.iops = median(lambda l: l["iops"])
        self.mib = median(lambda l: l["mib_per_second"])
        self.p50 = median(lambda l: l["latency_us"]["p50"])
        self.p99 = median(lambda l: l["latency_us"]["p99"])
        self.p999 = median(lambda l: l["latency_us"]["p99_9"])
        self.cpu_us = median(lambda l: l["server_cpu_us_per_request"])
        self.cores = median(lambda l: l["server_cpu_cores"])
        self.rss_mib = median(lambda l: l["server_rss_kib"]) / 1024
        self.kicks_per_request = median(lambda l: l["kicks"] / max(l["requests"], 1))
        self.failed = sum(l["errors"] for l in loads)
        self.rounds = [l["iops"] for l in loads]

    def as_json(self):
        return {
            "iops": self.iops,
            "mib_per_second": self.mib,
            "latency_us": {"p50": self.p50, "p99": self.p99, "p99_9": self.p999},
            "server_cpu_us_per_request": self.cpu_us,
            "server_cpu_cores": self.cores,
            "server_rss_mib": self.rss_mib,
            "kicks_per_request": self.kicks_per_request,
            "failed_requests": self.failed,
            "iops_of_each_round": self.rounds,
        }


class Run:
    """Everything of one run of ci/bench."""

    def __init__(self, folder):
        self.facts = dict(l.split("=", 1) for l in (folder / "facts").read_text().splitlines())
        self.machine = machine()
        self.idle = {}
        loads = {}
        self.snapshots = {}
        self.deletions = {}
        for line in (folder / "measurements").read_text().splitlines():
            row = json.loads(line)
            if "snapshot" in row:
                took = {"pause_us": row["snapshot"]["pause_us"], "took_us": row["took_us"]}
                self.snapshots.setdefault(row["snapshot_of_gib"], []).append(took)
                continue
            if "deleted" in row:
                space = row["deleted"]["space"]
                done = {"took_us": row["took_us"], "given_back": space["given_back"], "moved": space["moved"]}
                self.deletions.setdefault(row["deletion_after_mib"], []).append(done)
                continue
            where = (row["fs"], row["server"])
            if "idle" in row:
                self.idle[where] = row["idle"]
            else:
                load = row["load"]
                work = Work(load["queues"], load["rw"], load["bs"], load["qd"], load["huge_pages"])
                loads.setdefault(work, {}).setdefault(where, []).append(load)
        self.works = list(loads)
        self.cells = {(w, *where): Cell(l) for w, all_of in loads.items() for where, l in all_of.items()}
        present = {server for _, _, server in self.cells}
        self.servers = [s for s in SERVERS if s in present]
        self.systems = [fs for fs in ("disk", "device", "tmpfs", "cores") if any(fs == f for _, f, _ in self.cells)]
        self.crypto = crypto(folder / "xts")
        self.layers = (folder / "layers").read_text().splitlines()
        self.failed = sum(cell.failed for cell in self.cells.values())

    def cell(self, fs, server, work):
        """The medians of a workload, or None where it was not measured."""
        return self.cells.get((work, fs, server))

    def works_on(self, fs):
        """The workloads that were measured there."""
        return [work for work in self.works if any((work, fs, server) in self.cells for server in self.servers)]

    def peer(self, fs, kind, work, value):
        """The storage daemon's value, with or without an I/O thread, whichever is better."""
        best = self.better(fs, kind, work, value)
        return value(best) if best else None

    def better(self, fs, kind, work, value):
        """What the storage daemon did with or without an I/O thread, whichever has the higher value."""
        pair = [self.cell(fs, name, work) for name in (f"qsd-{kind}", f"qsd-{kind}-iothread")]
        return max((cell for cell in pair if cell), key=value, default=None)

    def ratio(self, fs, kind, work):
        """How many times the storage daemon's requests a second sealblk did."""
        ours, theirs = self.cell(fs, "sealblk", work), self.peer(fs, kind, work, lambda c: c.iops)
        return ours.iops / theirs if ours and theirs else None

    def share_of_plain(self, fs, work):
        """What part of unencrypted sealblk's requests a second encrypted sealblk did."""
        ours, plain = self.cell(fs, "sealblk", work), self.cell(fs, "sealblk-plain", work)
        return ours.iops / plain.iops if ours and plain and plain.iops else None

    def most_resident(self, server, queues):
        """The most that a server held in memory under any load on so many queues, MiB."""
        held = [c.rss_mib for (work, _, s), c in self.cells.items() if s == server and work.queues == queues]
        return max(held, default=None)

    def fs_name(self, fs):
        names = {
            "tmpfs": "memory (tmpfs)",
            "cores": "memory (tmpfs), all cores",
            "device": f"block device (loop, on {self.facts['disk_fs']})",
        }
        return names.get(fs, f"{self.facts['disk_fs']} on the disk")

    def qemu(self):
        words = self.facts["qemu"].split()
        return words[words.index("version") + 1] if "version" in words else self.facts["qemu"]

    def stolen(self):
        """Share of CPU time that the hypervisor kept from this machine during the run."""
        begin, end = ([int(n) for n in self.facts[f"steal_{w}"].split()] for w in ("begin", "end"))
        return (end[0] - begin[0]) / max(end[1] - begin[1], 1)

    def as_json(self):
        rows = []
        for (work, fs, server), cell in self.cells.items():
            rows.append({"fs": fs, "server": server, **work._asdict(), **cell.as_json()})
        return {
            "machine": self.machine,
            "run": {**self.facts, "stolen_cpu_share": self.stolen()},
            "results": rows,
            "idle": [{"fs": fs, "server": server, **v} for (fs, server), v in self.idle.items()],
            "crypto": self.crypto,
            "deletions": {f"{mib} MiB": done for mib, done in self.deletions.items()},
            "snapshots": {f"{gib} GiB": taken for gib, taken in self.snapshots.items()},
            "layers": self.layers,
            "aims": [aim.as_json() for aim in aims(self)],
            "failed_requests": self.failed,
        }


class Aim:
    """A number to reach, and what was reached (None: not measured)."""

    def __init__(self, what, value, limit, at_least, unit):
        self.what, self.value, self.limit, self.at_least, self.unit = what, value, limit, at_least, unit

    def met(self):
        if self.value is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def as_json(self):
        bound = "at_least" if self.at_least else "at_most"
        return {"what": self.what, "value": self.value, bound: self.limit, "unit": self.unit, "met": self.met()}


PATTERNS = {
    "randread": "random read",
    "randwrite": "random write",
    "randrw": "random read and write, 70/30",
    "read": "sequential read",
    "write": "sequential write",
}


def words(work):
    """A workload in words, without what its guest's memory is made of."""
    size = f"{work.bs >> 20} MiB" if work.bs >= 1 << 20 else f"{work.bs >> 10} KiB"
    on = f" on {work.queues} queues" if work.queues > 1 else ""
    return f"{size} {PATTERNS[work.rw]}, QD {work.qd}{on}"


def aims(run):
    """The aims of the data plane's performance, in the order in which they were set."""
    least = lambda what, value, limit, unit: Aim(what, value, limit, True, unit)
    most = lambda what, value, limit, unit: Aim(what, value, limit, False, unit)
    of_one = lambda rw, bs, qd: Work(1, rw, bs, qd, True)
    read, write, one = of_one("randread", 4096, 32), of_one("randwrite", 4096, 32), of_one("randread", 4096, 1)
    in_order = of_one("read", 128 << 10, 8)
    found = []
    for what, work, luks, raw in (
        ("4 KiB random read, QD 32", read, 6, 2),
        ("4 KiB random write, QD 32", write, 5, 1.5),
        ("128 KiB sequential read, QD 8", in_order, 10, 1.1),
    ):
        found.append(least(f"{what}, tmpfs, to qsd LUKS", run.ratio("tmpfs", "luks", work), luks, "x"))
        found.append(least(f"{what}, tmpfs, to qsd raw", run.ratio("tmpfs", "raw", work), raw, "x"))
    quick = lambda server: getattr(run.cell("tmpfs", server, one), "p50", None)
    found.append(most("4 KiB random read, QD 1, p50, tmpfs", quick("sealblk"), 5, "us"))
    found.append(most("4 KiB random read, QD 1, p50, tmpfs, without polling", quick("sealblk-sleeping"), 11, "us"))
    for size, limit in ((4096, 0.9), (128 << 10, 0.75)):
        shares = [run.share_of_plain("tmpfs", w) for w in run.works if w.queues == 1 and w.bs == size and w.huge]
        shares = [share for share in shares if share is not None]
        what = f"{size >> 10} KiB, tmpfs, encrypted to unencrypted: the least of all"
        found.append(least(what, min(shares, default=None), limit, "x"))
    for what, work, limit in (("read", read, 4.5), ("write", write, 6)):
        cpu = getattr(run.cell("disk", "sealblk", work), "cpu_us", None)
        found.append(most(f"4 KiB random {what}, QD 32, {run.fs_name('disk')}: server CPU a request", cpu, limit, "us"))
    for work in run.works:
        if work.queues == 1 and work.huge:
            plain = run.peer("disk", "raw", work, lambda c: c.iops)
            ours = run.cell("disk", "sealblk", work)
            ratio = ours.iops / plain if ours and plain else None
            found.append(least(f"{words(work)}, {run.fs_name('disk')}, to qsd raw", ratio, 0.95, "x"))
    fast = run.crypto.get("vaes512", {})
    slow = run.crypto.get("portable", {})
    speed = min(fast.values(), default=None)
    found.append(least("vaes512 alone, the slowest of its cases", speed, 24, "GB/s"))
    ratio = min((fast[case] / slow[case] for case in fast if case in slow), default=None)
    found.append(least("vaes512 to portable, the least of its cases", ratio, 2.5, "x"))
    wakes = [i["wakeups_per_second"] for (_, server), i in run.idle.items() if server == "sealblk"]
    found.append(most("connected and idle: wake-ups a second", max(wakes, default=None), 0, ""))
    size = run.most_resident("sealblk", 1)
    limit = 10e6 / (1 << 20) + POOL_MIB
    found.append(most("resident with one queue: 10 MB and the pool", size, round(limit, 1), "MiB"))
    return found


def crypto(path):
    """GB/s by engine, then by data unit and direction, out of what benches/xts prints; and what bounds them."""
    speeds = {}
    for line in path.read_text().splitlines():
        words = line.split()
        if line.startswith("ceiling: "):
            speeds.setdefault(line.removeprefix("ceiling: ").rsplit(None, 2)[0], {})["ceiling"] = float(words[-2])
        if len(words) == 5 and words[1].isdigit():
            speeds.setdefault(words[0], {})[f"{words[1]} {words[2]}"] = float(words[3])
    return speeds


def machine():
    """What this machine is."""
    text = Path("/proc/cpuinfo").read_text()
    field = lambda name: next((l.split(":", 1)[1].strip() for l in text.splitlines() if l.startswith(name)), "?")
    ids = "-".join(field(name) for name in ("cpu family", "model\t", "stepping"))
    siblings = Path("/sys/devices/system/cpu/cpu0/topology/thread_siblings_list")
    shared = siblings.exists() and siblings.read_text().strip() not in ("0", "")
    memory = int(Path("/proc/meminfo").read_text().split()[1]) >> 20
    return {
        "cpu": field("model name"),
        "cpu_ids": ids,
        "cores": os.cpu_count(),
        "core_0_has_siblings": shared,
        "virtual": "hypervisor" in field("flags").split(),
        "memory_gib": memory,
        "kernel": os.uname().release,
    }
