"""Chapter 11: E4M3's numbers, the weights' range, what the accumulator drops, the budget."""

import numpy as np
from matplotlib.patches import Rectangle

from notebooks.figures.style import PALETTE, new_figure

P = PALETTE
NORMAL, SUBNORMAL, ZERO = P["qkv"], "#E69F00", "#D5D8DC"
E4M3_MAX = 448.0
WINDOW = 14  # bits the accumulator keeps: the leading one and 13 more


def e4m3_grid():
    """E4M3's positive values, and the largest relative rounding error between them."""
    subnormals = np.arange(1, 8) * 2.0**-9
    normals = np.concatenate(
        [np.arange(8, 16) / 8 * 2.0**e for e in range(-6, 9)]
    )[:-1]  # the last code is NaN  # fmt: skip
    fig, (top, bottom) = new_figure(
        7.2, 4.3, nrows=2, sharex=True, gridspec_kw={"height_ratios": (1, 2.6)}
    )
    top.vlines(normals, 0, 1, color=NORMAL, lw=1)
    top.vlines(subnormals, 0, 1, color=SUBNORMAL, lw=1.4)
    top.text(2.0**-9, 1.12, "7 subnormal", color="#B8860B", fontsize=9, weight="bold")
    top.text(2.0, 1.12, "119 normal: 8 in each octave", color=P["out"], fontsize=9,
             weight="bold", ha="center")  # fmt: skip
    top.text(448, 1.12, "448", fontsize=9, weight="bold", ha="center")
    top.set(ylim=(0, 1.5), yticks=[])
    top.spines["left"].set_visible(False)
    top.set_title("the positive values")

    x = np.exp2(np.linspace(-9.5, np.log2(E4M3_MAX), 6000))
    values = np.concatenate([[0.0], subnormals, normals])
    at = np.clip(np.searchsorted(values, x, side="right"), 1, len(values) - 1)
    gap = values[at] - values[at - 1]
    bottom.plot(x, 100 * gap / 2 / x, color=P["out"], lw=1.6)
    bottom.plot(x, 100 * E4M3_MAX / 127 / 2 / x, color=P["f"], lw=1.6)
    bottom.text(2.0**-5.4, 8.2, "E4M3", color=P["out"], weight="bold")
    bottom.text(4.2, 60, "INT8, largest = 448", color=P["f"], weight="bold")
    bottom.set(xscale="log", yscale="log", ylim=(0.25, 130), xlim=(2.0**-9.6, 560))
    bottom.set_xticks(
        [2.0**e for e in range(-9, 9, 3)], [f"$2^{{{e}}}$" for e in range(-9, 9, 3)]
    )
    bottom.set_yticks([1, 10, 100], ["1 %", "10 %", "100 %"])
    bottom.minorticks_off()
    bottom.set(xlabel="|x|, after scaling", ylabel="largest relative error")
    return fig


def weight_range(log2_weights, shares):
    """How the weights are spread, and which of them E4M3 keeps, as they are and times 256.

    log2_weights: name -> log2 of weights relative to their row's largest.
    shares: name -> {1: (subnormal, zero), 256: (subnormal, zero)}.
    """
    fig, (ax, strips) = new_figure(
        7.2, 4.2, nrows=2, sharex=True, gridspec_kw={"height_ratios": (2.4, 1)}
    )
    colours = {"Gaussian": P["out"], "video-like": P["f"]}
    bins = np.arange(-25, 0.01, 0.25)
    for name, weights in log2_weights.items():
        share, _ = np.histogram(weights, bins)
        ax.stairs(100 * share / len(weights), bins, color=colours[name], lw=2)
        peak = int(share.argmax())
        top = 100 * share[peak] / len(weights)
        left, up = (0.8, 0.0) if name == "Gaussian" else (2.5, 0.25)
        ax.text(bins[peak] - left, top + up, name, color=colours[name], weight="bold",
                ha="right", va="top" if name == "Gaussian" else "bottom")  # fmt: skip
    ax.set(ylabel="% of weights in ¼ octave", ylim=(0, None))
    ax.tick_params(labelbottom=True)

    for row, (label, lift) in enumerate([("as it is", 0), ("times 256", 8)]):
        y = 1.4 * (1 - row)
        ends = [0, -6 - lift, -10 - lift, -25]
        for name, colour, high, low in zip(
            ("normal", "subnormal", "zero"), (NORMAL, SUBNORMAL, ZERO), ends, ends[1:],
            strict=False,
        ):  # fmt: skip
            strips.add_patch(
                Rectangle((low, y - 0.36), high - low, 0.72, fc=colour, ec="white")
            )
            strips.text((high + low) / 2, y, name, ha="center", va="center", fontsize=9)
        text = "; ".join(
            f"{name} {100 * both[2**lift][0]:.0f} % + {100 * both[2**lift][1]:.0f} %"
            for name, both in shares.items()
        )
        strips.text(
            -24.9, y - 0.64, f"subnormal + zero: {text}", fontsize=8, va="center"
        )
        strips.text(-25.3, y, label, ha="right", va="center", fontsize=9, weight="bold")
    strips.set(ylim=(-0.95, 1.85), xlim=(-25, 0), yticks=[])
    strips.set_xlabel("log2 of the weight, relative to the largest of its row")
    strips.spines["left"].set_visible(False)
    strips.grid(False)
    return fig


