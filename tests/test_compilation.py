"""The kernels compile for every architecture in use, without a register spilled in a loop."""

import re
import subprocess
import tempfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from rcmlib.attention.tiles import choose_tile
from rcmlib.core.launch import Team
from rcmlib.measure.compile import Call, compile_calls
from rcmlib.sage import PV

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SIZES = [
    (BF16, 64),
    (BF16, 96),
    (BF16, 128),
    (FP16, 256),
    (FP32, 64),
    (FP32, 128),
    (FP32, 256),
]
SHARED_KIB = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}
BATCH, HEADS, TOKENS = 2, 12, 8192


class Job(NamedTuple):
    """A call, which of its kernels counts, and what may be spilled there (`assert_lean`)."""

    kernel: str
    call: Call
    tight: bool = False  # sm_90 at D = 128: the registers are full
    ragged: bool = False
    causal: bool = False


def new(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype, device="meta")


def tokens(ragged):
    """A length, and rows to cut it from: strides stay multiples of 16."""
    return TOKENS + ragged, 2 * TOKENS


def heads(dtype, dim, ragged, aligned=True):
    """q, k, v; not aligned: the copy engine cannot read k."""
    n, rows = tokens(ragged)
    q, k, v = (new(BATCH, HEADS, rows, dim, dtype=dtype)[:, :, :n] for _ in range(3))
    return q, (k if aligned else k[:, :1].expand_as(k)), v


def attention(capability, dtype=BF16, dim=64, *, saving=False, causal=False, ragged=False,
              aligned=True, skip=True):  # fmt: skip
    q, k, v = heads(dtype, dim, ragged, aligned)
    c = new(BATCH, dtype=torch.float64)
    x = new(*q.shape[::2], HEADS * dim, dtype=dtype)
    residual = (x, c, c) if skip else (None, None, None)
    tma = dtype != FP32 and capability in (90, 100) and aligned
    tile = choose_tile(dim, dtype, divmod(capability, 10), tma, not causal)
    arguments = (q, k, v, *residual, dim**-0.5, causal, saving, tile)
    call = Call("rcmlib.attention.forward.attention_forward", arguments, capability)
    tight = capability == 90 and 64 < dim <= 128 and (ragged or causal or saving)
    return Job("attention_kernel", call, tight, ragged, causal)


def team(dtype, dim, *, groups=2, x_dtype=None, **how):
    """`attention` by Hopper's own kernel."""
    q, k, v, x, *rest, _ = attention(90, dtype, dim, **how).call.arguments
    x = x if x_dtype is None else x.to(x_dtype)
    registers = 240 if groups == 2 else 160
    members = Team(128, groups, 2, registers, turns=True, fixed=dtype == BF16)
    arguments = (q, k, v, x, *rest, members)
    call = Call("rcmlib.attention.forward.attention_forward", arguments)
    return Job("hopper_attention_kernel", call, tight=True)


def backward(
    kernel, capability, dtype, dim, *, causal=False, ragged=False, aligned=True
):
    q, k, v = heads(dtype, dim, ragged, aligned)
    g = new(*q.shape[::2], HEADS * dim, dtype=dtype)
    lse = new(*q.shape[:3], dtype=FP32)
    c = new(BATCH, dtype=torch.float64)
    arguments = (g, q, k, v, lse, lse, c, dim**-0.5, causal)
    launcher = "backward.plain_backward"
    if kernel == "hopper_backward":
        launcher = "hopper_backward.hopper_backward"
    call = Call(f"rcmlib.attention.{launcher}", arguments, capability)
    return Job(f"{kernel}_kernel", call)


def projection(capability, dtype=BF16, *, rows=8192, cols=768, depth=768, rank=1,
               saving=False, ragged=False, aligned=True):  # fmt: skip
    """A gate (rank 2, 3) is float32, the coefficients (rank 1) are float64."""
    cols, depth, tokens = cols + ragged, depth + ragged, rows // BATCH
    a = new(BATCH, tokens, depth + 15 * ragged, dtype=dtype)[..., :depth]
    weight = new(cols, depth + 15 * ragged, dtype=dtype)[:, :depth]
    if not aligned:  # the copy engine cannot read rows that repeat
        a = a[:, :1].expand_as(a)
    bias, x = new(cols, dtype=dtype), new(BATCH, tokens, cols, dtype=dtype)
    c_skip = c_out = new(BATCH, dtype=torch.float64)
    if rank > 1:
        gate = (BATCH, cols) if rank == 2 else x.shape
        c_skip, c_out = 1.0, new(*gate, dtype=FP32)
    arguments = (a, weight, bias, x, c_skip, c_out, saving)
    name = "rcmlib.projection.kernel.projection_forward"
    return Job("projection_kernel", Call(name, arguments, capability))


