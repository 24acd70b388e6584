"""Hopper's own attention kernel against float64, by the teams that it is compiled for."""

from dataclasses import replace

import pytest
import torch

from rcmlib import reference
from rcmlib.core.launch import Team
from tests.inputs import assert_close, check_x_at_t_zero, heads, torch_attention

BF16, FP16 = torch.bfloat16, torch.float16
TWO = Team(block_n=128, groups=2, stages=2, registers=240, fixed=True)
TURNS = replace(TWO, turns=True)
THREE = Team(128, groups=3, stages=2, registers=160, turns=True, fixed=True)
on_hopper = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
        reason="needs a Hopper GPU",
    ),
]


def hopper(team, *inputs, scale=None, is_causal=False, save=False):
    """As rcm_attention; with save what the backward pass needs, too."""
    from rcmlib.attention.hopper import hopper_forward

    dtype, dim = inputs[0].dtype, inputs[0].shape[-1]
    team = replace(team, fixed=team.fixed and dtype == BF16)
    scale = dim**-0.5 if scale is None else scale
    out = hopper_forward(team, *inputs, scale, is_causal, save)
    return out if save else out[0]


CASES = [  # team, dtype, (B, H, Nq, Nkv, D), causal
    (TWO, BF16, (1, 1, 1, 1, 128), False),
    (TWO, BF16, (2, 3, 129, 257, 128), False),
    (TWO, BF16, (1, 2, 640, 640, 128), True),
    (TWO, BF16, (1, 2, 513, 127, 96), True),
    (TWO, FP16, (1, 2, 200, 1111, 128), False),
    (TWO, FP16, (1, 2, 300, 300, 128), True),
    (TURNS, BF16, (2, 2, 300, 2048, 64), False),
    (TURNS, BF16, (1, 3, 500, 700, 64), True),
    (TURNS, BF16, (1, 1, 77, 1000, 16), False),
    (THREE, BF16, (2, 2, 385, 1024, 64), False),
    (THREE, BF16, (1, 2, 1000, 1000, 64), True),
    (THREE, FP16, (2, 2, 191, 383, 64), False),
    (THREE, BF16, (1, 2, 100, 150, 40), False),
    (THREE, BF16, (4, 12, 512, 512, 64), False),  # more programs than SMs
]


def name(case):
    team, dtype, shape, is_causal = case
    turns = "turns" if team.turns else "no turns"
    causal = "causal" if is_causal else "full"
    return f"{team.groups} groups, {turns}, {dtype}, {shape}, {causal}"


