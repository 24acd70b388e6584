"""Chapter 4: programs over a vector, programs over [B, N, C], and the copy ceiling."""

from matplotlib.patches import Rectangle

from notebooks.figures.style import PALETTE, new_figure

PROGRAMS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7")  # neighbours differ


def programs_1d(n: int = 10, block: int = 4):
    """The elements of a vector, coloured by the program that owns them."""
    fig, ax = new_figure(7.0, 1.75)
    programs = -(-n // block)
    for i in range(programs * block):
        inside = i < n
        colour = PROGRAMS[i // block % 4] if inside else "white"
        hatch = None if inside else "///"
        ax.add_patch(
            Rectangle((i, 0), 0.94, 0.9, fc=colour, ec=PALETTE["neutral"], hatch=hatch)
        )
        ink = "black" if inside else PALETTE["neutral"]
        ax.text(
            i + 0.47, 0.45, str(i), ha="center", va="center", color=ink,
            bbox={"fc": colour, "ec": "none", "pad": 1.5},
        )  # fmt: skip
    for pid in range(programs):
        middle = (pid + 0.5) * block - 0.03
        ax.plot(
            [pid * block, (pid + 1) * block - 0.06], [1.12] * 2, color="black", lw=1
        )
        ax.text(middle, 1.25, f"program {pid}", ha="center", va="bottom")
    over = (n + programs * block) / 2 - 0.03
    ax.text(over, -0.2, "masked off", ha="center", va="top")
    ax.text(n / 2, -0.2, f"the vector: {n} elements in memory", ha="center", va="top")
    ax.set(xlim=(-0.1, programs * block), ylim=(-0.75, 1.85))
    ax.axis("off")
    return fig


def programs_3d(batch=2, rows=3, cols=5, block_r=2, block_c=4):
    """[B, N, C] as one sheet a sample; each cell shows its offset in memory."""
    fig, axes = new_figure(7.2, 3.3, ncols=batch)
    row_tiles, col_tiles = -(-rows // block_r), -(-cols // block_c)
    for b, ax in enumerate(axes):
        for r in range(row_tiles * block_r):
            for c in range(col_tiles * block_c):
                _cell(ax, b, r, c, rows, cols, block_r, block_c, row_tiles, col_tiles)
        for i in range(row_tiles):
            for j in range(col_tiles):
                _tile(ax, (b * row_tiles + i) * col_tiles + j, i, j, block_r, block_c)
        ax.text(0, -1.05, f"sample b = {b}", weight="bold", va="center")
        ax.text(
            col_tiles * block_c, -1.05, f"c_skip[{b}], c_out[{b}]",
            va="center", ha="right", family="monospace",
        )  # fmt: skip
        ax.text(cols / 2, -0.3, f"C = {cols} channels", ha="center", va="center")
        ax.text(
            -0.25, rows / 2, f"N = {rows} tokens", rotation=90, ha="center", va="center"
        )
        ax.set(xlim=(-0.6, col_tiles * block_c + 0.1), aspect="equal")
        ax.set_ylim(row_tiles * block_r + 0.1, -1.4)
        ax.axis("off")
    return fig


def _cell(ax, b, r, c, rows, cols, block_r, block_c, row_tiles, col_tiles):
    inside = r < rows and c < cols
    colour = PROGRAMS[(r // block_r * col_tiles + c // block_c) % 4]
    ax.add_patch(
        Rectangle(
            (c, r), 1, 1, fc=colour if inside else "white", alpha=0.55 if inside else 1,
            ec="white" if inside else "#D5D8DC", hatch=None if inside else "///", lw=1,
        )
    )  # fmt: skip
    if inside:
        offset = (b * rows + r) * cols + c
        ax.text(c + 0.5, r + 0.36, str(offset), ha="center", va="center", fontsize=9)


def _tile(ax, pid, i, j, block_r, block_c):
    left, top = j * block_c, i * block_r
    ax.add_patch(
        Rectangle((left, top), block_c, block_r, fill=False, ec="black", lw=1.6)
    )
    ax.text(
        left + block_c - 0.08, top + block_r - 0.1, f"program {pid}", ha="right",
        va="bottom", fontsize=7.5, weight="bold",
    )  # fmt: skip


def copy_ceiling(tokens, shares):
    """Share of the copy ceiling against N: copy, eager, compiled, triton -> % a case."""
    fig, ax = new_figure(7.0, 3.6)
    looks = {
        "copy": (PALETTE["neutral"], "^", "a copy of that size"),
        "eager": (PALETTE["baseline"], "o", "eager PyTorch"),
        "compiled": (PALETTE["compiled"], "s", "torch.compile"),
        "triton": (PALETTE["triton"], "D", "rcm_skip (Triton)"),
    }
    ends = _spread([shares[name][-1] for name in looks], 7.0)
    for (name, (colour, marker, label)), end in zip(looks.items(), ends, strict=True):
        ax.plot(tokens, shares[name], color=colour, marker=marker, ms=6)
        ax.text(tokens[-1] * 1.13, end, label, color=colour, va="center", weight="bold")
    for level, text, x, ha in (
        (100, "a large copy", tokens[0], "left"),
        (300 / 7, "3 of 7 tensors", tokens[-1], "right"),
    ):
        ax.plot(
            tokens, [level] * len(tokens), color=PALETTE["reference"], lw=1, ls="--"
        )
        ax.text(x, level + 1.5, text, fontsize=8.5, va="bottom", ha=ha)
    top = max(122, 6 + max(max(s) for s in shares.values()))
    ax.set(xscale="log", ylim=(0, top), xlim=(tokens[0] * 0.85, tokens[-1] * 4.4))
    ax.set_xticks(tokens, [f"{n}" for n in tokens])
    ax.minorticks_off()
    ax.set_xlabel("tokens N (B = 4, C = 768, bfloat16)")
    ax.set_ylabel("share of the copy ceiling (%)")
    return fig


def _spread(values, gap):
    """The values, moved apart to at least `gap`, order kept: places for labels."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    places = list(values)
    for low, high in zip(order, order[1:], strict=False):
        places[high] = max(places[high], places[low] + gap)
    return places
