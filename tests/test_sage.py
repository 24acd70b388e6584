"""rcm_sage_attention against its model, against float64, and at the edges."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rcmlib
from benchmarks.inputs import gaussian, video_like
from rcmlib import reference
from rcmlib.core import device_capability
from rcmlib.reference import eight_bit
from rcmlib.sage import PV, sage_attention
from rcmlib.sage.kernel import choose_sage_tile
from tests.inputs import (
    check_each_sample_alone,
    check_x_at_t_zero,
    heads,
    needs_fp8,
)

pytestmark = needs_fp8

BACKEND = "inductor" if torch.cuda.is_available() else "aot_eager"  # a CPU may lack C++
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
SMOOTH = {"smooth_k": True, "smooth_v": True}
ROUGH = {"smooth_k": False, "smooth_v": False}

CASES = [  # (B, H, Nq, Nkv, D), causal, dtype, pv, smoothing
    ((1, 1, 1, 1, 16), False, FP32, "fp8", SMOOTH),  # one token
    ((2, 3, 37, 53, 24), False, FP16, "fp8", SMOOTH),  # primes, D not a power of two
    ((2, 3, 37, 53, 24), True, BF16, "fp8_fp16", ROUGH),
    ((1, 2, 128, 128, 64), False, BF16, "fp8", SMOOTH),  # whole tiles
    ((1, 2, 128, 256, 64), True, FP16, "fp8", SMOOTH),
    ((1, 2, 128, 128, 64), False, FP16, "fp8_short", ROUGH),
    ((3, 1, 65, 127, 128), False, FP16, "fp8", SMOOTH),  # one row over, one key under
    ((3, 1, 65, 127, 128), True, FP32, "fp16", SMOOTH),
    ((1, 1, 70, 300, 128), False, BF16, "fp8_fp16", SMOOTH),  # many tiles and a rest
    ((1, 1, 300, 130, 64), True, FP16, "fp8", SMOOTH),  # queries beyond the last key
    ((1, 1, 260, 128, 80), True, BF16, "fp16", ROUGH),  # the same, keys in whole tiles
    ((1, 2, 97, 31, 80), False, FP32, "fp8_short", SMOOTH),  # fewer keys than a tile
    ((1, 1, 50, 50, 17), True, FP16, "fp8", SMOOTH),  # rows without any alignment
    ((1, 1, 70, 140, 256), False, BF16, "fp8", SMOOTH),
    ((1, 1, 70, 40, 256), True, FP16, "fp16", SMOOTH),
]


def model(q, k, v, pv="fp8", **options):
    """What the kernel should compute, float64: `eight_bit.sage_attention` with its tile.

    The tensor core's sums are exact here: the error that they add is far below E4M3's.
    """
    block_n = choose_sage_tile(q.shape[-1], pv, device_capability(q.device)).block_n
    fp8 = pv != "fp16"
    sums = "fp8_fp16" if pv == "fp8_fp16" else "fp8"
    return reference.merge_heads(
        eight_bit.sage_attention(
            q, k, v, fp8_p=fp8, fp8_v=fp8, sums=sums, k_group=block_n, block_n=block_n,
            **options,
        )
    )  # fmt: skip


def assert_follows(out, modelled, ref, share):
    """out departs from its model by a small share of the model's own error.

    Not bit for bit: the kernel's exp2 and its float32 exponents differ from the model's in the
    last bits, and so now and then a weight at a tie is rounded to the other side.
    """
    assert out.shape == ref.shape and torch.isfinite(out).all()
    distance = (out.double() - modelled).norm()
    bound = share * (modelled - ref).norm() + 2 * (ref.to(out.dtype) - ref).norm()
    bound += 1e-6 * ref.norm()
    assert distance <= bound, f"{distance:.3g} from the model, above {bound:.3g}"


@pytest.mark.parametrize(
    ("shape", "is_causal", "dtype", "pv", "smooth"), CASES, ids=str
)
def test_the_kernel_follows_its_model(shape, is_causal, dtype, pv, smooth, device):
    q, k, v, x, c_skip, c_out = heads(shape, dtype, device)
    k, v = k + 2, v - 1  # something to smooth
    if dtype == FP16:
        x = x.float()  # the skip may stay in float32
    out = rcmlib.rcm_sage_attention(
        q, k, v, x, c_skip, c_out, is_causal=is_causal, pv=pv, **smooth
    )
    assert out.dtype == x.dtype
    f = model(q, k, v, pv, is_causal=is_causal, **smooth)
    modelled = reference.skip(x, f, c_skip, c_out)
    ref = reference.rcm_attention(q, k, v, x, c_skip, c_out, is_causal=is_causal)
    # The model walks over the keys in order; the kernel takes the diagonal first, and so
    # rounds its weights relative to another maximum.
    assert_follows(out, modelled, ref, share=0.75 if is_causal else 0.25)


@pytest.mark.parametrize("smooth_k", [False, True])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_smoothing_q_corrects_the_scores(is_causal, smooth_k, device):
    """q has an offset that costs it INT8's resolution: without it, errors are smaller.

    In float16, because FP8's own errors would hide the difference.
    """
    q, k, v, *_ = heads((1, 2, 70, 150, 64), FP32, device)
    signs = torch.randn(64, generator=torch.Generator().manual_seed(0)).sign()
    q = q + 5 * signs.to(device)
    options = {"is_causal": is_causal, "smooth_k": smooth_k, "pv": "fp16"}
    ref = reference.merge_heads(reference.attention(q, k, v, is_causal=is_causal))
    rough, smooth = (
        reference.relative_l2(sage_attention(q, k, v, smooth_q=s, **options), ref)
        for s in (False, True)
    )
    assert smooth < 0.7 * rough and smooth < 0.01


@settings(max_examples=8, deadline=None)
@given(
    shape=st.tuples(
        *(st.integers(1, n) for n in (2, 2, 140, 140)), st.sampled_from([16, 24, 33])
    ),
    is_causal=st.booleans(),
    scale=st.one_of(st.none(), st.floats(1e-3, 1)),
)
def test_any_length_head_dimension_and_scale_will_do(shape, is_causal, scale):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = heads(shape, FP16, device, seed=sum(shape))
    options = {"is_causal": is_causal, "scale": scale}
    out = rcmlib.rcm_sage_attention(*inputs, **options)
    q, k, v, *rest = inputs
    modelled = reference.skip(rest[0], model(q, k, v, **options), *rest[1:])
    ref = reference.rcm_attention(*inputs, **options)
    assert_follows(out, modelled, ref, share=1.0)


# ---- the accuracy that the 8 bits are held to ----

BOUNDS = {"gaussian": (0.9992, 0.041), "video_like": (0.9995, 0.025)}


def judged(name, tokens, dim, device, dtype=FP16):
    if name == "gaussian":
        qkv = gaussian(1, 2, tokens, dim)
    else:
        qkv = video_like(1, 2, (tokens // 64, 8, 8), dim)
    return [t.to(device=device, dtype=dtype) for t in qkv]


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("pv", ["fp8", "fp8_fp16", "fp16"])
def test_cosine_and_l1_stay_within_their_bounds(name, pv, device):
    """At full size on a GPU, and on 256 tokens in the interpreter."""
    q, k, v = judged(name, 2048 if device == "cuda" else 256, 128, device)
    ref = reference.merge_heads(reference.attention(q, k, v))
    out = sage_attention(q, k, v, pv=pv)
    cosine, l1 = BOUNDS[name]
    assert reference.cosine(out, ref) >= cosine
    assert reference.relative_l1(out, ref) <= l1
    assert_follows(out, model(q, k, v, pv), ref, share=0.25)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("which", ["k", "v"])
@pytest.mark.parametrize(
    "row", [0, 100, 512, 513]
)  # in the sample or not, a sink or not
@pytest.mark.parametrize("offset", [0, 5])
def test_smoothing_is_not_much_worse_than_none(offset, row, which, is_causal, device):
    """Beside a large token that moves the mean away from all others."""
    torch.manual_seed(0)
    tokens = 1024 if row > 100 else 256
    q, k, v = torch.randn(3, 1, 1, tokens, 32, device=device)
    t = {"k": k, "v": v}[which]
    t += offset * torch.randn(32, device=device)
    t[:, :, row] *= 1e4 if which == "v" else 100
    q[..., 0], k[:, :, row, 0] = 6.0, -200.0  # nobody looks at that token
    k[:, :, row, 1:] *= 0.01
    ref = reference.merge_heads(reference.attention(q, k, v, is_causal=is_causal))
    others = torch.arange(ref.shape[1]) != row
    options = {"is_causal": is_causal, f"smooth_{'v' if which == 'k' else 'k'}": False}

    def error(smooth):
        out = sage_attention(q, k, v, **options, **{f"smooth_{which}": smooth})
        return reference.relative_l1(out[:, others], ref[:, others])

    assert error(True) <= 1.5 * error(False)


def test_smoothing_sees_two_levels_that_have_no_common_mean(device):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 256, 32, device=device)
    v = v / 10
    v[:, :, 128:] += 10
    half = slice(128)  # under a causal mask it sees small values only
    ref = reference.merge_heads(reference.attention(q, k, v, is_causal=True))[:, half]
    on, off = (
        reference.relative_l1(
            sage_attention(q, k, v, is_causal=True, smooth_v=s)[:, half], ref
        )
        for s in (True, False)
    )
    assert on <= 1.5 * off


@pytest.mark.gpu
@pytest.mark.parametrize("name", BOUNDS)
def test_the_error_is_a_peer_s_and_what_fp8_adds(name):
    """SageAttention 1.0.6 keeps p and v in float16; errors of independent steps add squared."""
    peer = pytest.importorskip("sageattention")
    q, k, v = judged(name, 2048, 128, "cuda")
    exact = reference.attention(q, k, v)
    theirs = peer.sageattn(q, k.clone(), v, tensor_layout="HND")  # it writes to k
    fp8_alone = eight_bit.sage_attention(q, k, v, q_group=None, k_group=None)
    ours = sage_attention(q, k, v)
    for measure in (
        reference.rmse,
        reference.relative_l1,
        lambda out, ref: math.sqrt(2 * (1 - reference.cosine(out, ref))),
    ):
        budget = math.hypot(measure(theirs, exact), measure(fp8_alone, exact))
        assert measure(ours, reference.merge_heads(exact)) <= 1.05 * budget


# ---- exact answers ----


def hadamard(n):
    """n orthogonal rows of ±1, float32 [n, n]; n is a power of two."""
    h = torch.ones(1, 1)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


def integers(random, shape, pv):
    """Values that E4M3 holds after scaling: their largest, 7 or 9, becomes 448 or 2.25."""
    largest = 9 if pv == "fp8_fp16" else 7
    v = torch.randint(-largest, largest + 1, shape, generator=random).float()
    v[:, :, 0] = largest
    return v


def one_hot(seed, dim, device, dtype=FP16, size=8.0, pv="fp8", samples=2):
    """Keys ±Hadamard rows, queries some of them, values integers: each query finds its key.

    [samples, 2, N, dim] with N = 2·dim keys and as many queries, and the exact answer.
    """
    random = torch.Generator().manual_seed(seed)
    rows = hadamard(dim)
    k = size * torch.cat([rows, -rows]).expand(samples, 2, -1, -1)
    found = torch.randint(2 * dim, k.shape[:3], generator=random)
    q = k.gather(2, found[..., None].expand(k.shape))
    w = integers(random, (samples, 2, dim, dim), pv)
    v = torch.cat([w, -w], 2)
    answer = v.gather(2, found[..., None].expand(v.shape))
    return [t.to(device=device, dtype=dtype) for t in (q, k, v, answer)]


def check_one_hot(seed, dim, device, dtype=FP16, offset=0, pv="fp8", **options):
    q, k, v, answer = one_hot(seed, dim, device, dtype, pv=pv)
    out = sage_attention(q, k, v + offset, pv=pv, **options)
    assert torch.equal(out, reference.merge_heads(answer + offset))


def assert_nearly(out, answer):
    """The 8 bits are exact; a few float32 roundings, of 1 / l for one, are left."""
    assert (out - answer).abs().max() < 1e-5


def check_uniform(seed, keys, device, pv="fp8"):
    """All scores equal, 64 or 128 keys: the mean over v, integers / keys, exactly."""
    random = torch.Generator().manual_seed(seed)
    k = torch.randint(-8, 9, (2, 2, keys, 64), generator=random)
    v = integers(random, (2, 2, keys, 64), pv)
    q = torch.zeros(2, 2, 70, 64)
    q, k, v = (t.to(device=device, dtype=FP16) for t in (q, k, v))
    out = sage_attention(q, k, v, smooth_v=False, pv=pv)
    mean = v.double().mean(2, keepdim=True).expand(q.shape)
    assert torch.equal(out, reference.merge_heads(mean).half())


@pytest.mark.parametrize("pv", PV)
def test_integers_that_8_bits_hold_give_the_exact_answer(pv, device):
    check_one_hot(0, 32, device, pv=pv, **ROUGH)
    if pv == "fp8":
        check_one_hot(0, 32, device, offset=5)  # both smoothed: the means are integers
        check_one_hot(0, 64, device, BF16, smooth_q=True)
    check_uniform(0, 64, device, pv)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
def test_integers_give_the_exact_answer_over_many_seeds(dim):
    """Guards against a matrix instruction reading its register operand too late."""
    for seed in range(50):
        check_one_hot(seed, dim, "cuda", BF16, offset=seed % 3)
        check_uniform(seed, 64 << seed % 2, "cuda")


@pytest.mark.parametrize("smooth_q", [False, True])
def test_large_scores_find_their_key_at_any_size(smooth_q, device):
    """Scores up to 1e8. Float32 holds their exponents in ever coarser steps: from 1, which
    moves a weight relative to E4M3's largest, to thousands."""
    for size in (30, 100, 200, 300, 500, 700, 1000, 2000, 10_000):
        q, k, v, answer = one_hot(1, 32, device, FP32, float(size), samples=1)
        out = sage_attention(q[:, :, :9], k, v, smooth_q=smooth_q, **ROUGH)
        assert_nearly(out, reference.merge_heads(answer[:, :, :9]))


