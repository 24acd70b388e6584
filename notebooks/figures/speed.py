"""Chapter 14: how a time is taken, who is faster where, and what holds them.

The roofline, the launch path, who wins at which length, and the reader's own GPU.
"""

import json
import math
import statistics
from pathlib import Path

import numpy as np
from matplotlib.patches import Rectangle

from notebooks.figures.style import PALETTE, arrow, new_figure, points
from notebooks.measurements import records
from rcmlib.measure.implementations import IMPLEMENTATIONS, TWO_PASS
from rcmlib.measure.records import Estimate, estimate, fastest

MARKERS = {"naive": "v", "flash_eager": "o", "flash_compiled": "o", "cudnn_compiled": "s",
           "fa4_compiled": "X", "flex_compiled": "^", "triton_skip": "D", "fused": "D",
           "sage": "D", "sage1_compiled": "P"}  # fmt: skip
OURS = ("fused", "sage")
SHORT = {  # where there is no room for a title
    "fused": "bf16",
    "sage": "8 bits",
    "flash_compiled": "flash",
    "cudnn_compiled": "cuDNN",
    "fa4_compiled": "FA4",
}


def card(name: str) -> str:
    """The GPU of a record, in short: "H200"."""
    return records.record(name)["provenance"]["device"].split()[1]


def named(case: dict, label: str) -> str:
    """label; for "strongest", the fastest two passes of this case."""
    return fastest(case, TWO_PASS) if label == "strongest" else label


def look(label: str) -> dict:
    """How matplotlib draws an implementation, everywhere in this chapter."""
    row = IMPLEMENTATIONS[label]
    return {"marker": MARKERS[label], "color": row.colour, "label": row.title}


def strongest(case: dict, labels: tuple[str, ...] = TWO_PASS) -> float:
    """The shortest median of these implementations in a case, in milliseconds."""
    return case["results"][fastest(case, labels)]["median_ms"]


def speed(case: dict, label: str, peers: tuple[str, ...] = TWO_PASS) -> Estimate:
    """The time of the fastest of these peers over an implementation's: above 1 it is faster."""
    peers = [n for n in peers if n in case["results"]]
    names = list(dict.fromkeys((*peers, label)))  # a peer over itself is 1

    def ratio(*ms):
        found = dict(zip(names, ms, strict=True))
        return np.minimum.reduce([found[n] for n in peers]) / found[label]

    return estimate(*(case["results"][n]["all_ms"] for n in names), of=ratio)


def timed(labels: tuple[str, ...], cases: list[dict]) -> list[str]:
    """Those of these implementations that every case has."""
    return [n for n in labels if all(n in c["results"] for c in cases)]


def steady(result: dict) -> bool:
    """Whether the slowest tenth of the samples lies within a quarter of the median."""
    return result["p90_ms"] < 1.25 * result["median_ms"]


def one_sample():
    """A drawing: how one time is taken, Python's line above, the GPU's below."""
    fig, ax = new_figure(7.6, 2.7)
    python = (
        (0.0, 0.9, "fill\nL2", "neutral"), (1.0, 0.9, "sleep", "neutral"),
        (2.0, 0.9, "start", "reference"), (3.0, 2.0, "call", "out"),
        (5.1, 0.9, "stop", "reference"),
    )  # fmt: skip
    gpu = (
        (0.6, 2.4, "fill L2", "neutral"), (3.0, 4.2, "wait", "idle"),
        (7.35, 4.0, "kernel", "out"),
    )  # fmt: skip
    colours = PALETTE | {"idle": "#E9ECEF"}
    for y, boxes in ((2.0, python), (0.3, gpu)):
        for x, width, label, colour in boxes:
            ax.add_patch(Rectangle((x, y), width, 0.95, fc=colours[colour], ec="white"))
            ink = "#444444" if colour == "idle" else "white"
            ax.text(x + width / 2, y + 0.47, label, color=ink, ha="center", va="center",
                    fontsize=8.5)  # fmt: skip
    for x in (7.28, 11.42):
        ax.plot([x, x], [0.2, 1.45], color=PALETTE["reference"], lw=2)
    arrow(ax, (7.32, 1.62), (11.4, 1.62))
    arrow(ax, (11.4, 1.62), (7.32, 1.62))
    ax.text(9.35, 1.72, "the time that counts", ha="center", va="bottom")
    ax.plot([6.1, 6.1], [0.2, 2.95], ls=":", lw=1.2, color="#777777")
    ax.text(6.25, 2.47, "from here on all is queued; Python is out of the game",
            fontsize=9, va="center", color="#555555")  # fmt: skip
    for y, label in ((2.47, "Python"), (0.77, "GPU")):
        ax.text(-0.2, y, label, ha="right", va="center", fontweight="bold")
    ax.set(xlim=(-1.4, 12.6), ylim=(0, 3.1))
    ax.axis("off")
    return fig


