"""Measurement records: JSON files with the numbers, and where they come from.

Every measured number in the book is read from one of these, so a reader can trace it to a
machine, a driver and a commit. `save` writes one; the rest reads.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path

import torch


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

    def median_ms(self, name: str, case_name: str, implementation: str) -> float:
        """The median time of one implementation, in milliseconds."""
        return self.case(name, case_name)["results"][implementation]["median_ms"]

    def ratio(self, name: str, case_name: str, slow: str, fast: str) -> float:
        """How many times faster `fast` is than `slow` (below 1: it is slower)."""
        return self.median_ms(name, case_name, slow) / self.median_ms(name, case_name, fast)

    def error(self, name: str, case_name: str, implementation: str, measure: str) -> float:
        """An implementation's distance from float64: cosine, relative_l1 or relative_l2."""
        return self.case(name, case_name)["errors"][implementation][measure]

    def copy_gb_s(self) -> float:
        """The measured ceiling of HBM bandwidth: a large device copy, bytes read plus written."""
        return (
            self.case("ceilings", "copy")["bytes"]
            / self.median_ms("ceilings", "copy", "copy")
            / 1e6
        )

    def bf16_tflop_s(self) -> float:
        """The measured ceiling of bf16 matrix products: a large torch.matmul on random data."""
        return self._product_rate("matmul")

    def fp8_tflop_s(self) -> float:
        """The same for FP8 E4M3, summed by the tensor core."""
        return self._product_rate("matmul_fp8")

    def int8_top_s(self) -> float:
        """The same for INT8, in 10¹² operations a second."""
        return self._product_rate("matmul_int8")

    def _product_rate(self, name: str) -> float:
        return (
            self.case("ceilings", name)["flop"]
            / self.median_ms("ceilings", name, "matmul")
            / 1e9
        )

    def exp2_top_s(self) -> float:
        """The measured ceiling of exp2 in registers, in 10¹² a second."""
        return (
            self.case("ceilings", "exp2")["ops"]
            / self.median_ms("ceilings", "exp2", "exp2")
            / 1e9
        )

    def traffic_mb(self, case_name: str, label: str, cache: str = "none") -> float:
        """What one call moves through HBM, in MB (10⁶ bytes): read, and written sooner or later.

        By the hardware's counters (record `traffic`). cache: "none", as the program leaves the
        caches, or "all", emptied before every kernel; there, what a kernel leaves in L2 is not
        seen to be written.
        """
        found = self.case("traffic", case_name)["traffic"][label][cache]
        parts = ("read_bytes", "write_bytes", "left_bytes")
        return sum(found[part] for part in parts) / 1e6

    def traffic_share(self, case_name: str, label: str, of: str) -> float:
        """The HBM traffic of one implementation over another's, caches as they are."""
        return self.traffic_mb(case_name, label) / self.traffic_mb(case_name, of)

    def machine(self, name: str = "attention") -> str:
        """Where a record was taken, in one line."""
        p = self.record(name)["provenance"]
        return (
            f"{p['device']}, driver {p['driver']}, torch {p['torch']}, "
            f"Triton {p['triton']}, cuDNN {p['cudnn']}"
        )


def file_of(name: str, out: Path) -> Path:
    """Where a record goes: `out` itself if it names a file, else NAME.json in it."""
    return out if out.suffix in (".json", ".partial") else out / f"{name}.json"


def save(name: str, what: str, method: str, cases: list[dict], out: Path) -> Path:
    """Writes a record of the measurements just taken on this machine's GPU."""
    content = {
        "name": name,
        "what": what,
        "provenance": provenance(),
        "method": method,
        "cases": cases,
    }
    path = file_of(name, out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_text(content))
    return path


def as_text(content: dict) -> str:
    """JSON with one entry a line, but every list of numbers on one line."""
    text = json.dumps(content, indent=1)
    numbers = r"\[\n\s*[-\d.][-+\d.eE,\s]*\]"
    return re.sub(numbers, lambda m: re.sub(r"\s+", "", m[0]), text) + "\n"


def provenance() -> dict:
    """The machine and the software of this process, and the commit of this clone."""
    import triton

    fields = _smi("name,driver_version,power.limit,clocks.max.sm,clocks.max.mem,memory.total")
    device, driver, power, sm_clock, mem_clock, memory = fields
    return {
        "device": device,
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "memory_mib": _number(memory),
        "power_limit_w": _number(power, float),
        "max_sm_clock_mhz": _number(sm_clock),
        "max_memory_clock_mhz": _number(mem_clock),
        "sm_clock_under_load_mhz": sm_clock_under_load(),
        "driver": driver,
        "cuda": torch.version.cuda,
        "cudnn": _cudnn_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "sageattention": _version("sageattention"),
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def sm_clock_under_load() -> int | None:
    """The SM clock in MHz while the GPU multiplies bf16 matrices; None where not told.

    Attention draws less power than that, so its clock is as high or higher.
    """
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(200):  # a few tenths of a second: until the clock has settled
        matrix @ matrix
    torch.cuda.synchronize()
    command = _smi_command("clocks.sm")
    try:
        asking = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    except OSError:
        return None
    while asking.poll() is None:
        for _ in range(10):
            matrix @ matrix
        torch.cuda.synchronize()
    return _number(asking.communicate()[0].strip())


def _smi_command(query: str) -> list[str]:
    """nvidia-smi about the GPU that torch uses, which is not always the first."""
    gpu = f"--id=GPU-{torch.cuda.get_device_properties().uuid}"
    return ["nvidia-smi", gpu, f"--query-gpu={query}", "--format=csv,noheader,nounits"]


def _smi(query: str) -> list[str]:
    answer = _run(*_smi_command(query)).split(", ")
    asked = query.split(",")
    return answer if len(answer) == len(asked) else ["unknown"] * len(asked)


def _number(text: str, kind: type = int) -> int | float | None:
    """A number of nvidia-smi's; None for [N/A]."""
    try:
        return kind(text)
    except ValueError:
        return None


def _version(package: str) -> str | None:
    """An installed package's version; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """This clone's commit. A copy without its history is told by RCM_COMMIT."""
    describe = (
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
    )
    return os.environ.get("RCM_COMMIT") or _run(*describe)


def _cudnn_version() -> str:
    number = torch.backends.cudnn.version()
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