@pytest.mark.parametrize("offset", [0, 1000], ids=["", "1000 more"])
def test_what_all_keys_share_changes_nothing(offset, device):
    """Integers, so that the mean is exact: the very same 8 bits, the very same result."""
    q, _, v, x, *_ = heads((1, 2, 70, 64, 32), FP16, device)
    random = torch.Generator().manual_seed(0)
    k = torch.randint(-20, 21, (1, 2, 64, 32), generator=random).to(device).half()
    expected = rcmlib.rcm_sage_attention(q, k, v, x, 0.5, 0.5)
    shift = torch.randint(-offset, offset + 1, (32,), generator=random).to(k)
    assert torch.equal(
        rcmlib.rcm_sage_attention(q, k + shift, v, x, 0.5, 0.5), expected
    )


# ---- edges ----


def test_every_element_of_the_result_is_written(device, poisoned_outputs):
    for shape, is_causal, dtype, pv, smooth in CASES[:3]:
        q, k, v, *_ = heads(shape, dtype, device)
        for smooth_q in (False, True):
            out = sage_attention(
                q, k, v, is_causal=is_causal, pv=pv, smooth_q=smooth_q, **smooth
            )
            assert torch.isfinite(out).all()


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
def test_at_t_zero_the_result_is_x_bit_for_bit(dtype, device):
    check_x_at_t_zero(rcmlib.rcm_sage_attention, dtype, device)


