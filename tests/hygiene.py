"""What a notebook or page of this book must be: checkers that return complaints.

A checker takes a notebook (or a text) and returns a list of complaints, empty if all is well.
The book's own notebooks are held to them in test_notebooks.py, and the checkers themselves to
bad examples in test_hygiene.py.
"""

import ast
import re
from decimal import Decimal
from pathlib import Path

ROOT = Path(__file__).parent.parent
CHAPTERS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
NOTEBOOKS = [*CHAPTERS, ROOT / "book" / "hardware.ipynb"]
PAGES = [ROOT / "README.md", *sorted((ROOT / "book").glob("*.md"))]
LIBRARY = sorted(p for d in ("rcmlib", "benchmarks") for p in (ROOT / d).rglob("*.py"))

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


# Digits around a point, more of them than rounding to what a reader needs would leave.
DECIMAL = re.compile(r"(?<![\w.])\d+\.\d+(?:[eE][-+]?\d+)?(?![\w.])")
FULL_PRECISION = 13


def check_no_full_precision(notebook):
    """No compared output prints a float in full: its last digits depend on the machine.

    The order of a sum, a fused multiply-add or another BLAS moves them. Exempt is a decimal
    that a float holds exactly, such as 2⁻²⁰ = 9.5367431640625e-07: nothing was rounded there.
    """
    return [
        f"{found[0]} in full precision in: {first_line(cell)}"
        for cell in code_cells(notebook)
        if "nbval-ignore-output" not in tags(cell)
        for found in DECIMAL.finditer(output_text(cell))
        if len(re.sub(r"[eE].*|\.", "", found[0])) >= FULL_PRECISION
        and Decimal(found[0]) != Decimal(float(found[0]))
    ]


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
    """Imports, constants, the figures' style: no more."""
    complaints = []
    for node in tree(code_cells(notebook)[0]).body:
        constant = (
            isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).isupper()
        )
        setup = isinstance(node, ast.Expr) and re.match(
            r"figures\.\w+\(|torch\.manual_seed|\w*style\w*\(",
            ast.unparse(node),
        )
        if not (isinstance(node, ast.Import | ast.ImportFrom) or constant or setup):
            complaints.append(f"not an import: {ast.unparse(node)}")
    return complaints


# Numbers in prose. A comment `<!--= expression:format -->` computes the number before
# it, or with `estimate(...)` the number and its interval behind it; `<!-- given: source
# -->` says where a number not measured here comes from.
UNIT = r"(?:×(?!\w|\s?[\d*(]|\s[A-Z]\b)|(?:ms|µs|μs|us|[GT]B/s|TFLOP/s)\b)"
NUMBER = r"[-−+]?\d[\d.,]*"
COMPUTED = re.compile(r"<!--=(.*?)-->", re.DOTALL)
# What an Estimate's format writes behind its value. A unit may stand between the two.
INTERVAL = rf"\[{NUMBER}, {NUMBER}\]"
MEASURED = re.compile(
    rf"({NUMBER})[\s\u00a0\u202f]?{UNIT}"
    rf"(?![*_]*(?:\s{INTERVAL})?[*_]*\s?<!--(?:=|\s*given:))"
)
BARE_INTERVAL = re.compile(rf"(?:×|-->|[%mµμ]s?)[*_]*\s{INTERVAL}(?!\s?<!--=)")
BEFORE = re.compile(
    rf"({NUMBER})[\s\u00a0\u202f]*(?:×|%|[A-Za-zµμ]+(?:/s)?)?[*_]*"
    rf"(?:\s({INTERVAL}))?[*_]*\s?$"
)


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
        for m in [*MEASURED.finditer(text), *BARE_INTERVAL.finditer(text)]
    ]
    for comment in COMPUTED.finditer(text):
        quoted = BEFORE.search(text[: comment.start()])
        value = eval("f'''{" + comment[1].strip() + "}'''", dict(functions))
        shown = " ".join(filter(None, quoted.groups())) if quoted else None
        if shown is None or shown.replace("−", "-") != value:
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
        if not sources or not re.search("rcmlib|benchmarks", str(imports(notebook))):
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
        for needed in ("exercises", "summary", "further reading")
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
