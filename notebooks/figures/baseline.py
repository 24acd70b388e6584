"""Chapter 2: a photograph as tokens, bytes as boxes, samples and medians, the skip's share."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from notebooks.figures.style import PALETTE, new_figure, points
from rcmlib.measure.ledger import Pass, tensors, total

TENSOR_COLOURS = {
    **dict.fromkeys("qkv", PALETTE["qkv"]),
    "x": PALETTE["x"],
    "F": PALETTE["f"],
    "out": PALETTE["out"],
}


def photo_to_tokens(photo, corners, size, patch=16, chosen=(4, 4)) -> Figure:
    """The photograph with its windows, the first window as patches, one patch enlarged.

    photo [H, W, 3]; corners: (top, left) of each window; size (height, width); chosen: the
    (row, column) of the patch that is shown enlarged.
    """
    fig, axes = new_figure(7.0, 3.0, ncols=3, width_ratios=(1.15, 1, 0.9))
    (height, width), (top, left) = size, corners[0]
    frame = photo[top : top + height, left : left + width]
    row, col = (patch * i for i in chosen)
    titles = ("the photograph", "frame 1 as patches", "one patch = one token")
    pictures = (photo, frame, frame[row : row + patch, col : col + patch])
    for ax, title, picture in zip(axes, titles, pictures, strict=True):
        ax.imshow(picture)
        ax.set_title(title, fontsize=10, fontweight="bold", loc="left")
        ax.set_axis_off()
    for i, (y, x) in enumerate(corners):
        shade = 0.35 + 0.65 * (i + 1) / len(corners)
        box = Rectangle(
            (x, y), width, height, fill=False, lw=2, ec="white", alpha=shade
        )
        axes[0].add_patch(box)
    axes[1].hlines(
        np.arange(patch, height, patch) - 0.5, -0.5, width - 0.5, "w", lw=0.7
    )
    axes[1].vlines(
        np.arange(patch, width, patch) - 0.5, -0.5, height - 0.5, "w", lw=0.7
    )
    axes[1].add_patch(
        Rectangle((col - 0.5, row - 0.5), patch, patch, fill=False, lw=2.5, ec="yellow")
    )
    for y, note in (
        (-0.04, f"{patch}×{patch} pixels × 3 colours"),
        (-0.15, f"= {3 * patch * patch} channels"),
    ):
        axes[2].text(0.5, y, note, transform=axes[2].transAxes, ha="center", va="top")
    return fig


def noise_levels(rows: dict[str, list], levels, c_skip, c_out) -> Figure:
    """One column a noise level, one row a stage: lists of [H, W, 3] pictures."""
    size = {"nrows": len(rows), "ncols": len(levels)}
    fig, axes = new_figure(7.0, 0.7 + 1.65 * len(rows), **size)
    fig.set_dpi(95)  # noise does not compress: every dot counts in the notebook's size
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        for ax, picture in zip(line, pictures, strict=True):
            ax.imshow(picture)
            ax.set_xticks([])
            ax.set_yticks([])
            ax.grid(False)
            ax.spines[:].set_visible(False)
        line[0].set_ylabel(name, fontsize=11)
    for i, t in enumerate(levels):
        axes[0, i].set_title(f"t = {t:g}", fontsize=11, fontweight="bold", loc="center")
        label = f"c_skip = {c_skip[i]:.3g}\nc_out = {c_out[i]:.3g}"
        axes[-1, i].set_xlabel(label, fontsize=9)
    return fig


def ledger_boxes(pipelines: dict[str, list[Pass]]) -> Figure:
    """Every tensor that crosses HBM as one box, pass by pass; one row a pipeline.

    All tensors of these ledgers have one size, so a row's length is its bytes.
    """
    fig, ax = new_figure(7.0, 0.45 + 1.12 * len(pipelines))
    ax.set_axis_off()
    gap, widest = 0.45, 0.0
    for i, (title, passes) in enumerate(pipelines.items()):
        base, left = -2.3 * i, 0.0
        for step in passes:
            start = left
            boxes = [(n, False) for n in step.reads] + [(n, True) for n in step.writes]
            for name, written in boxes:
                _box(ax, left, base, name, written)
                left += 1.0
            ax.plot([start + 0.05, left - 0.05], [base - 0.14] * 2, c="0.45", lw=1)
            middle = (start + left) / 2
            ax.text(middle, base - 0.22, step.name, ha="center", va="top", fontsize=9)
            left += gap
        widest = max(widest, left)
        summary = f"{tensors(passes)} tensors, {total(passes) / 1e6:.1f} MB"
        ax.text(0, base + 0.93, title, fontweight="bold", va="bottom")
        ax.text(left - gap + 0.25, base + 0.4, summary, va="center")
    key = 1.22
    for x, written, name in (
        (5.6, False, "read from HBM"),
        (8.9, True, "written to HBM"),
    ):
        _box(ax, x, key, "", written, 0.45)
        ax.text(x + 0.78, key + 0.2, name, va="center", fontsize=9)
    ax.set_xlim(-0.1, max(widest + 2.6, 13.4))
    ax.set_ylim(-2.3 * (len(pipelines) - 1) - 0.85, 1.75)
    return fig


def _box(ax, x, y, name, written, size=0.8) -> None:
    colour = TENSOR_COLOURS.get(name, PALETTE["neutral"])
    width = size + 0.1
    ax.add_patch(
        Rectangle(
            (x + 0.05, y), width, size, fc=colour if written else colour + "38",
            ec=colour, lw=1.5,
        )
    )  # fmt: skip
    ax.text(
        x + 0.05 + width / 2, y + size / 2, name, ha="center", va="center",
        color="white" if written and name in ("F", "out") else "black",
    )  # fmt: skip


def samples_and_medians(samples, medians) -> Figure:
    """Above every sample with p10-p90 as a bar, below the medians of the draws.

    samples, medians: {"compiled", "copy"} → microseconds.
    """
    fig, (above, below) = new_figure(7.0, 3.6, nrows=2, sharex=True)
    colours = {"copy": PALETTE["reference"], "compiled": PALETTE["compiled"]}
    bins = np.histogram_bin_edges(np.concatenate([*medians.values()]), 50)
    for y, (name, us) in enumerate(samples.items()):
        look = {"color": colours[name]}
        places = y + 0.3 * np.sin(
            12.9898 * np.arange(len(us))
        )  # so that dots lie apart
        above.plot(us, places, "o", ms=3.5, alpha=0.6, **look)
        above.hlines(y - 0.5, *np.quantile(us, (0.1, 0.9)), lw=3, **look)
        below.hist(medians[name], bins, alpha=0.7, **look)
    above.set_yticks((0, 1), list(samples))
    above.set(ylim=(-0.75, 1.5), title="60 samples each, and p10–p90 as a bar")
    below.set(title="medians of 2000 draws of 60", xlabel="µs", yticks=[])
    for ax in (above, below):
        ax.grid(axis="y", visible=False)
    return fig


def skip_share(tokens, predicted, measured=None, wall=None) -> Figure:
    """Times of attention and of the skip against N, and the skip's share of the sum.

    predicted: {"attention", "eager", "compiled"} → milliseconds at `tokens`. measured: (N,
    times, shares), the latter two by the same names, lists of estimates in µs and in %.
    wall: N below which attention is limited by bytes.
    """
    fig, (left, right) = new_figure(7.0, 3.6, ncols=2)
    names = {
        "attention": "attention",
        "eager": "eager skip",
        "compiled": "compiled skip",
    }
    colours = dict(
        zip(
            names,
            (PALETTE["reference"], PALETTE["baseline"], PALETTE["compiled"]),
            strict=True,
        )
    )
    tokens, end = np.asarray(tokens, dtype=float), tokens[-1]
    for name, label in names.items():
        ms = np.asarray(predicted[name])
        left.plot(tokens, 1e3 * ms, "--", c=colours[name])
        left.text(
            end * 1.12,
            1e3 * ms[-1],
            label,
            fontsize=8,
            va="center",
            c=colours[name],
        )
        if name != "attention":
            share = 100 * ms / (ms + np.asarray(predicted["attention"]))
            right.plot(tokens, share, "--", c=colours[name])
            right.text(end * 1.12, share[-1], name, va="center", c=colours[name])
        if measured:
            n, times, shares = measured
            points(left, n, times[name], c=colours[name], ms=5)
            if name != "attention":
                points(right, n, shares[name], c=colours[name], ms=5)
    if wall:
        left.axvline(wall, c=PALETTE["neutral"], lw=1)
        left.text(
            wall * 1.08, 0.97, "attention: matrix\nunits limit →", fontsize=8,
            color="0.35", va="top", transform=left.get_xaxis_transform(),
        )  # fmt: skip
    for ax in (left, right):
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xlim(tokens[0], end * 3.4)
        ticks = [
            n
            for n in (256, 512, 1024, 2048, 4096, 8192, 16384)
            if tokens[0] <= n <= end
        ]
        ax.set_xticks(ticks, [str(n) for n in ticks], rotation=45)
        ax.minorticks_off()
        ax.set_xlabel("tokens N")
    left.set_title("time (µs)", fontsize=10, loc="left")
    right.set_title("the skip's share of the time (%)", fontsize=10, loc="left")
    right.set_yticks((1, 2, 5, 10, 20, 50), ("1", "2", "5", "10", "20", "50"))
    right.minorticks_off()
    style = "dashes: predicted" + (", dots: measured, 95 %" if measured else "")
    right.text(0.97, 0.97, style, transform=right.transAxes, fontsize=8, color="0.35",
               ha="right", va="top")  # fmt: skip
    return fig
