"""Hopper's own attention kernels against float64: forward by each team, and the gradients."""

import inspect
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import rcmlib
from rcmlib import core, reference
from rcmlib.attention.tiles import choose_team, hopper_gradients
from rcmlib.core.launch import Plan, Team
from tests import gluon_on_cpu
from tests.inputs import (
    assert_close,
    check_x_at_t_zero,
    gradients,
    heads,
    on_hopper,
    torch_attention,
)

BF16, FP16 = torch.bfloat16, torch.float16
TWO = Team(block_n=128, groups=2, stages=2, registers=240, fixed=True)
TURNS = replace(TWO, turns=True)
THREE = Team(128, groups=3, stages=2, registers=160, turns=True, fixed=True)


def hopper(team, *inputs, scale=None, is_causal=False, save=False):
    """As rcm_attention; with save what the backward pass needs, too."""
    from rcmlib.attention.forward import attention_forward

    dtype, dim = inputs[0].dtype, inputs[0].shape[-1]
    team = replace(team, fixed=team.fixed and dtype == BF16)
    scale = dim**-0.5 if scale is None else scale
    out = attention_forward(*inputs, scale, is_causal, save, team)
    return out if save else out[0]


@contextmanager
def watched_launches():
    """The names of the kernels that are launched."""
    names, launch = [], Plan.launch

    def watched(plan, *tensors):
        names.append(plan.kernel.__name__)
        launch(plan, *tensors)

    with mock.patch.object(Plan, "launch", watched):
        yield names


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


@pytest.fixture(params=[None, 1, 3], ids=["all", "one", "three"])
def programs(request, monkeypatch):
    """As many programs as a GPU has SMs; or so few that each works on several tasks, up to
    the 31 that it can."""
    if request.param:
        sms = request.param
        monkeypatch.setattr(core, "multiprocessors", lambda device: sms)


@pytest.mark.gpu
@pytest.mark.skipif(not on_hopper(), reason="needs a Hopper GPU")
class TestOnHopper:
    @pytest.mark.usefixtures("programs")
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
        lse = lse.double() * torch.log(torch.tensor(2.0, dtype=torch.float64))
        expected = log_sum_exp(q, k, 128**-0.5, is_causal)
        torch.testing.assert_close(lse, expected, rtol=1e-5, atol=1e-4)

    @pytest.mark.usefixtures("programs")
    @pytest.mark.parametrize(
        "rows",
        [[5], [70], [130], [5, 130], [5, 70, 130], [200], [5, 390, 399]],
        ids=str,
    )
    @pytest.mark.parametrize("team", [TWO, TURNS, THREE], ids=["two", "turns", "three"])
    def test_one_key_may_tower_over_the_others(self, team, rows):
        """Too high for the kept maximum in one group's rows, in another's, or in all."""
        for n in (257, 384, 8192):
            q, k, v, x, *c = heads((1, 2, 400, n, 64), BF16, "cuda")
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

    def test_the_same_call_gives_the_same_bits(self):
        inputs = heads((2, 3, 1000, 1500, 128), BF16, "cuda")
        first = hopper(TWO, *inputs, save=True)
        for _ in range(5):
            for one, other in zip(first, hopper(TWO, *inputs, save=True), strict=True):
                assert torch.equal(one, other)

    def test_offsets_beyond_two_to_the_31_elements(self, gpu_memory):
        """x and the result have 2.3·10⁹ elements; the last tokens sit beyond int32."""
        tokens, many, dim = 70_001, 256, 128
        q = torch.randn(1, many, tokens, dim, device="cuda", dtype=BF16)
        k, v = torch.randn(2, 1, many, 192, dim, device="cuda", dtype=BF16)
        x = torch.randn(1, tokens, many * dim, device="cuda", dtype=BF16)
        out = hopper(TWO, q, k, v, x, 0.3, 0.8)
        last = (q[:, :, -70:], k, v, x[:, -70:], 0.3, 0.8)
        assert_close(
            out[:, -70:], reference.rcm_attention(*last), torch_attention(*last)
        )

    def test_rcm_attention_is_computed_by_it(self):
        """Where there is enough to do; also captured in a graph, on another stream, in x's
        float32, and from views that are padded."""
        wide = torch.randn(2, 16, 2100, 136, device="cuda", dtype=BF16)
        q = k = v = wide[:, :, :2048, :128]
        x, c = torch.randn(2, 2048, 2048, device="cuda"), (0.3, 0.8)
        f = reference.merge_heads(reference.attention(q, k, v))
        peer = torch_attention(q, k, v, x.to(BF16), 0.0, 1.0)
        with watched_launches() as kernels:
            out = rcmlib.rcm_attention(q, k, v, x, *c)
        assert kernels == ["hopper_attention_kernel"]
        error = reference.relative_l2(out - 0.3 * x, 0.8 * f)
        assert error <= reference.error_bound(f, peer)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            assert torch.equal(rcmlib.rcm_attention(q, k, v, x, *c), out)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            again = rcmlib.rcm_attention(q, k, v, x, *c)
        again.zero_()
        graph.replay()
        assert torch.equal(again, out)


