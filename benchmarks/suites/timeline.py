"""One SM in real time, by the clocks that an attention kernel's own warps note."""

from collections.abc import Iterator

import numpy as np
import torch

from benchmarks.suites.ladder import SHAPES, chosen, refused
from benchmarks.suites.suite import INPUTS, Suite
from rcmlib.measure import timing
from rcmlib.measure.benchmark import case, check, distance
from rcmlib.measure.implementations import Inputs, Run, attention_inputs

WINDOW = 24_000  # clocks of which a record tells
UNSTAMPED, STAMPED = "unstamped", "stamped"


def both(
    inputs: Inputs, how, is_causal: bool = False
) -> tuple[dict[str, Run], object, torch.Tensor]:
    """(the same launch with and without stamps, its plan, the stamps).

    ValueError if a program does more tiles than the stamps have room for.
    """
    from rcmlib.attention.forward import attention_forward, attention_plan
    from rcmlib.attention.stamps import LANES, MOST_TILES
    from rcmlib.core.launch import Plan

    plan = attention_plan(*inputs[:4], True, is_causal, how)
    tiles = tiles_of(plan, how, inputs.k.shape[2], 0, "producer")
    if tiles > MOST_TILES.value:  # it would stamp other lanes, and beyond the last
        raise ValueError(f"a program does {tiles} tiles, at most {MOST_TILES.value}")
    shape = (plan.grid[0], LANES.value, MOST_TILES.value, 8)
    stamps = torch.zeros(shape, dtype=torch.int64, device=inputs.q.device)
    constants = plan.constants | {"stamps": stamps}
    stamped = Plan(
        plan.kernel, plan.grid[0], *plan.numbers, boxes=plan.boxes, **constants
    )
    scale = inputs.q.shape[-1] ** -0.5

    def call(plan):
        return lambda: attention_forward(*inputs, scale, is_causal, plan=plan)[0]

    return {UNSTAMPED: call(plan), STAMPED: call(stamped)}, plan, stamps


def parties(how) -> dict[int, tuple[str, tuple[str, ...]]]:
    """The lanes of a program: who, and at which moments it stamps."""
    from rcmlib.attention.stamps import MOMENTS, PRODUCED, PRODUCER

    if hasattr(how, "groups"):
        groups = {g: (f"group {g}", MOMENTS[:-1]) for g in range(how.groups)}
        return groups | {PRODUCER.value: ("producer", PRODUCED)}
    blocks = {0: ("block 0", ("begins", "scores", "weights"))}
    return blocks | ({1: ("block 1", ("weights",))} if how.two else {})


def tiles_of(plan, how, tokens: int, program: int, party: str) -> int:
    """How many tiles a lane stamps. Groups leave out the first of each task."""
    tiles = -(-tokens // how.block_n)
    if not hasattr(how, "groups"):
        return tiles
    tasks, *_ = plan.numbers
    rounds = -(-(tasks - program) // plan.grid[0])
    return rounds * (tiles - (party != "producer"))


def of_one_sm(stamps: torch.Tensor) -> tuple[int, list[int], np.ndarray]:
    """(an SM's number, its programs, their stamps): the SM of the program in the middle."""
    from rcmlib.attention.stamps import place_of

    sms = stamps[:, 0, 0, place_of("sm")]
    sm = sms[len(sms) // 2].item()
    (programs,) = torch.nonzero(sms == sm, as_tuple=True)
    return sm, programs.tolist(), stamps[programs].cpu().numpy()


def lane_of(own: np.ndarray, moments: tuple[str, ...]) -> np.ndarray:
    """A lane's tiles in the order of their time: [tile, clock of each of these moments].

    AssertionError unless its clocks ascend, from moment to moment and from tile to tile.
    """
    from rcmlib.attention.stamps import place_of

    clocks = own[:, [place_of(moment) for moment in moments]]
    (tiles,) = np.nonzero(clocks[:, -1])
    tiles = tiles[clocks[tiles, 0].argsort()]
    clocks = clocks[tiles]
    assert clocks.all() and (np.diff(clocks.reshape(-1)) >= 0).all(), "disorder"
    return np.column_stack([tiles, clocks])


def window(lanes: list[dict]) -> list[dict]:
    """WINDOW clocks of the lanes, counted from its start. In its middle a task begins: the
    median of all that do. A lane's task begins with its first tile, or behind one left out (the
    plain kernel goes back to tile 0, in the same task)."""
    starts = []
    for lane in lanes:
        if lane["party"] in ("group 0", "block 0"):
            tiles = lane["tiles"]
            begins = np.diff(tiles[:, 0], prepend=-2) > 1
            starts += tiles[begins, 1].tolist()
    start = sorted(starts)[len(starts) // 2] - WINDOW // 2
    kept = []
    for lane in lanes:
        tiles = lane["tiles"].copy()
        tiles[:, 1:] -= start
        inside = tiles[(tiles[:, 1] >= 0) & (tiles[:, 1] < WINDOW)]
        if len(inside):
            kept.append(lane | {"tiles": inside.tolist()})
    return kept


def timeline_case(name: str, kernel: str) -> Iterator[dict]:
    shape = SHAPES[name]
    inputs = attention_inputs(*shape)
    tile, team = chosen(inputs)
    how = tile if kernel == "plain" else team
    sizes = dict(zip("BHND", shape, strict=True)) | {"kernel": kernel}
    if how is None:
        yield refused(f"{name}_{kernel}", sizes)
        return
    runs, plan, stamps = both(inputs, how)
    if not torch.equal(*(run() for run in runs.values())):
        raise AssertionError(f"{name}, {kernel}: with stamps the result differs")
    error = distance(inputs)
    checked = check(name, runs, lambda _, out: error("fused", out), lambda _: 0.01)
    times = timing.compare(checked.runs, failed=checked.failed)
    stamps.zero_()
    runs[STAMPED]()
    sm, programs, taken = of_one_sm(stamps)
    lanes = []
    for program, own in zip(programs, taken, strict=True):
        for lane, (party, moments) in parties(how).items():
            tiles = lane_of(own[lane], moments)
            assert len(tiles) == tiles_of(plan, how, shape[2], program, party)
            lanes.append({"program": program, "party": party, "moments": [*moments],
                          "tiles": tiles})  # fmt: skip
    sizes |= {"how": str(how), "sm": sm, "window": WINDOW, "lanes": window(lanes)}
    yield case(f"{name}_{kernel}", sizes, times, checked)


SUITES = {
    "timeline": Suite(
        "One SM in real time: the clocks at which the warps of the plain kernel and of "
        "Hopper's come to each moment of a tile, with the skip.",
        f"{INPUTS} Three query rows checked against float64 first; with stamps the result "
        "is the same, bit for bit, and the clocks of a lane ascend. lanes: of the programs "
        "on one SM, in a window in whose middle a task begins; a row is a tile's number "
        "and its clocks, counted from the window's start. The first tile of a task is not "
        "stamped by Hopper's groups. results: what the stamps cost.",
        timeline_case,
        [(name, kernel) for name in SHAPES for kernel in ("plain", "hopper")],
        reference=UNSTAMPED,
    )
}
