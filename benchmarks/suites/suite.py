"""What a suite is: the measurements of one record."""

from collections.abc import Callable, Iterable, Iterator, Sized
from functools import partial
from typing import NamedTuple

from rcmlib.measure.benchmark import installed, measure
from rcmlib.measure.timing import Timing

TIMING = (
    "CUDA events around one call, L2 overwritten before each (256 MiB written), the queue "
    "kept full; implementations interleaved in rounds of shuffled order; 60 samples, fewer "
    "(5 at least) where they would take more than a second; median, 10th and 90th percentile."
)
INPUTS = (
    "bf16, random normal inputs; q, k, v are views of one packed QKV; "
    "coefficients [B] in float64 (PyTorch's pipelines cast them to bf16, inside the time)."
)


class Suite(NamedTuple):
    """What one record holds, how it was taken (after `timing`), and what takes it.

    run: the cases, one by one if it is lazy (`one_by_one`). reference: the implementation to
    which a baseline compares the others.
    """

    what: str
    method: str
    run: Callable[[], Iterable[dict]]
    timing: str = TIMING
    reference: str = "cudnn_compiled"


class OneByOne(Sized, Iterable):
    """The cases of a suite, each measured when it is asked for; their number is known."""

    def __init__(self, measure: Callable[..., dict], arguments: Iterable[tuple]):
        self._measure, self._arguments = measure, list(arguments)

    def __len__(self) -> int:
        return len(self._arguments)

    def __iter__(self) -> Iterator[dict]:
        return (self._measure(*arguments) for arguments in self._arguments)


def one_by_one(
    measure: Callable[..., dict], arguments: Iterable[tuple], **options
) -> Callable[[], OneByOne]:
    """A suite's `run`: measure(*arguments, **options) for each of the arguments."""
    return lambda: OneByOne(partial(measure, **options), arguments)


def side_by_side(
    shapes: dict[str, tuple[int, int, int, int]], labels: Iterable[str], **options
) -> Callable[[], OneByOne]:
    """A suite's `run`: these implementations, those installed, at each (B, H, N, D)."""
    cases = [(name, shape, installed(labels)) for name, shape in shapes.items()]
    return one_by_one(measure, cases, **options)


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
