"""Chapter 7: who holds which buffer of a ring, and predicted timelines of groups of warps."""

from notebooks.figures.style import PALETTE, new_figure

SCORES = "#F0E442"  # chapter 5's colour of S and P
LOOK = {"on its way": "#C9CDD2", "in use": PALETTE["qkv"]}
PRODUCTS = {"q kᵀ": PALETTE["qkv"], "p v": PALETTE["f"]}


def who_holds_what(histories):
    """Buffers over steps. histories: for each number of stages, per step and buffer
    (tile, state)."""
    heights = [len(steps[0]) + 0.6 for steps in histories.values()]
    fig, axes = new_figure(
        7.4,
        3.6,
        nrows=len(histories),
        sharex=True,
        gridspec_kw={"height_ratios": heights},
    )
    longest = max(map(len, histories.values()))
    for ax, (stages, steps) in zip(axes, histories.items(), strict=True):
        for lane in range(stages):
            held = [step[lane] for step in steps]
            start = 0
            for i in range(1, len(held) + 1):
                if i < len(held) and held[i] == held[start]:
                    continue
                tile, state = held[start]
                if state != "free":
                    _bar(ax, start, i - start, lane, 0.7, LOOK[state], tile)
                start = i
        ax.axvline(len(steps), color="black", lw=1, ls=":")
        ax.text(len(steps) + 0.6, (stages - 1) / 2, "done", fontsize=8.5, va="center")
        names = [f"buffer {i}" for i in range(stages)]
        ax.set(yticks=range(stages), yticklabels=names, ylim=(-0.55, stages - 0.35))
        ax.grid(axis="y", visible=False)
        ax.set_title(f"ring of {stages}")
    axes[-1].set(xlabel="steps of the simulation", xlim=(0, longest + 6))
    handles = [axes[0].barh(-9, 0, color=c, label=s) for s, c in LOOK.items()]
    axes[0].legend(
        handles=handles, loc="lower right", ncols=2, bbox_to_anchor=(1, 0.98)
    )
    return fig


def timelines(runs, until):
    """Jobs of each group over clocks, up to `until`. runs: {takes turns: jobs}."""
    fig, axes = new_figure(7.4, 6.2, nrows=len(runs), sharex=True)
    for ax, (turns, jobs) in zip(axes, runs.items(), strict=True):
        groups = 1 + max(job.group for job in jobs)
        for job in jobs:
            y = 2.4 * (groups - job.group)
            width = min(job.stop, until) - job.start
            if width < 0.02 * until:  # no room for its number
                continue
            if job.what in PRODUCTS:
                _bar(ax, job.start, width, y + 0.5, 0.9, PRODUCTS[job.what], job.tile)
            elif job.what == "softmax":
                _bar(ax, job.start, width, y - 0.45, 0.9, SCORES, job.tile)
        for start, stop in _merged(j for j in jobs if j.what in PRODUCTS):
            if start < until:
                ax.barh(
                    0.9, min(stop, until) - start, left=start, height=0.5, color="black"
                )
        ticks = [2.4 * (groups - g) + 0.02 for g in range(groups)]
        names = [f"group {g}" for g in range(groups)]
        ax.set_yticks([*ticks, 0.9], [*names, "tensor cores\nbusy"])
        ax.set(ylim=(0.4, ticks[0] + 1.1), xlim=(0, until))
        ax.grid(axis="y", visible=False)
        ax.set_title("in turns" if turns else "all at once")
    axes[-1].set_xlabel("clocks, predicted; numbers are tiles")
    named = PRODUCTS | {"exponentials": SCORES}
    handles = [axes[0].barh(-9, 0, color=c, label=s) for s, c in named.items()]
    axes[0].legend(
        handles=handles, loc="lower right", ncols=3, bbox_to_anchor=(1, 0.98)
    )
    return fig


def _bar(ax, start, width, y, height, colour, text):
    ax.barh(y, width, left=start, height=height, color=colour, edgecolor="white", lw=1)
    ax.text(start + width / 2, y, text, ha="center", va="center", fontsize=8)


def _merged(jobs):
    """The time in which at least one of these jobs goes on, as intervals."""
    intervals = []
    for start, stop in sorted((job.start, job.stop) for job in jobs):
        if intervals and start <= intervals[-1][1] + 1e-6:
            intervals[-1][1] = max(stop, intervals[-1][1])
        else:
            intervals.append([start, stop])
    return intervals
