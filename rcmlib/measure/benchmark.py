"""The book's measurements: python -m rcmlib.measure.benchmark [--suite NAME …] [--out FOLDER].

Suites: ceilings (copy bandwidth, bf16 matrix rate), skip (chapter 4), attention, tiles and
scaling (chapter 6: the table, the choice of tiles, the 1/N law). Each writes one record. Every
implementation of the skip is checked first, on the very inputs it is timed on, and refused a
time if it is wrong; the record's method says against what.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import rcmlib
from rcmlib import reference
from rcmlib.measure import records, timing

TIMING = (
    "CUDA events around one call, L2 overwritten before each, the queue kept full; "
    "implementations interleaved in rounds of shuffled order; median, 10th and 90th "
    "percentile."
)
INPUTS = (
    "bf16, random normal inputs; q, k, v are views of one packed QKV; "
    "coefficients [B] in float64 (PyTorch's pipelines cast them to bf16, inside the time)."
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
SCALING = {f"N{n}": (32768 // n, 12, n, 64) for n in (2**e for e in range(8, 16))}
ATTENTION_ALONE = ("flash", "cudnn", "triton")
TILES = [
    (64, 128, 4, 2), (64, 128, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 3),
    (128, 64, 4, 2), (128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 4, 2),
]  # fmt: skip


def eager_skip(x: Tensor, f: Tensor, c_skip: Tensor, c_out: Tensor) -> Tensor:
    """The skip as PyTorch users write it: coefficients [B] in x's dtype, broadcast."""
    c_skip, c_out = (c.to(x.dtype).view(-1, 1, 1) for c in (c_skip, c_out))
    return c_skip * x + c_out * f


def compile_skip() -> Callable[..., Tensor]:
    """`eager_skip` compiled for one shape, the best that torch.compile can do."""
    return torch.compile(eager_skip, dynamic=False)


def attention_pipelines(q, k, v, x, c_skip, c_out) -> dict[str, Callable[[], Tensor]]:
    """Every way to compute the skip of an attention layer, from q, k, v, x to out."""
    from rcmlib.ops.attention import attention_forward

    batch, heads, tokens, dim = q.shape

    def sdpa(backend: SDPBackend) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                f = F.scaled_dot_product_attention(q, k, v)
            return f.transpose(1, 2).reshape(x.shape)

        return run

    compiled_skip = compile_skip()

    def attention_only() -> Tensor:
        return attention_forward(q, k, v, None, None, None, dim**-0.5, False)

    flash, cudnn = sdpa(SDPBackend.FLASH_ATTENTION), sdpa(SDPBackend.CUDNN_ATTENTION)
    return {
        "flash": flash,
        "flash_eager": lambda: eager_skip(x, flash(), c_skip, c_out),
        "flash_compiled": lambda: compiled_skip(x, flash(), c_skip, c_out),
        "cudnn": cudnn,
        "cudnn_eager": lambda: eager_skip(x, cudnn(), c_skip, c_out),
        "cudnn_compiled": lambda: compiled_skip(x, cudnn(), c_skip, c_out),
        "triton": attention_only,
        "triton_skip": lambda: rcmlib.rcm_skip(x, attention_only(), c_skip, c_out),
        "fused": lambda: rcmlib.rcm_attention(q, k, v, x, c_skip, c_out),
    }


def attention_inputs(
    batch: int, heads: int, tokens: int, dim: int
) -> tuple[Tensor, ...]:
    """Random q, k, v, x and per-sample coefficients at random noise levels, seeded."""
    random = torch.Generator("cuda").manual_seed(batch + tokens)
    options = {"device": "cuda", "dtype": torch.bfloat16, "generator": random}
    packed = torch.randn(batch, tokens, 3, heads, dim, **options)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    x = torch.randn(batch, tokens, heads * dim, **options)
    c = rcmlib.edm(torch.rand(batch, device="cuda", generator=random) * 3)
    return q, k, v, x, c.c_skip, c.c_out


