"""Chapter 9: a tile of a matrix product, the 1/K law, a Wan block's residuals, block times."""

from matplotlib.patches import FancyBboxPatch, Rectangle

from notebooks.figures.style import PALETTE, arrow, new_figure, points
from notebooks.measurements import records
from rcmlib.measure.implementations import IMPLEMENTATIONS

FUSED = IMPLEMENTATIONS["fused"].colour
BLOCKS = {  # a Wan block by its attention: (title, whose colour it has)
    "flash": ("flash SDPA", "flash"),
    "flash_compiled": ("flash SDPA, compiled", "flash_compiled"),
    "cudnn": ("cuDNN SDPA", "cudnn"),
    "cudnn_compiled": ("cuDNN SDPA, compiled", "cudnn_compiled"),
    "fused": ("fused", "fused"),
    "fused_compiled": ("fused, compiled", "fused"),
}


def birth_of_a_tile(products):
    """The K loop of one tile of out, and what the epilogue's tensors weigh beside it.

    products: {K: the product's time, in units of the time to move one tensor of out}.
    """
    fig, (left, right) = new_figure(
        7.8, 3.7, ncols=2, gridspec_kw={"width_ratios": [1.0, 1.1]}
    )
    _draw_product(left)
    for y, product in enumerate(products.values()):
        parts = (product + 3, 2)  # a, x and out move in any case, F in two kernels only
        start, total = 0.0, sum(parts)
        for part, colour in zip(parts, ("neutral", "f"), strict=True):
            width = 100 * part / total
            right.barh(y, width, left=start, height=0.55, color=PALETTE[colour])
            start += width
        right.text(100 + 1.5, y, f"{100 * parts[1] / total:.0f} %", va="center",
                   color=PALETTE["f"], weight="bold")  # fmt: skip
    right.set(yticks=range(len(products)), yticklabels=[f"K = {k}" for k in products])
    right.set(xlim=(0, 114), ylim=(len(products) - 0.5, -0.6))
    right.set_xlabel("share of the time of product and skip (%)")
    right.text(2, 0, "product, a, x, out", va="center", color="white", weight="bold")
    right.set_title("F's write and read, by the model", pad=8)
    right.grid(axis="y", visible=False)
    return fig


def _draw_product(ax):
    ax.set(xlim=(-2.6, 10.2), ylim=(-1.3, 9.4), aspect="equal", title="One tile of out")
    ax.axis("off")
    depth, rows, cols, steps = 4.4, 4.4, 4.4, 4
    for x, y, width, height in (
        (0, 0, depth, rows),
        (5.0, 5.0, cols, depth),
        (5.0, 0, cols, rows),
    ):
        ax.add_patch(Rectangle((x, y), width, height, fc="#F3F3F3", ec="#888888"))
    step = depth / steps
    for i in range(steps):
        look = {
            "fc": PALETTE["qkv"],
            "ec": "white",
            "alpha": 1 - 0.18 * (steps - 1 - i),
        }
        ax.add_patch(Rectangle((i * step, 1.7), step, 1.1, **look))
        ax.add_patch(Rectangle((6.9, 5.0 + depth - (i + 1) * step), 1.1, step, **look))
    ax.add_patch(Rectangle((6.9, 1.7), 1.1, 1.1, fc=PALETTE["out"], ec="white"))
    ax.text(2.2, 4.6, "a  [N, K]", ha="center", va="bottom")
    ax.text(7.2, 9.5, "Wᵀ  [K, C]", ha="center", va="bottom")
    ax.text(5.15, 4.2, "out  [N, C]", ha="left", va="top")
    arrow(ax, (0.1, 1.35), (4.3, 1.35), PALETTE["qkv"])
    ax.text(2.2, 1.15, "the K loop", ha="center", va="top", color="#2C7FB8")
    arrow(ax, (6.6, 9.3), (6.6, 5.1), PALETTE["qkv"])
    ax.add_patch(Rectangle((8.6, 0.25), 0.7, 0.7, fc=PALETTE["x"], ec="white"))
    arrow(ax, (8.65, 0.95), (8.05, 1.65), PALETTE["x"])
    ax.text(4.9, -0.25, "x: its tile is read once, after the loop", color=PALETTE["x"],
            ha="center", va="top")  # fmt: skip


