"""Inputs, peers and the error bound that the tests of the kernels share."""

import pytest
import torch
from torch.nn import functional as F

from rcmlib import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
without_a_gpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="what happens without a GPU"
)
needs_fp8 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9),
    reason="needs FP8, which GPUs have from compute capability 8.9 on",
)


def on_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def heads(shape, dtype, device, seed=0):
    """Random q, k, v, x and per-sample coefficients for (B, H, Nq, Nkv, D)."""
    batch, num_heads, q_len, kv_len, dim = shape
    random = torch.Generator().manual_seed(seed)

    def draw(*size):
        values = torch.randn(*size, generator=random, dtype=torch.float64)
        return values.to(device=device, dtype=dtype)

    q = draw(batch, num_heads, q_len, dim)
    k, v = (draw(batch, num_heads, kv_len, dim) for _ in range(2))
    x = draw(batch, q_len, num_heads * dim)
    c_skip, c_out = torch.rand(2, batch, generator=random, dtype=torch.float64).to(
        device
    )
    return q, k, v, x, c_skip, c_out


def torch_skip(x, f, c_skip, c_out):
    """The skip's peer: PyTorch, all in x's precision."""
    return (
        reference.per_sample(c_skip, x).to(x.dtype) * x
        + reference.per_sample(c_out, x).to(x.dtype) * f
    )


def poison_empty(monkeypatch, byte=0xFF):
    """What torch.empty and new_empty allocate is NaN (−1 in integers): an element that nobody
    writes shows.

    PyTorch calls them too, in every form and under every mode: hence a fill of the result,
    which is an operator like any other.
    """
    with torch.device("cpu"):
        torch.empty(0)  # here PyTorch notes, once, which functions take a device
    raw = torch.full((8,), byte, dtype=torch.uint8)
    kinds = *DTYPES, torch.float64, torch.float8_e4m3fn, torch.int8, torch.int32
    poison = {kind: raw.view(kind)[0].item() for kind in kinds}

    def poisoned(allocate):
        def allocate_poisoned(*arguments, **options):
            out = allocate(*arguments, **options)
            out.detach().fill_(poison.get(out.dtype, byte))
            return out

        return allocate_poisoned

    for owner, name in ((torch, "empty"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


def torch_attention(q, k, v, x, c_skip, c_out, **options):
    """The two-pass peer: PyTorch's attention and skip, all in the inputs' precision."""
    # Copies: SDPA refuses some strides that rcm_attention takes.
    q, k, v = (t.contiguous() for t in (q, k, v))
    f = reference.merge_heads(F.scaled_dot_product_attention(q, k, v, **options))
    return torch_skip(x, f, c_skip, c_out)


def assert_close(out, ref, peer):
    """out is as near to the float64 ref as the tolerance policy asks, and fully written."""
    assert out.shape == ref.shape and out.dtype == peer.dtype
    assert torch.isfinite(out).all()
    error = reference.relative_l2(out, ref)
    bound = 1e-6 if out.dtype == torch.float32 else reference.error_bound(ref, peer)
    assert error <= bound, f"relative L2 error {error:.3g} above {bound:.3g}"


def assert_sum_close(value, ref, peer, terms):
    """A sum of many terms [B, …] with either sign, such as ∂L/∂c_out = Σ g·f, per sample.

    The policy of `assert_close`, but in units of ‖terms‖: that is the error's size when each
    term is rounded, while the sum itself may be close to zero.
    """
    assert value.shape == ref.shape
    size = terms.double().flatten(1).norm(dim=1)
    error = ((value - ref) / size).abs().max()
    if terms.dtype == torch.float32:
        bound = 1e-6
    else:
        bound = 2 * ((peer - ref) / size).abs().max() + torch.finfo(terms.dtype).eps
    assert error <= bound, f"error {error:.3g} of the terms' norm, above {bound:.3g}"


def gradients(function, inputs, g):
    """∂(Σ g·function(*inputs))/∂(each input)."""
    inputs = [a.detach().requires_grad_() for a in inputs]
    return torch.autograd.grad(function(*inputs), inputs, g)


def check_x_at_t_zero(function, dtype, device):
    """Where c_skip = 1 and c_out = 0, function(q, k, v, x, …) is x, bit for bit."""
    q, k, v, x, *_ = heads((2, 2, 33, 33, 32), dtype, device)
    x[0, 0, :4] = torch.tensor(
        [-0.0, 0.0, torch.finfo(dtype).max, torch.finfo(dtype).tiny]
    )
    q[0] *= torch.finfo(dtype).max / 8  # finite, but its scores overflow
    assert q.isfinite().all()
    for one, zero in ((1.0, 0.0), (torch.ones(2), torch.zeros(2))):
        if isinstance(one, torch.Tensor):
            one, zero = one.to(device), zero.to(device)
        out = function(q, k, v, x, one, zero)
        assert torch.equal(out, x)
        assert torch.equal(out.signbit(), x.signbit())  # -0.0 stays -0.0


def check_each_sample_alone(function, batch, device):
    """A batch gives what its samples give one by one, with numbers as coefficients."""
    inputs = heads((batch, 2, 20, 20, 16), torch.float32, device)
    q, k, v, x, c_skip, c_out = inputs
    together = function(*inputs)
    for b in range(batch):
        row = slice(b, b + 1)
        alone = function(
            q[row], k[row], v[row], x[row], c_skip[b].item(), c_out[b].item()
        )
        assert torch.equal(together[row], alone)
