"""Random calls of every public function, each compared with float64.

    python -m tools.fuzz [--calls 10000] [--seed 0] [--workers 1] [--only INDEX ...]

Function, shapes, strides, dtypes, options and grad mode of a call follow from (seed, index)
alone (tests/random_calls, which also has the errors that are allowed). A call that fails is
printed as a line that repeats it, and the next is made; in the end the exit code is 1.
--workers: so many processes share the GPU. One that dies is reported with the call that it
was at, and another goes on. Without a GPU Triton's interpreter runs the kernels, on small
shapes: --calls 40 takes some ten seconds.
"""

import argparse
import contextlib
import multiprocessing
import os
import queue
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator

import pytest
import torch

import rcmlib  # noqa: F401  (before anything imports Triton)
from tests.inputs import poison_empty
from tests.random_calls import draw_call, kind_of
from tests.random_calls.judge import check

FAILED = float("inf")
Result = tuple[int, float, str]  # index, error in units of its bound, what to print
HANGS = 300  # seconds without a result
KEPT = 4 << 30  # bytes; hardly a call has the sizes of another, and all share the GPU


def repeats(seed: int, index: int, what: str) -> str:
    return f"python -m tools.fuzz --seed {seed} --only {index}   # {what}"


def make_call(seed: int, index: int) -> Result:
    call = "not drawn"
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        call = draw_call(seed, index, device)
        return index, check(call), ""
    except Exception as error:  # whatever it is: the next call has to be made
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        said = " ".join(str(error).split())[:300]
        return index, FAILED, repeats(seed, index, f"{call}: {kind}{said}")


def make_calls(seed: int, indices: list[int]) -> Iterator[Result]:
    """Ends early where a call has cost the process its GPU (an illegal address, say)."""
    with pytest.MonkeyPatch.context() as patch:
        poison_empty(patch)  # what a kernel does not write is NaN
        for index in indices:
            yield make_call(seed, index)
            try:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if torch.cuda.memory_reserved() > KEPT:
                    torch.cuda.empty_cache()
            except RuntimeError:
                return


# ---- several processes ----


def work(pipe, seed: int) -> None:
    """A worker process: a list of indices comes in, its results and a None go out."""
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError):  # nothing more comes in
        while True:
            left = pipe.recv()
            for result in make_calls(seed, left):
                pipe.send(result)
                left = left[1:]
            if left:
                return  # with exit code 0: the call that lost the GPU was reported
            pipe.send(None)


class Worker:
    """A process that makes calls, and those that follow it when it dies."""

    def __init__(self, seed: int):
        self.seed, self.process = seed, None

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=work, args=(theirs, self.seed), daemon=True
        )
        self.process.start()
        theirs.close()

    def make_calls(self, indices: list[int]) -> Iterator[Result]:
        while indices:
            if self.process is None:
                self.start()
            died = ""
            try:
                self.pipe.send(indices)
                while True:
                    if not self.pipe.poll(HANGS):
                        died = f"no result after {HANGS} s"
                        break
                    result = self.pipe.recv()
                    if result is None:
                        return
                    yield result
                    indices = indices[1:]
            except (EOFError, OSError):
                self.process.join(10)
                if self.process.exitcode != 0:
                    died = f"the process died with {self.process.exitcode}"
            self.process.kill()
            self.process = None
            if died and indices:
                yield indices[0], FAILED, repeats(self.seed, indices[0], died)
                indices = indices[1:]


def share_calls(seed: int, indices: list[int], workers: int) -> Iterator[Result]:
    """Calls of one kind go to one process, which alone compiles their kernels."""
    kinds = defaultdict(list)
    for index in indices:
        kinds[kind_of(seed, index)].append(index)
    todo, done = queue.SimpleQueue(), queue.SimpleQueue()
    for batch in sorted(kinds.values(), key=len, reverse=True):
        todo.put(batch)

    def serve() -> None:
        worker = Worker(seed)
        while True:
            try:
                batch = todo.get_nowait()
            except queue.Empty:
                return
            for result in worker.make_calls(batch):
                done.put(result)

    for _ in range(workers):
        threading.Thread(target=serve, daemon=True).start()
    for _ in indices:
        yield done.get()


def main(arguments: list[str] | None = None) -> int:
    """1 if a call failed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only", type=int, nargs="+", metavar="INDEX")
    options = parser.parse_args(arguments)
    if os.environ.get("RCM_REQUIRE_GPU") == "1" and not torch.cuda.is_available():
        sys.exit("RCM_REQUIRE_GPU=1, but torch sees no CUDA device")
    seed, indices = options.seed, options.only or list(range(options.calls))
    if options.workers > 1 and not options.only:
        results = share_calls(seed, indices, options.workers)
    else:
        results = make_calls(seed, indices)

    start, made, failed = time.monotonic(), 0, 0
    calls, worst = defaultdict(int), defaultdict(float)
    for index, error, line in results:
        made, failed = made + 1, failed + bool(line)
        name, _ = kind_of(seed, index)
        calls[name] += 1
        worst[name] = max(worst[name], error)
        if line:
            print(line, flush=True)
        if made % 1000 == 0:
            print(f"{made} calls in {time.monotonic() - start:.0f} s", flush=True)
    print(f"{'function':24} {'calls':>6}  worst error / bound")
    for name in sorted(calls):
        print(f"{name:24} {calls[name]:6}  {worst[name]:.2f}")
    if made < len(indices):
        print(f"{len(indices) - made} calls were not made: the GPU was lost")
    print(f"{failed} of {made} calls failed, {time.monotonic() - start:.0f} s")
    return int(failed > 0 or made < len(indices))


if __name__ == "__main__":
    sys.exit(main())
