"""Chapter 6: where F lives, what the fused kernel costs, and the 1/N law."""

from matplotlib.patches import FancyBboxPatch

from notebooks.figures.style import PALETTE, arrow, new_figure, points
from notebooks.measurements import records
from rcmlib.measure.implementations import IMPLEMENTATIONS

ATTENTION_OF = {  # each implementation: its attention without the skip
    "flash_eager": "flash",
    "flash_compiled": "flash",
    "cudnn_eager": "cudnn",
    "cudnn_compiled": "cudnn",
    "fa4_compiled": "fa4",
    "triton_skip": "triton",
    "fused": "triton",
}

# The landing page: shapes, those of rCM and Wan (D = 128) first, and who is timed there.
HEADLINE = ("D128_N2048", "D128_N8192", "D128_N32768", "seed", "N8192")
RIVALS = ("cudnn_compiled", "fa4_compiled", "triton_skip", "fused")

LENGTHS = {  # by head dimension, shapes of growing length
    64: ("N1024", "seed", "N4096", "N8192"),
    128: ("D128_N2048", "D128_N8192", "D128_N32768"),
}


def dataflow():
    """Two panels: F crosses HBM twice in two passes, and never in one."""
    fig, axes = new_figure(7.4, 3.5, ncols=2)
    _draw_dataflow(*axes)
    return fig


def seed_times():
    """Bars: each pipeline's time at the seed's row, attention and what the skip adds."""
    fig, ax = new_figure(7.4, 3.2)
    _draw_seed_times(ax)
    return fig


def headline():
    """The idea above, the result below: the picture of the landing page and the README."""
    fig, placeholder = new_figure(7.6, 6.6)
    placeholder.remove()
    above, below = fig.subfigures(2, 1, height_ratios=(0.85, 1))
    _draw_dataflow(*above.subplots(1, 2))
    _draw_rates(below.subplots())
    return fig


def _draw_dataflow(left, right):
    titles = ("Two passes: F goes out and back", "Fused: F stays in registers")
    for ax, title in zip((left, right), titles, strict=True):
        ax.set(xlim=(0, 10), ylim=(0, 7), title=title)
        ax.axis("off")
        ax.axhspan(0, 2.1, color="#F3F3F3")
        ax.text(0.15, 0.15, "HBM", color="#555555", fontsize=9)
        ax.text(0.15, 6.5, "on the chip", color="#555555", fontsize=9)
    _box(left, 0.3, 4.2, 4.2, "attention", PALETTE["triton"])
    _box(left, 5.6, 4.2, 4.1, "skip", PALETTE["neutral"])
    _box(right, 1.4, 4.2, 7.2, "attention → skip", PALETTE["fused"])
    for ax, name, x, colour, direction in (
        (left, "q k v", 0.95, "qkv", "up"),
        (left, "F", 4.6, "f", ""),
        (left, "x", 6.6, "x", "up"),
        (left, "out", 8.8, "out", "down"),
        (right, "q k v", 2.2, "qkv", "up"),
        (right, "x", 5.0, "x", "up"),
        (right, "out", 7.8, "out", "down"),
    ):
        _box(ax, x - 0.75, 0.7, 1.5, name, PALETTE[colour], height=1.0)
        if direction:
            ends = [(x, 1.8), (x, 4.1)]
            arrow(
                ax, *(ends if direction == "up" else ends[::-1]), PALETTE[colour], lw=2
            )
    arrow(left, (3.4, 4.1), (4.3, 1.8), PALETTE["f"], lw=2)
    arrow(left, (5.0, 1.8), (6.0, 4.1), PALETTE["f"], lw=2)


def _draw_seed_times(ax):
    case = records.case("attention", "seed")
    device = records.record("attention")["provenance"]["device"]
    results = case["results"]
    names = list(ATTENTION_OF)[::-1]
    for y, name in enumerate(names):
        full = results[name]["median_ms"]
        attention = min(results[ATTENTION_OF[name]]["median_ms"], full)
        ax.barh(y, attention, color=PALETTE["neutral"], height=0.62)
        colour = PALETTE["fused"] if name == "fused" else PALETTE["f"]
        ax.barh(y, full - attention, left=attention, color=colour, height=0.62)
        ax.text(full + 0.002, y, f"{full:.3f} ms", va="center")
    ax.set(
        yticks=range(len(names)), yticklabels=[IMPLEMENTATIONS[n].title for n in names]
    )
    ax.set_xlabel(
        "GPU time (ms): attention alone in grey, what the skip adds in colour"
    )
    ax.set_xlim(0, max(r["median_ms"] for r in results.values()) * 1.18)
    ax.set_title("B = {B}, N = {N}, {H} heads of {D}, bf16, {0}".format(device, **case))
    ax.grid(axis="y", visible=False)


