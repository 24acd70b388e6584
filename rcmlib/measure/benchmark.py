"""All implementations side by side, each checked before it is timed.

case = rcmlib.benchmark_all_implementations(4, 2048, 768, 12)
case["results"]["fused"]["median_ms"], case["failed"], case["peak_bytes"]["naive"]
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from tqdm import tqdm

from rcmlib import reference
from rcmlib.attention import HEAD_DIMS
from rcmlib.core.checks import DTYPES
from rcmlib.measure import implementations, timing
from rcmlib.measure.implementations import IMPLEMENTATIONS, TWO_PASS, Inputs, Run, installed
from rcmlib.measure.records import estimate, fastest

# Variants of one kernel are chapter 12's subject, and stay out of the comparison.
PEERS = tuple(n for n in IMPLEMENTATIONS if n == "sage_kernel_fp8" or "sage_kernel" not in n)


def benchmark_all_implementations(
    B: int, N: int, C: int, num_heads: int, *, dtype: torch.dtype = torch.bfloat16,
    implementations: Iterable[str] | None = None, seed: int = 0,
) -> dict:  # fmt: skip
    """Times every way to compute c_skip·x + c_out·Attention(x); prints a table.

    B samples of N tokens and C channels in num_heads heads; D = C / num_heads from 16 to 256.
    dtype: float32, float16 or bfloat16. implementations: labels of
    `rcmlib.measure.implementations.IMPLEMENTATIONS`; unless given, PEERS, and SageAttention
    1.0.6 only where it is installed.

    Returns a record's case: sizes; `results`, by label: median, 10th and 90th percentile in
    milliseconds of GPU time, and every sample; `errors`: relative L2 against float64;
    `peak_bytes`: what one call holds above its inputs; `failed`: a sentence for each that is
    wrong, not supported or out of memory.

    Forgets what torch.compile has compiled in this process (`torch.compiler.reset`).
    TypeError or ValueError for bad arguments, RuntimeError without a CUDA device.
    """
    shape = check_sizes(B, N, C, num_heads)
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    labels = check_labels(implementations)
    timing.need_a_gpu()
    case = benchmark_shape(f"B{B}_N{N}_C{C}_H{num_heads}", shape, labels, dtype, seed)
    print(table(case))
    return case


def check_sizes(B: int, N: int, C: int, num_heads: int) -> tuple[int, int, int, int]:
    """The shape (B, H, N, D), or the TypeError or ValueError that says what is wrong."""
    for name, size in {"B": B, "N": N, "C": C, "num_heads": num_heads}.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name} must be an int, got {type(size).__name__}")
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if C % num_heads:
        raise ValueError(f"C must be a multiple of num_heads, got {C} and {num_heads}")
    if C // num_heads not in HEAD_DIMS:
        allowed = f"from {HEAD_DIMS[0]} to {HEAD_DIMS[-1]}"
        raise ValueError(f"C / num_heads must be {allowed}, got {C // num_heads}")
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
    if unknown := [str(label) for label in labels if label not in IMPLEMENTATIONS]:
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"implementations must be among {known}; got {', '.join(unknown)}")
    return labels


def benchmark_shape(
    name: str, shape: tuple[int, int, int, int], labels: Iterable[str],
    dtype: torch.dtype = torch.bfloat16, seed: int = 0, least: int = timing.LEAST_SAMPLES,
) -> dict:  # fmt: skip
    """A record's case: these implementations at one shape (B, H, N, D), `least` times each."""
    batch, heads, tokens, dim = shape
    sizes = dict(zip("BHND", shape, strict=True))
    sizes |= {"dtype": str(dtype).removeprefix("torch."), "seed": seed}
    sizes["flop"] = 4 * batch * heads * tokens**2 * dim
    timing.free()
    failed: dict[str, str] = {}

    def prepare():
        inputs = implementations.attention_inputs(*shape, dtype, seed)
        return inputs, distance(inputs)

    prepared = timing.attempt(prepare, "inputs", failed)
    if prepared is None:
        failed = dict.fromkeys(labels, f"inputs: {failed['inputs']}")
        return {"name": name, **sizes, "failed": failed, "results": {}}
    inputs, error = prepared
    build = implementations.implementation
    runs = {n: timing.attempt(partial(build, n, inputs), n, failed) for n in labels}
    runs = {label: run for label, run in runs.items() if run}
    checked = check(name, runs, error, lambda label: IMPLEMENTATIONS[label].bound)
    checked.failed.update(failed)
    times = timing.compare(checked.runs, least=least, failed=checked.failed)
    peaks = {label: timing.peak_bytes(runs[label]) for label in times}
    return case(name, sizes | {"peak_bytes": peaks}, times, checked)


