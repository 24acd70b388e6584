"""Chapter 7: who holds which buffer of a ring, when groups of warps do what, predicted and
measured, and the ladder from the reader's kernel to Hopper's."""

import re
from itertools import pairwise

from notebooks.figures.style import COLOUR, PALETTE, new_figure

SCORES = "#F0E442"  # chapter 5's colour of S and P
LOOK = {"on its way": "#C9CDD2", "in use": PALETTE["qkv"]}
PRODUCTS = {"q kᵀ": PALETTE["qkv"], "p v": PALETTE["f"]}
DOING = {"waits": LOOK["on its way"], **PRODUCTS, "softmax": SCORES, "asks": "black"}
UNSEEN = "#E9ECEF"  # under a party's gap, where nobody stamps
RUNGS = {  # of the record `ladder`, from the bottom
    "chapter_5": "your kernel, chapter 5",
    "tiles": "the library's tiles",
    "tma": "copies by the engine",
    "kept": "a maximum that is kept",
    "two_blocks": "two blocks of rows",
    "team": "warps with jobs",
    "persistent": "programs that stay",
    "turns": "turns",
    "three_groups": "a third group",
    "fused": "the skip, fused",
}
UNLIMITED = ("two_blocks", "two_blocks_168")  # without and with a limit of registers
PEERS = {"cudnn": "cuDNN", "fa4": "FA4"}
# What a party does between two of its moments. "next": the next tile of its task begins.
LEGS = {
    "group": (
        ("begins", "k here", "waits"),
        ("k here", "scores", "q kᵀ"),
        ("scores", "weights", "softmax"),
        ("weights", "p v done", "p v"),
        ("p v done", "next", "softmax"),  # the weights become 16-bit numbers
    ),
    "program": (
        ("begins", "scores", "q kᵀ"),
        ("scores", "weights", "softmax"),
        ("weights", "lower", "softmax"),  # where there is a second block of rows
        ("lower", "next", "p v"),
    ),
    "producer": (
        ("begins", "k free", "waits"),
        ("k free", "k asked", "asks"),
        ("k asked", "v free", "waits"),
        ("v free", "v asked", "asks"),
    ),
}
# From the moment at which products are asked for to the one at which all are known to be done.
# The plain kernel learns that of p v when it has the next tile's scores.
UNDER_WAY = {"group": (("k here", "p v done"),),
             "program": (("begins", "scores"), ("weights", "next"))}  # fmt: skip


def rungs_of(case):
    """The rungs that a case of the record `ladder` has, from the bottom: {label: name}.

    Of two blocks with and without a limit of registers, the faster.
    """
    times = {label: r["median_ms"] for label, r in case["results"].items()}
    both = [label for label in UNLIMITED if label in times]
    best = {"two_blocks": min(both, key=times.get)} if both else {}
    labels = {best.get(label, label): name for label, name in RUNGS.items()}
    return {label: name for label, name in labels.items() if label in times}


def parties(case):
    """The tiles of each party in a case of the record `timeline`, in the order of their time.

    {"group 0": [{"tile": 7, "begins": 120, ...}, ...], ...}: a clock for each moment, a number
    of the task, counted from 0, and "next", where the task has another tile, and it is known.
    Programs of the plain kernel that follow each other on the SM are one party.
    """
    found, lower = {}, {}
    for lane in case["lanes"]:
        tiles = [
            dict(zip(("tile", *lane["moments"]), row, strict=True))
            for row in lane["tiles"]
        ]
        if lane["party"] == "block 1":
            lower |= {(lane["program"], t["tile"]): t["weights"] for t in tiles}
        else:
            found[lane["program"], lane["party"]] = tiles
    named = {}
    for (program, party), tiles in sorted(found.items(), key=_begins):
        if party == "block 0":
            for t in tiles:
                t["lower"] = lower.get((program, t["tile"]), t["weights"])
            party = _free_place(named, tiles)
        before = named.setdefault(party, [])
        task = before[-1]["task"] + 1 if before else 0
        named[party] = before + _with_tasks(tiles, task)
    return dict(sorted(named.items()))


def _begins(entry):
    _, tiles = entry
    return tiles[0]["begins"]


def _free_place(named, tiles):
    """Which of the SM's places a plain program takes: the first that is free by then."""
    place = 0
    while (held := named.get(f"program {place}")) and (
        held[-1]["lower"] > tiles[0]["begins"]
    ):
        place += 1
    return f"program {place}"


def _with_tasks(tiles, task):
    """The plain kernel goes back to tile 0 within a task. A group leaves out a task's first."""
    for now, after in pairwise(tiles):
        now["task"] = task
        if 0 < now["tile"] < after["tile"] - 1:
            task += 1
        else:
            now["next"] = after["begins"]
    tiles[-1]["task"] = task
    return tiles


def kind(party):
    return re.sub(r" \d+$", "", party)


def spans(tiles, legs):
    """(start, stop, what else a leg says) of each leg of each tile whose two ends are known."""
    return [
        (tile[start], tile[stop], *what)
        for tile in tiles
        for start, stop, *what in legs
        if start in tile and stop in tile
    ]


def under_way(case):
    """The clocks in which at least one party has asked for products and does not know that
    they are done, as intervals."""
    return union(
        span
        for party, tiles in parties(case).items()
        for span in spans(tiles, UNDER_WAY.get(kind(party), ()))
    )


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
        busy = union((j.start, j.stop) for j in jobs if j.what in PRODUCTS)
        for start, stop in busy:
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


