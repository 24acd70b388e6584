"""The hygiene checkers, each shown something bad: a checker that cannot fail checks nothing."""

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from rcmlib.measure.records import Estimate
from tests.hygiene import (
    MAX_COLUMNS,
    MAX_LINES,
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
)


def code(source, outputs=(), tags=(), count=1, **metadata):
    cell = new_code_cell(source, outputs=list(outputs), execution_count=count)
    cell.metadata.update(tags=list(tags), **metadata)
    return cell


def book(*cells):
    return new_notebook(
        cells=[new_markdown_cell(c) if c is str(c) else c for c in cells]
    )


def printed(text, name="stdout"):
    return new_output("stream", name=name, text=text)


PNG = new_output("display_data", data={"image/png": "", "text/plain": "<Figure>"})
FIGURE = {
    "image": {"alt": "two bars, the fused one half as long"},
    "figure": {"caption": "Fusion halves the time.", "name": "fig-bars"},
}
IMPORTS = code("import torch")
NUMBERS = {
    "ratio": lambda *_: 2.0123,
    "median_ms": lambda *_: 0.131,
    "estimate": lambda *_: Estimate(-2.0123, -2.0267, -1.99),
}
LIB = [["def skip(x):", "# scaled", *(f"x = x + {i}" for i in range(8)), "return x"]]
SOURCE = "from rcmlib import skip\nprint(inspect.getsource(skip))"
GOOD_CHAPTER = (
    "# Title\n\nOne promise.\n\n*You will learn to* count.\n\n*You need* 20 minutes.",
    IMPORTS,
    "## Bytes\n\n**Takeaway.** Fewer.\n\n## Exercises\n\n## Summary\n\nDone.",
    "## Further reading\n\n{cite:t}`a`\n\nNext: [chapter 2](02_two.ipynb)",
)

