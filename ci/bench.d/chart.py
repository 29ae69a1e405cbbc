"""The chart: panels of bars, one bar a server, as SVG."""

from xml.sax.saxutils import escape

import results
import tables

COLORS = {
    "sealblk": "#1857b8",
    "sealblk-sleeping": "#1857b8",
    "sealblk-plain": "#86aee6",
    "qsd-raw": "#80868f",
    "qsd-raw-iothread": "#b7bcc4",
    "qsd-luks": "#d07a1c",
    "qsd-luks-iothread": "#edb67a",
}
INK, FAINT = "#1c2128", "#5c6570"

WIDTH, COLUMNS, MARGIN, GAP = 1000, 2, 24, 36
NAME_WIDTH, VALUE_WIDTH = 136, 60
BAR, STEP, TITLE = 15, 21, 44
PANEL_WIDTH = (WIDTH - 2 * MARGIN - (COLUMNS - 1) * GAP) / COLUMNS
BAR_WIDTH = PANEL_WIDTH - NAME_WIDTH - VALUE_WIDTH


def panels(run):
    """Title, whether less is better, and a value for each server that has one."""
    one = lambda rw, bs, qd: results.Work(1, rw, bs, qd, True)
    iops, mib, p50, cpu = (lambda c: c.iops), (lambda c: c.mib), (lambda c: c.p50), (lambda c: c.cpu_us)
    wanted = [
        ("disk", one("randread", 4096, 32), "IOPS", iops, False),
        ("disk", one("randwrite", 4096, 32), "IOPS", iops, False),
        ("disk", one("read", 128 << 10, 8), "MiB/s", mib, False),
        ("disk", one("write", 128 << 10, 8), "MiB/s", mib, False),
        ("disk", one("randread", 4096, 32), "µs of server CPU a request", cpu, True),
        ("tmpfs", one("randread", 4096, 1), "µs, median latency", p50, True),
        ("tmpfs", one("randread", 4096, 32), "IOPS", iops, False),
        ("tmpfs", one("read", 128 << 10, 8), "MiB/s", mib, False),
    ]
    for fs, work, unit, pick, less in wanted:
        cells = [(s, run.cell(fs, s, work)) for s in run.servers]
        bars = [(s, pick(cell)) for s, cell in cells if cell]
        if bars:
            yield f"{tables.work_name(work)} · {run.fs_name(fs)}", unit, less, bars


def text(x, y, content, size=13, color=INK, anchor="start", weight="normal"):
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{color}" text-anchor="{anchor}" '
        f'font-weight="{weight}">{escape(content)}</text>'
    )


def panel(x, y, title, unit, less, bars):
    """The elements of one panel, and its height."""
    out = [text(x, y + 14, title, 14, weight="600")]
    out.append(text(x, y + 31, f"{unit} — {'shorter' if less else 'longer'} is better", 12, FAINT))
    longest = max(value for _, value in bars) or 1
    top = y + TITLE
    for server, value in bars:
        name = " ".join(results.SERVERS[server])
        length = max(BAR_WIDTH * value / longest, 1)
        weight = "600" if server == "sealblk" else "normal"
        out.append(text(x + NAME_WIDTH - 8, top + BAR - 3, name, 12, anchor="end", weight=weight))
        out.append(
            f'<rect x="{x + NAME_WIDTH:.1f}" y="{top}" width="{length:.1f}" height="{BAR}" rx="2" '
            f'fill="{COLORS[server]}"/>'
        )
        out.append(text(x + NAME_WIDTH + length + 6, top + BAR - 3, tables.number(value), 12, weight=weight))
        top += STEP
    return out, top - y


def svg(run):
    """The whole chart."""
    body = [text(MARGIN, MARGIN + 14, f"sealblk beside qemu-storage-daemon {run.qemu()}, one server core", 18, weight="600")]
    machine = run.machine
    where = f"{machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']}; one queue"
    if run.facts["mode"] == "quick":
        where += "; a quick run, too short to quote"
    body.append(text(MARGIN, MARGIN + 34, where, 12, FAINT))
    top, tallest = MARGIN + 62, 0
    for i, (title, unit, less, bars) in enumerate(panels(run)):
        column = i % COLUMNS
        if i and column == 0:
            top += tallest + 26
            tallest = 0
        elements, height = panel(MARGIN + column * (PANEL_WIDTH + GAP), top, title, unit, less, bars)
        body.extend(elements)
        tallest = max(tallest, height)
    height = top + tallest + MARGIN
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" '
        f'height="{height:.0f}" font-family="system-ui, -apple-system, \'Segoe UI\', \'DejaVu Sans\', sans-serif">'
    )
    return "\n".join([head, f'<rect width="{WIDTH}" height="{height:.0f}" fill="#ffffff"/>', *body, "</svg>"]) + "\n"