def log_sum_exp(q, k, scale, is_causal):
    """Of each query's scores, in float64."""
    scores = q.double() @ k.double().mT * scale
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    return scores.logsumexp(-1)


def saved_for_backward(inputs, scale, is_causal):
    """lse in units of log2, as the kernels save it, and δ for g = x: float32, from float64."""
    q, k, v, x, *_ = inputs
    f = reference.attention(q, k, v, scale=scale, is_causal=is_causal)
    g = x.unflatten(-1, q.shape[1::2]).transpose(1, 2).double()
    two = torch.log(torch.tensor(2.0, dtype=torch.float64))
    lse = log_sum_exp(q, k, scale, is_causal)
    return (lse / two).float(), (g * f).sum(-1).float()


def hopper_backward_of(inputs, is_causal, kept=None):
    """dq, dk, dv of g = x by Hopper's kernel. lse and δ are of `kept`, where that is given."""
    from rcmlib.attention.hopper_backward import hopper_backward

    q, k, v, x, _, c_out = inputs
    scale = q.shape[-1] ** -0.5
    saved = saved_for_backward(kept or inputs, scale, is_causal)
    return hopper_backward(x, q, k, v, *saved, c_out, scale, is_causal)


def hopper_gradients_of(inputs, is_causal):
    """dq, dk, dv of g = x by Hopper's kernel; and by float64, and by PyTorch in 16 bits."""
    ours, x = hopper_backward_of(inputs, is_causal), inputs[3]
    ref = reference.rcm_attention_backward(x, *inputs, is_causal=is_causal)
    peer = gradients(lambda *a: torch_attention(*a, is_causal=is_causal), inputs, x)
    return ours, ref[:3], peer[:3]


GRADIENTS = [  # dtype, (B, H, Nq, Nkv, D), causal
    (BF16, (1, 1, 64, 128, 128), False),
    (BF16, (2, 3, 129, 257, 128), False),
    (BF16, (1, 2, 640, 640, 128), True),
    (BF16, (1, 2, 513, 127, 96), True),
    (BF16, (1, 2, 65, 300, 128), True),  # keys that no query sees
    (FP16, (1, 2, 200, 1111, 128), False),
    (BF16, (2, 2, 300, 2048, 64), False),
    (BF16, (1, 3, 500, 700, 64), True),
    (FP16, (2, 2, 385, 1024, 64), False),
    (BF16, (1, 2, 77, 1000, 16), False),
    (BF16, (4, 12, 512, 512, 64), False),  # more programs than SMs
]


