"""Chapter 5: the rescaling, tiles in flight, the score matrix's memory, measured rates."""

from matplotlib.patches import Rectangle

from notebooks.figures.style import COLOUR, PALETTE, arrow, new_figure

P = PALETTE


def rescaling(scores, tile, sums, kept):
    """The running maximum over the scores, and the running sum after each tile.

    scores: one row, in units of log 2. sums, kept: after each tile the sum ℓ, and the part
    of it that was carried over and rescaled.
    """
    fig, (left, right) = new_figure(
        7.2, 3.2, ncols=2, gridspec_kw={"width_ratios": (1.35, 1)}
    )
    tiles = len(scores) // tile
    left.bar(range(len(scores)), scores, color=P["qkv"], width=0.7)
    highest = None
    for j in range(tiles):
        start, stop = j * tile - 0.5, (j + 1) * tile - 0.5
        part = scores[j * tile : (j + 1) * tile]
        highest = max(part) if highest is None else max(highest, *part)
        left.plot([start + 0.06, stop - 0.06], [highest] * 2, color=P["f"], lw=2.5)
        left.text(
            (start + stop) / 2, highest + 0.12, f"m = {highest}",
            color=P["f"], ha="center", va="bottom", weight="bold",
        )  # fmt: skip
        if j:
            left.axvline(start, color=P["neutral"], lw=1, ls=":")
    left.set(ylim=(0, max(scores) + 1.0), ylabel="score s (units of log 2)")
    left.set_xticks(range(len(scores)), [f"key {i}" for i in range(len(scores))])
    left.tick_params(axis="x", labelsize=8.5)
    left.set_title("the row, tile by tile")

    for j in range(tiles):
        right.bar(j, kept[j], color=P["neutral"], width=0.6)
        right.bar(j, sums[j] - kept[j], bottom=kept[j], color=P["qkv"], width=0.6)
        right.text(j, sums[j] + 0.05, f"ℓ = {sums[j]:g}", ha="center", va="bottom")
        if kept[j] > 0.2:
            factor = kept[j] / sums[j - 1]
            right.text(
                j,
                kept[j] / 2,
                f"old × {factor:g}",
                ha="center",
                va="center",
                fontsize=8,
            )
    right.set_xticks(range(tiles), [f"after tile {j}" for j in range(tiles)])
    right.set(ylim=(0, max(sums) * 1.2), ylabel="running sum ℓ")
    right.set_title("the sum, rescaled")
    return fig


def tiles_in_flight():
    """Where each tensor lives while one program of the attention kernel runs."""
    fig, ax = new_figure(7.4, 4.0)
    for x, width, title, note in (
        (0.0, 3.3, "HBM", "whole tensors"),
        (3.7, 2.3, "shared memory", "tiles, read by all threads"),
        (6.4, 3.6, "registers", "private to the threads"),
    ):
        ax.add_patch(Rectangle((x, 0), width, 5.6, fc="#F6F7F8", ec=P["neutral"], lw=1))
        ax.text(x + width / 2, 5.95, title, ha="center", va="bottom", weight="bold")
        ax.text(x + width / 2, 5.67, note, ha="center", va="bottom", fontsize=8)

    for name, y, colour, chosen in (
        ("Q", 4.4, P["qkv"], 1), ("K", 3.05, P["qkv"], 2),
        ("V", 1.7, P["qkv"], 2), ("F", 0.3, P["f"], 1),
    ):  # fmt: skip
        ax.text(0.25, y + 0.4, name, ha="center", va="center", weight="bold")
        for i in range(5):
            _strip_tile(ax, 0.5 + 0.52 * i, y, colour, i == chosen)
    for y in (3.05, 1.7):
        arrow(ax, (1.6, y + 1.02), (3.05, y + 1.02))
        ax.text(1.52, y + 1.02, "streams", fontsize=7.5, ha="right", va="center")

    for name, y, note in (
        ("Q tile", 4.3, "stays"),
        ("K tile", 2.95, "replaced each step"),
        ("V tile", 1.6, "replaced each step"),
    ):
        _box(ax, 3.95, y, 1.8, 1.0, P["qkv"], name, note)
        arrow(ax, (3.12, y + 0.5), (3.93, y + 0.5))
    _box(ax, 6.75, 3.55, 1.35, 1.35, "#F0E442", "S, then P", "one tile only")
    _box(ax, 8.5, 3.55, 0.5, 1.35, "#FFFFFF", "m", "")
    _box(ax, 9.2, 3.55, 0.5, 1.35, "#FFFFFF", "ℓ", "")
    ax.text(9.1, 5.0, "one number a row", fontsize=7.5, ha="center")
    _box(ax, 7.6, 1.55, 2.1, 1.1, P["f"], "acc", "the sum of P V")
    arrow(ax, (5.77, 4.8), (6.73, 4.55))
    arrow(ax, (5.77, 3.45), (6.73, 3.95))
    ax.text(6.2, 4.25, "Q Kᵀ", fontsize=8.5, ha="center", va="center")
    arrow(ax, (5.77, 2.1), (7.58, 2.1))
    arrow(ax, (7.45, 3.53), (7.95, 2.67))
    ax.text(6.95, 2.75, "P V", fontsize=8.5, ha="center", va="center")
    arrow(ax, (8.75, 3.53), (8.75, 2.67))
    ax.text(8.87, 3.1, "rescale", fontsize=8.5, va="center")
    ax.plot([8.65, 8.65], [1.55, 0.7], color=P["f"], lw=1.8)
    arrow(ax, (8.66, 0.7), (3.15, 0.7), P["f"])
    ax.text(4.85, 0.42, "acc / ℓ, written once", color=P["f"], fontsize=8.5, ha="center",
            va="center", weight="bold")  # fmt: skip
    ax.set(xlim=(-0.05, 10.05), ylim=(-0.05, 6.4))
    ax.axis("off")
    return fig


