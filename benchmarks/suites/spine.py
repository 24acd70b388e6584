"""Chapters 2 to 6: the skip, attention with it, the choice of tiles, the 1/N law."""

from collections.abc import Iterator
from functools import partial

import torch

import rcmlib
from benchmarks.suites.suite import INPUTS, Suite, side_by_side
from rcmlib import reference
from rcmlib.measure import timing
from rcmlib.measure.benchmark import case, check
from rcmlib.measure.implementations import (
    attention_inputs,
    compile_skip,
    eager_skip,
)
from rcmlib.reference import relative_l2

# The bf16 implementations of chapter 6's table.
BF16 = (
    "flash", "flash_eager", "flash_compiled", "cudnn", "cudnn_eager", "cudnn_compiled",
    "fa4", "fa4_compiled", "triton", "triton_skip", "fused",
)  # fmt: skip
THREE_ROWS = "Three query rows of each checked against float64 first."
# name: (B, H, N, D)
ATTENTION = {
    "N1024": (4, 12, 1024, 64),
    "seed": (4, 12, 2048, 64),
    "N4096": (4, 12, 4096, 64),
    "N8192": (4, 12, 8192, 64),
    "D64_N8192": (2, 16, 8192, 64),
    "D128_N2048": (4, 16, 2048, 128),
    "D128_N8192": (2, 16, 8192, 128),
    "D128_N32768": (1, 12, 32768, 128),
}
ONE_OVER_N = {f"N{n}": (32768 // n, 12, n, 64) for n in (2**e for e in range(8, 16))}
# For each shape: rows, keys, warps, stages, registers, two blocks of rows, fixed maximum.
TILES = {
    "seed": [
        (64, 128, 4, 2, 168), (64, 64, 4, 3, 128), (64, 128, 4, 2, 168, False, True),
        (64, 128, 4, 3, None, False, True), (64, 64, 4, 3, 128, False, True),
        (128, 64, 8, 3, None, False, True), (128, 128, 8, 2, None, False, True),
        (64, 64, 4, 2, 168, True, True), (64, 64, 4, 3, 168, True, True),
        (64, 64, 4, 3, None, True, True),
    ],
    "D128_N8192": [
        (64, 64, 4, 3), (64, 64, 4, 2, None, True), (64, 64, 4, 2, None, False, True),
        (64, 64, 4, 3, None, False, True), (64, 128, 4, 2, None, False, True),
        (128, 64, 8, 3, None, False, True), (128, 128, 8, 2, None, False, True),
        (64, 64, 4, 2, None, True, True),
    ],
}  # fmt: skip


def tile_name(rows, keys, warps, stages, registers=None, two=False, fixed=False) -> str:
    name = "2 x " * two + f"{rows} x {keys}, {warps} warps, {stages} stages"
    name += f", {registers} registers" if registers else ""
    return name if fixed else f"{name}, online softmax"


def tiles_case(name: str) -> Iterator[dict]:
    """The fused kernel with other tiles than the one that it chooses."""
    from rcmlib.attention.forward import attention_forward, attention_plan
    from rcmlib.core.launch import Tile

    inputs = attention_inputs(*ATTENTION[name])
    expected = rcmlib.rcm_attention(*inputs)
    scale = inputs.q.shape[-1] ** -0.5

    def fused(tile):
        plan = attention_plan(*inputs[:4], True, False, tile)
        return lambda: attention_forward(*inputs, scale, False, plan=plan)[0]

    runs = {tile_name(*tile): fused(Tile(*tile)) for tile in TILES[name]}
    checked = check(
        name, runs, lambda _, out: relative_l2(out, expected), lambda _: 0.01
    )
    times = timing.compare(checked.runs, failed=checked.failed)
    yield case(name, dict(zip("BHND", ATTENTION[name], strict=True)), times, checked)


def skip_case(tokens: int) -> Iterator[dict]:
    _, _, _, x, c_skip, c_out = attention_inputs(4, 1, tokens, 768)
    f = torch.randn_like(x)
    sizes = {"B": 4, "N": tokens, "C": 768, "bytes": 3 * x.numel() * x.element_size()}
    source, target = torch.empty(2, x.numel() * 3 // 2, device="cuda", dtype=x.dtype)
    skips = {
        "eager": partial(eager_skip, x, f, c_skip, c_out),
        "compiled": partial(compile_skip(), x, f, c_skip, c_out),
        "triton": partial(rcmlib.rcm_skip, x, f, c_skip, c_out),
    }
    ref = reference.skip(x, f, c_skip, c_out)
    checked = check(
        f"N{tokens}", skips, lambda _, out: relative_l2(out, ref), lambda _: 0.01
    )
    functions = {"copy": partial(target.copy_, source)} | checked.runs
    times = timing.compare(functions, failed=checked.failed)
    yield case(f"N{tokens}", sizes, times, checked)


SUITES = {
    "skip": Suite(
        "The skip alone, B=4, C=768: a copy of as many bytes, eager, compiled, Triton.",
        f"{INPUTS} Each skip checked against float64 first.",
        skip_case,
        [(1024,), (2048,), (8192,), (32768,)],
        reference="copy",
    ),
    "attention": side_by_side(
        "Attention with the skip: two-pass pipelines and the fused kernel.",
        THREE_ROWS,
        ATTENTION,
        BF16,
    ),
    "tiles": Suite(
        "The fused kernel with several tiles: rows x keys, warps a program, pipeline stages.",
        f"{INPUTS} Each checked first against the tile that rcmlib chooses.",
        tiles_case,
        [(name,) for name in TILES],
    ),
    "one_over_n": side_by_side(
        "The same at 32768 tokens in all (B·N), from many short sequences to one long one.",
        THREE_ROWS,
        ONE_OVER_N,
        BF16,
    ),
}