@pytest.mark.gpu
@pytest.mark.skipif(not on_hopper(), reason="needs a Hopper GPU")
class TestGradientsOnHopper:
    @pytest.mark.parametrize("case", GRADIENTS, ids=str)
    def test_they_agree_with_float64(self, case):
        dtype, shape, is_causal = case
        for a, b, c in zip(
            *hopper_gradients_of(heads(shape, dtype, "cuda"), is_causal), strict=True
        ):
            assert_close(a, b, c)

    @pytest.mark.parametrize("dim", [64, 128])
    def test_every_length_is_right(self, dim):
        """Around each multiple of a tile of queries and of a block of keys."""
        for n in (2, 63, 64, 65, 127, 128, 129, 191, 193, 255, 257, 385):
            inputs = heads((1, 2, n, 388 - n, dim), BF16, "cuda", seed=n)
            for is_causal in (False, True):
                found = hopper_gradients_of(inputs, is_causal)
                for a, b, c in zip(*found, strict=True):
                    assert_close(a, b, c)

    def test_keys_that_no_query_sees_may_hold_anything(self):
        """As the unused end of a cache, behind a causal mask."""
        for dim in (64, 128):
            q, k, v, *rest = heads((1, 2, 64, 128, dim), BF16, "cuda")
            inputs, kept = (q, k, v, *rest), (q, k[:, :, :64], v[:, :, :64], *rest)
            clean = hopper_backward_of(inputs, True, kept)
            k[:, :, 100], v[:, :, 101] = float("nan"), float("inf")
            found = hopper_backward_of(inputs, True, kept)
            for a, b in zip(found, clean, strict=True):
                assert torch.equal(a, b)

    @pytest.mark.parametrize("dim", [64, 128])
    def test_sums_of_whole_numbers_are_exact(self, dim):
        """Weights 1, 2 and 4, and all else small: a product that took its operand too late or
        too early would be wrong by whole numbers, and so would an addition that is lost."""
        from rcmlib.attention.hopper_backward import hopper_backward

        shape = (1, 4, 1024, dim)
        for seed in range(20):
            random = torch.Generator("cuda").manual_seed(seed)

            def draw(high, *shape, random=random):
                return torch.randint(
                    -high, high + 1, shape, generator=random, device="cuda"
                )

            q, k = torch.zeros(2, *shape, device="cuda")
            q[..., 0], k[..., 0] = 1, 1 + draw(1, *shape[:3])
            q[..., 1:] = draw(1, *shape[:3], dim - 1)
            v, g = draw(1, 2, *shape).unbind(0)
            v[..., 32:] = 0  # so that g·v − δ has no more than seven bits
            lse, delta = torch.zeros(shape[:3], device="cuda"), draw(8, *shape[:3])
            p = k[..., 0].double().exp2()[:, :, None]  # the same for all queries
            ds = p * (g.double() @ v.double().mT - delta[..., None].double())
            assert ds.abs().max() <= 256
            expected = (
                ds @ k.double(),
                ds.mT @ q.double(),
                p.expand_as(ds).mT @ g.double(),
            )
            tokens = g.transpose(1, 2).flatten(2).to(BF16)
            q, k, v = (t.to(BF16) for t in (q, k, v))
            scale = 1 / torch.log2(torch.tensor(torch.e, dtype=torch.float64)).item()
            saved = (lse, delta.float())
            found = hopper_backward(tokens, q, k, v, *saved, 1.0, scale, False)
            for a, b, factor in zip(found, expected, (scale, scale, 1.0), strict=True):
                factor = torch.tensor(factor, dtype=torch.float32, device="cuda")
                assert torch.equal(a, (b.float() * factor).to(BF16))

    def test_where_c_out_is_zero_they_are_zero(self):
        """At t = 0, whatever the sums are."""
        q, k, v, x, *_ = heads((2, 2, 200, 300, 64), BF16, "cuda")
        x[0, 5] = float("inf")
        c = torch.tensor([0.0, 0.5], device="cuda")
        ours, *_ = hopper_gradients_of((q, k, v, x, c, c), False)
        for gradient in ours:
            assert (gradient[0] == 0).all() and (gradient[1] != 0).any()

    def test_rcm_attention_s_are_computed_by_it(self):
        """Unless the same call has to give the same bits."""
        inputs = heads((4, 12, 1024, 1024, 64), BF16, "cuda")
        g = torch.randn_like(inputs[3])
        with watched_launches() as kernels:
            found = gradients(rcmlib.rcm_attention, inputs, g)
        assert "hopper_backward_kernel" in kernels and "dq_kernel" not in kernels
        torch.use_deterministic_algorithms(True)
        try:
            with watched_launches() as kernels:
                first = gradients(rcmlib.rcm_attention, inputs, g)
            again = gradients(rcmlib.rcm_attention, inputs, g)
        finally:
            torch.use_deterministic_algorithms(False)
        assert "dq_kernel" in kernels and "hopper_backward_kernel" not in kernels
        for a, b, c in zip(found[:4], first[:4], again[:4], strict=True):
            assert torch.equal(b, c)
            assert reference.relative_l2(a, b.double()) < 0.005

    def test_a_graph_captures_them(self):
        inputs = heads((4, 12, 1024, 1024, 64), BF16, "cuda")
        leaves = [t.detach().requires_grad_() for t in inputs[:3]]
        g = torch.randn_like(inputs[3])

        def step():
            out = rcmlib.rcm_attention(*leaves, *inputs[3:])
            return torch.autograd.grad(out, leaves, g)

        expected = step()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), watched_launches() as kernels:
            found = step()
        assert "hopper_backward_kernel" in kernels
        for _ in range(2):  # the second replay finds scratch that is used
            graph.replay()
            for a, b in zip(found, expected, strict=True):
                assert reference.relative_l2(a, b.double()) < 1e-3


