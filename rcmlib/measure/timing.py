"""GPU times with CUDA events: cold L2, a full queue, medians with their spread."""

import random
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch

# Long enough for Python to queue the slowest launch path (eager PyTorch under a context
# manager takes about 0.1 ms) while the GPU waits: times are the GPU's, not the interpreter's.
QUEUE_CYCLES = 1_800_000  # about 1 ms


class Timing(NamedTuple):
    """Milliseconds: the median and the 10th and 90th percentiles of `samples` runs."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    samples: int


def time_ms(fn: Callable[[], object], repeats: int = 50) -> Timing:
    """The GPU time of one call of fn. RuntimeError without a CUDA device."""
    return compare({"fn": fn}, rounds=1, repeats=repeats)["fn"]


def graph(fn: Callable[[], object]) -> Callable[[], None]:
    """fn's launches as a CUDA graph, and the call that replays them: no Python in between.

    For work of many launches, such as a training step: queueing it one by one would take
    longer than running it.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compile and allocate outside the capture
        for _ in range(3):
            fn()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        fn()
    return captured.replay


def compare(
    functions: dict[str, Callable[[], object]], rounds: int = 6, repeats: int = 10
) -> dict[str, Timing]:
    """Times several functions in turn, `rounds` times, each round in another order.

    A GPU under load warms up and lowers its clock: in a fixed order, the last function would
    pay for it. Before each call the L2 cache is overwritten, as in a model where other
    layers ran in between. rounds × repeats samples a function.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("times are taken on a CUDA device, and there is none here")
    cache = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for fn in functions.values():  # compile, allocate, warm up
        for _ in range(3):
            fn()
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(functions), len(functions)):
            samples[name] += _samples(functions[name], repeats, cache)
    return {name: _summary(times) for name, times in samples.items()}


def _samples(
    fn: Callable[[], object], repeats: int, cache: torch.Tensor
) -> list[float]:
    events = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cache.zero_()
        torch.cuda._sleep(QUEUE_CYCLES)
        start.record()
        fn()
        stop.record()
        events.append((start, stop))
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) for start, stop in events]


def _summary(times: list[float]) -> Timing:
    deciles = statistics.quantiles(times, n=10) if len(times) > 1 else times * 9
    return Timing(statistics.median(times), deciles[0], deciles[8], len(times))
