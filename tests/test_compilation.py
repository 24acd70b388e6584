"""The kernels compile for every architecture in use, without spilling a register."""

import re

import pytest

from rcmlib.measure.ptx import Job, compile_kernels

SHARED_KIB = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}


def attention_jobs(capability):
    """What a default call can launch on this architecture, the heaviest variants of each."""
    for dtype, dim in [
        ("bfloat16", 64),
        ("bfloat16", 96),
        ("bfloat16", 128),
        ("float16", 256),
        ("float32", 64),
        ("float32", 128),
        ("float32", 256),
    ]:
        yield Job("attention", capability, dtype, dim, causal=True, ragged=True)
    yield Job("attention", capability, "bfloat16", 64)
    yield Job("attention", capability, "bfloat16", 128, ragged=True, aligned=False)


@pytest.mark.parametrize("capability", SHARED_KIB)
def test_no_default_configuration_spills_or_wants_too_much_shared_memory(capability):
    jobs = [Job("skip", capability), *attention_jobs(capability)]
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
