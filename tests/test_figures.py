"""The figures: one style, a landing picture of today's record; and how a record was taken."""

import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure
from PIL import Image

from notebooks.figures import epilogue, gradients, hopper, projection, sage, speed
from notebooks.figures.__main__ import PICTURE, fingerprint
from notebooks.figures.style import new_figure, points
from notebooks.measurements import how, records
from rcmlib.measure.records import Estimate


def test_the_landing_picture_was_drawn_from_the_stored_record():
    drawn_from = Image.open(PICTURE).text["Source"]
    assert drawn_from == fingerprint(), "run python -m notebooks.figures"


def test_the_landing_picture_shows_the_strongest_two_passes_and_heads_of_128_first():
    figure = epilogue.headline()
    below = figure.subfigs[1].axes[0]
    shown = [text.get_text() for text in below.get_legend().get_texts()]
    assert "FlashAttention-4, compiled skip" in shown and shown[-1] == "bf16, fused"
    assert "heads of 128" in below.get_xticklabels()[0].get_text()
    fused = below.containers[-1].patches
    assert fused[0].get_height() == records.tflop_s("attention", "D128_N2048", "fused")
    plt.close(figure)


@pytest.mark.parametrize(
    "draw",
    [
        epilogue.headline,
        epilogue.dataflow,
        epilogue.seed_times,
        epilogue.against_cudnn,
        gradients.two_walks,
        gradients.training_ratios,
        projection.block_times,
        projection.wan_block_places,
        sage.sage_speeds,
    ],
)
def test_a_figure_has_an_opaque_white_background(draw):
    figure = draw()
    assert isinstance(figure, Figure)
    assert figure.get_facecolor() == (1, 1, 1, 1)
    plt.close(figure)


@pytest.mark.parametrize("name", records.names())
def test_how_a_record_was_taken_leaves_nothing_of_its_method_out(name):
    table = how(name)
    method = records.record(name)["method"]
    assert all(text in method for text in table.loc["method":].iloc[:, 0])
    assert sum(map(len, table.loc["method":].iloc[:, 0])) > 0.9 * len(method)
    assert "..." not in table._repr_html_()


@pytest.mark.parametrize("across", [False, True])
def test_points_are_drawn_with_bars_over_their_intervals(across):
    fig, ax = new_figure()
    found = [Estimate(1.0, 0.9, 1.3), Estimate(2.0, 2.0, 2.0)]
    places = [5.0, 6.0]
    given = (found, places) if across else (places, found)
    line, _, (bars,) = points(ax, *given, across=across)
    axis = 0 if across else 1
    assert [xy[axis] for xy in line.get_xydata()] == [1.0, 2.0]
    ends = [segment[:, axis].tolist() for segment in bars.get_segments()]
    assert ends == [pytest.approx([0.9, 1.3]), pytest.approx([2.0, 2.0])]
    plt.close(fig)


