"""The figures: one style, and a landing picture that shows today's record."""

import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure
from PIL import Image

from notebooks import figures
from notebooks.figures.__main__ import PICTURE, fingerprint


def test_the_landing_picture_was_drawn_from_the_stored_record():
    drawn_from = Image.open(PICTURE).text["Source"]
    assert drawn_from == fingerprint(), "run python -m notebooks.figures"


@pytest.mark.parametrize(
    "draw",
    [
        figures.headline,
        figures.dataflow,
        figures.seed_times,
        figures.against_cudnn,
        figures.two_walks,
        figures.training_ratios,
        figures.block_times,
        figures.wan_block_places,
    ],
)
def test_a_figure_has_an_opaque_white_background(draw):
    figure = draw()
    assert isinstance(figure, Figure)
    assert figure.get_facecolor() == (1, 1, 1, 1)
    plt.close(figure)
