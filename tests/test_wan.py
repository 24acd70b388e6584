"""The Wan block is what it says: RoPE, RMS norm, modulation, gates, against float64 by hand."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rcmlib import reference
from rcmlib.wan import WanBlock, WanRMSNorm, rope_tables, rotate
from tests.inputs import assert_close

DIM, FFN_DIM, HEADS = 96, 80, 3  # head dimension 32: 12, 10 and 10 channels an axis
GRID = (2, 3, 4)


@pytest.fixture(params=[True, False], ids=["qk_norm", "no qk_norm"])
def block(request, device):
    torch.manual_seed(0)
    block = WanBlock(DIM, FFN_DIM, HEADS, qk_norm=request.param)
    for norm in (block.self_attn.norm_q, block.self_attn.norm_k):
        if request.param:
            nn.init.normal_(norm.weight)
    return block.to(device)


def inputs(device, batch=2, dtype=torch.float32):
    random = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 24, DIM, generator=random)
    e = torch.randn(batch, 6, DIM, generator=random)
    return x.to(device=device, dtype=dtype), e.to(device)


def angles(head_dim):
    """[N, head_dim/2] rotation angles of GRID's tokens, by loops."""
    third = 2 * (head_dim // 6)
    rows = []
    for position in itertools.product(*(range(n) for n in GRID)):
        row = []
        for p, channels in zip(
            position, (head_dim - 2 * third, third, third), strict=True
        ):
            row += [p / 10_000 ** (2 * i / channels) for i in range(channels // 2)]
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def by_hand(block, x, e):
    """The block in float64, from the formulas; RoPE as a product of complex numbers."""
    w = {name: p.double() for name, p in block.state_dict().items()}
    x = x.double()

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def standardise(x):
        variance, mean = torch.var_mean(x, dim=-1, keepdim=True, correction=0)
        return (x - mean) / (variance + 1e-6).sqrt()

    def rms(x, name):
        size = (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return x / size * w[f"{name}.weight"] if f"{name}.weight" in w else x

    def heads(x):
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    def rope(x):
        turn = torch.exp(1j * angles(DIM // HEADS)).to(x.device)
        pairs = torch.view_as_complex(heads(x).unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    e = (w["modulation"] + e.double()).unsqueeze(2)
    h = standardise(x) * (1 + e[:, 1]) + e[:, 0]
    q, k = (rms(linear(h, f"self_attn.{n}"), f"self_attn.norm_{n}") for n in ("q", "k"))
    v = heads(linear(h, "self_attn.v"))
    f = reference.merge_heads(reference.attention(rope(q), rope(k), v))
    x = x + e[:, 2] * linear(f, "self_attn.o")
    h = standardise(x) * (1 + e[:, 4]) + e[:, 3]
    h = F.gelu(linear(h, "ffn.0"), approximate="tanh")
    return x + e[:, 5] * linear(h, "ffn.2")


def test_the_block_is_its_formula(block, device):
    x, e = inputs(device)
    assert reference.relative_l2(block(x, e, GRID), by_hand(block, x, e)) < 1e-6


def test_a_float64_block_is_float64_throughout(block, device):
    x, e = inputs(device)
    block = block.double()
    out = block(x.double(), e.double(), GRID)
    assert out.dtype == torch.float64
    assert reference.relative_l2(out, by_hand(block, x, e)) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_16_bit_block_keeps_its_dtype_and_is_close(block, dtype, device):
    block = block.to(dtype)
    x, e = inputs(device, dtype=dtype)
    out = block(x, e, GRID)
    assert out.dtype == dtype
    assert reference.relative_l2(out, by_hand(block, x, e)) < 4 * torch.finfo(dtype).eps


def test_autocast_keeps_the_residual_stream_in_float32(block, device):
    x, e = inputs(device)
    with torch.autocast(device, torch.bfloat16):
        out = block(x, e, GRID)
    ref = by_hand(block, x, e)
    assert out.dtype == torch.float32
    # Most of x passes by the 16-bit products: the result is nearer than their rounding.
    assert reference.relative_l2(out, ref) < torch.finfo(torch.bfloat16).eps


def test_the_parameters_have_the_names_of_a_wan_checkpoint():
    names = [
        *("modulation", "self_attn.norm_q.weight", "self_attn.norm_k.weight"),
        *(f"self_attn.{n}.{p}" for n in "qkvo" for p in ("weight", "bias")),
        *(f"ffn.{n}.{p}" for n in "02" for p in ("weight", "bias")),
    ]
    state = WanBlock(DIM, FFN_DIM, HEADS).state_dict()
    assert sorted(state) == sorted(names)
    assert state["modulation"].shape == (1, 6, DIM)
    assert state["self_attn.norm_q.weight"].shape == (DIM,)  # all heads, not one


@pytest.mark.parametrize("row, name", [(2, "self_attn"), (5, "ffn")])
def test_a_gate_of_zero_closes_its_branch(block, row, name, device):
    x, e = inputs(device)
    e[:, row] = -block.modulation[:, row].detach()
    with torch.no_grad():
        before = block(x, e, GRID)
        for parameter in getattr(block, name).parameters():
            parameter.normal_()
    assert torch.equal(block(x, e, GRID), before)


def test_a_head_of_128_channels_gives_44_42_42_to_the_axes(device):
    cos, _ = rope_tables((3, 1, 1), 128, torch.float64, device)
    moves = (cos[0, 0] != cos[2, 0]).nonzero().flatten()
    assert moves.tolist() == list(range(22))
    cos, _ = rope_tables((1, 3, 1), 128, torch.float64, device)
    moves = (cos[0, 0] != cos[2, 0]).nonzero().flatten()
    assert moves.tolist() == list(range(22, 43))


def test_the_tables_are_the_angles_by_hand(device):
    for head_dim in (2, 4, 16, 18, 32):
        cos, sin = rope_tables(GRID, head_dim, torch.float64, device)
        turn = angles(head_dim).to(device)
        torch.testing.assert_close(cos.squeeze(1), turn.cos(), rtol=0, atol=1e-14)
        torch.testing.assert_close(sin.squeeze(1), turn.sin(), rtol=0, atol=1e-14)


def test_rope_scores_depend_on_the_distance_alone_and_keep_lengths(device):
    """⟨R(p)q, R(p')k⟩ is the same for any two positions as far apart on all three axes."""
    q, k = torch.randn(2, 1, 1, 1, 32, dtype=torch.float64).to(device)
    table = rope_tables((4, 5, 6), 32, torch.float64, device)
    q, k = (rotate(t.expand(1, 120, 1, 32), *table).view(4, 5, 6, 32) for t in (q, k))
    near = torch.einsum("fhwd,fhwd->fhw", q[:3, :3, 1:], k[1:, 2:, :-1])
    torch.testing.assert_close(near, near[:1, :1, :1].expand_as(near))
    torch.testing.assert_close(q.norm(dim=-1), q[0, 0, 0].norm().expand(4, 5, 6))
    assert not torch.allclose(q[0, 0, 1], q[0, 0, 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_rms_norm_sums_in_float32(dtype, device):
    norm = WanRMSNorm(512).to(device=device, dtype=dtype)
    x = torch.randn(2, 3, 512).to(device=device, dtype=dtype) * 300  # squares to 1e5
    ref = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert_close(norm(x), ref, ref.to(dtype))


def test_the_block_refuses_what_does_not_fit(device):
    with pytest.raises(ValueError, match="dim must be an even multiple of num_heads"):
        WanBlock(9, 16, num_heads=3)
    block = WanBlock(DIM, FFN_DIM, HEADS).to(device)
    x, e = inputs(device)
    with pytest.raises(ValueError, match=r"x must be \[B, N, 96\], got \[2, 24, 95\]"):
        block(x[..., 1:], e, GRID)
    with pytest.raises(ValueError, match=r"e must be \[2, 6, 96\], got \[1, 6, 96\]"):
        block(x, e[:1], GRID)
    with pytest.raises(TypeError, match="e must be torch.float32, got torch.bfloat16"):
        block(x, e.bfloat16(), GRID)
    for grid in ((2, 3, 5), (24,), (-2, -3, 4)):
        with pytest.raises(ValueError, match="with product 24, the tokens of x"):
            block(x, e, grid)
