"""What a suite is: the measurements of one record."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from rcmlib.measure.benchmark import benchmark_shape
from rcmlib.measure.implementations import installed

TIMING = (
    "CUDA events around one call, L2 filled before each (256 MiB read), the queue "
    "kept full; implementations interleaved in rounds of shuffled order; 60 samples, fewer "
    "(at least 5, in the suite wan 40) where they would take more than a second; median, 10th "
    "and 90th percentile."
)
INPUTS = (
    "bf16, random normal inputs; q, k, v are views of one packed QKV; "
    "coefficients [B] in float64 (PyTorch's pipelines cast them to bf16, inside the time)."
)
REFERENCE = "cudnn_compiled"


class Suite(NamedTuple):
    """What one record holds, how it was taken (after `timing`), and what takes it.

    cases(*arguments) yields the cases of each of `each`. reference: the implementation to
    which a baseline compares the others.
    """

    what: str
    method: str
    cases: Callable[..., Iterable[dict]]
    each: Sequence[tuple]
    timing: str = TIMING
    reference: str = REFERENCE


def side_by_side(
    what: str,
    checked: str,
    shapes: dict[str, tuple[int, int, int, int]],
    labels: Iterable[str],
    **options,
) -> Suite:
    """The implementations of these labels, those installed, at each shape (B, H, N, D)."""
    found = installed(labels)
    each = [(name, shape, found) for name, shape in shapes.items()]

    def cases(*arguments):
        yield benchmark_shape(*arguments, **options)

    return Suite(what, f"{INPUTS} {checked}", cases, each)
