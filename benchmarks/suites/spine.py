"""Chapters 2 to 6: the skip, attention with it, the choice of tiles, the 1/N law."""

from functools import partial
from unittest import mock

import torch

import rcmlib
from benchmarks.suites.suite import INPUTS, Suite, case, side_by_side
from rcmlib import reference
from rcmlib.measure import timing
from rcmlib.measure.implementations import (
    BF16,
    attention_inputs,
    compile_skip,
    eager_skip,
)

THREE_ROWS = "Three query rows of each checked against float64 first."
# name: (B, H, N, D)
ATTENTION = {
    "N1024": (4, 12, 1024, 64),
    "seed": (4, 12, 2048, 64),
    "N4096": (4, 12, 4096, 64),
    "N8192": (4, 12, 8192, 64),
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


def measure_tiles() -> list[dict]:
    """The fused kernel with other tiles than `choose_tile`'s."""
    from triton.runtime.errors import OutOfResources

    from rcmlib.attention import forward as attention
    from rcmlib.core.launch import by_layout

    def with_tile(tile, inputs):
        find = by_layout(attention.attention_plan.__wrapped__)
        with mock.patch.object(attention, "choose_tile", lambda *_: tile):
            plan = find(*inputs, False, False)
        scale = inputs[0].shape[-1] ** -0.5
        return lambda: attention.attention_forward(*inputs, scale, False, plan=plan)[0]

    cases = []
    for name, tiles in TILES.items():
        inputs = attention_inputs(*ATTENTION[name])
        expected = rcmlib.rcm_attention(*inputs)
        functions = {}
        for tile in tiles:
            tile = attention.Tile(*tile)
            label = "2 x " * tile.two + "{} x {}, {} warps, {} stages".format(*tile)
            label += f", {tile.maxnreg} registers" if tile.maxnreg else ""
            label += "" if tile.fixed else ", online softmax"
            run = with_tile(tile, inputs)
            try:
                error = reference.relative_l2(run(), expected)
            except OutOfResources as reason:
                print(f"{name}: {label}: {reason}")
                continue
            if error < 0.01:
                functions[label] = run
        times = timing.compare(functions)
        cases.append(case(name, dict(zip("BHND", ATTENTION[name], strict=True)), times))
    return cases


def measure_skip() -> list[dict]:
    cases = []
    for tokens in (1024, 2048, 8192, 32768):
        _, _, _, x, c_skip, c_out = attention_inputs(4, 1, tokens, 768)
        f = torch.randn_like(x)
        source, target = torch.empty(
            2, x.numel() * 3 // 2, device="cuda", dtype=x.dtype
        )
        functions = {
            "copy": partial(target.copy_, source),
            "eager": partial(eager_skip, x, f, c_skip, c_out),
            "compiled": partial(compile_skip(), x, f, c_skip, c_out),
            "triton": partial(rcmlib.rcm_skip, x, f, c_skip, c_out),
        }
        ref = reference.skip(x, f, c_skip, c_out)
        for label in ("eager", "compiled", "triton"):
            error = reference.relative_l2(functions[label](), ref)
            if error >= 0.01:
                raise AssertionError(f"{label} is wrong: error {error:.2g}")
        shape = {
            "B": 4,
            "N": tokens,
            "C": 768,
            "bytes": 3 * x.numel() * x.element_size(),
        }
        cases.append(case(f"N{tokens}", shape, timing.compare(functions)))
        timing.free()
    return cases


SUITES = {
    "skip": Suite(
        "The skip alone, B=4, C=768: a copy of as many bytes, eager, compiled, Triton.",
        f"{INPUTS} Each skip checked against float64 first.",
        measure_skip,
        reference="copy",
    ),
    "attention": Suite(
        "Attention with the skip: two-pass pipelines and the fused kernel.",
        f"{INPUTS} {THREE_ROWS}",
        side_by_side(ATTENTION, BF16),
    ),
    "tiles": Suite(
        "The fused kernel with several tiles: rows x keys, warps a program, pipeline stages.",
        f"{INPUTS} Each checked first against the tile that rcmlib chooses.",
        measure_tiles,
    ),
    "one_over_n": Suite(
        "The same at 32768 tokens in all (B·N), from many short sequences to one long one.",
        f"{INPUTS} {THREE_ROWS}",
        side_by_side(ONE_OVER_N, BF16),
    ),
}
