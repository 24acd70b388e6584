"""Chapter 13: bytes as boxes, where the counters sit, a cache's size, predicted and counted."""

import numpy as np
from matplotlib.patches import Rectangle

from benchmarks import traffic
from notebooks.figures.style import PALETTE, new_figure
from notebooks.measurements import records
from rcmlib.measure import ledger
from rcmlib.measure.implementations import IMPLEMENTATIONS

LABELS = [
    label
    for label, row in IMPLEMENTATIONS.items()
    if row.passes and row.skip and label != "naive"  # it would dwarf the others
]
COLOURS = {"x": "x", "F": "f", "out": "out", "a": "neutral", "b": "neutral"}


def byte_boxes(labels: tuple[str, ...], shape: tuple[int, int, int, int]):
    """Each tensor that crosses HBM as a box as wide as its bytes; a row an implementation."""
    fig, ax = new_figure(7.8, 0.78 * len(labels) + 0.75)
    ax.set_axis_off()
    for row, label in enumerate(labels):
        passes = ledger.pipeline(label, *shape)
        left, base = 0.0, -row * 1.5
        title = IMPLEMENTATIONS[label].title
        ax.text(0, base + 0.72, title, fontweight="bold", va="bottom")
        for step in passes:
            for part in (step.reads, step.writes):
                for name, size in part.items():
                    _box(ax, left, base, name, size / 1e6, part is step.writes)
                    left += size / 1e6
            left += 3.0
        ax.text(
            left + 1, base + 0.3, f"{ledger.total(passes) / 1e6:.0f} MB", va="center"
        )
    for x, name, written in ((100, "read", False), (122, "written", True)):
        _box(ax, x, 1.35, "", 6, written)
        ax.text(x + 7.5, 1.65, name, va="center", fontsize=9)
    widest = max(ledger.total(ledger.pipeline(label, *shape)) for label in labels)
    ax.set(xlim=(-0.5, widest / 1e6 + 48), ylim=(-1.5 * len(labels) + 1.2, 2.2))
    return fig


def _box(ax, x, y, name, width, written) -> None:
    colour = PALETTE[COLOURS.get(name, "qkv")]
    face = colour if written else colour + "38"
    ax.add_patch(Rectangle((x + 0.3, y), width - 0.6, 0.6, fc=face, ec=colour, lw=1.2))
    ink = "white" if written and name in ("F", "out") else "black"
    ax.text(x + width / 2, y + 0.3, name, ha="center", va="center", color=ink,
            fontsize=9)  # fmt: skip


def where_counters_sit(l2_mb: float, hbm_mb: float):
    """SM, L2 and HBM; between them the counters, and the MB that one call moved there.

    The bars between them are as thick as the bytes.
    """
    fig, ax = new_figure(7.6, 2.9)
    boxes = (
        (0.0, 2.4, "SMs", "registers,\nshared memory", "out"),
        (5.2, 1.9, "L2", "cache of\nall SMs", "f"),
        (10.2, 1.9, "HBM", "where tensors\nlive", "neutral"),
    )
    for x, width, name, what, colour in boxes:
        edge = PALETTE[colour]
        ax.add_patch(Rectangle((x, 0), width, 3, fc=edge + "22", ec=edge, lw=1.6))
        ax.text(x + width / 2, 2.05, name, ha="center", fontweight="bold", fontsize=12)
        ax.text(x + width / 2, 1.0, what, ha="center", va="center", fontsize=9)
    thick = 1.5 / max(l2_mb, hbm_mb)
    links = (
        (2.5, 5.1, l2_mb, "lts__t_sectors_op_*", "× 32 bytes"),
        (7.2, 10.1, hbm_mb, "dram__bytes_*", "in bytes"),
    )
    for left, right, mb, counter, unit in links:
        height = max(mb * thick, 0.03)
        ax.add_patch(
            Rectangle((left, 1.5 - height / 2), right - left, height, fc="#555555")
        )
        middle = (left + right) / 2
        ax.text(
            middle, 3.0, counter, ha="center", va="top", fontsize=9, family="monospace"
        )
        ax.text(
            middle, 2.62, unit, ha="center", va="top", fontsize=8.5, color="#555555"
        )
        ax.text(middle, 0.3, f"{mb:.0f} MB", ha="center", fontweight="bold")
    ax.set(xlim=(-0.2, 12.3), ylim=(-0.15, 3.15))
    ax.set_axis_off()
    return fig


def cache_size(
    labels: tuple[str, ...], shape: tuple[int, int, int, int], l2_bytes: float
):
    """MB by the ledger over the size of L2; dots, drawn at l2_bytes: the counters (`seed`)."""
    fig, ax = new_figure(7.2, 3.7)
    sizes = np.linspace(0, 80, 321)  # MiB
    for label in labels:
        passes = ledger.pipeline(label, *shape)
        moved = [ledger.hbm(passes, mib * 2**20).bytes / 1e6 for mib in sizes]
        row = IMPLEMENTATIONS[label]
        ax.plot(sizes, moved, color=row.colour)
        ax.annotate(row.title, (sizes[-1], moved[-1]), xytext=(6, 0), va="center",
                    textcoords="offset points", color=row.colour)  # fmt: skip
        counted = records.traffic_mb("seed", label)
        ax.plot(l2_bytes / 2**20, counted, "o", ms=7, color=row.colour)
    ax.axvline(l2_bytes / 2**20, color="#777777", lw=1, ls=":")
    ax.set(xlim=(0, 117), ylim=(0, None), xticks=range(0, 81, 10))
    ax.set(xlabel="size of L2 in the ledger (MiB)", ylabel="through HBM (MB)")
    return fig


def predicted_and_counted(case_names: tuple[str, ...]):
    """Bars: bytes read and written by the counters. Black marks: the ledger, no cache."""
    cases = [records.case("traffic", name) for name in case_names]
    fig, axes = new_figure(7.8, 4.3, ncols=len(cases), sharey=True)
    for ax, case in zip(np.atleast_1d(axes), cases, strict=True):
        shown = [label for label in LABELS if label in case["traffic"]]
        for row, label in enumerate(shown):
            found = case["traffic"][label]["none"]
            read = found["read_bytes"] / 1e6
            written = (found["write_bytes"] + found["left_bytes"]) / 1e6
            colour = IMPLEMENTATIONS[label].colour
            ax.barh(row, read, color=colour + "70", ec=colour)
            ax.barh(row, written, left=read, color=colour, ec=colour)
            mark = traffic.predicted_mb(case, label)
            ax.plot([mark, mark], [row - 0.46, row + 0.46], color="black", lw=2)
        ax.set_yticks(
            range(len(shown)), [IMPLEMENTATIONS[label].title for label in shown]
        )
        ax.grid(axis="y", visible=False)
        ax.set_title(f"N = {case['N']}, C = {case['H'] * case['D']}")
        ax.set_xlabel("MB through HBM")
    np.atleast_1d(axes)[0].invert_yaxis()
    return fig
