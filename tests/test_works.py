"""README's table "What works", proved line by line: a row there is a test here."""

import concurrent.futures
import copy
import functools
import io
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
from torch import nn
from torch._dynamo.utils import counters
from torch._subclasses import FakeTensorMode
from torch.nn.utils import parametrize, prune
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import rcmlib
from rcmlib import reference
from rcmlib.attention import attention
from rcmlib.integrate import fuse, unfuse
from rcmlib.wan import WanBlock
from tests.inputs import gradients, heads

ROOT = Path(__file__).parents[1]
BACKEND = "inductor" if torch.cuda.is_available() else "aot_eager"  # a CPU may lack C++
LAYERS = (
    rcmlib.BaselineRCMAttention,
    rcmlib.FusedRCMAttention,
    rcmlib.TritonFusedRCMAttention,
)
GRID = (1, 2, 3)
NUMBERS = [0.1 * i for i in range(1, 13)]  # more than torch.compile's limit of graphs
PROOFS = {}


def proves(row: str):
    """Decorates the test of a row."""
    return lambda test: PROOFS.setdefault(row, test)


def calls(device, dtype=torch.float32, size=24, dim=32):
    """Every operation, as functions of c_skip and c_out."""
    q, k, v, x, *_ = heads((2, 2, size, size, dim), dtype, device)
    w, b = (
        torch.randn(2 * dim, 2 * dim, device=device),
        torch.randn(2 * dim, device=device),
    )
    w, b = w.to(dtype), b.to(dtype)
    return {
        "rcm_attention": lambda *c: rcmlib.rcm_attention(q, k, v, x, *c),
        "rcm_sage_attention": lambda *c: rcmlib.rcm_sage_attention(q, k, v, x, *c),
        "rcm_projection": lambda *c: rcmlib.rcm_projection(x, w, b, x, *c),
        "rcm_skip": lambda *c: rcmlib.rcm_skip(x, x.sin(), *c),
    }


def wan(device):
    torch.manual_seed(1)
    block = WanBlock(32, 48, 2).to(device)
    return (
        block,
        torch.randn(2, 6, 32, device=device),
        torch.randn(2, 6, 32, device=device),
    )


def python(code: str, **environment) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )


def graphs_of(function, *values, **options) -> int:
    """How many graphs torch.compile makes for all these arguments; the results are right."""
    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(function, fullgraph=True, backend=BACKEND, **options)
    for value in values:
        torch.testing.assert_close(compiled(*value), function(*value))
    return counters["stats"]["unique_graphs"]


@proves(
    "`torch.compile(fullgraph=True)`, any length and noise level, a number or a tensor"
)
def test_one_graph_serves_every_length_and_noise_level(device):
    for name in ("edm", "trigflow", "rectified_flow"):
        coefficients = getattr(rcmlib, name)
        x = torch.ones(3)
        assert (
            graphs_of(lambda t, f=coefficients, x=x: f(t).c_out * x, *zip(NUMBERS)) <= 2
        )
    for name, call in calls(device).items():
        if (
            name != "rcm_sage_attention"
        ):  # rounded to 8 bits, where one bit more is 1e-2
            assert graphs_of(lambda c, f=call: f(c, 0.5), *zip(NUMBERS)) <= 2
    x = torch.randn(2, 12, 32, device=device)
    for make in LAYERS:
        layer = make(32, 2).to(device)
        assert graphs_of(layer, *((x, t) for t in NUMBERS)) <= 2
        lengths = ((x[:, :n], torch.rand(2, device=device)) for n in (12, 7, 9, 3))
        assert graphs_of(layer, *lengths) <= 2


