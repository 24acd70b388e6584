"""Hygiene of the notebooks and of the prose: what nbval cannot see.

Each checker takes a notebook (or a text) and returns a list of complaints, empty when
all is well. The tests run each checker on each notebook; at the end, each checker is
given a bad notebook and must complain.
"""

import ast
import re
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).parent.parent
CHAPTERS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
NOTEBOOKS = [*CHAPTERS, ROOT / "book" / "hardware.ipynb"]
PAGES = [ROOT / "README.md", *sorted((ROOT / "book").glob("*.md"))]
LIBRARY = sorted((ROOT / "rcmlib").rglob("*.py"))

MAX_LINES, MAX_COLUMNS = 25, 88
MAX_EXERCISES, MIN_EXERCISES = 4, 2
MIN_ALT = 20  # characters: a description, not a label
PASTED_LINES = 6
TAGS = {
    "gpu",
    "nbval-ignore-output",
    "hide-input",
    "hide-output",
    "hide-cell",
    "solution",
}

# ---------------------------------------------------------------- looking at a notebook


def tags(cell):
    return set(cell.metadata.get("tags", []))


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def prose(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]


def first_line(cell):
    return cell.source.strip().split("\n")[0]


def output_text(cell):
    """All text that a cell shows: streams, results, errors."""
    parts = []
    for output in cell.outputs:
        parts += [output.get("text", ""), *output.get("traceback", [])]
        data = output.get("data", {})
        parts += [value for kind, value in data.items() if kind.startswith("text/")]
    return "\n".join(parts)


def tree(cell):
    """The cell's syntax tree; IPython's magics become blank lines."""
    return ast.parse(re.sub(r"^\s*[%!].*$", "", cell.source, flags=re.MULTILINE))


def called(node):
    """What an expression calls: a name, "[]" for kernel[grid](...), else ""."""
    if not isinstance(node, ast.Call):
        return ""
    if isinstance(node.func, ast.Subscript):
        return "[]"
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


# ----------------------------------------------------------------------------- checkers


def check_executed_in_order(notebook):
    counts = [cell.execution_count for cell in code_cells(notebook)]
    expected = list(range(1, len(counts) + 1))
    return [] if counts == expected else [f"execution counts are {counts}"]


def must_print(statements):
    """Whether the last statement shows something: a print, a figure or a value."""
    last = statements[-1] if statements else None
    if isinstance(last, ast.With | ast.For):
        return must_print(last.body)
    if isinstance(last, ast.If):  # only the guard is known to run
        return ast.unparse(last.test) == "GPU" and must_print(last.body)
    silent = {"[]", "append", "extend", "insert", "update", "copy_", "close", "add"}
    return isinstance(last, ast.Expr) and called(last.value) not in silent


def check_verdicts_are_shown(notebook):
    return [
        f"no output: {first_line(cell)}"
        for cell in code_cells(notebook)[1:]
        if not cell.source.rstrip().endswith(";")
        and must_print(tree(cell).body)
        and not cell.outputs
    ]


MACHINE = [
    (
        re.compile(r"(?<![\w.~])/(home|root|tmp|usr|opt|var|mnt|Users|work|content)/"),
        "path",
    ),
    (re.compile(r"[A-Z]:\\\w|site-packages|\.venv/"), "path"),
    (re.compile(r"\bat 0x[0-9a-fA-F]{6,}|<[\w.]+ object at"), "memory address"),
    (re.compile(r"\w*Warning\b|Traceback"), "warning or traceback"),
]


def check_outputs_are_clean(notebook):
    complaints = []
    for cell in code_cells(notebook):
        for output in cell.outputs:
            if output.output_type == "error" or output.get("name") == "stderr":
                complaints.append(f"error or stderr: {first_line(cell)}")
            if "image/svg+xml" in output.get("data", {}):
                complaints.append(f"an SVG, which nbval compares: {first_line(cell)}")
        for pattern, what in MACHINE:
            if found := pattern.search(output_text(cell)):
                complaints.append(f"{what} {found[0]!r} in: {first_line(cell)}")
    return complaints


def check_tags(notebook):
    """Only known tags; no other way around nbval."""
    complaints = []
    for cell in code_cells(notebook):
        if unknown := tags(cell) - TAGS:
            complaints.append(f"unknown tags {sorted(unknown)}")
        if re.search(r"^\s*#\s*(NBVAL|PYTEST)_", cell.source, re.MULTILINE):
            complaints.append(f"use a tag, not a comment: {first_line(cell)}")
    return complaints


def check_ignored_outputs_have_a_verdict(notebook):
    cells = code_cells(notebook)
    complaints = []
    for cell, after in zip(cells, [*cells[1:], None], strict=True):
        if "nbval-ignore-output" not in tags(cell):
            continue
        if after is None or not after.outputs or "nbval-ignore-output" in tags(after):
            complaints.append(f"no compared verdict after: {first_line(cell)}")
    return complaints