def skips(capability):
    x, c = new(BATCH, 48, 8192, dtype=BF16), new(BATCH, dtype=torch.float64)
    forward = Call("rcmlib.skip.kernel.skip_forward", (x, x, c, c), capability)
    arguments = (x, x, x, c, c, None, BF16, BF16)
    backward = Call("rcmlib.skip.kernel.skip_backward", arguments, capability)
    return [Job("skip_kernel", forward), Job("skip_backward_kernel", backward)]


def sage(capability, dim, pv, *, smooth_q=False, causal=False, ragged=False):
    q, k, v = heads(BF16, dim, ragged)
    if smooth_q:  # PyTorch's part of it wants a device
        q, k, v = (torch.empty(1, 2, 144, dim, dtype=BF16)[:, :, : 128 + ragged],) * 3
    c = new(q.shape[0], dtype=torch.float64)
    x = new(*q.shape[::2], q.shape[1] * dim)
    arguments = (q, k, v, x, c, c, dim**-0.5, causal, smooth_q, True, True, pv)
    name = "rcmlib.sage.kernel.sage_attention_forward"
    tight = capability == 90 and 64 < dim <= 128 and (ragged or causal)
    return Job("sage_attention_kernel", Call(name, arguments, capability), tight)


def compiled(jobs):
    """(job, what its kernel compiles to), kernel by kernel."""
    for kernel in dict.fromkeys(job.kernel for job in jobs):
        own = [job for job in jobs if job.kernel == kernel]
        found = compile_calls([job.call for job in own], kernel)
        yield from (
            (job, kernels[kernel]) for job, kernels in zip(own, found, strict=True)
        )


def attention_jobs(capability):
    """What a default call can launch on this architecture, the heaviest variants of each."""
    forward = partial(attention, capability)
    for dtype, dim in SIZES:
        yield forward(dtype, dim, causal=True, ragged=True)
    yield forward(BF16, 64)
    yield forward(BF16, 128)
    yield forward(BF16, 128, ragged=True, aligned=False)
    yield forward(BF16, 64, saving=True, ragged=True)
    yield forward(BF16, 128, saving=True, causal=True)
    if capability == 90:  # which has a tile for each
        for dim in (64, 128):
            yield forward(FP16, dim, saving=True, ragged=True)
            yield forward(BF16, dim, ragged=True)
            yield forward(BF16, dim, causal=True)
            yield forward(BF16, dim, saving=True)
    for kernel in ("dkdv", "dq"):
        for dtype, dim in SIZES:
            if dim != 96:
                yield backward(kernel, capability, dtype, dim, causal=True, ragged=True)
        yield backward(kernel, capability, BF16, 64, aligned=False)


def projection_jobs(capability):
    """The skip, a gate a channel or a token; saving F or not; short and long products."""
    short, middle = {"cols": 768, "depth": 768}, {"cols": 768, "depth": 3072}
    large = {"rows": 32768, "cols": 5120, "depth": 5120}
    for size, rank, saving in [
        (short, 1, False),
        (short, 3, True),
        (middle, 2, True),
        (large, 1, False),
        (large, 2, False),
        (large, 3, True),
    ]:
        yield projection(capability, rank=rank, saving=saving, **size)
    yield projection(capability, ragged=True)
    yield projection(capability, aligned=False)
    yield projection(capability, FP32)


@pytest.mark.parametrize("capability", SHARED_KIB)
def test_no_default_configuration_spills_or_wants_too_much_shared_memory(capability):
    jobs = [
        *skips(capability),
        *attention_jobs(capability),
        *projection_jobs(capability),
    ]
    for job, found in compiled(jobs):
        assert f".target sm_{capability}" in found.ptx
        assert_lean(job, found)


def assert_lean(job, found):
    """No spills, and shared memory that the GPU has.

    On an H100 at D = 128, attention fills the registers; Hopper's own kernel always does.
    What runs once a program or task (a masked tile, the epilogue) may spill there: with
    fewer rows, or fewer programs on an SM, nothing would be spilled, and the loop would be
    slower. One address that stays the same may be read back in the loop of two blocks of
    ragged length; nothing else may.
    """
    capability = job.call.capability
    assert found.shared_bytes <= SHARED_KIB[capability] * 1024, job
    if job.tight:
        assert found.spill_bytes <= (640 if "hopper" in job.kernel else 128), job
        if found.spill_bytes:
            spills = spills_in_loop(found.ptx, capability)
            if job.kernel == "attention_kernel" and job.ragged and not job.causal:
                assert len(spills) <= 1 and not any("STL" in s for s in spills), job
            else:
                assert not spills, job
    else:
        assert found.spill_bytes == 0, job


