"""The commands, wherever they run: make, python -m rcmlib.demo and benchmarks, tools/."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import COMMANDS
from tests.inputs import without_a_gpu

ROOT = Path(__file__).parent.parent


def run(*arguments, **environment):
    """Python with these arguments, in the clone."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


# ---- python -OO: no docstrings, no asserts ----

EVERY_FUNCTION = """
import torch, rcmlib

assert False  # is not there
device = "cuda" if torch.cuda.is_available() else "cpu"
q, k, v = torch.randn(3, 2, 2, 20, 16, device=device)
x, w = torch.randn(2, 20, 32, device=device), torch.randn(32, 32, device=device)
t = torch.rand(2, device=device)
for coefficients in (rcmlib.edm, rcmlib.trigflow, rcmlib.rectified_flow):
    c = coefficients(t)[:2]
    exact = rcmlib.reference.rcm_attention(q, k, v, x, *c)
    print(rcmlib.reference.relative_l2(rcmlib.rcm_attention(q, k, v, x, *c), exact))
    print(rcmlib.reference.relative_l2(rcmlib.rcm_sage_attention(q, k, v, x, *c), exact))
rcmlib.rcm_skip(x, x, *c)
rcmlib.rcm_projection(x, w, None, x, *c)
rcmlib.gated_projection(x, w, None, x, x)
for layer in (
    rcmlib.BaselineRCMAttention, rcmlib.FusedRCMAttention, rcmlib.TritonFusedRCMAttention
):
    layer(32, 2).to(device)(x, t).sum().backward()
model = rcmlib.TransformerBlock(32, 2).to(device)
rcmlib.integrate.fuse(model)
model(x, t).sum().backward()
rcmlib.integrate.unfuse(model)
try:
    rcmlib.rcm_attention(q, k, v[:1], x, *c)
except ValueError as refused:
    print(refused)
try:
    rcmlib.benchmark_all_implementations(1, 16, 33, 2)
except ValueError as refused:
    print(refused)
"""


def test_every_public_function_works_without_docstrings_and_asserts():
    done = run("-OO", "-c", EVERY_FUNCTION)
    assert done.returncode == 0, done.stderr
    *errors, shape, sizes = done.stdout.splitlines()
    assert max(map(float, errors[::2])) < 1e-5  # in float32
    assert max(map(float, errors[1::2])) < 0.1  # in 8 bits
    assert shape.startswith("v must have k's shape")
    assert sizes.startswith("C must be a multiple of num_heads")


def test_the_demo_runs_without_docstrings_and_asserts():
    done = run("-OO", "-m", "rcmlib.demo")
    assert done.returncode == 0 and "equals x        True" in done.stdout


HELP = {
    "benchmarks.__main__": ("-m", "benchmarks"),
    **{
        f"benchmarks.{f}": ("-m", "benchmarks", c, "--help")
        for c, f in COMMANDS.items()
    },
    "tools.portable": ("tools/portable.py",),
    "tools.execute": ("tools/execute.py",),
}


@pytest.mark.parametrize("module", HELP)
def test_help_is_whole_without_docstrings(module):
    if module == "tools.execute":
        pytest.importorskip("nbclient")  # a GPU host may have none
    done = run("-OO", *HELP[module])
    text = importlib.import_module(module).__doc__.strip()
    assert text in done.stdout + done.stderr


# ---- a reader that leaves, as head does ----


@pytest.mark.parametrize("buffered", [True, False], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize(
    "command",
    [
        ("-m", "rcmlib.demo"),
        ("-m", "benchmarks"),
        ("-m", "benchmarks", "suites", "--help"),
        pytest.param(("-m", "benchmarks", "suites", "attention"), marks=without_a_gpu),
        ("tools/portable.py", "true"),
        ("tools/execute.py", "empty.ipynb"),
    ],
    ids=" ".join,
)
def test_a_command_whose_reader_has_left_ends_in_silence(command, buffered, tmp_path):
    if "empty.ipynb" in command:
        nbformat = pytest.importorskip("nbformat")
        pytest.importorskip("nbclient")
        notebook = tmp_path / "empty.ipynb"
        nbformat.write(nbformat.v4.new_notebook(), notebook)
        command = (command[0], notebook)
    environment = os.environ | {"PYTHONUNBUFFERED": "" if buffered else "1"}
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write) as closed:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
        )
    # argparse itself takes no notice; a notebook's kernel talks on stderr.
    assert done.returncode in ((0, 1) if "--help" in command else (1,))
    assert "BrokenPipeError" not in done.stderr
    assert not done.stderr or "tools/execute.py" in command


# ---- where only ASCII can be shown ----


@pytest.mark.parametrize(
    "command",
    [
        ("-m", "rcmlib.demo"),
        pytest.param(("-m", "benchmarks", "suites", "attention"), marks=without_a_gpu),
        *(("-m", "benchmarks", name, "--help") for name in COMMANDS),
    ],
    ids=" ".join,
)
def test_a_command_runs_where_only_ascii_can_be_shown(command):
    done = run(*command, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and not done.stderr and done.stdout.isascii()


# ---- make ----


@pytest.fixture
def make(tmp_path):
    """What `make ARGUMENTS` would do in a fresh clone, with this in the environment."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)

    def plan(*arguments, **environment):
        # Without what a make that runs these tests tells its children.
        own = {k: v for k, v in os.environ.items() if "MAKE" not in k and k != "MFLAGS"}
        return subprocess.run(
            ["make", "-n", *arguments],
            cwd=tmp_path,
            env=own | environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    return plan


EXPORTED = {
    "PYTHON": "python9",
    "READY": "nothing",
    "NB": "mine.ipynb",
    "NOTEBOOKS": "mine",
    "NBVAL": "mine",
    "WORKERS": "99",
    "GPU_WORKERS": "99",
    "PART": "mine",
    "URL": "https://mine.org",
    "BOOK_URL": "https://mine.org",
    "TAGS": "mine",
    "OK": "mine",
}


@pytest.mark.parametrize(
    "target", ["book", "test", "portable", "gpu", "lab", "execute", "wheelhouse"]
)
def test_no_name_in_the_environment_changes_what_make_does(target, make):
    shown = make(target)
    assert "pip install" in shown and ".venv/bin/python -m" in make("test")
    assert make(target, **EXPORTED) == shown


def test_a_python_on_make_s_command_line_is_used_as_it_is(make):
    for exported in ({}, {"PYTHON": "python8"}):
        shown = make("test", "PYTHON=python9", **exported)
        assert "python9 -m pytest" in shown and "python9 -m ruff" in shown
        assert "python9 -c 'from jupyter_book" in shown  # make, called by make
        assert "python9 -m pytest" in make("gpu", "PYTHON=python9", **exported)
        assert "pip install" not in shown and ".venv" not in shown


def test_what_else_is_said_on_make_s_command_line_counts(make):
    assert "tools/execute.py one.ipynb" in make("execute", "NB=one.ipynb")
    assert "BOOK_URL=https://a.org " in make("book", "URL=https://a.org")
    assert " -n 7 " in make("test", "WORKERS=7")
    shown = make("gpu", "PART=tests", "GPU_WORKERS=7")
    assert " pytest tests --nbval" in shown and " -n 7 " in shown
