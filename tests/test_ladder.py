"""The suites ladder and timeline: the rungs, and the stamps that kernels take."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.suites import ladder, timeline
from rcmlib import core, reference
from rcmlib.attention.tiles import choose_team, choose_tile
from rcmlib.core import interpreting
from rcmlib.core.launch import Team, Tile
from rcmlib.measure.benchmark import table
from rcmlib.measure.compile import Call, compile_calls
from rcmlib.measure.implementations import Inputs
from tests.inputs import heads, on_hopper
from tests.test_compilation import spills_in_loop

BF16 = torch.bfloat16
TWO = Team(block_n=128, groups=2, stages=2, registers=240, turns=True, fixed=True)
THREE = Team(128, groups=3, stages=2, registers=160, turns=True, fixed=True)
hopper_only = pytest.mark.skipif(not on_hopper(), reason="needs a Hopper GPU")


def layouts(shape, device="meta"):
    batch, num_heads, tokens, dim = shape
    q, k, v = torch.empty(3, *shape, dtype=BF16, device=device)
    x = torch.empty(batch, tokens, num_heads * dim, dtype=BF16, device=device)
    c_skip, c_out = torch.empty(2, batch, dtype=torch.float64, device=device)
    return Inputs(q, k, v, x, c_skip, c_out)


# ---- the reader's kernel ----


def test_the_reader_s_kernel_is_right(device):
    if device == "cpu" and not interpreting():
        pytest.skip("Triton was loaded to compile")
    dtype = torch.float32 if device == "cpu" else BF16
    inputs = Inputs(*heads((2, 3, 70, 70, 32), dtype, device))
    out = ladder.readers_run(inputs)().view(inputs.q.shape)
    ref = reference.attention(*inputs[:3])
    assert reference.relative_l2(out, ref) < (1e-6 if device == "cpu" else 0.01)


def test_a_kernel_that_the_chapter_does_not_have_is_named(tmp_path):
    book = json.loads(ladder.NOTEBOOK.read_text(encoding="utf-8"))
    for cell in book["cells"]:
        cell["source"] = "".join(cell["source"]).replace("def one_tile(", "def tile(")
    path = tmp_path / "05.ipynb"
    path.write_text(json.dumps(book))
    with pytest.raises(ValueError, match="05.ipynb: 0 cells define one_tile, need one"):
        ladder.readers_kernel(path)


# ---- the rungs ----


def test_each_rung_changes_one_thing():
    for name, shape in ladder.SHAPES.items():
        inputs = layouts(shape)
        found = ladder.rungs(inputs)
        plans = {n: ladder.planned(inputs, how, **d) for n, (how, d) in found.items()}
        how = {n: plan.constants["HOW"] for n, plan in plans.items()}
        assert not how["tiles"].tma and not plans["tiles"].boxes
        assert how["tma"].tma and len(plans["tma"].boxes) == 3
        assert not how["tma"].fixed and how["kept"].fixed and not how["kept"].two
        assert how["two_blocks"].two and how["two_blocks"].fixed
        assert how["team"] == how["persistent"] == replace(how["turns"], turns=False)
        tasks, *_ = plans["team"].numbers
        assert plans["team"].grid == (tasks, 1, 1) and how["turns"].turns
        (last, _) = list(found.values())[-1]
        batch, num_heads, tokens, dim = shape
        heads_and_lengths = (batch * num_heads, tokens, tokens, dim)
        assert last == choose_team(heads_and_lengths, BF16, (9, 0), False, 132), name
        if dim == 128:
            assert found["two_blocks"][0] == choose_tile(dim, BF16, (9, 0))
        else:
            assert found["kept"][0] == choose_tile(dim, BF16, (9, 0))


def test_a_tile_in_words():
    tile = Tile(64, 64, 4, 3, 168, two=True)
    words = "2 x 64 x 64, 4 warps, 3 stages, 168 registers, online softmax"
    assert ladder.in_words(tile) == words
    assert ladder.in_words(THREE) == "3 groups of 64 x 128, 2 stages"


def test_without_a_hopper_gpu_the_suites_say_so_and_go_on(monkeypatch):
    monkeypatch.setattr(core, "assumed_capability", (8, 0))
    for suite in (ladder, timeline):
        monkeypatch.setattr(suite, "attention_inputs", lambda *shape: layouts(shape))
    for cases in (ladder.ladder_case("D64"), timeline.timeline_case("D64", "hopper")):
        (found,) = cases
        assert found["failed"] == {"team": "not supported: no Hopper GPU"}
        assert not found["results"] and "no Hopper GPU" in table(found)


# ---- stamps ----


def stamped_forward(*arguments):
    """A launcher for `Call`: as attention_forward with a tile, and with stamps."""
    *inputs, how = arguments
    runs, *_ = timeline.both(Inputs(*inputs), how)
    return runs[timeline.STAMPED]()


def test_stamps_that_nobody_wants_cost_no_instruction():
    """And those that somebody wants store nothing to local memory in the loop, and read there
    at most four values that stay the same."""
    hows = {
        (64, "attention_kernel"): choose_tile(64, BF16, (9, 0)),
        (128, "attention_kernel"): choose_tile(128, BF16, (9, 0)),
        (64, "hopper_attention_kernel"): THREE,
        (128, "hopper_attention_kernel"): TWO,
    }
    calls = []
    for (dim, _), how in hows.items():
        inputs = layouts((2, 12, 8192, dim))
        without = (*inputs, dim**-0.5, False, False, how)
        calls.append(Call("rcmlib.attention.forward.attention_forward", without))
        calls.append(Call("tests.test_ladder.stamped_forward", (*inputs, how)))
    found = iter(compile_calls(calls))
    for _, kernel in hows:
        without, stamped = (next(found)[kernel] for _ in range(2))
        assert "%clock" not in without.ptx and "%smid" not in without.ptx
        assert "%clock64" in stamped.ptx and "%smid" in stamped.ptx
        parameters = [c.ptx.count(".param ") for c in (without, stamped)]
        assert parameters[1] == parameters[0] + 1
        assert not stamped.serialized
        spills = spills_in_loop(stamped.ptx, 90)
        assert not [s for s in spills if "STL" in s] and len(spills) <= 4


def test_a_program_may_not_stamp_more_tiles_than_there_is_room_for():
    inputs = layouts((1, 1, 2049 * 128, 64))
    with pytest.raises(ValueError, match="a program does 2049 tiles, at most 2048"):
        timeline.both(inputs, THREE)


def taken(tiles, moments, start=1000, step=10):
    """Stamps of one lane, as a kernel leaves them: [MOST_TILES, 8]."""
    from rcmlib.attention.stamps import MOST_TILES, place_of

    own = np.zeros((MOST_TILES.value, 8), np.int64)
    clock = start
    for n in tiles:
        for moment in moments:
            own[n, place_of(moment)] = clock
            clock += step
    return own


def test_a_lane_s_tiles_come_in_the_order_of_their_time():
    moments = ("begins", "scores", "weights")
    lane = timeline.lane_of(taken([3, 0, 1, 2], moments), moments)
    assert lane[:, 0].tolist() == [3, 0, 1, 2]
    assert lane[1].tolist() == [0, 1030, 1040, 1050]


@pytest.mark.parametrize("fault", ["behind its time", "missing"])
def test_disorder_is_found(fault):
    moments = ("begins", "scores", "weights")
    own = taken(range(5), moments)
    own[2, 4] = 0 if fault == "missing" else own[2, 4] + 100
    with pytest.raises(AssertionError, match="disorder"):
        timeline.lane_of(own, moments)


def test_a_window_has_a_task_s_beginning_in_its_middle():
    from rcmlib.attention.stamps import PRODUCED

    moments = ("begins", "scores", "weights")
    tiles = [n for n in range(3 * 64) if n % 64]  # each task's first is not stamped
    lane = timeline.lane_of(taken(tiles, moments, step=100), moments)
    fed = timeline.lane_of(taken(range(192), PRODUCED, step=60), PRODUCED)
    lanes = [{"party": "group 0", "tiles": lane}, {"party": "producer", "tiles": fed}]
    group, producer = timeline.window(lanes)
    clocks = {n: begins for n, begins, *_ in group["tiles"]}
    assert clocks[65] == timeline.WINDOW // 2 and 64 not in clocks and 63 in clocks
    assert min(clocks.values()) < 300 and max(clocks.values()) >= timeline.WINDOW - 300
    assert all(0 <= row[1] < timeline.WINDOW for row in producer["tiles"])
    assert json.loads(json.dumps(group))["tiles"][0] == group["tiles"][0]


def test_a_plain_program_begins_with_its_last_tile_and_not_again_with_tile_0():
    moments = ("begins", "scores", "weights")
    order = [63, *range(63)]
    lanes = [
        {"party": "block 0", "tiles": timeline.lane_of(own, moments)}
        for own in (
            taken(order, moments, start=s, step=100) for s in (1000, 21_000, 41_000)
        )
    ]
    begins = {
        lane["tiles"][0][0]: lane["tiles"][0][1] for lane in timeline.window(lanes)
    }
    assert begins[63] == timeline.WINDOW // 2


SMALL = [  # how, (B, H, Nq, Nkv, D), causal
    (choose_tile(64, BF16, (9, 0)), (1, 2, 300, 700, 64), False),
    (choose_tile(128, BF16, (9, 0)), (1, 2, 300, 700, 128), False),
    (THREE, (2, 2, 385, 1024, 64), False),
    (TWO, (1, 2, 640, 640, 128), True),
]


@pytest.mark.gpu
@hopper_only
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_with_stamps_the_result_is_the_same_bit_for_bit(case):
    how, shape, is_causal = case
    inputs = Inputs(*heads(shape, BF16, "cuda"))
    runs, _, stamps = timeline.both(inputs, how, is_causal)
    assert torch.equal(runs[timeline.UNSTAMPED](), runs[timeline.STAMPED]())
    _, programs, found = timeline.of_one_sm(stamps)
    for own in found:
        for lane, (_, moments) in timeline.parties(how).items():
            timeline.lane_of(own[lane], moments)
    assert programs


@pytest.mark.gpu
@hopper_only
@pytest.mark.parametrize("name", ladder.SHAPES)
def test_every_rung_runs_and_is_right(name):
    inputs = Inputs(*heads((1, 2, 512, 1024, ladder.SHAPES[name][-1]), BF16, "cuda"))
    ref = reference.merge_heads(reference.attention(*inputs[:3]))
    for label, (how, departs) in ladder.rungs(inputs).items():
        out = ladder.rung(inputs, how, **departs)()
        assert reference.relative_l2(out, ref) < 0.01, label
