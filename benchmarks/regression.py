# Assigned: it is the help, and python -OO drops docstrings.
__doc__ = """\
Has something become slower? python -m benchmarks compare NOW.json BEFORE.json

Times depend on the machine and its clock; how much faster one implementation is than another
in the same run depends on them little. So ratios are compared, case by case. A record is a
file, or the name of a stored one. Exit 1 if something became slower or fails now.
"""

import argparse
import sys
from typing import NamedTuple

from benchmarks import open_record
from benchmarks.suites import SUITES
from benchmarks.suites.suite import REFERENCE
from rcmlib.measure.records import Estimate, estimate

TOLERANCE = 0.05
WORSE = frozenset({"slower", "fails now"})


class Row(NamedTuple):
    """One implementation of one case: what became of it, and the numbers behind that."""

    case: str
    label: str
    # same, faster, slower, fails now, not measured, no samples, no reference
    verdict: str
    detail: str = ""


def compare(
    now: list[dict], before: list[dict], reference: str, tolerance: float = TOLERANCE
) -> list[Row]:
    """A row for each implementation of the cases in `before`.

    The ratio is the reference's median over the implementation's. It has moved if the whole
    95 % interval of its change, of the four medians that it is made of, lies beyond the
    tolerance, which is there for what no interval of one run knows: the next run.
    """
    measured = {case["name"]: case for case in now}
    rows = []
    for old in before:
        new = measured.get(old["name"])
        if new is None:
            rows.append(Row(old["name"], "", "not measured"))
        elif reference not in old["results"] or reference not in new["results"]:
            rows.append(Row(old["name"], reference, "no reference"))
        else:
            labels = [label for label in old["results"] if label != reference]
            rows += [_row(label, new, old, reference, tolerance) for label in labels]
    return rows


def _row(label: str, new: dict, old: dict, reference: str, tolerance: float) -> Row:
    name = old["name"]
    if label in new.get("failed", {}):
        return Row(name, label, "fails now", new["failed"][label])
    if label not in new["results"]:
        return Row(name, label, "not measured")
    if not all("all_ms" in c["results"][label] for c in (new, old)):
        return Row(name, label, "no samples")
    change = _change(new, old, label, reference)
    before, after = (_ratio(case, label, reference) for case in (old, new))
    moved = change.low > tolerance or change.high < -tolerance
    verdict = "same" if not moved else "faster" if change.value > 0 else "slower"
    detail = f"{before:.3f} -> {after:.3f} of {reference}'s speed, {change:+.1%}"
    return Row(name, label, verdict, f"{detail} (allowed ±{tolerance:.0%})")


def _ratio(case: dict, label: str, reference: str) -> float:
    """How many times as fast as the reference."""
    ours, theirs = (case["results"][name]["median_ms"] for name in (label, reference))
    return theirs / ours


def _change(new: dict, old: dict, label: str, reference: str) -> Estimate:
    """The relative change of that ratio."""
    times = (c["results"][n]["all_ms"] for c in (new, old) for n in (reference, label))
    return estimate(*times, of=lambda r1, t1, r0, t0: (r1 / t1) / (r0 / t0) - 1)


def report(rows: list[Row]) -> str:
    """What moved, a line each, and how many did not."""
    same = sum(row.verdict == "same" for row in rows)
    lines = [f"{same} of {len(rows)} ratios have not moved"]
    lines += [
        f"  {row.verdict}: {row.case} {row.label} {row.detail}".rstrip()
        for row in rows
        if row.verdict != "same"
    ]
    return "\n".join(lines)


def passes(rows: list[Row]) -> bool:
    """Nothing became slower or fails now, and something was compared."""
    compared = any(row.verdict in ("same", "faster") for row in rows)
    return compared and not any(row.verdict in WORSE for row in rows)


def judge(now: dict, before: dict, reference: str, tolerance: float) -> int:
    """Prints what moved between two records; the exit status.

    now needs `name`, `cases` and the provenance's `device` only.
    """
    rows = compare(now["cases"], before["cases"], reference, tolerance)
    here, there = (record["provenance"]["device"] for record in (now, before))
    if here != there:
        print(f"the baseline is from another GPU: {there}")
    print(f"{now['name']}: {report(rows)}")
    return 0 if passes(rows) else 1


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("now", metavar="NOW.json")
    parser.add_argument("before", metavar="BEFORE.json")
    parser.add_argument("--reference", metavar="IMPLEMENTATION")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE)
    options = parser.parse_args(arguments)
    try:
        now, before = open_record(options.now), open_record(options.before)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    suite = SUITES.get(before["name"])
    reference = options.reference or (suite.reference if suite else REFERENCE)
    sys.exit(judge(now, before, reference, options.tolerance))
