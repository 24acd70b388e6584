"""What a kernel compiles to, for any GPU architecture, without a GPU.

    compile_kernels([Job("attention", capability=90)])[0].ptx

Triton compiles for a named target in a separate process, because in this one the kernels may
belong to the interpreter. NVIDIA's assembler, which comes with Triton, then counts registers
and spills. `python -m rcmlib.measure.compile` is that other process: jobs as JSON in, results out.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


class Job(NamedTuple):
    """Which kernel to compile for which GPU. capability: 80, 89, 90, 100, 120."""

    kernel: str = "attention"  # one of KERNELS
    capability: int = 90
    dtype: str = "bfloat16"
    head_dim: int = 64
    skip: bool = True  # the attention kernel with the skip in its epilogue, or without
    saving: bool = False  # the forward kernel of a training step
    causal: bool = False
    ragged: bool = False
    aligned: bool = True  # q, k, v can be read by the copy engine, where there is one
    rows: int = 8192  # of the projection's result; rows, cols and depth choose its tile
    cols: int = 768
    depth: int = 768
    c_out_rank: int = 1  # of its coefficient: [B], or a gate [B, C] or [B, N, C]
    pv: str = "fp8"  # the number formats of the 8-bit attention kernel's second product
    smooth_q: bool = False


class Compiled(NamedTuple):
    """Machine code and its costs: registers and spills a thread, shared memory a program."""

    ptx: str
    registers: int
    spill_bytes: int
    shared_bytes: int


def compile_kernels(jobs: list[Job]) -> list[Compiled]:
    """Compiles the jobs in other processes. RuntimeError with its output if one fails."""
    processes = max(1, min(len(jobs), (os.cpu_count() or 1) // 2))
    shares = [jobs[i::processes] for i in range(processes)]
    with ThreadPoolExecutor(processes) as pool:  # each thread waits for a process
        done = list(pool.map(_compile_share, shares))
    return [done[i % processes][i // processes] for i in range(len(jobs))]


def _compile_share(jobs: list[Job]) -> list[Compiled]:
    done = subprocess.run(
        [sys.executable, "-m", "rcmlib.measure.compile"],
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
    lengths = () if job.ragged else ("q_len", "kv_len", "rows", "cols", "depth")
    lengths = (*lengths, "q_padded", "kv_padded")
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in types.items()
        if kind.startswith("*") or name.startswith("stride") or name in lengths
        if not kernel.params[names.index(name)].do_not_specialize
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


def tile_options(tile) -> dict[str, int]:
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return options | {"maxnreg": getattr(tile, "maxnreg", None)}


def _attention(job: Job):
    """The forward kernel or one of the backward's, named by job.kernel."""
    import torch
    import triton

    from rcmlib.attention import backward as attention_backward
    from rcmlib.attention import forward as attention
    from rcmlib.core import device

    dtype = TYPES[job.dtype]
    target = (getattr(torch, job.dtype), divmod(job.capability, 10))
    tma = job.aligned and device.copy_engine(*target)
    if job.kernel == "attention":
        kernel = attention.attention_kernel
        tile = attention.choose_tile(job.head_dim, *target, tma, not job.causal)
    else:
        kernel = getattr(attention_backward, f"{job.kernel}_kernel")
        tiles = attention_backward.choose_backward_tiles(
            job.head_dim, *target, tma, job.causal
        )
        tile = tiles[job.kernel == "dq"]
    block_d = triton.next_power_of_2(job.head_dim)
    types = {name: "i32" for name in kernel.arg_names if name.startswith("stride")}
    types |= dict.fromkeys(("heads", "q_len", "kv_len"), "i32")
    types |= dict.fromkeys(("scale", "qk_scale"), "fp32")
    types |= dict.fromkeys(("lse", "delta"), "*fp32")
    types |= dict.fromkeys(("c_skip", "c_out"), "*fp64")
    rows = {"q": tile.block_m, "k": tile.block_n, "v": tile.block_n, "g": tile.block_m}
    constants = {
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "D": job.head_dim,
        "BLOCK_D": block_d, "TWO": getattr(tile, "two", False), "TMA": tma,
        "FIXED": getattr(tile, "fixed", False),
        "CAUSAL": job.causal, "RAGGED": job.ragged, "PER_SAMPLE": True,
        "PRECISION": device.dot_precision(target[0]),
    }  # fmt: skip
    if not job.skip:
        constants |= dict.fromkeys(("x", "c_skip", "c_out", "saved_f"))
    if not job.saving and job.kernel == "attention":
        constants |= dict.fromkeys(("saved_f", "lse"))
    for name in kernel.arg_names:
        if tma and name in rows:
            types[name] = f"tensordesc<{dtype}[1,1,{rows[name]},{block_d}]>"
        elif name not in constants:
            types.setdefault(name, "*" + dtype)
    types = {
        name: kind
        for name, kind in types.items()
        if name in kernel.arg_names and name not in constants
    }
    constants = {n: value for n, value in constants.items() if n in kernel.arg_names}
    return kernel, types, constants, tile_options(tile)


