"""The kernels compile for every architecture in use, without spilling a register."""

import re

import pytest

from rcmlib.measure.ptx import Job, compile_kernels

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
    yield Job("attention", capability, "bfloat16", 128, ragged=True, aligned=False)
    yield Job("attention", capability, "bfloat16", 64, saving=True, ragged=True)
    yield Job("attention", capability, "bfloat16", 128, saving=True, causal=True)
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
        assert compiled.spill_bytes == 0, job
        assert compiled.shared_bytes <= SHARED_KIB[capability] * 1024, job


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
