"""One small call of every kernel variant, for compute-sanitizer to watch.

    compute-sanitizer --tool memcheck python -m tools.sanitize [--share I N]
    python -m tools.sanitize --tools memcheck racecheck initcheck [--workers 8]

Without --tools it makes the calls, with --share every N-th from the I-th on, and checks no
more than that results are finite. With --tools it lets each tool watch all calls, in
--workers processes; what a tool reports is printed, and then the exit code is 1.
"""

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import rcmlib
from rcmlib import core
from rcmlib.attention import attention, backward, forward
from rcmlib.core.launch import PLANS
from rcmlib.projection import kernel as projection
from rcmlib.sage import PV, sage_attention
from tests.inputs import heads

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
ATTENTION = [(BF16, 64), (BF16, 128), (FP16, 72), (BF16, 256), (FP32, 64), (FP16, 17)]
LENGTHS = [(64, 640), (70, 577), (37, 53), (1, 1)]  # long or short, whole tiles or not
KERNELS = (  # or parts of their names: the 8-bit attention_kernel is one, too
    "attention_kernel", "dkdv_kernel", "dq_kernel", "skip_kernel", "skip_backward_kernel",
    "projection_kernel", "gate_backward_kernel", "columns_kernel", "combine_kernel",
    "int8_kernel", "values_kernel",
)  # fmt: skip
Call = tuple[str, Callable[[], object]]


def with_gradients(function: Callable, *arguments, **options) -> list[torch.Tensor]:
    """The result, and the gradient of everything that can have one."""
    leaves = [
        a.detach().requires_grad_() if torch.is_tensor(a) else a for a in arguments
    ]
    out = function(*leaves, **options)
    wanted = [a for a in leaves if torch.is_tensor(a)]
    return [out, *torch.autograd.grad(out, wanted, torch.ones_like(out))]


def attention_calls() -> Iterator[Call]:
    for dtype, dim in ATTENTION:
        for q_len, kv_len in LENGTHS:
            q, k, v, x, *c = heads((2, 2, q_len, kv_len, dim), dtype, DEVICE)
            for is_causal in (False, True):
                options = {"is_causal": is_causal}
                name = f"{dtype} D={dim} {q_len}×{kv_len} {'causal' * is_causal}"
                fused = q, k, v, x, *(c if is_causal else (0.3, 0.8))
                yield name, partial(rcmlib.rcm_attention, *fused, **options)
                yield (
                    f"{name} gradients",
                    partial(with_gradients, rcmlib.rcm_attention, *fused, **options),
                )
    q, k, v, x, *c = heads((2, 2, 70, 640, 64), BF16, DEVICE)
    yield "without x", partial(attention, q, k, v)
    yield "without x, gradients", partial(with_gradients, attention, q, k, v)
    yield "x in float32", partial(rcmlib.rcm_attention, q, k, v, x.float(), *c)
    one = k[:, :1].expand_as(k)  # which the copy engine cannot read
    yield "by pointers", partial(with_gradients, rcmlib.rcm_attention, q, one, v, x, *c)
    for dim in (64, 128):
        q, k, v, x, *c = heads((1, 1, 70, 640, dim), BF16, DEVICE)
        k[:, :, 5] = 40 * q[:, :, 3]  # far above the maximum that is kept
        yield f"D={dim} twice", partial(rcmlib.rcm_attention, q, k, v, x, *c)


def sage_calls() -> Iterator[Call]:
    fp8 = DEVICE == "cpu" or core.device_capability(torch.device(DEVICE)) >= (8, 9)
    for pv in PV if fp8 else ["fp16"]:
        for dim in (17, 64, 128, 256):
            for q_len, kv_len in LENGTHS[:3]:
                q, k, v, x, *c = heads((1, 2, q_len, kv_len, dim), BF16, DEVICE)
                is_causal = q_len == 70
                smooth = {"smooth_q": dim == 64, "smooth_v": q_len != 64}
                options = {"is_causal": is_causal, "pv": pv, **smooth}
                fused = partial(rcmlib.rcm_sage_attention, q, k, v, x, *c, **options)
                yield f"8 bits, {pv} D={dim} {q_len}×{kv_len}", fused
    for dtype in (FP32, FP16):
        q, k, v, *_ = heads((1, 2, 37, 53, 64), dtype, DEVICE)
        yield f"8 bits, {dtype} without x", partial(sage_attention, q, k, v)
        options = {"smooth_k": False, "smooth_v": False}
        yield f"8 bits, {dtype}, rough", partial(sage_attention, q, k, v, **options)


def projection_calls() -> Iterator[Call]:
    for dtype, depth, cols in [
        (BF16, 64, 48), (BF16, 80, 272), (FP16, 37, 29), (FP32, 40, 72), (BF16, 2064, 272),
    ]:  # fmt: skip
        tokens = 70
        a, x = (
            torch.randn(2, tokens, n, device=DEVICE, dtype=dtype) for n in (depth, cols)
        )
        weight = torch.randn(cols, depth, device=DEVICE, dtype=dtype) / depth**0.5
        bias = torch.randn(cols, device=DEVICE, dtype=dtype)
        c = torch.rand(2, 2, device=DEVICE).unbind(0)
        name = f"projection, {dtype} {depth} to {cols}"
        for b, coefficients in ((None, (0.3, 0.8)), (bias, c)):
            arguments = a, weight, b, x, *coefficients
            yield name, partial(rcmlib.rcm_projection, *arguments)
            yield (
                f"{name}, gradients",
                partial(with_gradients, rcmlib.rcm_projection, *arguments),
            )
        for gate in (x[:, 0].float(), x.clone()):
            arguments = a, weight, bias, x, gate
            yield f"{name}, gated", partial(rcmlib.gated_projection, *arguments)
            yield (
                f"{name}, gated, gradients",
                partial(with_gradients, rcmlib.gated_projection, *arguments),
            )


