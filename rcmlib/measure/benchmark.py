"""All implementations side by side, each checked before it is timed.

case = rcmlib.benchmark_all_implementations(4, 2048, 768, 12)
case["results"]["fused"]["median_ms"], case["failed"], case["peak_bytes"]["naive"]
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from tqdm import tqdm

from rcmlib.attention import HEAD_DIMS
from rcmlib.core.checks import DTYPES
from rcmlib.measure import timing
from rcmlib.measure.implementations import (
    IMPLEMENTATIONS,
    allowed,
    attention_inputs,
    distance,
    has_sage_one,
    implementation,
)
from rcmlib.measure.tables import table

Run = Callable[[], object]

# Variants of one kernel are chapter 11's subject, and stay out of the comparison.
PEERS = tuple(
    label
    for label in IMPLEMENTATIONS
    if not label.startswith("sage_kernel") or label == "sage_kernel_fp8"
)


def benchmark_all_implementations(
    B: int,
    N: int,
    C: int,
    num_heads: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    implementations: Iterable[str] | None = None,
    seed: int = 0,
) -> dict:
    """Times every way to compute c_skip·x + c_out·Attention(x); prints a table.

    B samples of N tokens and C channels in num_heads heads; D = C / num_heads from 16 to 256.
    dtype: float32, float16 or bfloat16. implementations: labels of
    `rcmlib.measure.implementations.IMPLEMENTATIONS`; unless given, PEERS, and SageAttention 1.0.6
    only where it is installed.

    Returns a record's case: sizes; `results`, by label: median, 10th and 90th percentile in
    milliseconds of GPU time, and every sample; `errors`: relative L2 against float64;
    `peak_bytes`: what one call holds above its inputs; `failed`: a sentence for each that is
    wrong, not supported or out of memory.

    Forgets what torch.compile has compiled in this process (`torch.compiler.reset`).
    TypeError or ValueError for bad arguments, RuntimeError without a CUDA device.
    """
    shape = check_sizes(B, N, C, num_heads)
    if dtype not in DTYPES:
        names = ", ".join(str(d) for d in DTYPES)
        raise TypeError(f"dtype must be one of {names}, got {dtype}")
    labels = check_labels(implementations)
    if not torch.cuda.is_available():
        raise RuntimeError("implementations are timed on a CUDA device, and there is none here")
    case = measure(f"B{B}_N{N}_C{C}_H{num_heads}", shape, labels, dtype, seed)
    print(table(case))
    return case


def check_sizes(B: int, N: int, C: int, num_heads: int) -> tuple[int, int, int, int]:
    """The shape (B, H, N, D), or the TypeError or ValueError that says what is wrong."""
    sizes = {"B": B, "N": N, "C": C, "num_heads": num_heads}
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name} must be an int, got {type(size).__name__}")
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if C % num_heads:
        raise ValueError(f"C must be a multiple of num_heads, got {C} and {num_heads}")
    if C // num_heads not in HEAD_DIMS:
        raise ValueError(
            f"C / num_heads must be from {HEAD_DIMS[0]} to {HEAD_DIMS[-1]}, "
            f"got {C // num_heads}"
        )
    return B, num_heads, N, C // num_heads


def check_labels(implementations: Iterable[str] | None) -> list[str]:
    """The labels to run, in the order given; all that are installed if none are given."""
    if implementations is None:
        return installed(PEERS)
    if isinstance(implementations, str):
        raise TypeError("implementations must be a list of labels, got one str")
    labels = list(dict.fromkeys(implementations))
    if not labels:
        raise ValueError("implementations must name at least one, got none")
    if unknown := [label for label in labels if label not in IMPLEMENTATIONS]:
        raise ValueError(
            f"implementations must be among {', '.join(IMPLEMENTATIONS)}; "
            f"got {', '.join(map(str, unknown))}"
        )
    return labels


def installed(labels: Iterable[str]) -> list[str]:
    """labels without the peer that is not installed here."""
    missing = () if has_sage_one() else ("sage1_compiled",)
    return [label for label in labels if label not in missing]


def measure(
    name: str,
    shape: tuple[int, int, int, int],
    labels: Iterable[str],
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    budget_ms: float = timing.BUDGET_MS,
) -> dict:
    """A record's case: these implementations at one shape (B, H, N, D)."""
    batch, heads, tokens, dim = shape
    sizes = dict(zip("BHND", shape, strict=True))
    sizes |= {"dtype": str(dtype).removeprefix("torch."), "seed": seed}
    sizes["flop"] = 4 * batch * heads * tokens**2 * dim
    failed: dict[str, str] = {}
    timing.free()

    def prepare():
        inputs = attention_inputs(*shape, dtype, seed)
        return inputs, distance(inputs)

    prepared = timing.attempt(prepare, "inputs", failed)
    if prepared is None:
        failed = dict.fromkeys(labels, f"inputs: {failed['inputs']}")
        return {"name": name, **sizes, "failed": failed, "results": {}}
    inputs, error = prepared
    builders = {label: partial(implementation, label, inputs) for label in labels}
    checked = check(name, builders, error, allowed)
    times = timing.compare(checked.runs, budget_ms=budget_ms, failed=checked.failed)
    return checked.case(name, sizes, times)


class Checked(NamedTuple):
    """What `check` found, by label; `runs` are those that may be timed."""

    runs: dict[str, Run]
    errors: dict[str, dict[str, float]]
    peak_bytes: dict[str, int]
    failed: dict[str, str]

    def case(self, name: str, sizes: dict, times: dict[str, timing.Timing]) -> dict:
        """A record's case, with the times of what ran to the end."""
        return {
            "name": name,
            **sizes,
            "errors": self.errors,
            "peak_bytes": self.peak_bytes,
            "failed": self.failed,
            "results": {label: t._asdict() for label, t in times.items()},
        }


class Wrong(ArithmeticError):
    """An implementation's result is too far from float64's."""


def check(
    name: str,
    builders: dict[str, Callable[[], Run]],
    error: Callable[[str, object], float],
    allowed: Callable[[str], float],
) -> Checked:
    """Builds and runs each implementation once, compares it, and takes its peak memory."""
    checked = Checked({}, {}, {}, {})

    def examine(label):
        run = builders[label]()
        wrong_by, bound = error(label, run()), allowed(label)
        checked.errors[label] = {"relative_l2": wrong_by}
        if not wrong_by < bound:  # NaN is wrong too
            raise Wrong(f"wrong: relative error {wrong_by:.2g}, allowed {bound}")
        checked.peak_bytes[label] = timing.peak_bytes(run)
        checked.runs[label] = run

    # disable=None: no bar where the output is a file or a notebook
    for label in tqdm(builders, desc=name, leave=False, disable=None):
        timing.attempt(partial(examine, label), label, checked.failed)
    return checked