def samples_in_turn(name: str, case_name: str, labels: tuple[str, ...]):
    """Every stored time of some implementations, in the order they were taken."""
    fig, ax = new_figure(7.2, 3.3)
    for label in labels:
        times = [
            1e3 * t for t in records.case(name, case_name)["results"][label]["all_ms"]
        ]
        order = range(1, len(times) + 1)
        ax.plot(order, times, ls="", ms=4, **look(label))
        ax.axhline(statistics.median(times), color=IMPLEMENTATIONS[label].colour, lw=1)
    ax.set_xticks(range(0, len(times) + 1, 10))
    ax.set(
        xlabel="sample, ten a round", ylabel="GPU time (µs)", xlim=(0, len(times) + 1)
    )
    ax.legend(fontsize=9, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return fig


def speeds_by_length(name: str):
    """Speed relative to the strongest two passes over N, both axes logarithmic."""
    fig, ax = new_figure(7.4, 4.2)
    cases = records.record(name)["cases"]
    for label in MARKERS:
        found = [c for c in cases if label in c["results"]]
        if not found:
            continue
        speeds = [speed(c, label) for c in found]
        points(ax, [c["N"] for c in found], speeds, ms=5, fmt="-", **look(label))
    ax.axhline(1, color="#444444", lw=1)
    log_tokens(ax, [c["N"] for c in cases])
    ax.set_yscale("log")
    ticks = (0.05, 0.1, 0.2, 0.5, 1, 1.5)
    ax.set_yticks(ticks, [f"{t:g}" for t in ticks])
    ax.minorticks_off()
    ax.set_ylabel("speed relative to the\nstrongest two passes")
    ax.legend(fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return fig


def where_the_speed_is_from(steps: dict[str, tuple[str, str]]):
    """From the N×N baseline to the fused kernel: each step's factor, on a log scale.

    steps: {what: (slow, fast)}, implementations of the record `seed`, or "strongest".
    """
    cases = records.record("seed")["cases"]
    fig, ax = new_figure(7.6, 0.55 * len(cases) + 1.3)
    shown = [named(cases[-1], fast) for _, fast in steps.values()]
    colours = [IMPLEMENTATIONS[label].colour for label in shown]
    for row, case in enumerate(cases):
        start = 0.0
        for step, colour in zip(steps.values(), colours, strict=True):
            slow, fast = (strongest(case, (named(case, label),)) for label in step)
            factor = slow / fast
            width = math.log2(factor)
            ax.barh(row, width, left=start, height=0.62, color=colour, ec="white")
            if width > 0.25:
                ax.text(start + width / 2, row, f"{factor:.2f}×", ha="center", va="center",
                        color="white", fontsize=8.5, fontweight="bold")  # fmt: skip
            start += width
        ax.text(start + 0.06, row, f"{2**start:.1f}×", va="center", fontweight="bold")
    ax.set_yticks(range(len(cases)), [f"N = {c['N']}" for c in cases])
    ax.invert_yaxis()
    powers = range(6)
    ax.set_xticks(powers, [f"{2**p}×" for p in powers])
    ax.set_xlabel("speed relative to the N×N baseline (logarithmic)")
    ax.grid(axis="y", visible=False)
    handles = [Rectangle((0, 0), 1, 1, fc=colour) for colour in colours]
    ax.legend(handles, steps, fontsize=8.5, ncols=2, loc="lower center",
              bbox_to_anchor=(0.45, 1.0))  # fmt: skip
    return fig


def scaling():
    """Time over N² and peak memory against N, one sequence of 12 heads (record `scaling`)."""
    fig, (left, right) = new_figure(7.8, 3.9, ncols=2)
    cases = records.record("scaling")["cases"]
    memory = records.record("scaling")["provenance"]["memory_mib"] * 2**20
    for label in ("naive", *TWO_PASS, "fused", "sage"):
        found = [c for c in cases if label in c["results"]]
        if not found:
            continue
        tokens = [c["N"] for c in found]
        pairs = [1e9 * strongest(c, (label,)) / (c["H"] * c["N"] ** 2) for c in found]
        left.plot(tokens, pairs, ms=4, **look(label))
        peaks = [c["peak_bytes"][label] for c in found]
        right.plot(tokens, peaks, ms=4, **look(label))
    right.axhline(memory, color=PALETTE["reference"], ls="--", lw=1)
    right.text(
        cases[0]["N"], memory * 0.8, "all memory of the GPU", va="top", fontsize=9
    )
    last = [c for c in cases if "naive" in c["results"]][-1]
    beyond = 2 * last["N"], 4 * last["peak_bytes"]["naive"]
    colour = IMPLEMENTATIONS["naive"].colour
    right.plot(*beyond, "x", ms=9, mew=2, color=colour)
    right.annotate("does not fit", beyond, xytext=(7, 0), textcoords="offset points",
                   va="center", fontsize=9, color=colour)  # fmt: skip
    for ax in (left, right):
        log_tokens(ax, [c["N"] for c in cases])
        ax.set_yscale("log")
        ax.tick_params(axis="x", labelsize=7.5)
        ax.set_title(card("scaling"), fontsize=9.5)
    left.set_ylabel("time a score (ps): time / (heads · N²)")
    sizes = {1e6: "1 MB", 1e8: "100 MB", 1e10: "10 GB"}
    right.set_yticks(list(sizes), list(sizes.values()))
    right.minorticks_off()
    right.set_ylabel("peak memory above the inputs")
    left.legend(fontsize=8)
    return fig


def batches_and_heads():
    """Left: time a sample over the batch size. Right: rates at three head sizes.

    A time whose slowest tenth of samples is far off (Python, not the GPU) is left out.
    """
    fig, (left, right) = new_figure(7.8, 3.5, ncols=2)
    labels = (*TWO_PASS, *OURS)
    cases = records.record("batch")["cases"]
    for label in timed(labels, cases):
        found = [c for c in cases if steady(c["results"][label])]
        times = [1e3 * strongest(c, (label,)) / c["B"] for c in found]
        left.plot([c["B"] for c in found], times, ms=4, **look(label))
    left.set_xscale("log", base=2)
    left.set_xticks([c["B"] for c in cases], [str(c["B"]) for c in cases])
    left.minorticks_off()
    left.set(xlabel="batch size B (N = {N}, {H} heads of {D})".format(**cases[0]),
             ylabel="time a sample (µs)", ylim=(0, None), title=card("batch"))  # fmt: skip
    cases = records.record("dims")["cases"]
    for label in timed(labels, cases):
        rates = [_tflop_s(c, label) for c in cases]
        right.plot([c["D"] for c in cases], rates, ms=5, **look(label))
    right.set_xticks([c["D"] for c in cases])
    right.set(xlabel="head size D (N = {N}, B = {B})".format(**cases[0]),
              ylabel="TFLOP/s, skip included", ylim=(0, None), title=card("dims"))  # fmt: skip
    right.legend(fontsize=8, loc="lower right")
    return fig


def speed_rows(rows: dict[str, dict], labels: tuple[str, ...]):
    """One row a case (title: case), a mark for each implementation's relative speed."""
    fig, ax = new_figure(7.6, 0.42 * len(rows) + 1.5)
    for y, case in enumerate(rows.values()):
        found = {n: speed(case, n) for n in labels if n in case["results"]}
        ends = min(found.values()).value, max(found.values()).value
        ax.plot(ends, [y, y], lw=4, color="#E2E5E8", zorder=1)
        for label, value in found.items():
            shown = look(label) | {"label": None, "ms": 6, "fmt": ""}
            points(ax, [value], [y], across=True, **shown)
    ax.axvline(1, color="#444444", lw=1)
    for label in labels:
        ax.plot([], [], ls="", **look(label))
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlabel("speed relative to the strongest two passes of the same run")
    ax.grid(axis="y", visible=False)
    ax.legend(fontsize=8.5, ncols=3, loc="lower center", bbox_to_anchor=(0.4, 1.0))
    return fig


def _tflop_s(case: dict, label: str) -> float:
    flop = 4 * case["B"] * case["H"] * case["N"] ** 2 * case["D"]
    return flop / strongest(case, (label,)) / 1e9


def log_tokens(ax, tokens):
    ax.set_xscale("log", base=2)
    shown = [f"{n // 1024}k" if n >= 1024 else str(n) for n in tokens]
    ax.set_xticks(tokens, shown)
    ax.minorticks_off()
    ax.set_xlabel("sequence length N")


def roofline(panels: dict[str, dict], bandwidth: float, roofs: dict[str, float]):
    """FLOP/s against FLOP/byte, both logarithmic, one panel a head size.

    panels: {title: {"points": {label: [(FLOP/byte, TFLOP/s), ...]}, "exp2": TFLOP/s}}, the
    last being what the exponentials allow. bandwidth in bytes/s; roofs: {name: TFLOP/s}.
    """
    fig, axes = new_figure(7.8, 4.2, ncols=len(panels), sharey=True)
    most = 5e4  # FLOP a byte
    intensity = np.geomspace(5, most, 200)
    for ax, (title, panel) in zip(np.atleast_1d(axes), panels.items(), strict=True):
        top = max(roofs.values())
        ax.plot(intensity, np.minimum(intensity * bandwidth / 1e12, top),
                color=PALETTE["reference"], lw=1.4)  # fmt: skip
        for name, roof in roofs.items():
            start = roof * 1e12 / bandwidth
            ax.plot([start, most], [roof, roof], color=PALETTE["reference"], lw=1.4)
            ax.text(0.95 * most, roof * 1.04, name, ha="right", va="bottom", fontsize=8)
        ax.axhline(panel["exp2"], color=PALETTE["f"], ls="--", lw=1.4)
        ax.text(5.5, panel["exp2"] * 1.04, "exp2", color=PALETTE["f"], va="bottom",
                fontsize=8.5)  # fmt: skip
        for label, places in panel["points"].items():
            ax.plot(*zip(*places, strict=True), lw=1, ms=4.5, **look(label))
        ax.set(xscale="log", yscale="log", xlim=(5, most), ylim=(20, top * 1.7))
        ax.set(title=title, xlabel="FLOP / byte of HBM (by the ledger)")
    axes = np.atleast_1d(axes)
    axes[0].set_ylabel("TFLOP/s (products only)")
    axes[0].legend(fontsize=8, loc="lower right")
    return fig


def layer_times(name: str = "B1_N256"):
    """GPU time and time a call of whole layers and blocks, eager and as CUDA graphs."""
    fig, ax = new_figure(6.4, 3.8)
    gpu, wall = (records.case("layers", n) for n in (name, f"{name}_wall"))
    labels = list(gpu["results"])
    for y, label in enumerate(labels):
        ours = "fused" in label and "pytorch" not in label
        colour = IMPLEMENTATIONS["fused" if ours else "flash"].colour
        inside, seen = (1e3 * strongest(c, (label,)) for c in (gpu, wall))
        ax.barh(y, inside, height=0.62, color=colour)
        ax.plot([seen, seen], [y - 0.4, y + 0.4], color=PALETTE["reference"], lw=2.5)
    ax.set_yticks(range(len(labels)), [n.replace("_", " ") for n in labels])
    ax.set(xlim=(0, None), ylim=(len(labels) - 0.5, -0.5), xlabel="µs")
    ax.grid(axis="y", visible=False)
    mark, bar = ax.lines[0], Rectangle((0, 0), 1, 1, fc=PALETTE["neutral"])
    ax.legend([bar, mark], ["GPU time", "time a call, as the program sees it"],
              fontsize=8.5, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)  # fmt: skip
    return fig


def who_wins(series: dict[str, list[dict]]):
    """A map: rows are series of cases, columns lengths; each cell our best against theirs.

    The number is the strongest two-pass time over our best; colour and name say who is ahead,
    or that 1 lies in its 95 % interval.
    """
    columns = sorted({c["N"] for cases in series.values() for c in cases})
    columns = list(dict.fromkeys(map(_short, columns)))  # 32 760 and 32 768 are one
    fig, ax = new_figure(7.8, 0.62 * len(series) + 1.1)
    for y, cases in enumerate(series.values()):
        for case in cases:
            ours, theirs = fastest(case, OURS), fastest(case, TWO_PASS)
            found = speed(case, ours)
            winner = ours if found.value >= 1 else theirs
            name = "level" if 1 in found else SHORT[winner]
            strength = min(1.0, 0.3 + 1.6 * abs(math.log2(found.value)))
            x = columns.index(_short(case["N"]))
            box = (x - 0.48, y - 0.46), 0.96, 0.92
            colour = IMPLEMENTATIONS[winner].colour
            ax.add_patch(Rectangle(*box, fc=colour, alpha=strength))
            ax.text(x, y, f"{found.value:.2f}\n{name}", ha="center", va="center",
                    fontsize=8, color="white" if strength > 0.6 else "black")  # fmt: skip
    ax.set_xticks(range(len(columns)), columns, fontsize=8)
    ax.set_yticks(range(len(series)), list(series))
    ax.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(series) - 0.5, -0.5))
    ax.set_xlabel("sequence length N")
    ax.grid(False)
    return fig


