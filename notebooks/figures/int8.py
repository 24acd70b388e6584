"""Chapter 10: who shares a scale, outlier channels, errors, and what the copies cost."""

from matplotlib.patches import Rectangle

from notebooks.figures.style import PALETTE, arrow, new_figure

P = PALETTE


def shared_scales():
    """One loud number, and the tokens whose scale it sets; what scales do to a score tile."""
    fig, axes = new_figure(
        7.6, 3.0, ncols=5, gridspec_kw={"width_ratios": (1, 1, 1, 1, 2.3)}
    )
    tokens, channels, loud = 16, 6, (9, 4)
    kinds = (("one tensor", 16), ("a block", 8), ("a group", 4), ("each token", 1))
    for ax, (name, group) in zip(axes, kinds, strict=False):
        for token in range(tokens):
            shares = token // group == loud[0] // group
            colour = P["qkv"] if shares else "#EAF4FB"
            for channel in range(channels):
                place = (channel, tokens - 1 - token)
                ax.add_patch(Rectangle(place, 1, 1, fc=colour, ec="white", lw=0.6))
        for first in range(0, tokens, group):
            edge = Rectangle((0, first), channels, group, fc="none", ec="#5B6770", lw=1)
            ax.add_patch(edge)
        place = (loud[1], tokens - 1 - loud[0])
        ax.add_patch(Rectangle(place, 1, 1, fc=P["f"], ec="white", lw=0.6))
        ax.set(xlim=(-0.1, channels + 0.1), ylim=(-2.2, tokens + 0.2))
        ax.set_title(name, loc="center", fontsize=10)
        ax.text(channels / 2, -0.5, f"{group} of {tokens}", ha="center", va="top",
                fontsize=8.5)  # fmt: skip
        ax.axis("off")
    axes[0].text(-0.6, tokens / 2, "tokens", rotation=90, ha="center", va="center",
                 fontsize=8.5)  # fmt: skip
    _score_tile(axes[4])
    return fig


def _score_tile(ax):
    """A tile of scores: q's scale is a factor a row, k's is one number or one a column."""
    rows, cols = 6, 8
    for i in range(rows):
        shade = (0.92, 0.55, 0.75, 0.4, 0.83, 0.62)[i]
        ax.add_patch(Rectangle((0, rows - 1 - i), cols, 0.92, fc="#F0E442", ec="black",
                               lw=0.6, alpha=shade))  # fmt: skip
        arrow(ax, (-0.8, rows - 0.54 - i), (-0.08, rows - 0.54 - i), lw=1)
    ax.text(
        cols / 2, rows / 2 - 0.04, r"$\hat q\,\hat k^\top$, int32", ha="center", va="center",
        bbox={"fc": "white", "ec": "none", "boxstyle": "round,pad=0.25"},
    )  # fmt: skip
    ax.text(-1.0, rows / 2, "$s_q$: one factor a row", rotation=90, ha="right", va="center",
            fontsize=8.5)  # fmt: skip
    ax.text(cols / 2, -0.45, "$s_k$: one number for the tile", ha="center", va="top",
            fontsize=8.5)  # fmt: skip
    ax.set(xlim=(-2.2, cols + 0.2), ylim=(-1.0, rows + 0.1))
    ax.set_title("in the score tile", loc="center", fontsize=10)
    ax.axis("off")


