"""Whole modules, eager, compiled and as CUDA graphs; and what a launch costs on the host."""

import copy
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rcmlib
from benchmarks.host import host_time, wall
from benchmarks.suites.blocks import backends
from benchmarks.suites.suite import Suite
from rcmlib import integrate, modules, reference
from rcmlib.measure import timing
from rcmlib.measure.benchmark import case, check
from rcmlib.measure.implementations import attention_inputs

C, HEADS = 768, 12
LAYERS = {"B1_N256": (1, 256), "seed": (4, 2048)}  # (B, N)
MODES = {
    "eager": None,
    "compiled": "max-autotune-no-cudagraphs",
    "graph": "max-autotune",  # torch.compile replays a CUDA graph
}
NAMES = ("baseline", "fused_pytorch", "fused", "block", "block_fused")


def build() -> dict[str, nn.Module]:
    """The layers share their weights; so do the blocks."""
    torch.manual_seed(0)
    baseline, fused_pytorch, fused = (
        kind(C, HEADS)
        for kind in (
            modules.BaselineRCMAttention,
            modules.FusedRCMAttention,
            modules.TritonFusedRCMAttention,
        )
    )
    for layer in (fused_pytorch, fused):
        layer.load_state_dict(baseline.state_dict())
    block = modules.TransformerBlock(C, HEADS)
    block_fused = copy.deepcopy(block)
    integrate.fuse(block_fused)
    built = (baseline, fused_pytorch, fused, block, block_fused)
    return {n: module.cuda().bfloat16() for n, module in zip(NAMES, built, strict=True)}


def layer_cases(name: str) -> Iterator[dict]:
    """GPU time (the case `name`) and time a call as a program sees it (`name`_wall)."""
    batch, tokens = LAYERS[name]
    built = build()
    x = torch.randn(batch, tokens, C, device="cuda", dtype=torch.bfloat16)
    t = torch.rand(batch, device="cuda") * 3

    @torch.no_grad()
    def run(module: nn.Module, x: Tensor = x) -> Tensor:
        return module(x, t)

    exact = {
        kind: run(copy.deepcopy(built[kind]).float(), x.float())
        for kind in ("baseline", "block")
    }

    def error(label: str, out: Tensor) -> float:
        kind = "block" if label.startswith("block") else "baseline"
        return reference.relative_l2(out, exact[kind])

    runs = {}
    for label, mode in variants(name):
        module = built[label]
        if MODES[mode]:
            module = torch.compile(module, mode=MODES[mode], dynamic=False)
        runs[f"{label}_{mode}"] = partial(run, module)
    checked = check(name, runs, error, lambda _: 0.05)
    sizes = {"B": batch, "N": tokens, "C": C, "H": HEADS, "seed": 0}
    sizes["backends"] = sorted(backends(partial(run, built["baseline"])))
    times = timing.compare(checked.runs, failed=checked.failed)
    peaks = {label: timing.peak_bytes(runs[label]) for label in times}
    yield case(name, sizes | {"peak_bytes": peaks}, times, checked)
    yield case(f"{name}_wall", sizes, wall(checked.runs, failed=checked.failed))


def variants(name: str) -> list[tuple[str, str]]:
    """What is timed at a shape: (module, mode). max-autotune compiles slowly, so one a module.

    At the seed's shape the GPU, not Python, is the slower one: no graph. The compiler makes
    the same of FusedRCMAttention's expression as of the baseline's.
    """
    best = "compiled" if name == "seed" else "graph"
    return [
        (module, mode)
        for module in NAMES
        for mode in ("eager", best)
        if mode == "eager" or module != "fused_pytorch"
    ]


def launch_case(name: str) -> Iterator[dict]:
    """The host time of a call at a shape that keeps the GPU busy for less than that."""
    shape = (1, 12, 256, 64)
    q, k, v, x, *c = attention_inputs(*shape)
    if name == "numbers":
        c = [0.5, 0.5]
    f = torch.randn_like(x)
    functions = {
        "sdpa": partial(F.scaled_dot_product_attention, q, k, v),
        "rcm_attention": partial(rcmlib.rcm_attention, q, k, v, x, *c),
        "rcm_skip": partial(rcmlib.rcm_skip, x, f, *c),
        "rcm_sage_attention": partial(rcmlib.rcm_sage_attention, q, k, v, x, *c),
    }
    times = {label: host_time(fn) for label, fn in functions.items()}
    sizes = dict(zip("BHND", shape, strict=True)) | {"seed": 0}
    yield case(name, sizes, times)


SUITES = {
    "layers": Suite(
        "The rCM attention layer (baseline, PyTorch-fused, fused) and a transformer block "
        "before and after `fuse`; eager, compiled, and compiled with a CUDA graph. Cases "
        "*_wall: the time of a call, Python included.",
        "bf16, forward, C = 768, 12 heads; compiled: torch.compile's "
        "max-autotune-no-cudagraphs; graph: max-autotune. Each checked first against the "
        "baseline in float32. *_wall: 20 calls in a row, until the GPU is done, divided by 20; "
        "L2 as it is. backends: which attention the baseline's SDPA reaches. peak_bytes does "
        "not see the memory that a CUDA graph keeps for itself.",
        layer_cases,
        [(name,) for name in LAYERS],
        reference="baseline_eager",
    ),
    "launch": Suite(
        "The host time of one call: Python and driver, until its launches are queued.",
        "bf16, q, k, v views of one packed QKV; coefficients: a tensor [B] (per_sample), or "
        "two numbers.",
        launch_case,
        [("per_sample",), ("numbers",)],
        timing="Host clock around one call, the GPU at most 9 calls behind; median, 10th and "
        "90th percentile.",
        reference="sdpa",
    ),
}