def test_a_speed_is_the_fastest_peer_s_time_over_ours():
    def timed(*ms):
        return {"median_ms": sorted(ms)[len(ms) // 2], "all_ms": list(ms)}

    results = {
        "flash_compiled": timed(3.0, 3.0, 3.0),
        "cudnn_compiled": timed(2.0, 2.0, 2.2),
        "fused": timed(1.0, 1.0, 1.0),
    }
    case = {"results": results}
    assert speed.speed(case, "fused") == (2.0, 2.0, 2.2)
    assert speed.speed(case, "cudnn_compiled") == (1, 1, 1)  # a peer over itself
    assert speed.speed(case, "fused", ("flash_compiled",)) == (3, 3, 3)
    del results["flash_compiled"]
    assert speed.speed(case, "fused").value == 2.0


# ---- chapter 7: hand-made records ----


def rungs_case(dim, **ms):
    results = {label: {"median_ms": t, "all_ms": [t] * 5} for label, t in ms.items()}
    return {"name": f"D{dim}", "D": dim, "flop": 1e12, "results": results}


LADDER = [
    rungs_case(64, chapter_5=9.0, kept=3.0, two_blocks=4.0, two_blocks_168=2.5,
               three_groups=2.0, fused=2.1, cudnn=2.2, cudnn_compiled=2.3),
    rungs_case(128, chapter_5=8.0, two_blocks=2.0, turns=1.5, fused=1.6),
]  # fmt: skip


def test_of_two_blocks_with_and_without_a_limit_the_faster_is_a_rung():
    small, large = map(hopper.rungs_of, LADDER)
    assert list(small) == [
        "chapter_5",
        "kept",
        "two_blocks_168",
        "three_groups",
        "fused",
    ]
    assert small["two_blocks_168"] == large["two_blocks"] == "two blocks of rows"
    assert list(large) == ["chapter_5", "two_blocks", "turns", "fused"]


def test_the_ladder_has_a_bar_a_rung_and_a_line_a_peer_that_was_measured():
    figure = hopper.ladder(LADDER)
    assert figure.get_facecolor() == (1, 1, 1, 1)
    left, right = figure.axes
    assert [bar.get_width() for bar in left.patches] == pytest.approx(
        [1e3 / ms for ms in (9.0, 3.0, 2.5, 2.0, 2.1)]
    )
    assert [line.get_xdata()[0] for line in left.lines] == pytest.approx(
        [1e3 / 2.2, 1e3 / 2.3]
    )
    assert "cuDNN" in [t.get_text() for t in left.texts] and not right.lines
    assert [t.get_text() for t in right.texts].count("  –") == 6  # rungs that it lacks
    plt.close(figure)


def lane(program, party, moments, rows):
    return {"program": program, "party": party, "moments": list(moments), "tiles": rows}


def plain_case():
    """Two programs at a time, of three tiles, the last first; one ends, and another comes."""
    moments = ("begins", "scores", "weights")
    lanes = []
    for program, start in ((0, 0), (5, 100), (9, 1000)):
        upper = [[n, start + 200 * i, start + 200 * i + 50, start + 200 * i + 90]
                 for i, n in enumerate((2, 0, 1))]  # fmt: skip
        lower = [[n, weights + 60] for n, *_, weights in upper]
        lanes += [lane(program, "block 0", moments, upper),
                  lane(program, "block 1", ("weights",), lower)]  # fmt: skip
    return {"lanes": lanes, "window": 2000}


def hopper_case():
    """One group; the first tile of its second task, 4, is not stamped; and the producer."""
    moments = ("begins", "turn", "k here", "asked", "scores", "weights", "p v done")
    starts = {2: 100, 3: 300, 5: 900, 6: 1100}
    rows = [[n, *range(start, start + 140, 20)] for n, start in starts.items()]
    fed = [[n, 200 * n, 200 * n + 90, 200 * n + 100, 200 * n + 110, 200 * n + 120]
           for n in range(1, 6)]  # fmt: skip
    produced = ("begins", "k free", "k asked", "v free", "v asked")
    lanes = [lane(0, "group 0", moments, rows), lane(0, "producer", produced, fed)]
    return {"lanes": lanes, "window": 2000}


def test_plain_programs_that_follow_each_other_share_a_place_on_the_sm():
    found = hopper.parties(plain_case())
    assert list(found) == ["program 0", "program 1"]
    assert [t["task"] for t in found["program 0"]] == [0, 0, 0, 1, 1, 1]
    assert [t["tile"] for t in found["program 1"]] == [2, 0, 1]
    assert found["program 1"][0]["lower"] == 250
    # Its last tile ends when the lower block's weights are there.
    assert hopper.between_tasks(plain_case()) == [("program 0", 550, 1000)]


def test_a_group_s_task_ends_where_a_tile_was_not_stamped():
    found = hopper.parties(hopper_case())
    assert [t["task"] for t in found["group 0"]] == [0, 0, 1, 1]
    assert ["next" in t for t in found["group 0"]] == [True, False, True, False]
    assert hopper.between_tasks(hopper_case()) == [("group 0", 420, 900)]


def test_products_are_under_way_from_the_first_question_to_the_last_answer():
    assert hopper.under_way(hopper_case()) == [
        [start + 40, start + 120] for start in (100, 300, 900, 1100)
    ]
    only = plain_case()
    only["lanes"] = only["lanes"][
        :2
    ]  # one program: it learns of p v with the next scores
    assert hopper.under_way(only) == [[0, 50], [90, 250], [290, 450]]


def test_one_sm_is_drawn_in_clocks_from_the_first_event_shown():
    cases = {"plain": plain_case(), "Hopper's": hopper_case()}
    figure = hopper.one_sm(cases, clocks=1800)
    assert figure.get_facecolor() == (1, 1, 1, 1)
    above, below = figure.axes
    names = [label.get_text() for label in below.get_yticklabels()]
    assert names == ["group 0", "producer", "products\nunder way"]
    for ax in figure.axes:
        assert ax.get_xlim() == (0, 1800)
        bars = [bar for bar in ax.patches if bar.get_width()]
        assert all(b.get_x() >= 0 and b.get_x() + b.get_width() <= 1800 for b in bars)
    assert "a task\nends" in [t.get_text() for t in above.texts]
    plt.close(figure)
