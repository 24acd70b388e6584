# Assigned: it is the help, and python -OO drops docstrings.
__doc__ = """\
Runs implementations once each where a profiler can see it: the program under ncu or nsys.

    python -m benchmarks.profiled seed            # every label of a shape
    python -m benchmarks.profiled seed C2048      # of several

Only the one call of each implementation lies between cudaProfilerStart and cudaProfilerStop,
inside an NVTX range "shape/label". Compiling, allocating and warming up come before. L2 is
overwritten (read, so without leaving work behind) before the call, and once more after it,
inside: the bytes that this second sweep makes the cache write out are the implementation's.
The last line of the output is JSON: for each shape, the labels that ran, in order.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.kernels import flush_l2_kernel
from benchmarks.traffic import SHAPES, labels
from rcmlib.measure import timing
from rcmlib.measure.implementations import attention_inputs, implementation

FLUSH_BYTES = 256 << 20  # five times the L2 of an H100
BLOCK = 4096


def flush(buffer: torch.Tensor, sink: torch.Tensor) -> None:
    """Fills L2 with `buffer`: float32 zeros, FLUSH_BYTES of them."""
    flush_l2_kernel[(buffer.numel() // BLOCK,)](buffer, sink, BLOCK=BLOCK)


def profile(
    run: Callable[[], object], name: str, buffer: torch.Tensor, sink: torch.Tensor
) -> None:
    """One call of `run` under the profiler, the caches as other layers would leave them."""
    for _ in range(2):  # compile, choose algorithms, allocate
        run()
    flush(buffer, sink)
    torch.cuda.synchronize()
    with torch.cuda.profiler.profile():
        with torch.cuda.nvtx.range(name):
            out = run()
        flush(buffer, sink)
        torch.cuda.synchronize()
    del out  # not before: its memory would be free to use again


def profile_shape(name: str, buffer: torch.Tensor, sink: torch.Tensor) -> list[str]:
    """Profiles every implementation of a shape; those that cannot run here are named."""
    inputs = attention_inputs(*SHAPES[name])
    failed: dict[str, str] = {}

    def profile_one(label: str) -> None:
        # Not a copy: that is no kernel, and the profiler would not see it.
        run = inputs.x.neg if label == "negate" else implementation(label, inputs)
        profile(run, f"{name}/{label}", buffer, sink)

    for label in labels(name):
        timing.attempt(partial(profile_one, label), label, failed)
    for label, reason in failed.items():
        print(f"{name}: {label} left out: {reason}")
    return [label for label in labels(name) if label not in failed]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks profiled",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shapes", nargs="*", metavar="SHAPE")
    names = parser.parse_args(arguments).shapes
    if not torch.cuda.is_available():
        sys.exit("no CUDA device here, so there is nothing to profile")
    if unknown := set(names) - set(SHAPES):
        sys.exit(f"unknown shapes {sorted(unknown)}; there are: {', '.join(SHAPES)}")
    buffer = torch.zeros(FLUSH_BYTES // 4, device="cuda")
    sink = torch.zeros(1, device="cuda")
    flush(buffer, sink)  # or the zeros just written would be the first call's writes
    done = {}
    for name in names or SHAPES:
        done[name] = profile_shape(name, buffer, sink)
        timing.free()
    print(json.dumps(done))


if __name__ == "__main__":
    main(sys.argv[1:])
