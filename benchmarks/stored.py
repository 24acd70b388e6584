"""The records of this clone, and what the book reads in particular ones of them."""

import json
from pathlib import Path

from rcmlib.measure.records import Records

ROOT = Path(__file__).resolve().parent.parent  # of the clone


class StoredRecords(Records):
    """`Records`, with machine, errors, rates, ceilings (`ceilings`) and bytes (`traffic`)."""

    def machine(self, name: str = "attention") -> str:
        """Where a record was taken, in one line."""
        p = self.record(name)["provenance"]
        versions = ("driver", "torch", "Triton", "cuDNN")
        return ", ".join([p["device"], *(f"{v} {p[v.lower()]}" for v in versions)])

    def error(self, name: str, case_name: str, label: str, measure: str) -> float:
        """An implementation's distance from float64: cosine, relative_l1 or relative_l2."""
        return self.case(name, case_name)["errors"][label][measure]

    def tflop_s(self, name: str, case_name: str, label: str) -> float:
        """The rate of attention's products: 4·B·H·N²·D FLOP over the median time."""
        case = self.case(name, case_name)
        return case["flop"] / case["results"][label]["median_ms"] / 1e9

    def copy_gb_s(self) -> float:
        """The measured ceiling of HBM bandwidth: a large device copy, read plus written."""
        return self._ceiling("copy", "copy", "bytes") / 1e6

    def bf16_tflop_s(self) -> float:
        """The measured ceiling of bf16 matrix products: a large torch.matmul on random data."""
        return self._ceiling("matmul", "matmul", "flop") / 1e9

    def fp8_tflop_s(self) -> float:
        """The same for FP8 E4M3, summed by the tensor core."""
        return self._ceiling("matmul_fp8", "matmul", "flop") / 1e9

    def int8_top_s(self) -> float:
        """The same for INT8, in 10¹² operations a second."""
        return self._ceiling("matmul_int8", "matmul", "flop") / 1e9

    def exp2_top_s(self) -> float:
        """The measured ceiling of exp2 in registers, in 10¹² a second."""
        return self._ceiling("exp2", "exp2", "ops") / 1e9

    def _ceiling(self, case_name: str, label: str, what: str) -> float:
        """How much of `what` the machine does a millisecond."""
        done = self.case("ceilings", case_name)[what]
        return done / self.median_ms("ceilings", case_name, label)

    def traffic_mb(self, case_name: str, label: str) -> float:
        """What one call moves through HBM, in MB (10⁶ bytes): read, and written in the end.

        By the hardware's counters (record `traffic`), caches as the program leaves them.
        """
        found = self.case("traffic", case_name)["traffic"][label]["none"]
        parts = ("read_bytes", "write_bytes", "left_bytes")
        return sum(found[part] for part in parts) / 1e6

    def traffic_share(self, case_name: str, label: str, of: str) -> float:
        """The HBM traffic of one implementation over another's, caches as they are."""
        return self.traffic_mb(case_name, label) / self.traffic_mb(case_name, of)


records = StoredRecords(ROOT / "notebooks" / "measurements")


def open_record(given: str) -> dict:
    """A record: of a .json file, or the stored one of that name. FileNotFoundError."""
    if given.endswith(".json"):
        return json.loads(Path(given).read_text())
    return records.record(given)