@proves(
    '`torch.compile(mode="reduce-overhead")`: one CUDA graph a call, forward and training'
)
def test_every_call_is_one_cuda_graph(device):
    if device == "cpu":
        pytest.skip("needs a CUDA device")
    layer = rcmlib.TritonFusedRCMAttention(64, 2).to(device)
    x = torch.randn(2, 24, 64, device=device)
    functions = {
        "layer": lambda t: layer(x, t),
        **{n: partial_in(f) for n, f in calls(device).items()},
    }
    for name, function in functions.items():
        torch.compiler.reset()
        compiled = torch.compile(function, mode="reduce-overhead", fullgraph=True)
        for t in 3 * [0.1, torch.tensor(0.2), torch.tensor(0.3, device=device), 0.4]:
            torch.compiler.cudagraph_mark_step_begin()
            with torch.no_grad(), profile(activities=[ProfilerActivity.CUDA]) as seen:
                out = compiled(t).clone()
                torch.cuda.synchronize()
            error = reference.relative_l2(out, function(t))
            assert error < (1e-1 if "sage" in name else 1e-5), name
        assert any("GraphLaunch" in event.key for event in seen.key_averages()), name
    torch.compiler.reset()
    compiled = torch.compile(layer, mode="reduce-overhead")
    for _ in range(4):
        grads = []
        for module in (compiled, layer):
            layer.zero_grad()
            torch.compiler.cudagraph_mark_step_begin()
            module(x, 0.7).square().mean().backward()
            grads.append([p.grad.clone() for p in layer.parameters()])
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def partial_in(call):
    """A call as a function of c_skip."""
    return lambda c: call(c, 0.5)


@proves("`torch.export`, strict or not, with any number of tokens")
def test_what_is_exported_keeps_our_kernels(device):
    layer = rcmlib.TritonFusedRCMAttention(32, 2).to(device)
    t = torch.rand(2, device=device)
    shapes = ({1: torch.export.Dim("tokens", min=2, max=64)}, None)
    x = torch.randn(2, 24, 32, device=device)
    for strict in (True, False):
        program = torch.export.export(
            layer, (x[:, :8].contiguous(), t), dynamic_shapes=shapes, strict=strict
        )
        targets = {str(n.target) for n in program.run_decompositions().graph.nodes}
        assert "rcmlib.projection.default" in targets
        torch.testing.assert_close(program.module()(x, t), layer(x, t))


@proves(
    "adapters (LoRA), hooks, pruning and parametrisations on a fused layer, put on at any time"
)
def test_what_is_attached_to_a_fused_layer_takes_part(device):
    class Adapter(nn.Module):
        """A low-rank adapter that, like the usual ones, lends out its base's weight."""

        def __init__(self, base):
            super().__init__()
            self.base, self.down = base, nn.Linear(base.in_features, 4).to(device)
            self.up = nn.Linear(4, base.out_features).to(device)

        weight = property(lambda self: self.base.weight)
        bias = property(lambda self: self.base.bias)

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    def adapt(owner, name):
        torch.manual_seed(2)
        setattr(owner, name, Adapter(getattr(owner, name)))

    ways = {
        "adapter": adapt,
        "pruning": lambda owner, name: prune.l1_unstructured(
            getattr(owner, name), "weight", 0.5
        ),
        "parametrisation": lambda owner, name: parametrize.register_parametrization(
            getattr(owner, name), "weight", Doubled()
        ),
        "hook": lambda owner, name: getattr(owner, name).register_forward_hook(
            lambda _module, _inputs, out: 3 * out
        ),
        "transposed weight": lambda owner, name: setattr(
            getattr(owner, name), "weight", nn.Parameter(getattr(owner, name).weight.mT)
        ),
    }
    x, t = torch.randn(2, 6, 32, device=device), torch.rand(2, device=device)
    block, h, e = wan(device)
    for attach in ways.values():
        for model, owner, name, inputs in (
            (rcmlib.BaselineRCMAttention(32, 2).to(device), "", "proj", (x, t)),
            (rcmlib.FusedRCMAttention(32, 2).to(device), "", "proj", (x, t)),
            (copy.deepcopy(block), "self_attn", "o", (h, e, GRID)),
        ):
            early, late = copy.deepcopy(model), copy.deepcopy(model)
            attach(model.get_submodule(owner), name)
            attach(early.get_submodule(owner), name)
            fuse(early)
            fuse(late)
            attach(late.get_submodule(owner), name)
            for fused in (early, late):
                torch.testing.assert_close(fused(*inputs), model(*inputs))
                fused(*inputs).sum().backward()
                assert all(p.grad is not None for p in fused.parameters())


