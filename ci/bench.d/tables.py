"""Results as text: tables for a terminal, and a short one in Markdown for the README."""

import statistics

import results

def work_name(work):
    return results.words(work) + ("" if work.huge else ", small pages")


def heading(run):
    """What was measured on what: a few lines."""
    m, facts = run.machine, run.facts
    kind = "virtual machine" if m["virtual"] else "machine"
    where = f"server on core {facts['server_cpu']}, load on core {facts['load_cpu']}"
    how = f"median of {facts['rounds']} rounds of {facts['seconds']} s each; files of {facts['file_mib']} MiB"
    lines = [
        f"{m['cpu']} (family-model-stepping {m['cpu_ids']}), {kind} with {m['cores']} cores, {m['memory_gib']} GiB",
        f"Linux {m['kernel']}; qsd is qemu-storage-daemon {run.qemu()} (io_uring, O_DIRECT); {facts['sealblk'].strip()}",
        f"{where}; {how}",
    ]
    if facts["attach_args"]:
        lines.append(f"sealblk attach with {facts['attach_args']}")
    if m["core_0_has_siblings"]:
        lines.append("CAUTION: core 0 shares its hardware with another one; load and server may disturb each other")
    if facts["mode"] == "quick":
        lines.append("CAUTION: a quick run, too short to quote")
    busy = float(facts["load_average"])
    if busy > 0.5 or run.stolen() > 0.01:
        lines.append(
            f"CAUTION: the machine was not quiet (load average {busy} at the beginning, "
            f"{run.stolen():.1%} of CPU time stolen by the hypervisor)"
        )
    return lines


