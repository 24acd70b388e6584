# Assigned: it is the help, and python -OO drops docstrings.
__doc__ = """\
HBM traffic by the hardware's own counters: python -m benchmarks traffic [--out …].

Starts Nsight Compute on `benchmarks.profiled` twice, once with the caches as the program
leaves them (--cache-control none) and once with all caches emptied before every kernel (all),
and writes the record `traffic`. Clocks are left alone (--clock-control none): no time is
measured here. All metrics fit in one pass of the counters, so no kernel has to be replayed.

Nsight Systems shows the same calls on a time line, for those who have it:

    nsys profile --trace=cuda,nvtx python -m benchmarks.profiled seed
    nsys stats --report nvtx_kern_sum,cuda_gpu_kern_sum report1.nsys-rep
"""

import argparse
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks import ROOT, records
from benchmarks.provenance import save
from rcmlib.measure import ledger

SHAPES = {  # (B, H, N, D)
    "seed": (4, 12, 2048, 64),
    "C2048": (4, 16, 8192, 128),
    "wan": (1, 12, 32760, 128),
}
CACHES = ("none", "all")  # ncu --cache-control
MARKER = "flush_l2_kernel"  # ends the kernels of each label
SECTOR = 32  # bytes; L2 counts in these
METRICS = {  # name in the record: (ncu's name, unit, bytes a unit)
    "read_bytes": ("dram__bytes_read.sum", "byte", 1),
    "write_bytes": ("dram__bytes_write.sum", "byte", 1),
    "l2_read_bytes": ("lts__t_sectors_op_read.sum", "sector", SECTOR),
    "l2_write_bytes": ("lts__t_sectors_op_write.sum", "sector", SECTOR),
}
WHAT = (
    "Bytes that cross HBM (dram__bytes_*) and that L2 serves (lts__t_sectors_op_*, 32 bytes "
    "a sector), kernel by kernel, for one call of each implementation."
)
METHOD = (
    "--clock-control none; cache-control none (caches as the program leaves "
    "them) and all (emptied before every kernel). bf16, q, k, v views of one packed QKV. "
    "Compiled and warmed up before. L2 filled with other data before each call by reading "
    "256 MiB, and again after it: left_bytes is what L2 then still had to write. passes: how "
    "often the profiler ran each kernel; once disturbs no cache."
)


class ProfilerError(RuntimeError):
    """Nsight Compute is missing, may not count, or said something unexpected."""


def labels(shape: str) -> list[str]:
    """The implementations profiled at a shape, "negate" first: its bytes are known."""
    found = [label for label in ledger.PIPELINES if label != "naive"]
    return [*found, "naive"] if shape == "seed" else found


# ---- Nsight Compute ----


def find_ncu() -> str:
    """Its path. ProfilerError if it is neither on the PATH nor in CUDA's usual folder."""
    ncu = shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")
    if ncu is None:
        raise ProfilerError(
            "Nsight Compute (ncu) was not found: it comes with the CUDA toolkit; "
            "put its folder on the PATH"
        )
    return ncu


def version() -> str:
    """What `ncu --version` says last."""
    done = subprocess.run([find_ncu(), "--version"], capture_output=True, text=True)
    return done.stdout.strip().split("\n")[-1]


def command(ncu: str, cache: str, log: Path, shapes: list[str]) -> list[str]:
    """ncu on `benchmarks.profiled`; its messages and the CSV go to `log`."""
    metrics = ",".join(metric for metric, *_ in METRICS.values())
    options = {
        "--target-processes": "application-only",
        "--profile-from-start": "off",
        "--cache-control": cache,
        "--clock-control": "none",
        "--replay-mode": "kernel",
        "--metrics": metrics,
        "--print-units": "base",
        "--print-kernel-base": "function",
        "--log-file": str(log),
    }
    flat = [word for option in options.items() for word in option]
    program = [sys.executable, "-m", "benchmarks.profiled", *shapes]
    return [ncu, *flat, "--csv", *program]


def run(cache: str, shapes: list[str]) -> tuple[str, dict[str, list[str]]]:
    """(ncu's log, the labels that ran at each shape). ProfilerError says what went wrong."""
    ncu = find_ncu()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log.csv")
        done = subprocess.run(
            command(ncu, cache, log, shapes),
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"LC_ALL": "C", "TORCHINDUCTOR_COMPILE_THREADS": "1"},
        )
        text = log.read_text() if log.exists() else ""
    check_log(text)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise ProfilerError(
            f"the profiled program failed (exit {done.returncode}):\n"
            + "\n".join([*lines, text])[-2000:]
        )
    print(*lines[:-1], sep="\n", end="\n" if lines[:-1] else "")
    return text, json.loads(lines[-1])


def check_log(log: str) -> None:
    """ProfilerError for what Nsight Compute itself complains of."""
    if "ERR_NVGPUCTRPERM" in log:
        raise ProfilerError(
            "this user may not read the GPU's counters (ERR_NVGPUCTRPERM): run as root, or "
            "load the driver with NVreg_RestrictProfilingToAdminUsers=0 in "
            "/etc/modprobe.d/, or give a container --cap-add=SYS_ADMIN"
        )
    if error := re.search(r"==ERROR== (.*)", log):
        raise ProfilerError(f"Nsight Compute says: {error[1].strip()}")


