"""Planned launches: the kernel that Triton would choose at every layout, and no tensor kept."""

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import torch

import rcmlib
from rcmlib.functional import attention
from tests.inputs import heads


def test_every_planned_launch_is_the_one_that_triton_would_choose():
    """`planned_launches.py` asks it, for the compiling Triton, without a GPU or a compiler."""
    script = Path(__file__).with_name("planned_launches.py")
    done = subprocess.run(
        [sys.executable, "-m", f"tests.{script.stem}"],
        cwd=script.parents[1],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    launches, kernels = map(int, done.stdout.split())
    assert launches > 4 * kernels > 100


def test_a_plan_keeps_no_tensor(device):
    inputs = heads((1, 2, 20, 20, 16), torch.float32, device)
    out = rcmlib.rcm_attention(*inputs)
    refs = [weakref.ref(t) for t in (*inputs, out)]
    del inputs, out
    gc.collect()
    assert not any(ref() is not None for ref in refs)


def test_calls_of_one_layout_share_a_plan_and_nothing_else(device):
    """The number of the coefficients, and the numbers in the tensors, are no part of it."""
    first, second = (
        heads((1, 2, 20, 20, 16), torch.float32, device, seed) for seed in (0, 1)
    )
    for (q, k, v, x, *_), c in ((first, 0.25), (second, 0.5), (first, 0.5)):
        out = rcmlib.rcm_attention(q, k, v, x, 1 - c, c)
        expected = (1 - c) * x + c * attention(q, k, v)
        assert torch.allclose(out, expected, rtol=1e-5, atol=1e-6)
