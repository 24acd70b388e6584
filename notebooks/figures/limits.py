"""Chapter 13: the roofline, the launch path, who wins where, and the reader's own GPU."""

import json
import math
from pathlib import Path

import numpy as np
from matplotlib.patches import Rectangle

from notebooks.figures.speed import LOOKS, OURS, log_tokens, strongest
from notebooks.figures.style import PALETTE, new_figure
from notebooks.measurements import records
from rcmlib.measure.tables import TWO_PASS, fastest

WINNERS = {
    "fused": ("bf16", "fused"),
    "sage": ("8 bits", "sage"),
    "flash_compiled": ("flash", "compiled"),
    "cudnn_compiled": ("cuDNN", "cudnn"),
}


def roofline(panels: dict[str, dict], bandwidth: float, roofs: dict[str, float]):
    """FLOP/s against FLOP/byte, both logarithmic, one panel a head size.

    panels: {title: {"points": {label: [(FLOP/byte, TFLOP/s), ...]}, "exp2": TFLOP/s}}, the
    last being what the exponentials allow. bandwidth in bytes/s; roofs: {name: TFLOP/s}.
    """
    fig, axes = new_figure(7.8, 4.2, ncols=len(panels), sharey=True)
    intensity = np.geomspace(5, 2e5, 200)
    for ax, (title, panel) in zip(np.atleast_1d(axes), panels.items(), strict=True):
        top = max(roofs.values())
        ax.plot(intensity, np.minimum(intensity * bandwidth / 1e12, top),
                color=PALETTE["reference"], lw=1.4)  # fmt: skip
        for name, roof in roofs.items():
            start = roof * 1e12 / bandwidth
            ax.plot([start, 2e5], [roof, roof], color=PALETTE["reference"], lw=1.4)
            ax.text(1.9e5, roof * 1.04, name, ha="right", va="bottom", fontsize=8)
        ax.axhline(panel["exp2"], color=PALETTE["f"], ls="--", lw=1.4)
        ax.text(5.5, panel["exp2"] * 1.04, "exp2", color=PALETTE["f"], va="bottom",
                fontsize=8.5)  # fmt: skip
        for label, points in panel["points"].items():
            text, colour, marker = LOOKS[label]
            ax.plot(*zip(*points, strict=True), marker, ls="-", lw=1, ms=4.5,
                    color=PALETTE[colour], label=text)  # fmt: skip
        ax.set(xscale="log", yscale="log", xlim=(5, 2e5), ylim=(3, top * 1.7))
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
        colour = PALETTE["fused" if ours else "baseline"]
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

    The number is the strongest two-pass time over our best; colour and name say who is ahead.
    """
    columns = sorted({c["N"] for cases in series.values() for c in cases})
    columns = list(dict.fromkeys(map(_short, columns)))  # 32 760 and 32 768 are one
    fig, ax = new_figure(7.8, 0.62 * len(series) + 1.1)
    for y, cases in enumerate(series.values()):
        for case in cases:
            ours, theirs = fastest(case, OURS), fastest(case, TWO_PASS)
            speed = strongest(case, (theirs,)) / strongest(case, (ours,))
            winner = ours if speed >= 1 else theirs
            strength = min(1.0, 0.3 + 1.6 * abs(math.log2(speed)))
            x = columns.index(_short(case["N"]))
            box = (x - 0.48, y - 0.46), 0.96, 0.92
            ax.add_patch(
                Rectangle(*box, fc=PALETTE[WINNERS[winner][1]], alpha=strength)
            )
            ax.text(x, y, f"{speed:.2f}\n{WINNERS[winner][0]}", ha="center", va="center",
                    fontsize=8, color="white" if strength > 0.6 else "black")  # fmt: skip
    ax.set_xticks(range(len(columns)), columns, fontsize=8)
    ax.set_yticks(range(len(series)), list(series))
    ax.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(series) - 0.5, -0.5))
    ax.set_xlabel("sequence length N")
    ax.grid(False)
    return fig


def my_gpu(path: Path | str, labels: tuple[str, ...] = ("flash_compiled", *OURS)):
    """The reader's record of a suite over length beside the stored one of the same name.

    path: what `benchmark --out` wrote. Without that file, the stored record of `seed` alone;
    beside a record of one's own shape (`--shape`), the same.
    """
    path = Path(path)
    mine = json.loads(path.read_text()) if path.exists() else None
    known = mine is not None and mine["name"] in records.names()
    stored = records.record(mine["name"] if known else "seed")
    shown = [stored, mine] if mine else [stored]
    fig, axes = new_figure(3.9 * len(shown) + 1.2, 3.6, ncols=len(shown), sharey=True)
    for ax, record in zip(np.atleast_1d(axes), shown, strict=True):
        for label in labels:
            text, colour, marker = LOOKS[label]
            cases = [c for c in record["cases"]
                     if label in c["results"] and "cudnn_compiled" in c["results"]]  # fmt: skip
            base = [strongest(c, ("cudnn_compiled",)) for c in cases]
            speeds = [
                b / strongest(c, (label,)) for b, c in zip(base, cases, strict=True)
            ]
            ax.plot([c["N"] for c in cases], speeds, f"{marker}-", ms=5, label=text,
                    color=PALETTE[colour])  # fmt: skip
        ax.axhline(1, color=PALETTE["cudnn"], lw=2)
        log_tokens(ax, [c["N"] for c in record["cases"]])
        owner = "yours" if record is mine else "stored"
        ax.set_title(f"{owner}: {record['provenance']['device']}", fontsize=9.5)
    axes = np.atleast_1d(axes)
    axes[0].set_ylabel("speed relative to\ncuDNN SDPA + compiled skip")
    axes[0].legend(fontsize=8.5)
    return fig


def _short(tokens: int) -> str:
    """256, 1k for 1024, 32k for 32 760 too, 75.6k for 75 600."""
    if tokens < 1024:
        return str(tokens)
    binary = tokens / 1024
    near = abs(binary - round(binary)) < 0.05
    return f"{round(binary)}k" if near else f"{tokens / 1000:.1f}k"