def _draw_rates(ax):
    """What stands first in the README: the strongest two passes beside ours, in TFLOP/s."""
    cases = [records.case("attention", name) for name in HEADLINE]
    device = records.record("attention")["provenance"]["device"]
    for i, label in enumerate(RIVALS):
        row, shift = IMPLEMENTATIONS[label], 0.21 * (i - (len(RIVALS) - 1) / 2)
        rates = [records.tflop_s("attention", name, label) for name in HEADLINE]
        places = [group + shift for group in range(len(cases))]
        bars = ax.bar(places, rates, width=0.19, color=row.colour, label=row.title)
        weight = "bold" if label == "fused" else "normal"
        ax.bar_label(bars, fmt="%.0f", fontsize=8, padding=1, fontweight=weight)
    shapes = ["{B}, {H}, {N}\nheads of {D}".format(**case) for case in cases]
    ax.set_xticks(range(len(cases)), shapes)
    ax.set_xlabel("B, heads, tokens")
    ax.set(ylabel="TFLOP/s, skip included", ylim=(0, 1000))
    ax.set_title(f"Attention with the skip, higher is faster; bf16, {device}")
    ax.grid(axis="x", visible=False)
    ax.legend(fontsize=8.5, ncols=2, loc="upper center")


def one_over_n(law, asymptote):
    """Measured gain of fusing over N with two predictions, functions of N in percent."""
    fig, ax = new_figure(7.0, 3.6)
    cases = records.record("one_over_n")["cases"]
    tokens = [c["N"] for c in cases]
    gains = [
        records.estimate("one_over_n", c["name"], "triton_skip", "fused",
                         of=lambda two, one: 100 * (two / one - 1))
        for c in cases
    ]  # fmt: skip
    points(ax, tokens, gains, color=PALETTE["fused"], label="measured, 95 %")
    ax.plot(tokens, [law(n) for n in tokens], "--", color=PALETTE["reference"],
            linewidth=1.4, label="predicted: bytes, then products")  # fmt: skip
    ax.plot(tokens, [asymptote(n) for n in tokens], ":", color=PALETTE["f"], linewidth=1.6,
            label="its long-sequence limit, ∝ 1/N")  # fmt: skip
    ax.axhline(0, color="#888888", linewidth=0.8)
    ax.set_xscale("log", base=2)
    ax.set(xticks=tokens, xticklabels=[f"{n}" for n in tokens], ylim=(-6, 45))
    total = f"{cases[0]['B'] * tokens[0]:,}".replace(",", " ")
    ax.set_xlabel(f"sequence length N ({total} tokens in all)")
    ax.set_ylabel("two-pass time over fused, − 1 (%)")
    ax.legend()
    return fig


def against_cudnn():
    """Two passes over fused, per shape: those of the strongest peers, and our own."""
    fig, axes = new_figure(7.4, 3.7, ncols=2, sharey=True)
    for ax, (dim, names) in zip(axes, LENGTHS.items(), strict=True):
        tokens = [records.case("attention", name)["N"] for name in names]
        for label in RIVALS[:-1]:
            row = IMPLEMENTATIONS[label]
            pairs = [("attention", name, label, "fused") for name in names]
            ratios = [records.estimate(*pair) for pair in pairs]
            points(ax, tokens, ratios, color=row.colour, fmt="o-", label=row.title)
        ax.axhline(1, color="#444444", linewidth=1)
        ax.set_xscale("log", base=2)
        ax.set(xticks=tokens, xticklabels=map(str, tokens), title=f"heads of {dim}")
        ax.margins(x=0.12)
        ax.set_xlabel("sequence length N")
    axes[0].set_ylabel("how much faster fused is")
    axes[0].set_ylim(0.95, 1.6)
    axes[0].text(8192, 0.965, "below 1: fused is slower", fontsize=9, ha="right")
    axes[1].legend(fontsize=8.5, loc="upper right")
    return fig


def _box(ax, x, y, width, text, colour, height=1.6):
    style = "round,pad=0.02,rounding_size=0.2"
    ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, color=colour))
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", color="white",
            fontweight="bold")  # fmt: skip
