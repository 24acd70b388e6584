"""What a call compiles to, for any GPU architecture, without a GPU.

    q, k, v = torch.empty(3, 2, 12, 8192, 64, dtype=torch.bfloat16, device="meta")
    x, c = torch.empty(...), torch.empty(2, dtype=torch.float64, device="meta")
    call = Call("rcmlib.attention.forward.attention_forward", (q, k, v, x, c, c, 0.125, False))
    compile_calls([call])[0]["attention_kernel"].ptx

The launcher plans for the target, and each kernel that it would launch is compiled instead, in
a separate process: in this one the kernels may belong to the interpreter. NVIDIA's assembler,
which comes with Triton, counts registers and spills.
"""

import importlib
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple


class Call(NamedTuple):
    """A call of a launcher. Its tensors have layouts only (device "meta")."""

    launcher: str  # its full name
    arguments: tuple
    capability: int = 90  # 80, 89, 90, 100, 120


class Compiled(NamedTuple):
    """Machine code and its costs: registers and spills a thread, shared memory a program."""

    ptx: str
    registers: int
    spill_bytes: int
    serialized: bool  # wgmma that ptxas has wait for one another
    shared_bytes: int


def compile_calls(
    calls: Sequence[Call], kernel: str | None = None
) -> list[dict[str, Compiled]]:
    """For each call what its kernels, by name, compile to; or only the one named.
    RuntimeError with the compiler's output if one fails."""
    processes = max(1, min(len(calls), (os.cpu_count() or 1) // 2))
    shares = [(calls[i::processes], kernel) for i in range(processes)]
    with ThreadPoolExecutor(processes) as pool:  # each thread waits for a process
        done = list(pool.map(_in_another_process, shares))
    return [done[i % processes][i // processes] for i in range(len(calls))]


def _in_another_process(share) -> list[dict[str, Compiled]]:
    path = os.pathsep.join(filter(None, sys.path))  # where this process found its modules
    env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": path}
    code = f"from {__name__} import _compile_share; _compile_share()"
    command, given = [sys.executable, "-c", code], pickle.dumps(share)
    done = subprocess.run(command, input=given, capture_output=True, env=env)
    if done.returncode:
        raise RuntimeError(f"the compilation failed:\n{done.stderr.decode()[-19000:]}")
    return pickle.loads(done.stdout)


def _compile_share() -> None:
    """What that other process does: pickled calls in, results out."""
    pickle.dump(_compile(*pickle.load(sys.stdin.buffer)), sys.stdout.buffer)


def _compile(calls: Sequence[Call], wanted: str | None) -> list[dict[str, Compiled]]:
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from rcmlib import core
    from rcmlib.core.launch import PLANS

    # A GPU of the call's architecture, as far as Triton asks before it launches.
    gpu = SimpleNamespace(get_current_stream=lambda device: 0)
    gpu.get_current_target = lambda: GPUTarget("cuda", call.capability, 32)
    gpu.get_current_device = lambda: call.capability  # what is compiled is kept by device
    driver.set_active(gpu)
    launch = JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **constants):
        if wanted in (None, kernel.__name__):
            compiled = launch(kernel, *args, grid=grid, warmup=True, **constants)
            ptx, shared = compiled.asm["ptx"], compiled.metadata.shared
            found[kernel.__name__] = Compiled(ptx, *_assemble(ptx, call.capability), shared)

    JITFunction.run = compile_only
    done = []
    for call in calls:
        core.assumed_capability = divmod(call.capability, 10)
        PLANS.clear()
        module, _, name = call.launcher.rpartition(".")
        found = {}
        getattr(importlib.import_module(module), name)(*call.arguments)
        done.append(found)
    return done


def _assemble(ptx: str, capability: int) -> tuple[int, int, bool]:
    """(registers a thread, spilled bytes a thread, are wgmma serialized?), from ptxas."""
    from triton.backends.nvidia.compiler import get_ptxas

    ptxas = get_ptxas(capability)
    target = re.search(r"\.target (\w+)", ptx).group(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [getattr(ptxas, "path", ptxas), "-v", f"--gpu-name={target}", path]
        command += ["-o", path.with_suffix(".cubin")]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", done.stderr)))
    registers = int(re.search(r"Used (\d+) registers", done.stderr).group(1))
    return registers, spilled, "are serialized" in done.stderr