def _strip_tile(ax, x, y, colour, chosen):
    ax.add_patch(
        Rectangle(
            (x, y), 0.48, 0.8, fc=colour, ec="black", alpha=1.0 if chosen else 0.25,
            lw=1.6 if chosen else 0.5,
        )
    )  # fmt: skip


def _box(ax, x, y, width, height, colour, name, note):
    ax.add_patch(Rectangle((x, y), width, height, fc=colour, ec="black", lw=1))
    shift = 0.18 if note else 0
    middle = (x + width / 2, y + height / 2)
    ax.text(middle[0], middle[1] + shift, name, ha="center", va="center", weight="bold")
    ax.text(middle[0], middle[1] - 0.24, note, ha="center", va="center", fontsize=7.5)


def score_memory(tokens, matrix_bytes, tile_bytes, memory_bytes, device_name):
    """Bytes of one layer's score matrices against N, and of one program's tile."""
    fig, ax = new_figure(7.0, 3.6)
    ax.plot(tokens, matrix_bytes, color=P["baseline"], marker="o")
    ax.plot(tokens, tile_bytes, color=P["triton"], marker="o")
    ax.plot(tokens, [memory_bytes] * len(tokens), color=P["reference"], lw=1, ls="--")
    ax.text(
        tokens[0], memory_bytes * 1.5, f"all memory of the {device_name}", fontsize=9
    )
    ax.text(
        tokens[3], matrix_bytes[3] / 9, "score matrices of 12 heads: N²",
        color=P["baseline"], weight="bold",
    )  # fmt: skip
    ax.text(
        tokens[3], tile_bytes[0] * 2.2, "score tiles in flight: constant",
        color=P["triton"], weight="bold",
    )  # fmt: skip
    ax.set(xscale="log", yscale="log", xlabel="tokens N", ylabel="bytes")
    ax.set_xticks(tokens, [f"{n // 1024}k" for n in tokens])
    powers = range(6, 13, 2)
    ax.set_yticks([10**p for p in powers], ["1 MB", "100 MB", "10 GB", "1 TB"])
    ax.set_ylim(tile_bytes[0] / 4, 3e12)
    ax.minorticks_off()
    return fig


def attention_rates(cases, rates, ceiling):
    """TFLOP/s of attention alone: one row a shape, one dot an implementation.

    cases: labels, top to bottom. rates: implementation -> one number a case.
    """
    fig, ax = new_figure(7.2, 0.46 * len(cases) + 1.3)
    looks = {
        "flash": (P["baseline"], "o", "flash SDPA"),
        "cudnn": (P["cudnn"], "s", "cuDNN SDPA"),
        "fa4": (COLOUR["fa4"], "^", "FlashAttention-4"),
        "triton": (P["triton"], "D", "rcmlib"),
    }
    rows = [len(cases) - 1 - i for i in range(len(cases))]
    for i, row in enumerate(rows):
        values = [rates[name][i] for name in looks]
        ax.plot([min(values), max(values)], [row, row], color="#D5D8DC", lw=4, zorder=1)
    for name, (colour, marker, label) in looks.items():
        ax.scatter(rates[name], rows, color=colour, marker=marker, s=52, zorder=3,
                   label=label)  # fmt: skip
    ax.axvline(ceiling, color=P["reference"], lw=1, ls="--")
    ax.text(ceiling * 0.99, -0.55, "a large matmul", fontsize=8.5, ha="right")
    ax.set_yticks(rows, cases)
    ax.set(xlim=(0, ceiling * 1.06), ylim=(-0.7, len(cases) - 0.4))
    ax.set_xlabel("TFLOP/s (4·B·H·N²·D / time)")
    ax.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return fig
