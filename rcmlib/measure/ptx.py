"""What a kernel compiles to, for any GPU architecture, without a GPU.

    compile_kernels([Job("attention", capability=90)])[0].ptx

Triton compiles for a named target in a separate process, because in this one the kernels may
belong to the interpreter. NVIDIA's assembler, which comes with Triton, then counts registers
and spills. `python -m rcmlib.measure.ptx` is that other process: jobs as JSON in, results out.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


class Job(NamedTuple):
    """Which kernel to compile for which GPU. capability: 80, 89, 90, 100, 120."""

    kernel: str = "attention"  # or "skip"
    capability: int = 90
    dtype: str = "bfloat16"
    head_dim: int = 64
    skip: bool = True  # the attention kernel with the skip in its epilogue, or without
    causal: bool = False
    ragged: bool = False
    aligned: bool = True  # q, k, v can be read by the copy engine, where there is one


class Compiled(NamedTuple):
    """Machine code and its costs: registers and spills a thread, shared memory a program."""

    ptx: str
    registers: int
    spill_bytes: int
    shared_bytes: int


def compile_kernels(jobs: list[Job]) -> list[Compiled]:
    """Compiles each job in one separate process. RuntimeError with its output if that fails."""
    done = subprocess.run(
        [sys.executable, "-m", "rcmlib.measure.ptx"],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "0"},
    )
    if done.returncode:
        raise RuntimeError(f"the compilation failed:\n{done.stderr[-4000:]}")
    return [Compiled(*result) for result in json.loads(done.stdout)]


def _compile(job: Job) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget

    kernel, types, constants, options = KERNELS[job.kernel](job)
    names = kernel.arg_names
    # What a launch tells the compiler of aligned inputs: these are multiples of 16.
    lengths = () if job.ragged else ("q_len", "kv_len", "rows", "cols")
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in types.items()
        if kind.startswith("*") or name.startswith("stride") or name in lengths
    }
    source = triton.compiler.ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        aligned,
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", job.capability, 32), options=options
    )
    ptx = compiled.asm["ptx"]
    return Compiled(ptx, *_assemble(ptx, job.capability), compiled.metadata.shared)


def _attention(job: Job):
    import torch
    import triton

    from rcmlib.ops import attention

    dtype = TYPES[job.dtype]
    target = (getattr(torch, job.dtype), divmod(job.capability, 10))
    tile = attention.choose_tile(job.head_dim, *target)
    block_d = triton.next_power_of_2(job.head_dim)
    tma = job.aligned and attention.copy_engine(*target)
    kernel = attention.attention_kernel
    types = {name: "i32" for name in kernel.arg_names if name.startswith("stride")}
    types |= dict.fromkeys(("heads", "q_len", "kv_len"), "i32")
    types |= dict.fromkeys(("q", "k", "v", "x", "out"), "*" + dtype)
    types |= {"qk_scale": "fp32", "c_skip": "*fp64", "c_out": "*fp64"}
    if tma:
        for name, rows in zip(
            "qkv", (tile.block_m, tile.block_n, tile.block_n), strict=True
        ):
            types[name] = f"tensordesc<{dtype}[1,1,{rows},{block_d}]>"
    constants = {
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "D": job.head_dim,
        "BLOCK_D": block_d, "TMA": tma, "CAUSAL": job.causal, "RAGGED": job.ragged,
        "PER_SAMPLE": True, "PRECISION": "ieee" if dtype == "fp32" else "tf32",
    }  # fmt: skip
    if not job.skip:
        for name in ("x", "c_skip", "c_out"):
            del types[name]
            constants[name] = None
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return kernel, types, constants, options


def _skip(job: Job):
    from rcmlib.ops.skip import TILE, skip_kernel

    types = {name: "i32" for name in skip_kernel.arg_names if name.startswith("stride")}
    types |= dict.fromkeys(("rows", "cols"), "i32")
    types |= dict.fromkeys(("x", "f", "out"), "*" + TYPES[job.dtype])
    types |= {"c_skip": "*fp64", "c_out": "*fp64"}
    return skip_kernel, types, {"BLOCK_R": 1, "BLOCK_C": TILE, "PER_SAMPLE": True}, {}


KERNELS = {"attention": _attention, "skip": _skip}


def _assemble(ptx: str, capability: int) -> tuple[int, int]:
    """(registers a thread, spilled bytes a thread), from ptxas."""
    from triton.backends.nvidia.compiler import get_ptxas

    ptxas = get_ptxas(capability)
    target = re.search(r"\.target (\w+)", ptx).group(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [getattr(ptxas, "path", ptxas), "-v", f"--gpu-name={target}", path]
        done = subprocess.run(
            [*command, "-o", path.with_suffix(".cubin")], capture_output=True, text=True
        )
    if done.returncode:
        raise RuntimeError(done.stderr)
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", done.stderr)))
    return int(re.search(r"Used (\d+) registers", done.stderr).group(1)), spilled


if __name__ == "__main__":
    jobs = [Job(*fields) for fields in json.load(sys.stdin)]
    json.dump([_compile(job) for job in jobs], sys.stdout)