BAD = {
    "a cell never executed": (check_executed_in_order, book(code("1", count=None))),
    "cells out of order": (
        check_executed_in_order,
        book(code("1"), code("2", count=3)),
    ),
    "a print without output": (
        check_verdicts_are_shown,
        book(IMPORTS, code("print(1)")),
    ),
    "a value without output": (check_verdicts_are_shown, book(IMPORTS, code("x == 1"))),
    "a silent guarded cell": (
        check_verdicts_are_shown,
        book(IMPORTS, code("if GPU:\n    print(1)")),
    ),
    "stderr": (check_outputs_are_clean, book(code("f()", [printed("hm", "stderr")]))),
    "a path": (check_outputs_are_clean, book(code("f()", [printed("/home/me/x.py")]))),
    "an address": (
        check_outputs_are_clean,
        book(code("f", [printed("<function f at 0x7f1234567890>")])),
    ),
    "a warning": (
        check_outputs_are_clean,
        book(code("f()", [printed("UserWarning: x")])),
    ),
    "an unknown tag": (check_tags, book(code("1", tags=["nbval-skip"]))),
    "a comment for nbval": (check_tags, book(code("# NBVAL_SKIP\nf()"))),
    "ignored and last": (
        check_ignored_outputs_have_a_verdict,
        book(code("f()", tags=["nbval-ignore-output"])),
    ),
    "ignored, then silent": (
        check_ignored_outputs_have_a_verdict,
        book(code("f()", tags=["nbval-ignore-output"]), code("x = 1")),
    ),
    "one exercise": (
        check_exercises,
        book(
            "### Exercise 1 (easy)",
            code(
                "# Solution 1: x\nassert True\nprint(1)",
                [printed("1")],
                ["hide-cell", "solution"],
            ),
        ),
    ),
    "no solutions": (
        check_exercises,
        book("### Exercise 1 (easy)", "### Exercise 2 (easy)"),
    ),
    "a figure without metadata": (check_figures, book(code("plt.show()", [PNG]))),
    "a figure not shown": (check_figures, book(code("draw()", [PNG], mystnb=FIGURE))),
    "an image without alt text": (check_figures, book("![](bars.png)")),
    "a long cell": (check_cell_sizes, book(code("x = 1\n" * MAX_LINES + "y"))),
    "a long line": (check_cell_sizes, book(code("x = " + "1" * MAX_COLUMNS))),
    "a first cell that works": (
        check_first_cell_imports,
        book(code("x = torch.ones(3)")),
    ),
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_a_checker_complains_about(case):
    checker, notebook = BAD[case]
    assert checker(notebook)


@pytest.mark.parametrize(
    "text",
    [
        "it is 2.01× faster",
        "it takes 0.131 ms",
        "| 3.35 TB/s |",
        "**2.5**<!--= ratio('a') --> no format",
        "2.02×<!--= ratio('a', 'b'):.2f --> faster",
        "**2.02×**<!--= ratio('a', 'b'):.2f --> faster",
        "no number<!--= ratio('a', 'b'):.2f --> here",
        "−2.01<!--= estimate('a', 'b'):.2f --> without its interval",
        "−2.01× [−2.03, −1.98]<!--= estimate('a', 'b'):.2f --> another one",
        "2.01× [2.00, 2.03]<!--= ratio('a', 'b'):.2f --> of no estimate",
        "2.01×<!--= ratio('a', 'b'):.2f --> [2.00, 2.03], typed by hand",
        "saves 52 µs [48, 60] or so",
        "52 %<!--= ratio('a', 'b'):.2f --> [48, 60]",
    ],
)
def test_a_number_without_its_record_is_found(text):
    assert check_quoted_numbers(text, NUMBERS)


@pytest.mark.parametrize(
    "text",
    [
        "it is 2.01×<!--= ratio('a', 'b'):.2f --> faster",
        "it is −2.01× [−2.03, −1.99]<!--= estimate('a', 'b'):.2f --> faster",
        "saves **-2.0 µs** [-2.0, -2.0]<!--= estimate('a'):.1f --> of all",
        "an interval [0, 1], a row [1.5, 2] and a share [0.2, 0.4] of a whole",
        'in **0.131 ms**<!--= median_ms("a", "b", "c"):.3f -->',
        "a 64×128 tile, 64 × 64, an N×N matrix, 8 × D bytes and 2×10⁻⁶",
        "`2.01×` and $2\\,\\times$ and 3.35 TB/s<!-- given: data sheet -->",
        "    indented code: 2.01× faster",
    ],
)
def test_a_number_with_its_record_passes(text):
    assert not check_quoted_numbers(text, NUMBERS)


@pytest.mark.parametrize("shown", ["x = x + 1\nx = x + 3", "def old(x):\nreturn x", ""])
def test_stale_or_cut_library_source_is_found(shown):
    notebook = book(code(SOURCE, [printed(shown)]))
    assert check_shown_source(notebook, LIB)


def test_current_library_source_passes():
    notebook = book(code(SOURCE, [printed("\n".join(LIB[0][:4]) + "\n")]))
    assert not check_shown_source(notebook, LIB)


def test_a_pasted_copy_is_found_and_five_lines_are_not():
    six, five = ("\n".join(f"    x = x + {i}" for i in range(n)) for n in (6, 5))
    assert check_no_pasted_source(book(code(six)), LIB)
    assert not check_no_pasted_source(book(code(five)), LIB)


@pytest.mark.parametrize(
    "shown",
    ["4.114285714285714", "x = -0.30000000000000004", "[1.1102230246251565e-16]"],
)
def test_a_float_in_full_precision_is_found(shown):
    result = new_output("execute_result", data={"text/plain": shown})
    for output in (printed(shown), result):
        assert check_no_full_precision(book(code("f()", [output])))


@pytest.mark.parametrize("shown", ["4.1143", "2⁻²⁰ = 9.5367431640625e-07"])
def test_a_rounded_or_exact_number_passes(shown):
    assert not check_no_full_precision(book(code("f()", [printed(shown)])))


def test_figures_of_the_reader_s_own_machine_may_have_any_digits():
    cell = code("f()", [printed("4.114285714285714")], ["nbval-ignore-output"])
    assert not check_no_full_precision(book(cell))


def test_a_complete_chapter_passes():
    assert not check_chapter_structure(book(*GOOD_CHAPTER), "01_one", "02_two")


@pytest.mark.parametrize(
    "part",
    [
        "# Title",
        "One promise.",
        "You will learn to",
        "You need",
        "minutes",
        "Takeaway",
        "## Exercises",
        "## Summary",
        "## Further reading",
        "{cite:t}",
        "02_two",
    ],
)
def test_a_chapter_that_lacks_a_part_is_found(part):
    cells = [c.replace(part, "") if c is not IMPORTS else c for c in GOOD_CHAPTER]
    assert check_chapter_structure(book(*cells), "01_one", "02_two")