def distance(inputs: Inputs) -> Callable[[str, torch.Tensor], float]:
    """A function of a label and its result: the relative L2 error against float64, on three
    query rows. A row depends on its own query only, so three stand for all."""
    q, k, v, x, c_skip, c_out = inputs
    tokens = q.shape[2]
    rows = torch.tensor([0, tokens // 2, tokens - 1], device=x.device)
    alone = reference.merge_heads(reference.attention(q[:, :, rows], k, v))
    with_skip = reference.skip(x[:, rows], alone, c_skip, c_out)

    def error(label: str, out: torch.Tensor) -> float:
        ref = with_skip if IMPLEMENTATIONS[label].skip else alone
        return reference.relative_l2(out[:, rows], ref)

    return error


class Checked(NamedTuple):
    """What `check` found, by label; `runs` are those that may be timed."""

    runs: dict[str, Run]
    errors: dict[str, dict[str, float]]
    failed: dict[str, str]


def check(
    name: str, runs: dict[str, Run], error: Callable[[str, object], float],
    bound: Callable[[str], float],
) -> Checked:  # fmt: skip
    """Runs each implementation once: one that fails or is wrong is named, and gets no time."""
    checked = Checked({}, {}, {})

    def examine(label):
        wrong_by = error(label, runs[label]())
        checked.errors[label] = {"relative_l2": wrong_by}
        if not wrong_by < bound(label):  # NaN is wrong too
            said = f"wrong: relative error {wrong_by:.2g}, allowed {bound(label)}"
            raise ArithmeticError(said)
        checked.runs[label] = runs[label]

    # disable=None: no bar where the output is a file or a notebook
    for label in tqdm(runs, desc=name, leave=False, disable=None):
        timing.attempt(partial(examine, label), label, checked.failed)
    return checked


def case(
    name: str, sizes: dict, times: dict[str, timing.Timing], checked: Checked | None = None
) -> dict:
    """A record's case: what was run, what `check` found, and the times of what ran."""
    found = {"errors": checked.errors, "failed": checked.failed} if checked else {}
    results = {label: t._asdict() for label, t in times.items()}
    return {"name": name, **sizes, **found, "results": results}


def table(case: dict) -> str:
    """Times, ratios and peak memory of a case, and what failed; errors where it has no times.

    The ratio, with its 95 % interval, says how many times as fast as the strongest two-pass
    pipeline an implementation is: below 1, it is slower.
    """
    sizes = {k: v for k, v in case.items() if isinstance(v, int) or k == "dtype"}
    sizes = " ".join(f"{k}={v}" for k, v in sizes.items() if k not in ("seed", "flop"))
    rows = _time_rows(case) if case["results"] else _error_rows(case)
    width, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    used = [i for i in range(1, len(rows[0])) if any(row[i] for row in rows[1:])]
    lines = [f"{case['name']}: {sizes}"]
    for row in rows:
        cells = (f"{row[i]:>{others[i - 1] + 4}}" for i in used)
        lines.append(f"  {row[0]:{width}}" + "".join(cells))
    for label, why in case.get("failed", {}).items():
        lines.append(f"  {label:{width}}  not timed: {why}")
    return "\n".join(lines)


def _time_rows(case: dict) -> list[list[str]]:
    best = case["results"].get(fastest(case, TWO_PASS), {}).get("all_ms")
    rows = [["", "median ms", "× two-pass [95 %]", "TFLOP/s", "peak MB"]]
    for label, result in case["results"].items():
        ms = result["median_ms"]
        times = result.get("all_ms")
        ratio = "" if not best else "1" if times is best else f"{estimate(best, times):.2f}"
        rate = f"{case['flop'] / ms / 1e9:.0f}" if "flop" in case else ""
        peak = case.get("peak_bytes", {}).get(label)
        peak = "" if peak is None else f"{peak / 1e6:.1f}"
        rows.append([label, f"{ms:.4f}", ratio, rate, peak])
    return rows


def _error_rows(case: dict) -> list[list[str]]:
    measures = ("cosine", "relative_l1", "relative_l2")
    rows = [["", *measures]]
    for label, errors in case.get("errors", {}).items():
        cells = (f"{errors[m]:.6f}" if m in errors else "" for m in measures)
        rows.append([label, *cells])
    return rows
