"""The reader's own record beside the stored one, and who is named the winner of a shape."""

import json

import matplotlib.pyplot as plt
import pytest

from notebooks.figures import speed as figures
from notebooks.figures.speed import fastest, strongest
from notebooks.measurements import records


def results(**medians):
    times = {n: {"median_ms": ms, "all_ms": [ms] * 5} for n, ms in medians.items()}
    return {"results": times}


def case(tokens, **medians):
    return {"N": tokens, **results(**medians)}


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """A folder with one stored record, `seed`, of two lengths."""
    times = {"flash_compiled": 3.0, "cudnn_compiled": 2.0, "fused": 1.0, "sage": 4.0}
    cases = [case(1024, **times), case(2048, **times)]
    content = {"name": "seed", "provenance": {"device": "A"}, "cases": cases}
    (tmp_path / "seed.json").write_text(json.dumps(content))
    monkeypatch.setattr(records, "folder", tmp_path)
    return content


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def titles(figure):
    return [ax.get_title(loc="left") for ax in figure.axes]


def test_without_a_record_of_ones_own_the_stored_one_is_shown_and_says_so(
    stored, tmp_path
):
    assert titles(figures.my_gpu(tmp_path / "my_gpu.json")) == ["stored: A"]


def test_one_s_own_record_stands_beside_the_stored_one(stored, tmp_path):
    path = tmp_path / "my_gpu.json"
    path.write_text(json.dumps(stored | {"provenance": {"device": "B"}}))
    assert titles(figures.my_gpu(path)) == ["stored: A", "yours: B"]


def test_a_record_cut_short_or_without_cudnn_is_drawn_as_far_as_it_goes(
    stored, tmp_path
):
    path = tmp_path / "my_gpu.json"
    cases = [case(1024, cudnn_compiled=2.0, fused=1.0), case(2048, fused=1.0)]
    path.write_text(json.dumps(stored | {"cases": cases}))
    mine = figures.my_gpu(path).axes[1]
    lengths = {line.get_label(): list(line.get_xdata()) for line in mine.lines}
    assert lengths["bf16, fused"] == [1024]


def test_a_record_of_one_s_own_shape_stands_beside_the_seed_s(stored, tmp_path):
    path = tmp_path / "my_gpu.json"
    path.write_text(json.dumps(stored | {"name": "shape"}))
    assert titles(figures.my_gpu(path)) == ["stored: A", "yours: A"]


def test_the_strongest_of_several_is_the_fastest_that_was_timed():
    shape = results(flash_compiled=3.0, cudnn_compiled=2.0)
    assert fastest(shape, ("flash_compiled", "cudnn_compiled")) == "cudnn_compiled"
    assert strongest(shape) == 2.0
    assert strongest(shape, ("flash_compiled", "naive")) == 3.0


def test_a_map_names_the_winner_and_how_much_faster_ours_is():
    won = case(1024, cudnn_compiled=2.0, fused=1.0, sage=4.0)
    lost = case(2048, cudnn_compiled=1.0, fused=2.0, sage=4.0)
    (ax,) = figures.who_wins({"a row": [won, lost]}).axes
    assert [text.get_text() for text in ax.texts] == ["2.00\nbf16", "0.50\ncuDNN"]


def test_a_map_says_level_where_the_interval_holds_1():
    close = case(1024, cudnn_compiled=1.0, fused=0.99, sage=4.0)
    close["results"]["fused"]["all_ms"] = [0.9, 0.98, 0.99, 1.05, 1.1]
    (ax,) = figures.who_wins({"a row": [close]}).axes
    assert [text.get_text() for text in ax.texts] == ["1.01\nlevel"]
