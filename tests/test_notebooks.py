"""The notebooks and pages, held to the rules of tests/hygiene.py: what nbval cannot see."""

import nbformat
import numpy as np
import pytest

from benchmarks import records
from tests.hygiene import (
    CHAPTERS,
    NOTEBOOKS,
    PAGES,
    check_cell_sizes,
    check_chapter_structure,
    check_executed_in_order,
    check_exercises,
    check_figures,
    check_first_cell_imports,
    check_ignored_outputs_have_a_verdict,
    check_no_full_precision,
    check_no_pasted_source,
    check_outputs_are_clean,
    check_quoted_numbers,
    check_shown_source,
    check_tags,
    check_verdicts_are_shown,
    code_cells,
    library_lines,
    prose,
)


def load(path):
    return nbformat.read(path, as_version=4)


def name_of(path):
    return path.name


def record_functions():
    """The namespace of the comments behind numbers in prose: the methods of the records."""
    methods = {name: getattr(records, name) for name in dir(records) if name[0] != "_"}
    return methods | {"np": np}


every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
every_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=name_of)


@every_notebook
def test_every_code_cell_was_executed_in_order(path):
    assert not check_executed_in_order(load(path))


@every_notebook
def test_every_cell_that_should_show_something_does(path):
    assert not check_verdicts_are_shown(load(path))


@every_notebook
def test_no_output_holds_an_error_a_warning_or_a_machine_s_path(path):
    assert not check_outputs_are_clean(load(path))


@every_notebook
def test_no_compared_output_prints_a_float_in_full_precision(path):
    assert not check_no_full_precision(load(path))


@every_notebook
def test_only_known_tags_are_used(path):
    assert not check_tags(load(path))


@every_notebook
def test_an_ignored_output_is_followed_by_a_compared_verdict(path):
    assert not check_ignored_outputs_have_a_verdict(load(path))


@every_chapter
def test_every_exercise_has_a_solution_that_checks_itself(path):
    assert not check_exercises(load(path))


@every_notebook
def test_every_figure_has_alt_text_and_a_caption(path):
    assert not check_figures(load(path))


def test_no_two_figures_share_a_name():
    cells = [cell for path in NOTEBOOKS for cell in code_cells(load(path))]
    figures = [cell.metadata.get("mystnb", {}).get("figure", {}) for cell in cells]
    names = [figure["name"] for figure in figures if "name" in figure]
    assert len(names) == len(set(names))


@every_notebook
def test_cells_are_short_and_lines_fit(path):
    assert not check_cell_sizes(load(path))


@every_notebook
def test_the_first_code_cell_only_imports(path):
    assert not check_first_cell_imports(load(path))


@every_notebook
def test_every_number_quoted_in_a_notebook_equals_its_record(path):
    functions = record_functions()
    texts = prose(load(path))
    assert not [c for text in texts for c in check_quoted_numbers(text, functions)]


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_number_quoted_on_a_page_equals_its_record(path):
    text = path.read_text(encoding="utf-8")
    assert not check_quoted_numbers(text, record_functions())


@every_notebook
def test_shown_library_source_equals_the_library(path):
    assert not check_shown_source(load(path), library_lines())


@every_notebook
def test_no_cell_holds_a_pasted_copy_of_the_library(path):
    assert not check_no_pasted_source(load(path), library_lines())


@every_chapter
def test_a_chapter_keeps_the_book_s_outline(path):
    index = CHAPTERS.index(path)
    following = CHAPTERS[index + 1].stem if index + 1 < len(CHAPTERS) else None
    assert not check_chapter_structure(load(path), path.stem, following)