def test_without_x_it_is_attention_alone(device):
    q, k, v, x, *_ = heads((1, 2, 33, 40, 32), FP16, device)
    f = sage_attention(q, k, v)
    assert torch.equal(rcmlib.rcm_sage_attention(q, k, v, x, 0.0, 1.0), f)


def test_each_sample_has_its_own_coefficients(device):
    check_each_sample_alone(rcmlib.rcm_sage_attention, 3, device)


def dense(t):
    return t.clone(memory_format=torch.contiguous_format)


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
def test_views_of_a_packed_qkv_are_used_in_place(offset, device):
    batch, tokens, num_heads, dim = 2, 45, 3, 32
    storage = torch.randn(
        batch * tokens * 3 * num_heads * dim + offset, device=device
    ).half()
    packed = storage[offset:].view(batch, tokens, 3, num_heads, dim)
    qkv = packed.permute(2, 0, 3, 1, 4).unbind(0)
    x = torch.randn(batch, tokens, 2 * num_heads * dim, device=device)
    x = x[..., offset : num_heads * dim + offset]
    out = rcmlib.rcm_sage_attention(*qkv, x, 0.3, 0.8)
    expected = rcmlib.rcm_sage_attention(*map(dense, qkv), dense(x), 0.3, 0.8)
    assert torch.equal(out, expected)