ON_A_CPU = [  # team, dtype, (B, H, Nq, Nkv, D), causal, programs, rows that tower
    (TWO, BF16, (1, 2, 300, 300, 64), True, 1, []),
    (TURNS, BF16, (2, 1, 129, 257, 128), False, None, []),
    (THREE, BF16, (3, 2, 520, 520, 64), True, 2, []),
    (THREE, FP16, (1, 2, 200, 383, 40), False, 1, []),
    (TURNS, BF16, (1, 2, 400, 384, 64), False, 3, [5, 130]),
    (THREE, BF16, (1, 2, 500, 500, 64), True, 1, [5, 390, 399]),
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", ON_A_CPU, ids=str)
def test_its_source_is_right_whoever_goes_first(case, seed):
    """Its own Python, on NumPy (gluon_on_cpu.py), its partitions in random turns."""
    team, dtype, shape, is_causal, programs, rows = case
    team = replace(team, fixed=dtype == BF16)
    inputs = q, k, v, x, *c = heads(shape, dtype, "cpu", seed=seed)
    if rows:
        k[..., 0], k[:, 0, 3, 0] = 0, 300.0
        q[..., 0], q[:, 0, rows, 0] = 0, 8.0
    scale = shape[-1] ** -0.5
    out, f, lse = gluon_on_cpu.run(team, *inputs, scale, is_causal, programs, seed)
    ref = reference.rcm_attention(*inputs, is_causal=is_causal)
    assert reference.relative_l2(out, ref) < 0.005
    ref = reference.merge_heads(reference.attention(q, k, v, is_causal=is_causal))
    assert reference.relative_l2(f, ref) < 0.005
    assert lse.isfinite().all()


GRADIENTS_ON_A_CPU = [  # (B, H, Nq, Nkv, D), causal
    ((1, 2, 200, 257, 128), False),
    ((1, 1, 300, 300, 64), False),
    ((1, 1, 400, 400, 64), True),
    ((1, 1, 65, 300, 96), True),
    ((2, 1, 700, 128, 128), False),
]


def gradients_on_a_cpu(shape, is_causal, seed):
    """(ours, float64's) dq, dk, dv for g = x."""
    inputs = q, k, v, x, _, c_out = heads(shape, BF16, "cpu", seed=seed)
    batch, many, q_len, _, dim = shape
    scale = dim**-0.5
    g = x.unflatten(-1, (many, dim)).transpose(1, 2)
    lse, delta = saved_for_backward(inputs, scale, is_causal)
    ours = gluon_on_cpu.run_backward(
        g, q, k, v, lse, delta, c_out, scale, is_causal, seed
    )
    ref = reference.rcm_attention_backward(x, *inputs, is_causal=is_causal)
    return ours, ref[:3]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", GRADIENTS_ON_A_CPU, ids=str)
def test_the_gradients_source_is_right_whoever_goes_first(case, seed):
    for ours, ref in zip(*gradients_on_a_cpu(*case, seed), strict=True):
        assert reference.relative_l2(ours, ref) < 0.005


def test_keys_that_no_query_sees_may_hold_anything():
    q, k, v, x, _, c = heads((1, 1, 64, 128, 64), BF16, "cpu")
    kept = (q, k[:, :, :64], v[:, :, :64], x, c, c)
    saved = saved_for_backward(kept, 0.125, True)
    k[:, :, 100], v[:, :, 101] = float("nan"), float("inf")
    g = x.unflatten(-1, (1, 64)).transpose(1, 2)
    dq, dk, dv = gluon_on_cpu.run_backward(g, q, k, v, *saved, c, 0.125, True)
    ref = reference.rcm_attention_backward(x, *kept, is_causal=True)
    ours = (dq, dk[:, :, :64], dv[:, :, :64])
    for a, b in zip(ours, ref[:3], strict=True):
        assert reference.relative_l2(a, b) < 0.005
    assert (dk[:, :, 64:] == 0).all() and (dv[:, :, 64:] == 0).all()


@pytest.mark.parametrize(
    ("module", "function", "missing"),
    [
        (
            "hopper_backward",
            "gather",
            "mbarrier.wait(ring.q_full.index(after), phase_after)",
        ),
        ("hopper_backward", "gather", "hw.fence_async_shared()"),
        ("hopper_backward", "gather", "mbarrier.wait(ring.g_full.index(at), phase)"),
        (
            "hopper_backward",
            "gather",
            "mbarrier.wait(ring.ds_free.index(i & 1), turned)",
        ),
        ("hopper_backward", "gather", "mbarrier.wait(ring.v_full.index(0), 0)"),
        ("hopper_backward", "store_keys", "hw.fence_async_shared()"),
        ("hopper_backward", "consume", "mbarrier.wait(ring.last.index(0), 0)"),
        ("hopper_backward", "consume", "mbarrier.wait(ring.last.index(0), 1)"),
        ("backward_ring", "produce", "mbarrier.wait(ring.g_free.index(at), phase ^ 1)"),
        ("backward_ring", "copy_numbers", "mbarrier.arrive(ring.q_full.index(at))"),
    ],
)
def test_a_line_that_the_gradients_miss_is_found_on_a_cpu(
    module, function, missing, monkeypatch
):
    without(missing, module, function, monkeypatch)
    with pytest.raises(AssertionError):
        for seed in range(20):
            ours, ref = gradients_on_a_cpu((1, 1, 700, 128, 128), False, seed)
            for a, b in zip(ours, ref, strict=True):
                assert reference.relative_l2(a, b) < 0.005


def without(missing, module, function, monkeypatch):
    """Until the test ends, the function's source lacks this line."""
    module = getattr(gluon_on_cpu, module)
    original = getattr(module, function)
    source = inspect.getsource(original.fn)
    made = {}
    changed = source.replace(missing, "pass", 1).split("\n", 1)[1]
    assert changed not in source
    exec(changed, vars(module), made)
    made[function].__module__ = module.__name__
    for one in gluon_on_cpu.BACKWARD:
        if getattr(one, function, None) is original:
            monkeypatch.setattr(one, function, SimpleNamespace(fn=made[function]))


@pytest.mark.parametrize(
    ("module", "function", "missing"),
    [
        ("ring", "produce", "mbarrier.wait(ring.k_free.index(at), turned)"),
        ("ring", "produce", "mbarrier.expect(ring.v_full.index(at), BYTES)"),
        ("hopper", "consume", "hw.fence_async_shared()"),
        ("hopper", "consume", "mbarrier.wait(ring.x_full.index(0), r & 1)"),
    ],
)
def test_a_line_that_is_missing_is_found_on_a_cpu(
    module, function, missing, monkeypatch
):
    without(missing, module, function, monkeypatch)
    inputs = heads((1, 1, 400, 600, 64), BF16, "cpu")
    ref = reference.rcm_attention(*inputs)
    with pytest.raises(AssertionError):
        for seed in range(20):
            out, *_ = gluon_on_cpu.run(TWO, *inputs, 0.125, False, 1, seed)
            assert reference.relative_l2(out, ref) < 0.005


def test_who_computes():
    """Hopper's own kernel where it is faster, with a kept maximum where that fits."""
    many = (64, 8192, 8192)
    for dim, groups in ((16, 3), (64, 3), (72, 2), (128, 2)):
        team = choose_team((*many, dim), BF16, (9, 0), False, 132)
        assert team.groups == groups and team.fixed
    for count, length, dim, is_causal, groups in (  # as it was measured
        (48, 512, 64, False, None), (48, 1024, 64, False, None), (48, 2048, 64, False, 3),
        (12, 2048, 64, False, 3), (12, 512, 128, False, None), (12, 1024, 128, False, 2),
        (48, 1024, 64, True, None), (48, 2048, 64, True, 2), (64, 1024, 128, True, 2),
    ):  # fmt: skip
        shape = count, length, length, dim
        team = choose_team(shape, BF16, (9, 0), is_causal, 132)
        assert (team and team.groups) == groups, (shape, is_causal)
    assert not choose_team((*many, 128), FP16, (9, 0), False, 132).fixed
    assert not choose_team((64, 8192, 500, 128), BF16, (9, 0), False, 132).fixed
    for dim, dtype, capability in (
        (256, BF16, (9, 0)), (128, torch.float32, (9, 0)), (128, BF16, (8, 0)),
        (128, BF16, (10, 0)), (128, BF16, (12, 0)),
    ):  # fmt: skip
        assert choose_team((*many, dim), dtype, capability, False, 132) is None


def test_heads_that_it_cannot_read_are_refused():
    for shape, dtype in (((1, 1, 8, 8, 64), torch.float32), ((1, 1, 8, 8, 256), BF16)):
        with pytest.raises(ValueError, match="16-bit heads, D ≤ 128"):
            hopper(TWO, *heads(shape, dtype, "cpu"))
    q, k, v, *rest = heads((1, 1, 8, 8, 64), BF16, "cpu")
    with pytest.raises(ValueError, match="copy engine"):
        hopper(TWO, q, k[:, :, :1].expand_as(k), v, *rest)


def test_who_computes_gradients():
    long, hopper = (48, 2048, 2048), (9, 0)
    for shape, dtype, capability, own in (
        ((*long, 64), BF16, hopper, True), ((12, 1408, 1408, 128), FP16, hopper, True),
        ((12, 1280, 1280, 128), BF16, hopper, False),  # too few for every SM
        ((4096, 16, 4096, 64), BF16, hopper, False),  # dq would be padded eightfold
        ((196608, 16, 16, 64), BF16, hopper, False), ((*long, 256), BF16, hopper, False),
        ((*long, 64), torch.float32, hopper, False), ((*long, 64), BF16, (10, 0), False),
    ):  # fmt: skip
        assert hopper_gradients(shape, dtype, capability, 132) == own