def dropped_bits(rows):
    """Which bits of a product reach the sum. rows: (sum so far, product), both positive."""
    fig, ax = new_figure(7.2, 0.98 * len(rows) + 0.75)
    left, right = 17, -3  # exponents of the first and last column
    for i, (total, product) in enumerate(rows):
        y = -2.6 * i
        lead = int(np.floor(np.log2(total)))
        unit = lead - WINDOW + 1
        added = np.floor(product / 2.0**unit) * 2.0**unit
        for label, value, dy in (("sum", total, 1.0), ("product", product, 0.0)):
            ax.text(-0.4, y + dy + 0.4, f"{label} {value:g}", ha="right", va="center",
                    fontsize=9)  # fmt: skip
            for exponent in range(left, right - 1, -1):
                bit = int(value / 2.0**exponent) & 1
                if exponent > np.floor(np.log2(value)) or (
                    label == "sum" and exponent < unit
                ):
                    continue
                if label == "product" and exponent < min(unit, -2) and not bit:
                    continue
                kept = exponent >= unit
                colour = (P["x"] if label == "sum" else P["qkv"]) if kept else "#F6C7B6"
                ax.add_patch(
                    Rectangle((left - exponent, y + dy), 0.92, 0.8, fc=colour, ec="none",
                              alpha=0.55 if kept and not bit else 1.0)
                )  # fmt: skip
                ax.text(left - exponent + 0.46, y + dy + 0.4, str(bit), ha="center",
                        va="center", fontsize=8.5)  # fmt: skip
        edge = left - unit + 0.96
        ax.plot([edge, edge], [y - 0.12, y + 1.92], color=P["f"], lw=2)
        ax.text(left - right + 1.5, y + 0.4, f"adds {added:g}", va="center",
                weight="bold", color=P["f"])  # fmt: skip
    ax.text(0, 2.15, "14 bits, from the sum's leading one; what is right of the line is cut",
            fontsize=9, color=P["f"])  # fmt: skip
    ax.set(xlim=(-4.6, left - right + 4.8), ylim=(-2.6 * (len(rows) - 1) - 0.3, 2.75))
    ax.axis("off")
    return fig


def long_sum(tokens, errors):
    """Relative error of a sum of N terms of one sign. errors: label -> one number an N."""
    looks = {
        "short accumulator": (P["f"], "o", 2, (10, -6), "left"),
        "two levels": (P["out"], "D", -1, (0, 8), "right"),
        "float16 over 64 keys": ("#CC79A7", "s", -1, (0, -14), "right"),
    }
    fig, ax = new_figure(7.0, 3.7)
    ax.axhline(0.0265, color=P["neutral"], lw=1, ls="--")
    ax.text(tokens[0], 0.031, "one rounding to E4M3", fontsize=8.5, color="#5F6368")
    for label, (colour, marker, at, shift, side) in looks.items():
        ax.plot(tokens, errors[label], color=colour, marker=marker, ms=5)
        ax.annotate(
            label, (tokens[at], errors[label][at]), xytext=shift, color=colour,
            textcoords="offset points", weight="bold", ha=side,
        )  # fmt: skip
    ax.set(xscale="log", yscale="log", ylim=(1e-6, 2))
    ax.set(xlabel="terms N", ylabel="relative error of the sum")
    some = tokens[::2]
    ax.set_xticks(some, [f"{n}" if n < 1024 else f"{n // 1024}k" for n in some])
    ax.minorticks_off()
    return fig


def error_budget(budgets):
    """Each rounding's own error, their root sum of squares, and all together, in percent.

    budgets: distribution -> {step: relative L2 error}, the last two being "predicted" and
    "together".
    """
    fig, axes = new_figure(7.2, 3.5, ncols=len(budgets), sharey=True)
    for ax, (name, steps) in zip(axes, budgets.items(), strict=True):
        for i, (label, error) in enumerate(steps.items()):
            total = label in ("predicted", "together")
            y, value = -i - 0.3 * total, 100 * error
            look = {"color": P["out"]}
            if label == "predicted":
                look = {"color": "white", "ec": P["reference"], "ls": "--", "lw": 1.2}
            elif label == "together":
                look = {"color": P["reference"]}
            ax.barh(y, value, height=0.66, **look)
            ax.text(value + 0.06, y, f"{value:.2f}", va="center", fontsize=9)
        places = [-i - 0.3 * (i >= len(steps) - 2) for i in range(len(steps))]
        ax.set_yticks(places, list(steps))
        ax.set(xlabel="relative L2 error, %", xlim=(0, 4.6))
        ax.set_title(name)
        ax.grid(axis="y", visible=False)
    return fig
