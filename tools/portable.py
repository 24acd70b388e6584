# Assigned: it is the help, and python -OO drops docstrings.
__doc__ = """\
Run a command once a row, each row another machine's arithmetic.

    tools/portable.py COMMAND ARGUMENT ...

A row chooses whose kernels OpenBLAS (NumPy's), ATen and MKL (PyTorch's) take and how many
threads sum, so that a printed digit that depends on the order of a sum shows. Every row also
has a shell that wants colours and no inline figures. Exits with 1 if the command fails in one.
"""

import os
import platform
import subprocess
import sys

COLUMNS = "OPENBLAS_CORETYPE", "ATEN_CPU_CAPABILITY", "MKL_CBWR", "OMP_NUM_THREADS"
ROWS = [
    ("Nehalem", "default", "COMPATIBLE", "1"),
    ("Haswell", "avx2", "AUTO", "4"),
    ("Zen", "default", "COMPATIBLE", "4"),
    ("SkylakeX", "avx2", "AUTO", "1"),
]
# Kernels with instructions that the processor lacks kill the process.
NEEDS = {"Haswell": "AVX2", "Zen": "AVX2", "avx2": "AVX2", "SkylakeX": "AVX512"}
SHELL = {"MPLBACKEND": "Agg", "FORCE_COLOR": "1"}


def instructions() -> list[str]:
    """Of the vector instructions that a row may need, those of this processor."""
    import torch

    known = ["DEFAULT", "AVX2", "AVX512"]
    best = torch.backends.cpu.get_cpu_capability()
    return known[: known.index(best) + 1] if best in known else []


def environment(row: tuple[str, ...]) -> dict[str, str]:
    """What a row sets. Where kernels have other names (Arm), only the number of threads."""
    chosen = dict(zip(COLUMNS, row, strict=True))
    threads = chosen["OMP_NUM_THREADS"]
    if platform.machine() not in ("x86_64", "AMD64"):
        chosen = {"OMP_NUM_THREADS": threads}
    return chosen | {"MKL_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}


def main(command: list[str]) -> int:
    have, results = instructions(), {}
    for row in ROWS:
        chosen = environment(row)
        title = ", ".join(chosen[name] for name in COLUMNS if name in chosen)
        lacking = {NEEDS[name] for name in chosen.values() if name in NEEDS} - set(have)
        if lacking:
            results[title] = f"skipped: no {', '.join(sorted(lacking))} here"
        elif title not in results:
            print(f"\n{title}", flush=True)
            done = subprocess.run(command, env=os.environ | SHELL | chosen)
            results[title] = "FAILED" if done.returncode else "passed"
    print("\n" + "\n".join(f"{title}: {found}" for title, found in results.items()))
    return int("FAILED" in results.values())


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit(__doc__)
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader (head, say) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)
