"""The figures: one style, a landing picture of today's record; and how a record was taken."""

import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure
from PIL import Image

from notebooks.figures import epilogue, gradients, projection
from notebooks.figures.__main__ import PICTURE, fingerprint
from notebooks.measurements import how, records


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
