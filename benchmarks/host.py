"""Python's part of a time: a call as a program sees it, the host's part, or none at all.

`wall` and `host_time` need a CUDA device (RuntimeError); `graph` takes Python out of a call.
"""

import time
from collections.abc import Callable
from functools import partial

import torch

from rcmlib.measure.timing import Timing, attempt, need_a_gpu, summary

CALLS = 20  # in a row, for one sample of `wall`
SAMPLES = 20
LAUNCHES = 304  # timed one by one, for `host_time`
SHORT_QUEUE = 8  # calls that the GPU can be behind without Python waiting for it


def wall(
    functions: dict[str, Callable[[], object]], failed: dict[str, str] | None = None
) -> dict[str, Timing]:
    """Time a call as a program sees it: CALLS in a row, until the GPU is done; L2 as it is.

    Where Python queues more slowly than the GPU works, this is Python's time.
    """
    need_a_gpu()

    def sample(fn):
        start = time.perf_counter()
        for _ in range(CALLS):
            fn()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3 / CALLS

    def samples(fn):
        for _ in range(3):
            fn()
        torch.cuda.synchronize()
        return [sample(fn) for _ in range(SAMPLES)]

    taken = {n: attempt(partial(samples, f), n, failed) for n, f in functions.items()}
    return {name: summary(times) for name, times in taken.items() if times}


def host_time(fn: Callable[[], object]) -> Timing:
    """The host time of one call, in ms: Python and driver until the launches are queued.

    The GPU is behind by a few calls only, so that none waits for room in the queue.
    """
    need_a_gpu()
    for _ in range(3):
        fn()
    times: list[float] = []
    while len(times) < LAUNCHES:
        torch.cuda.synchronize()
        fn()  # to a GPU that was idle: not counted
        for _ in range(SHORT_QUEUE):
            start = time.perf_counter_ns()
            fn()
            times.append((time.perf_counter_ns() - start) / 1e6)
    torch.cuda.synchronize()
    return summary(times)


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
