"""The machine's ceilings: how fast it copies, multiplies matrices and raises 2 to a power."""

from collections.abc import Callable, Iterator

import torch

from benchmarks.suites.suite import Suite
from rcmlib.measure import timing
from rcmlib.measure.benchmark import case

SIZE = 8192  # of square matrices
PRODUCT = {"M": SIZE, "N": SIZE, "K": SIZE, "flop": 2 * SIZE**3}
# Eight chains a thread, four warps a program, 32 programs an SM: enough to hide an exp2's
# latency. Long enough (4·10⁹ exp2 on an H100) for launch and store not to count.
CHAINS, STEPS, UNROLL, PROGRAMS = 1024, 60, 16, 32


def copy() -> tuple[dict, Callable]:
    source = torch.randint(-99, 99, (1 << 30,), dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return {"bytes": 2 * source.numel()}, lambda: target.copy_(source)


def matmul_bf16() -> tuple[dict, Callable]:
    a, b = torch.randn(2, SIZE, SIZE, device="cuda", dtype=torch.bfloat16)
    return PRODUCT, lambda: a @ b


def matmul_fp8() -> tuple[dict, Callable]:
    """E4M3, summed by the tensor core; b's columns are contiguous, as the product wants."""
    a, b = torch.randn(2, SIZE, SIZE, device="cuda").to(torch.float8_e4m3fn)
    one = torch.ones((), device="cuda")
    options = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
    return PRODUCT, lambda: torch._scaled_mm(a, b.T, one, one, **options)


def matmul_int8() -> tuple[dict, Callable]:
    """Sums in int32; b's columns are contiguous. Normal inputs, as a quantiser leaves them."""
    normal = 32 * torch.randn(2, SIZE, SIZE, device="cuda")
    a, b = normal.clamp(-127, 127).to(torch.int8)
    return PRODUCT, lambda: torch._int_mm(a, b.T)


def exp2() -> tuple[dict, Callable]:
    from benchmarks.kernels import exp2_kernel

    multiprocessors = torch.cuda.get_device_properties().multi_processor_count
    programs = PROGRAMS * multiprocessors
    out = torch.empty(programs * CHAINS, device="cuda")
    ops = out.numel() * STEPS * UNROLL

    def run():
        exp2_kernel[(programs,)](out, STEPS, BLOCK=CHAINS, UNROLL=UNROLL, num_warps=4)

    return {"ops": ops, "multiprocessors": multiprocessors}, run


def ceiling_case(
    name: str, label: str, prepare: Callable[[], tuple[dict, Callable]]
) -> Iterator[dict]:
    """One ceiling: what `prepare` counts, and how long its function takes."""
    counts, run = prepare()
    yield case(name, counts, timing.compare({label: run}))


CASES = [
    ("copy", "copy", copy),
    ("matmul", "matmul", matmul_bf16),
    ("matmul_fp8", "matmul", matmul_fp8),
    ("matmul_int8", "matmul", matmul_int8),
    ("exp2", "exp2", exp2),
]
SUITES = {
    "ceilings": Suite(
        "The machine's ceilings: a 1 GiB device-to-device copy (bytes read and written), "
        "8192³ matrix products on random normal data (bf16; FP8 E4M3 summed by the tensor "
        "core; INT8), and exp2 on registers (ops).",
        "PyTorch's own copy_, matmul, _scaled_mm and _int_mm, and "
        "benchmarks.kernels.exp2_kernel, one instruction an exp2. Not checked.",
        ceiling_case,
        CASES,
        reference="copy",
    )
}