def check_exercises(notebook):
    complaints, numbers = [], []
    for index, cell in enumerate(notebook.cells):
        found = re.match(r"### Exercise (\d+)\b(.*)", cell.source)
        if cell.cell_type != "markdown" or not found:
            continue
        number = found[1]
        numbers.append(int(number))
        if not re.search(r"easy|medium|hard|open", found[2]):
            complaints.append(f"exercise {number} has no grade")
        solution = None
        for later in notebook.cells[index + 1 :]:
            if later.source.startswith("### Exercise"):
                break
            if {"solution", "hide-cell"} <= tags(later):
                solution = later
                break
        if solution is None:
            complaints.append(f"exercise {number} has no solution")
            continue
        if not first_line(solution).startswith(f"# Solution {number}"):
            complaints.append(f"solution {number} does not say so in its first line")
        if "assert" not in solution.source or not solution.outputs:
            complaints.append(f"solution {number} does not check itself and say so")
    if numbers != list(range(1, len(numbers) + 1)):
        complaints.append(f"exercises are numbered {numbers}")
    if not MIN_EXERCISES <= len(numbers) <= MAX_EXERCISES:
        complaints.append(f"{len(numbers)} exercises")
    return complaints


def check_figures(notebook):
    complaints = []
    for cell in code_cells(notebook):
        if not any("image/png" in output.get("data", {}) for output in cell.outputs):
            continue
        meta = cell.metadata.get("mystnb", {})
        if len(meta.get("image", {}).get("alt", "")) < MIN_ALT:
            complaints.append(f"no alt text: {first_line(cell)}")
        figure = meta.get("figure", {})
        if not figure.get("caption") or not figure.get("name"):
            complaints.append(f"no caption or name: {first_line(cell)}")
        if not cell.source.rstrip().endswith("plt.show()"):
            complaints.append(f"does not end with plt.show(): {first_line(cell)}")
    for text in prose(notebook):
        complaints += [
            f"no alt text: {m}" for m in re.findall(r"!\[\s*\]\([^)]*\)", text)
        ]
    return complaints


def check_cell_sizes(notebook):
    complaints = []
    for cell in code_cells(notebook):
        lines = cell.source.split("\n")
        if len(lines) > MAX_LINES:
            complaints.append(f"{len(lines)} lines: {first_line(cell)}")
        complaints += [f"{len(s)} columns: {s}" for s in lines if len(s) > MAX_COLUMNS]
    return complaints


def check_first_cell_imports(notebook):
    """Imports, the clone's root on sys.path, constants, the figures' style: no more."""
    complaints = []
    for node in tree(code_cells(notebook)[0]).body:
        constant = (
            isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).isupper()
        )
        setup = isinstance(node, ast.Expr) and re.match(
            r"sys\.path\.insert|figures\.\w+\(|torch\.manual_seed|\w*style\w*\(",
            ast.unparse(node),
        )
        if not (isinstance(node, ast.Import | ast.ImportFrom) or constant or setup):
            complaints.append(f"not an import: {ast.unparse(node)}")
    return complaints


# Numbers in prose. A comment `<!--= expression:format -->` computes the number before
# it; `<!-- given: source -->` says where a number not measured here comes from.
UNIT = r"(?:×(?!\w|\s?[\d*(]|\s[A-Z]\b)|(?:ms|µs|μs|us|[GT]B/s|TFLOP/s)\b)"
NUMBER = r"[-−+]?\d[\d.,]*"
COMPUTED = re.compile(r"<!--=(.*?)-->", re.DOTALL)
MEASURED = re.compile(
    rf"({NUMBER})[\s\u00a0\u202f]?{UNIT}(?![*_]*\s?<!--(?:=|\s*given:))"
)
BEFORE = re.compile(rf"({NUMBER})[\s\u00a0\u202f]*(?:×|%|[A-Za-zµμ]+(?:/s)?)?[*_]*\s?$")


def without_code(text):
    """The prose alone: no code, no mathematics."""
    text = re.sub(r"^(```|~~~)(?!\{).*?^\1", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"\$\$.*?\$\$", "", text, flags=re.DOTALL)
    text = re.sub(r"^( {4,}|\t)\S.*$", "", text, flags=re.MULTILINE)
    return re.sub(r"(`+)(?!`).*?\1|\$[^$\n]+\$", "", text)


def check_quoted_numbers(text, functions):
    text = without_code(text)
    complaints = [
        f"no record behind: {text[max(0, m.start() - 30) : m.end() + 10]!r}"
        for m in MEASURED.finditer(text)
    ]
    for comment in COMPUTED.finditer(text):
        quoted = BEFORE.search(text[: comment.start()])
        value = eval("f'''{" + comment[1].strip() + "}'''", dict(functions))
        if quoted is None or quoted[1].replace("−", "-") != value:
            shown = quoted[1] if quoted else None
            complaints.append(f"{comment[0]} gives {value}, the text says {shown}")
    return complaints