@proves("adapters, pruning and a replaced `forward` on a layer of a compiled model")
def test_what_is_attached_after_compiling_takes_part(device):
    x, t = torch.randn(2, 6, 32, device=device), torch.rand(2, device=device)
    for attach in (
        lambda layer: prune.l1_unstructured(layer.proj, "weight", 0.5),
        lambda layer: setattr(layer, "proj", nn.Sequential(layer.proj, nn.Tanh())),
        lambda layer: setattr(layer.proj, "forward", lambda y: 0 * y),
    ):
        torch.compiler.reset()
        layer = rcmlib.TritonFusedRCMAttention(32, 2).to(device)
        compiled = torch.compile(layer, backend="eager")
        before = compiled(x, t)
        attach(layer)
        torch.testing.assert_close(compiled(x, t), layer(x, t))
        assert not torch.allclose(before, layer(x, t))


@proves("`fuse` and `unfuse` of a model that `torch.compile` has compiled already")
def test_fuse_and_unfuse_reach_a_compiled_model(device):
    torch.compiler.reset()
    model = rcmlib.TransformerBlock(32, 2).to(device)
    seen = []

    def backend(graph, _example):
        seen.append({str(node.target) for node in graph.graph.nodes})
        return graph

    compiled = torch.compile(model, backend=backend)
    x, t = torch.randn(2, 6, 32, device=device), torch.rand(2, device=device)
    with torch.no_grad():
        before = compiled(x, t)
        fuse(compiled)
        torch.testing.assert_close(compiled(x, t), before)
        unfuse(compiled)
        assert torch.equal(compiled(x, t), before)
    ours = [any("rcmlib" in target for target in targets) for targets in seen]
    assert ours == [False, True, False]


@proves(
    'modules built under `torch.device("meta")`, copied, pickled, their weights exchanged'
)
def test_modules_can_be_built_empty_copied_and_stored(device):
    x = torch.randn(2, 6, 32, device=device)
    for make in (*LAYERS, rcmlib.TransformerBlock):
        torch.manual_seed(0)
        layer = make(32, 2).to(device)
        with torch.device("meta"):
            empty = make(32, 2)
        built = empty.to_empty(device=device)
        built.load_state_dict(layer.state_dict())
        stored = io.BytesIO()
        torch.save(layer, stored)
        stored.seek(0)
        loaded = torch.load(stored, weights_only=False)
        for other in (
            built,
            copy.deepcopy(layer),
            pickle.loads(pickle.dumps(layer)),
            loaded,
        ):
            assert torch.equal(other(x, 0.5), layer(x, 0.5))


@proves("an empty batch through a module, fused or not")
def test_an_empty_batch_passes(device):
    for make in LAYERS:
        layer, x = make(32, 2).to(device), torch.randn(0, 6, 32, device=device)
        assert (
            layer(x, 0.5).shape
            == layer(x, torch.rand(0, device=device)).shape
            == x.shape
        )
    layer = rcmlib.TritonFusedRCMAttention(32, 2, out_proj=False).to(device)
    assert layer(x, 0.5).shape == x.shape
    block, h, e = wan(device)
    fuse(block)
    assert block(h[:0], e[:0], GRID).shape == (0, 6, 32)


@proves(
    "`torch.autocast` and `GradScaler`: float16 gradients hold where those of two passes do"
)
def test_float16_gradients_hold_where_those_of_two_passes_do(device):
    for c_out in (1e-3, torch.tensor([1e-3, 0.0], device=device)):
        for dtype, scale in ((torch.float32, 1e5), (torch.float16, 6e4)):
            q, k, v, x, *_ = heads((2, 1, 24, 24, 64), torch.float16, device)
            x, c = x.to(dtype), reference.per_sample(c_out, x).to(dtype)
            g = torch.full_like(x, scale)

            def two_passes(q, k, v, c=c, x=x):
                f = nn.functional.scaled_dot_product_attention(q, k, v)
                return x + c * reference.merge_heads(f).to(c.dtype)

            def one_pass(q, k, v, c_out=c_out, x=x):
                return rcmlib.rcm_attention(q, k, v, x, 1.0, c_out)

            found, peer = (gradients(f, (q, k, v), g) for f in (one_pass, two_passes))
            exact = functools.partial(
                reference.rcm_attention, x=x, c_skip=1.0, c_out=c_out
            )
            ref = gradients(exact, [t.double() for t in (q, k, v)], g.double())
            for ours, theirs, right in zip(found, peer, ref, strict=True):
                assert theirs.isfinite().all() and ours.isfinite().all()
                error = reference.relative_l2(ours, right)
                assert error <= reference.error_bound(right, theirs)


