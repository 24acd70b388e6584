"""The quantisers against their specification, bit for bit, and FP8 rounding against torch's."""

import pytest
import torch

from rcmlib.core import interpreting
from rcmlib.reference import eight_bit
from rcmlib.sage import quantize
from rcmlib.sage.quantize import tl, triton
from tests.inputs import DTYPES, needs_fp8, poison_empty

pytestmark = needs_fp8

LENGTHS = [1, 15, 16, 17, 127, 128, 129, 300]
DIMS = [16, 64, 80, 128, 160, 256]
FACTOR = 0.1275


def tokens(length, dim, dtype=torch.float32, device="cpu", seed=0):
    """[1, 2, length, dim] with a mean, as a launcher gets it (a CPU's has no bfloat16)."""
    random = torch.Generator().manual_seed(1000 * length + dim + seed)
    t = torch.randn(1, 2, length, dim, generator=random) * 3 + 1
    t = t.to(device=device, dtype=dtype)
    return t.float() if device == "cpu" and dtype == torch.bfloat16 else t


def cases(first):
    """(length, dim, dtype): all lengths with 24 channels, and all dims with 17 tokens."""
    yield from ((n, 24, DTYPES[first % 3]) for n in LENGTHS)
    yield from ((17, d, DTYPES[(first + i) % 3]) for i, d in enumerate(DIMS))


def bits(t):
    """t's bit patterns: -0.0 differs from 0.0, and NaN equals itself."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return t.contiguous().view(kinds[t.element_size()])


def assert_same(out, ref):
    assert out.dtype == ref.dtype and out.shape == ref.shape
    assert torch.equal(bits(out), bits(ref))


def assert_padded(out, ref):
    """out is ref with zeros behind it, in both of the last dimensions."""
    n, d = ref.shape[-2:]
    assert_same(out[..., :n, :d], ref)
    assert not bits(out[..., n:, :]).any() and not bits(out[..., d:]).any()


def check_columns(t):
    dim = t.shape[-1]
    mean = eight_bit.column_mean(t)
    for smooth in (False, True):
        found = quantize.column_statistics(t, smooth, True)
        center = mean if smooth else None
        assert_same(found.top[..., :dim], eight_bit.column_top(t, center))
        if smooth:
            assert_same(found.mean[..., :dim], mean)
        assert (found.top > 0).all()


def padded_mean(t, block_d):
    """The specification's mean [B, H, D] as the kernels read it: [B, H, BLOCK_D]."""
    mean = eight_bit.column_mean(t)
    return mean, torch.nn.functional.pad(mean, (0, block_d - t.shape[-1]))


