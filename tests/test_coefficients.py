"""The coefficients: closed forms, boundary conditions, and what they refuse."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rcmlib import edm, rectified_flow, trigflow

noise = st.floats(0, 1e6, allow_subnormal=False)
angle = st.floats(0, math.pi / 2)
spread = st.floats(0.05, 20)


@given(noise, spread)
def test_edm_is_the_published_formula(t, sigma):
    c = edm(t, sigma)
    total = t * t + sigma * sigma
    assert c.c_skip == pytest.approx(sigma**2 / total, rel=1e-14)
    assert c.c_out == pytest.approx(sigma * t / math.sqrt(total), rel=1e-14)
    assert c.c_in == pytest.approx(1 / math.sqrt(total), rel=1e-14)
    if t > 0:
        assert c.c_noise == pytest.approx(math.log(t) / 4, rel=1e-14, abs=1e-16)


@given(angle, spread)
def test_trigflow_is_the_published_formula(t, sigma):
    assert trigflow(t, sigma) == pytest.approx(
        (math.cos(t), -sigma * math.sin(t), 1 / sigma, t), rel=1e-14
    )


@given(angle)
def test_rectified_flow_is_the_published_formula(t):
    total = math.cos(t) + math.sin(t)
    s = math.sin(t) / total
    assert rectified_flow(t) == pytest.approx((1 / total, -s, 1 / total, s), rel=1e-14)


@pytest.mark.parametrize("convention", [edm, trigflow, rectified_flow])
def test_at_t_zero_the_network_is_switched_off_exactly(convention):
    c = convention(0.0)
    assert (c.c_skip, c.c_out) == (1.0, 0.0)
    c = convention(torch.zeros(3, dtype=torch.bfloat16))
    assert (c.c_skip == 1).all() and (c.c_out == 0).all()


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_far_from_the_data_edm_tends_to_sigma_data_times_the_network(sigma):
    c = edm(1e12, sigma)
    assert c.c_skip < 1e-23 * sigma**2
    assert c.c_out == pytest.approx(sigma, rel=1e-15)


@given(noise, spread)
def test_the_conventions_describe_one_denoiser(sigma_t, sigma):
    """tan t = σ/σ_d, x_edm = x_trig/cos t, F_edm = −F_trig: the same x0 for any x and F."""
    t = math.atan2(sigma_t, sigma)
    x, f = 0.7, -1.3
    e, g = edm(sigma_t, sigma), trigflow(t, sigma)
    assert e.c_skip * (x / math.cos(t)) - e.c_out * f == pytest.approx(
        g.c_skip * x + g.c_out * f, rel=1e-9, abs=1e-9
    )


def test_edm_does_not_overflow_where_t_squared_would():
    c = edm(1e200)
    assert c.c_out == 1.0 and c.c_in == 1e-200


def test_a_tensor_comes_back_in_float64_with_its_shape():
    t = torch.rand(2, 3, dtype=torch.bfloat16)
    for c in (edm(t), trigflow(t), rectified_flow(t)):
        assert all(v.shape == (2, 3) and v.dtype == torch.float64 for v in c)


@pytest.mark.parametrize("convention", [edm, trigflow, rectified_flow])
def test_gradients_reach_t(convention):
    t = torch.tensor([0.3, 1.1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: tuple(convention(t)[:2]), t)


@pytest.mark.parametrize("convention", [edm, trigflow, rectified_flow])
@pytest.mark.parametrize("t", [-0.1, math.nan, math.inf])
def test_a_time_outside_the_domain_is_refused(convention, t):
    with pytest.raises(ValueError, match="t must be finite"):
        convention(t)


@pytest.mark.parametrize("t", ["1", None, True, torch.tensor(1j), torch.tensor(True)])
def test_a_time_that_is_no_number_is_refused(t):
    with pytest.raises(TypeError, match="t must"):
        edm(t)


@pytest.mark.parametrize(
    ("sigma", "error"), [(0.0, ValueError), (-1.0, ValueError), ("1", TypeError)]
)
def test_a_spread_that_is_not_positive_is_refused(sigma, error):
    with pytest.raises(error, match="sigma_data must be"):
        edm(1.0, sigma)
