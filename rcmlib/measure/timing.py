"""GPU times of several functions (`compare`), with CUDA events: interleaved, cold L2, a full
queue, every sample kept; and the memory of one call (`peak_bytes`)."""

import gc
import random
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

# Long enough for Python to queue the slowest launch path (the eight kernels of an 8-bit call,
# 0.5 ms on a slow host) while the GPU waits: times are the GPU's, not the interpreter's.
QUEUE_CYCLES = 5_400_000  # about 3 ms
OVERHEAD_MS = 3.1  # what a sample costs beside the call: that wait, and the sweep through L2
L2_BYTES = 256 << 20  # larger than any GPU's L2
BUDGET_MS = 1000.0
LEAST_SAMPLES = 5
LONG_MS = 50.0  # from here on one warm-up call after the first is enough


class Timing(NamedTuple):
    """Milliseconds: median, 10th and 90th percentiles, and all `samples` in the order taken."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    samples: int
    all_ms: list[float]


class Clock:
    """Samples the GPU time of calls. RuntimeError without a CUDA device."""

    def __init__(self):
        need_a_gpu()
        self._others = torch.zeros(L2_BYTES // 4, device="cuda")

    def samples(self, fn: Callable[[], object], repeats: int) -> list[float]:
        """Milliseconds of each of `repeats` calls, L2 full of other data before each."""
        events = []
        for _ in range(repeats):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._others.sum()  # a read leaves nothing that the call has to write out
            torch.cuda._sleep(QUEUE_CYCLES)
            start.record()
            fn()
            stop.record()
            events.append((start, stop))
        torch.cuda.synchronize()
        return [start.elapsed_time(stop) for start, stop in events]


def compare(
    functions: dict[str, Callable[[], object]], rounds: int = 6, repeats: int = 10,
    least: int = LEAST_SAMPLES, failed: dict[str, str] | None = None,
) -> dict[str, Timing]:  # fmt: skip
    """Times several functions in turn, `rounds` times, each round in another order.

    A GPU under load lowers its clock: in a fixed order, the last function would pay for it.
    Before each call L2 is filled with other data, as by the layers of a model in between.
    rounds × repeats samples a function; where they take over BUDGET_MS fewer, to `least`.
    A function that raises is named in `failed`, and the others go on; without `failed` the
    error is raised. RuntimeError without a CUDA device.
    """
    clock = Clock()
    shares = {}
    for name, fn in functions.items():
        estimate = attempt(partial(_warm_up, fn, clock), name, failed)
        if estimate is not None:
            count = sample_count(estimate, rounds * repeats, least)
            shares[name] = [len(part) for part in np.array_split(range(count), rounds)]
    samples: dict[str, list[float]] = {name: [] for name in shares}
    order = random.Random(0)
    for index in range(rounds):
        for name in order.sample(list(samples), len(samples)):
            take = partial(clock.samples, functions[name], shares[name][index])
            taken = attempt(take, name, failed)
            if taken is None:
                del samples[name]
            else:
                samples[name] += taken
    return {name: summary(times) for name, times in samples.items()}


def sample_count(estimate_ms: float, most: int, least: int = LEAST_SAMPLES) -> int:
    """How many samples of a call of estimate_ms fit in BUDGET_MS: from `least` to `most`."""
    fit = int(BUDGET_MS / (estimate_ms + OVERHEAD_MS))
    return min(most, max(least, fit))


def _warm_up(fn: Callable[[], object], clock: Clock) -> float:
    """Calls fn until it has compiled and allocated; about how long a call takes, in ms."""
    fn()
    (took,) = clock.samples(fn, 1)
    return took if took > LONG_MS else min(took, *clock.samples(fn, 1))


def peak_bytes(fn: Callable[[], object]) -> int:
    """The most bytes that one call, not the first, holds above what exists before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fn()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def attempt(action: Callable, name: str, failed: dict[str, str] | None):
    """action's result. If it raises: None, and the reason in failed[name] (None: raised)."""
    try:
        return action()
    except Exception as error:
        if failed is None:
            raise
        failed[name] = reason(error)
    _release()  # after the except clause, whose exception holds the failed call's tensors
    return None


def free() -> None:
    """Forgets what the last case compiled and allocated."""
    torch.compiler.reset()
    _release()


def _release() -> None:
    gc.collect()
    torch.cuda.empty_cache()  # without a GPU: nothing


def reason(error: Exception) -> str:
    """Why something failed, in one short sentence."""
    text = str(error).strip()
    if wanted := re.search(r"Tried to allocate ([\d.]+ \w+)", text):
        return f"out of memory: tried to allocate {wanted[1]}"
    first = re.split(r"\n|\. ", text)[0].rstrip(".")
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return first[:160] or type(error).__name__


def summary(times: Iterable[float]) -> Timing:
    """Median and deciles of samples in milliseconds, which are kept to 10 ns."""
    times = [round(t, 5) for t in times]
    p10, median, p90 = np.quantile(times, (0.1, 0.5, 0.9)).tolist()
    return Timing(median, p10, p90, len(times), times)


def need_a_gpu() -> None:
    if not torch.cuda.is_available():
        raise RuntimeError("times are taken on a CUDA device, and there is none here")
