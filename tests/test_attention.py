"""rcm_attention against float64: shapes, strides, coefficients, extremes."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rcmlib
from rcmlib import reference
from rcmlib.attention import forward as attention
from rcmlib.attention import tiles
from rcmlib.core.launch import PLANS, descriptors_allowed
from tests.inputs import (
    DTYPES,
    assert_close,
    check_each_sample_alone,
    check_x_at_t_zero,
    heads,
    on_hopper,
    torch_attention,
    without_a_gpu,
)

SHAPES = [  # (B, H, Nq, Nkv, D)
    (1, 1, 1, 1, 16),  # one token
    (2, 3, 37, 53, 24),  # primes, and D not a power of two
    (1, 2, 128, 128, 64),  # whole tiles
    (3, 1, 65, 127, 128),  # one row over, one key under
    (1, 2, 97, 31, 80),  # fewer keys than a tile holds
    (1, 1, 50, 50, 17),  # rows that the copy engine cannot address
    (1, 1, 70, 40, 256),
]


@pytest.fixture(
    params=[None, True, False, "team"],
    ids=["as_is", "as_few_rows", "as_many", "by_hoppers_own"],
)
def sizes(request, monkeypatch):
    """Small inputs are launched as what they are; and as long ones, of few or many rows, or
    by Hopper's own kernel."""
    if request.param == "team":
        if not on_hopper():
            pytest.skip("needs a Hopper GPU")
        choose = tiles.choose_team  # as on a GPU for which nothing is too little
        monkeypatch.setattr(attention, "choose_team", lambda *a: choose(*a[:-1], None))
    elif request.param is not None:
        monkeypatch.setattr(attention, "few_rows", lambda *_: request.param)
        monkeypatch.setattr(attention, "choose_team", lambda *_: None)
    if request.param is not None:
        monkeypatch.setattr(attention, "SHORT", 0)
        monkeypatch.setattr(tiles, "SHORT", 0)
    PLANS.clear()
    yield
    PLANS.clear()


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_agrees_with_float64(shape, is_causal, dtype, device):
    inputs = heads(shape, dtype, device)
    out = rcmlib.rcm_attention(*inputs, is_causal=is_causal)
    ref = reference.rcm_attention(*inputs, is_causal=is_causal)
    assert_close(out, ref, torch_attention(*inputs, is_causal=is_causal))