def test_hoppers_own_kernel_neither_spills_nor_waits_for_each_product():
    jobs = [
        team(BF16, 128, ragged=True),
        team(BF16, 128, ragged=True, causal=True, saving=True),
        team(FP16, 128, ragged=True, saving=True),
        team(BF16, 64, groups=3, ragged=True, saving=True),
        team(BF16, 64, groups=3, causal=True, x_dtype=FP32),
        team(FP16, 64, groups=3),
        team(BF16, 96, skip=False),
    ]
    for job, found in compiled(jobs):
        assert_lean(job, found)
        assert not found.serialized, job
        for instruction in ("wgmma.mma_async", "setmaxnreg", "cp.async.bulk.tensor.4d"):
            assert instruction in found.ptx, job


def test_hoppers_own_gradients_neither_spill_a_sum_nor_wait_for_each_product():
    own = partial(backward, "hopper_backward", 90)
    jobs = [
        own(BF16, 64),
        own(BF16, 128),
        own(FP16, 96, ragged=True),
        own(BF16, 64, ragged=True, causal=True),
        own(BF16, 128, ragged=True, causal=True),
    ]
    for job, found in compiled(jobs):
        assert not found.serialized and found.spill_bytes < 256, job
        assert found.shared_bytes <= SHARED_KIB[90] * 1024, job
        # An address may be read back in a loop; a sum has 64 registers.
        assert len(spills_in_loop(found.ptx, 90)) < 4, job
        assert "red.relaxed.gpu.global.add.v4.f32" in found.ptx


def sage_jobs(capability):
    """The 8-bit kernel: its heaviest variants, and each way to sum p v at D = 128."""
    pvs = ["fp16"] if capability == 80 else PV
    for pv in pvs:
        yield sage(capability, 128, pv, ragged=True)
    for dim in (64, 128, 256):
        yield sage(capability, dim, pvs[0], ragged=True, causal=True)
    yield sage(capability, 128, pvs[0])
    yield sage(capability, 128, pvs[0], ragged=True, smooth_q=True)


@pytest.mark.parametrize("capability", SHARED_KIB)
def test_the_8_bit_kernel_spills_nothing_in_its_loop(capability):
    for job, found in compiled([*sage_jobs(capability)]):
        assert_lean(job, found)


def spills_in_loop(ptx, capability):
    """The local loads and stores in the loop around the matrix instructions (wgmma)."""
    lines = machine_code(ptx, capability)
    labels = {line.strip().rstrip(":"): i for i, line in enumerate(lines)}
    loops = []  # (length, first line): what is jumped back over
    for i, line in enumerate(lines):
        target = re.search(r"BRA.*`\((\S+)\)", line)
        first = labels.get(target[1], i) if target else i
        if any("GMMA" in inner for inner in lines[first:i]):
            loops.append((i - first, first))
    length, first = min(loops)
    return re.findall(r"\b(?:LDL|STL)\b.*", "\n".join(lines[first : first + length]))


def machine_code(ptx, capability):
    """SASS, by the assembler and disassembler that come with Triton."""
    from triton.backends.nvidia import compiler

    ptxas = compiler.get_ptxas(capability)
    target = re.search(r"\.target (\w+)", ptx).group(1)
    disassembler = Path(compiler.__file__).parent / "bin" / "nvdisasm"
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        command = [getattr(ptxas, "path", ptxas), f"--gpu-name={target}", source]
        subprocess.run([*command, "-o", cubin], check=True)
        sass = subprocess.run(
            [disassembler, "-c", cubin], check=True, capture_output=True, text=True
        ).stdout
    return sass.splitlines()


def test_hopper_multiplies_in_8_bits():
    jobs = [sage(90, 64, pv) for pv in PV]
    for pv, (_, found) in zip(PV, compiled(jobs), strict=True):
        products = set(re.findall(r"wgmma\.mma_async\S*k\d+\.(\S+)", found.ptx))
        second = {
            "fp8": "f32.e4m3.e4m3", "fp8_short": "f32.e4m3.e4m3",
            "fp8_fp16": "f16.e4m3.e4m3", "fp16": "f32.f16.f16",
        }[pv]  # fmt: skip
        assert products == {"s32.s8.s8", second}, pv
        assert "cp.async.bulk.tensor" in found.ptx


def test_hopper_uses_its_own_matrix_and_copy_instructions():
    jobs = [attention(90), attention(90, skip=False)]
    fused, two_pass = (found for _, found in compiled(jobs))
    for found in (fused, two_pass):
        assert "wgmma.mma_async" in found.ptx
        assert "cp.async.bulk.tensor" in found.ptx
    # One more tensor is read, and none more is written.
    assert len(re.findall(r"ld\.global\S*\.v4", fused.ptx)) > 0
    assert not re.findall(r"ld\.global\S*\.v4", two_pass.ptx)
    stores = [len(re.findall(r"st\.global", c.ptx)) for c in (fused, two_pass)]
    assert stores[0] == stores[1] > 0


def test_a_failed_compilation_shows_the_compiler_s_words():
    with pytest.raises(RuntimeError, match="the compilation failed"):
        compile_calls([attention(12345).call])
