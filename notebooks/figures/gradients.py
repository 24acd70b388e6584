"""Chapter 8: what a wrong F does to δ and dq, the two walks, two loss curves, the record."""

from matplotlib.patches import Rectangle

from notebooks.figures.style import PALETTE, arrow, new_figure, points
from notebooks.measurements import records
from rcmlib.measure.implementations import IMPLEMENTATIONS

CHOICES = {
    "recover": (PALETTE["f"], "recover F from out"),
    "save": (PALETTE["fused"], "save F in bfloat16"),
    "recompute": (PALETTE["x"], "compute F again"),
}


def lost_delta(times, errors):
    """The relative error of δ and of dq over the noise level t, for three sources of F.

    errors: {"recover", "save", "recompute": [(error of δ, error of dq), one a time]}.
    """
    fig, axes = new_figure(7.4, 3.5, ncols=2, sharey=True)
    for column, (ax, name) in enumerate(zip(axes, ("δ", "dq"), strict=True)):
        for choice, (colour, _) in CHOICES.items():
            ax.loglog(times, [e[column] for e in errors[choice]], color=colour)
        ax.axhline(1, color=PALETTE["neutral"], lw=1, ls=":")
        ax.set(xlabel="noise level t", title=f"error of {name}")
    axes[0].set(ylabel="relative error", ylim=(1e-4, 6))
    axes[0].text(times[-1], 1.15, "nothing left", ha="right", va="bottom", fontsize=9)
    for choice, x, y in (
        ("recover", 4e-2, 0.3),
        ("save", 1.2e-4, 2.6e-3),
        ("recompute", 1.2e-4, 3.3e-4),
    ):
        colour, label = CHOICES[choice]
        axes[0].text(x, y, label, color=colour, weight="bold", fontsize=9)
    return fig


def two_walks(tiles=6, chosen=2):
    """Which tiles of the scores a program of either kernel visits, and what it owns."""
    fig, (left, right) = new_figure(7.4, 3.7, ncols=2)
    for ax, title in ((left, "dk, dv: walk the queries"), (right, "dq: walk the keys")):
        for i in range(tiles):
            for j in range(tiles):
                mine = (j if ax is left else i) == chosen
                look = {"fc": "#F0E442" if mine else "#F3F3F3", "ec": "white", "lw": 2}
                ax.add_patch(Rectangle((j, tiles - 1 - i), 1, 1, **look))
        ax.set(xlim=(-2.2, tiles + 2.2), ylim=(-1.7, tiles + 1.8), aspect="equal")
        ax.axis("off")
        ax.set_title(title)
        ax.text(0, tiles + 1.15, "keys →", va="center", fontsize=9)
        ax.text(
            -1.9, tiles, "queries →", rotation=270, ha="center", va="top", fontsize=9
        )
    middle, row = chosen + 0.5, tiles - chosen - 0.5
    _box(left, chosen, tiles + 0.1, 1, 0.75, "k v", "qkv")
    for i in range(tiles):
        _box(left, -1.5, tiles - 0.9 - i, 1.2, 0.8, "q g", "x")
    arrow(left, (middle, tiles - 0.1), (middle, 0.1), lw=2.2)
    _box(left, chosen - 0.25, -1.3, 1.5, 0.8, "dk dv", "out")
    arrow(left, (middle, -0.02), (middle, -0.48), PALETTE["out"], lw=2)
    left.text(chosen + 1.5, -0.9, "written once", va="center", fontsize=9)
    _box(right, -1.5, row - 0.4, 1.2, 0.8, "q g", "x")
    for j in range(tiles):
        _box(right, j + 0.08, tiles + 0.1, 0.84, 0.75, "k v", "qkv")
    arrow(right, (0.1, row), (tiles - 0.1, row), lw=2.2)
    _box(right, tiles + 0.6, row - 0.4, 1.2, 0.8, "dq", "out")
    arrow(right, (tiles + 0.02, row), (tiles + 0.58, row), PALETTE["out"], lw=2)
    right.text(tiles + 1.2, row - 1.05, "written\nonce", ha="center", va="center",
               fontsize=9)  # fmt: skip
    return fig


def loss_curves(baseline, fused):
    """Two runs of one training: the loss of each step, one curve on top of the other."""
    fig, ax = new_figure(7.0, 3.2)
    ax.plot(baseline, color=PALETTE["baseline"], lw=6, alpha=0.6)
    ax.plot(fused, color=PALETTE["fused"], lw=1.6)
    top = max(baseline)
    ax.text(len(baseline) * 0.32, top, "wide: SDPA, then the skip",
            color=PALETTE["baseline"], weight="bold")  # fmt: skip
    ax.text(len(baseline) * 0.32, top - 0.12 * (top - min(baseline)),
            "thin: the fused kernel", color=PALETTE["fused"], weight="bold")  # fmt: skip
    ax.set(xlabel="step", ylabel="weighted loss")
    return fig


def training_ratios():
    """Forward and backward: each two-pass pipeline's time over the fused kernels'."""
    fig, ax = new_figure(7.2, 3.5)
    cases = records.record("gradients")["cases"]
    sides = {  # how a name is aligned to its first dot, and by how much it is moved
        "flash_eager": ("left", 0),
        "flash_compiled": ("right", 0),
        "cudnn_compiled": ("left", -0.1),
        "fa4_compiled": ("right", 0),
    }
    for name, (side, shift) in sides.items():
        peer = IMPLEMENTATIONS[name]
        pairs = [(c["name"], name, "fused") for c in cases]
        ratios = [records.estimate("gradients", *pair) for pair in pairs]
        points(ax, ratios, range(len(cases)), color=peer.colour, ms=6, across=True)
        ax.text(ratios[0].value + shift, -0.4, peer.title.replace(", ", ",\n"),
                color=peer.colour, ha=side, va="bottom", fontsize=8.5,
                weight="bold")  # fmt: skip
    ax.axvline(1, color="#444444", lw=1)
    ax.text(1.005, len(cases) - 0.45, "right: fused is faster", fontsize=9, va="center")
    ax.set(yticks=range(len(cases)), ylim=(len(cases) - 0.2, -1.2))
    ax.margins(x=0.3)
    ax.spines["left"].set_visible(False)  # labels may stand there
    ax.tick_params(axis="y", length=0)
    ax.set_yticklabels(["N = {N}, D = {D}".format(**c) for c in cases])
    ax.set_xlabel("time of forward and backward, over the fused kernels' time")
    ax.grid(axis="y", visible=False)
    return fig


def _box(ax, x, y, width, height, text, colour):
    ax.add_patch(Rectangle((x, y), width, height, fc=PALETTE[colour], ec="none"))
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", color="white",
            fontsize=8, weight="bold")  # fmt: skip
