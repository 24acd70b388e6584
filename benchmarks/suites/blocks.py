"""Chapter 9: the projection with the skip in its epilogue, modules and whole blocks."""

import contextlib
import copy
import re
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

import rcmlib
from benchmarks.host import graph
from benchmarks.suites.suite import Suite
from rcmlib import integrate, modules, reference
from rcmlib.measure import timing
from rcmlib.measure.benchmark import case, check
from rcmlib.measure.implementations import eager_skip
from rcmlib.wan import WanBlock

PROJECTIONS = {  # (B, N, K, C)
    "M8192_C768": (4, 2048, 768, 768),
    "M32760_C1536": (1, 32760, 1536, 1536),
    "M32760_C5120": (1, 32760, 5120, 5120),
}
LAYER = {"B": 4, "N": 2048, "C": 768, "H": 12}
WAN_BLOCK = {"C": 1536, "H": 12, "ffn": 8960}  # Wan 2.1, 1.3B
# Latent frames, rows, columns.
GRIDS = {"wan_short": (1, 30, 52), "wan_long": (21, 30, 52)}


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def largest_error(out: Tensor | tuple[Tensor, ...], ref) -> float:
    """The relative L2 error against ref; of several tensors, the largest."""
    pairs = [(out, ref)] if isinstance(out, Tensor) else zip(out, ref, strict=True)
    return max(reference.relative_l2(a, b) for a, b in pairs)


def gated(x: Tensor, f: Tensor, gate: Tensor) -> Tensor:
    return x + gate[:, None] * f


def projection_case(name: str) -> Iterator[dict]:
    batch, tokens, depth, cols = PROJECTIONS[name]
    torch.manual_seed(0)
    a, x, g = (random(batch, tokens, n) for n in (depth, cols, cols))
    weight, bias = random(cols, depth) * depth**-0.5, random(cols)
    gate = random(batch, cols)
    c = rcmlib.edm(torch.rand(batch, device="cuda") * 3)
    c = (c.c_skip, c.c_out)
    skip, gating = (torch.compile(f, dynamic=False) for f in (eager_skip, gated))

    def linear():
        return F.linear(a, weight, bias)

    def step(function):
        leaves = [t.detach().requires_grad_() for t in (a, weight, bias, x)]
        return lambda: torch.autograd.grad(function(*leaves), leaves, g)

    with_skip = {
        "linear_eager": lambda: eager_skip(x, linear(), *c),
        "linear_compiled": lambda: skip(x, linear(), *c),
        "fused": lambda: rcmlib.rcm_projection(a, weight, bias, x, *c),
    }
    if batch == 1:
        with_skip["addmm"] = addmm_in_place(a, weight, bias, x, *c)
    with_gate = {
        "gated_compiled": lambda: gating(x, linear(), gate),
        "gated_fused": lambda: rcmlib.gated_projection(a, weight, bias, x, gate),
    }
    steps = {
        "train_compiled": step(lambda a, w, b, x: skip(x, F.linear(a, w, b), *c)),
        "train_fused": step(lambda *leaves: rcmlib.rcm_projection(*leaves, *c)),
    }
    f = linear().double()
    refs = dict.fromkeys(with_skip, reference.skip(x, f, *c))
    refs |= dict.fromkeys(with_gate, gated(x.double(), f, gate))
    refs |= dict.fromkeys(steps, projection_gradients(a, weight, bias, x, c, g))
    checked = check(
        name,
        with_skip | with_gate | steps,
        lambda label, out: largest_error(out, refs[label]),
        lambda label: 0.02 if label in steps else 0.01,
    )
    functions = {"linear": linear}
    for label, run in checked.runs.items():
        functions[label] = graph(run) if label in steps else run
    sizes = dict(zip("BNKC", PROJECTIONS[name], strict=True))
    times = timing.compare(functions, failed=checked.failed)
    yield case(name, sizes, times, checked)


def addmm_in_place(a, weight, bias, x, c_skip, c_out) -> Callable[[], Tensor]:
    """The skip as cuBLAS has it, β·x + α·a Wᵀ: for one pair of coefficients, in x's place,
    and with a bias that has been added to x before (x + c_out/c_skip·b). Only the first call
    has x to start from."""
    beta, alpha = c_skip.item(), c_out.item()
    own = (x[0].float() + alpha / beta * bias.float()).to(x.dtype)
    return lambda: own.addmm_(a[0], weight.T, beta=beta, alpha=alpha)[None]


def projection_gradients(a, weight, bias, x, c, g) -> tuple[Tensor, ...]:
    """Of the skip behind a linear layer, in float32."""
    leaves = [t.float().requires_grad_() for t in (a, weight, bias, x)]
    out = eager_skip(leaves[3], F.linear(*leaves[:3]), *c)
    return torch.autograd.grad(out, leaves, g.float())


def compiled(module: torch.nn.Module) -> torch.nn.Module:
    return torch.compile(copy.deepcopy(module), dynamic=False)


@contextlib.contextmanager
def afresh() -> Iterator[None]:
    """Inside, torch.compile reuses nothing that was compiled before, in memory or on disk.

    It settles on a backend of PyTorch's attention as it traces, but finds graphs again by
    their operators and shapes alone (pytorch/pytorch#185449): what was compiled for flash
    would serve, unnoticed, as compiled for cuDNN.
    """
    torch.compiler.reset()
    with torch.compiler.config.patch(force_disable_caches=True):
        yield


def backends(run: Callable[[], object]) -> set[str]:
    """The fused backends of PyTorch's attention that a call of run reaches: "flash", ..."""
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as seen:
        run()
    names = " ".join(event.key for event in seen.key_averages())
    return set(re.findall(r"_scaled_dot_product_([a-z]+)_attention", names))


