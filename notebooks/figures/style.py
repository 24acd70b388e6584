"""One palette and one look for every figure of the book.

The same colour means the same tensor or implementation everywhere. The hues are Okabe & Ito's,
told apart by colour-blind readers; backgrounds are opaque white, so figures read in dark mode.
"""

import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch

from rcmlib.measure.implementations import IMPLEMENTATIONS

COLOUR = {label: row.colour for label, row in IMPLEMENTATIONS.items()}
PALETTE = {
    "qkv": "#56B4E9",  # tensors
    "x": "#009E73",
    "f": "#D55E00",
    "out": "#0072B2",
    "baseline": COLOUR["flash_eager"],  # implementations
    "compiled": COLOUR["flash_compiled"],
    "cudnn": COLOUR["cudnn"],
    "triton": COLOUR["triton"],
    "fused": COLOUR["fused"],
    "naive": COLOUR["naive"],
    "reference": "#000000",
    "neutral": "#9AA0A6",
}

RC = {
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
    "figure.dpi": 110,
    "savefig.dpi": 160,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "lines.linewidth": 2.0,
    "legend.frameon": False,
}


def new_figure(width: float = 7.0, height: float = 3.5, **subplots):
    """A figure of width × height inches in the book's style: (figure, axes)."""
    plt.rcParams.update(RC)  # titles and legends read it later, so no context manager
    fig, axes = plt.subplots(figsize=(width, height), layout="constrained", **subplots)
    fig.patch.set_alpha(1.0)
    return fig, axes


def points(ax, x, y, across=False, **look):
    """Values and bars over the intervals of estimates (`rcmlib.measure.records`): of those in
    y, or with across=True of those in x."""
    estimates = x if across else y
    ends = [(max(0, e.value - e.low), max(0, e.high - e.value)) for e in estimates]
    values, lengths = [e.value for e in estimates], list(zip(*ends, strict=True))
    look = {"fmt": "o", "capsize": 3} | look
    if across:
        return ax.errorbar(values, y, xerr=lengths, **look)
    return ax.errorbar(x, values, yerr=lengths, **look)


def arrow(ax, start, stop, colour="black", **look):
    """An arrow from start to stop, in data coordinates and the book's style."""
    look = {"lw": 1.4, "mutation_scale": 11, "shrinkA": 0, "shrinkB": 0} | look
    ax.add_patch(FancyArrowPatch(start, stop, arrowstyle="-|>", color=colour, **look))
