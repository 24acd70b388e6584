"""From the reader's own kernel of chapter 5 to chapter 7's, one thing at a time."""

import importlib.util
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from benchmarks.stored import ROOT
from benchmarks.suites.spine import tile_name
from benchmarks.suites.suite import INPUTS, Suite
from rcmlib.measure import timing
from rcmlib.measure.benchmark import Checked, case, check, distance
from rcmlib.measure.implementations import (
    IMPLEMENTATIONS,
    Inputs,
    Run,
    attention_inputs,
    implementation,
    installed,
)
from rcmlib.reference import merge_heads

SHAPES = {"D64": (2, 16, 8192, 64), "D128": (2, 16, 8192, 128)}  # (B, H, N, D)
BESIDE = ("fused", "cudnn", "fa4", "cudnn_compiled", "fa4_compiled")
NOTEBOOK = ROOT / "notebooks" / "05_attention_tile_by_tile.ipynb"
READERS = ("load_tile", "one_tile", "attention", "my_attention")
HEADER = (
    "import numpy as np\nimport torch\nimport triton\nimport triton.language as tl\n"
)


def readers_kernel(notebook: Path = NOTEBOOK) -> Callable[..., Tensor]:
    """`my_attention` as chapter 5 has it: its cells, as a module.

    ValueError where a cell is missing, or where there are two.
    """
    cells = [
        "".join(cell["source"])
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "code"
    ]
    parts = [HEADER]
    for name in READERS:
        own = [cell for cell in cells if re.search(rf"^def {name}\(", cell, re.M)]
        if len(own) != 1:
            raise ValueError(
                f"{notebook.name}: {len(own)} cells define {name}, need one"
            )
        parts += own
    with tempfile.TemporaryDirectory() as folder:  # Triton reads a function's source
        path = Path(folder, "chapter_5.py")
        path.write_text("\n\n".join(parts), encoding="utf-8")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module.my_attention


def readers_run(inputs: Inputs) -> Run:
    """It takes contiguous [B·H, N, D], copied here, and returns that, its heads not merged."""
    q, k, v = (t.flatten(0, 1).contiguous() for t in inputs[:3])
    return partial(readers_kernel(), q, k, v)


def chosen(inputs: Inputs) -> tuple[object, object]:
    """What the library would launch of its two kernels: a Tile of the plain one, a Team of
    Hopper's, or None on another GPU."""
    from rcmlib.attention.tiles import choose_team, choose_tile
    from rcmlib.core import device_capability, multiprocessors

    q = inputs.q
    batch, heads, tokens, dim = q.shape
    capability, sms = device_capability(q.device), multiprocessors(q.device)
    shape = (batch * heads, tokens, tokens, dim)
    team = choose_team(shape, q.dtype, capability, False, sms)
    return choose_tile(dim, q.dtype, capability), team


def refused(name: str, sizes: dict) -> dict:
    """The case of a GPU for which there is no team. The suites after it go on."""
    return case(
        name, sizes, {}, Checked({}, {}, {"team": "not supported: no Hopper GPU"})
    )


def rungs(inputs: Inputs) -> dict[str, tuple[object, dict]]:
    """By label: a Tile or Team that attention alone is to be launched with, and how it departs
    from the plan that the library would make for it. On Hopper."""
    from rcmlib.attention.tiles import choose_tile
    from rcmlib.core import device_capability
    from rcmlib.core.launch import Team

    q = inputs.q
    table = partial(choose_tile, q.shape[-1], q.dtype, device_capability(q.device))
    tile, best = chosen(inputs)
    one = table(pairs=False)
    two = tile if tile.two else replace(one, two=True, maxnreg=None)
    team = Team(block_n=128, groups=2, stages=2, registers=240, fixed=True)
    found = {
        "tiles": (table(tma=False, pairs=False, long=False), {"tma": False}),
        "tma": (table(pairs=False, long=False), {}),
        "kept": (one, {}),
        "two_blocks": (two, {}),
    }
    if not tile.two:  # at D = 64, where a third program on an SM may be worth more
        found["two_blocks_168"] = (replace(two, maxnreg=168), {})
    found |= {
        "team": (team, {"persistent": False}),
        "persistent": (team, {}),
        "turns": (replace(team, turns=True), {}),
    }
    if best.groups == 3:
        found["three_groups"] = (best, {})
    return found


def planned(inputs: Inputs, how, tma: bool = True, persistent: bool = True):
    """The launch of attention alone. Not persistent: a program for each task. Without tma:
    tiles are read by pointers."""
    from rcmlib.attention.forward import attention_plan
    from rcmlib.core.launch import Plan, Team

    plan = attention_plan(*inputs[:3], None, False, False, how)
    if isinstance(how, Team):
        if not persistent:
            tasks, *_ = plan.numbers
            plan.grid = (tasks, 1, 1)
    elif not tma:
        variant = replace(plan.constants["HOW"], tma=False)
        constants = plan.constants | {"HOW": variant}
        plan = Plan(plan.kernel, plan.grid[0], *plan.numbers, **constants)
    return plan


def rung(inputs: Inputs, how, **departs) -> Run:
    from rcmlib.attention.forward import attention_forward

    plan = planned(inputs, how, **departs)
    scale = inputs.q.shape[-1] ** -0.5
    alone = (*inputs[:3], None, None, None)
    return lambda: attention_forward(*alone, scale, False, plan=plan)[0]


def in_words(how) -> str:
    """A Tile or Team, for the record."""
    if hasattr(how, "groups"):
        return f"{how.groups} groups of 64 x {how.block_n}, {how.stages} stages"
    return tile_name(*astuple(how))


def all_runs(inputs: Inputs) -> tuple[dict[str, Run], dict[str, str]]:
    """(every rung and what stands beside them, as calls; with what each rung is compiled)."""
    found = rungs(inputs)
    runs = {"chapter_5": readers_run(inputs)}
    runs |= {label: rung(inputs, how, **d) for label, (how, d) in found.items()}
    runs |= {label: implementation(label, inputs) for label in installed(BESIDE)}
    return runs, {label: in_words(how) for label, (how, _) in found.items()}


def ladder_case(name: str) -> Iterator[dict]:
    batch, heads, tokens, dim = SHAPES[name]
    sizes = dict(zip("BHND", SHAPES[name], strict=True))
    sizes["flop"] = 4 * batch * heads * tokens**2 * dim
    inputs = attention_inputs(*SHAPES[name])
    if chosen(inputs)[1] is None:
        yield refused(name, sizes)
        return
    runs, compiled = all_runs(inputs)
    error = distance(inputs)

    def wrong_by(label: str, out: Tensor) -> float:
        if label == "chapter_5":
            out = merge_heads(out.view(inputs.q.shape))
        return error(label if label in IMPLEMENTATIONS else "triton", out)

    checked = check(name, runs, wrong_by, lambda _: 0.01)
    times = timing.compare(checked.runs, failed=checked.failed)
    yield case(name, sizes | {"compiled": compiled}, times, checked)


SUITES = {
    "ladder": Suite(
        "Attention from the reader's kernel of chapter 5 to the library's on Hopper, one "
        "thing at a time, then with the skip (fused); cuDNN and FlashAttention-4 beside it.",
        f"{INPUTS} Three query rows of each checked against float64 first. chapter_5: the "
        "notebook's own cells, on contiguous copies made before; it poisons its result, in the "
        "time, and leaves its heads unmerged. compiled: tile or team of "
        "each rung, the best that is known for it.",
        ladder_case,
        [(name,) for name in SHAPES],
    )
}
