"""What a suite is: the measurements of one record."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from rcmlib.measure.timing import Timing

INPUTS = (
    "bf16, random normal inputs; q, k, v are views of one packed QKV; "
    "coefficients [B] in float64 (PyTorch's pipelines cast them to bf16, inside the time)."
)


class Suite(NamedTuple):
    """What one record holds, how it was taken (beside TIMING), and what takes it."""

    what: str
    method: str
    run: Callable[[], list[dict]]


def case(name: str, shape: dict, times: dict[str, Timing]) -> dict:
    """One row of a record: what was run, and how long each implementation took."""
    results = {label: t._asdict() for label, t in times.items()}
    return {"name": name, **shape, "results": results}


def right_ones(
    functions: dict[str, Callable[[], object]],
    error: Callable[[str, object], float],
    bound: float,
    name: str,
) -> dict[str, Callable[[], object]]:
    """Those whose result has an error(label, result) below `bound`; the others are named."""
    right = {}
    for label, run in functions.items():
        wrong_by = error(label, run())
        if wrong_by < bound:
            right[label] = run
        else:
            print(f"{name}: {label} is wrong (error {wrong_by:.2g}): not timed")
    return right


def free() -> None:
    """Between two cases: what the last one compiled and allocated."""
    torch.compiler.reset()
    torch.cuda.empty_cache()