@proves("activation checkpointing")
def test_checkpointing_gives_the_same_gradients(device):
    for make in LAYERS:
        layer = make(32, 2).to(device)
        x = torch.randn(2, 6, 32, device=device, requires_grad=True)
        t = torch.rand(2, device=device)
        plain = torch.autograd.grad(layer(x, t).square().sum(), x)
        again = checkpoint(layer, x, t, use_reentrant=False)
        assert torch.equal(torch.autograd.grad(again.square().sum(), x)[0], plain[0])


@proves(
    "batched gradients (`is_grads_batched`, vectorised Jacobians), to the noise level too"
)
def test_gradients_may_be_batched(device):
    q, k, v, x, *c = heads((2, 2, 6, 6, 16), torch.float32, device)
    w, gate = torch.randn(32, 32, device=device), torch.randn(2, 32, device=device)
    half = [t.half() for t in (q, k, v, x)]
    for function, inputs in (
        (rcmlib.rcm_attention, (q, k, v, x, *c)),
        (rcmlib.rcm_attention, (*half, *c)),
        (attention, (q, k, v)),
        (rcmlib.rcm_skip, (x, x.sin(), *c)),
        (lambda a, w, *rest: rcmlib.rcm_projection(a, w, None, *rest), (x, w, x, *c)),
        (
            lambda a, w, *rest: rcmlib.gated_projection(a, w, None, *rest),
            (x, w, x, gate),
        ),
    ):
        leaves = [t.detach().requires_grad_() for t in inputs]
        out = function(*leaves)
        many = torch.randn(3, *out.shape, device=device).to(out.dtype)
        grad = functools.partial(torch.autograd.grad, out, leaves, retain_graph=True)
        together = grad(many, is_grads_batched=True)
        for i, g in enumerate(many):
            for batched, alone in zip(together, grad(g), strict=True):
                torch.testing.assert_close(batched[i], alone)


@proves("several threads (on a CPU they take turns)")
def test_threads_get_what_they_asked_for(device):
    jobs = [functools.partial(call, 0.5, 0.25) for call in calls(device).values()]
    expected = [job() for job in jobs]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            for i, out in enumerate(pool.map(lambda i: jobs[i % 4](), range(48))):
                assert torch.equal(out, expected[i % 4])
    finally:
        sys.setswitchinterval(interval)