def module_cases(name: str, kind: type[torch.nn.Module]) -> Iterator[dict]:
    """A layer or block at the seed's shape: forward, and forward with backward."""
    torch.manual_seed(0)
    baseline = kind(LAYER["C"], LAYER["H"]).cuda().bfloat16()
    torch.manual_seed(0)
    x, g = (random(LAYER["B"], LAYER["N"], LAYER["C"]) for _ in range(2))
    t = torch.rand(LAYER["B"], device="cuda") * 3
    fused = copy.deepcopy(baseline)
    integrate.fuse(fused)
    variants = {
        "baseline": baseline,
        "baseline_compiled": compiled(baseline),
        "fused": fused,
        "fused_compiled": compiled(fused),
    }
    if kind is modules.BaselineRCMAttention:
        in_pytorch = modules.FusedRCMAttention(LAYER["C"], LAYER["H"])
        in_pytorch.load_state_dict(baseline.state_dict())
        variants["fused_pytorch"] = in_pytorch.cuda().bfloat16()

    def forward(module, x=x):
        with torch.no_grad():
            return module(x, t)

    def step(module, x=x):
        leaves = [x.detach().requires_grad_(), *module.parameters()]
        return torch.autograd.grad(module(leaves[0], t), leaves, g.to(x.dtype))

    exact = copy.deepcopy(baseline).float()
    for run, what in ((forward, "forward"), (step, "training")):
        ref = run(exact, x.float())
        checked = check(
            f"{name}_{what}",
            {label: partial(run, module) for label, module in variants.items()},
            lambda _, out, ref=ref: largest_error(out, ref),
            lambda _: 0.05,
        )
        graphs = {label: graph(call) for label, call in checked.runs.items()}
        times = timing.compare(graphs, failed=checked.failed)
        yield case(f"{name}_{what}", LAYER, times, checked)


def wan_case(name: str) -> Iterator[dict]:
    """One block of Wan 2.1 (1.3B), its self-attention and its FFN, forward."""
    grid = GRIDS[name]
    tokens = grid[0] * grid[1] * grid[2]
    torch.manual_seed(0)
    block = WanBlock(WAN_BLOCK["C"], WAN_BLOCK["ffn"], WAN_BLOCK["H"]).cuda()
    for linear in block.modules():  # the modulation and the norms stay in float32
        if isinstance(linear, torch.nn.Linear):
            linear.bfloat16()
    fused = copy.deepcopy(block)
    integrate.fuse(fused)
    x, e = (random(1, n, WAN_BLOCK["C"], dtype=torch.float32) for n in (tokens, 6))

    def forward(module, backend):
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16), backend():
            return module(x, e, grid)

    flash, cudnn = (
        partial(sdpa_kernel, backend)
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
    )
    graphs = {}

    def captured(label, module, backend, expected):
        """The module's output, of a call like the one that graphs[label] replays."""
        run = partial(forward, module, backend)
        with afresh():
            out, reached = run(), backends(run)
            if reached != expected:
                raise RuntimeError(f"it ran on {reached or 'no fused backend'}")
            graphs[label] = graph(run)
        return out

    # They keep the weights alive, which a graph reads and does not keep.
    runs = {}
    for label, module, backend, expected in (
        ("flash", block, flash, {"flash"}),
        ("cudnn", block, cudnn, {"cudnn"}),
        ("fused", fused, contextlib.nullcontext, set()),
    ):
        for suffix, variant in (("", module), ("_compiled", compiled(module))):
            arguments = (label + suffix, variant, backend, expected)
            runs[label + suffix] = partial(captured, *arguments)
    ref = forward(block, cudnn)
    checked = check(name, runs, lambda _, out: largest_error(out, ref), lambda _: 0.01)
    graphs = {label: graphs[label] for label in checked.runs}
    times = timing.compare(graphs, failed=checked.failed)
    yield case(name, {"B": 1, "N": tokens, **WAN_BLOCK}, times, checked)


def block_cases(name: str) -> Iterator[dict]:
    if name in GRIDS:
        return wan_case(name)
    return module_cases(name, modules.TransformerBlock)


SUITES = {
    "projection": Suite(
        "The output projection with the skip or a gated residual, a [B, N, K] and weight "
        "[C, K]: cuBLAS and a compiled skip, and the fused kernel; forward, and forward with "
        "backward (train_*). addmm: one call of cuBLAS in x's place, for one pair of "
        "coefficients, its bias added to x before.",
        "bf16, random normal inputs, coefficients [B] in float64, gate [B, C]. Steps with "
        "backward are replayed from a CUDA graph. Each checked first, against cuBLAS's "
        "product and a skip in float64, or (gradients) PyTorch in float32.",
        projection_case,
        [(name,) for name in PROJECTIONS],
        reference="linear_compiled",
    ),
    "modules": Suite(
        "The rCM attention layer as a module, with its projections: forward, and forward with "
        "backward.",
        "bf16. Replayed from a CUDA graph. Each checked first against PyTorch in float32.",
        module_cases,
        [("module", modules.BaselineRCMAttention)],
        reference="baseline_compiled",
    ),
    "blocks": Suite(
        "A Wan 2.1 1.3B block without cross-attention (bf16 weights and autocast, residual "
        "stream and modulation float32; forward), and a transformer block with the rCM "
        "attention layer (bf16).",
        "Replayed from a CUDA graph. Checked first: the transformer block against PyTorch in "
        "float32, the Wan block's variants against the one on cuDNN, and which backend each "
        "of them runs on.",
        block_cases,
        [*((name,) for name in GRIDS), ("transformer",)],
    ),
}