def check_int8(t, group, smooth, factor):
    length, dim = t.shape[2:]
    mean, padded = padded_mean(t, quantize.padded_dim(dim))
    if not smooth:
        mean = padded = None
    out, scales = quantize.quantize_int8(t, group, padded, factor)
    ref, ref_scales = eight_bit.quantize_int8(t, group, mean, factor)
    rows = quantize.padded_length(length)
    assert out.shape == (*t.shape[:2], rows, quantize.padded_dim(dim))
    assert_padded(out, ref)
    assert scales.shape == (*t.shape[:2], rows // group)
    assert_same(scales[..., : ref_scales.shape[-1]], ref_scales)
    assert scales.isfinite().all()


def check_values(v, limit, smooth, fp8):
    length, dim = v.shape[2:]
    mean, padded = padded_mean(v, quantize.padded_dim(dim))
    if not smooth:
        mean = padded = None
    top = quantize.column_statistics(v, smooth, True).top
    out = quantize.quantize_values(v, limit, top, padded, fp8)
    dtype = torch.float8_e4m3fn if fp8 else torch.float16
    ref, _ = eight_bit.quantize_values(v, limit, mean, dtype)
    if fp8:  # back from [channel, position] to [token, channel]
        order = torch.tensor(eight_bit.TOKEN_ORDER, device=v.device)
        stored = out.view(torch.uint8).unflatten(-1, (-1, 16))
        tokens = torch.empty_like(stored)
        tokens[..., order] = stored
        out, ref = tokens.flatten(-2).mT, ref.view(torch.uint8)
    rows = quantize.padded_length(length)
    assert out.shape == (*v.shape[:2], rows, quantize.padded_dim(dim))
    assert_padded(out, ref)


def test_means_and_ranges_agree_bit_for_bit(device):
    for case in cases(first=2):
        check_columns(tokens(*case, device))


@pytest.mark.gpu
def test_means_and_ranges_agree_over_many_chunks():
    for length in (4097, 100_003):
        check_columns(tokens(length, 64, torch.bfloat16, "cuda"))


@pytest.mark.parametrize(
    ("group", "smooth", "factor"),
    [
        (1, False, FACTOR),
        (1, True, FACTOR),
        (32, True, 1.0),
        (64, False, 1.0),
        (128, True, 1.0),
    ],
)
def test_int8_copies_agree_bit_for_bit(group, smooth, factor, device):
    for case in cases(first=group):
        check_int8(tokens(*case, device), group, smooth, factor)


@pytest.mark.parametrize("smooth", [False, True], ids=["as it is", "centred"])
@pytest.mark.parametrize(
    ("limit", "fp8"),
    [(448.0, True), (2.25, True), (448.0, False)],
    ids=["448", "2.25", "float16"],
)
def test_copies_of_v_agree_bit_for_bit(limit, fp8, smooth, device):
    for case in cases(first=fp8 + smooth):
        check_values(tokens(*case, device), limit, smooth, fp8)


def test_the_order_of_tokens_is_the_specification_s():
    order = [quantize.token_at.fn(p) for p in range(32)]
    assert order[:16] == eight_bit.TOKEN_ORDER
    assert order[16:] == [16 + n for n in eight_bit.TOKEN_ORDER]


def views(device):
    """Inputs with strides that are not a contiguous tensor's."""
    packed = torch.randn(2, 45, 3, 2, 24, device=device, dtype=torch.float16)
    yield packed.permute(2, 0, 3, 1, 4)[1]
    yield tokens(33, 24, torch.float16, device)[:, :1].expand(-1, 2, -1, -1)
    line = torch.randn(2000, device=device)
    yield line[1 : 1 + 17 * 24].view(1, 1, 17, 24)
    yield line.as_strided((1, 2, 40, 24), (0, 64, 1, 1))
    yield line[:24].expand(1, 2, 40, 24)


def test_any_strides_will_do(device):
    for t in views(device):
        check_columns(t)
        check_int8(t, 32, True, FACTOR)
        check_values(t, 448.0, True, fp8=True)


EXTREMES = {
    "zeros": lambda t: t * 0,
    "negative zeros": lambda t: t * -0.0,
    "tiny": lambda t: t.float() * 1e-38,
    "subnormal": lambda t: t.float() * 1e-42,
    "constant channels": lambda t: t[:, :, :1].expand(t.shape),
    "large float16": lambda t: (t.sign() * 65504).half(),
    "large float32": lambda t: t.float() * 1e36,
    "one large number": lambda t: t.index_fill(
        2, torch.tensor([0], device=t.device), 3e4
    ),
}


@pytest.mark.parametrize("change", EXTREMES.values(), ids=EXTREMES)
def test_extreme_channels_agree_bit_for_bit(change, device):
    t = change(tokens(40, 24, device=device))
    check_columns(t)
    for smooth in (False, True):
        check_int8(t, 1, smooth, FACTOR)
        check_int8(t, 128, smooth, FACTOR)
        check_values(t, 448.0, smooth, fp8=True)
        check_values(t, 448.0, smooth, fp8=False)


def test_every_byte_is_written(device, monkeypatch):
    t = tokens(17, 80, device=device)
    top = quantize.column_statistics(t, True, True).top

    def copies():
        yield from quantize.column_statistics(t, True, True)
        yield from quantize.quantize_int8(t, 32)
        for fp8 in (True, False):
            yield quantize.quantize_values(t, 448.0, top, None, fp8)

    expected = list(copies())
    for poison in (0xA5, 0x5A):  # int8 knows no NaN
        poison_empty(monkeypatch, poison)
        for out, ref in zip(copies(), expected, strict=True):
            assert_same(out, ref)


def test_int8_is_the_nearest_number_that_the_scale_allows(device):
    t = tokens(64, 24, torch.float32, device)
    t8, scale = quantize.quantize_int8(t, 32)
    back = eight_bit.dequantize_int8(t8[:, :, :64, :24], scale[:, :, :2])
    error = (back - t.double()).abs().unflatten(2, (-1, 32)).amax((3, 4))
    assert (error <= scale[:, :, :2].double() * (0.5 + 1e-4)).all()


# ---- FP8 rounding ----


@triton.jit
def round_kernel(x, codes, n, NATIVE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rounded = quantize.to_e4m3(tl.load(x + i, mask=i < n), NATIVE)
    tl.store(codes + i, rounded.to(tl.uint8, bitcast=True), mask=i < n)


def kernel_codes(x, native):
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    round_kernel[(triton.cdiv(x.numel(), 4096),)](
        x, codes, x.numel(), NATIVE=native, BLOCK=4096
    )
    return codes


def check_rounding(x):
    """Both ways of to_e4m3 against torch's cast.

    Beyond ±448 the kernel stays at ±448, as the GPU's instruction does, infinity included.
    torch's cast does so in some versions; in others it makes NaN of it. Hence the clamp.
    """
    ref = x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    for native in [False] if interpreting() else [False, True]:
        codes = kernel_codes(x, native)
        nan = x.isnan()
        assert torch.equal(codes[~nan], ref[~nan])
        assert (codes[nan] & 0x7F == 0x7F).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of NaN and infinity
def test_every_bfloat16_rounds_as_torch_rounds_it(device):
    patterns = torch.arange(2**16, dtype=torch.int32, device=device) << 16
    check_rounding(patterns.view(torch.float32))


def test_ties_and_their_neighbours_round_as_torch_rounds_them(device):
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    numbers = codes.double()  # 0 … 448, in order
    ties = (numbers[1:] + numbers[:-1]) / 2
    assert (ties.float().double() == ties).all()  # a float32 holds every tie
    x = torch.cat([numbers, ties, torch.tensor([456.0, 464.0, 480.0, 1e30])]).float()
    up, down = (x.nextafter(torch.tensor(e)) for e in (float("inf"), 0.0))
    x = torch.cat([x, up, down])
    check_rounding(torch.cat([x, -x]).to(device))


def test_small_numbers_zeros_and_what_is_not_a_number_round_as_torch_rounds_them(
    device,
):
    small = torch.linspace(-(2.0**-6), 2.0**-6, 20_001)
    odd = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-38, float("nan"), float("inf")])
    check_rounding(torch.cat([small, odd, -odd]).to(device))