def library_lines():
    """For each library file, its lines without indentation."""
    texts = [path.read_text(encoding="utf-8") for path in LIBRARY]
    return [[line.strip() for line in text.split("\n")] for text in texts]


def check_shown_source(notebook, library):
    """A cell that prints inspect.getsource shows what the library holds today."""
    everywhere = {line for lines in library for line in lines}
    pairs = {pair for lines in library for pair in zip(lines, lines[1:], strict=False)}
    complaints = []
    for cell in code_cells(notebook):
        sources = len(re.findall(r"\bgetsource\(", cell.source))
        if not sources or "rcmlib" not in str(imports(notebook)):
            continue
        shown = [line.strip() for line in output_text(cell).strip().split("\n")]
        stale = [line for line in shown if line not in everywhere]
        breaks = [
            pair for pair in zip(shown, shown[1:], strict=False) if pair not in pairs
        ]
        if stale:
            complaints.append(
                f"not in the library: {stale[0]!r} in: {first_line(cell)}"
            )
        elif len(breaks) > 2 * (sources - 1) or len(shown) < 2:
            complaints.append(f"not contiguous library source: {first_line(cell)}")
    return complaints


def imports(notebook):
    """What the notebook imports, as source."""
    kinds = ast.Import | ast.ImportFrom
    cells = code_cells(notebook)
    return [
        ast.unparse(n) for c in cells for n in ast.walk(tree(c)) if isinstance(n, kinds)
    ]


def runs(lines, length=PASTED_LINES):
    """Every run of `length` lines of code; blanks, comments and brackets left out."""
    lines = [line.strip() for line in lines]
    lines = [line for line in lines if len(line) > 3 and not line.startswith("#")]
    return {tuple(lines[i : i + length]) for i in range(len(lines) - length + 1)}


def check_no_pasted_source(notebook, library):
    owned = set().union(*(runs(lines) for lines in library))
    return [
        f"a pasted copy of rcmlib: {first_line(cell)}"
        for cell in code_cells(notebook)
        if runs(cell.source.split("\n")) & owned
    ]


def check_chapter_structure(notebook, name, next_name):
    opening = notebook.cells[0].source if notebook.cells else ""
    text = "\n\n".join(prose(notebook))
    before_code = text
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            before_code = "\n\n".join(c.source for c in notebook.cells[:index])
            break
    complaints = []
    if not re.match(r"# \S.*\n+(\*\*)?[^#\s\-*>:`]", opening):
        complaints.append("the first cell is not a title and its promise")
    if (
        len(
            re.findall(
                r"^# ", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M
            )
        )
        != 1
    ):
        complaints.append("not exactly one title")
    for phrase in ["you will learn to", "you need", "minutes"]:
        if phrase not in before_code.lower():
            complaints.append(f"the opening lacks {phrase!r}")
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    titles = [section.split("\n")[0].strip().lower() for section in sections]
    ending = {"exercises", "summary", "further reading", "next", "next chapter"}
    for title, section in zip(titles, sections, strict=True):
        if title not in ending and "takeaway" not in section.lower():
            complaints.append(f"no Takeaway in section {title!r}")
    complaints += [
        f"no section {needed!r}"
        for needed in ("summary", "further reading")
        if needed not in titles
    ]
    if "further reading" in titles:
        reading = sections[titles.index("further reading")]
        if "{cite" not in reading:
            complaints.append("Further reading cites nothing")
    last = text[-1500:]
    if next_name is not None and next_name not in last:
        complaints.append(f"the end of {name} does not link {next_name}")
    if "next" not in last.lower():
        complaints.append("the end does not say what comes next")
    return complaints


# ---------------------------------------------------------------------------- the tests


def load(path):
    return nbformat.read(path, as_version=4)


def name_of(path):
    return path.name


def record_functions():
    from rcmlib.measure import records

    return {name: getattr(records, name) for name in ("record", "median_ms", "ratio")}


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


# -------------------------------------------------- the checkers, each on something bad


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
NUMBERS = {"ratio": lambda *_: 2.0123, "median_ms": lambda *_: 0.131}
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
    ],
)
def test_a_number_without_its_record_is_found(text):
    assert check_quoted_numbers(text, NUMBERS)


@pytest.mark.parametrize(
    "text",
    [
        "it is 2.01×<!--= ratio('a', 'b'):.2f --> faster",
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
        "## Summary",
        "## Further reading",
        "{cite:t}",
        "02_two",
    ],
)
def test_a_chapter_that_lacks_a_part_is_found(part):
    cells = [c.replace(part, "") if c is not IMPORTS else c for c in GOOD_CHAPTER]
    assert check_chapter_structure(book(*cells), "01_one", "02_two")