def test_keys_may_be_shared_by_heads_and_queries_may_overlap_in_memory(device):
    _, k, v, x, *_ = heads((1, 3, 20, 30, 16), BF16, device)
    k, v = (t[:, :1].expand(-1, 3, -1, -1) for t in (k, v))
    line = torch.linspace(-2, 2, 64).to(device=device, dtype=BF16)
    q = line.as_strided((1, 3, 20, 16), (0, 5, 1, 1))
    out = rcmlib.rcm_sage_attention(q, k, v, x, 0.5, 0.5, smooth_q=True)
    expected = rcmlib.rcm_sage_attention(
        *map(dense, (q, k, v)), x, 0.5, 0.5, smooth_q=True
    )
    assert torch.equal(out, expected)


DEGENERATE = {
    "zeros": lambda t: torch.zeros_like(t),
    "one token for all": lambda t: t[:, :, :1].expand(t.shape),
    "subnormal": lambda t: t * 1e-42,
    "some rows zero": lambda t: (
        t * (torch.arange(t.shape[2], device=t.device) % 2)[:, None]
    ),
}


@pytest.mark.parametrize("smooth", [ROUGH, SMOOTH | {"smooth_q": True}], ids=str)
def test_degenerate_inputs_stay_finite_and_near(smooth, device):
    q, k, v, *_ = heads((1, 1, 20, 130, 16), FP32, device)
    for change in DEGENERATE.values():
        for inputs in ((change(q), k, v), (q, change(k), v), (q, k, change(v))):
            out = sage_attention(*inputs, **smooth)
            ref = reference.merge_heads(reference.attention(*inputs))
            assert torch.isfinite(out).all()
            error = (out.double() - ref).norm()
            assert error <= 0.06 * ref.norm() + 1e-30