def projection_gain(law):
    """Measured gains over cuBLAS and a compiled skip, over K = C: ours, addmm_, with a gate.

    law(k, c, slower): the predicted gain in percent if the product is `slower` times slower.
    """
    fig, ax = new_figure(7.0, 3.7)
    depths = [2 ** (8 + i / 8) for i in range(43)]
    for slower, style, label in (
        (0.0, "--", "predicted: product like cuBLAS's"),
        (0.05, "-.", "product 5 % slower"),
        (0.1, ":", "product 10 % slower"),
    ):
        gains = [law(k, k, slower) for k in depths]
        ax.plot(depths, gains, style, color=PALETTE["reference"], lw=1.3, label=label)
    for two, one, shift, look in (
        ("linear_compiled", "addmm", 1.0,
         {"fmt": "s", "color": "black", "label": "addmm_ over x, one pair of coefficients"}),
        ("linear_compiled", "fused", 1.0, {"color": FUSED, "label": "rcm_projection"}),
        ("gated_compiled", "gated_fused", 1.04,
         {"color": FUSED, "mfc": "white", "label": "gated_projection"}),
    ):  # fmt: skip
        cases = [
            c for c in records.record("projection")["cases"] if one in c["results"]
        ]
        gains = [
            records.estimate("projection", c["name"], two, one,
                             of=lambda two, one: 100 * (two / one - 1))
            for c in cases
        ]  # fmt: skip
        points(ax, [c["K"] * shift for c in cases], gains, **look)
    ax.axhline(0, color="#888888", linewidth=0.8)
    ax.set_xscale("log", base=2)
    ticks = [256, 512, 768, 1536, 3072, 5120, 10240]
    ax.set(xticks=ticks, xticklabels=map(str, ticks), xlim=(240, 11500), ylim=(-12, 52))
    ax.set_xlabel("width K = C")
    ax.set_ylabel("gain over cuBLAS\n+ compiled skip (%)")
    ax.legend()
    return fig


def wan_block_places():
    """Where a skip is added: around the network (1), twice in each block (2), here (3)."""
    fig, ax = new_figure(7.8, 4.3)
    ax.set(xlim=(-0.3, 16.9), ylim=(-1.1, 8.2))
    ax.axis("off")
    _network(ax, 6.2)
    _block(ax, 2.2)
    return fig


def _network(ax, y):
    ax.text(
        -0.2, y + 1.6, "1  the whole network: rCM's skip, once a step", weight="bold"
    )
    _line(ax, (0.45, y), (12.9, y))
    for x, label in ((2.2, "block 1"), (4.7, "block 2"), (8.3, "block 30")):
        _box(ax, x, y, 2.0, label)
    ax.text(7.2, y + 0.1, "…", ha="center", va="bottom")
    ax.text(10.8, y + 0.12, "F", color=PALETTE["f"], weight="bold")
    _scale(ax, 11.7, y, "× c_out", PALETTE["f"])
    ax.plot(
        [1.2, 1.2, 13.2, 13.2], [y, y + 1.15, y + 1.15, y + 0.3], color=PALETTE["x"]
    )
    _scale(ax, 7.2, y + 1.15, "× c_skip", PALETTE["x"])
    _adder(ax, 13.2, y)
    arrow(ax, (13.5, y), (14.5, y))
    ax.text(0.1, y, "$x_t$", ha="center", va="center")
    ax.text(14.6, y, "$x_0$", ha="left", va="center")


