"""The figures: one style, a landing picture of today's record; and how a record was taken."""

import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure
from PIL import Image

from notebooks.figures import epilogue, gradients, projection, sage, speed
from notebooks.figures.__main__ import PICTURE, fingerprint
from notebooks.figures.style import new_figure, points
from notebooks.measurements import how, records
from rcmlib.measure.records import Estimate


def test_the_landing_picture_was_drawn_from_the_stored_record():
    drawn_from = Image.open(PICTURE).text["Source"]
    assert drawn_from == fingerprint(), "run python -m notebooks.figures"


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