def test_extreme_scales_mean_all_keys_or_the_nearest(device):
    q, k, v, answer = one_hot(2, 32, device, FP32, samples=1)
    answer = reference.merge_heads(answer)
    mean = v.mean(2, keepdim=True).expand(v.shape)
    for smooth_q in (False, True):
        options = {"smooth_q": smooth_q, **ROUGH}
        for scale in (1.0, 1e4):
            assert_nearly(sage_attention(q, k, v, scale=scale, **options), answer)
        for scale in (1.2e-38, 1e-12):
            out = sage_attention(q, k, v, scale=scale, **options)
            assert_nearly(out, reference.merge_heads(mean))


@pytest.mark.gpu
def test_every_length_up_to_1024_is_finite_and_near():
    q, k, v = (t.cuda().half() for t in gaussian(1, 2, 1024, 64))
    for n in range(1, 1025):
        cut = [t[:, :, :n] for t in (q, k, v)]
        is_causal = n % 2 == 0
        out = sage_attention(*cut, is_causal=is_causal)
        ref = reference.merge_heads(reference.attention(*cut, is_causal=is_causal))
        error = (out.double() - ref).norm() / ref.norm()
        assert error < 0.06, (n, error)  # false for NaN too


@pytest.mark.gpu
def test_160_thousand_tokens_match_a_few_rows_of_the_model():
    q, k, v = (t.cuda().bfloat16() for t in gaussian(1, 1, 160_001, 128))
    out = sage_attention(q, k, v)
    assert torch.isfinite(out).all()
    rows = torch.tensor([0, 1, 80_000, 159_999, 160_000], device="cuda")
    some = (q[:, :, rows], k, v)
    ref = reference.merge_heads(reference.attention(*some))
    assert_follows(out[:, rows], model(*some), ref, share=0.5)


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31_elements(gpu_memory):
    """x, the result and q's copy, then k's and v's, have 2.3·10⁹ elements."""
    tokens, dim = 70_001, 128
    long = torch.randn(1, 1, tokens, dim, device="cuda", dtype=BF16)
    long = long.expand(-1, 256, -1, -1)
    short = torch.randn(1, 1, 64, dim, device="cuda", dtype=BF16).expand(
        -1, 256, -1, -1
    )
    x = torch.zeros(1, tokens, 256 * dim, device="cuda", dtype=BF16)
    x[0, -1] = 3
    assert x.numel() > 2**31
    out = rcmlib.rcm_sage_attention(long, short, short, x, 1.0, 1.0)
    f = model(long[:, :2, -3:], short[:, :2], short[:, :2])
    ref = reference.merge_heads(
        reference.attention(long[:, :2, -3:], short[:, :2], short[:, :2])
    )
    skip = torch.tensor([0.0, 0.0, 3.0], device="cuda")[:, None]
    assert_follows(out[:, -3:, -256:], skip + f, skip + ref, share=0.5)
    del x, out
    out = sage_attention(short, long, long)
    f = model(short[:, :1], long[:, :1], long[:, :1])
    ref = reference.merge_heads(
        reference.attention(short[:, :1], long[:, :1], long[:, :1])
    )
    assert_follows(out[..., -128:], f, ref, share=0.5)