def _skip(job: Job):
    from rcmlib.skip import kernel as skip

    kernel = skip.skip_kernel if job.kernel == "skip" else skip.skip_backward_kernel
    types = {name: "i32" for name in kernel.arg_names if name.startswith("stride")}
    types |= dict.fromkeys(("rows", "cols"), "i32")
    types |= dict.fromkeys(("c_skip", "c_out"), "*fp64")
    types |= dict.fromkeys(("x_dots", "f_dots"), "*fp32")
    for name in ("grad", "x", "f", "dx", "df", "out"):
        types[name] = "*" + TYPES[job.dtype]
    types = {name: kind for name, kind in types.items() if name in kernel.arg_names}
    constants = {"BLOCK_R": 1, "BLOCK_C": skip.TILE, "PER_SAMPLE": True}
    if "WIDTH" in kernel.arg_names:
        constants["WIDTH"] = skip.TILE
    return kernel, types, constants, {}


def _projection(job: Job):
    """A gate (c_out_rank 2, 3) is float32, the coefficients (c_out_rank 1) are float64."""
    import torch

    from rcmlib.core import device
    from rcmlib.projection import kernel as projection

    dtype = TYPES[job.dtype]
    target = (getattr(torch, job.dtype), divmod(job.capability, 10))
    cols, depth = job.cols + job.ragged, job.depth + job.ragged
    tile = projection.choose_tile(job.rows, cols, depth, job.c_out_rank > 1, *target)
    tma = job.aligned and device.copy_engine(*target)
    kernel = projection.projection_kernel
    types = {name: "i32" for name in kernel.arg_names if name.startswith("stride")}
    types |= dict.fromkeys(("batch", "rows", "cols", "depth"), "i32")
    types |= dict.fromkeys(("a", "weight", "bias", "x", "out"), "*" + dtype)
    if tma:
        for name, rows in (("a", tile.block_m), ("weight", tile.block_n)):
            types[name] = f"tensordesc<{dtype}[1,1,{rows},{tile.block_k}]>"
    types |= {"c_skip": "*fp64", "c_out": "*fp64"}
    if job.c_out_rank > 1:
        types |= {"c_skip": "fp32", "c_out": "*fp32"}
    constants = {
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
        "GROUP": tile.group, "PARTS": tile.parts, "PERSISTENT": tile.persistent, "TMA": tma,
        "RAGGED": job.ragged, "C_OUT_RANK": job.c_out_rank,
        "PRECISION": device.dot_precision(target[0]),
    }  # fmt: skip
    if job.saving:
        types["f"] = "*" + dtype
    else:
        constants["f"] = None
    return kernel, types, constants, tile_options(tile)


def _sage(job: Job):
    """The 8-bit attention kernel."""
    import torch

    from rcmlib.core import device
    from rcmlib.sage import kernel as sage_attention
    from rcmlib.sage import quantize

    capability = divmod(job.capability, 10)
    tma = device.copy_engine(torch.int8, capability)
    tile = sage_attention.choose_sage_tile(job.head_dim, job.pv, capability)
    block_d = quantize.padded_dim(job.head_dim)
    kernel = sage_attention.sage_attention_kernel
    types = {name: "i32" for name in kernel.arg_names if name.startswith("stride")}
    lengths = ("heads", "q_len", "kv_len", "q_padded", "kv_padded")
    types |= dict.fromkeys(lengths, "i32")
    types |= dict.fromkeys(("q_scale", "k_scale", "v_top", "v_mean", "bias"), "*fp32")
    types |= dict.fromkeys(("c_skip", "c_out"), "*fp64")
    types |= dict.fromkeys(("x", "out"), "*" + TYPES[job.dtype])
    types["v_unit"] = "fp32"
    v_type = "fp16" if job.pv == "fp16" else "fp8e4nv"
    boxes = sage_attention.operand_boxes(tile, block_d, job.pv)
    for name, dtype, box in zip("qkv", ("i8", "i8", v_type), boxes, strict=True):
        described = f"tensordesc<{dtype}[{box[0]},{box[1]}]>"
        types[name] = described if tma else "*" + dtype
    constants = {
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "D": job.head_dim,
        "BLOCK_D": block_d, "Q_GROUP": 1, "K_GROUP": tile.block_n, "TMA": tma,
        "CAUSAL": job.causal, "RAGGED": job.ragged, "PER_SAMPLE": True, "PV": job.pv,
        "NATIVE": True,
    }  # fmt: skip
    if not job.smooth_q:
        constants["bias"] = None
    if not job.skip:
        constants |= dict.fromkeys(("x", "c_skip", "c_out"))
    types = {name: kind for name, kind in types.items() if name not in constants}
    return kernel, types, constants, tile_options(tile)


def _exp2(job: Job):
    from benchmarks.kernels import exp2_kernel
    from benchmarks.suites.ceilings import CHAINS, UNROLL

    types = {"out": "*fp32", "steps": "i32"}
    return exp2_kernel, types, {"BLOCK": CHAINS, "UNROLL": UNROLL}, {"num_warps": 4}


KERNELS = {
    "attention": _attention,
    "exp2": _exp2,
    "sage_attention": _sage,
    "dkdv": _attention,
    "dq": _attention,
    "projection": _projection,
    "skip": _skip,
    "skip_backward": _skip,
}


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