def parse(log: str) -> list[dict]:
    """The profiled kernels in launch order: {"name", and bytes for each of METRICS}.

    ncu writes a row a kernel and metric, after lines that begin with ==.
    """
    rows = csv.DictReader(line for line in log.splitlines() if line.startswith('"'))
    names = {metric: (name, *rest) for name, (metric, *rest) in METRICS.items()}
    kernels: dict[str, dict] = {}
    for row in rows:
        if row["Metric Name"] not in names:
            continue
        name, unit, factor = names[row["Metric Name"]]
        value = row["Metric Value"].replace(",", "")
        if row["Metric Unit"].rstrip("s") != unit or not re.fullmatch(r"[\d.]+", value):
            raise ProfilerError(
                f"{row['Metric Name']} came as {value!r} {row['Metric Unit']!r}, "
                f"not as a number of {unit}s"
            )
        kernel = kernels.setdefault(row["ID"], {"name": row["Kernel Name"]})
        kernel[name] = round(float(value) * factor)
    for kernel in kernels.values():
        if missing := METRICS.keys() - kernel.keys():
            raise ProfilerError(f"{kernel['name']} lacks {', '.join(sorted(missing))}")
    return list(kernels.values())


def replays(log: str) -> int:
    """How often the profiler ran a kernel, at most: more than once disturbs the caches."""
    return max(map(int, re.findall(r"- (\d+) pass", log)), default=1)


def by_label(kernels: list[dict], names: list[str]) -> list[dict]:
    """Traffic of each of `names`, whose kernels follow one another, a MARKER after each."""
    groups, current = [], []
    for kernel in kernels:
        if kernel["name"] == MARKER:
            groups.append(summed(current, kernel))
            current = []
        else:
            current.append(kernel)
    if len(groups) != len(names) or current:
        raise ProfilerError(
            f"{len(names)} implementations ran, but the profiler saw {len(groups)} "
            f"groups of kernels and {len(current)} more kernels"
        )
    return groups


def summed(kernels: list[dict], marker: dict) -> dict:
    """One implementation's entry in the record."""
    sums = {name: sum(k[name] for k in kernels) for name in METRICS}
    return {**sums, "left_bytes": marker["write_bytes"], "kernels": kernels}


# ---- the record ----


def traffic_cases(shapes: list[str]) -> list[dict]:
    """The cases of the record `traffic`. ProfilerError where nothing can be counted."""
    cases = [
        {"name": name, **dict(zip("BHND", SHAPES[name], strict=True)),
         "results": {}, "passes": {}, "traffic": {}}
        for name in shapes
    ]  # fmt: skip
    for cache in CACHES:
        log, ran = run(cache, shapes)
        groups = iter(
            by_label(parse(log), [n for found in ran.values() for n in found])
        )
        for case in cases:
            case["passes"][cache] = replays(log)
            for label in ran[case["name"]]:
                case["traffic"].setdefault(label, {})[cache] = next(groups)
    return cases


def predicted_mb(case: dict, label: str, l2_bytes: float = 0) -> float:
    """What the ledger says for a case of the record, in MB (10⁶ bytes)."""
    shape = [case[size] for size in "BHND"]
    return ledger.hbm(ledger.pipeline(label, *shape), l2_bytes).bytes / 1e6


def traffic_table(cases: list[dict]) -> str:
    """MB of each implementation: by the ledger, caches ignored, and counted."""
    lines = []
    for case in cases:
        shape = ", ".join(f"{size} = {case[size]}" for size in "BHND")
        lines.append(f"{case['name']} ({shape}), MB")
        columns = ("ledger", "read", "written", "left in L2", "in all", "emptied: read")
        lines.append(f"  {'':16}" + "".join(f"{name:>14}" for name in columns))
        for label, found in case["traffic"].items():
            none, emptied = found["none"], found["all"]
            parts = [none[k] for k in ("read_bytes", "write_bytes", "left_bytes")]
            numbers = [*parts, sum(parts), emptied["read_bytes"]]
            shown = [predicted_mb(case, label), *(n / 1e6 for n in numbers)]
            lines.append(f"  {label:16}" + "".join(f"{mb:14.1f}" for mb in shown))
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks traffic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument(
        "--out", type=Path, default=records.folder, metavar="FOLDER or FILE.json"
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        if "traffic" in records.names():
            print(f"The stored record, {records.machine('traffic')}:")
            print(traffic_table(records.record("traffic")["cases"]))
        sys.exit("no CUDA device here, so nothing can be counted")
    try:
        cases = traffic_cases(options.shapes)
    except ProfilerError as reason:
        sys.exit(str(reason))
    method = f"{METHOD} Nsight Compute {version()}."
    save("traffic", WHAT, method, cases, options.out)
    print(traffic_table(cases))
    if max(most for case in cases for most in case["passes"].values()) > 1:
        print(
            "Kernels were run more than once: caches were not as the program left them."
        )