@pytest.mark.gpu
def test_strides_between_tokens_may_be_huge(gpu_memory):
    """Token stride 2²⁶ elements: row 40 of a tile lies beyond int32."""
    storage = torch.zeros(40 * 2**26 + 16, device="cuda", dtype=FP16)
    far = storage.as_strided((1, 1, 41, 16), (16, 16, 2**26, 1))
    far.normal_()
    for place in range(3):
        qkv = [dense(far)] * 3
        expected = sage_attention(*qkv)
        qkv[place] = far
        assert torch.equal(sage_attention(*qkv), expected)
    x = far[:, 0]  # [1, 41, 16]
    expected = rcmlib.rcm_sage_attention(*qkv[:1] * 3, dense(x), 0.5, 0.5)
    assert torch.equal(rcmlib.rcm_sage_attention(*qkv[:1] * 3, x, 0.5, 0.5), expected)


@pytest.mark.gpu
def test_any_stream_and_a_graph_repeat_the_result_bit_for_bit():
    inputs = heads((2, 4, 500, 500, 64), BF16, "cuda")
    first = rcmlib.rcm_sage_attention(*inputs, smooth_q=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        second = rcmlib.rcm_sage_attention(*inputs, smooth_q=True)
    stream.synchronize()
    assert torch.equal(first, second)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        third = rcmlib.rcm_sage_attention(*inputs, smooth_q=True)
    third.fill_(float("nan"))
    graph.replay()
    assert torch.equal(first, third)


# ---- torch.library, autograd, autocast ----


def small(device, dtype=FP32):
    return heads((2, 2, 9, 7, 16), dtype, device)


def test_the_operator_passes_opcheck(device):
    q, k, v, x, c_skip, c_out = small(device)
    smooth = (False, True, True)
    operator = torch.ops.rcmlib.sage_attention
    torch.library.opcheck(
        operator, (q, k, v, x, c_skip, c_out, 0.25, False, *smooth, "fp8")
    )
    torch.library.opcheck(
        operator, (q, k, v, None, None, None, 0.25, True, True, True, False, "fp16")
    )


def test_it_compiles_into_one_graph_for_many_lengths(device):
    @torch.compile(fullgraph=True, dynamic=True, backend=BACKEND)
    def layer(q, k, v, x):
        return rcmlib.rcm_sage_attention(q, k, v, 2 * x, 0.25, 0.75) + 1

    for tokens in (6, 70):
        q, k, v, x, *_ = heads((2, 2, tokens, tokens, 16), FP32, device)
        expected = rcmlib.rcm_sage_attention(q, k, v, 2 * x, 0.25, 0.75) + 1
        assert torch.equal(layer(q, k, v, x), expected)


def test_fake_tensors_have_the_result_s_shape_and_dtype(device):
    q, k, v, x, c_skip, c_out = small(device, FP16)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(t) for t in (q, k, v, x.float(), c_skip, c_out)]
        out = rcmlib.rcm_sage_attention(*fake)
        f = sage_attention(*fake[:3])
    assert out.shape == f.shape == (2, 9, 32)
    assert (out.dtype, f.dtype) == (FP32, FP16)


