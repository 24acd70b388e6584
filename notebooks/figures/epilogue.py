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
    "triton_skip": "triton",
    "fused": "triton",
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
    fig, placeholder = new_figure(7.6, 6.4)
    placeholder.remove()
    above, below = fig.subfigures(2, 1)
    _draw_dataflow(*above.subplots(1, 2))
    _draw_seed_times(below.subplots())
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
    """cuDNN + compiled skip over fused, per shape: above 1 the fused kernel is faster."""
    fig, ax = new_figure(7.0, 3.4)
    for dim, colour in ((64, "fused"), (128, "triton")):
        cases = [c for c in records.record("attention")["cases"] if c["D"] == dim]
        tokens = [c["N"] for c in cases]
        ratios = [
            records.estimate("attention", c["name"], "cudnn_compiled", "fused")
            for c in cases
        ]
        points(ax, tokens, ratios, color=PALETTE[colour], fmt="o-")
        ax.annotate(f"D = {dim}", (tokens[0], ratios[0].value), xytext=(-6, -18),
                    textcoords="offset points", color=PALETTE[colour])  # fmt: skip
    ax.axhline(1, color="#444444", linewidth=1)
    ax.text(27000, 1.006, "above: fused is faster", fontsize=9, va="bottom", ha="right")
    ax.set_xscale("log", base=2)
    ticks = [1024, 2048, 4096, 8192, 16384, 32768]
    ax.set(
        xticks=ticks, xticklabels=map(str, ticks), ylim=(0.9, 1.2), xlim=(850, 50000)
    )
    ax.set_xlabel("sequence length N")
    ax.set_ylabel("speed relative to cuDNN SDPA\n+ compiled skip")
    return fig


def _box(ax, x, y, width, text, colour, height=1.6):
    style = "round,pad=0.02,rounding_size=0.2"
    ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, color=colour))
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", color="white",
            fontweight="bold")  # fmt: skip
