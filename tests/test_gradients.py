"""rcm_attention's gradients against float64."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rcmlib
from rcmlib import reference
from rcmlib.attention import attention
from tests.inputs import (
    DTYPES,
    assert_close,
    assert_sum_close,
    gradients,
    heads,
    torch_attention,
)

SHAPES = [  # (B, H, Nq, Nkv, D)
    (2, 3, 37, 53, 24),  # primes, and D not a power of two
    (1, 2, 128, 128, 64),  # whole tiles
    (3, 1, 65, 127, 128),  # one row over, one key under
    (1, 1, 97, 31, 17),  # few keys, and rows that the copy engine cannot address
    (1, 1, 70, 40, 256),
]


def check(inputs, is_causal=False, residual=None):
    """Every gradient of rcm_attention on these inputs, held to the tolerance policy."""
    q, k, v, x, c_skip, c_out = inputs
    x = x if residual is None else x.to(residual)
    inputs = (q, k, v, x, c_skip, c_out)
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    ours = gradients(
        lambda *a: rcmlib.rcm_attention(*a, is_causal=is_causal), inputs, g
    )
    peer = gradients(lambda *a: torch_attention(*a, is_causal=is_causal), inputs, g)
    ref = reference.rcm_attention_backward(g, *inputs, is_causal=is_causal)
    for a, b, c in zip(ours[:4], ref[:4], peer[:4], strict=True):
        assert_close(a, b, c)
    f = reference.merge_heads(reference.attention(q, k, v, is_causal=is_causal))
    assert_sum_close(ours[4], ref.dc_skip, peer[4], (g * x).to(q.dtype))
    assert_sum_close(ours[5], ref.dc_out, peer[5], (g * f).to(q.dtype))


def test_the_formulas_are_the_derivative_of_the_reference():
    inputs = heads((2, 2, 5, 7, 4), torch.float64, "cpu")
    for is_causal in (False, True):

        def forward(*a, is_causal=is_causal):
            return reference.rcm_attention(*a, scale=0.7, is_causal=is_causal)

        g = torch.randn(2, 5, 8, dtype=torch.float64)
        formulas = reference.rcm_attention_backward(
            g, *inputs, scale=0.7, is_causal=is_causal
        )
        for a, b in zip(formulas, gradients(forward, inputs, g), strict=True):
            assert reference.relative_l2(a, b) < 1e-12
        assert torch.autograd.gradcheck(
            forward, [a.detach().requires_grad_() for a in inputs]
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernels_agree_with_float64(shape, is_causal, dtype, device):
    check(heads(shape, dtype, device), is_causal)


@settings(max_examples=10, deadline=None)
@given(
    shape=st.tuples(
        *(st.integers(1, n) for n in (2, 2, 100)),
        st.integers(2, 100),
        st.integers(16, 72),
    ),
    is_causal=st.booleans(),
)
def test_any_length_will_do(shape, is_causal):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch, num_heads, q_len, kv_len, dim = shape
    # A causal first query sees one key: if it is alone, dq and dk are zero, up to rounding.
    q_len = max(q_len, 8)
    shape = (batch, num_heads, q_len, kv_len, dim)
    check(heads(shape, torch.float32, device, seed=sum(shape)), is_causal)


def test_a_residual_in_float32_beside_sixteen_bit_heads(device):
    check(heads((2, 2, 40, 50, 32), torch.bfloat16, device), residual=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_single_key_sends_nothing_to_queries_and_keys(dtype, device):
    inputs = heads((2, 2, 5, 1, 32), dtype, device)
    g = torch.randn(2, 5, 64).to(inputs[3])
    dq, dk, dv, *_ = gradients(rcmlib.rcm_attention, inputs, g)
    scale = dv.abs().max() * torch.finfo(dtype).eps
    assert dq.abs().max() <= 8 * scale and dk.abs().max() <= 8 * scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("t", [1e-3, 1e-4])
def test_small_noise_levels_keep_the_tolerance_of_large_ones(t, dtype, device):
    """The peer runs at c_out = 1: PyTorch in float16 would lose bits of a small c_out."""
    q, k, v, x, *_ = heads((2, 2, 60, 60, 32), dtype, device)
    c = rcmlib.edm(torch.tensor([t, t], device=device))
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    inputs = (q, k, v, x, c.c_skip, c.c_out)
    ours = gradients(rcmlib.rcm_attention, inputs, g)
    ref = reference.rcm_attention_backward(g, *inputs)
    one = torch.ones_like(c.c_out)
    peer = gradients(torch_attention, (q, k, v, x, one, one), g)
    peer_ref = reference.rcm_attention_backward(g, q, k, v, x, one, one)
    for a, b, c, d in zip(ours[:4], ref, peer, peer_ref, strict=False):
        bound = 2 * reference.relative_l2(c, d)
        bound += 2 * reference.relative_l2(b.to(dtype), b)
        assert reference.relative_l2(a, b) <= bound
    f = reference.merge_heads(reference.attention(q, k, v))
    assert_sum_close(ours[5], ref.dc_out, peer[5], (g * f).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_at_t_zero_only_x_and_the_coefficients_get_a_gradient(dtype, device):
    q, k, v, x, *_ = heads((2, 2, 33, 33, 32), dtype, device)
    q[0] *= torch.finfo(dtype).max / 8  # scores that overflow must not matter
    one, zero = torch.ones(2, device=device), torch.zeros(2, device=device)
    g = torch.randn(x.shape).to(x)
    dq, dk, dv, dx, _, dc_out = gradients(
        rcmlib.rcm_attention, (q, k, v, x, one, zero), g
    )
    for t in (dq, dk, dv):
        assert torch.equal(t, torch.zeros_like(t))
    assert torch.equal(dx, g)
    f = reference.merge_heads(reference.attention(q[1:], k[1:], v[1:]))
    ref = (g[1:] * f).sum((1, 2))
    assert_sum_close(dc_out[1:].double(), ref, ref, (g[1:] * f).to(dtype))


def test_the_gradient_reaches_t(device):
    q, k, v, x, *_ = heads((3, 2, 30, 30, 16), torch.float32, device)

    def loss(attend, t):
        c = rcmlib.edm(t)
        return attend(q, k, v, x, c.c_skip, c.c_out).square().sum()

    t = torch.tensor([0.0, 0.5, 3.0], device=device, dtype=torch.float64)
    ours, ref = (
        gradients(lambda t, attend=attend: loss(attend, t), [t], None)[0]
        for attend in (rcmlib.rcm_attention, reference.rcm_attention)
    )
    assert reference.relative_l2(ours, ref) < 1e-6


def test_one_number_for_all_samples_gets_one_gradient(device):
    q, k, v, x, *_ = heads((3, 2, 20, 20, 16), torch.float32, device)
    c = torch.tensor([0.3, 0.6], dtype=torch.float64, requires_grad=True)  # on the CPU
    rcmlib.rcm_attention(q, k, v, x, c[0], c[1]).sum().backward()
    f = reference.merge_heads(reference.attention(q, k, v))
    ref = torch.stack([x.double().sum(), f.sum()]).cpu()
    assert reference.relative_l2(c.grad, ref) < 1e-5


def test_views_of_a_packed_qkv_and_expanded_keys_get_their_gradients(device):
    packed = torch.randn(2, 21, 3, 2, 16, device=device)
    x = torch.randn(2, 21, 32, device=device)

    def layer(attend, packed):
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        k = k[:, :1].expand(-1, 2, -1, -1)  # both heads share the first one's keys
        return attend(q, k, v, x, 0.5, 0.5)

    g = torch.randn_like(x)
    ours, ref = (
        gradients(lambda p, attend=attend: layer(attend, p), [packed], g.to(dtype))[0]
        for attend, dtype in (
            (rcmlib.rcm_attention, torch.float32),
            (reference.rcm_attention, torch.float64),
        )
    )
    assert reference.relative_l2(ours, ref) < 1e-6


def test_the_incoming_gradient_may_have_any_strides(device):
    inputs = heads((2, 2, 20, 20, 16), torch.float32, device)
    g = torch.randn(2, 32, 20, device=device).mT
    expected = gradients(rcmlib.rcm_attention, inputs, g.contiguous())
    for a, b in zip(gradients(rcmlib.rcm_attention, inputs, g), expected, strict=True):
        assert torch.equal(a, b)
    ones = torch.ones(2, 20, 32, device=device)
    expected = gradients(rcmlib.rcm_attention, inputs, ones)
    summed = gradients(lambda *a: rcmlib.rcm_attention(*a).sum(), inputs, None)
    for a, b in zip(summed, expected, strict=True):
        assert torch.equal(a, b)


def test_plain_attention_has_gradients_too(device):
    q, k, v, x, *_ = heads((2, 2, 45, 30, 24), torch.float32, device)
    g = torch.randn_like(x)
    ours = gradients(attention, (q, k, v), g)
    ref = reference.rcm_attention_backward(g, q, k, v, x, 0.0, 1.0)
    for a, b in zip(ours, ref[:3], strict=True):
        assert reference.relative_l2(a, b) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_element_of_every_gradient_is_written(dtype, device, poisoned_outputs):
    for shape in SHAPES[:4]:
        inputs = heads(shape, dtype, device)
        for gradient in gradients(
            rcmlib.rcm_attention, inputs, torch.ones_like(inputs[3])
        ):
            assert torch.isfinite(gradient).all()


@pytest.mark.gpu
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_two_runs_give_the_same_bits(is_causal):
    inputs = heads((2, 4, 1000, 1000, 64), torch.bfloat16, "cuda")
    g = torch.randn_like(inputs[3])
    runs = [
        gradients(lambda *a: rcmlib.rcm_attention(*a, is_causal=is_causal), inputs, g)
        for _ in range(3)
    ]
    for again in runs[1:]:
        for a, b in zip(runs[0], again, strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
def test_integer_inputs_give_the_exact_gradient_over_many_seeds(dim):
    """All scores equal over 64 keys, small integers: dv is exact in any order.

    Guards against a matrix instruction reading its register operand too late.
    """
    for seed in range(30):
        torch.manual_seed(seed)
        q = torch.zeros(2, 4, 128, dim, device="cuda", dtype=torch.bfloat16)
        k, v = torch.randint(-4, 5, (2, 2, 4, 64, dim), device="cuda").bfloat16()
        x = torch.zeros(2, 128, 4 * dim, device="cuda", dtype=torch.bfloat16)
        g = torch.randint(-1, 2, x.shape, device="cuda").bfloat16()
        inputs = [a.requires_grad_() for a in (q, k, v)]
        out = rcmlib.rcm_attention(*inputs, x, 1.0, 1.0)
        dq, _, dv = torch.autograd.grad(out, inputs, g)
        ref = reference.rcm_attention_backward(g, q, k, v, x, 1.0, 1.0)
        assert torch.equal(dv, ref.dv.bfloat16())
        assert_close(dq, ref.dq, ref.dq.bfloat16())


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31_elements(gpu_memory):
    """g, F and dq have 2.3·10⁹ elements; the last tokens sit beyond int32."""
    tokens, dim = 70_001, 128
    q = torch.randn(1, 1, tokens, dim, device="cuda", dtype=torch.bfloat16)
    q = q.expand(-1, 256, -1, -1).requires_grad_()
    k, v = torch.randn(2, 1, 1, 64, dim, device="cuda", dtype=torch.bfloat16)
    k, v = (t.expand(-1, 256, -1, -1).requires_grad_() for t in (k, v))
    x = torch.zeros((), device="cuda", dtype=torch.bfloat16).expand(1, tokens, 1)
    x = x.expand(-1, -1, 256 * dim).contiguous()
    g = torch.randn_like(x)
    out = rcmlib.rcm_attention(q, k, v, x, 1.0, 1.0)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), g)
    del out
    last = [t[:, -2:].detach() for t in (q, k, v)]
    ours = [t[:, -2:] for t in (dq, dk, dv)]
    inputs = (*last, x[..., -2 * dim :], 1.0, 1.0)
    g = g[..., -2 * dim :]
    ref = reference.rcm_attention_backward(g, *inputs)
    peer = gradients(lambda *a: torch_attention(*a, *inputs[3:]), last, g)
    for a, b, c in zip(ours, ref[:3], peer, strict=True):
        assert_close(a, b, c)


@pytest.mark.parametrize("c_out", [0.5, -0.02])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_float16_rows_beside_a_much_larger_gradient_keep_their_digits(
    c_out, scale, device
):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 64, 64, device=device).half()
    x = torch.zeros(1, 64, 128, device=device).half()
    g = scale * torch.randn(1, 64, 128, device=device)
    g[:, 1:] /= 1000
    function = functools.partial(rcmlib.rcm_attention, x=x, c_skip=1.0, c_out=c_out)
    exact = functools.partial(reference.rcm_attention, x=x, c_skip=1.0, c_out=c_out)
    (dq, *_) = gradients(function, (q, k, v), g.half())
    (ref, *_) = gradients(exact, [t.double() for t in (q, k, v)], g.half().double())
    dq, ref = dq[:, :, 1:], ref[:, :, 1:]
    assert reference.relative_l2(dq, ref) <= reference.error_bound(ref, ref.half())