@pytest.mark.parametrize("place", range(6), ids=["q", "k", "v", "x", "c_skip", "c_out"])
def test_a_call_that_wants_a_gradient_is_refused(place, device):
    inputs = list(small(device))
    inputs[place] = inputs[place].requires_grad_()
    with pytest.raises(
        RuntimeError, match=r"no gradients.*torch\.no_grad.*rcm_attention"
    ):
        rcmlib.rcm_sage_attention(*inputs)
    if place < 3:
        with pytest.raises(RuntimeError, match="no gradients"):
            sage_attention(*inputs[:3])
    with torch.no_grad():
        assert torch.isfinite(rcmlib.rcm_sage_attention(*inputs)).all()
    with torch.inference_mode():
        assert torch.isfinite(rcmlib.rcm_sage_attention(*inputs)).all()


def test_torch_func_is_refused_and_never_a_zero_gradient(device):
    q, *rest = small(device)

    def loss(q):
        return rcmlib.rcm_sage_attention(q, *rest).sum()

    with pytest.raises(RuntimeError, match="no gradients"):
        torch.func.grad(loss)(q)
    with pytest.raises(RuntimeError, match="no gradients"):
        torch.func.jvp(loss, (q,), (torch.ones_like(q),))
    compiled = torch.compile(loss, backend="eager")
    with pytest.raises(RuntimeError, match="no gradients"):
        compiled(q.clone().requires_grad_())


def test_autocast_casts_q_k_and_v_and_nothing_else(device):
    q, k, v, x, *_ = heads((1, 2, 40, 70, 32), FP32, device)
    q, k = q + 10, k + 10  # a correction of scores that 16 bits would not hold
    options = {"smooth_q": True, "smooth_k": False}
    cast = [t.bfloat16() for t in (q, k, v)]
    expected = rcmlib.rcm_sage_attention(*cast, x, 0.5, 0.5, **options)
    with torch.autocast(device, BF16):
        out = rcmlib.rcm_sage_attention(q, k, v, x, 0.5, 0.5, **options)
    assert torch.equal(out, expected)
