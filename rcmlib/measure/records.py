"""Records: JSON files of `python -m benchmarks`: numbers, machine, driver, commit."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A value and its 95 % interval: f"{estimate:.2f}" is "1.10 [1.09, 1.12]"."""

    value: float
    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __format__(self, spec: str) -> str:
        return "{:{s}} [{:{s}}, {:{s}}]".format(*self, s=spec)


def estimate(*samples: Sequence[float], of: Callable = np.divide) -> Estimate:
    """`of` the medians of these lists of samples: of two, unless told, first over second.

    The interval is the bootstrap's: from each list as many samples as it has are drawn, with
    repetition, 2000 times; it spans the middle 95 % of what `of` makes of the new medians.
    """
    rng = np.random.default_rng(0)  # the same digits on every machine
    drawn = (rng.choice(times, (2000, len(times))) for times in samples)
    low, high = np.quantile(of(*(np.median(d, axis=1) for d in drawn)), (0.025, 0.975))
    return Estimate(of(*map(np.median, samples)), low, high)


class Records:
    """The records of a folder: `Records("notebooks/measurements").ratio(...)`."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def names(self) -> list[str]:
        """The stored records."""
        return sorted(path.stem for path in self.folder.glob("*.json"))

    def record(self, name: str) -> dict:
        """One record: name, what, provenance, method, cases. FileNotFoundError if absent."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            raise FileNotFoundError(f"no record {name!r}; there are: {', '.join(self.names())}")
        return json.loads(path.read_text())

    def case(self, name: str, case_name: str) -> dict:
        """One case of a record: its shape, and the results of its implementations."""
        cases = {c["name"]: c for c in self.record(name)["cases"]}
        if case_name not in cases:
            raise KeyError(f"record {name!r} has no case {case_name!r}: {', '.join(cases)}")
        return cases[case_name]

    def median_ms(self, name: str, case_name: str, label: str) -> float:
        """The median time of one implementation, in milliseconds."""
        return self.case(name, case_name)["results"][label]["median_ms"]

    def ratio(self, name: str, case_name: str, slow: str, fast: str) -> float:
        """How many times faster `fast` is than `slow` (below 1: it is slower)."""
        return self.median_ms(name, case_name, slow) / self.median_ms(name, case_name, fast)

    def estimate(self, name: str, case_name: str, *labels: str, of=np.divide) -> Estimate:
        """The ratio of two labels' medians, or what `of` makes of them, with its interval."""
        results = self.case(name, case_name)["results"]
        return estimate(*(results[label]["all_ms"] for label in labels), of=of)


def fastest(case: dict, labels: tuple[str, ...]) -> str | None:
    """Which of these implementations has the shortest median; None if none was timed."""
    results = case["results"]
    timed = [label for label in labels if label in results]
    return min(timed, key=lambda label: results[label]["median_ms"], default=None)
