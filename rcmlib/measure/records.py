"""Measurement records: JSON files that `python -m benchmarks` writes, with the numbers and
where they come from: machine, driver, commit."""

import json
from pathlib import Path


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

    def error(self, name: str, case_name: str, label: str, measure: str) -> float:
        """An implementation's distance from float64: cosine, relative_l1 or relative_l2."""
        return self.case(name, case_name)["errors"][label][measure]

    def machine(self, name: str = "attention") -> str:
        """Where a record was taken, in one line."""
        p = self.record(name)["provenance"]
        versions = ("driver", "torch", "Triton", "cuDNN")
        return ", ".join([p["device"], *(f"{v} {p[v.lower()]}" for v in versions)])


def fastest(case: dict, labels: tuple[str, ...]) -> str | None:
    """Which of these implementations has the shortest median; None if none was timed."""
    results = case["results"]
    timed = [label for label in labels if label in results]
    return min(timed, key=lambda label: results[label]["median_ms"], default=None)


def spread_ms(result: dict) -> float:
    """Half the distance between the 10th and 90th percentiles."""
    return (result["p90_ms"] - result["p10_ms"]) / 2
