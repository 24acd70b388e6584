"""Chapter 3: kernels as boxes, what autograd keeps, and predicted against measured time."""

from matplotlib.patches import Rectangle

from notebooks.figures.style import PALETTE, new_figure

ATTENTION, SKIP = PALETTE["qkv"], "#F3D9C6"


def launches():
    """Four ways to run attention and skip; a box is a kernel, its width what it moves."""
    fig, ax = new_figure(7.6, 3.7)
    attend = ("attention", "q k v → F", 4, ATTENTION)
    rows = (
        ("three operators", attend, ("×", "x → a", 2, SKIP), ("×", "F → b", 2, SKIP),
         ("+", "a b → f", 3, SKIP)),
        ("addcmul", attend, ("×", "x → a", 2, SKIP), ("addcmul", "a F → f", 3, SKIP)),
        ("torch.compile", attend, ("one kernel", "x F → f", 3, SKIP)),
        ("our kernel", ("attention + skip", "q k v x → f", 5, PALETTE["fused"])),
    )  # fmt: skip
    for i, (name, *kernels) in enumerate(rows):
        at = 0.0
        ax.text(-0.25, i + 0.4, name, ha="right", va="center", weight="bold")
        for title, moves, width, colour in kernels:
            ax.add_patch(
                Rectangle((at + 0.04, i), width - 0.08, 0.8, fc=colour, ec="none")
            )
            ink = "white" if colour == PALETTE["fused"] else "black"
            middle = at + width / 2
            ax.text(
                middle, i + 0.26, title, ha="center", va="center", fontsize=9, color=ink
            )
            ax.text(
                middle, i + 0.57, moves, ha="center", va="center", fontsize=8, color=ink
            )
            at += width
        ax.text(at + 0.15, i + 0.4, f"{at:.0f}", va="center", weight="bold")
    ax.set(xlim=(-0.2, 11.8), ylim=(3.95, -0.15), yticks=[])
    ax.set_xlabel("full-size tensors read or written")
    ax.spines["left"].set_visible(False)
    ax.grid(False)
    return fig


def saved_bytes(lengths, naive, sdpa):
    """KiB kept for backward over the number of tokens, with N×N probabilities and without."""
    fig, ax = new_figure(6.4, 3.3)
    for kept, name, colour, offset, ha in (
        (
            naive,
            "naive: keeps N×N probabilities",
            PALETTE["baseline"],
            (-8, 12),
            "right",
        ),
        (sdpa, "SDPA: keeps none", PALETTE["out"], (-40, -28), "left"),
    ):
        ax.loglog(lengths, [b / 1024 for b in kept], "o-", color=colour, base=2)
        ax.annotate(
            name, (lengths[-2], kept[-2] / 1024), offset, textcoords="offset points",
            ha=ha, color=colour, weight="bold",
        )  # fmt: skip
    ax.set_xticks(lengths, [str(n) for n in lengths])
    ticks = [2**k for k in range(6, 15, 2)]
    ax.set_yticks(ticks, [f"{k:,}" for k in ticks])
    ax.set(xlabel="tokens N", ylabel="kept for backward (KiB)")
    ax.minorticks_off()
    return fig


def skip_cost(rows):
    """What the skip adds to attention; rows of (name, colour, predicted µs, estimate in µs)."""
    fig, ax = new_figure(7.0, 2.7)
    for i, (_, colour, predicted, measured) in enumerate(rows):
        ax.barh(i, measured.value, 0.55, color=PALETTE[colour])
        ax.hlines(i, measured.low, measured.high, color="#444444", lw=2.5)
        ax.plot([predicted] * 2, [i - 0.38, i + 0.38], color="black", lw=2.5)
        end = max(measured.high, predicted)
        ax.text(end + 0.8, i, f"{measured:.1f} µs", va="center", weight="bold")
    ax.text(
        rows[0][2] - 0.5,
        -0.46,
        "predicted from bytes",
        ha="right",
        va="bottom",
        fontsize=9,
    )
    ax.set_yticks(range(len(rows)), [name for name, *_ in rows])
    ax.set(
        xlabel="time that the skip adds to attention (µs)",
        ylim=(len(rows) - 0.5, -0.85),
    )
    ax.set_xlim(0, max(r[3].high for r in rows) * 1.3)
    ax.grid(axis="y", visible=False)
    return fig
