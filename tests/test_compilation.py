"""The kernels compile for every architecture in use, without a register spilled in a loop."""

import re
import subprocess
import tempfile
from pathlib import Path

import pytest

from rcmlib.measure.compile import Job, compile_kernels
from rcmlib.sage import PV

SIZES = [
    ("bfloat16", 64),
    ("bfloat16", 96),
    ("bfloat16", 128),
    ("float16", 256),
    ("float32", 64),
    ("float32", 128),
    ("float32", 256),
]
LARGE = {"rows": 32760, "cols": 5120, "depth": 5120}
SHARED_KIB = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}


def attention_jobs(capability):
    """What a default call can launch on this architecture, the heaviest variants of each."""
    for dtype, dim in SIZES:
        yield Job("attention", capability, dtype, dim, causal=True, ragged=True)
    yield Job("attention", capability, "bfloat16", 64)
    yield Job("attention", capability, "bfloat16", 128)
    yield Job("attention", capability, "bfloat16", 128, ragged=True, aligned=False)
    yield Job("attention", capability, "bfloat16", 64, saving=True, ragged=True)
    yield Job("attention", capability, "bfloat16", 128, saving=True, causal=True)
    if capability == 90:  # which has a tile for each
        for dim in (64, 128):
            yield Job("attention", 90, "float16", dim, saving=True, ragged=True)
            yield Job("attention", 90, "bfloat16", dim, ragged=True)
            yield Job("attention", 90, "bfloat16", dim, causal=True)
            yield Job("attention", 90, "bfloat16", dim, saving=True)
    for kernel in ("dkdv", "dq"):
        for dtype, dim in SIZES:
            if dim != 96:
                yield Job(kernel, capability, dtype, dim, causal=True, ragged=True)
        yield Job(kernel, capability, "bfloat16", 64, aligned=False)


def projection_jobs(capability):
    """The skip, a gate a channel or a token; saving F or not; short and long products."""
    short, middle = {"cols": 768, "depth": 768}, {"cols": 768, "depth": 3072}
    for size, rank, saving in [
        (short, 1, False),
        (short, 3, True),
        (middle, 2, True),
        (LARGE, 1, False),
        (LARGE, 2, False),
        (LARGE, 3, True),
    ]:
        yield Job("projection", capability, c_out_rank=rank, saving=saving, **size)
    yield Job("projection", capability, ragged=True)
    yield Job("projection", capability, aligned=False)
    yield Job("projection", capability, "float32")


@pytest.mark.parametrize("capability", SHARED_KIB)
def test_no_default_configuration_spills_or_wants_too_much_shared_memory(capability):
    jobs = [Job("skip", capability), Job("skip_backward", capability)]
    jobs += [*attention_jobs(capability), *projection_jobs(capability)]
    for job, compiled in zip(jobs, compile_kernels(jobs), strict=True):
        assert f".target sm_{capability}" in compiled.ptx
        assert_lean(job, compiled)


def assert_lean(job, compiled):
    """No spills, and shared memory that the GPU has.

    On an H100 at D = 128, attention fills the registers. What runs once a program (a masked
    tile, the epilogue) may spill a few bytes there: with fewer rows, or fewer programs on an
    SM, nothing would be spilled, and the loop would be slower. One address that stays the same
    may be read back in the loop of two blocks of ragged length; nothing else may.
    """
    assert compiled.shared_bytes <= SHARED_KIB[job.capability] * 1024, job
    full = job.kernel in ("attention", "sage_attention") and 64 < job.head_dim <= 128
    if full and job.capability == 90 and (job.ragged or job.causal or job.saving):
        assert compiled.spill_bytes <= 128, job
        if compiled.spill_bytes:
            spills = spills_in_loop(compiled.ptx, job.capability)
            if job.kernel == "attention" and job.ragged and not job.causal:
                assert len(spills) <= 1 and not any("STL" in s for s in spills), job
            else:
                assert not spills, job
    else:
        assert compiled.spill_bytes == 0, job


def sage_jobs(capability):
    """The 8-bit kernel: its heaviest variants, and each way to sum p v at D = 128."""
    pvs = ["fp16"] if capability == 80 else PV
    for pv in pvs:
        yield sage(capability, 128, pv, ragged=True)
    for dim in (64, 128, 256):
        yield sage(capability, dim, pvs[0], ragged=True, causal=True)
    yield sage(capability, 128, pvs[0])
    yield sage(capability, 128, pvs[0], ragged=True, smooth_q=True)


def sage(capability, dim, pv, **options):
    return Job("sage_attention", capability, head_dim=dim, pv=pv, **options)


@pytest.mark.parametrize("capability", SHARED_KIB)
def test_the_8_bit_kernel_spills_nothing_in_its_loop(capability):
    jobs = list(sage_jobs(capability))
    for job, compiled in zip(jobs, compile_kernels(jobs), strict=True):
        assert_lean(job, compiled)


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
    by_pv = dict.fromkeys(PV)
    jobs = [sage(90, 64, pv) for pv in by_pv]
    for pv, compiled in zip(by_pv, compile_kernels(jobs), strict=True):
        products = set(re.findall(r"wgmma\.mma_async\S*k\d+\.(\S+)", compiled.ptx))
        second = {
            "fp8": "f32.e4m3.e4m3", "fp8_short": "f32.e4m3.e4m3",
            "fp8_fp16": "f16.e4m3.e4m3", "fp16": "f32.f16.f16",
        }[pv]  # fmt: skip
        assert products == {"s32.s8.s8", second}, pv
        assert "cp.async.bulk.tensor" in compiled.ptx


def test_hopper_uses_its_own_matrix_and_copy_instructions():
    fused, two_pass = compile_kernels([Job(), Job(skip=False)])
    for compiled in (fused, two_pass):
        assert "wgmma.mma_async" in compiled.ptx
        assert "cp.async.bulk.tensor" in compiled.ptx
    # One more tensor is read, and none more is written.
    assert len(re.findall(r"ld\.global\S*\.v4", fused.ptx)) > 0
    assert not re.findall(r"ld\.global\S*\.v4", two_pass.ptx)
    stores = [len(re.findall(r"st\.global", c.ptx)) for c in (fused, two_pass)]
    assert stores[0] == stores[1] > 0


def test_a_failed_compilation_shows_the_compiler_s_words():
    with pytest.raises(RuntimeError, match="the compilation failed"):
        compile_kernels([Job(capability=12345)])