def between_tasks(case):
    """(party, start, stop) from a group's or program's last moment in a task to its first in
    the next. The last p v, the epilogue, and a group's first tile are in there, unstamped.

    start is 0 where the tile before is not in the record, since it began before the window: of
    a party that begins none in the first eighth of it.
    """
    found = []
    for party, tiles in parties(case).items():
        if party == "producer":
            continue
        if tiles[0]["begins"] > case["window"] // 8:
            found.append((party, 0, tiles[0]["begins"]))
        found += [
            (party, now.get("p v done", now.get("lower")), after["begins"])
            for now, after in pairwise(tiles)
            if after["task"] > now["task"]
        ]
    return found


def union(spans):
    """The time in which at least one of these (start, stop) goes on, as intervals."""
    intervals = []
    for start, stop in sorted(spans):
        if intervals and start <= intervals[-1][1] + 1e-6:
            intervals[-1][1] = max(stop, intervals[-1][1])
        else:
            intervals.append([start, stop])
    return intervals


def ladder(cases):
    """TFLOP/s of each rung, one panel a head size; cuDNN's and FlashAttention-4's as lines.

    In the last row, which has the skip, the lines are those with a compiled skip.
    """
    fig, axes = new_figure(7.6, 4.0, ncols=len(cases), sharey=True, squeeze=False)
    rows = {name: len(RUNGS) - 1 - i for i, name in enumerate(RUNGS.values())}
    for ax, case in zip(axes[0], cases, strict=True):
        rates = {n: tflop_s(case, n) for n in case["results"]}
        for label, name in rungs_of(case).items():
            look = PALETTE["fused"] if label == "fused" else PALETTE["triton"]
            look = PALETTE["neutral"] if label == "chapter_5" else look
            ax.barh(rows[name], rates[label], height=0.66, color=look)
            ink = "white" if label == "fused" else "black"
            ax.text(0, rows[name], f"  {rates[label]:.0f}", va="center", color=ink)
        for name in rows.keys() - rungs_of(case).values():
            ax.text(0, rows[name], "  –", va="center", color=PALETTE["neutral"])
        for place, peer in enumerate(p for p in PEERS if p in rates):
            line = {"color": COLOUR[peer], "lw": 1.6, "ls": "--" if place else "-"}
            ax.plot([rates[peer]] * 2, [0.5, len(rows) - 0.5], **line)
            ax.text(rates[peer], len(rows) - 0.5 + 0.6 * place, PEERS[peer], va="bottom",
                    ha="center", fontsize=8.5, color=COLOUR[peer])  # fmt: skip
            if f"{peer}_compiled" in rates:
                ax.plot([rates[f"{peer}_compiled"]] * 2, [-0.5, 0.5], **line)
        ax.set(xlim=(0, 1.08 * max(rates.values())), xlabel="TFLOP/s, products only")
        ax.set(yticks=list(rows.values()), yticklabels=list(rows))
        ax.set_ylim(-0.6, len(rows) + 0.8)
        ax.grid(axis="y", visible=False)
        ax.set_title(f"D = {case['D']}")
    return fig


def one_sm(cases, clocks=20_000):
    """What the parties of an SM do, one panel a case ({title: case}), around the beginning of a
    task that the record has in the middle of its window. Pale: between two tasks."""
    drawn = {title: parties(case) for title, case in cases.items()}
    heights = [len(named) + 1.9 for named in drawn.values()]
    fig, axes = new_figure(7.6, 0.55 * sum(heights) + 0.6, nrows=len(cases), sharex=True,
                           squeeze=False, gridspec_kw={"height_ratios": heights})  # fmt: skip
    for ax, (title, case) in zip(axes[:, 0], cases.items(), strict=True):
        named = drawn[title]
        start = case["window"] // 2 - clocks // 2
        first = min(t["begins"] for tiles in named.values() for t in tiles
                    if t["begins"] >= start)  # fmt: skip
        rows = {party: len(named) - i for i, party in enumerate(named)}
        for party, tiles in named.items():
            for begins, ends, what in spans(tiles, LEGS[kind(party)]):
                _clipped(ax, rows[party], 0.8, begins - first, ends - first, clocks,
                         DOING[what])  # fmt: skip
        for party, ends, begins in between_tasks(case):
            left, right = max(ends - first, 0), min(begins - first, clocks)
            _clipped(ax, rows[party], 0.8, left, right, clocks, UNSEEN)
            _clipped(ax, 0, 0.4, left, right, clocks, UNSEEN)
            if right - left > 0.07 * clocks:
                ax.text((left + right) / 2, rows[party], "a task\nends", ha="center",
                        va="center", fontsize=8)  # fmt: skip
        for begins, ends in under_way(case):
            _clipped(ax, 0, 0.4, begins - first, ends - first, clocks, "black")
        ax.set_yticks([*rows.values(), 0], [*rows, "products\nunder way"])
        ax.set(xlim=(0, clocks), ylim=(-0.5, len(rows) + 0.6))
        ax.grid(axis="y", visible=False)
        ax.set_title(title)
    axes[-1, 0].set_xlabel("clocks, measured, from the first event shown")
    handles = [axes[0, 0].barh(-9, 0, color=c, label=s) for s, c in DOING.items()]
    look = {"fontsize": 8.5, "columnspacing": 1, "handlelength": 1.2}
    axes[0, 0].legend(handles=handles, loc="lower right", ncols=len(DOING),
                      bbox_to_anchor=(1.01, 0.98), **look)  # fmt: skip
    return fig


def _clipped(ax, row, height, start, stop, until, colour):
    start, stop = max(start, 0), min(stop, until)
    if start < stop:
        ax.barh(row, stop - start, left=start, height=height, color=colour, lw=0)


def tflop_s(case, label):
    """Of the two products, as in the whole book."""
    return case["flop"] / case["results"][label]["median_ms"] / 1e9
