"""The house: its size, which way its imports run, one version, and what is installed."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "rcmlib").rglob("*.py"))
MAX_PACKAGE_LINES, MAX_FILE_LINES = 6400, 300

# Who may import whom: each part from its own floor and those below. A part that is not named
# here is an operation.
FLOORS = [
    {"coefficients", "reference"},
    {"core"},
    {"skip", "attention", "projection", "sage"},
    {"modules", "wan"},
    {"integrate"},
    {"measure"},
    {"demo"},
]
OPERATIONS = 2


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def lines(path):
    return len(path.read_text(encoding="utf-8").splitlines())


def imported(path):
    """The modules that a file imports, anywhere in it: rcmlib.core.rows, torch, ..."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name_of(path)}: a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(path):
    """The part of rcmlib that a file belongs to: sage, for rcmlib/sage/kernel.py."""
    return path.relative_to(ROOT / "rcmlib").with_suffix("").parts[0]


PARTS = {part_of(path) for path in PACKAGE} - {"__init__"}


def floor_of(part):
    floors = (number for number, parts in enumerate(FLOORS) if part in parts)
    return next(floors, OPERATIONS)


def test_the_package_is_small():
    assert sum(map(lines, PACKAGE)) <= MAX_PACKAGE_LINES


def test_no_file_of_the_package_is_long():
    long = {name_of(p): lines(p) for p in PACKAGE if lines(p) > MAX_FILE_LINES}
    assert not long


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_the_package_imports_nothing_from_outside(path):
    outside = {"benchmarks", "notebooks", "tests", "tools", "conftest"}
    assert not {module.split(".")[0] for module in imported(path)} & outside


@pytest.mark.parametrize("part", sorted(PARTS))
def test_imports_run_one_way(part):
    """rcmlib/__init__.py alone, the front door, shows all of it."""
    files = [path for path in PACKAGE if part_of(path) == part]
    modules = [module for path in files for module in imported(path)]
    used = {module.split(".")[1] for module in modules if module.startswith("rcmlib.")}
    assert not [p for p in used & PARTS if floor_of(p) > floor_of(part)]


def test_benchmarks_draw_no_figures():
    for path in (ROOT / "benchmarks").rglob("*.py"):
        figures = [m for m in imported(path) if m.startswith("notebooks.figures")]
        assert not figures, name_of(path)


def test_nobody_edits_the_path_that_python_searches():
    """The editable install finds rcmlib, benchmarks and notebooks; elsewhere make does."""
    edit = re.compile(r"sys\.path\.(insert|append|extend)|sys\.path\s*[\[+]?=")
    folders = "rcmlib", "benchmarks", "notebooks", "book", "tests", "tools", ".github"
    files = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.is_file()]
    files += [p for p in ROOT.iterdir() if p.is_file()]
    kinds = {".py", ".ipynb", ".md", ".yml", ".toml", ".txt", ""}
    texts = {
        p: p.read_bytes().decode(errors="ignore") for p in files if p.suffix in kinds
    }
    assert not [name_of(p) for p, text in texts.items() if edit.search(text)]


def test_there_is_one_version():
    names = "pyproject.toml", "CITATION.cff", "CHANGELOG.md"
    project, citation, changes = ((ROOT / n).read_text(encoding="utf-8") for n in names)
    version = tomllib.loads(project)["project"]["version"]
    assert re.search(r"^version: (.*)", citation, re.M)[1] == version
    assert re.search(r"^## ([\d.]+)", changes, re.M)[1] == version


def test_a_wheel_holds_rcmlib_and_nothing_else(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    for folder in ("rcmlib", "benchmarks", "notebooks", "tests", "tools"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet"]
    offline = ["--no-deps", "--no-build-isolation"]  # with the setuptools that is here
    subprocess.run([*pip, *offline, "."], cwd=tmp_path, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    files = {f for f in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in f}
    assert files == {name_of(path) for path in PACKAGE}


def test_what_a_test_allocates_is_poisoned(device):
    assert torch.empty(3, device=device).isnan().all()
    assert torch.empty((2, 3), dtype=torch.bfloat16, device=device).isnan().all()
    assert (torch.empty(3, dtype=torch.int8, device=device) == -1).all()
    assert torch.zeros(2, device=device).new_empty(3).isnan().all()
    assert torch.empty(3, device="meta").is_meta
    with torch.device("meta"):
        assert torch.empty(3).is_meta