def outlier_channels(before, after, loud, channel, codes_before, codes_after):
    """k of one head before and after smoothing, and the INT8 codes of one quiet channel.

    before, after: [tokens, channels] (any array); loud: the channels to mark; codes_*: the
    codes of `channel` in one tile of keys.
    """
    fig, axes = new_figure(
        7.6, 5.2, nrows=2, ncols=2, gridspec_kw={"height_ratios": (1.5, 1)}
    )
    for ax, data, title in (
        (axes[0, 0], before, "k, as it comes"),
        (axes[0, 1], after, "k − mean over the tokens"),
    ):
        image = ax.imshow(
            data, cmap="RdBu_r", vmin=-10, vmax=10, aspect="auto",
            interpolation="nearest",
        )  # fmt: skip
        ax.scatter(
            loud, [-9] * len(loud), marker="v", s=22, color=P["f"], clip_on=False
        )
        ax.set(xlabel="channel", ylabel="token", ylim=(len(data) - 0.5, -0.5))
        title = f"{title}\nlargest: {float(abs(data).max()):.0f}"
        ax.set_title(title, fontsize=10, pad=10)
        ax.grid(visible=False)
    fig.colorbar(image, ax=axes[0], pad=0.01, aspect=18, extend="both")
    for ax, codes in ((axes[1, 0], codes_before), (axes[1, 1], codes_after)):
        codes = [int(code) for code in codes]
        found = sorted(set(codes))
        ax.bar(found, [codes.count(code) for code in found], width=0.9, color=P["qkv"])
        ax.set(xlim=(-64, 64), xlabel="INT8 code", ylim=(0, 36))
        ax.set_xticks([-64, -32, 0, 32, 64])
        title = f"channel {channel}, {len(codes)} keys: {len(found)} codes"
        ax.set_title(title, fontsize=10)
    axes[1, 0].set_ylabel("keys with this code")
    return fig


def granularity_errors(labels, errors):
    """Error of the result by granularity: one line an input.

    errors: "gaussian", "video", "smoothed" -> one number (relative L2) a label.
    """
    fig, ax = new_figure(7.0, 3.4)
    looks = {
        "video": (P["f"], "o", "video-like"),
        "gaussian": (P["neutral"], "s", "Gaussian"),
        "smoothed": (P["qkv"], "D", "video-like, k smoothed"),
    }
    places = range(len(labels))
    for name, (colour, marker, label) in looks.items():
        values = [100 * e for e in errors[name]]
        ax.plot(places, values, color=colour, marker=marker, lw=1.5, ms=7)
        ax.text(places[-1] + 0.12, values[-1], label, color=colour, va="center",
                weight="bold", fontsize=9)  # fmt: skip
    ax.set_xticks(places, labels)
    ax.set(ylim=(0, None), xlim=(-0.3, len(labels) + 0.8))
    ax.set(xlabel="tokens of q that share a scale (k: one for 128)")
    ax.set_ylabel("relative error of F (%)")
    return fig


def copy_share(tokens, shares, points):
    """The copies' time as a share of attention's, against N: the law and three predictions.

    shares: label -> one share (0 … 1) a length; points: [(N, share)] made with measured times.
    """
    fig, ax = new_figure(7.0, 3.4)
    looks = (("-", P["qkv"], 0.62), ("--", P["out"], 1.4))
    for (label, values), (style, colour, beside) in zip(
        shares.items(), looks, strict=True
    ):
        ax.plot(tokens, [100 * v for v in values], style, color=colour)
        side = {"va": "center", "ha": "left" if beside > 1 else "right"}
        ax.text(tokens[2], 100 * values[2] * beside, label, color=colour, weight="bold",
                fontsize=9, **side)  # fmt: skip
    ax.scatter(
        [n for n, _ in points], [100 * share for _, share in points], zorder=3, s=36,
        color=P["reference"], label="with attention's measured time at this length",
    )  # fmt: skip
    ax.set(xscale="log", yscale="log", xlabel="tokens N")
    ax.set_ylabel("copies / attention (%)")
    ax.set_xticks(tokens, [f"{n // 1024}k" for n in tokens])
    ax.set_yticks([1, 3, 10, 30, 100], ["1", "3", "10", "30", "100"])
    ax.set(xlim=(tokens[0] / 1.2, tokens[-1] * 1.2), ylim=(0.7, 110))
    ax.minorticks_off()
    ax.legend(loc="upper right")
    return fig