class TestOnHopper:
    pytestmark = on_hopper

    @pytest.mark.parametrize("case", CASES, ids=name)
    def test_the_kernel_agrees_with_float64(self, case):
        team, dtype, shape, is_causal = case
        inputs = heads(shape, dtype, "cuda")
        out = hopper(team, *inputs, is_causal=is_causal)
        ref = reference.rcm_attention(*inputs, is_causal=is_causal)
        assert_close(out, ref, torch_attention(*inputs, is_causal=is_causal))

    @pytest.mark.parametrize("team", [TWO, THREE], ids=["two", "three"])
    def test_every_length_is_right(self, team):
        """Around each multiple of a tile and of a block."""
        for n in (1, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 257, 383, 385, 640):
            inputs = heads((1, 2, n, 641 - n, 64), BF16, "cuda", seed=n)
            out = hopper(team, *inputs)
            assert_close(
                out, reference.rcm_attention(*inputs), torch_attention(*inputs)
            )

    def test_x_may_be_float32_or_missing_and_coefficients_numbers(self):
        q, k, v, x, *_ = heads((2, 2, 150, 300, 64), BF16, "cuda")
        f = reference.merge_heads(reference.attention(q, k, v))
        peer = torch_attention(q, k, v, x, 0.0, 1.0)
        assert_close(hopper(THREE, q, k, v, None, None, None), f, peer)
        out = hopper(THREE, q, k, v, x.float(), 0.3, 0.8)
        error = reference.relative_l2(out - 0.3 * x, 0.8 * f)
        assert out.dtype == torch.float32 and error <= reference.error_bound(f, peer)

    @pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
    def test_it_saves_what_the_backward_pass_needs(self, is_causal):
        inputs = q, k, v, x, *_ = heads((2, 2, 200, 333, 128), BF16, "cuda")
        out, f, lse = hopper(TWO, *inputs, is_causal=is_causal, save=True)
        ref = reference.rcm_attention(*inputs, is_causal=is_causal)
        assert_close(out, ref, torch_attention(*inputs, is_causal=is_causal))
        ref = reference.merge_heads(reference.attention(q, k, v, is_causal=is_causal))
        assert_close(f, ref, torch_attention(q, k, v, x, 0.0, 1.0, is_causal=is_causal))
        scores = q.double() @ k.double().mT * 128**-0.5
        if is_causal:
            later = torch.ones(200, 333, dtype=torch.bool, device="cuda").triu(1)
            scores = scores.masked_fill(later, float("-inf"))
        lse = lse.double() * torch.log(torch.tensor(2.0, dtype=torch.float64))
        torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-5, atol=1e-4)

    @pytest.mark.parametrize(
        "rows", [[5], [70], [130], [5, 130], [5, 70, 130], [200]], ids=str
    )
    @pytest.mark.parametrize("team", [TWO, TURNS, THREE], ids=["two", "turns", "three"])
    def test_one_key_may_tower_over_the_others(self, team, rows):
        """Too high for the kept maximum in one group's rows, in another's, or in all."""
        for n in (257, 384, 8192):
            q, k, v, x, *c = heads((1, 2, 220, n, 64), BF16, "cuda")
            k[..., 0] = 0
            k[:, 0, 3, 0] = 300.0
            q[..., 0] = 0
            q[:, 0, rows, 0] = 8.0
            inputs = (q, k, v, x, *c)
            out = hopper(team, *inputs)
            assert_close(
                out, reference.rcm_attention(*inputs), torch_attention(*inputs)
            )

    def test_what_is_not_finite_spreads_no_further_than_it_must(self):
        q, k, v, x, *c = heads((1, 2, 200, 300, 64), BF16, "cuda")
        q[0, 1, 100] = float("nan")
        v[0, 1, 7, 3] = float("inf")
        out, ref = (
            function(q, k, v, x, *c)
            for function in (lambda *a: hopper(THREE, *a), reference.rcm_attention)
        )
        assert torch.equal(out.isfinite(), ref.isfinite())

    @pytest.mark.parametrize("team", [TWO, TURNS, THREE], ids=["two", "turns", "three"])
    def test_sums_of_whole_numbers_are_exact(self, team):
        """Weights 1, 2 and 4, values from -8 to 8: a product that took its operand too late or
        too early would be wrong by whole numbers."""
        for seed in range(20):
            random = torch.Generator("cuda").manual_seed(seed)
            dim, n = (64 if team.groups == 3 else 128), 1024

            def draw(low, high, *shape, random=random):
                numbers = torch.randint(
                    low, high, shape, generator=random, device="cuda"
                )
                return numbers.to(BF16)

            q = torch.zeros(1, 4, 384, dim, device="cuda", dtype=BF16)
            k = torch.zeros(1, 4, n, dim, device="cuda", dtype=BF16)
            q[..., 0], k[..., 0] = 1, draw(0, 3, 1, 4, n)
            v, x = (
                draw(-8, 9, 1, 4, n, dim),
                torch.zeros(1, 384, 4 * dim, device="cuda"),
            )
            scale = 1 / torch.log2(torch.tensor(torch.e, dtype=torch.float64)).item()
            out = hopper(team, q, k, v, x, 0.0, 1.0, scale=scale)
            weights = k[..., 0].double().exp2()[:, :, None]  # the same for all queries
            f = weights @ v.double() / weights.sum(-1, keepdim=True)
            f = reference.merge_heads(f.expand(-1, -1, 384, -1))
            torch.testing.assert_close(out.double(), f, rtol=1e-6, atol=1e-6)

    def test_at_t_zero_the_result_is_x_bit_for_bit(self):
        for dtype in (BF16, FP16):
            check_x_at_t_zero(lambda *a: hopper(TWO, *a), dtype, "cuda")

    def test_the_views_of_a_packed_qkv_need_no_copy(self):
        qkv = torch.randn(2, 300, 3, 4, 64, device="cuda", dtype=BF16)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        x, c = torch.randn(2, 300, 256, device="cuda", dtype=BF16), (0.3, 0.8)
        out = hopper(THREE, q, k, v, x, *c)
        ref = reference.rcm_attention(q, k, v, x, *c)
        assert_close(out, ref, torch_attention(q, k, v, x, *c))

    @pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
    @pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
    @pytest.mark.parametrize(
        "shape",
        [
            (1, 1, 1, 1, 64),
            (2, 2, 200, 333, 64),
            (1, 3, 640, 512, 128),
            (1, 2, 77, 1000, 96),
        ],
        ids=str,
    )
    def test_gradients_agree_with_float64(self, shape, is_causal, dtype):
        from rcmlib.attention.hopper_backward import hopper_backward

        q, k, v, x, c_skip, c_out = heads(shape, dtype, "cuda")
        scale = shape[-1] ** -0.5
        inputs = [t.double().requires_grad_() for t in (q, k, v)]
        ref = reference.rcm_attention(*inputs, x, c_skip, c_out, is_causal=is_causal)
        g = torch.randn_like(x)
        refs = torch.autograd.grad(ref, inputs, g.double())
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        peer = torch_attention(*leaves, x, c_skip, c_out, is_causal=is_causal)
        peers = torch.autograd.grad(peer, leaves, g)
        _, f, lse = hopper(
            TWO, q, k, v, x, c_skip, c_out, is_causal=is_causal, save=True
        )
        rows = (g.double() * f.double()).unflatten(-1, (shape[1], -1)).sum(-1)
        delta = rows.transpose(1, 2).float().contiguous()
        found = hopper_backward(g, q, k, v, lse, delta, c_out, scale, is_causal)
        for out, ref, peer in zip(found, refs, peers, strict=True):
            assert_close(out, ref, peer)


def test_heads_that_it_cannot_read_are_refused():
    for shape, dtype in (((1, 1, 8, 8, 64), torch.float32), ((1, 1, 8, 8, 256), BF16)):
        with pytest.raises(ValueError, match="16-bit heads, D ≤ 128"):
            hopper(TWO, *heads(shape, dtype, "cpu"))
    q, k, v, *rest = heads((1, 1, 8, 8, 64), BF16, "cpu")
    with pytest.raises(ValueError, match="copy engine"):
        hopper(TWO, q, k[:, :, :1].expand_as(k), v, *rest)