def skip_calls() -> Iterator[Call]:
    for shape in ((2, 5, 129), (3, 4096), (1, 1)):
        for dtype in (FP32, FP16, BF16):
            x = torch.randn(shape, device=DEVICE)
            f = torch.randn(shape, device=DEVICE, dtype=dtype)
            c = torch.rand(2, shape[0], device=DEVICE).unbind(0)
            for residual in (x, x.to(dtype)):
                for coefficients in ((0.3, 0.8), c):
                    arguments = residual, f, *coefficients
                    yield (
                        f"skip, {shape} {dtype}",
                        partial(with_gradients, rcmlib.rcm_skip, *arguments),
                    )
    wide = torch.randn(2, 7, 96, device=DEVICE)
    yield (
        "skip of slices",
        partial(rcmlib.rcm_skip, wide[..., 3:67], wide[..., 8:72], 1, 2),
    )


class ProductsOnTheCpu(TorchDispatchMode):
    """PyTorch's products beside ours. racecheck ends cuBLAS's kernels with an internal error,
    and what they write would be new to initcheck; it is ours that are watched."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function not in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            return function(*args, **kwargs or {})
        return function(*(t.cpu() for t in args)).to(args[0].device)


def one_multiprocessor():
    """Small shapes launch what large ones do: no GPU is too large for them."""
    return mock.patch.object(core, "multiprocessors", lambda device: 1)


def with_hopper_gradients():
    """As on a GPU for which nothing is too little."""
    chosen = backward.hopper_gradients
    return mock.patch.object(
        backward, "hopper_gradients", lambda *a: chosen(*a[:-1], None)
    )


@contextlib.contextmanager
def without_teams():
    """The plain kernel, as large shapes launch it elsewhere than on Hopper."""
    with (
        one_multiprocessor(),
        mock.patch.object(forward, "choose_team", lambda *_: None),
        mock.patch.object(backward, "hopper_gradients", lambda *_: False),
    ):
        yield


def many_rows():
    choose = projection.choose_projection_tile

    def chosen(rows, *rest):
        return choose(1_000_000, *rest)

    return mock.patch.object(projection, "choose_projection_tile", chosen)


def make_calls(first: int, step: int) -> int:
    """Makes every step-th call from the first on; how many."""
    groups = [
        (contextlib.nullcontext, attention_calls),
        (one_multiprocessor, attention_calls),
        (with_hopper_gradients, attention_calls),
        (without_teams, attention_calls),
        (contextlib.nullcontext, projection_calls),
        (many_rows, projection_calls),
        (contextlib.nullcontext, sage_calls),
        (contextlib.nullcontext, skip_calls),
    ]
    number = made = 0
    for surroundings, calls in groups:
        PLANS.clear()  # they were made for other surroundings
        with surroundings():
            for name, call in calls():
                if number % step == first:
                    print(name, flush=True)
                    with ProductsOnTheCpu():
                        out = call()
                    for t in out if isinstance(out, list) else [out]:
                        assert t.isfinite().all(), f"{name}: not finite"
                    made += 1
                number += 1
    PLANS.clear()
    return made


def watch(tool: str, first: int, step: int) -> str:
    """What a tool reports on every step-th call from the first on; empty if nothing."""
    kernels = [part for name in KERNELS for part in ("--kernel-name", f"kns={name}")]
    if tool == "initcheck":
        kernels = []  # it has to see what every kernel writes
    command = [
        "compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *kernels,
        "--target-processes", "application-only", "--print-limit", "20",
        sys.executable, "-m", "tools.sanitize", "--share", str(first), str(step),
    ]  # fmt: skip
    # PyTorch's caching would hide what lies beyond the end of a tensor.
    alone = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, env=alone, capture_output=True, text=True)
    return done.stdout + done.stderr if done.returncode else ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--share", type=int, nargs=2, metavar=("I", "N"), default=(0, 1)
    )
    parser.add_argument("--tools", nargs="+", default=[])
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args(arguments)
    if not options.tools:
        print(f"{make_calls(*options.share)} calls", flush=True)
        return 0
    if not torch.cuda.is_available():
        sys.exit("compute-sanitizer watches a GPU, and torch sees no CUDA device")
    if shutil.which("compute-sanitizer") is None:
        sys.exit("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit")
    failed = False
    with ThreadPoolExecutor(options.workers) as pool:
        for tool in options.tools:
            shares = [
                pool.submit(watch, tool, i, options.workers)
                for i in range(options.workers)
            ]
            reports = [report for share in shares if (report := share.result())]
            print(*reports, f"{tool}: {'FAILED' if reports else 'passed'}", sep="\n")
            failed = failed or bool(reports)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