def measure_attention(shapes: dict[str, tuple[int, ...]]) -> list[dict]:
    cases = []
    for name, shape in shapes.items():
        q, k, v, x, c_skip, c_out = inputs = attention_inputs(*shape)
        pipelines = attention_pipelines(*inputs)
        rows = torch.tensor([0, shape[2] // 2, shape[2] - 1], device="cuda")
        some = (q[:, :, rows], k, v, x[:, rows])
        with_skip = reference.rcm_attention(*some, c_skip, c_out)
        alone = reference.rcm_attention(*some, 0.0, 1.0)
        right = {}
        for label, run in pipelines.items():
            ref = alone if label in ATTENTION_ALONE else with_skip
            error = reference.relative_l2(run()[:, rows], ref)
            if error < 0.01:
                right[label] = run
            else:
                print(f"{name}: {label} is wrong (error {error:.2g}): not timed")
        times = timing.compare(right)
        cases.append(_case(name, dict(zip("BHND", shape, strict=True)), times))
        del q, k, v, x, inputs, pipelines, right, some
        torch.compiler.reset()
    return cases


def measure_tiles() -> list[dict]:
    """The fused kernel with other tiles than `choose_tile`'s."""
    from triton.runtime.errors import OutOfResources

    from rcmlib.ops import attention

    def run(tile, inputs):
        with mock.patch.object(
            attention, "choose_tile", lambda *_: attention.Tile(*tile)
        ):
            return rcmlib.rcm_attention(*inputs)

    cases = []
    for name in ("seed", "D128_N8192"):
        inputs = attention_inputs(*ATTENTION[name])
        expected = rcmlib.rcm_attention(*inputs)
        functions = {}
        for tile in TILES:
            label = "{} x {}, {} warps, {} stages".format(*tile)
            try:
                error = reference.relative_l2(run(tile, inputs), expected)
            except OutOfResources as reason:
                print(f"{name}: {label}: {reason}")
                continue
            if error < 0.01:
                functions[label] = partial(run, tile, inputs)
        times = timing.compare(functions)
        cases.append(
            _case(name, dict(zip("BHND", ATTENTION[name], strict=True)), times)
        )
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
        cases.append(_case(f"N{tokens}", shape, timing.compare(functions)))
        torch.compiler.reset()
    return cases


def measure_ceilings() -> list[dict]:
    source = torch.randint(-99, 99, (1 << 30,), dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    size = 8192
    a, b = torch.randn(2, size, size, device="cuda", dtype=torch.bfloat16)
    copy = timing.compare({"copy": lambda: target.copy_(source)})
    matmul = timing.compare({"matmul": lambda: a @ b})
    return [
        _case("copy", {"bytes": 2 * source.numel()}, copy),
        _case("matmul", {"M": size, "N": size, "K": size, "flop": 2 * size**3}, matmul),
    ]


class Suite(NamedTuple):
    """What one record holds, how it was taken (beside TIMING), and what takes it."""

    what: str
    method: str
    run: Callable[[], list[dict]]


SUITES = {
    "ceilings": Suite(
        "The machine's ceilings: a 1 GiB device-to-device copy (bytes read and written) and "
        "an 8192³ bf16 matrix product on random data.",
        "PyTorch's own copy_ and matmul, not checked.",
        measure_ceilings,
    ),
    "skip": Suite(
        "The skip alone, B=4, C=768: a copy of as many bytes, eager, compiled, Triton.",
        f"{INPUTS} Each skip checked against float64 first.",
        measure_skip,
    ),
    "attention": Suite(
        "Attention with the skip: two-pass pipelines and the fused kernel.",
        f"{INPUTS} {THREE_ROWS}",
        lambda: measure_attention(ATTENTION),
    ),
    "tiles": Suite(
        "The fused kernel with several tiles: rows x keys, warps a program, pipeline stages.",
        f"{INPUTS} Each checked first against the tile that rcmlib chooses.",
        measure_tiles,
    ),
    "scaling": Suite(
        "The same at 32768 tokens in all (B·N), from many short sequences to one long one.",
        f"{INPUTS} {THREE_ROWS}",
        lambda: measure_attention(SCALING),
    ),
}


def _case(name: str, shape: dict, times: dict[str, timing.Timing]) -> dict:
    results = {label: t._asdict() for label, t in times.items()}
    return {"name": name, **shape, "results": results}


def table(cases: list[dict]) -> str:
    """Median milliseconds, one row a case."""
    labels = list(dict.fromkeys(label for c in cases for label in c["results"]))
    lines = ["".join(f"{h:>16}" for h in ["case", *labels])]
    for c in cases:
        times = (c["results"].get(label, {}).get("median_ms") for label in labels)
        cells = [c["name"], *("-" if t is None else f"{t:.4f}" for t in times)]
        lines.append("".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--out", type=Path, default=records.FOLDER)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device here, so nothing can be measured; the stored records are "
                 f"in {records.FOLDER.name}/: {', '.join(records.names())}")  # fmt: skip
    for name in options.suite:
        suite = SUITES[name]
        cases = suite.run()
        method = f"{TIMING} {suite.method}"
        records.save(name, suite.what, method, cases, options.out)
        print(f"{name}: {suite.what}\n{table(cases)}\n")


if __name__ == "__main__":
    main()