@settings(max_examples=15, deadline=None)
@given(
    shape=st.tuples(
        *(st.integers(1, n) for n in (2, 2, 150, 150)), st.integers(16, 72)
    ),
    is_causal=st.booleans(),
    scale=st.one_of(st.none(), st.floats(1e-3, 2)),
)
def test_any_length_head_dimension_and_scale_will_do(shape, is_causal, scale):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = heads(shape, torch.float32, device, seed=sum(shape))
    out = rcmlib.rcm_attention(*inputs, is_causal=is_causal, scale=scale)
    ref = reference.rcm_attention(*inputs, is_causal=is_causal, scale=scale)
    assert_close(out, ref, out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_element_of_the_result_is_written(dtype, device, poisoned_outputs):
    for shape in SHAPES:
        inputs = heads(shape, dtype, device)
        assert torch.isfinite(rcmlib.rcm_attention(*inputs)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_a_skip_the_launcher_is_plain_attention(dtype, device):
    q, k, v, x, *_ = heads((2, 2, 45, 70, 32), dtype, device)
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter has no bfloat16; rcm_attention widens it first")
    (out,) = attention.attention_forward(q, k, v, None, None, None, 32**-0.5, False)
    ref = reference.merge_heads(reference.attention(q, k, v))
    assert_close(out, ref, torch_attention(q, k, v, x, 0.0, 1.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_at_t_zero_the_result_is_x_bit_for_bit(dtype, device):
    check_x_at_t_zero(rcmlib.rcm_attention, dtype, device)


def test_each_sample_has_its_own_coefficients(device):
    check_each_sample_alone(rcmlib.rcm_attention, 4, device)


@pytest.mark.parametrize(
    "kind", [torch.float64, torch.float32, torch.bfloat16], ids=str
)
def test_a_number_a_scalar_tensor_and_a_vector_mean_the_same(kind, device):
    q, k, v, x, *_ = heads((2, 1, 20, 20, 16), torch.float32, device)
    vector = torch.full((2,), 0.75, dtype=kind, device=device)
    expected = rcmlib.rcm_attention(q, k, v, x, 0.75, 0.75)
    for c_skip, c_out in ((vector, vector), (vector[0], 0.75), (0.75, vector)):
        assert torch.equal(rcmlib.rcm_attention(q, k, v, x, c_skip, c_out), expected)


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
def test_views_of_a_packed_qkv_are_used_in_place(offset, device):
    batch, tokens, num_heads, dim = 2, 45, 3, 32
    storage = torch.randn(batch * tokens * 3 * num_heads * dim + offset, device=device)
    packed = storage[offset:].view(batch, tokens, 3, num_heads, dim)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    wide = torch.randn(batch, tokens, 2 * num_heads * dim, device=device)
    x = wide[..., : num_heads * dim]
    assert descriptors_allowed(q, k, v) == (offset == 0)
    out = rcmlib.rcm_attention(q, k, v, x, 0.3, 0.8)
    assert_close(out, reference.rcm_attention(q, k, v, x, 0.3, 0.8), out)


def test_keys_shared_by_the_heads_may_be_expanded(device):
    q, k, v, x, c_skip, c_out = heads((2, 3, 20, 30, 16), torch.float32, device)
    k, v = (t[:, :1].expand(-1, 3, -1, -1) for t in (k, v))
    out = rcmlib.rcm_attention(q, k, v, x, c_skip, c_out)
    assert_close(out, reference.rcm_attention(q, k, v, x, c_skip, c_out), out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_queries_and_keys_may_overlap_in_memory(dtype, device):
    """A sliding window: token n of the view starts one number after token n - 1."""
    _, _, v, x, c_skip, c_out = heads((1, 1, 20, 20, 16), dtype, device)
    line = torch.linspace(-2, 2, 64).to(device=device, dtype=dtype)
    q = k = line.as_strided((1, 1, 20, 16), (64, 64, 1, 1))
    inputs = (q, k, v, x, c_skip, c_out)
    out = rcmlib.rcm_attention(*inputs)
    assert_close(out, reference.rcm_attention(*inputs), torch_attention(*inputs))


@pytest.mark.gpu
def test_strides_between_tokens_may_be_huge(gpu_memory):
    """Token stride 2²⁶ elements: row 40 of a tile lies beyond int32."""
    storage = torch.zeros(40 * 2**26 + 16, device="cuda", dtype=torch.float16)
    k = storage.as_strided((1, 1, 41, 16), (16, 16, 2**26, 1))
    k.normal_()
    q, _, v, x, c_skip, c_out = heads((1, 1, 20, 41, 16), torch.float16, "cuda")
    inputs = (q, k, v, x, c_skip, c_out)
    out = rcmlib.rcm_attention(*inputs)
    assert_close(out, reference.rcm_attention(*inputs), torch_attention(*inputs))
    unaligned = torch.zeros(41 * 16 + 1, device="cuda", dtype=torch.float16)[1:]
    q = unaligned[: 20 * 16].view(1, 1, 20, 16).copy_(q)  # the pointer path
    inputs = (q, k, v, x, c_skip, c_out)
    out = rcmlib.rcm_attention(*inputs)
    assert_close(out, reference.rcm_attention(*inputs), torch_attention(*inputs))


def test_large_scores_do_not_overflow(device):
    q, k, v, x, c_skip, c_out = heads((1, 1, 40, 40, 16), torch.float32, device)
    inputs = (q * 1e4, k * 1e4, v, x, c_skip, c_out)
    assert_close(rcmlib.rcm_attention(*inputs), reference.rcm_attention(*inputs), x)


def hopper_type(dim, device, monkeypatch):
    """bfloat16; in the interpreter float32, in the tiles that an H100 has for bfloat16."""
    if device == "cuda":
        return torch.bfloat16
    choose = partial(attention.choose_tile, dim, torch.bfloat16, (9, 0), True)
    monkeypatch.setattr(attention, "choose_tile", lambda *a: choose(*a[4:]))
    return torch.float32


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("tokens", [171, 192])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("height", [40.0, 300.0])
def test_one_key_may_tower_over_the_others(
    height, place, dim, tokens, is_causal, device, monkeypatch
):
    """Its score is larger by `height`, for one query in each block of 64 but the first.

    exp(height) overflows: a maximum that was found without that key will not do.
    """
    dtype = hopper_type(dim, device, monkeypatch)
    q, k, v, x, c_skip, c_out = heads((1, 2, tokens, tokens, dim), dtype, device)
    k[..., 0] = 0
    k[:, 0, 0 if place == "first" else -1, 0] = height
    q[..., 0] = 0
    q[:, 0, 70::64, 0] = dim**0.5
    inputs = (q, k, v, x, c_skip, c_out)
    plan = attention.attention_plan(*inputs[:4], per_sample=True, is_causal=is_causal)
    out, _, lse = attention.attention_forward(*inputs, dim**-0.5, is_causal, True, plan)
    ref = reference.rcm_attention(*inputs, is_causal=is_causal)
    assert_close(out, ref, torch_attention(*inputs, is_causal=is_causal))
    scores = q.double() @ k.double().mT * dim**-0.5
    if is_causal:
        later = torch.ones(tokens, tokens, dtype=torch.bool, device=device).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    torch.testing.assert_close(
        lse.double() / attention.LOG2_E, scores.logsumexp(-1), rtol=1e-5, atol=1e-4
    )


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("dim", [64, 128])
def test_what_is_not_finite_spreads_no_further_than_it_must(dim, device):
    """A query that is NaN spoils its own row, an infinite value its own channel."""
    q, k, v, x, c_skip, c_out = heads((1, 2, 200, 200, dim), torch.bfloat16, device)
    q[0, 1, 100] = float("nan")
    v[0, 1, 7, 3] = float("inf")
    inputs = (q, k, v, x, c_skip, c_out)
    out = rcmlib.rcm_attention(*inputs)
    ref = reference.rcm_attention(*inputs)
    assert torch.equal(out.isfinite(), ref.isfinite())
    good = ref.isfinite()
    peer = torch_attention(*inputs)
    assert_close(out[good], ref[good], peer[good])


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    "places", [(0,), (128,), (0, 128)], ids=["first", "last", "both"]
)
def test_a_tile_of_scores_that_are_minus_infinity_counts_nothing(
    places, dim, device, monkeypatch
):
    """One query overflows against whole tiles of keys; its neighbours do not notice.

    In the last tile that makes the kernel start over, from the first one.
    """
    dtype = hopper_type(dim, device, monkeypatch)
    q, k, v, x, c_skip, c_out = heads((1, 2, 192, 192, dim), dtype, device)
    k[..., 0] = 0
    for start in places:
        k[:, 0, start : start + 64, 0] = -1e30
    q[..., 0] = 0
    q[:, 0, 100, 0] = 1e20
    inputs = (q, k, v, x, c_skip, c_out)
    out = rcmlib.rcm_attention(*inputs)
    assert_close(out, reference.rcm_attention(*inputs), torch_attention(*inputs))


@without_a_gpu  # where no kernel can be watched
@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize(
    "sizes", [True, False], ids=["few_rows", "many"], indirect=True
)
@pytest.mark.parametrize("tail", [1, 8, 31, 32, 64])
@pytest.mark.parametrize("dim", [64, 128])
def test_the_kept_maximum_is_that_of_32_keys_at_least(dim, tail, device, monkeypatch):
    """The last key alone would be no bound, nor would the last 31: the others tower over them.

    The 32nd from the end scores as high as the highest, so with it nothing is done again.
    """
    dtype = hopper_type(dim, device, monkeypatch)
    done, overflowed = [], attention.overflowed

    def record(*sums):
        done.append(overflowed(*sums))
        return done[-1]

    monkeypatch.setattr(attention, "overflowed", record)
    tokens = 192 + tail
    q, k, v, x, c_skip, c_out = heads((1, 2, 70, tokens, dim), dtype, device)
    q[..., 0] = dim**0.5
    k[..., 0] = -200
    k[..., : tokens - 31, 0] = 0
    inputs = (q, k, v, x, c_skip, c_out)
    assert_close(rcmlib.rcm_attention(*inputs), reference.rcm_attention(*inputs), x)
    assert done and not any(bool(again.handle.data.item()) for again in done)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_integer_inputs_give_the_exact_answer_over_many_seeds(dtype):
    """All scores equal, v small integers: the mean over 64 keys is exact in any order.

    Guards against a matrix instruction reading its register operand too late.
    """
    for seed in range(50):
        torch.manual_seed(seed)
        q = torch.zeros(2, 4, 128, 64, device="cuda", dtype=dtype)
        k = torch.randint(-8, 9, (2, 4, 64, 64), device="cuda").to(dtype)
        v = torch.randint(-8, 9, (2, 4, 64, 64), device="cuda").to(dtype)
        x = torch.zeros(2, 128, 256, device="cuda", dtype=dtype)
        out = rcmlib.rcm_attention(q, k, v, x, 1.0, 1.0)
        mean = v.double().mean(2, keepdim=True).expand(-1, -1, 128, -1)
        assert torch.equal(out, reference.merge_heads(mean).to(dtype))


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31_elements(gpu_memory):
    """x and the result have 2.3·10⁹ elements; the last tokens sit beyond int32."""
    tokens, dim = 70_001, 128
    x = torch.zeros(1, tokens, 256 * dim, device="cuda", dtype=torch.bfloat16)
    q = torch.randn(1, 1, tokens, dim, device="cuda", dtype=torch.bfloat16)
    q = q.expand(-1, 256, -1, -1)
    k, v = torch.randn(2, 1, 1, 64, dim, device="cuda", dtype=torch.bfloat16)
    k, v = (t.expand(-1, 256, -1, -1) for t in (k, v))
    x[0, -1] = 3
    assert x.numel() > 2**31
    out = rcmlib.rcm_attention(q, k, v, x, 1.0, 1.0)
    ref = reference.rcm_attention(
        q[:, -2:, -3:], k[:, -2:], v[:, -2:], x[:, -3:, :256], 1, 1
    )
    peer = torch_attention(q[:, -2:, -3:], k[:, -2:], v[:, -2:], x[:, -3:, :256], 1, 1)
    assert_close(out[:, -3:, -256:], ref, peer)


@pytest.mark.gpu
def test_long_sequences_match_a_few_reference_rows():
    q, k, v, x, c_skip, c_out = heads(
        (1, 2, 33_333, 33_333, 64), torch.bfloat16, "cuda"
    )
    out = rcmlib.rcm_attention(q, k, v, x, c_skip, c_out)
    rows = torch.tensor([0, 1, 16_000, 33_331, 33_332], device="cuda")
    some = (q[:, :, rows], k, v, x[:, rows], c_skip, c_out)
    assert_close(out[:, rows], reference.rcm_attention(*some), torch_attention(*some))


@pytest.mark.gpu
def test_any_stream_and_the_result_repeats_bit_for_bit():
    inputs = heads((2, 4, 500, 500, 64), torch.bfloat16, "cuda")
    first = rcmlib.rcm_attention(*inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        second = rcmlib.rcm_attention(*inputs)
    stream.synchronize()
    assert torch.equal(first, second)
