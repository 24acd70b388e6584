"""Chapter 12: who holds which score, what takes turns, and where 8 bits win."""

from matplotlib.patches import Rectangle

from notebooks.figures.style import new_figure, points
from notebooks.measurements import records
from rcmlib.measure.implementations import IMPLEMENTATIONS

THREADS = (
    "#56B4E9",
    "#E69F00",
    "#009E73",
    "#CC79A7",
)  # a quad: four threads share a row
TENSOR, EXP, IDLE = "#0072B2", "#E69F00", "#E9ECEF"
# SageAttention2's CUDA kernel over cuDNN, both without a skip, on another H100.
SAGE2_GIVEN = (1.15, 1.25, 1.28, 1.36, 1.40)


def who_holds_what(order: list[int]):
    """16 scores of a row, coloured by the thread that holds them, and V in two orders."""
    fig, ax = new_figure(7.6, 3.5)
    held = [token // 2 % 4 for token in range(16)]
    wanted = [position // 4 for position in range(16)]
    rows = (
        (6.3, "after q kᵀ", "a thread holds the scores of keys", range(16), held),
        (4.5, "for p v", "a thread must hold four neighbours", range(16), wanted),
        (2.15, "V's tokens reordered", "position by position, this key", order,
         [held[token] for token in order]),
    )  # fmt: skip
    for y, name, what, labels, threads in rows:
        ax.text(-0.3, y + 0.64, name, ha="right", va="center", fontweight="bold")
        ax.text(-0.3, y + 0.26, what, ha="right", va="center", fontsize=8.5)
        for i, (label, thread) in enumerate(zip(labels, threads, strict=True)):
            box = Rectangle((i, y), 0.94, 0.9, fc=THREADS[thread], ec="none")
            ax.add_patch(box)
            ax.text(i + 0.47, y + 0.45, str(label), ha="center", va="center")
    moving = sum(a != b for a, b in zip(held, wanted, strict=True))
    ax.text(8, 5.83, f"✗  {moving} of 16 scores lie with the wrong thread", ha="center",
            va="center", color="#B00020")  # fmt: skip
    ax.text(8, 3.45, "✓  the colours of the row above: no score moves", ha="center",
            va="center", color="#00704F")  # fmt: skip
    for thread, colour in enumerate(THREADS):
        ax.add_patch(Rectangle((1.2 + 3.7 * thread, 0.9), 0.5, 0.5, fc=colour))
        ax.text(1.9 + 3.7 * thread, 1.15, f"thread {thread}", va="center", fontsize=9)
    ax.axhline(4.05, color="#888888", lw=0.8, ls=":")
    ax.set(xlim=(-9.2, 16.1), ylim=(0.7, 7.3))
    ax.axis("off")
    return fig


def taking_turns():
    """A drawing of one program's iterations, and of three programs on one SM."""
    fig, axes = new_figure(
        7.6, 3.1, nrows=2, gridspec_kw={"height_ratios": (1.15, 3)}, sharex=True
    )
    phases = ((2, "q kᵀ", TENSOR), (4, "softmax", EXP), (2, "p v", TENSOR))
    for ax, starts in zip(axes, ((0,), (0, 2, 6)), strict=True):
        for row, start in enumerate(starts):
            y = len(starts) - 1 - row
            x = start
            ax.add_patch(Rectangle((0, y + 0.1), 24, 0.8, fc=IDLE, ec="none"))
            while x < 24:
                for width, label, colour in phases:
                    width = min(width, 24 - x)
                    if width <= 0:
                        break
                    ax.add_patch(
                        Rectangle((x, y + 0.1), width, 0.8, fc=colour, ec="white")
                    )
                    if width >= 2:
                        ax.text(x + width / 2, y + 0.5, label, ha="center", va="center",
                                color="white", fontsize=9)  # fmt: skip
                    x += width
        ax.set(xlim=(0, 24), ylim=(-0.02, len(starts)), yticks=[], xticks=[])
        for side in ("left", "bottom"):
            ax.spines[side].set_visible(False)
        ax.grid(False)
    axes[0].set_title("One program: one unit works, the others wait", fontsize=10)
    axes[1].set_title(
        "Three on an SM: each fills the others' gaps, by chance", fontsize=10
    )
    axes[1].set_xlabel("time →   (drawn, not measured)      blue: tensor cores, orange: "
                       "exp2 and arithmetic", fontsize=9)  # fmt: skip
    return fig


def title_of(label: str) -> str:
    """An implementation in the 8-bit records, whose bf16 kernel was still chapter 6's."""
    title = IMPLEMENTATIONS[label].title
    return f"{title}\n(chapter 6)" if label == "fused" else title


def sage_speeds():
    """The 8-bit kernel and its peers over cuDNN's attention without a skip, per shape."""
    fig, ax = new_figure(7.4, 3.7)
    cases = records.record("sage")["cases"]
    for label, marker in (("sage_kernel_fp8", "o"), ("fused", "D")):
        ratios = [records.estimate("sage", c["name"], "cudnn", label) for c in cases]
        row = IMPLEMENTATIONS[label]
        look = {"fmt": marker, "ms": 6, "color": row.colour, "label": title_of(label)}
        points(ax, range(len(cases)), ratios, **look)
    order = [0, 1, 2, 3, 4]  # the record's first five shapes are those of SAGE2_GIVEN
    ax.plot(order, SAGE2_GIVEN, "_", ms=22, mew=2.5, color="black",
            label="SageAttention2's CUDA kernel, no skip\n(another H100)")  # fmt: skip
    ax.axhline(1, color="#444444", linewidth=1)
    ax.text(
        5.45, 1.012, IMPLEMENTATIONS["cudnn"].title, ha="right", va="bottom", fontsize=9
    )
    names = [f"D = {c['D']}\nN = {c['N']}" for c in cases]
    names[-1] += "\n(Wan)"
    ax.set(
        xticks=range(len(cases)), xticklabels=names, xlim=(-0.5, 5.5), ylim=(0.7, 1.72)
    )
    ax.set_ylabel("speed relative to\ncuDNN's attention alone")
    ax.legend(loc="upper left", fontsize=9)
    return fig


def sage_crossover(crossings: dict[int, float]):
    """Speed with quantisation over cuDNN + compiled skip, per head size; crossings: D to N."""
    fig, axes = new_figure(7.6, 3.5, ncols=2, sharey=True)
    for ax, (dim, crossing) in zip(axes, crossings.items(), strict=True):
        cases = [c for c in records.record("sage_crossover")["cases"] if c["D"] == dim]
        tokens = [c["N"] for c in cases]
        for label, offset in (("sage", 5), ("fused", -7)):
            ratios = [
                records.estimate("sage_crossover", c["name"], "cudnn_compiled", label)
                for c in cases
            ]
            row = IMPLEMENTATIONS[label]
            points(ax, tokens, ratios, fmt="o-", color=row.colour, ms=5)
            ax.annotate(title_of(label), (tokens[-2], ratios[-2].value), xytext=(-8, offset),
                        textcoords="offset points", ha="right", fontsize=9, color=row.colour,
                        va="bottom" if offset > 0 else "top")  # fmt: skip
        ax.axhline(1, color="#444444", lw=1)
        eight_bits = IMPLEMENTATIONS["sage"].colour
        ax.axvline(crossing, color=eight_bits, lw=1, ls=":")
        ax.annotate(f"N ≈ {round(crossing, -2):.0f}", (crossing, 0.52), xytext=(4, 0),
                    textcoords="offset points", fontsize=9, color=eight_bits)  # fmt: skip
        ax.set_xscale("log", base=2)
        ax.set(xticks=tokens, xticklabels=[f"{n}" for n in tokens], ylim=(0.5, 1.5))
        ax.tick_params(axis="x", labelsize=8)
        ax.set_title(f"D = {dim}")
        ax.set_xlabel("sequence length N")
    axes[0].set_ylabel("speed relative to cuDNN\n+ compiled skip")
    return fig