@proves(
    "`import rcmlib` before a fork, before `CUDA_VISIBLE_DEVICES` is set, with child processes"
)
def test_importing_leaves_cuda_and_the_environment_alone(device):
    code = """
import os, torch
before = dict(os.environ)
IMPORT
assert dict(os.environ) == before, set(os.environ) ^ set(before)
assert not torch.cuda.is_initialized()
if DEVICE == "cuda":
    import multiprocessing
    def child():
        q, k, v = torch.randn(3, 1, 1, 16, 16, device="cuda").unbind(0)
        assert CALL.isfinite().all()
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start(); process.join()
    assert process.exitcode == 0
os.environ["CUDA_VISIBLE_DEVICES"] = ""
try:
    torch.ones(2, device="cuda")
    print("CUDA_VISIBLE_DEVICES comes too late")
except Exception:
    print("no GPU is seen")
"""
    code = code.replace("DEVICE", repr(device))
    unset = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    said = []
    for how, call in (
        ("import rcmlib", "rcmlib.attention.attention(q, k, v)"),
        ("", "q"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code.replace("IMPORT", how).replace("CALL", call)],
            env=unset | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert said[0] == said[1]  # with rcmlib and without
    hidden = """
import os, torch, rcmlib
os.environ["CUDA_VISIBLE_DEVICES"] = ""
assert torch.cuda.device_count() == 0
try:
    torch.ones(2, device="cuda")
except Exception:
    print("no GPU is seen")
"""
    assert python(hidden).stdout.strip() == "no GPU is seen"  # where nothing was forked


@proves(
    "`TRITON_INTERPRET=1` on a machine with a GPU (Triton 3.6: with NumPy below 2.4)"
)
def test_a_gpu_tensor_may_be_interpreted(device):
    code = f"""
import torch, rcmlib
from rcmlib import reference
for dtype in (torch.float32, torch.bfloat16):
    q, k, v = torch.randn(3, 2, 2, 24, 32, device={device!r}, dtype=dtype).unbind(0)
    x, w = torch.randn(2, 2, 24, 64, device={device!r}, dtype=dtype).unbind(0)
    w = torch.eye(64, device={device!r}, dtype=dtype)
    c = torch.rand(2, device={device!r})
    for out in (
        rcmlib.rcm_attention(q, k, v, x, c, c), rcmlib.rcm_sage_attention(q, k, v, x, c, c),
        rcmlib.rcm_projection(x, w, None, x, 0.5, c), rcmlib.rcm_skip(x, x, c, 0.5),
    ):
        assert out.device == x.device and out.dtype == dtype and out.isfinite().all()
    out = rcmlib.rcm_attention(q, k, v, x, c, c)
    assert reference.relative_l2(out, reference.rcm_attention(q, k, v, x, c, c)) < 1e-2
"""
    done = python(code, TRITON_INTERPRET="1")
    if (
        triton.__version__.startswith("3.6.")
        and np.lib.NumpyVersion(np.__version__) >= "2.4.0"
    ):
        assert "interpreter needs NumPy below 2.4" in done.stderr
    else:
        assert done.returncode == 0, done.stderr


@proves("`torch.utils.flop_counter` counts our products as PyTorch's")
def test_products_are_counted_as_pytorch_counts_its_own(device):
    q, k, v, x, *c = heads((2, 2, 6, 10, 16), torch.float32, device)
    w = torch.randn(48, 32, device=device)
    y = torch.randn(2, 6, 48, device=device)
    products = 4 * 2 * 2 * 6 * 10 * 16

    def counted(function, *inputs, training=False):
        inputs = [t.detach().requires_grad_(training) for t in inputs]
        with FlopCounterMode(display=False) as counter:
            out = function(*inputs)
            if training:
                out.sum().backward()
        return counter.get_total_flops()

    with FakeTensorMode():
        layer, y_fake = rcmlib.TritonFusedRCMAttention(32, 2), torch.randn(2, 6, 32)
        assert counted(lambda y: layer(y, 0.5), y_fake) == 4 * 2 * 6 * 32 * (6 + 2 * 32)
    assert counted(rcmlib.rcm_attention, q, k, v, x, *c) == products
    assert counted(attention, q, k, v) == products
    assert counted(rcmlib.rcm_sage_attention, q, k, v, x, *c) == products
    assert (
        counted(rcmlib.rcm_attention, q, k, v, x, *c, training=True) == 3.5 * products
    )
    project = functools.partial(
        lambda a, w, y, *c: rcmlib.rcm_projection(a, w, None, y, *c)
    )
    assert counted(project, x, w, y, *c) == 2 * 2 * 6 * 32 * 48
    assert counted(project, x, w, y, *c, training=True) == 3 * 2 * 2 * 6 * 32 * 48


@proves("a NaN or an infinity in q, k or v is seen in the result, in 8 bits too")
def test_what_is_not_finite_is_seen_in_the_result(device):
    for name in "qkv":
        for bad in (float("nan"), float("inf")):
            for pv in ("fp8", "fp16"):
                for smooth in (False, True):
                    q, k, v, x, *c = heads((2, 2, 40, 40, 32), torch.float32, device)
                    {"q": q, "k": k, "v": v}[name][0, 1, 7, 3] = bad
                    options = {
                        "smooth_q": smooth,
                        "smooth_k": smooth,
                        "smooth_v": smooth,
                    }
                    try:
                        out = rcmlib.rcm_sage_attention(
                            q, k, v, x, *c, pv=pv, **options
                        )
                    except ValueError as error:  # no FP8 on this GPU
                        assert "without FP8" in str(error)
                        continue
                    exact = reference.rcm_attention(q, k, v, x, *c)
                    seen, expected = ~out.isfinite(), ~exact.isfinite()
                    assert expected.any() and (seen | ~expected).all()
                    assert (
                        not seen[1].any() and not seen[0, :, :32].any()
                    )  # other heads


def test_every_row_of_the_readme_is_proved_here():
    text = (ROOT / "README.md").read_text().partition("## What works\n")[2]
    rows = re.findall(r"^\| (.+?) \| ", text.partition("\n## ")[0], re.M)
    assert rows[2:] == list(PROOFS)
