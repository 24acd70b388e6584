"""The roofline: what one call has to do, what the machine can do, and the time between.

    work("fused", 4, 12, 2048, 64)             # bytes, matrix FLOP, exponentials
    ceiling_ms(work(...), measured())          # {"HBM": ms, "matrix": ms, "exp2": ms}

No call is faster than its largest ceiling: the binding one. The three overlap at best; a kernel
whose units take turns needs their sum. Ceilings are measured rates of the same machine (record
`ceilings`), not a data sheet's.
"""

import math
from typing import NamedTuple

from benchmarks import records
from rcmlib.measure import ledger
from rcmlib.measure.implementations import IMPLEMENTATIONS

# Keys a step of the online softmax; a step rescales a row by one more exponential. Kernels
# differ in it, but only 1/KEYS of the exponentials depend on it.
KEYS = 128


class Work(NamedTuple):
    """What one call has to do, however it is written."""

    hbm_bytes: float
    matrix_flop: dict[str, float]  # by data type: bf16, fp8, int8 (operations)
    exp2: float


class Ceilings(NamedTuple):
    """What the machine does a second when it does nothing else."""

    hbm_bytes: float
    matrix_flop: dict[str, float]
    exp2: float


def work(label: str, batch: int, heads: int, tokens: int, dim: int) -> Work:
    """The work of an implementation in 16 bits a number; bytes by the ledger, no caches.

    Each of two products takes 2·D FLOP a score. exp2: one a score, and one a row and step.
    KeyError for a label that has no ledger.
    """
    passes = ledger.pipeline(label, batch, heads, tokens, dim)
    scores = batch * heads * tokens**2
    flop: dict[str, float] = {}
    types = IMPLEMENTATIONS[label].products if label in IMPLEMENTATIONS else ()
    for dtype in types:
        flop[dtype] = flop.get(dtype, 0) + 2.0 * scores * dim
    steps = 0 if label == "naive" else math.ceil(tokens / KEYS)
    exponentials = scores + batch * heads * tokens * steps if types else 0
    return Work(ledger.total(passes), flop, exponentials)


def measured() -> Ceilings:
    """The ceilings of the record `ceilings`."""
    rates = {
        "bf16": records.bf16_tflop_s(),
        "fp8": records.fp8_tflop_s(),
        "int8": records.int8_top_s(),
    }
    return Ceilings(
        records.copy_gb_s() * 1e9,
        {dtype: rate * 1e12 for dtype, rate in rates.items()},
        records.exp2_top_s() * 1e12,
    )


def ceiling_ms(work: Work, ceilings: Ceilings) -> dict[str, float]:
    """The milliseconds that each resource needs for the work, alone and at its ceiling."""
    seconds = {
        "HBM": work.hbm_bytes / ceilings.hbm_bytes,
        "matrix": sum(
            flop / ceilings.matrix_flop[dtype]
            for dtype, flop in work.matrix_flop.items()
        ),
        "exp2": work.exp2 / ceilings.exp2,
    }
    return {resource: 1e3 * s for resource, s in seconds.items()}


def binding(work: Work, ceilings: Ceilings) -> str:
    """The resource whose ceiling is the lowest for this work: HBM, matrix or exp2."""
    times = ceiling_ms(work, ceilings)
    return max(times, key=times.get)


def fractions(work: Work, ceilings: Ceilings, measured_ms: float) -> dict[str, float]:
    """How much of each ceiling a call reaches that took measured_ms: 1 is all of it."""
    return {
        resource: ms / measured_ms
        for resource, ms in ceiling_ms(work, ceilings).items()
    }
