"""The book's measurements: python -m rcmlib.measure.benchmark [--suite NAME …] [--out FOLDER].

Suites: ceilings (copy bandwidth, bf16 matrix rate), skip (chapter 4), attention, tiles and
one_over_n (chapter 6: the table, the choice of tiles, the 1/N law), gradients (chapter 7),
projection, modules and blocks (chapter 8), sage_quantize, sage, sage_crossover and
sage_accuracy (chapters 9 to 11; `sageattention==1.0.6` is timed too where it is installed).
Each writes one record. Every implementation of the skip is checked first, on the very inputs
it is timed on, and refused a time if it is wrong; the record's method says against what.
"""

import argparse
import sys
from pathlib import Path

import torch

from rcmlib.measure import records
from rcmlib.measure.suites import SUITES

TIMING = (
    "CUDA events around one call, L2 overwritten before each, the queue kept full; "
    "implementations interleaved in rounds of shuffled order; median, 10th and 90th "
    "percentile."
)


def table(cases: list[dict]) -> str:
    """Median milliseconds, one row a case; where it has errors instead, relative L1."""
    rows = [numbers(c) for c in cases]
    labels = list(dict.fromkeys(label for row in rows for label in row))
    width = max(16, *(len(label) + 1 for label in labels))
    lines = ["".join(f"{h:>{width}}" for h in ["case", *labels])]
    for c, row in zip(cases, rows, strict=True):
        shown = ("-" if label not in row else f"{row[label]:.4f}" for label in labels)
        lines.append("".join(f"{cell:>{width}}" for cell in (c["name"], *shown)))
    return "\n".join(lines)


def numbers(case: dict) -> dict[str, float]:
    """What the table shows of a case: a number for each implementation."""
    times = {label: t["median_ms"] for label, t in case["results"].items()}
    errors = {label: e["relative_l1"] for label, e in case.get("errors", {}).items()}
    return times | errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--out", type=Path, default=records.FOLDER)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device here, so nothing can be measured; the stored records are "
                 f"in {records.FOLDER.name}/: {', '.join(records.names())}")  # fmt: skip
    for name in options.suite:
        suite = SUITES[name]
        cases = suite.run()
        method = f"{TIMING} {suite.method}"
        records.save(name, suite.what, method, cases, options.out)
        print(f"{name}: {suite.what}\n{table(cases)}\n")


if __name__ == "__main__":
    main()
