"""Writing a record: the numbers just taken, and the machine and software they come from."""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from benchmarks import ROOT


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

    fields = _smi(
        "name,driver_version,power.limit,clocks.max.sm,clocks.max.mem,memory.total"
    )
    device, driver, power, sm_clock, mem_clock, memory = fields
    return {
        "device": device,
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "memory_mib": _number(memory),
        "l2_mib": torch.cuda.get_device_properties().L2_cache_size / 2**20,
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
    describe = ("describe", "--always", "--dirty", "--abbrev=12")
    return os.environ.get("RCM_COMMIT") or _run("git", "-C", str(ROOT), *describe)


def _cudnn_version() -> str:
    number = torch.backends.cudnn.version()
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