def grid(rows):
    """Rows of cells as lines: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    align = lambda i, cell: cell.ljust(widths[i]) if i == 0 else cell.rjust(widths[i])
    return ["  ".join(align(i, cell) for i, cell in enumerate(row)).rstrip() for row in rows]


def number(value, digits=3):
    """A number with so many significant digits, thousands as k."""
    if value is None:
        return "-"
    if value >= 10_000:
        return f"{value / 1000:.{0 if value >= 100_000 else 1}f}k"
    whole = len(str(int(value)))
    return f"{value:.{max(digits - whole, 0)}f}" if value >= 1 else f"{value:.2f}"


def speed(cell, work):
    if cell is None:
        return "-"
    return number(cell.iops) if work.bs == 4096 else f"{cell.mib:.0f}"


def times(value):
    return "-" if value is None else f"{value:.2f}x"


def server_heads(run, title, more=()):
    names = [results.SERVERS[s] for s in run.servers]
    return [["", *(n[0] for n in names), *(m[0] for m in more)], [title, *(n[1] for n in names), *(m[1] for m in more)]]


def speeds(run, fs):
    rows = server_heads(run, f"{run.fs_name(fs)}", (("to qsd", "raw"), ("to qsd", "LUKS"), ("encr. to", "plain")))
    for work in run.works_on(fs):
        unit = "IOPS" if work.bs == 4096 else "MiB/s"
        cells = [speed(run.cell(fs, s, work), work) for s in run.servers]
        ratios = [run.ratio(fs, "raw", work), run.ratio(fs, "luks", work), run.share_of_plain(fs, work)]
        rows.append([f"{work_name(work)}, {unit}", *cells, *map(times, ratios)])
    return grid(rows)


def per_server(run, fs, title, show):
    rows = server_heads(run, title)
    for work in run.works_on(fs):
        cells = [run.cell(fs, s, work) for s in run.servers]
        rows.append([work_name(work), *("-" if c is None else show(c) for c in cells)])
    return grid(rows)


def at_rest(run):
    """Memory and wake-ups."""
    rows = server_heads(run, "")
    for queues in sorted({w.queues for w in run.works}):
        named = "one queue" if queues == 1 else f"{queues} queues"
        most = [run.most_resident(server, queues) for server in run.servers]
        rows.append([f"most resident under load, {named}, MiB", *map(number, most)])
    for fs in run.systems:
        idle = [run.idle.get((fs, s)) for s in run.servers]
        for what, key in (("wake-ups", "wakeups_per_second"), ("us of server CPU", "server_cpu_us_per_second")):
            cells = ["-" if i is None else f"{i[key]:.1f}" for i in idle]
            rows.append([f"idle, {run.fs_name(fs)}: {what} a second", *cells])
    return grid(rows)


def crypto(run):
    cases = list(dict.fromkeys(case for engine in run.crypto.values() for case in engine))
    rows = [["GB/s, one core", *cases]]
    for engine, found in run.crypto.items():
        rows.append([engine, *(f"{found[c]:.1f}" if c in found else "-" for c in cases)])
    return grid(rows)


def snapshots(run):
    rows = [["of an attached volume of", "snapshots", "pause, us: median", "most", "command, ms: median", "most"]]
    for gib, taken in run.snapshots.items():
        pauses, whole = ([t[what] for t in taken] for what in ("pause_us", "took_us"))
        shown = [f"{statistics.median(pauses):.0f}", f"{max(pauses)}"]
        shown += [f"{ms / 1000:.1f}" for ms in (statistics.median(whole), max(whole))]
        rows.append([f"{gib} GiB", str(len(taken)), *shown])
    return grid(rows)


def deletions(run):
    rows = [["MiB written since", "deletions", "command, ms: median", "most", "given back, MiB", "moved, MiB"]]
    for mib, done in run.deletions.items():
        took = [d["took_us"] / 1000 for d in done]
        space = [statistics.median(d[what] for d in done) / (1 << 20) for what in ("given_back", "moved")]
        shown = [f"{value:.1f}" for value in (statistics.median(took), max(took), *space)]
        rows.append([str(mib), str(len(done)), *shown])
    return grid(rows)


def aims(run):
    rows = [["", "measured", "aim", ""]]
    for aim in results.aims(run):
        value = "-" if aim.value is None else f"{number(aim.value)} {aim.unit}".strip()
        bound = f"{'>=' if aim.at_least else '<='} {aim.limit:g} {aim.unit}".strip()
        rows.append([aim.what, value, bound, {True: "met", False: "MISSED", None: "not measured"}[aim.met()]])
    return grid(rows)


def text(run):
    """The whole report."""
    lines = [""]
    block = lambda title, body: lines.extend([f"== {title}", *body, ""])
    block("Machine and run", [*heading(run), "the guest's memory is in pages of 2 MiB, where nothing else is said"])
    for fs in run.systems:
        block("Speed (to qsd: whichever is better, with or without iothread)", speeds(run, fs))
    latency = lambda c: "/".join(f"{v:.0f}" if v >= 10 else f"{v:.1f}" for v in (c.p50, c.p99, c.p999))
    for fs in run.systems:
        block("Latency, us: p50/p99/p99.9", per_server(run, fs, run.fs_name(fs), latency))
    for fs in run.systems:
        block("Server CPU, us a request", per_server(run, fs, run.fs_name(fs), lambda c: f"{c.cpu_us:.2f}"))
    block("Memory, and rest", at_rest(run))
    block("The cipher alone", crypto(run))
    block("Snapshots under load", snapshots(run))
    block("Deletions of snapshots", deletions(run))
    block("Chains of layers", run.layers)
    block("Aims (one queue, where nothing else is said)", aims(run))
    lines.append(f"{run.failed} requests failed; measured in {run.facts['took']} s")
    return "\n".join(lines) + "\n"


def best(run, fs, server, work):
    """What a server did; the storage daemon with or without an I/O thread, whichever did more."""
    if server.startswith("qsd-"):
        return run.better(fs, server.removeprefix("qsd-"), work, lambda cell: cell.iops)
    return run.cell(fs, server, work)


def markdown(run):
    """One queue and huge pages, for the README."""
    shown = [s for s in ("sealblk", "sealblk-plain", "qsd-raw", "qsd-luks") if s in run.servers]
    heads = {"sealblk": "sealblk", "sealblk-plain": "sealblk, unencrypted", "qsd-raw": "qsd raw", "qsd-luks": "qsd LUKS"}
    rows = [["", *(heads[s] for s in shown), "to raw", "to LUKS"]]
    for fs in (fs for fs in run.systems if fs != "cores"):
        for work in (w for w in run.works_on(fs) if w.queues == 1 and w.huge):
            unit = "IOPS" if work.bs == 4096 else "MiB/s"
            cells = [speed(best(run, fs, s, work), work) for s in shown]
            ratios = [times(run.ratio(fs, kind, work)) for kind in ("raw", "luks")]
            rows.append([f"{run.fs_name(fs)}: {work_name(work)}, {unit}", *cells, *ratios])
    rows.insert(1, ["---", *("---:" for _ in rows[0][1:])])
    table = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*table, "", *(f"{line}." for line in heading(run))]) + "\n"
