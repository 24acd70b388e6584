"""Chapters 10 to 12: the 8-bit copies, the 8-bit kernel, its accuracy, and where it pays."""

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.inputs import gaussian, video_like
from benchmarks.suites.suite import INPUTS, Suite, side_by_side
from rcmlib import reference
from rcmlib.attention import attention
from rcmlib.measure import timing
from rcmlib.measure.benchmark import case
from rcmlib.measure.implementations import attention_inputs, installed, sage_one
from rcmlib.reference import eight_bit
from rcmlib.sage import PV, sage_attention

SAGE = {  # (B, H, N, D)
    "D64_N2048": (4, 12, 2048, 64),
    "D64_N8192": (2, 16, 8192, 64),
    "D128_N2048": (4, 16, 2048, 128),
    "D128_N8192": (2, 16, 8192, 128),
    "D128_N32768": (1, 12, 32768, 128),
    "wan_D128_N32760": (1, 12, 32760, 128),
}
COPIES = ("D64_N8192", "D128_N8192", "D128_N32768")
CROSSOVER = {
    f"D{dim}_N{n}": (32768 // n, 16, n, dim)
    for dim in (64, 128)
    for n in (2**e for e in range(9, 16))
}
DISTRIBUTIONS = {
    "gaussian": lambda: gaussian(1, 4, 2048, 128),
    "video_like": lambda: video_like(1, 4, (8, 16, 16), 128),
}
WHOLE = ("cudnn", "cudnn_compiled", "fused", "sage")
KERNELS = (*(f"sage_kernel_{pv}" for pv in PV), "sage_kernel_no_skip")


def copies_case(name: str) -> Iterator[dict]:
    from rcmlib.attention.tiles import choose_sage_tile
    from rcmlib.core import device_capability
    from rcmlib.sage import quantize
    from rcmlib.sage.columns import column_statistics

    q, k, v, *_ = attention_inputs(*SAGE[name])
    dim = q.shape[3]
    group = choose_sage_tile(dim, "fp8", device_capability(q.device)).block_n
    mean = column_statistics(k, True, False).mean
    v_mean, v_top = column_statistics(v, True, True)
    q_copy = partial(quantize.quantize_int8, q, 1, None, 0.1)
    k_copy = partial(quantize.quantize_int8, k, group, mean)
    v_copy = partial(quantize.quantize_values, v, 448.0, v_top, v_mean, True)
    for ours, ref in (
        (q_copy(), eight_bit.quantize_int8(q, 1, None, 0.1)),
        (k_copy(), eight_bit.quantize_int8(k, group, eight_bit.column_mean(k))),
    ):
        if not all(torch.equal(a, b) for a, b in zip(ours, ref, strict=True)):
            raise AssertionError(f"{name}: an INT8 copy differs from its reference")
    source = torch.empty(q.numel() * 3 // 2, dtype=torch.int8, device="cuda")
    functions = {
        "copy": partial(torch.empty_like(source).copy_, source),
        "q_int8": q_copy,
        "k_int8": k_copy,
        "v_fp8": v_copy,
        "k_columns": partial(column_statistics, k, True, False),
        "v_columns": partial(column_statistics, v, True, True),
    }
    shape = dict(zip("BHND", SAGE[name], strict=True)) | {"bytes": 3 * q.numel()}
    yield case(name, shape, timing.compare(functions))


def accuracy_case(name: str) -> Iterator[dict]:
    """Cosine, relative L1 and RMSE (in units of the result's) against float64, no skip."""
    q, k, v = (t.cuda().bfloat16() for t in DISTRIBUTIONS[name]())
    ref = reference.merge_heads(reference.attention(q, k, v))
    functions = {f"sage_{pv}": partial(sage_attention, q, k, v, pv=pv) for pv in PV}
    functions["bf16"] = partial(attention, q, k, v)
    if installed(["sage1_compiled"]):
        functions["sage1"] = sage_one(q, k, v)
    errors = {}
    for label, run in functions.items():
        out = run()
        errors[label] = {
            "cosine": reference.cosine(out, ref),
            "relative_l1": reference.relative_l1(out, ref),
            "relative_l2": reference.relative_l2(out, ref),
        }
    sizes = dict(zip("BHND", q.shape, strict=True))
    yield {"name": name, **sizes, "errors": errors, "results": {}}


CHECKED = "Three query rows of each checked against float64 first (8 bits: within 6 %)."
SUITES = {
    "sage_quantize": Suite(
        "The 8-bit copies of q, k and v, the column statistics that they need, and a copy "
        "that moves as many bytes.",
        f"{INPUTS} The INT8 copies agree with their references bit for bit.",
        copies_case,
        [(name,) for name in COPIES],
        reference="copy",
    ),
    "sage": side_by_side(
        "8-bit attention with the skip: the kernel alone (sage_kernel_*), and with its "
        "quantisation (sage); cuDNN, bf16 fused and SageAttention 1.0.6 beside it.",
        CHECKED,
        SAGE,
        (*WHOLE, *KERNELS, "sage1_compiled"),
    ),
    "sage_crossover": side_by_side(
        "8 bits with quantisation against bf16, 16 heads and 32768 tokens in all, from many "
        "short sequences to one long one.",
        CHECKED,
        CROSSOVER,
        (*WHOLE, "sage1_compiled"),
    ),
    "sage_accuracy": Suite(
        "Errors of 8-bit attention against float64, before the skip.",
        "bf16 inputs: Gaussian, and like a video model's (benchmarks.inputs). No times.",
        accuracy_case,
        [(name,) for name in DISTRIBUTIONS],
    ),
}