def my_gpu(
    path: Path | str, labels: tuple[str, ...] = ("flash_compiled", "fa4_compiled", *OURS)
):  # fmt: skip
    """The reader's record of a suite over length beside the stored one of the same name.

    path: what `benchmarks suites --out` wrote. Without that file, the stored record of
    `seed` alone; beside a record of one's own shape (`--shape`), the same.
    """
    path = Path(path)
    mine = json.loads(path.read_text()) if path.exists() else None
    known = mine is not None and mine["name"] in records.names()
    stored = records.record(mine["name"] if known else "seed")
    shown = [stored, mine] if mine else [stored]
    fig, axes = new_figure(3.9 * len(shown) + 2.9, 3.6, ncols=len(shown), sharey=True)
    for ax, record in zip(np.atleast_1d(axes), shown, strict=True):
        for label in labels:
            cases = [c for c in record["cases"]
                     if label in c["results"] and "cudnn_compiled" in c["results"]]  # fmt: skip
            if not cases:  # FlashAttention-4 may not be installed
                continue
            base = [strongest(c, ("cudnn_compiled",)) for c in cases]
            speeds = [
                b / strongest(c, (label,)) for b, c in zip(base, cases, strict=True)
            ]
            ax.plot([c["N"] for c in cases], speeds, ms=5, **look(label))
        ax.axhline(1, color=IMPLEMENTATIONS["cudnn_compiled"].colour, lw=2)
        log_tokens(ax, [c["N"] for c in record["cases"]])
        owner = "yours" if record is mine else "stored"
        ax.set_title(f"{owner}: {record['provenance']['device']}", fontsize=9.5)
    axes = np.atleast_1d(axes)
    axes[0].set_ylabel("speed relative to\ncuDNN SDPA + compiled skip")
    axes[-1].legend(fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return fig


def _short(tokens: int) -> str:
    """256, 1k for 1024, 32k for 32 760 too, 75.6k for 75 600."""
    if tokens < 1024:
        return str(tokens)
    binary = tokens / 1024
    near = abs(binary - round(binary)) < 0.05
    return f"{round(binary)}k" if near else f"{tokens / 1000:.1f}k"