def _block(ax, y):
    ax.text(-0.2, y + 1.9, "2  inside every block: gated residuals", weight="bold")
    ax.plot([0.3, 15.9], [y - 2.2, y - 2.2], color=PALETTE["x"])
    ax.text(-0.2, y - 2.2, "x", color=PALETTE["x"], weight="bold", va="center")
    first = (
        ("norm,\nmodulate", 1.75),
        ("q, k, v", 1.3),
        ("attention", 1.75),
        ("o", 0.6),
    )
    second = (("norm,\nmodulate", 1.75), ("ffn.0,\nGELU", 1.2), ("ffn.2", 1.0))
    _branch(ax, 0.55, y, first, framed=True)
    ax.add_patch(_frame(8.65, y - 2.75, 1.35, 1.3, "#BBBBBB", ls=":"))
    ax.text(9.32, y - 1.55, "text\nattention", ha="center", va="top", color="#777777",
            fontsize=8)  # fmt: skip
    _branch(ax, 10.3, y, second)
    ax.text(15.45, y - 2.95, "left to cuBLAS", ha="center", va="center", fontsize=9,
            color="#777777")  # fmt: skip
    arrow(ax, (15.8, y - 2.2), (16.7, y - 2.2), PALETTE["x"])
    ax.plot([0.72, 0.72, 6.48, 6.48], [y, y + 1.1, y + 1.1, y], color="#777777", ls=":",
            lw=1.4)  # fmt: skip
    ax.text(6.7, y + 1.1, "3  this book's study, in no Wan block", fontsize=9, va="center",
            color="#555555")  # fmt: skip
    ax.text(0.1, y - 2.95, "dashed: one kernel, rcmlib.gated_projection", fontsize=9,
            color=FUSED, va="center")  # fmt: skip


def _branch(ax, x, y, boxes, framed=False):
    """A branch off the stream at x, its boxes, its sum; a frame around the last box and it."""
    ax.plot([x, x], [y - 2.2, y], color="#444444", lw=1.4)
    for index, (label, width) in enumerate(boxes):
        _line(ax, (x, y), (x + 0.35, y))
        _box(ax, x + 0.35, y, width, label)
        if framed and index == len(boxes) - 1:
            ax.add_patch(_frame(x + 0.15, y - 2.75, width + 1.15, 3.35, FUSED))
        x += 0.35 + width
    end = x + 0.4
    ax.plot([x, end, end], [y, y, y - 1.9], color="#444444", lw=1.4)
    _scale(ax, end - 0.2, y - 1.1, "× gate", PALETTE["f"])
    _adder(ax, end, y - 2.2)


def _line(ax, start, stop):
    ax.plot(*zip(start, stop, strict=True), color="#444444", lw=1.4, zorder=0)


def _box(ax, x, y, width, label):
    style = "round,pad=0,rounding_size=0.12"
    fill = PALETTE["qkv"] if label == "attention" else "#E8F0F7"
    patch = FancyBboxPatch(
        (x, y - 0.4), width, 0.8, style, fc=fill, ec="#444444", lw=1.2
    )
    ax.add_patch(patch)
    ax.text(x + width / 2, y, label, ha="center", va="center", fontsize=8.5)


def _frame(x, y, width, height, colour, ls="--"):
    style = "round,pad=0,rounding_size=0.12"
    look = {"fc": "none", "ec": colour, "lw": 1.5, "ls": ls}
    return FancyBboxPatch((x, y), width, height, style, **look)


def _scale(ax, x, y, label, colour):
    ax.text(x, y, label, ha="center", va="center", color=colour, fontsize=9,
            bbox={"fc": "white", "ec": "none", "pad": 1.5})  # fmt: skip


def _adder(ax, x, y):
    ax.text(x, y, "+", ha="center", va="center", fontsize=11,
            bbox={"boxstyle": "circle,pad=0.12", "fc": "white", "ec": "black"})  # fmt: skip


def block_times():
    """Bars: a Wan block's forward at two lengths, six implementations each."""
    fig, axes = new_figure(7.8, 3.1, ncols=2, sharey=True)
    names = list(BLOCKS)[::-1]
    for ax, name in zip(axes, ("wan_short", "wan_long"), strict=True):
        case = records.case("blocks", name)
        times = [case["results"][n]["median_ms"] for n in names]
        for y, (block, ms) in enumerate(zip(names, times, strict=True)):
            colour = IMPLEMENTATIONS[BLOCKS[block][1]].colour
            alpha = 1.0 if block.endswith("compiled") else 0.55
            ax.barh(y, ms, color=colour, alpha=alpha, height=0.65)
            ax.text(ms * 1.02, y, f"{ms:.2f}" if ms < 10 else f"{ms:.1f}", va="center")
        ax.set(xlim=(0, max(times) * 1.2), xlabel="GPU time of one block, forward (ms)")
        ax.set_title(f"N = {case['N']}")
        ax.grid(axis="y", visible=False)
    axes[0].set(yticks=range(len(names)), yticklabels=[BLOCKS[n][0] for n in names])
    return fig
