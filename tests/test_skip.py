"""rcm_skip against float64: shapes, strides, coefficients, boundary values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rcmlib
from rcmlib import reference
from tests.inputs import (
    DTYPES,
    assert_close,
    assert_sum_close,
    gradients,
    torch_skip,
)

SHAPES = [
    (1, 1),
    (3, 7),
    (2, 5, 3),
    (2, 33, 129),
    (2, 3, 4, 5, 6),
    (1, 5000),
    (2, 4097),
]


def pair(shape, dtype, device, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(2, *shape, generator=random).to(device=device, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_agrees_with_float64(shape, dtype, device):
    x, f = pair(shape, dtype, device)
    c_skip, c_out = torch.rand(2, shape[0], dtype=torch.float64).to(device)
    out = rcmlib.rcm_skip(x, f, c_skip, c_out)
    ref = reference.skip(x, f, c_skip, c_out)
    assert_close(out, ref, torch_skip(x, f, c_skip, c_out))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.floats(-2, 2))
def test_any_shape_will_do(shape, c):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, f = pair(shape, torch.float32, device, seed=len(shape))
    out = rcmlib.rcm_skip(x, f, c, 0.5)
    assert_close(out, reference.skip(x, f, c, 0.5), out)


def test_all_channels_are_written_and_none_twice(device, poisoned_outputs):
    x, f = pair((2, 9, 769), torch.float32, device)
    assert torch.isfinite(rcmlib.rcm_skip(x, f, 0.5, 0.5)).all()


def test_coefficients_are_not_mixed_between_samples(device):
    x, f = pair((3, 4, 50), torch.float32, device)
    c = torch.tensor([0.0, 1.0, 2.0], device=device)
    out = rcmlib.rcm_skip(x, f, c, c)
    for b in range(3):
        assert torch.equal(out[b], rcmlib.rcm_skip(x[b : b + 1], f[b : b + 1], b, b)[0])


def test_a_slice_of_the_channels_is_used_in_place(device):
    x, f = pair((2, 6, 40), torch.float32, device)
    out = rcmlib.rcm_skip(x[..., :10], f[..., 5:15], 0.2, 0.4)
    assert_close(out, reference.skip(x[..., :10], f[..., 5:15], 0.2, 0.4), out)
    dense = f[..., 5:15].contiguous()
    assert torch.equal(rcmlib.rcm_skip(x[..., :10], dense, 0.2, 0.4), out)


def test_every_second_element_of_a_vector_is_used_in_place(device):
    """One number a sample: [B], with a gap between the samples."""
    x, f = pair((10,), torch.float32, device)
    out = rcmlib.rcm_skip(x[::2], f[1::2], 0.2, 0.4)
    assert_close(out, reference.skip(x[::2], f[1::2], 0.2, 0.4), out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_at_t_zero_the_result_is_x_bit_for_bit(dtype, device):
    x, f = pair((2, 40), dtype, device)
    x[0, 0], f[1, 0] = -0.0, float("inf")
    out = rcmlib.rcm_skip(x, f, 1.0, 0.0)
    assert torch.equal(out, x) and torch.equal(out.signbit(), x.signbit())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_gradients_agree_with_float64(shape, dtype, device, poisoned_outputs):
    x, f = pair(shape, dtype, device)
    g = pair(shape, dtype, device, seed=1)[0]
    c_skip, c_out = torch.rand(2, shape[0], dtype=torch.float64).to(device)
    c_out[0] = 0.0
    inputs = (x, f, c_skip, c_out)
    ours, peer = (gradients(skip, inputs, g) for skip in (rcmlib.rcm_skip, torch_skip))
    ref = gradients(reference.skip, [a.double() for a in inputs], g.double())
    for a, b, c in zip(ours[:2], ref[:2], peer[:2], strict=True):
        assert_close(a, b, c)
    for a, b, c, t in zip(ours[2:], ref[2:], peer[2:], (g * x, g * f), strict=True):
        assert_sum_close(a, b, c, t)


def test_a_residual_in_float32_keeps_its_precision(device):
    x, f = pair((2, 5, 24), torch.float32, device)
    f = f.bfloat16()
    out = rcmlib.rcm_skip(x, f, 0.3, 0.7)
    assert_close(out, reference.skip(x, f, 0.3, 0.7), x)
    dx, df = gradients(lambda *a: rcmlib.rcm_skip(*a, 0.3, 0.7), (x, f), x)
    assert dx.dtype == torch.float32 and df.dtype == torch.bfloat16
    assert torch.allclose(dx, 0.3 * x)


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31_elements(gpu_memory):
    x = torch.zeros(1, 2**31 + 5000, device="cuda", dtype=torch.bfloat16)
    f = x.clone()
    x[0, -1], f[0, -2] = 2, 4
    out = rcmlib.rcm_skip(x, f, 0.5, 0.25)
    assert out[0, -2:].tolist() == [1, 1] and out.count_nonzero() == 2
